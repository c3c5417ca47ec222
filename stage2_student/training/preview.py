"""``--dry-run`` of stage two: whatever can be found out about a training without a step of it; nothing is written.

The cache may not be there yet: stage one then gives a sketch of it (``teacher-cache build --dry-run --sketch``), a folder
with all that the cache will say of itself, and of its records nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.plan import Plan, read_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.config import last_given
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.files.disk import folder_bytes, refuse_overlap
from vlm_distill_cache.common.hub import is_without_weights, public_name
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes.mirror import local_folder
from vlm_distill_cache.common.tools.outlook import Outlook, download_lines, looking_only, resolve_each
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.sources.mixture import own_caches
from vlm_distill_cache.stage2_student.batches.dataset import merged_fingerprints
from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.pruned_folder import kept_share
from vlm_distill_cache.stage2_student.students.model import vocabulary_rows
from vlm_distill_cache.stage2_student.students.parts import StudentParts, open_parts
from vlm_distill_cache.stage2_student.students.presets import student_folder
from vlm_distill_cache.stage2_student.students.prunable import check_prunable
from vlm_distill_cache.stage2_student.students.tower import check_tower_is_free
from vlm_distill_cache.stage2_student.training.checks import (
    check_labels_fit,
    check_losses,
    check_machine,
    refuse_other_teacher,
)
from vlm_distill_cache.stage2_student.training.extension import as_begun, earlier_training
from vlm_distill_cache.stage2_student.training.log import read_log
from vlm_distill_cache.stage2_student.training.output_folder import refuse_misplaced, refuse_pixel_folder
from vlm_distill_cache.stage2_student.training.preparation import (
    cache_notes,
    check_phase,
    find_all,
    open_cached_data,
    probe_planned,
)
from vlm_distill_cache.stage2_student.training.resolve import open_caches, resolve_config
from vlm_distill_cache.stage2_student.training.steps import extended_training
from vlm_distill_cache.stage2_student.training.token_choice import check_choice, say_fed

UNKNOWN_WIDTH = 1 << 20  # of a teacher that is not known
_FLOAT, _OPTIMIZER = 4, 12  # bytes of a parameter: saved; in a checkpoint with both averages of its optimizer


@dataclass(frozen=True, kw_only=True)
class PlannedCache:
    """A cache that is not there yet, as far as what it will say of itself can stand for it."""

    path: Path
    plan: Plan
    place: str
    manifest: Any = field(default_factory=lambda: SimpleNamespace(totals={}, shards=(), fidelity=None))
    manifest_hash: str = ""
    failed: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.plan.sample_count

    def check_side_files(self, names: Sequence[str] | None = None) -> None:
        """There is nothing to compare with yet."""


LookAtFolder = Callable[[Outlook, TrainConfig, Mapping[str, TeacherCache]], None]


def preview(
    path: Path | None,
    given: Sequence[str],
    *,
    cache: str,
    sketch: Path | None,
    resolve: Callable[..., TrainConfig],
    look_at_folder: LookAtFolder,
    trainings: Sequence[str],
    processes: int,
) -> Outlook:
    """Look at everything that a run needs.

    Args:
        path: YAML file of options.
        given: The other options, as ``a.b=c``.
        cache: The cache, as it was named.
        sketch: What stands for a cache that is not there yet; if it is empty, stage one has said why.
        resolve: From both kinds of options and the cache to a configuration.
        look_at_folder: Looks at what is particular to the output folder of such a run.
        trainings: The folders below the output that students are trained in; ``""``: the output itself.
    """
    outlook = Outlook()
    # Only a run starts the processes itself, on this machine.
    starts = processes if len(trainings) > 1 else 1
    look_at_machine = partial(check_machine, processes=processes, starts=starts, each=outlook.checking)
    with looking_only() as missing:
        with outlook.checking():
            read_plan(local_folder(sketch or cache), sketch=sketch is not None)
        if outlook.problems:
            if sketch is not None and not any(sketch.iterdir()):
                outlook.problems.clear()
            config = _look_without_cache(outlook, path, [*given, f"cache={cache}"], look_at_machine)
            if config is not None and sketch is None:  # with a sketch, stage one has looked at them
                _look_at_data(outlook, config)
            return outlook
        config, left = resolve_each(outlook, partial(resolve, cache=sketch or cache), path, given)
        if config is None:
            return outlook
        config = as_begun(config)
        caches: dict[str, TeacherCache] = {}
        with outlook.checking():
            caches = open_caches(config, opening=partial(open_or_plan, sketch=sketch, named=cache))
        output = Path(config.output)
        student = public_name(last_given(left, "student") or config.student)
        outlook.lines += [
            f"{'distill run' if len(trainings) > 1 else 'distill train'} would train {student} into {output}",
            *(f"  cache: {_cache_line(found)}" for found in caches.values()),
            f"  phases: {', '.join(config.phases)}; processes: {processes}",
        ]
        look_at_machine(config)
        outlook.needs_writing(output)
        with outlook.checking():
            refuse_inside(output)
            refuse_overlap(output, *(found.path for found in caches.values()), *([] if is_url(cache) else [cache]))
        with outlook.checking():
            refuse_misplaced(output)
        with outlook.checking():
            refuse_pixel_folder(config)
        if caches:
            look_at_folder(outlook, config, caches)
            parts = look_at_student(outlook, config, caches, known=not any(one.startswith("student=") for one in left))
            if parts is not None:
                needed = max(0, len(trainings) * bytes_to_write(config, parts) - folder_bytes(output))
                outlook.needs_room(output, needed, "students and checkpoints")
        outlook.lines += [*_hours_lines(config, [output / name for name in trainings]), *download_lines(missing)]
    if sketch is not None:  # which is in nobody's way but ours
        outlook.problems = [text.replace(str(sketch), cache) for text in outlook.problems]
    return outlook


def _look_without_cache(
    outlook: Outlook, path: Path | None, given: Sequence[str], look_at_machine: Callable[[TrainConfig], None]
) -> TrainConfig | None:
    """What can be said where nothing is known of the cache: options, the student's name, the held-out data, the folder."""
    config, left = resolve_each(outlook, partial(resolve_config, teacher_width=UNKNOWN_WIDTH), path, given)
    if config is None:
        return None
    if kept_share(config.student) is None and not any(one.startswith("student=") for one in left):
        with outlook.checking():
            student_folder(config.student, config.student_weights)
    look_at_machine(config)
    how = config.evaluation
    if how.data is not None:
        images = how.images or config.images
        with outlook.checking():
            open_evaluation(how.data, how.split, how.limit, images=None if images is None else Path(images))
    outlook.needs_writing(Path(config.output))
    return config


def _look_at_data(outlook: Outlook, config: TrainConfig) -> None:
    for data, images in dict.fromkeys((phase.data, phase.images) for phase in map(config.phase, config.phases)):
        if data is not None:
            with outlook.checking():  # a cache that is gone does not say of which split: any that is there will do
                open_dataset(data, split="test", images=None if images is None else Path(images))


def _cache_line(cache: TeacherCache) -> str:
    planned = "" if isinstance(cache, TeacherCache) else ", not built yet"
    return f"{cache.place}, {len(cache)} samples, {', '.join(sorted(cache.plan.signals))}{planned}"


def _hours_lines(config: TrainConfig, folders: Sequence[Path]) -> list[str]:
    """How long it takes, by the steps that were logged there before."""
    logs = [read_log(folder) for folder in folders]
    seconds = [record["step_s"] for log in logs for record in log]
    counts = [config.phase(name).steps for name in config.phases]
    if not seconds or None in counts:
        return ["  hours: not known before a step is measured"]
    left = max(0, len(folders) * sum(count or 0 for count in counts) - len(seconds))
    if not left:
        return ["  hours: none, all steps are done"]
    return [
        f"  hours: about {left * sum(seconds) / len(seconds) / 3600:.2g} for {left} steps, as fast as those logged there"
    ]


def open_or_plan(place: str, *, sketch: Path | None, named: str) -> TeacherCache:
    """A cache that is there; at the place that is the sketch, what stands for a cache that is ``named`` so."""
    if sketch is None or Path(place) != sketch:
        return open_cache(place)
    planned: Any = PlannedCache(path=sketch, plan=read_plan(sketch, sketch=True), place=named)
    return planned  # type: ignore[no-any-return]


def look_at_student(
    outlook: Outlook, config: TrainConfig, caches: Mapping[str, TeacherCache], *, known: bool
) -> StudentParts | None:
    """Check student, data and losses against the caches; None: the student is not ``known``, or cut on the way."""
    check_losses(config, caches, each=outlook.checking)
    opened: list[tuple[TeacherCache, Dataset]] = []
    for phase in {
        (phase.cache, phase.data, phase.images): phase for phase in map(config.phase, config.phases)
    }.values():
        with outlook.checking():
            opened += _check_data(phase, caches)
    if not known:
        return None
    first = caches[str(config.phase(config.phases[0]).cache)]
    if (kept := kept_share(config.student)) is not None:
        for check in (
            refuse_other_teacher,
            lambda *_: check_prunable(Path(config.teacher or ""), kept, config.pruning),
        ):
            with outlook.checking():
                check(config, first)
        return None
    folder = Path(config.student_weights or config.student)
    if is_without_weights(folder) and is_published(folder):
        outlook.lines.append("  student: whether it fits is known once its weights are here")
        return None
    parts: StudentParts | None = None
    with outlook.checking():
        parts = open_parts(config, first)
    if parts is None:
        return None
    for cache in caches.values():
        with outlook.checking():
            check_labels_fit(cache, vocabulary_rows(parts.model), parts.tokenizer, where=parts.where)
    with outlook.checking():
        check_choice(config, caches.values(), parts.model, parts.image_encoder, where=f"student {config.student}")
    if fed := say_fed(config, parts.image_encoder):
        outlook.lines.append(f"  student: {fed}")
    for name in config.phases:
        cache = caches[str(config.phase(name).cache)]
        losses, where = config.phase(name).losses, f"phase {name}, {cache.place}"
        terms = choose_terms(losses.distilled).values()
        if not all({*term.reads} <= cache.plan.signals.keys() for term in terms):
            continue  # as was said
        with outlook.checking():
            check_phase(config, name, cache, parts)
        if config.phase(name).trainable == "tower":
            with outlook.checking():
                check_tower_is_free(parts.model, phase=name, where=parts.where)
        for term in terms:
            with outlook.checking():
                term.fit(cache.plan, losses, parts, where)
    for cache, dataset in [] if outlook.problems else opened:
        if not cache.manifest_hash:  # not there yet; samples of others are looked at below
            with outlook.checking():
                probe_planned(config, dataset, cache, parts)
    if not outlook.problems and all(isinstance(cache, TeacherCache) for cache in caches.values()):
        with outlook.checking():  # with samples of the data
            found = find_all(config, caches)
            outlook.lines += [
                f"  {phase.name}: {phase.steps} steps of {phase.config.batch_size} samples" for phase in found.phases
            ]
        outlook.lines += [f"  note: {note}" for note in cache_notes(config, caches)]
    return parts


def look_at_extension(trainings: Iterable[TrainConfig], caches: Mapping[str, TeacherCache]) -> None:
    """Refuse to extend finished students to what they cannot be trained on to.

    Raises:
        ConfigError: Naming what stands in the way.
    """
    hashes = {place: cache.manifest_hash for place, cache in caches.items()}
    for config in trainings:
        if earlier_training(Path(config.output), config, hashes) is not None:
            extended_training(config, find_all(config, caches).phases, hashes)


def _check_data(phase: PhaseConfig, caches: Mapping[str, TeacherCache]) -> list[tuple[TeacherCache, Dataset]]:
    if own_caches(phase.data, str(phase.cache)) is not None:
        return []  # which fit their entries, or else say so when they are opened
    cache = caches[str(phase.cache)]
    dataset = open_cached_data(cache, data=phase.data, images=phase.images)
    if dataset.fingerprint() not in {cache.plan.fingerprints.get("data"), *merged_fingerprints(cache)}:
        raise CacheMismatchError(
            f"data set {dataset.name} ({len(dataset)} samples) is not the one that {cache.place} is built from "
            f"({cache.plan.data.get('name')}, {cache.plan.sample_count} samples); give the cache's data (--data, --images)"
        )
    return [(cache, dataset)]


def bytes_to_write(config: TrainConfig, parts: StudentParts) -> int:
    """Bytes of one training's folder: the student and as many checkpoints as are there at a time."""
    model: Any = parts.model
    whole: int = sum(parameter.numel() for parameter in model.parameters())
    full = any(config.phase(name).trainable in ("all", "tower") for name in config.phases)
    trained: int = sum(parameter.numel() for parameter in model.trainable_parameters("dft" if full else "dpt"))
    students = 1 if config.evaluation.every is None else 4  # the best ones, and that which takes a place
    return students * whole * _FLOAT + (config.keep_checkpoints + 1) * trained * _OPTIMIZER
