"""From a configuration to what the loop needs: student, encoder, each phase's data; all checked.

All bad news comes from here, before the first step of the first phase.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.cache import TeacherCache, open_cache
from common.errors import CacheFormatError, ConfigError, DataError, ModelError
from common.hashing import fingerprint
from common.layers import student_groups
from common.mirror import find_mirror
from common.models.mobilevlm import MobileVLMForConditionalGeneration
from common.models.projectors import TeacherAdapter
from common.plan import Plan
from common.remotes import is_url
from data.encoding import SampleEncoder
from data.image_encoder import ImageEncoder
from data.processors import load_image_processor, load_tokenizer
from data.registry import open_dataset
from data.sample import Dataset
from data.templates import PromptTemplate, get_template
from stage2_student.build_student import SIZES, STUDENTS, build_student
from stage2_student.cached_dataset import CachedDataset, SampleMemory
from stage2_student.check_cache import (
    check_data,
    check_geometry,
    check_signals,
    check_template,
    check_tokenizer,
    check_vision_tower,
    probe_samples,
)
from stage2_student.config import PhaseConfig, PhaseName, TrainConfig, describe
from stage2_student.join import merged_fingerprints, splits_and_limits
from stage2_student.objective import Objective
from stage2_student.sampler import ShardShuffle
from stage2_student.signals import check_map_serves

BUILT_IN_DATA = ("shapes", "easy-vqa")
MAX_LENGTH = 2048  # tokens, where neither the run nor a cache says one
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedPhase:
    """One phase, ready to run.

    Attributes:
        name: dpt, dft or sft.
        config: Its configuration.
        steps: Optimizer steps.
        dataset: Data joined with its cache.
        shuffle: The order of samples.
        objective: The losses.
        expect: Told which shards are read soon; None for a cache that is here.
    """

    name: PhaseName
    config: PhaseConfig
    steps: int
    dataset: CachedDataset
    shuffle: ShardShuffle
    objective: Objective
    expect: Callable[[Iterable[int]], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run, ready to start.

    Attributes:
        student: On the CPU, float32.
        tokenizer: The cache's.
        image_processor: The cache's.
        encoder: From samples to the student's sequences.
        encoder_description: JSON that rebuilds it.
        phases: In order.
        fingerprint: What the run is: its configuration (without folders and speed settings) and its caches.
        cache_hashes: Manifest hash of each cache, by path.
    """

    student: MobileVLMForConditionalGeneration
    tokenizer: Any
    image_processor: Any
    encoder: SampleEncoder
    encoder_description: Mapping[str, Any]
    phases: tuple[PreparedPhase, ...]
    fingerprint: str
    cache_hashes: Mapping[str, str]


def split_student_name(student: str) -> tuple[str, str]:
    """Split name and size: ``mobilevlm-tiny`` -> ``("mobilevlm", "tiny")``; a directory stays whole."""
    for name in STUDENTS:
        for size in SIZES:
            if student == f"{name}-{size}":
                return name, size
    return student, "auto"


def load_processors(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and image processor in a folder: a cache's ``processor/``, or a trained student.

    Raises:
        CacheFormatError: If they cannot be read.
    """
    try:
        return load_tokenizer(folder), load_image_processor(folder)
    except ModelError as error:
        raise CacheFormatError(f"{error}; the folder is incomplete: build it again") from error


def describe_encoder(plan: Plan, *, max_length: int) -> dict[str, Any]:
    """What turns a sample into the cached labels, as JSON; kept beside a student, which outlives its cache.

    Args:
        plan: The cache's.
        max_length: Longest sequence, tokens.
    """
    return {
        "template": plan.template,
        "layout": plan.geometry["layout"],
        "patch_size": plan.geometry.get("patch_size"),
        "image_token_id": int(plan.teacher["image_token_id"]),
        "max_length": max_length,
    }


def build_encoder(
    description: Mapping[str, Any], tokenizer: Any, image_processor: Any, *, grid: tuple[int, int]
) -> SampleEncoder:
    """The encoder of a student.

    Args:
        description: From `describe_encoder`.
        tokenizer: The cache's.
        image_processor: The cache's.
        grid: Rows and columns of the student's visual tokens.
    """
    return SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=ImageEncoder(
            processor=image_processor,
            layout=description["layout"],
            grid=grid,
            patch_size=description["patch_size"],
        ),
        template=PromptTemplate.from_dict(dict(description["template"])),
        image_token_id=description["image_token_id"],
        max_length=description["max_length"],
    )


def open_cached_data(cache: TeacherCache, *, data: str | None, images: str | None) -> Dataset:
    """Open the data a cache was built from; `check_data` makes sure that it is that.

    Args:
        cache: Names split and limit.
        data: As in ``data.registry``; None: the built-in data set that the cache names.
        images: Folder that relative image paths start from.

    Raises:
        ConfigError: If no data is given and the cache's is none of the built-in ones.
    """
    described = cache.plan.data
    # The stored name also says split and limit: "shapes:images=1500,seed=0[:64]", "easy-vqa/train".
    spec = data or str(described.get("name", "")).partition("[")[0].partition("/")[0]
    if data is None and spec.partition(":")[0] not in BUILT_IN_DATA:
        raise ConfigError(
            f"no data given, and {cache.path} was built from {spec!r}, whose place a cache does not hold; "
            "pass --data (and --images)"
        )
    folder = None if images is None else Path(images)
    *choices, (split, limit) = splits_and_limits(cache)
    for other_split, other_limit in choices:  # merged of parts of one data set, or of several
        with contextlib.suppress(DataError):  # a split of another of them
            dataset = open_dataset(spec, split=other_split, images=folder, limit=other_limit)
            if dataset.fingerprint() in merged_fingerprints(cache):
                return dataset
    return open_dataset(spec, split=split, images=folder, limit=limit)


def prepare(config: TrainConfig) -> Preparation:
    """Open caches and data, build the student, and refuse what does not fit.

    Args:
        config: The run.

    Returns:
        What the loop needs.

    Raises:
        CacheMismatchError: If a cache does not fit the data, the tokenizer or the student.
        CacheFormatError: If a cache is unfinished or damaged.
        ConfigError: If an option cannot be used.
    """
    caches: dict[str, TeacherCache] = {}
    for name in config.phases:
        path = str(config.phase(name).cache)
        if path not in caches:
            # Twice the window: a step may begin the next window while loading threads still read the last.
            caches[path] = open_cache(path, open_shards=2 * config.shuffle_window)
    first = caches[str(config.phase(config.phases[0]).cache)]
    for cache in caches.values():
        cache.check_side_files()  # projector, vision tower and processor are read next
    tokenizer, image_processor = load_processors(first.path / "processor")
    student_name, size = split_student_name(config.student)
    student = build_student(
        student_name,
        cache_dir=first.path,
        vocab_size=len(tokenizer),
        image_token_id=int(first.plan.teacher["image_token_id"]),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        size=size,
        projector_type=config.projector,
        pool_teacher_tokens=config.pool_teacher_tokens,
        seed=config.seed,
    )
    for cache in caches.values():
        cache.check_shard_files()
        check_geometry(cache, first.plan.geometry, where=f"cache {first.path}")
        check_tokenizer(cache, tokenizer, where=f"{first.path / 'processor'}")
        if config.template is not None:
            check_template(cache, get_template(config.template, tokenizer))
        if isinstance(student.model.mm_projector, TeacherAdapter):
            check_vision_tower(cache, student.model.vision_tower.vision_tower.vision_model)
    # What a cache could hold, its student can read; a cache of unknown provenance says nothing of this.
    longest = max(int(cache.plan.extra.get("max_length", MAX_LENGTH)) for cache in caches.values())
    description = describe_encoder(first.plan, max_length=config.max_length or longest)
    encoder = build_encoder(description, tokenizer, image_processor, grid=student.image_grid)
    _check_student_folder(Path(config.student), first, encoder)
    depth = int(student.language_model.config.num_hidden_layers)
    phases = _prepare_phases(config, caches, encoder, depth)
    hashes = {path: cache.manifest_hash for path, cache in caches.items()}
    return Preparation(
        student=student,
        tokenizer=tokenizer,
        image_processor=image_processor,
        encoder=encoder,
        encoder_description=description,
        phases=phases,
        fingerprint=fingerprint(describe(config, hashes)),
        cache_hashes=hashes,
    )


def _check_student_folder(folder: Path, cache: TeacherCache, encoder: SampleEncoder) -> None:
    """Refuse a student directory that comes with another tokenizer or image processor than the cache's."""
    if (folder / "tokenizer.json").exists():
        check_tokenizer(cache, load_tokenizer(folder), where=f"student {folder}")
    if any((folder / name).exists() for name in ("preprocessor_config.json", "processor_config.json")):
        own = replace(encoder.image_encoder, processor=load_image_processor(folder))
        check_geometry(cache, own.to_dict(), where=f"student {folder}")


def _prepare_phases(
    config: TrainConfig, caches: Mapping[str, TeacherCache], encoder: SampleEncoder, depth: int
) -> tuple[PreparedPhase, ...]:
    opened: dict[tuple[object, ...], Dataset] = {}
    joined: dict[tuple[object, ...], CachedDataset] = {}
    memories: dict[tuple[object, ...], SampleMemory] = {}
    phases = []
    for name in config.phases:
        phase = config.phase(name)
        cache = caches[str(phase.cache)]
        signals = phase.losses.signals
        check_signals(cache, signals, temperature=phase.losses.temperature, phase=name)
        if "visual_map" in signals:
            check_map_serves(
                cache.plan.signals, phase.losses.visual_map_kind, where=f"phase {name}, {cache.path}"
            )
        source = (phase.cache, phase.data, phase.images)
        if source not in opened:
            opened[source] = open_cached_data(cache, data=phase.data, images=phase.images)
            check_data(cache, opened[source])
        # Phases of the same data share what is kept in memory; those with the same signals, their join.
        if (*source, signals) not in joined:
            joined[*source, signals] = CachedDataset(
                opened[source],
                replace(encoder, template=PromptTemplate.from_dict(cache.plan.template)),
                cache,
                signals=signals,
                pad_token_id=encoder.tokenizer.pad_token_id or 0,
                limit=config.limit,
                memory=memories.setdefault(source, SampleMemory(round(config.memory_gib * 2**30))),
                shuffle_teacher_images=config.shuffle_teacher_images,
            )
            probe_samples(joined[*source, signals])
        dataset = joined[*source, signals]
        steps = phase.step_count(len(dataset))
        if steps == 0:
            _log.info("phase %s has no steps and is left out", name)
        teacher = cache.plan.teacher
        groups = student_groups(depth, len(teacher["groups"]), teacher.get("layer_choice", "middle"))
        phases.append(
            PreparedPhase(
                name=name,
                config=phase,
                steps=steps,
                dataset=dataset,
                shuffle=ShardShuffle(shards=dataset.shards, seed=config.seed, window=config.shuffle_window),
                objective=Objective(
                    weights=phase.losses.active(),
                    groups=groups if phase.losses.attends else (),
                    temperature=phase.losses.temperature,
                    answer_kind=phase.losses.answer_kind,
                    visual_map_kind=phase.losses.visual_map_kind,
                ),
                expect=find_mirror(str(phase.cache)).expect if is_url(str(phase.cache)) and signals else None,
            )
        )
    if not any(phase.steps for phase in phases):
        raise ConfigError(f"no phase of {', '.join(config.phases)} has a step; set steps or epochs")
    return tuple(phases)
