"""Eight bits for a number: companded gaps of log-probabilities, and logarithms of attention.

Both tables are a fixed part of format version 1: old caches are read with them.

Dims: arrays of any shape; nothing here knows what they mean.
"""

import math

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
CodeArray = npt.NDArray[np.uint8]

GAP_SCALE = 0.5
"""Nats; gaps well below it are coded in equal steps, gaps above it in equal ratios."""
MAX_GAP = 24.0
"""Nats; a token e^-24 as likely as the top one adds nothing; larger finite gaps are stored as this."""
ZERO_CODE = 255
GAP_RATE = math.log1p(MAX_GAP / GAP_SCALE) / (ZERO_CODE - 1)

LOG_LEVELS = 254
"""Steps between code 1 (the smallest value kept apart from zero) and code 255 (the reference)."""


def encode_gaps(gaps: FloatArray) -> CodeArray:
    """Compand gaps, float32 nats >= 0 or +inf, into uint8 codes of the same shape."""
    codes: FloatArray = np.log1p(gaps * np.float32(1 / GAP_SCALE)) * np.float32(1 / GAP_RATE)
    # A gap below zero is rounding, one above MAX_GAP is out of range; +inf means probability zero.
    codes = np.clip(np.rint(codes), 0, ZERO_CODE - 1)
    codes[np.isposinf(gaps)] = ZERO_CODE
    return codes.astype(np.uint8)


def gap_error(gap: float) -> float:
    """Largest error of a decoded gap, nats: half a companding step, or what lies beyond `MAX_GAP`."""
    half_step = math.expm1(GAP_RATE / 2) * (min(gap, MAX_GAP) + GAP_SCALE)
    return max(half_step, gap - MAX_GAP) + 2**-20 * (gap + 1)


def _build_gap_table() -> FloatArray:
    table = GAP_SCALE * np.expm1(GAP_RATE * np.arange(256, dtype=np.float64))
    table[ZERO_CODE] = np.inf
    return table.astype(np.float32)


GAP_TABLE: FloatArray = _build_gap_table()
"""Gap in nats of each code, float32 `[256]`; a fixed part of format version 1."""


def encode_log8(relative: FloatArray, nats: float) -> CodeArray:
    """Code values in [0, 1] by their logarithm in 8 bits.

    Code 0 is exactly zero; codes 1..255 are `exp(-nats) .. 1` in equal steps of `nats / 254` in the
    logarithm. Positive values below `exp(-nats)` take code 1, so that "zero or not" survives.
    The round trip is within half a step of the logarithm, or within `exp(-nats)` of the value.

    Args:
        relative: float32, any shape, finite, in [0, 1].
        nats: Range kept apart from zero, natural-log units.

    Returns:
        uint8 codes of the same shape.
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
