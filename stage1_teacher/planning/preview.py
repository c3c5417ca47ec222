"""``teacher-cache build --dry-run``: what a build would do, without the teacher's weights; it writes nothing."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.documents import write_document
from vlm_distill_cache.common.cache.other_folders import IS_SKETCH, SKETCH
from vlm_distill_cache.common.cache.plan import LONG_SAMPLES, PLAN, THREADS, Plan, refuse_changed_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import missing_shards, read_sidecar
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError
from vlm_distill_cache.common.files.atomic import read_json, write_bytes_atomic
from vlm_distill_cache.common.files.disk import free_bytes, refuse_overlap
from vlm_distill_cache.common.hub import is_without_weights, model_folder
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.printing import one_line, size_words
from vlm_distill_cache.common.terminal.command_line import PARENT
from vlm_distill_cache.common.tools.outlook import Outlook, download_lines, looking_only
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.cache_folder import (
    begun_otherwise,
    check_cache_folder,
    refuse_unwritable,
    stored_plan,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.parts import Part
from vlm_distill_cache.stage1_teacher.planning.plan import LOOKED_AT, refuse_settings
from vlm_distill_cache.stage1_teacher.teacher.export import export_parts

_OF_WEIGHTS = ("teacher", "vision_tower")  # fingerprints that only weights tell
_ESTIMATED = ("cache_bytes", "stage_one_hours", "samples")


def preview_build(
    config: BuildConfig, *, overwrite: bool, part: Part, processes: int, sketch: Path | None, estimate: Path | None
) -> Outlook:
    """Look at everything that a build needs.

    Args:
        sketch: A new folder that gets what the cache will say of itself, without shards; the only thing that is written.
        estimate: The figures that ``teacher-cache estimate --json`` has written for these options.
    """
    outlook, cache_dir = Outlook(), Path(config.cache)
    with outlook.checking():
        check_cache_folder(cache_dir, overwrite=overwrite)
    with outlook.checking():
        refuse_unwritable(cache_dir)
    if sketch is not None:
        try:
            refuse_overlap(sketch, cache_dir)
        except ConfigError as error:
            outlook.problem(f"--sketch: {error}")
            sketch = None
    if config.quantisation != "none":
        outlook.needs_package("bitsandbytes", extra="quantised", why=f"quantisation={config.quantisation}")
    known = None
    with outlook.checking():
        known = None if estimate is None else _read_estimate(estimate)
    work: Build | None = None
    with looking_only() as missing:
        teacher = None
        with outlook.checking():
            if config.teacher:
                teacher = model_folder(config.teacher, what="teacher", check=refuse_settings).path
        unknown = teacher is not None and is_without_weights(teacher) and is_published(teacher)
        if not unknown:
            with outlook.checking():
                work = open_build(config, loads=False)
        if work is None:
            with outlook.checking():  # the data may be at fault, too
                images = Path(config.images) if config.images else None
                open_dataset(config.data, split=config.split, images=images, limit=config.limit or None)
            if unknown:
                outlook.lines.append(
                    f"teacher {config.teacher}: what its cache holds is known once its weights are here"
                )
                outlook.lines += download_lines(missing)
        else:
            with outlook.checking():
                _look_at_samples(work)
            with outlook.checking():
                _look_at_cache(
                    outlook, work.plan, cache_dir, overwrite=overwrite, part=part, processes=processes, known=known
                )
            outlook.lines += download_lines(missing)
            if sketch is not None:
                with outlook.checking():
                    write_sketch(work, sketch)
                    # Of `distill run`, which has started this, it is a temporary folder.
                    outlook.written = "" if PARENT in os.environ else f"the sketch {sketch}"
    return outlook


def write_sketch(work: Build, folder: Path) -> None:
    """Write what a cache will say of itself before its first shard; of the teacher's weights only names and shapes.

    Raises:
        ConfigError: If the folder is not new or empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--sketch {folder}: it is not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    export_parts(work.teacher, folder)
    write_bytes_atomic(folder / SKETCH, f"{IS_SKETCH}\n".encode())
    write_document(folder / PLAN, work.plan.to_dict())


def _look_at_samples(work: Build) -> None:
    """Refuse data of which no sample can be encoded, as far as a few tell."""
    total, failed = len(work.dataset), []
    places = range(0, total, max(1, total // LOOKED_AT))
    for place in places:
        try:
            work.encoder(work.dataset[place])
        except SampleError as error:
            failed.append(str(error))
    if len(failed) == len(places):
        raise ConfigError(
            f"data {work.dataset.name!r}: none of {len(failed)} samples that were looked at can be used: {failed[0]}"
        )


def _look_at_cache(
    outlook: Outlook,
    plan: Plan,
    cache_dir: Path,
    *,
    overwrite: bool,
    part: Part,
    processes: int,
    known: Mapping[str, float] | None,
) -> None:
    stored = None if overwrite or begun_otherwise(cache_dir, plan) else stored_plan(cache_dir)
    name, revision = (one_line(plan.teacher.get(key, "")) for key in ("name", "revision"))
    longest = f", at most {plan.extra['max_length']} tokens each" if "max_length" in plan.extra else ""
    cut = " (longer ones are cut)" if LONG_SAMPLES in plan.extra else ""
    outlook.lines += [
        f"teacher-cache build would write {cache_dir} ({plan.store})",
        f"  teacher: {name}{f'@{revision}' if revision else ''} ({plan.teacher['family']}, {plan.teacher['dtype']})",
        f"  data: {one_line(plan.data.get('name'))}, {plan.sample_count} samples{longest}{cut}",
        f"  signals: {', '.join(sorted(plan.signals))}",
    ]
    missing = list(range(plan.shard_count))
    if stored is not None:
        refuse_changed_plan(stored, _as_far_as_known(plan, stored), where=str(cache_dir))
        missing = missing_shards(cache_dir, stored)
    there = plan.shard_count - len(missing)
    if not missing and (cache_dir / MANIFEST).is_file():
        outlook.lines.append(f"  shards: all {there} are there and sealed: nothing to do")
        return
    own = part.for_resume(missing).share(missing)
    of_part = f", {len(own)} of them by part {part}" if part.of > 1 else ""
    begins = (
        " (what is there is deleted first)" if overwrite and cache_dir.is_dir() and any(cache_dir.iterdir()) else ""
    )
    outlook.lines.append(f"  shards: {there} of {plan.shard_count} there, {len(missing)} to build{of_part}{begins}")
    outlook.lines.append(f"  processes: {processes}")
    share = len(own) / plan.shard_count
    if known is not None:
        scale = plan.sample_count / known["samples"] * share
        outlook.needs_room(cache_dir, round(known["cache_bytes"] * scale), "cache")
        outlook.lines.append(f"  hours: {known['stage_one_hours'] * scale / processes:.2g}, as estimated")
        return
    if there:
        sidecars = [read_sidecar(cache_dir, index) for index in range(plan.shard_count) if index not in missing]
        outlook.needs_room(cache_dir, round(sum(found.stored_bytes for found in sidecars) / there * len(own)), "cache")
    else:
        outlook.lines.append(
            f"  cache: its size is not known before a probe, {size_words(free_bytes(cache_dir))} are free"
        )
    outlook.lines.append(
        "  hours: not known before a probe: `teacher-cache estimate` with the same options measures one"
    )


def _as_far_as_known(plan: Plan, stored: Plan) -> Plan:
    """A plan with what only the loaded teacher would tell as a cache has it."""
    of_weights = {name: stored.fingerprints[name] for name in _OF_WEIGHTS if name in stored.fingerprints}
    extra = {name: value for name, value in plan.extra.items() if name != THREADS}
    threads = {THREADS: stored.extra[THREADS]} if THREADS in stored.extra else {}
    asked = plan.extra.get(THREADS)
    return replace(
        plan,
        fingerprints={**plan.fingerprints, **of_weights},
        batch_size=plan.batch_size if plan.batch_size > 1 else stored.batch_size,
        extra={**extra, **({THREADS: asked} if asked else threads)},
    )


def _read_estimate(path: Path) -> dict[str, float]:
    try:
        found: dict[str, Any] = read_json(path)
        return {name: float(found[name]) for name in _ESTIMATED}
    except (CacheFormatError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"--estimate {path}: no figures of `teacher-cache estimate --json` ({error})") from error
