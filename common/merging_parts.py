"""Parts of one plan, built on several machines, into that plan's cache: shards copied, verified, sealed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.manifest import (
    CARD,
    MANIFEST,
    PLAN,
    Manifest,
    missing_shards,
    read_manifest,
    read_plan,
    read_sidecar,
    seal,
    side_files,
    write_plan,
)
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE, SharedImages
from vlm_distill_cache.common.cache.sidecar import FileEntry, check_sidecar, sidecar_path, write_sidecar
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.fetch import fetch_files

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from vlm_distill_cache.common.cache.plan import Plan
    from vlm_distill_cache.common.cache.schema import Record
    from vlm_distill_cache.common.cache.sidecar import ShardSidecar


def merge_parts(
    sources: Sequence[Path], target: Path, *, on_shard: Callable[[], object] | None = None
) -> tuple[Manifest | None, tuple[int, ...], int, int]:
    """Copy the shards of unfinished caches of one plan into one folder, and seal it if all are there.

    Args:
        sources: Cache folders with equal plans, finished or not.
        target: A new folder, or one with the same plan; shards in it stay.
        on_shard: Called after each shard, for progress.

    Returns:
        The manifest or None, the shards still missing, the records copied, and how many of them more than one
        source held.

    Raises:
        CacheMismatchError: If two sources hold a shard, or a file beside the shards, with different content.
        CacheFormatError: If a file is not what its sidecar says.
    """
    plan = read_plan(sources[0])
    write_plan(target, plan)
    _copy_side_files(sources, target)
    samples = repeated = 0
    for index in range(plan.shard_count):
        holders = [source for source in sources if sidecar_path(source, index).is_file()]
        if holders:
            source, sidecar = _choose(holders, index, plan)
            fetch_files(open_remote(source), target, sidecar.files)
            write_sidecar(target, sidecar)
            samples += len(sidecar.sample_ids)
            repeated += len(sidecar.sample_ids) if len(holders) > 1 else 0
        if on_shard is not None:
            on_shard()
    missing = tuple(missing_shards(target, plan))
    if missing:
        return None, missing, samples, repeated
    sealed = [read_manifest(source) for source in sources if (source / MANIFEST).is_file()]
    fidelity = next((manifest.fidelity for manifest in sealed if manifest.fidelity), None)
    return seal(target, fidelity=fidelity), (), samples, repeated


def _copy_side_files(sources: Sequence[Path], target: Path) -> None:
    """Take over projector, vision tower and processor, which must be equal wherever they are."""
    held: dict[str, tuple[Path, FileEntry]] = {}
    for source in sources:
        for name in side_files(source):
            if name in (PLAN, INDEX):
                continue
            entry = FileEntry.of(source / name)
            first, expected = held.setdefault(name, (source, entry))
            if entry != expected:
                raise CacheMismatchError(
                    f"{name}: {source} and {first} hold different files ({entry.xxh3_128}, "
                    f"{expected.xxh3_128}); parts of one plan must come from one teacher and one version of "
                    "its libraries: build one of them again where the other was built"
                )
    for name, (source, entry) in held.items():
        fetch_files(open_remote(source), target, {name: entry})
    for source in sources:
        if (source / CARD).is_file() and not (target / CARD).exists():
            write_bytes_atomic(target / CARD, (source / CARD).read_bytes())


def _choose(holders: Sequence[Path], index: int, plan: Plan) -> tuple[Path, ShardSidecar]:
    """Choose whose shard is taken: all the same, or one that could read what the others could not.

    Raises:
        CacheMismatchError: Naming the shard, and a sample and field if there is one that differs.
    """
    best, chosen = holders[0], _read(holders[0], index, plan)
    for source in holders[1:]:
        sidecar = _read(source, index, plan)
        if sidecar == chosen:
            continue
        if (where := _differing_record(best, chosen, source, sidecar, plan)) is not None:
            raise CacheMismatchError(
                f"shard {index}: {where} differs between {best} and {source}; parts of one plan hold a shard "
                "once, or equal: leave one of them out"
            )
        ours, theirs = set(chosen.sample_ids), set(sidecar.sample_ids)
        if not (ours <= theirs or theirs <= ours):
            raise CacheMismatchError(
                f"shard {index}: {best} and {source} could not read different samples of it; delete the "
                "shard's sidecar in both and build it where all can be read"
            )
        if ours < theirs:
            best, chosen = source, sidecar
    return best, chosen


def _read(source: Path, index: int, plan: Plan) -> ShardSidecar:
    sidecar = read_sidecar(source, index)
    check_sidecar(sidecar, plan, str(sidecar_path(source, index)))
    return sidecar


def differing_field(first: Record, other: Record) -> str | None:
    """Return the first field, by name, in which two records differ; None if they are equal."""
    for name in sorted(first.keys() | other.keys()):
        if name == VISUAL_SOURCE.name:  # where the arrays lie, not what they are
            continue
        a, b = first.get(name), other.get(name)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
            return name
    return None


def _differing_record(
    first: Path, one: ShardSidecar, second: Path, other: ShardSidecar, plan: Plan
) -> str | None:
    images = SharedImages(plan.all_fields)
    readers = [open_reader(plan.store, path, one.index, plan.all_fields) for path in (first, second)]
    try:
        for sample_id in sorted(set(one.sample_ids) & set(other.sample_ids)):
            records = [
                images.read(reader, reader.sample_ids.index(sample_id), where=f"sample {sample_id!r}")
                for reader in readers
            ]
            if (field := differing_field(*records)) is not None:
                return f"{field} of sample {sample_id!r}"
    finally:
        for reader in readers:
            reader.close()
    return None
