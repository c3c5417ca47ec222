"""``--dry-run`` of ``build`` and ``extend``: what they would do, without the teacher's weights; nothing is written."""

import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.documents import write_document
from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.cache.other_folders import IS_SKETCH, SKETCH
from vlm_distill_cache.common.cache.plan import LONG_SAMPLES, PLAN, Plan, read_plan, refuse_changed_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import missing_shards, read_sidecar
from vlm_distill_cache.common.cache.versions import EXTENDING, version_folder
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError
from vlm_distill_cache.common.files.atomic import read_json, write_bytes_atomic
from vlm_distill_cache.common.files.disk import free_bytes, refuse_overlap
from vlm_distill_cache.common.hub import is_without_weights, model_folder
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.printing import one_line, size_words
from vlm_distill_cache.common.terminal.command_line import PARENT
from vlm_distill_cache.common.tools.outlook import Outlook, download_lines, looking_only
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.kept import Kept
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.cache_folder import (
    begun_otherwise,
    check_cache_folder,
    refuse_others_files,
    refuse_unwritable,
    stored_plan,
)
from vlm_distill_cache.stage1_teacher.planning.extension import (
    ExtendConfig,
    NothingToAddError,
    as_far_as_known,
    plan_of,
    refuse_place,
    unrecorded,
    with_options_of,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_build, open_data
from vlm_distill_cache.stage1_teacher.planning.parts import Part, fix_ranks, refuse_shared_gpus
from vlm_distill_cache.stage1_teacher.planning.plan import LOOKED_AT, refuse_settings
from vlm_distill_cache.stage1_teacher.teacher.export import export_parts
from vlm_distill_cache.stage1_teacher.teacher.teacher import find_device

_ESTIMATED = ("cache_bytes", "stage_one_hours", "samples")


def preview_build(
    outlook: Outlook,
    config: BuildConfig,
    *,
    overwrite: bool,
    part: Part,
    processes: int,
    sketch: Path | None,
    estimate: Path | None,
) -> Outlook:
    """Look at everything that a build needs.

    Args:
        outlook: What is known already; it is added to and returned.
        sketch: A new folder that gets what the cache will say of itself, without shards; the only thing that is written.
        estimate: The figures that ``teacher-cache estimate --json`` has written for these options.
    """
    cache_dir = Path(config.cache)
    with outlook.checking():
        check_cache_folder(cache_dir, overwrite=overwrite)
    with outlook.checking():
        refuse_unwritable(cache_dir)
    with outlook.checking():
        refuse_shared_gpus(config, processes)
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
    with looking_only() as missing:
        work = _open(outlook, fix_ranks(config, overwrite=overwrite), missing)
        if work is not None:
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


def preview_extension(outlook: Outlook, config: BuildConfig, *, given: Collection[str], processes: int) -> Outlook:
    """As `preview_build`, of an extension of ``config.cache``, as `extend` takes it."""
    cache = Path(config.cache)
    base = cache.resolve()
    options: ExtendConfig | None = None
    with outlook.checking():
        refuse_place(base)
    with outlook.checking():
        plan, manifest = plan_of(cache), read_manifest(cache)
        refuse_others_files(base, plan, manifest)
        refuse_unwritable(base.parent, sealed_too=True)
        options = with_options_of(config, cache, plan, manifest, given=given)
        options = replace(options, cache=str(version_folder(base, EXTENDING, manifest)))
    if options is None:
        return outlook
    with looking_only() as missing:
        work = _open(outlook, options, missing)
        if work is not None and work.kept is not None:
            with outlook.checking():
                _look_at_samples(work)
            _describe_extension(outlook, work, work.kept, Path(options.cache), processes=processes)
            outlook.lines += download_lines(missing)
    return outlook


def _describe_extension(outlook: Outlook, work: Build, kept: Kept, new: Path, *, processes: int) -> None:
    cache = kept.cache
    fresh = sum(not kept.holds(name) for name in work.dataset.sample_ids)
    again = [name for name in cache.failed if name in set(work.dataset.sample_ids)]
    outlook.lines += [
        f"teacher-cache extend would make {cache.place} one of {work.plan.sample_count} samples",
        f"  samples: {len(cache)} have a record, {fresh - len(again)} are new, {len(again)} had failed and are tried again",
        f"  signals: {', '.join(sorted(kept.missing)) or 'none'} to add or to replace, beside "
        f"{', '.join(sorted(work.plan.signals.keys() - kept.missing)) or 'none'}",
        f"  the teacher would run for {len(work.dataset) if kept.missing else fresh} samples; whether its weights are those "
        "of the cache is known once they are loaded",
    ]
    shards = missing_shards(new, work.plan) if stored_plan(new) is not None else list(range(work.plan.shard_count))
    if there := work.plan.shard_count - len(shards):
        outlook.lines.append(f"  shards: {there} of {work.plan.shard_count} there from a run that did not finish")
    outlook.lines.append(f"  processes: {processes}")
    done = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    outlook.needs_room(new, max(0, cache.manifest.totals["bytes"] - done), "records that stay, what is added aside")


def _open(outlook: Outlook, config: BuildConfig, missing: dict[str, int | None]) -> Build | None:
    """Open data and teacher without its weights; None: something is in the way, or not known yet, which is said."""
    teacher, work = None, None
    with outlook.checking():
        if config.teacher:
            teacher = model_folder(config.teacher, what="teacher", check=refuse_settings).path
    unknown = teacher is not None and is_without_weights(teacher) and is_published(teacher)
    if not unknown:
        with outlook.checking():
            try:
                work = open_build(config, loads=False)
            except NothingToAddError as error:
                outlook.lines.append(f"{error}: nothing to do")
                if isinstance(config, ExtendConfig):
                    notes = unrecorded(config, read_plan(Path(config.base)))
                    outlook.lines += [f"  note: {one_line(note)}" for note in notes]
                return None
    if work is None:
        with outlook.checking():  # the data may be at fault, too
            open_data(config, Path(config.cache))
        with outlook.checking():
            find_device(config.device)
        if unknown:
            outlook.lines.append(f"teacher {config.teacher}: what its cache holds is known once its weights are here")
            outlook.lines += download_lines(missing)
    return work


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
        refuse_changed_plan(stored, as_far_as_known(plan, stored), where=str(cache_dir))
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


def _read_estimate(path: Path) -> dict[str, float]:
    try:
        found: dict[str, Any] = read_json(path)
        return {name: float(found[name]) for name in _ESTIMATED}
    except (CacheFormatError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"--estimate {path}: no figures of `teacher-cache estimate --json` ({error})") from error
