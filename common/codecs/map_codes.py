"""Eight bits for one value of a visual map: on which side of the sink threshold, and how far.

Kept pairs are coded by even steps of the *square root* of their share of the threshold. Losses compare maps by
cosines, to which an error matters as it is, not relative to its value: even steps of a logarithm (as `exact8` has)
spend most codes on values that hardly count, even steps of the value would leave small columns nothing.
Sinks are few and large: even steps of the logarithm, between the threshold and the largest.

Dims: G layer groups, N cells of the map.
"""

import numpy as np

from vlm_distill_cache.common.codecs.quantise import CodeArray, FloatArray

KEPT_LEVELS = 95
"""`exact`: codes 1 to 95 are kept pairs, by the root of their share of the threshold."""
SINK_STEPS = 254 - KEPT_LEVELS
"""`exact`: codes 96 to 255 are sinks, by the logarithm between the threshold and the group's largest value."""


def encode_roots(ratios: np.ndarray, levels: int) -> CodeArray:
    """Code ratios in [0, 1] by their square root.

    Args:
        ratios: float, any shape, at least 0; above 1 is taken as 1.
        levels: Steps of the root between 0 and 1, at most 255.

    Returns:
        uint8 codes of the same shape: 0 is exactly zero, 1 to `levels` are steps.
    """
    codes: CodeArray = np.clip(np.ceil(np.sqrt(ratios) * levels), 1, levels).astype(np.uint8)
    codes[ratios == 0] = 0
    return codes


def decode_roots(codes: CodeArray, levels: int) -> FloatArray:
    """Ratios of `encode_roots` codes, float32, the same shape; a root is within half a step."""
    table = np.square((np.arange(256, dtype=np.float64) - 0.5) / levels)
    table[0] = 0.0
    decoded: FloatArray = table.astype(np.float32)[codes]
    return decoded


def encode_sinks(values: FloatArray, scale: FloatArray, largest: FloatArray) -> CodeArray:
    """Code values above the threshold.

    Args:
        values: float32 `[G, N, N]`; whichever is no sink gets a code too, which means nothing.
        scale: The threshold, float32 `[G, 1, 1]`.
        largest: The largest value, float32 `[G]`.

    Returns:
        uint8 codes 96 to 255; 0 of zeros.
    """
    positive = values > 0
    above = np.log(np.where(positive, values, 1)) - _safe_log(scale)
    share = above / np.maximum(_safe_log(largest[:, None, None]) - _safe_log(scale), 1e-6)
    codes = KEPT_LEVELS + 1 + np.rint(np.clip(share, 0, 1) * SINK_STEPS)
    return np.where(positive, codes, 0).astype(np.uint8)


def decode_sinks(codes: CodeArray, scale: FloatArray, largest: FloatArray) -> FloatArray:
    """Values of `encode_sinks` codes, float32 `[G, N, N]`; 0 for codes up to 95."""
    share = (codes.astype(np.float32) - (KEPT_LEVELS + 1)) / SINK_STEPS
    low, high = _safe_log(scale), _safe_log(largest)
    values: FloatArray = np.where(codes > KEPT_LEVELS, np.exp(low + share * np.maximum(high - low, 0)), 0)
    return values


def _safe_log(masses: FloatArray) -> FloatArray:
    return np.log(np.maximum(masses, np.finfo(np.float32).tiny))
