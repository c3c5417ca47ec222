"""Eight bits for a number: companded gaps of log-probabilities, and logarithms of attention.

Both tables are a fixed part of format version 1: old caches are read with them.

Dims: arrays of any shape; nothing here knows what they mean.
"""

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]
ArrayT = TypeVar("ArrayT")
"""Of what a codec decodes: arrays, or the tensors that `common.codecs.live` makes of them."""

MAX_GAP = 24.0
"""Nats; a token e^-24 as likely as the top one adds nothing; larger finite gaps are stored as this."""
ZERO_CODE = 255
"""The code of an infinite gap: a probability of exactly zero."""

LOG_LEVELS = 254
"""Steps between code 1 (the smallest value kept apart from zero) and code 255 (the reference)."""


def encode_gaps(gaps: FloatArray) -> CodeArray:
    """Code gaps to the top log-probability in 8 bits, finely where probabilities are large.

    Codes follow `_compand`, a mix of an exponential (fine below 3 nats, where tokens carry the gradient)
    and a logarithm (even ratios beyond). On synthetic teachers its error in the probabilities is a
    quarter below that of the best logarithm alone, at temperatures 1 and 2 alike.

    Args:
        gaps: float32 nats, any shape, at least 0, or +inf for a probability of zero.

    Returns:
        uint8 codes of the same shape; 0 is a gap of 0, 254 one of `MAX_GAP` or more, 255 an infinite one.
    """
    near = np.minimum(np.maximum(gaps, np.float32(0)), np.float32(MAX_GAP))  # below 0 is rounding
    codes = np.rint(_compand(near))
    codes[np.isposinf(gaps)] = ZERO_CODE
    return codes.astype(np.uint8)


def gap_error(gaps: np.ndarray) -> np.ndarray:
    """Bound on the error of decoded gaps: half a step (growing with the gap), or what exceeds `MAX_GAP`.

    Args:
        gaps: float nats, any shape, finite and at least 0.

    Returns:
        float64 nats, the same shape; float32 rounding included.
    """
    exact = gaps.astype(np.float64)
    codes = _compand(np.minimum(exact, MAX_GAP))
    half_step = _expand(codes + 0.5) - _expand(codes)
    bound: np.ndarray = np.maximum(half_step, exact - MAX_GAP) + 2**-20 * (exact + 1)
    return bound


def gap_steps(codes: CodeArray, counts: npt.NDArray[np.int64]) -> CodeArray:
    """Replace each row's codes by their steps from rank to rank: small numbers, which compress better.

    On real prose a code takes 0.47 bytes of a Zarr shard and a step 0.35. Steps count modulo 256, so that
    any codes come back exactly; the first entry of a row keeps its code.

    Args:
        codes: uint8 `[E]`, of all rows, one after the other.
    """
    steps = codes.copy()
    steps[1:] -= codes[:-1]
    starts = np.cumsum(counts) - counts
    steps[starts] = codes[starts]
    return steps


def gap_codes(steps: CodeArray, counts: npt.NDArray[np.int64]) -> CodeArray:
    """The codes of `gap_steps`: uint8 `[E]`, exactly those it was given."""
    sums = np.cumsum(steps, dtype=np.uint8)
    before = np.concatenate([np.zeros(1, np.uint8), sums])[np.cumsum(counts) - counts]  # [A]
    codes: CodeArray = sums - np.repeat(before, counts)
    return codes


def _compand(gaps: FloatArray) -> FloatArray:
    """Real-valued codes in [0, 254] of gaps in [0, `MAX_GAP`]; concave, in the gaps' own precision."""
    fine = (1 - np.exp(gaps * (-1 / 3))) * (0.7 / -math.expm1(-MAX_GAP / 3))
    coarse = np.log1p(gaps) * (0.3 / math.log1p(MAX_GAP))
    codes: FloatArray = (fine + coarse) * (ZERO_CODE - 1)
    return codes


def _expand(codes: np.ndarray) -> np.ndarray:
    """Gaps of real-valued codes, float64: the inverse of `_compand`, by bisection."""
    low, high = np.zeros(codes.shape), np.full(codes.shape, 2 * MAX_GAP)
    for _ in range(60):
        middle: np.ndarray = (low + high) / 2
        below = _compand(middle) < codes
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def _build_gap_table() -> FloatArray:
    table = _expand(np.arange(256, dtype=np.float64))
    table[0], table[ZERO_CODE - 1], table[ZERO_CODE] = 0.0, MAX_GAP, np.inf
    return table.astype(np.float32)


GAP_TABLE: FloatArray = _build_gap_table()
"""Gap in nats of each code, float32 `[256]`."""


def _build_reach() -> FloatArray:
    """How far a gap may lie above and below its code's, nats, float32 `[2, 256]`; zero for an infinite one."""
    codes = np.arange(ZERO_CODE, dtype=np.float64)
    reach = np.zeros((2, 256), np.float32)
    reach[0, :ZERO_CODE] = _expand(codes + 0.5) - _expand(codes)
    reach[1, :ZERO_CODE] = _expand(codes) - _expand(np.maximum(codes - 0.5, 0.0))
    return reach


GAP_REACH: FloatArray = _build_reach()
"""How far a gap may lie above, and below, that of its code, nats, float32 `[2, 256]`."""


def balance(log_probs: FloatArray, codes: CodeArray, counts: npt.NDArray[np.int64], kept: FloatArray) -> FloatArray:
    """Move log-probabilities within the rounding of their codes so that those of a row sum to what is known.

    The sum of a row's rounding errors is known, since the tail's mass is stored. It is shared out as least
    squares has it, in proportion to each probability's expected squared error, and at most half a step to
    each: nothing is stored for it, and the error of probabilities falls by a quarter to a half.

    Args:
        log_probs: float32 `[E]`, nats, decoded from `codes`; the first entry of each row is exact.
        counts: int64 `[A]`, entries of each row, at least 1.
        kept: float32 `[A]`, the mass that the entries of each row have together.

    Returns:
        float32 `[E]`, nats, falling within a row as before.
    """
    if not len(counts):
        return log_probs
    starts = np.cumsum(counts) - counts
    above, below = GAP_REACH[:, codes]  # [E]
    above[starts] = below[starts] = 0
    probabilities = np.exp(log_probs)
    halves = (above + below) * np.float32(0.5)
    weights = probabilities * halves
    variances = np.add.reduceat(weights * weights, starts)  # [A]
    missing = kept - np.add.reduceat(probabilities, starts, dtype=np.float64)
    scale = np.divide(missing, variances, out=np.zeros_like(missing), where=variances > 0)
    scale = np.clip(scale, -1e30, 1e30).astype(np.float32)  # a damaged top could leave next to no variance
    shift = weights * halves * np.repeat(scale, counts)
    balanced: FloatArray = log_probs + np.minimum(np.maximum(shift, -above), below)
    return balanced


def encode_log8(relative: FloatArray, nats: float) -> CodeArray:
    """Code values in [0, 1] by their logarithm in 8 bits.

    Code 0 is exactly zero; codes 1..255 are `exp(-nats) .. 1` in equal steps of `nats / 254` in the
    logarithm. Positive values below `exp(-nats)` take code 1, so that "zero or not" survives.
    The round trip is within half a step of the logarithm, or within `exp(-nats)` of the value.

    Args:
        relative: float32, any shape, finite, in [0, 1].
        nats: Range kept apart from zero, natural-log units.
    """
    positive = relative > 0
    logs = np.log(np.where(positive, relative, np.float32(1.0)))  # no warning for log(0)
    codes = np.rint(logs * np.float32(LOG_LEVELS / nats)) + np.float32(LOG_LEVELS + 1)
    np.clip(codes, 1, LOG_LEVELS + 1, out=codes)
    codes[~positive] = 0
    return codes.astype(np.uint8)


def decode_log8(codes: CodeArray, nats: float) -> FloatArray:
    """Values of `encode_log8` codes: float32, the same shape, in [0, 1]; 0 stays exactly 0."""
    return log8_table(nats)[codes]


def log8_table(nats: float) -> FloatArray:
    """The value of each of the 256 codes, float32 `[256]`."""
    table = np.exp((np.arange(256, dtype=np.float64) - (LOG_LEVELS + 1)) * (nats / LOG_LEVELS))
    table[0] = 0.0
    return table.astype(np.float32)


def log8_half_step(nats: float) -> float:
    """Largest error of a value's logarithm within range, nats (rounding of float32 included)."""
    return nats / LOG_LEVELS / 2 + math.ldexp(nats + 1.0, -22)
