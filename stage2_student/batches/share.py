"""A random share of samples, the same wherever it is drawn: by their ids and a seed, evenly from each of their sources.

A sample's place in the order follows from its own id, so neither the number of processes nor the order of a cache or a file
counts, and a smaller share is a part of a larger one.
"""

import math
from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray


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
    firsts = np.array([_hash(seed, f"source of {sample_ids[order[start]]}") for start in starts], dtype=np.uint64)
    offsets = np.empty(len(starts))
    offsets[np.argsort(firsts, kind="stable")] = (np.arange(len(starts)) + 0.5) / len(starts)
    ranks = np.arange(len(order)) - np.repeat(starts, sizes)
    keys = (ranks + np.repeat(offsets, sizes)) / np.repeat(sizes, sizes)  # in (0, 1): when a source's next one is dealt
    dealt = order[np.lexsort((hashes[order], keys))]
    return np.sort(dealt[:count]).astype(np.int64)


def _hash(seed: int, text: str) -> int:
    return xxhash.xxh3_64_intdigest(f"{seed} {text}".encode(errors="surrogatepass"))
