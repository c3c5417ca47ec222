"""A trained student as it lies on disk: opened with its encoder, scored, exported; its cache may be gone."""

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.spaced import FEW_RECORDS
from vlm_distill_cache.common.cache.versions import kept_versions
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import (
    CacheFormatError,
    CacheMismatchError,
    ConfigError,
    DataError,
    DistillError,
    ModelError,
    TransferError,
)
from vlm_distill_cache.common.files.atomic import clean_stale, new_directory
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.hub import CARD
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.models.weight_files import read_weights
from vlm_distill_cache.common.printing import size_words
from vlm_distill_cache.common.tools.record_view import load_token_text
from vlm_distill_cache.common.tools.shift import cache_shift
from vlm_distill_cache.common.tools.shift_view import draw_shift
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.data.families.inputs import known_positions
from vlm_distill_cache.data.families.models import unify_dtype
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.data.questions import AskedData
from vlm_distill_cache.data.sample import Dataset, EvaluationSet
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import PromptTemplate
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset, merged_fingerprints, missing_samples
from vlm_distill_cache.stage2_student.batches.layers import match_groups
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.exports.layouts import LAYOUTS
from vlm_distill_cache.stage2_student.exports.source import Quantise, Source, unpack_odd_layers
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_openable
from vlm_distill_cache.stage2_student.losses.terms import TERMS, choose_terms
from vlm_distill_cache.stage2_student.scores.card import has_edited_card, read_scores, write_card
from vlm_distill_cache.stage2_student.scores.evaluate import evaluate_model
from vlm_distill_cache.stage2_student.scores.flips import Flips, collect_flips
from vlm_distill_cache.stage2_student.scores.gaze import RunShift, compare_shifts
from vlm_distill_cache.stage2_student.scores.held_out import OpenedItems, open_items, scored_items
from vlm_distill_cache.stage2_student.scores.quantised import Quantised
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport
from vlm_distill_cache.stage2_student.scores.taught import TEACHER, Taught, collect_taught
from vlm_distill_cache.stage2_student.students.build import load_student
from vlm_distill_cache.stage2_student.students.encoder import (
    build_encoder,
    describe_encoder,
    knows_boxes,
    load_processors,
)
from vlm_distill_cache.stage2_student.students.library import LibraryStudent, open_library_student
from vlm_distill_cache.stage2_student.students.model import StudentModel, vocabulary_rows
from vlm_distill_cache.stage2_student.students.parts import open_parts
from vlm_distill_cache.stage2_student.training.checkpoint import list_checkpoints, read_checkpoint
from vlm_distill_cache.stage2_student.training.checks import same_tokenizer
from vlm_distill_cache.stage2_student.training.preparation import encoder_for, open_cached_data

COMPARED_SIGNALS = (LogitCodec.signal, RowAttentionCodec.signal)
_log = logging.getLogger(__name__)
_SHIFT_SAMPLES, _SHIFT_SHEETS = 64, 3  # that students are run on; largest shifts that are drawn
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Student:
    """A trained student.

    The model is on an accelerator if there is one, float32, in evaluation mode; ``provenance`` says what it was
    trained from.
    """

    path: Path
    model: StudentModel
    encoder: SampleEncoder
    tokenizer: Any
    image_processor: Any
    provenance: dict[str, Any]


def open_student(folder: Path, *, device: str | None = None) -> Student:
    """Open what `train()` saved in ``OUTPUT/final``, or an export of it.

    Args:
        device: None: an accelerator if there is one.

    Raises:
        ModelError: If the folder is no trained student of ours, is damaged, or an export for other programs.
    """
    provenance = read_openable(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    image_encoder: AnyImageEncoder | None = None
    model: Any
    if is_published(folder):
        model = _load_quantised(folder) if _quantised(provenance) else load_student(folder)
        tokenizer, image_processor = load_processors(folder)
    else:
        opened = open_library_student(folder)
        model, tokenizer, image_processor = opened.model, opened.tokenizer, opened.image_processor
        image_encoder = opened.image_encoder
    if _quantised(provenance):
        unpack_odd_layers(model)
    return Student(
        path=folder,
        model=model.eval().to(device),
        encoder=build_encoder(
            provenance["encoder"],
            tokenizer,
            image_processor,
            image_encoder=image_encoder,
            grid=getattr(model, "image_grid", None),
            positions=known_positions(model.config),
        ),
        tokenizer=tokenizer,
        image_processor=image_processor,
        provenance=provenance,
    )


def open_model(folder: Path, place: str, *, device: str | None = None) -> Student:
    """Open a model that does not say what it was trained from: it reads as one that is trained from the cache at ``place``.

    Args:
        device: None: an accelerator if there is one.

    Raises:
        CacheFormatError: If there is no such cache.
        CacheMismatchError, ConfigError, ModelError: If the model cannot be opened, or not be trained from that cache.
    """
    cache = open_trusted(place)
    cache.check_side_files()
    config = TrainConfig(student=str(folder), cache=place, output=str(folder.parent))
    parts = open_parts(config, cache)
    return Student(
        path=folder,
        model=parts.load().eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        encoder=encoder_for(config, parts, {place: cache}),
        tokenizer=parts.tokenizer,
        image_processor=parts.image_processor,
        provenance={"config": asdict(config), "caches": {place: cache.manifest_hash}},
    )


def _quantised(provenance: Mapping[str, Any]) -> bool:
    return bool(provenance.get("export", {}).get("quantise"))


def _load_quantised(folder: Path) -> Any:
    """An export of one of our classes, whose digests were compared: names and shapes of packed weights cannot be."""
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    unify_dtype(model, torch.float32)
    return model


def open_as_trained(place: str, trained: object, *, verify: bool, needed: str = "") -> TeacherCache:
    """The cache at a place; where it was topped up since, what it was then.

    Args:
        trained: The hash of its manifest at the training.
        needed: For what it must be that very cache; empty: another one will do.

    Raises:
        CacheFormatError, TransferError: If it cannot be opened.
        ConfigError: If it is another one, and must not be.
    """
    try:
        found = open_trusted(place, verify=verify)
    except (CacheFormatError, TransferError) as error:
        found, fault = None, error
    if (found is None or found.manifest_hash != trained) and not is_url(place):
        kept = kept_versions(Path(place)).get(str(trained))
        with contextlib.suppress(CacheFormatError):
            if kept is not None:
                shown = kept if Path(place).is_absolute() else Path(os.path.relpath(kept))
                return open_trusted(shown, verify=verify)
    if found is None:
        raise fault
    if needed and trained not in (None, found.manifest_hash):
        raise ConfigError(
            f"{needed} {place} as it was at the training, and it is another cache now (extended, or built anew); put a copy "
            "of the former one there"
        )
    return found


def open_compared(student: Student, config: TrainConfig, *, given: bool) -> tuple[TeacherCache | None, list[str]]:
    """The cache to compare a student by: the one given, or that of its training.

    Returns:
        The cache, None if it cannot be opened; and what is to be said of it, sentences.

    Raises:
        CacheFormatError, TransferError: If the one given cannot be opened.
    """
    place, trained = config.cache, student.provenance["caches"].get(config.cache)
    if given:
        return open_trusted(place, verify=config.verify), []
    agrees = bool(config.evaluation.agreement_samples)
    try:
        found = open_as_trained(place, trained, verify=config.verify)
    except (CacheFormatError, TransferError) as error:
        said = f"Not compared with the teacher of its training: {error}. Name its cache with --cache."
        return None, [said] if agrees else []
    if trained not in (None, found.manifest_hash):
        said = f"{place} is another cache than the one of this training (extended, or built anew)."
    elif not is_url(place) and Path(found.place) != Path(place):
        said = f"{place} has changed since this training; compared with what it was then, {found.place}."
    else:
        return found, []
    return found, [said] if agrees else []


def evaluate_student(
    student: Student, config: TrainConfig, cache: TeacherCache | None, *, unfit: Callable[[str], None] | None = None
) -> EvaluationReport:
    """Score a student on held-out items and, if its cache is at hand, against the cached teacher.

    Args:
        unfit: Told why there is no comparison with the teacher; None: that is an error.
    """
    return open_scoring(student, config, cache, unfit=unfit).report()


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What a student is scored on, opened once for however many times: ``evaluate_student`` does it once.

    Attributes:
        letters: Whether it is asked for letters, too.
        signals: By what it is compared with the teacher.
        unfit: Told why there is no comparison with the teacher; None: that is an error.
    """

    student: Student
    letters: bool
    opened: OpenedItems
    cached: CachedDataset | None
    signals: Sequence[str]
    place: str
    unfit: Callable[[str], None] | None

    @property
    def names(self) -> list[str]:
        """The scores of all kinds that there will be, as far as students may be chosen by them; the first matter most."""
        items, agrees = self.opened.items, self.cached is not None and LogitCodec.signal in self.signals
        of_pairs = ["likelihood", "likelihood_per_token", *(["letters/mean"] if self.letters else [])]
        found = [*(of_pairs[:1] if items.pairs else []), *(["questions"] if items.questions else [])]
        found += ["teacher/top1", "teacher/kl"] if agrees else []
        return found + (of_pairs[1:] if items.pairs else [])

    def report(self) -> EvaluationReport:
        """Score the student as it is now."""
        model, encoder = self.student.model, self.student.encoder
        compared = EvaluationReport()
        if self.cached is not None:
            with _noted(self.place, self.unfit):
                compared = evaluate_model(model, encoder, EvaluationSet(), cached=self.cached)
        report = evaluate_model(model, encoder, self.opened.items, letters=self.letters)
        return EvaluationReport(
            scores={**report.scores, **compared.scores},
            items={**report.items, **compared.items},
            unreadable=self.opened.unreadable,
        )


def open_scoring(
    student: Student, config: TrainConfig, cache: TeacherCache | None, *, unfit: Callable[[str], None] | None = None
) -> Scoring:
    """Open what a student is scored on; arguments as of `evaluate_student`."""
    how, place = config.evaluation, "" if cache is None else cache.place
    opened, cached, signals = open_items(config, student.encoder, cache), None, list[str]()
    if how.agreement_samples and cache is not None:
        with _noted(place, unfit):
            cached = join_cached(student, config, cache, limit=how.agreement_samples)
            signals = comparable_signals(student, cache)
    return Scoring(
        student=student,
        letters=how.letters,
        opened=opened,
        cached=cached,
        signals=signals,
        place=place,
        unfit=unfit,
    )


@contextlib.contextmanager
def _noted(place: str, unfit: Callable[[str], None] | None) -> Iterator[None]:
    """Tell ``unfit`` why there is no comparison with a cache's teacher; None: that is an error."""
    try:
        yield
    except DistillError as error:
        if unfit is None:
            raise
        unfit(f"Not compared with the teacher of {place}: {error}")


def comparable_signals(student: Student, cache: TeacherCache) -> list[str]:
    """The signals by which a student can be compared with a teacher: none where their tokens differ."""
    cached = PromptTemplate.from_dict(cache.plan.template)
    if student.encoder.template != cached or not same_tokenizer(cache, student.tokenizer):
        return []
    family = student.model.family if isinstance(student.model, LibraryStudent) else None
    looks = family is None or family.is_listed
    boxes = all(map(knows_boxes, (cache.plan.geometry, student.encoder.image_encoder.to_dict())))
    found = [signal for signal in COMPARED_SIGNALS if signal in cache.plan.signals]
    return [signal for signal in found if not TERMS[signal].attends or (looks and boxes)]


def join_cached(student: Student, config: TrainConfig, cache: TeacherCache, *, limit: int) -> CachedDataset | None:
    """The first cached samples, with the signals that a student is compared by; None where there are none."""
    signals = comparable_signals(student, cache)
    if not signals:
        _log.info("student and teacher have no token in common that could be compared: no agreement is measured")
        return None
    terms = choose_terms(signals)
    attends = any(term.attends for term in terms.values())
    return CachedDataset(
        _data_of_cache(config, cache),
        student.encoder,
        cache,
        terms=terms,
        pad_token_id=student.tokenizer.pad_token_id or 0,
        limit=limit,
        match=match_groups(cache.plan, _depth(student)) if attends else None,
        vocabulary=vocabulary_rows(student.model),
    )


def _data_of_cache(config: TrainConfig, cache: TeacherCache) -> Dataset:
    """The data that a cache was built from: those of the training, or those that are scored on."""
    how = config.evaluation
    own, scored = (config.data, config.images), (how.data, how.images or config.images)
    for data, images in dict.fromkeys([own, scored, (None, None)]):
        with contextlib.suppress(ConfigError, DataError, OSError):
            found = open_cached_data(cache, data=data, images=images)
            if missing_samples(cache, found.sample_ids)[0] < (len(cache) if merged_fingerprints(cache) else 1):
                return found
    data, images = own if how.data is None else scored
    return open_cached_data(cache, data=data, images=images)


def _depth(student: Student) -> int:
    return int(student.model.language_model.config.num_hidden_layers)


def show_taught(students: Mapping[str, Student], config: TrainConfig, cache: TeacherCache) -> list[Taught]:
    """A few cached samples: what teacher and students say and, where the cache tells, where they look."""
    count, first = config.evaluation.overlays, next(iter(students.values()))
    if not count:
        return []
    looking = all(RowAttentionCodec.signal in comparable_signals(student, cache) for student in students.values())
    return collect_taught(
        _models(students),
        cache,
        _data_of_cache(config, cache),
        match=match_groups(cache.plan, _depth(first)) if looking else None,
        count=count,
    )


def show_shift(students: Mapping[str, Student], config: TrainConfig, cache: TeacherCache) -> RunShift | None:
    """How the teacher's gaze shifts within its answers, and the students' on some of them; None: no gaze is cached."""
    if RowAttentionCodec.signal not in cache.plan.signals:
        return None
    asked: AskedData | None = None
    with contextlib.suppress(ConfigError, DataError):  # they were there when it was trained; kinds are of answers then
        asked = AskedData(_data_of_cache(config, cache))
    teacher = cache_shift(cache, asked=None if asked is None else asked.questions, most=FEW_RECORDS)
    text, sheets = load_token_text(cache), []
    for one in teacher.largest[:_SHIFT_SHEETS]:
        with contextlib.suppress(CacheMismatchError):  # the data have other pictures now
            pictures = None if asked is None else asked.pictures(one.sample_id, cache.plan.extra.get("frames"))
            sheets.append(draw_shift(cache, teacher, one, text, pictures))
    first, count = next(iter(students.values())), min(_SHIFT_SAMPLES, config.evaluation.agreement_samples)
    looking = all(RowAttentionCodec.signal in comparable_signals(student, cache) for student in students.values())
    cached = join_cached(first, config, cache, limit=count) if looking and count and asked is not None else None
    models = {name: student.model for name, student in students.items()}
    end = cache.plan.template.get("answer_end")
    beside = {} if cached is None else compare_shifts(models, cached, text, written_end=end)
    return RunShift(teacher=teacher, sheets=sheets, beside=beside)


def show_flips(
    students: Mapping[str, Student],
    config: TrainConfig,
    cache: TeacherCache,
    reports: Mapping[str, EvaluationReport],
) -> tuple[list[Flips], str]:
    """The items on which two students differ, the one before and the one after; ``reports`` may have the teacher's.

    Returns:
        What can be shown, and if that is nothing, why.
    """
    before, after = (reports[name] for name in students)
    if not (before.items.keys() & after.items.keys() & {"likelihood", "questions"}):
        return [], "No item was scored by itself."
    unread = before.unreadable or after.unreadable
    try:
        items = scored_items(config, next(iter(students.values())).encoder, cache, all_readable=not unread)
    except (ConfigError, DataError) as error:  # they were there when they were scored
        return [], f"The items that were scored cannot be opened any more: {error}"
    teacher = reports.get(TEACHER, EvaluationReport())
    found = collect_flips(_models(students), (before, after), items, cache, teacher)
    return found, "" if found else "The data are other ones now than those that were scored."


def _models(students: Mapping[str, Student]) -> dict[str, tuple[Any, SampleEncoder]]:
    return {name: (student.model, student.encoder) for name, student in students.items()}


def evaluate_quantised(
    student: Student,
    config: TrainConfig,
    cache: TeacherCache | None,
    kinds: Sequence[Quantise],
    *,
    unfit: Callable[[str], None] | None = None,
) -> dict[str, Quantised]:
    """Score a student as `export_student` quantises it, on the same items; the exports are not kept.

    They are for this machine alone, so that 4 bits may be scored of layers that not all processors compute with.

    Args:
        kinds: Which; of none nothing is done. The others are as of `evaluate_student`.

    Raises:
        ConfigError: If bitsandbytes is missing, or the student is none that was trained here.
        ModelError: If it cannot be quantised, or is already.
    """
    if kinds and not (student.path / PROVENANCE).exists():
        raise ConfigError(
            f"--quantise: {student.path} has no {PROVENANCE}: it was not trained here, so it cannot be exported; train it "
            "first (`distill train --student`), or leave the option out"
        )
    own = weight_bytes(student.path)
    with TemporaryDirectory(prefix="quantised-") as scratch:
        for kind in kinds:  # what is refused is refused before anything is scored
            _write_export(student.path, Path(scratch) / kind, layout="auto", dtype=None, quantise=kind, portable=False)
        return {
            kind: Quantised(
                report=evaluate_student(open_student(Path(scratch) / kind), config, cache, unfit=unfit),
                weight_bytes=weight_bytes(Path(scratch) / kind),
                own_bytes=own,
            )
            for kind in kinds
        }


def weight_bytes(folder: Path) -> int:
    """Bytes of a student's weights on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def describe_size(student: Student) -> dict[str, str]:
    """Parameters and weights of a student, in words."""
    count = sum(parameter.numel() for parameter in student.model.parameters())
    return {"parameters": f"{count:,}", "weights on disk": size_words(weight_bytes(student.path))}


def export_student(
    folder: Path, target: Path, *, layout: str = "auto", dtype: str | None = None, quantise: Quantise | None = None
) -> str:
    """Write a student in another layout or precision, with all that it says of itself.

    Args:
        folder: ``OUTPUT/final`` of a training, or an export.
        target: New folder; it appears whole or not at all.
        layout: One of ``LAYOUTS``.
        dtype: Of the weights, one of ``DTYPES``; None: as they are stored.
        quantise: Of the language model's weights, by bitsandbytes.

    Returns:
        The precision of the weights.

    Raises:
        ConfigError: If the target exists, or a library is missing.
        ModelError: If the student is damaged, or the layout cannot hold it.
    """
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{target} exists; give a new folder to export to")
    refuse_inside(target)
    dtype = _write_export(folder, target, layout=layout, dtype=dtype, quantise=quantise)
    if has_edited_card(folder):
        _log.warning(
            "%s was edited; the export has a card of its own, as it is loaded otherwise: copy what you want to keep of yours",
            folder / CARD,
        )
    return dtype


def _write_export(
    folder: Path, target: Path, *, layout: str, dtype: str | None, quantise: Quantise | None, portable: bool = True
) -> str:
    student = open_student(folder, device="cpu")
    if _quantised(student.provenance):
        raise ModelError(
            f"{folder}: its weights are quantised, and nothing brings the others back; export what it was made of"
        )
    dtype = dtype or stored_dtype(folder)
    source = Source(
        folder=folder,
        model=student.model,
        encoder=student.encoder,
        image_processor=student.image_processor,
        provenance=student.provenance,
        dtype=DTYPES[dtype],
        quantise=quantise,
        trained=partial(_trained, folder, student.provenance["fingerprint"]),
        portable=portable,
    )
    made_from = {"files": student.provenance.get("files", {}), "export": student.provenance.get("export")}
    said = {"layout": layout, "dtype": dtype, "quantise": quantise, "made_from": made_from}
    clean_stale(target.parent, target.name)
    with new_directory(target) as temporary:
        written = LAYOUTS[layout](temporary, source)
        provenance = {**student.provenance, "encoder": describe_encoder(written.encoder), "export": said}
        provenance["files"] = list_files(temporary)
        write_signed(temporary / PROVENANCE, provenance)
        write_card(temporary, provenance, scores=read_scores(folder))
    return dtype


def stored_dtype(folder: Path) -> str:
    """The precision of most of a student's weights, as one of ``DTYPES``."""
    sizes = Counter[torch.dtype]()
    for value in read_weights(folder).values():
        sizes[value.dtype] += value.shape.numel()
    return next((name for kind, _ in sizes.most_common() for name, one in DTYPES.items() if one == kind), "float32")


def _trained(folder: Path, fingerprint: str) -> Mapping[str, Any]:
    """What the last checkpoint of a student's training holds of it."""
    found = [one for one in list_checkpoints(folder.parent) if one.fingerprint == fingerprint]
    if not found:
        raise ModelError(
            f"{folder}: its adapters are merged, and lie alone in the checkpoints of its training, which are not beside it "
            f"({folder.parent}); give the `final` folder inside the run's own, or take another --layout"
        )
    state: Mapping[str, Any] = read_checkpoint(found[-1])["student"]
    return state
