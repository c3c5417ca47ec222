"""Making ``index.bin`` from sidecars, and comparing one with them; ``common.cache.index`` says what is in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlm_distill_cache.common.cache.index import (
    COLUMN_DTYPES,
    FAILED_BIT,
    INDEX,
    SampleIndex,
    begin_index,
    hash_ids,
    index_columns,
)
from vlm_distill_cache.common.cache.sidecar import check_sidecar, read_sidecar, sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import read_bounded

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from vlm_distill_cache.common.cache.index import Place
    from vlm_distill_cache.common.cache.plan import Plan
    from vlm_distill_cache.common.cache.sidecar import ShardSidecar


class IndexBuilder:
    """Makes an index from sidecars, in any order; holds 24 bytes a sample, and no ids."""

    def __init__(self) -> None:
        self._parts: tuple[list[np.ndarray], ...] = ([], [], [], [])  # of each column
        self._failed = 0

    def add(self, sidecar: ShardSidecar) -> None:
        """Add the samples of a shard."""
        names = (*sidecar.sample_ids, *(name for name, _ in sidecar.failed))
        records, failed = len(sidecar.sample_ids), len(sidecar.failed)
        shard = np.full(len(names), sidecar.index, dtype=np.uint32)
        position = np.arange(len(names), dtype=np.uint32)
        position[records:] += np.uint32(FAILED_BIT - records)
        columns: tuple[np.ndarray, ...] = (*hash_ids(names), shard, position)
        for parts, column in zip(self._parts, columns, strict=True):
            parts.append(column)
        self._failed += failed

    def finish(self, shard_count: int) -> tuple[bytearray, tuple[Place, Place] | None]:
        """Sort; the builder is used up.

        Args:
            shard_count: Of the cache.

        Returns:
            The bytes of the file; and the places of the first two samples with one id, or None.
        """
        columns = []
        for parts, dtype in zip(self._parts, COLUMN_DTYPES, strict=True):
            columns.append(np.concatenate([np.zeros(0, dtype=dtype), *parts]))
            parts.clear()  # before the next column is made: there may be many millions of samples
        high, low, *_ = columns
        data = begin_index(shard_count=shard_count, count=len(high), failed_count=self._failed)
        order = np.lexsort((low, high))
        for column, values in zip(index_columns(data, len(high)), columns, strict=True):
            np.take(values, order, out=column)
        high, low, *_ = index_columns(data, len(high))
        repeats = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))
        if not len(repeats):
            return data, None
        index = SampleIndex(data, INDEX)
        first, second = sorted(index.place(int(repeats[0]) + i) for i in (0, 1))
        return data, (first, second)


def refuse_repeats(cache_dir: Path, repeated: tuple[Place, Place] | None) -> None:
    """Refuse samples with one id, which `IndexBuilder.finish` found.

    Raises:
        CacheFormatError: Naming the id and the shards.
    """
    if repeated is None:
        return
    names = []
    for place in repeated:
        sidecar = read_sidecar(cache_dir, place.shard)
        names.append(
            sidecar.failed[place.position][0] if place.failed else sidecar.sample_ids[place.position]
        )
    what = f"sample {names[0]!r} is" if names[0] == names[1] else f"samples {names[0]!r} and {names[1]!r} are"
    raise CacheFormatError(
        f"{cache_dir}: {what} in shards {repeated[0].shard} and {repeated[1].shard}; ids must be unique, and "
        "so must their xxh3_128; rename one in the data set and build the cache again"
    )


def build_index(cache_dir: Path, plan: Plan, sidecars: Iterable[ShardSidecar]) -> bytearray:
    """Return the ``index.bin`` that all sidecars of a cache, in order, call for.

    Raises:
        CacheFormatError: If a sidecar does not fit the plan, or ids repeat.
    """
    builder = IndexBuilder()
    for sidecar in sidecars:
        check_sidecar(sidecar, plan, str(sidecar_path(cache_dir, sidecar.index)))
        builder.add(sidecar)
    data, repeated = builder.finish(plan.shard_count)
    refuse_repeats(cache_dir, repeated)
    return data


def index_bytes(cache_dir: Path, plan: Plan) -> bytearray:
    """Return the ``index.bin`` that the sidecars in a folder call for; writes nothing.

    Raises:
        FileNotFoundError: If a sidecar is missing.
        CacheFormatError: If a sidecar is damaged or does not fit the plan, or ids repeat.
    """
    return build_index(cache_dir, plan, (read_sidecar(cache_dir, shard) for shard in range(plan.shard_count)))


def index_damage(cache_dir: Path, expected: bytearray) -> str | None:
    """Return what is wrong with the index in a folder, whatever the manifest says of it; or None.

    Args:
        cache_dir: The cache.
        expected: From `index_bytes`, or from an `IndexBuilder` that saw all sidecars.
    """
    try:
        found = read_bounded(cache_dir / INDEX, max_bytes=len(expected))
    except FileNotFoundError:
        return "missing"
    except CacheFormatError as error:
        return str(error)
    return None if found == expected else "does not list the samples that the sidecars list"
