"""What ``extract()`` fixes before the first forward pass: teacher directory, encoder, codecs, ``plan.json``."""

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.plan import FRAMES, LONG_SAMPLES, PROJECTION, RANKS, THREADS, Plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, SEVERAL_PICTURES, Field
from vlm_distill_cache.common.cache.shared_images import with_visual_source
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.errors import ConfigError, ModelError, SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.models.original_llava import is_original_llava, refuse_other_llavas
from vlm_distill_cache.common.models.parts import read_config
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.models.tokens.tower_attention import last_layer
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.families.inputs import known_positions, text_config
from vlm_distill_cache.data.families.unusable import refuse_config
from vlm_distill_cache.data.images.layouts import geometry_of
from vlm_distill_cache.data.sample import Dataset, FrameSampling, Survey
from vlm_distill_cache.data.sources.grouping import GroupedByImage
from vlm_distill_cache.data.text.encoding import LongSamples, SampleEncoder
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS, Sizes, build_codecs
from vlm_distill_cache.stage1_teacher.planning.cache_folder import stored_plan
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


def evaluation_of(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Turn the accuracy in ``training.json`` into scores as ``distill evaluate`` writes them.

    Returns:
        ``{"scores": {name: {"value", "low", "high", "items"}}}`` with shares in [0, 1] and normal 95 % intervals
        over items, kinds averaged without weights; None without a measured accuracy.
    """
    scores: dict[str, dict[str, float]] = {}
    for part, name in (("pairs", "likelihood"), ("questions", "questions")):
        kinds = training.get("accuracy", {}).get(part, {})
        means, variances, items = [], [], 0
        for kind, found in sorted(kinds.items()):
            share, count = found["accuracy"] / 100, found["items"]
            scores[f"{name}/{kind}"] = _score(share, share * (1 - share) / count, count)
            means.append(share)
            variances.append(share * (1 - share) / count)
            items += count
        if means:
            scores[name] = _score(sum(means) / len(means), sum(variances) / len(means) ** 2, items)
    return {"scores": scores} if scores else None


def _score(share: float, variance: float, items: int) -> dict[str, float]:
    half = 1.96 * math.sqrt(variance)
    rounded = [round(value, 6) for value in (share, max(0.0, share - half), min(1.0, share + half))]
    return {**dict(zip(("value", "low", "high"), rounded, strict=True)), "items": items}


def refuse_signals(signals: Sequence[str], teacher: Teacher) -> None:
    """Refuse signals that the teacher's family cannot give.

    Raises:
        ModelError: Naming the signals, the reason and what to ask for instead.
    """
    family, kind = teacher.family, teacher.config.model_type
    others = [name for name in signals if not EXTRACTORS[name].any_family]
    if others and not family.is_listed:
        raise ModelError(
            f"teacher {teacher.directory}: model_type {kind!r} is not in the table of families (data/families/table.py), "
            f"which says where language model, visual tokens and projector are; so {', '.join(others)} cannot be had: "
            "cache its logits only (--signals logits), or add an entry to the table"
        )
    attention = [name for name in signals if EXTRACTORS[name].attention]
    if attention and teacher.capture is None:
        raise ModelError(
            f"teacher {teacher.directory}: {', '.join(attention)} cannot be had: {teacher.no_attention}; cache its "
            "logits only (--signals logits)"
        )
    lacking = [name for name in signals if EXTRACTORS[name].at_images]
    if lacking and changes_of(teacher.config).get("visual_tokens"):
        raise ModelError(
            f"teacher {teacher.directory}: it feeds only some of a picture's visual tokens (config.json: distilled), so "
            f"{', '.join(lacking)} cannot be had: leave them out of the signals (logits, answer_attention and hidden are "
            "available), or give the model that it was made from"
        )
    if TowerAttentionCodec.signal in signals:
        try:
            last_layer(teacher.config, teacher.vision_tower)
        except ModelError as error:
            raise ModelError(
                f"teacher {teacher.directory}: {TowerAttentionCodec.signal} cannot be had: {error}; leave it out of the "
                "signals (the sinks of its language model can be found from the others)"
            ) from error
    causal = [name for name in signals if EXTRACTORS[name].causal]
    if causal and family.visual_rows != "causal":
        sees = {"image": "their whole image", "prefix": "the whole prompt"}[family.visual_rows]
        *most, last = (name for name, extractor in EXTRACTORS.items() if extractor.attention and not extractor.causal)
        raise ModelError(
            f"teacher {teacher.directory}: in model_type {kind!r} visual tokens see {sees}, and the codec of "
            f"{', '.join(causal)} keeps the lower triangle only; leave {', '.join(causal)} out ({', '.join(most)} and {last} "
            "are available)"
        )


def refuse_packing(dataset: Dataset, teacher: Teacher) -> None:
    """Refuse data that pack independent conversations where an image is seen differently in each.

    A few samples are looked at; where only some pack, those are recorded failures.
    """
    if teacher.family.packs:
        return
    turns = []
    for position in range(0, len(dataset), max(1, len(dataset) // LOOKED_AT)):
        with suppress(SampleError):
            sample = dataset[position]
            turns.append(len(sample.turns) if sample.independent_turns else 1)
    if turns and min(turns) > 1:
        why = "visual tokens see the question" if teacher.family.is_listed else "masks are not known"
        raise ModelError(
            f"teacher {teacher.directory}: in model_type {teacher.config.model_type!r} {why}, and data "
            f"{dataset.name!r} hold {turns[0]} independent questions about one picture in one sample; "
            "give data with one question a sample (a LLaVA .json or messages .jsonl)"
        )


def missing_projector(teacher: Teacher) -> str | None:
    """Why the teacher's projector is not handed on for the teacher adapter (TAF); None: it is."""
    if not teacher.family.is_listed:
        return f"model_type {teacher.config.model_type!r} is not in the table of families: its projector is not known"
    if teacher.family.projector_config(teacher.config) is None:
        return (
            f"the projector of model_type {teacher.config.model_type!r} is no two-layer MLP on a tower's patch tokens"
        )
    return None


LEAST_LENGTH, TEXT_LENGTH = 2048, 1024  # tokens
LOOKED_AT = 8  # samples


def refuse_settings(directory: Path) -> None:
    """Refuse a checkpoint by its settings alone, before its weights are downloaded."""
    if is_original_llava(directory):
        refuse_other_llavas(read_config(directory), where=directory)
    elif not is_published(directory):
        refuse_config(directory)


def teacher_directory(
    *, teacher: str, data: str, scratch: Path, cache: Path | None = None, trains: bool = True
) -> Path:
    """Find the teacher's checkpoint directory; a built-in one is trained first if the data needs its own.

    Args:
        teacher: A folder or a name on the hub, which is downloaded; empty: the built-in one.
        scratch: Where a teacher trained on the spot is kept.
        cache: The cache to build, for the error: it may have been begun with a teacher.
        trains: False: in place of a built-in one that is not trained yet, give one of its kind.

    Raises:
        ConfigError: If no teacher is given and the data set has none of its own.
        ModelError: If there is no such teacher.
        TransferError: If it could not be downloaded.
    """
    if teacher:
        return model_folder(teacher, what="teacher", check=refuse_settings).path
    from vlm_distill_cache.stage1_teacher.demo.teacher import (
        builtin_teacher_directory,
        demo_teacher_for,  # training code, needed for built-in data only
    )

    name = data.partition(":")[0]
    if name not in ("shapes", "easy-vqa"):
        begun = None if cache is None else stored_plan(cache)
        if begun is not None and (Path(cache or "") / MANIFEST).is_file():
            raise ConfigError(
                f"{cache}: the cache is complete; to compare it with options of stage one, give its "
                f"{by_make('TEACHER=... (--teacher)', '--teacher')} "
                "too, a folder or a name on the hub; to use it as it is, leave these options out"
            )
        if begun is not None:
            name, revision = one_line(begun.teacher.get("name", "unknown")), begun.teacher.get("revision")
            given = f"{name}@{one_line(revision)}" if revision else "FOLDER"
            raise ConfigError(
                f"{cache}: an unfinished cache of the teacher {name} is there, and no teacher is given: "
                f"{by_make(f'TEACHER={given} (--teacher {given})', f'--teacher {given}')} with that teacher continues it; another "
                f"{by_make('CACHE=', '--cache')} begins a new one"
            )
        shipped = builtin_teacher_directory()
        if shipped.is_relative_to(Path.cwd()):
            shipped = shipped.relative_to(Path.cwd())
        raise ConfigError(
            f"no teacher given for data {data!r}: set {by_make('TEACHER=... (--teacher)', '--teacher')} to a vision-language "
            "model, a folder or a name on the hub (llava-hf/llava-1.5-7b-hf), or use "
            f"{by_make('DATA=shapes or DATA=easy-vqa', '--data shapes or --data easy-vqa')}, "
            f"which have built-in teachers ({by_make('TEACHER=', '--teacher ')}{shipped} is the one that knows shapes)"
        )
    if name != "shapes" and not trains and not (scratch / "training.json").is_file():
        logger.info("the built-in teacher of %s is trained first, which takes minutes", name)
        return builtin_teacher_directory()
    return demo_teacher_for(name, scratch)


def build_encoder(
    teacher: Teacher,
    *,
    template: str,
    max_length: int,
    long_samples: LongSamples = "refuse",
    frames: FrameSampling | None = None,
) -> SampleEncoder:
    """Build the function from a sample to the teacher's input.

    Args:
        template: Template name, or ``auto``: what the teacher's ``training.json`` names (built-in teachers
            do), else its family's.
        max_length: Longest sequence in tokens; 0: `automatic_length`.
        long_samples: What becomes of longer ones.
        frames: Which frames of a video are read; None: the default.
    """
    if template == "auto":
        template = teacher.training.get("template") or teacher.family.template
    return SampleEncoder(
        tokenizer=teacher.tokenizer,
        image_encoder=teacher.image_encoder,
        template=get_template(template, teacher.tokenizer),
        image_token_id=teacher.image_token_id,
        max_length=max_length or automatic_length(teacher),
        positions=known_positions(teacher.config),
        long_samples=long_samples,
        most_pictures=teacher.family.most_pictures,
        sampling=frames or FrameSampling(),
        video_token_id=teacher.family.video_token_id(teacher.config),
    )


def beyond_positions(teacher: Teacher, max_length: int) -> str | None:
    """A warning about a longest sequence that is longer than any the teacher knows; None: it is not, or is the automatic one."""
    positions = known_positions(teacher.config)
    if positions is None or max_length <= positions or max_length == automatic_length(teacher):
        return None
    return (
        f"max_length={max_length} is above the {positions} positions that teacher {teacher.directory} knows "
        "(max_position_embeddings in its config.json): samples beyond those are recorded as failures"
    )


def automatic_length(teacher: Teacher) -> int:
    """Longest sequence in tokens where none is given: 2048, or the largest picture and 1024 tokens of text.

    A picture cut into tiles has 2000 to 3300 visual tokens (LLaVA-NeXT, InternVL); no more than the positions that
    the language model knows, where it says how many those are.
    """
    positions = getattr(text_config(teacher.config), "max_position_embeddings", None) or LEAST_LENGTH
    return max(LEAST_LENGTH, min(int(positions), teacher.image_encoder.token_count + TEXT_LENGTH))


def codecs_for(config: BuildConfig, teacher: Teacher, *, several: bool = False, videos: bool = False) -> dict[str, Any]:
    """Build the codecs a configuration asks for, fitted to the teacher's token grid.

    Args:
        several: Whether they are for records of several pictures.
        videos: Whether frames of videos are among them.
    """
    grid = (config.grid, config.grid) if config.grid else teacher.image_encoder.attention_grid()
    layers = _hidden_layers(config.hidden_layers, teacher.depth)
    width = int(text_config(teacher.config).hidden_size)
    sizes = Sizes(grid=grid, layers=layers, width=width, several=several, videos=videos)
    codecs: dict[str, Any] = dict(build_codecs(config, sizes))
    if config.answers == "generate":
        codecs[AnswersCodec.signal] = AnswersCodec(
            max_new_tokens=config.max_new_tokens,
            temperature=config.answer_temperature,
            top_p=config.answer_top_p,
            seed=config.answer_seed,
        )
    return codecs


def _hidden_layers(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """Hidden states by their numbers from the front.

    Raises:
        ConfigError: If the teacher has no such layer.
    """
    if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
        raise ConfigError(
            f"hidden_layers: {wrong} do not exist; the teacher has {depth} layers: 0 (what enters the first) to "
            f"{depth}, or -1 (the last, normalised) down to {-depth - 1}"
        )
    return tuple(layer % (depth + 1) for layer in layers)


def make_plan(
    config: BuildConfig,
    *,
    dataset: Dataset,
    teacher: Teacher,
    encoder: SampleEncoder,
    codecs: Mapping[str, Any],
    survey: Survey | None = None,
    version: int | None = None,
) -> Plan:
    """Describe the whole cache before the first shard, with every fingerprint it depends on.

    Args:
        survey: Of the data set, where it was made already.
        version: Format version of the records; None: 2 if the data has several pictures in a sample or a video, else 1.

    An automatic batch size is not known yet: it stands as 1 until `open_build` has found it.
    """
    survey = survey or dataset.survey()
    if version is None:
        version = SEVERAL_PICTURES if survey.several else ONE_PICTURE
    trained_on = str(teacher.training.get("data") or "")
    # Its scores stand beside its students' only where both are scored on the same held-out items.
    same_data = bool(trained_on) and dataset.name.startswith(trained_on)
    evaluation = evaluation_of(teacher.training) if same_data else None
    template = encoder.template.to_dict()
    geometry = geometry_of(teacher.image_encoder, videos=survey.videos > 0)
    signals = {name: codec.to_dict() for name, codec in codecs.items()}
    text = text_config(teacher.config)
    no_projector = missing_projector(teacher)
    folder = model_folder(teacher.directory, what="teacher")
    return Plan(
        format_version=version,
        store=config.store,
        sample_count=len(dataset),
        shard_size=config.shard_size,
        batch_size=config.batch_size or 1,
        signals=signals,
        fields=fields_of(codecs, teacher.family.visual_rows),
        fingerprints={
            **teacher.fingerprints(),
            "template": fingerprint(template),
            "geometry": fingerprint(geometry),
            "data": survey.fingerprint,
            "codec": fingerprint(signals),
        },
        template=template,
        teacher={
            "name": f"built-in ({trained_on})" if trained_on else folder.name,
            "family": str(teacher.config.model_type),
            "dtype": teacher.dtype,
            "layers": teacher.depth,
            "hidden_size": int(text.hidden_size),
            "vocabulary": int(text.vocab_size),
            "image_token_id": teacher.image_token_id,
            **(
                {"video_token_id": encoder.video_token_id}
                if survey.videos and encoder.video_token_id is not None
                else {}
            ),
            "groups": [list(group) for group in teacher.groups(config.groups, config.layers)],
            "layer_choice": config.layers,
            **({} if evaluation is None else {"evaluation": evaluation}),
            **given(
                device_map=teacher.device_map,
                quantisation="" if teacher.quantisation == "none" else teacher.quantisation,
                no_projector=no_projector or "",
            ),
            **given(license=config.teacher_license, revision=folder.revision),
        },
        data={
            "name": dataset.name,
            "split": config.split,
            "limit": config.limit,
            **dataset.origin,
            **given(license=config.data_license, cache_license=config.license, source=config.source),
        },
        geometry=geometry,
        extra={
            "max_length": encoder.max_length,
            **({} if encoder.long_samples == "refuse" else {LONG_SAMPLES: encoder.long_samples}),
            **({THREADS: config.threads} if config.threads else {}),
            **({RANKS: config.tensor_parallel} if config.tensor_parallel > 1 else {}),
            # Caches of half precision that older versions began were projected in it: shards of both are not mixed.
            **({PROJECTION: "float32"} if teacher.dtype in ("bfloat16", "float16") else {}),
            **({FRAMES: {"fps": config.frames.fps, "most": config.frames.most}} if survey.videos else {}),
            **({"order": dataset.describe()} if isinstance(dataset, GroupedByImage) else {}),
        },
    )


def given(**texts: str) -> dict[str, str]:
    """The descriptive texts that were given."""
    return {name: text for name, text in texts.items() if text}


def fields_of(codecs: Mapping[str, Any], visual_rows: str) -> dict[str, tuple[Field, ...]]:
    """The fields of records by signal; ``visual_rows`` is what visual tokens see in the teacher's family."""
    fields = {name: codec.fields() for name, codec in codecs.items()}
    # Visual rows that see the question are another sample's only if the question is too: nothing is shared.
    return fields if visual_rows == "prefix" else with_visual_source(fields)
