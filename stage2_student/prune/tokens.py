"""A model that feeds fewer visual tokens than before, without training: its weights stay, its configuration says the rest."""

import shutil
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import clean_stale, new_directory
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.hub import public_name
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.data.text.generation import pad_token_id
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.batches.gaze import GAZE, GazeTerm
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE
from vlm_distill_cache.stage2_student.pruned_folder import RECORD, pruning_record, refuse_damaged
from vlm_distill_cache.stage2_student.scores.card import write_card
from vlm_distill_cache.stage2_student.scores.plain_card import write_plain_card
from vlm_distill_cache.stage2_student.scores.token_words import token_words
from vlm_distill_cache.stage2_student.students.library import core_of
from vlm_distill_cache.stage2_student.students.parts import lone_encoder, lone_parts
from vlm_distill_cache.stage2_student.trained_student import DTYPES, Student, open_model, open_student, stored_dtype
from vlm_distill_cache.stage2_student.training.checks import check_data, same_tokenizer
from vlm_distill_cache.stage2_student.training.preparation import open_cached_data
from vlm_distill_cache.stage2_student.training.token_choice import check_choice, choose_tokens, chooses_tokens

BUILT_IN = "training.json"  # of a built-in teacher, which says how it is asked


def needs_cache(config: TrainConfig) -> bool:
    """Whether visual tokens are chosen by what a cache holds."""
    return config.visual_tokens is not None and config.token_selection in ("sinks", "gaze")


def select_tokens(folder: Path, target: Path, config: TrainConfig, *, cache: str | None) -> dict[str, str]:
    """Write a student, a teacher or anybody's model anew, with another choice of visual tokens.

    Args:
        folder: Of a student of ours, or a checkpoint of a listed family.
        target: New folder; it appears whole or not at all.
        config: Its options of visual tokens; ``data`` and ``images`` are what the cache was built from.
        cache: For ``token_selection`` ``sinks`` and ``gaze``; a model that is no student of ours reads as one of this cache.

    Returns:
        What is chosen, in words.

    Raises:
        ConfigError: If the target exists, nothing is chosen, or a cache is lacking.
        ModelError: If the model is damaged or quantised, or its tokens cannot be chosen so.
        CacheMismatchError: If the cache does not hold what is needed.
    """
    if not chooses_tokens(config):
        raise ConfigError(
            "neither visual_tokens nor decoding_tokens is given, so that nothing would change; add --visual-tokens 0.5, say"
        )
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists; give a new folder")
    refuse_inside(target)
    if needs_cache(config) and cache is None:
        raise ConfigError(
            f"--token-selection {config.token_selection} takes what a teacher's cache holds, and none is given; add --cache "
            "FOLDER, or choose attention, grid or random"
        )
    refuse_damaged(folder)
    student, cut = _open(folder, cache), pruning_record(folder)
    if student.provenance.get("export", {}).get("quantise"):
        raise ModelError(f"{folder}: its weights are quantised and are not written again; give what it was made of")
    dtype = stored_dtype(folder)
    opened = None if cache is None or not needs_cache(config) else open_trusted(cache)
    _choose(config, student, opened, where=f"model {folder}")
    core = core_of(student.model)
    core.to(DTYPES[dtype])
    clean_stale(target.parent, target.name)
    with new_directory(target) as temporary:
        save_student_folder(
            temporary,
            model=student.model,
            encoder=student.encoder,
            image_processor=student.image_processor,
            source=folder,
        )
        if (folder / BUILT_IN).is_file():
            shutil.copyfile(folder / BUILT_IN, temporary / BUILT_IN)
        if cut:  # what it is changed to is a part of what it is
            cut |= {"distilled": changes_of(core.config), "files": list_files(temporary)}
            write_signed(temporary / RECORD, cut)
        if "encoder" in student.provenance:
            made_from = {"files": student.provenance.get("files", {}), "export": student.provenance.get("export")}
            said = {"layout": "auto", "dtype": dtype, "quantise": None, "made_from": made_from}
            provenance = {**student.provenance, "export": said, "files": list_files(temporary)}
            write_signed(temporary / PROVENANCE, provenance)
            write_card(temporary, provenance)
        else:
            write_plain_card(temporary, public_name(str(folder)))
        return token_words(temporary)


def _open(folder: Path, cache: str | None) -> Student:
    if (folder / PROVENANCE).exists():
        return open_student(folder, device="cpu")
    if cache is not None:
        return open_model(folder, cache, device="cpu")
    parts = lone_parts(folder, dtype="float32")
    return Student(
        path=folder,
        model=parts.load().eval(),
        encoder=lone_encoder(parts),
        tokenizer=parts.tokenizer,
        image_processor=parts.image_processor,
        provenance={},
    )


def _choose(config: TrainConfig, student: Student, cache: TeacherCache | None, *, where: str) -> None:
    """Change the student in memory."""
    check_choice(config, [] if cache is None else [cache], student.model, student.encoder.image_encoder, where=where)
    dataset = None
    if cache is not None and config.follows_gaze:
        data = open_cached_data(cache, data=config.data, images=config.images)
        check_data(cache, data)
        same = same_tokenizer(cache, student.tokenizer) and student.encoder.template.to_dict() == cache.plan.template
        terms: dict[str, Any] = {GAZE: GazeTerm()}
        dataset = CachedDataset(
            data,
            student.encoder,
            cache,
            terms=terms,
            pad_token_id=pad_token_id(student.encoder),
            limit=config.limit,
            compare_labels=same,
        )
    choose_tokens(
        config, student.model, cache=cache, encoder=student.encoder.image_encoder, dataset=dataset, where=where
    )
