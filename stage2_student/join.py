"""Where a cache's samples are in a data set: arrays of places, no dictionary of a million ids."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.sample import Dataset

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Join:
    """The samples that a data set and a cache share, in the cache's order.

    Attributes:
        sample_ids: n ids; the data set's own strings.
        places: Of each in the data set, int64 ``[n]``.
        shards: Positions in ``places`` of each shard's samples, int64 ``[n_i]``.
    """

    sample_ids: list[str]
    places: NDArray[np.int64]
    shards: list[NDArray[np.int64]]


def join_cache(cache: TeacherCache, dataset: Dataset, *, limit: int | None = None) -> Join:
    """Find the cache's samples in a data set; of a merged cache, those that come from this data set.

    Args:
        cache: The teacher's signals.
        dataset: Images and text.
        limit: Use only the first so many samples.

    Raises:
        CacheMismatchError: If the data set lacks samples that the cache holds; if it lacks all, for a merged
            cache.
    """
    ids = dataset.sample_ids
    places = _places(cache, ids)
    merged = bool(merged_fingerprints(cache))
    if not merged:
        places = places[:limit]
    kept = np.flatnonzero(places >= 0)[:limit]
    if len(kept) < len(places):
        if merged and len(kept):
            _log.info("%d of the %d samples of %s are of this data set", len(kept), len(cache), cache.path)
        else:
            absent = np.flatnonzero(places < 0)
            raise CacheMismatchError(
                f"{len(absent)} of the {len(places)} samples in {cache.path} are not in the data set "
                f"{dataset.name} ({len(dataset)} samples); the first is {cache.sample_ids[int(absent[0])]!r}. "
                "Train with the data the cache was built from, or build a cache for this data "
                "(teacher-cache build --data ...)"
            )
    ends = np.searchsorted(kept, np.cumsum([shard.samples for shard in cache.manifest.shards])).tolist()
    places = places[kept]
    return Join(
        sample_ids=[ids[place] for place in places.tolist()],
        places=places,
        shards=[np.arange(a, b, dtype=np.int64) for a, b in zip([0, *ends], ends, strict=False)],
    )


def missing_samples(cache: TeacherCache, sample_ids: Sequence[str]) -> tuple[int, str]:
    """Return how many of a cache's samples a data set lacks, and the first one's id; empty if there is none."""
    absent = np.flatnonzero(_places(cache, sample_ids) < 0)
    return len(absent), cache.sample_ids[int(absent[0])] if len(absent) else ""


def merged_fingerprints(cache: TeacherCache) -> tuple[str, ...]:
    """Fingerprints of the data sets that a merged cache was made from; empty for any other cache."""
    parts = cache.plan.data.get("parts")
    if not isinstance(parts, list):
        return ()
    return tuple(str(part.get("fingerprint")) for part in parts if isinstance(part, dict))


def splits_and_limits(cache: TeacherCache) -> list[tuple[str, int | None]]:
    """Of which split of its data a cache was built, and of how many samples: None for all.

    Returns:
        One pair; of a cache that was merged from different ones the pairs of all, the largest part's first.
    """
    parts = cache.plan.data.get("parts")
    described = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    described.sort(key=lambda part: -int(part.get("samples") or 0))
    pairs = [
        (str(data.get("split") or "train"), int(data.get("limit") or 0) or None)
        for data in described or [cache.plan.data]
    ]
    return list(dict.fromkeys(pairs))


def _places(cache: TeacherCache, sample_ids: Sequence[str]) -> NDArray[np.int64]:
    """Where each of the cache's samples is in a data set, int64 ``[len(cache)]``; -1 if it is not."""
    found = cache.positions(sample_ids)
    places = np.full(len(cache), -1, dtype=np.int64)
    held = np.flatnonzero(found >= 0)
    places[found[held]] = held
    return places
