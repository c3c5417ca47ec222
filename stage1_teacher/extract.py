"""Stage one: run the teacher once over a data set and write the cache. ``extract()`` is the main loop.

Three things run at the same time: a thread reads, decodes and tokenises the next shard, the main thread runs
the teacher, and a thread encodes and writes what the teacher said. On the built-in teacher that hides the
encoder (about 0.3 ms a sample) and the writer behind the forward pass.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.errors import CacheFormatError
from common.manifest import (
    MANIFEST,
    Manifest,
    Plan,
    check_side_files,
    missing_shards,
    read_manifest,
    read_plan,
    refuse_changed_plan,
    seal,
    sidecar_path,
)
from data.threads import leave_one_core
from stage1_teacher.card import write_card
from stage1_teacher.config import BuildConfig
from stage1_teacher.fidelity import measure_fidelity
from stage1_teacher.pipeline import FailureBudget, Writer, encode_shards, run_shard
from stage1_teacher.plan import Build, open_build, prepare_cache
from stage1_teacher.projector_export import export_parts


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a run did.

    Attributes:
        cache: The cache folder.
        built: Shards written by this run.
        samples: Samples this run put through the teacher.
        seconds: Wall-clock time of the main loop.
        manifest: The sealed manifest.
    """

    cache: Path
    built: int
    samples: int
    seconds: float
    manifest: Manifest

    @property
    def failed(self) -> int:
        """Samples that could not be read, in the whole cache."""
        return self.manifest.totals["failed"]


def extract(config: BuildConfig, *, overwrite: bool = False) -> BuildSummary:
    """Run the teacher once over a data set and write a sealed cache.

    Args:
        config: What to run and what to keep.
        overwrite: Start again if the folder holds a cache with other options.

    Returns:
        What this run did; nothing is built when the cache is already complete.

    Raises:
        DistillError: With the remedy, if teacher, data or folder cannot be used.
    """
    leave_one_core()
    cache_dir = Path(config.cache)
    work = open_build(config)
    plan = prepare_cache(cache_dir, work.plan, overwrite=overwrite)
    work = replace(work, plan=plan)
    todo = missing_shards(cache_dir, plan)
    if not todo and (manifest := intact_manifest(cache_dir)) is not None:
        return BuildSummary(cache=cache_dir, built=0, samples=0, seconds=0.0, manifest=manifest)
    export_parts(work.teacher, cache_dir)

    # The main loop: the next shards are encoded, and the last batches written, while the teacher runs.
    budget = FailureBudget.of_finished(cache_dir, plan, share=config.max_failed_share)
    started, samples, built = time.monotonic(), 0, 0
    with Writer(cache_dir, plan, work.codecs) as writer, _progress(plan, todo) as bar:
        # Another process may build the same cache: what it finished is skipped, what it left is done here.
        while todo := missing_shards(cache_dir, plan):
            for shard in encode_shards(work.dataset, work.encoder, plan, todo):
                if sidecar_path(cache_dir, shard.index).exists():
                    continue
                for batch, signals in run_shard(work, shard, config.batch_size):
                    writer.add(batch, signals)
                    samples += len(batch)
                    bar.update(len(batch))
                budget.spend(shard.failed)
                writer.finish(shard)
                bar.update(len(shard.failed))
                built += 1
            writer.wait()
    FailureBudget.of_finished(cache_dir, plan, share=config.max_failed_share).spend(())
    seconds = time.monotonic() - started

    manifest = finish(work, cache_dir, samples=config.fidelity_samples, rewritten=True)
    return BuildSummary(cache=cache_dir, built=built, samples=samples, seconds=seconds, manifest=manifest)


def intact_manifest(cache_dir: Path) -> Manifest | None:
    """The manifest of a finished cache, or None if there is none or a file outside the shards is lost or damaged."""
    if not (cache_dir / MANIFEST).is_file():
        return None
    manifest = read_manifest(cache_dir)
    try:
        check_side_files(cache_dir, manifest)
    except CacheFormatError:
        return None
    return manifest


def finish(work: Build, cache_dir: Path, *, samples: int, rewritten: bool) -> Manifest:
    """Measure the fidelity of a cache whose shards are all there, write its card, seal it.

    Args:
        work: What it was built with.
        cache_dir: The cache.
        samples: Size of the fidelity probe; 0 skips it.
        rewritten: Whether projector, vision tower and processor were just written.

    Returns:
        The manifest.
    """
    fidelity = measure_fidelity(work, cache_dir, samples=samples)
    write_card(cache_dir, work.plan, fidelity)
    return seal(cache_dir, fidelity=fidelity, rewritten=rewritten)


def recompute_fidelity(config: BuildConfig, *, samples: int) -> Manifest:
    """Measure a finished cache against its teacher again, and seal it with the new figures.

    Args:
        config: The options the cache was built with.
        samples: Size of the probe.

    Raises:
        CacheMismatchError: If the options are not the cache's.
        CacheFormatError: If the cache is not complete.
    """
    leave_one_core()
    cache_dir = Path(config.cache)
    work = open_build(config)
    stored = read_plan(cache_dir)
    refuse_changed_plan(stored, work.plan, where=str(cache_dir))
    read_manifest(cache_dir)
    return finish(replace(work, plan=stored), cache_dir, samples=samples, rewritten=False)


def _progress(plan: Plan, todo: Sequence[int]) -> "tqdm[Any]":
    done = plan.sample_count - sum(len(plan.shard_range(index)) for index in todo)
    return tqdm(
        total=plan.sample_count, initial=done, unit="sample", desc="teacher", smoothing=0.05, mininterval=0.5
    )
