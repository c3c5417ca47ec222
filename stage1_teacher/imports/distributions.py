"""From log-probabilities of some tokens to the rows of a cache, with the mass of all others.

A server tells the log-probabilities of a row's likeliest tokens and of the token that stands there. What they lack of a
probability of 1 is the mass of all other tokens, at temperature 1; at another it would depend on how these share it.

Dims: A supervised rows, K most entries of a row.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.served import Distribution

NOTHING = -9999.0
"""What vLLM writes for minus infinity, which JSON does not have; no log-probability of a token is as low."""
MissingTarget = Literal["refuse", "middle"]
TOO_MUCH = 0.02  # a row's probabilities may exceed 1 by this: what rounding them to bfloat16 can do


def sparse_rows(
    codec: LogitCodec,
    rows: Sequence[Distribution],
    labels: Sequence[int],
    *,
    vocabulary: int,
    missing_target: MissingTarget = "refuse",
) -> SparseLogits:
    """Keep of each row what a codec keeps, as `common.codecs.live.select_entries` does of dense logits.

    Tokens that the codec drops go to the tail. Probabilities that sum to a little more than 1 are scaled to 1.

    Args:
        codec: With temperature 1 alone.
        rows: Log-probabilities in nats of each supervised row's tokens, at temperature 1 and without penalties.
        labels: The target token of each row, which should be among the row's tokens.
        vocabulary: Ids are below it.
        missing_target: What becomes of a row whose target is not among its tokens: it is refused, or (``middle``) the target gets
            half of what it can have at most, which is the least likely token's probability, or what is left of 1.

    Returns:
        Rows on the CPU: ids int64 ``[A, K]``, log-probabilities float32 ``[A, K]``, mask bool ``[A, K]``, tail float32
        ``[A, 1]``.

    Raises:
        SampleError: A row is no distribution, or lacks its target; the message says which row and why.
    """
    kept = []
    for number, (row, label) in enumerate(zip(rows, labels, strict=True)):
        try:
            if missing_target == "middle" and label not in row:
                row = _with_target(row, label)
            kept.append(_keep(codec, row, label, vocabulary))
        except SampleError as error:
            raise SampleError(f"answer token {number + 1} of {len(labels)} (id {label}): {error}") from error
    width = max((len(ids) for ids, _, _ in kept), default=0)
    token_ids = np.zeros((len(kept), width), np.int64)
    log_probs = np.full((len(kept), width), -np.inf, np.float32)
    mask = np.zeros((len(kept), width), bool)
    tails = np.full((len(kept), 1), -np.inf, np.float32)
    for place, (ids, values, tail) in enumerate(kept):
        token_ids[place, : len(ids)], log_probs[place, : len(ids)], mask[place, : len(ids)] = ids, values, True
        tails[place] = tail
    return SparseLogits(
        torch.from_numpy(token_ids),
        torch.from_numpy(log_probs),
        torch.from_numpy(mask),
        torch.from_numpy(tails),
        codec.temperatures,
    )


def _keep(codec: LogitCodec, row: Distribution, label: int, vocabulary: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Ids i8 ``[K]``, log-probabilities f8 ``[K]`` and log-mass of all others of one row."""
    ids = np.fromiter(row.keys(), np.int64, len(row)) if _are_ids(row, vocabulary) else np.zeros(0, np.int64)
    values = np.fromiter(row.values(), np.float64, len(row))
    if np.isnan(values).any() or (values > math.log1p(TOO_MUCH)).any():
        wrong = values[np.isnan(values) | (values > math.log1p(TOO_MUCH))][0]
        raise SampleError(f"a log-probability is {wrong:g}; expected a number of at most 0")
    values = np.where(values <= NOTHING, -np.inf, values)
    if label not in row:
        raise SampleError(
            f"its own log-probability is not among the {len(row)} that are given, so it is not known how likely the teacher "
            "finds it; have the server write it too (vLLM: prompt_logprobs, SGLang: return_logprob), or let it have half of "
            "what it can have at most (--missing-target middle)"
        )
    order = np.lexsort((ids, -values))  # equal ones by id, as a build ranks them
    ids, values = ids[order], values[order]
    total = _log_sum(values)
    if total == -math.inf:
        raise SampleError("all log-probabilities are minus infinity")
    if total > math.log1p(TOO_MUCH):
        raise SampleError(
            f"its probabilities sum to {math.exp(total):.4f}, more than 1: these are no log-probabilities of one "
            "distribution (logits, or tokens counted twice?)"
        )
    values, missing = (values - total, 0.0) if total > 0 else (values, -math.expm1(total))

    finite = int((values > -math.inf).sum())
    likely = int((values >= (math.log(codec.floor) if codec.floor else -math.inf)).sum())
    count = min(max(likely, codec.min_k), finite, codec.max_k)
    place = int(np.flatnonzero(ids == label)[0])
    if place >= count:  # as the last one
        slot = min(count, codec.max_k - 1)
        chosen = np.r_[np.arange(slot), place]
    else:
        chosen = np.arange(count)
    dropped = np.exp(np.delete(values, chosen)).sum()
    others = missing + float(dropped)
    return ids[chosen], values[chosen], math.log(min(others, 1.0)) if others > 0 else -math.inf


def _with_target(row: Distribution, label: int) -> Distribution:
    """A row with its target, of which only is known that it is no likelier than the others."""
    values = [value for value in row.values() if NOTHING < value < math.inf]
    left = -math.expm1(_log_sum(np.array(values))) if values else 0.0
    most = min(math.exp(min(values)), left) if values else 0.0
    return {**row, label: math.log(most / 2) if most > 0 else -math.inf}


def _are_ids(row: Distribution, vocabulary: int) -> bool:
    """Whether a row's tokens are of the vocabulary; raises SampleError, also if there are none."""
    if not row:
        raise SampleError("no log-probabilities are given")
    if wrong := [token for token in row if not 0 <= token < vocabulary]:
        raise SampleError(
            f"token id {wrong[0]} is not in the teacher's vocabulary of {vocabulary} tokens; --teacher must be the model that was "
            "served"
        )
    return True


def _log_sum(values: np.ndarray) -> float:
    largest = float(values.max())
    return largest if largest == -math.inf else largest + math.log(float(np.exp(values - largest).sum()))
