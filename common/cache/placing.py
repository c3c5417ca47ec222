"""Where a cache's samples are in a data set: what the plan says, confirmed by all ids' hashes, or looked up.

It takes about half of looking all of them up, and half of the memory (docs/scale.md). What shares a shard with samples that
failed is looked up; and so is everything where the data are in another order, are others, or are too many for their hashes to
be held at once.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.index import SampleIndex, hashes_of
from vlm_distill_cache.common.cache.plan import Plan

_MOST_HELD = 1 << 24  # samples of which all hashes are held at once, 16 bytes each
_AT_A_TIME = 1 << 20


def planned_places(
    index: SampleIndex, plan: Plan, starts: NDArray[np.int64], sample_ids: Sequence[str]
) -> NDArray[np.int64] | None:
    """Where the samples of a cache are in the data that it was built from; None: these are others, or too many.

    Args:
        starts: Records before each shard, and their total at the end, int64 ``[shards + 1]``.
        sample_ids: Of the data set.

    Returns:
        Of each record the place in ``sample_ids``, int64 ``[records]``; -1 of one that is not there.
    """
    count = len(sample_ids)
    if count != plan.sample_count or count > _MOST_HELD:
        return None
    high, low = _all_hashes(sample_ids)
    begins = np.arange(plan.shard_count, dtype=np.int64) * plan.shard_size
    planned, samples = np.diff(begins, append=count), np.diff(starts)
    whole = samples == planned
    if not index.confirms(high, low, np.where(whole, begins, -1), samples):
        return None
    if whole.all():
        del high, low  # before as many places are made
        return np.arange(count, dtype=np.int64)
    places = np.full(int(starts[-1]), -1, dtype=np.int64)
    for shard in np.flatnonzero(whole).tolist():
        places[starts[shard] : starts[shard + 1]] = np.arange(begins[shard], begins[shard] + samples[shard])
    unsure = np.flatnonzero(np.repeat(~whole, planned))
    for begin in range(0, len(unsure), _AT_A_TIME):
        some = unsure[begin : begin + _AT_A_TIME]
        shards, positions = index.find_many(high[some], low[some])
        held = np.flatnonzero(shards >= 0)
        found, at = shards[held], positions[held]
        if (at >= samples[found]).any():
            return None
        places[starts[found] + at] = some[held]
    return places


def _all_hashes(sample_ids: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Upper and lower halves of the ids' hashes, u8 ``[n]`` each."""
    high, low = (np.empty(len(sample_ids), dtype=np.uint64) for _ in range(2))
    done = 0
    for some_high, some_low in hashes_of(sample_ids):
        some = slice(done, done + len(some_high))
        high[some], low[some] = some_high, some_low
        done = some.stop
    return high, low
