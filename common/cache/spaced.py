"""Evenly spaced records of a cache, for figures that need not have seen them all: bounded work on caches of any size."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.cache.shared_images import SharedImages
from vlm_distill_cache.common.cache.side_files import check_file
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.cache.stores import open_reader

MOST_RECORDS = 2048
FEW_RECORDS = 128
"""Where the data are read again for each of them, which may lie far away."""
_REMEDY = "run `cachectl repair`, then build those shards again with the same options"
_LEAST_SHARDS = 64  # looked into where there are so many; each is read whole to be checked


def spaced_places(counts: Sequence[int], *, most: int = MOST_RECORDS) -> list[tuple[int, list[int]]]:
    """Choose records: evenly spaced among those of evenly spaced shards, all where there are no more than ``most``.

    Args:
        counts: Records of each shard.

    Returns:
        ``(shard, positions in it)`` in order. The shards are at least 64 or as many as hold ``most`` records, whichever
        is more, so that a cache of thousands of shards is not read whole.
    """
    held = np.flatnonzero(counts)
    if not len(held):
        return []
    sizes = np.asarray(counts, np.int64)[held]
    shards = max(_LEAST_SHARDS, -(-most * len(held) // int(sizes.sum())))
    if shards < len(held):
        chosen = np.arange(shards) * len(held) // shards
        held, sizes = held[chosen], sizes[chosen]
    ends = np.cumsum(sizes)
    total = int(ends[-1])
    records = np.arange(total) if total <= most else np.arange(most) * total // most
    owner = np.searchsorted(ends, records, side="right")
    inside = records - (ends - sizes)[owner]
    return [(int(held[place]), inside[owner == place].tolist()) for place in np.unique(owner)]


def spaced_records(
    cache: TeacherCache, names: Collection[str], *, most: int = MOST_RECORDS
) -> Iterator[tuple[str, Record]]:
    """Yield id and the named fields of evenly spaced records of a sealed cache, wherever it lies."""
    for shard, positions in spaced_places([summary.samples for summary in cache.manifest.shards], most=most):
        ids = cache.shard_sample_ids(shard)
        for position in positions:
            yield ids[position], cache.read(ids[position], names)


def spaced_unsealed(
    cache_dir: Path, plan: Plan, names: Collection[str], *, most: int = MOST_RECORDS
) -> Iterator[tuple[str, Record]]:
    """As `spaced_records`, of a folder whose shards are all there but which is not sealed yet; no link is followed.

    Raises:
        CacheFormatError: If a file of one of these shards is lost or damaged.
    """
    images = SharedImages(plan.all_fields)
    counts = [len(read_sidecar(cache_dir, shard).sample_ids) for shard in range(plan.shard_count)]
    for shard, positions in spaced_places(counts, most=most):
        for name, entry in read_sidecar(cache_dir, shard).files.items():
            check_file(cache_dir, name, entry, _REMEDY)
        reader = open_reader(plan.store, cache_dir, shard, plan.all_fields)
        for position in positions:
            yield (
                reader.sample_ids[position],
                images.read(reader, position, names, where=f"record {position} of shard {shard}"),
            )
