"""A smaller logit cache out of a larger one, without the teacher: the first entries of each row.

Entries are stored by rank, so the k most likely tokens of a row are its first k. What is dropped joins the tail at
every cached temperature: the result is what the teacher's dense logits would have given at the smaller `max_k`,
within the rounding of the codes (`truncate_logits`). The ground truth stays whatever its rank.

Works on stored records with numpy alone, so that `cachectl` needs no torch.

Dims: A supervised rows, E entries of all rows, T cached temperatures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.quantise import GAP_TABLE, gap_codes, gap_steps
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError

FloatArray = npt.NDArray[np.float64]


def truncated_codec(stored_codec: Mapping[str, Any], k: int) -> dict[str, Any]:
    """The settings of the smaller cache.

    Args:
        stored_codec: The logit codec's dictionary in a cache's plan.
        k: Most entries of a row from now on, at least 2: the top token and the ground truth.

    Returns:
        The dictionary with `max_k` and `min_k` lowered to `k`.

    Raises:
        ConfigError: If `k` is no whole number from 2 to the stored `max_k`.
        CacheFormatError: If the dictionary is not that of a logit codec.
    """
    try:
        most, least = int(stored_codec["max_k"]), int(stored_codec["min_k"])
        is_logits, exact = stored_codec["codec"] == "logits", stored_codec["exact"]
        temperatures = [float(t) for t in stored_codec["temperatures"]]
    except (LookupError, TypeError, ValueError) as error:
        raise CacheFormatError(
            f"logit codec {dict(stored_codec)!r}: expected whole numbers max_k and min_k, temperatures and exact; "
            "the plan is damaged"
        ) from error
    if not is_logits:
        raise CacheFormatError(f"top-k: expected the codec 'logits', got {stored_codec['codec']!r}")
    if not all(t > 0 for t in temperatures) or not isinstance(exact, bool):
        raise CacheFormatError(
            f"logit codec: temperatures {temperatures} or exact {exact!r}; the plan is damaged"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 2 <= k <= most:
        raise ConfigError(
            f"top-k: expected a whole number from 2 to {most}, the most entries a row of this cache has, got {k!r}"
        )
    return {**stored_codec, "max_k": k, "min_k": min(least, k)}


def truncate_logits(record: Record, stored_codec: Mapping[str, Any], k: int) -> Record:
    """Keep at most `k` entries of each row; the last one is the ground truth if its rank is lower.

    Ids, counts and codes are exactly those of selecting from the dense logits at the smaller `k`. The tails
    add up probabilities rounded by the larger cache: the added mass is within the relative error that
    `gap_error` states, before the tail is rounded to its own dtype.

    Args:
        record: A whole record, `labels` included, written by the codec of `stored_codec`.
        stored_codec: That codec's dictionary.
        k: See `truncated_codec`.

    Returns:
        A new record; all other fields are the same arrays.

    Raises:
        ConfigError: If `k` is not possible with this codec.
        CacheFormatError: If counts and arrays do not fit each other.
    """
    truncated_codec(stored_codec, k)  # refuses an impossible k
    counts = record["entry_count"].astype(np.int64)  # [A]
    ids, tails = record["token_ids"], record["tail_logmass"]
    columns = len(stored_codec["temperatures"])
    fits = int(counts.sum()) == len(ids) == len(record["log_gap"]) and tails.shape == (len(counts), columns)
    if not fits or len(record["labels"]) != len(counts) or counts.min(initial=1) < 1:
        raise CacheFormatError(
            f"logits of a record: {len(counts)} rows announce {counts.sum()} entries, at least one each; found "
            f"{len(ids)} ids, {len(record['log_gap'])} gaps, {len(record['labels'])} labels and tails "
            f"{tails.shape}; the cache is damaged: run `cachectl verify`"
        )
    steps = bool(stored_codec.get("gap_steps", False))
    codes = gap_codes(record["log_gap"], counts) if steps else record["log_gap"]  # [E]
    kept = _kept_entries(ids, counts, record["labels"], k)  # [E]
    kept_counts = np.minimum(counts, k)
    gaps = codes if stored_codec["exact"] else GAP_TABLE[codes]
    masses = _tails(
        gaps.astype(np.float64), counts, kept, tails.astype(np.float64), stored_codec["temperatures"]
    )
    with np.errstate(over="ignore"):  # a log-mass below -65504 is a mass of zero
        rounded = masses.astype(tails.dtype)
    cut = (counts > k)[:, None]
    codes = codes[kept]
    return {
        **record,
        "entry_count": kept_counts.astype(record["entry_count"].dtype),
        "token_ids": ids[kept],
        "log_gap": gap_steps(codes, kept_counts) if steps else codes,
        "tail_logmass": np.where(cut, rounded, tails),
    }


def _kept_entries(ids: np.ndarray, counts: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Which entries stay, bool `[E]`: ranks below k, the last of them given up for a ground truth further down."""
    rows = np.repeat(np.arange(len(counts)), counts)  # [E]
    ranks = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
    truth = ids == labels[rows]
    late = np.zeros(len(counts), bool)
    late[rows[truth & (ranks >= k)]] = True  # rows whose ground truth comes too late
    kept: np.ndarray = (ranks < k - late[rows]) | (truth & late[rows])
    return kept


def _tails(
    gaps: FloatArray, counts: np.ndarray, kept: np.ndarray, tails: FloatArray, temperatures: list[float]
) -> FloatArray:
    """The log-mass of all that is not kept, nats, float64 `[A, T]`.

    At each temperature the listed tokens share what the stored tail leaves, in proportion to their
    `exp(-gap / T)`: exactly the probabilities that `SparseLogits.at` gives them.
    """
    if not len(counts):
        return tails
    starts = np.cumsum(counts) - counts
    columns = []
    for column, temperature in enumerate(temperatures):
        weights = np.exp(-gaps / temperature)  # [E], 1 for the top token
        dropped = np.add.reduceat(np.where(kept, 0.0, weights), starts)  # [A]
        share = dropped / np.add.reduceat(weights, starts)
        tail = np.exp(np.minimum(tails[:, column], 0.0))
        with np.errstate(divide="ignore"):  # no mass at all: -inf
            columns.append(np.log(tail + (1 - tail) * share))
    return np.stack(columns, axis=1)
