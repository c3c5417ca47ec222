"""Stage one: run the teacher once over a data set and write the cache. ``extract()`` is the main loop.

Four things run at the same time: processes read, decode and tokenise the next shard, a thread collates the next batch,
the main thread runs the teacher, and a thread encodes and writes what the teacher said.
"""

import gc
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Never

from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest, refuse_nothing_usable, seal
from vlm_distill_cache.common.cache.plan import PLAN, Plan, read_plan, refuse_changed_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards, sidecar_path
from vlm_distill_cache.common.config import save_replay
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.terminal.processes import run_apart
from vlm_distill_cache.common.terminal.progress import ProgressLines, hide_library_bars, progress
from vlm_distill_cache.common.tools.sinks import write_sinks
from vlm_distill_cache.common.tools.trust import trust_built
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS, answer_shard
from vlm_distill_cache.stage1_teacher.loop.encode_ahead import encode_shards
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.unknown_words import UnknownBudget, UnknownToken
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, FailureBudget, Writer
from vlm_distill_cache.stage1_teacher.planning.cache_folder import (
    begun_otherwise,
    drop_damaged_manifest,
    in_use,
    intact_manifest,
    prepare_cache,
    refuse_replaced,
    refuse_unlisted,
    refuse_unwritable,
    stored_plan,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.parts import (
    ANY,
    WHOLE,
    Part,
    count_workers,
    fix_batch_size,
    fix_ranks,
    fix_threads,
    refuse_shared_gpus,
    run_parts,
    uses_gpu,
)
from vlm_distill_cache.stage1_teacher.planning.turns import take_turns
from vlm_distill_cache.stage1_teacher.quality.card import write_card
from vlm_distill_cache.stage1_teacher.quality.fidelity import measure_fidelity
from vlm_distill_cache.stage1_teacher.teacher.export import export_parts

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a run did.

    Attributes:
        built: Shards written by this run.
        samples: Samples this run put through the teacher.
        seconds: Wall-clock time of the main loop.
        cpu_seconds: Processor time of the main loop, all threads of this process.
        manifest: The sealed manifest; None while other parts have shards to build.
        part: Which part of a build in several parts this run was.
        missing: The shards that other parts have to build.
    """

    cache: Path
    built: int = 0
    samples: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    manifest: Manifest | None = None
    part: Part = WHOLE
    missing: tuple[int, ...] = ()

    @property
    def failed(self) -> int:
        """Samples that could not be read, in the whole cache."""
        return 0 if self.manifest is None else self.manifest.totals["failed"]


def extract(config: BuildConfig, *, overwrite: bool = False, part: Part = WHOLE, seals: bool = True) -> BuildSummary:
    """Run the teacher once over a data set and write a sealed cache.

    Of several processes (``part``), the one that may seal (``seals``) and finds no shard missing seals the cache; those that
    take shards from a queue wait for it.
    ``overwrite`` starts again in a folder that holds a cache with other options.

    Returns:
        What this run did; nothing is built when the cache is already complete.

    Raises:
        DistillError: With the remedy, if teacher, data or folder cannot be used.
        OSError: If the folder cannot be written.
    """
    cache_dir, work = begin(config, overwrite=overwrite, several=not (part.is_whole and seals))
    plan = work.plan
    with in_use(cache_dir), take_turns(cache_dir, plan, part) as turns:
        part, todo = turns.part, turns.todo
        if not todo and seals and (manifest := intact_manifest(cache_dir)) is not None:
            refuse_nothing_usable(cache_dir, plan)
            return BuildSummary(cache=cache_dir, manifest=manifest)
        known = export_parts(work.teacher, cache_dir) if seals else []
        if seals:
            refuse_unlisted(cache_dir, known)

        # The main loop: the next shards are encoded, and the last batches written, while the teacher runs.
        budget = FailureBudget.of_finished(cache_dir, plan, share=config.max_failed_share)
        words = UnknownToken.of(work.encoder)
        targets = UnknownBudget.of_finished(cache_dir, plan, words=words, share=config.max_unknown_share)
        started, started_cpu, samples, built = time.monotonic(), time.process_time(), 0, list[int]()
        with (
            Writer(cache_dir, plan, work.codecs, work.kept) as writer,
            _progress(plan, part, todo, shown=seals and bool(todo)) as bar,
        ):
            # Another process may build the same cache: what it finished is skipped, what it left is done here.
            for some in turns.rounds(lambda index: bar.update(len(plan.shard_range(index)))):
                for shard in open_shards(work, plan, some, batch_size=plan.batch_size):
                    if sidecar_path(cache_dir, shard.index).exists():
                        continue
                    targets.spend(shard.samples, failed=len(shard.failed))
                    before = samples
                    for batch, signals in run_shard(work, shard, plan.batch_size):
                        writer.add(batch, signals)
                        samples += len(batch)
                        turns.count(len(batch))
                        bar.update(len(batch))
                    refuse_replaced(cache_dir, plan)
                    budget.spend(shard.failed)
                    writer.finish(shard, unknown=words.count(shard.samples))
                    left = len(plan.shard_range(shard.index)) - (samples - before)
                    turns.count(left)  # failed, or nothing is missing of them
                    bar.update(left)
                    built.append(shard.index)
                writer.wait()
        trust_built(cache_dir, plan, built)
        FailureBudget.of_finished(cache_dir, plan, share=config.max_failed_share).spend(())
        UnknownBudget.of_finished(cache_dir, plan, words=words, share=config.max_unknown_share).refuse()
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - started_cpu

        missing, manifest = tuple(missing_shards(cache_dir, plan)), None
        if seals and not missing:
            manifest = turns.sealed_by_others() or finish(
                work, cache_dir, samples=config.fidelity_samples, known=known, rewritten=True
            )
        return BuildSummary(
            cache=cache_dir, built=len(built), samples=samples, seconds=seconds, cpu_seconds=cpu_seconds, manifest=manifest,
            part=part, missing=missing,
        )  # fmt: skip


def extract_with_processes(
    config: BuildConfig, processes: int, *, overwrite: bool = False, part: Part = WHOLE
) -> BuildSummary:
    """As ``extract()``, with several processes on this machine, each on a GPU of its own where there are several.

    This process writes the plan, watches the others, which take shards from a queue, and seals when they are done.

    Where several hold the teacher together (``tensor_parallel``), these are one worker, and its first process starts the others.
    One process builds here, with as many threads as each of several would use. Of several machines (``part``), the
    share of this one is divided once more; ``any`` of them, they take from one queue.

    Raises:
        ProcessFailedError: With the first failure; finished shards are kept.
    """
    refuse_shared_gpus(config, processes)
    config = fix_threads(fix_ranks(config, overwrite=overwrite), several=True, overwrite=overwrite)
    if (processes := count_workers(config, processes)) == 1:
        return extract(config, overwrite=overwrite, part=part)
    if uses_gpu(config):  # a context on a GPU takes half a gigabyte of it as long as its process lives
        teacher = run_apart(_begin_several, config, overwrite, name="plans the cache")
    else:
        teacher = _begin_several(config, overwrite)
    cache_dir = Path(config.cache)
    plan = read_plan(cache_dir)
    before = missing_shards(cache_dir, plan)
    if config.teacher:  # a name on the hub is asked for once
        config = replace(config, teacher=str(teacher))
    gc.collect()
    with in_use(cache_dir):
        started = time.monotonic()
        part = part.for_resume(before)
        if todo := part.share(before):
            with _progress(plan, part, todo, shown=True) as bar:
                shown = 0  # a bar that is switched off counts nothing itself

                def show() -> None:
                    nonlocal shown
                    done = _samples_of(plan, set(todo) - set(missing_shards(cache_dir, plan)))
                    bar.update(done - shown)
                    shown = done

                count = min(processes, len(todo))
                run_parts(_extract_part, config, part.split(count) if part.of > 1 else [ANY] * count, show)
        seconds = time.monotonic() - started
        missing = tuple(missing_shards(cache_dir, plan))
        if missing:
            summary = BuildSummary(cache=cache_dir, part=part, missing=missing)
        else:
            summary = extract(config, part=WHOLE if part.of > 1 else ANY)
        if not todo:
            return summary
        built = set(todo) - set(missing)
        return replace(summary, built=len(built), samples=_samples_of(plan, built), seconds=seconds)


def _begin_several(config: BuildConfig, overwrite: bool) -> Path:
    """Write the plan for several processes; returns the teacher's folder. The teacher itself is gone then."""
    return begin(config, overwrite=overwrite, several=True)[1].teacher.directory


def _extract_part(config: BuildConfig, part: Part) -> None:
    extract(config, part=part, seals=False)


def begin(config: BuildConfig, *, overwrite: bool, several: bool) -> tuple[Path, Build]:
    """Open teacher and data, and write the plan or make sure that the one there says the same."""
    hide_library_bars()
    cache_dir, given = Path(config.cache), config
    refuse_unwritable(cache_dir)
    config = fix_ranks(config, overwrite=overwrite)
    several = several or config.tensor_parallel > 1
    config = fix_batch_size(fix_threads(config, several=several, overwrite=overwrite), overwrite=overwrite)
    work = open_build(config)
    if (overwrite or stored_plan(cache_dir) is None) and ANSWERS not in work.codecs:
        words = UnknownToken.of(work.encoder)
        budget = UnknownBudget(words=words, total=len(work.dataset), share=config.max_unknown_share)
        budget.probe(work.dataset, work.encoder)
    overwrite = overwrite or begun_otherwise(cache_dir, work.plan)
    anew = overwrite or not (cache_dir / PLAN).is_file()
    with in_use(cache_dir, alone=overwrite):
        try:
            plan = prepare_cache(cache_dir, work.plan, overwrite=overwrite)
        except CacheMismatchError:
            there = stored_plan(cache_dir)
            if config.batch_size or there is None:
                raise
            # Another machine found its own batch size first.
            plan = prepare_cache(cache_dir, replace(work.plan, batch_size=there.batch_size), overwrite=False)
        if anew:  # killed, this build leaves no options of another one
            save_replay(given, cache_dir, only_anew=True)
        return cache_dir, replace(work, plan=plan, scratch=cache_dir)


def finish(work: Build, cache_dir: Path, *, samples: int, known: Collection[str], rewritten: bool) -> Manifest:
    """Measure the fidelity of a cache whose shards are all there, write its card, seal it.

    ``samples`` is the size of the fidelity probe, 0 for none; ``known`` are the cache's files outside ``shards/``;
    ``rewritten`` says whether projector, vision tower and processor were just written.
    """
    refuse_nothing_usable(cache_dir, work.plan)
    fidelity = measure_fidelity(work, cache_dir, samples=samples)
    write_card(cache_dir, work.plan, fidelity, sinks=write_sinks(cache_dir), dataset=work.dataset)
    refuse_unlisted(cache_dir, known)
    drop_damaged_manifest(cache_dir)
    return seal(cache_dir, fidelity=fidelity, rewritten=rewritten)


def recompute_fidelity(config: BuildConfig, *, samples: int) -> Manifest:
    """Measure a finished cache against its teacher again, and seal it with the new figures.

    Raises:
        CacheMismatchError: If the options are not the cache's.
        CacheFormatError: If the cache is not complete.
    """
    cache_dir = Path(config.cache)
    refuse_unwritable(cache_dir, sealed_too=True)
    refuse_missing_shards(cache_dir)
    if read_plan(cache_dir).teacher.get("served"):
        raise CacheMismatchError(
            f"{cache_dir} was made of a served teacher's log-probabilities: there is no live teacher to compare it with"
        )
    work = open_build(fix_batch_size(fix_threads(fix_ranks(config), several=False)))
    stored = read_plan(cache_dir)
    refuse_changed_plan(stored, work.plan, where=str(cache_dir))
    known = read_manifest(cache_dir).files
    return finish(replace(work, plan=stored), cache_dir, samples=samples, known=known, rewritten=False)


def refuse_missing_shards(cache_dir: Path) -> None:
    """Refuse a folder that is no whole cache."""
    missing = missing_shards(cache_dir, read_plan(cache_dir))
    if missing:
        raise CacheFormatError(
            f"{cache_dir}: shards {', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''} are missing; run "
            "`teacher-cache build` with the cache's options, which makes exactly those"
        )


def _progress(plan: Plan, part: Part, todo: Sequence[int], *, shown: bool) -> "tqdm[Never] | ProgressLines":
    """Progress over the samples of a part, of which those of ``todo`` are left."""
    total, left = (_samples_of(plan, shards) for shards in (part.share(range(plan.shard_count)), todo))
    return progress("teacher", total=total, initial=total - left, unit="sample", shown=shown)


def _samples_of(plan: Plan, shards: Iterable[int]) -> int:
    return sum(len(plan.shard_range(index)) for index in shards)


def open_shards(work: Build, plan: Plan, todo: Iterable[int], *, batch_size: int) -> Iterator[EncodedShard]:
    """Encode shards for the teacher: with the data set's answers ahead of it, or with its own in its own time."""
    if ANSWERS not in work.codecs:
        yield from encode_shards(work.dataset, work.encoder, plan, todo, workers=work.workers, scratch=work.scratch)
        return
    for index in todo:
        yield answer_shard(work, plan.shard_range(index), index=index, batch_size=batch_size)
