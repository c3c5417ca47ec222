"""A random share of samples, the same wherever it is drawn: by their ids and a seed, evenly from each of their sources.

A sample's place in the order follows from its own id, so neither the number of processes nor the order of a cache or a file
counts, and a smaller share is a part of a larger one.
"""

import logging
import math
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.data.sample import Dataset, number_names
from vlm_distill_cache.data.sources.mixture import deal
from vlm_distill_cache.stage2_student.batches.dataset import Join, choose, join_cache

_log = logging.getLogger(__name__)


def take_samples(
    parts: Sequence[tuple[TeacherCache, Dataset]], *, limit: int | None, share: float, seed: int
) -> list[Join | None]:
    """Which samples a run uses of caches and their data: the first ones, and of them all a random share.

    Args:
        limit: Of several parts, as many of each are taken as the mixture's beginning holds; None: all.
        share: Of all of them, in (0, 1]; the others as of `draw_share`.

    Returns:
        A join for each part; None for one of which nothing is used.

    Raises:
        CacheMismatchError: If a cache is not of its data.
    """
    limits = _limits([len(dataset) for _, dataset in parts], limit)
    taken = [
        None if most == 0 else join_cache(cache, dataset, limit=most)
        for (cache, dataset), most in zip(parts, limits, strict=True)
    ]
    if share == 1:
        return taken
    found = [(place, join) for place, join in enumerate(taken) if join is not None]
    ids = [sample_id for _, join in found for sample_id in join.sample_ids]
    sources = number_names(
        (place, source) for place, join in found for source in parts[place][1].sources()[join.places].tolist()
    )
    drawn, start = draw_share(ids, sources, share=share, seed=seed), 0
    for place, join in found:
        end = start + len(join.sample_ids)
        own = drawn[(drawn >= start) & (drawn < end)] - start
        taken[place], start = choose(join, own.tolist()) if len(own) else None, end
    _log.info(
        "data_share=%g: %d of %d samples, drawn at random from %d sources",
        share, len(drawn), len(ids), len(np.unique(sources)),
    )  # fmt: skip
    return taken


def _limits(sizes: Sequence[int], limit: int | None) -> list[int | None]:
    if len(sizes) == 1 or limit is None:
        return [limit] * len(sizes)
    owners = np.repeat(np.arange(len(sizes)), sizes)[deal(sizes)[:limit]]
    return [int(count) for count in np.bincount(owners, minlength=len(sizes))]


def draw_share(sample_ids: Sequence[str], sources: NDArray[np.int64], *, share: float, seed: int) -> NDArray[np.int64]:
    """Positions of a random share of samples, ascending, int64 ``[ceil(share * n)]``; at least one.

    Each source is shuffled, and all are dealt evenly into one order, whose beginning is taken: a source gives its share but for
    what rounding to whole samples leaves, and small sources round up and down in equal numbers.

    Args:
        sample_ids: n ids, n at least 1.
        sources: Which source each is from, any numbers, int64 ``[n]``.
        share: Above 0, at most 1.
        seed: Another one draws other samples.
    """
    count = max(1, math.ceil(round(share * len(sample_ids), 6)))  # 0.07 * 100 is a little above 7
    hashes = np.array([_hash(seed, name) for name in sample_ids], dtype=np.uint64)
    order = np.lexsort((hashes, sources))  # by source, shuffled in each
    _, starts, sizes = np.unique(sources[order], return_index=True, return_counts=True)
    firsts = [sample_ids[order[start]] for start in starts]
    ranked = np.argsort(np.array([_hash(seed, f"source of {name}") for name in firsts], dtype=np.uint64), kind="stable")
    # Of each source by itself anywhere in [0, 1), alike often: else the only sample of a source would be drawn always or never.
    within = np.array([_hash(seed, f"start of {name}") for name in firsts], dtype=np.float64) / 2.0**64
    offsets = np.empty(len(starts))
    offsets[ranked] = (np.arange(len(starts)) + within[ranked]) / len(starts)
    ranks = np.arange(len(order)) - np.repeat(starts, sizes)
    keys = (ranks + np.repeat(offsets, sizes)) / np.repeat(sizes, sizes)  # in (0, 1): when a source's next one is dealt
    dealt = order[np.lexsort((hashes[order], keys))]
    return np.sort(dealt[:count]).astype(np.int64)


def _hash(seed: int, text: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed} {text}".encode(errors="surrogatepass"))
