"""Columns of a map over its kept pairs: packed mask, mean of each column, and how a column varies.

The sink-filtered loss reads a teacher's map only as means of kept pairs per key column. So the mean of each
column is stored well (float16), and single pairs, or runs of them, in few bits; decoded values are rescaled to the
stored mean.

Short columns keep every pair. In long ones queries are taken nearest first, and runs grow with their distance
from the key: what is near looks most at it and varies most, and a student's own filter takes out the same pairs.
At the same cosine, growing runs in reading order took 73 kB where even runs of 8 took 129 kB; nearest first then cut
one synthetic map's early error from 0.0039 to 0.0012. Runs follow from the mask and from integer grid positions
alone, so that every machine finds the same.

Masks are key-major: neighbouring queries look alike, so bits repeat along a column.

Dims: G layer groups, N cells of the map, L = G * N columns (group-major), R runs of all columns.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.quantise import CodeArray, FloatArray
from vlm_distill_cache.common.errors import CacheFormatError

KEPT_LEVELS = 95
"""`exact`: codes 1 to 95 are kept pairs, by the root of their share of the threshold."""
SINK_STEPS = 254 - KEPT_LEVELS
"""`exact`: codes 96 to 255 are sinks, by the logarithm between the threshold and the group's largest value."""


_MEAN_ERROR = 2e-3  # relative, of a float16 mean; twice over


def sink_threshold(maps: Any, pairs: Any) -> Any:
    """The mass above which a pair is an attention sink: mean + unbiased std over the pairs that count.

    Args:
        maps: float `[..., N, N]`, array or tensor; causal zeros are part of the statistics, as in the released code.

    Returns:
        `[..., 1, 1]` in the maps' dtype; without any pair 0.
    """
    count = pairs.sum((-2, -1), keepdims=True)
    mean = (maps * pairs).sum((-2, -1), keepdims=True) / count.clip(1)
    squares = ((maps - mean) ** 2 * pairs).sum((-2, -1), keepdims=True)
    return mean + (squares / (count - 1).clip(1)) ** 0.5  # one pair: a std of 0, not NaN


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


@dataclass(frozen=True, kw_only=True)
class RunCoding:
    """How a preset codes the kept pairs of long columns; a fixed part of format version 1.

    Attributes:
        levels: Steps of the root between zero and the threshold.
    """

    growth: int
    levels: int


RUNS = {"blocks": RunCoding(growth=10, levels=127), "compact": RunCoding(growth=2, levels=63)}

SHORT_COLUMN = 64
"""A column with fewer kept pairs keeps each of them."""
_LEAST_MEAN = 2.0**-24  # of float16: a kept pair is never decoded as zero


@lru_cache(maxsize=16)
def nearest_first(grids: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The order in which each column takes its queries.

    Args:
        grids: Rows and columns of each tile of cells, in the order in which the model reads them.

    Returns:
        Queries of each key, int64 `[N, N]`: those of the key's own tile by distance, then all others; equally
        near ones in reading order.
    """
    sizes = [rows * cols for rows, cols in grids]
    tile = np.repeat(np.arange(len(grids)), sizes)
    row, col = (np.concatenate([np.indices(grid)[axis].reshape(-1) for grid in grids] or [tile]) for axis in (0, 1))
    distance = (row[:, None] - row) ** 2 + (col[:, None] - col) ** 2
    distance[tile[:, None] != tile] = np.iinfo(distance.dtype).max
    return np.argsort(distance, axis=1, kind="stable")


@lru_cache(maxsize=64)
def growing_runs(length: int, growth: int) -> np.ndarray:
    """Divide the positions of a column into runs: one at position p holds about p / `growth` of them.

    Args:
        growth: Single positions at the start, and runs per doubling at most about 0.7 times as many.

    Returns:
        The run of each position, int64 `[length]`, ascending from 0.
    """
    runs, position, run = np.zeros(length, dtype=np.int64), 0, 0
    while position < length:
        end = position + max(1, position // growth)
        runs[position:end] = run
        position, run = end, run + 1
    return runs


@dataclass(frozen=True)
class Runs:
    """Which run each kept pair belongs to.

    Attributes:
        column: Column of each kept pair, int64 `[K]`, ascending.
        run: Run of each kept pair, int64 `[K]`, ascending.
        counts: Kept pairs of each column, int64 `[L]`.
        total: Runs of all columns, R.
    """

    column: np.ndarray
    run: np.ndarray
    counts: np.ndarray
    total: int


def find_runs(kept: np.ndarray, growth: int) -> Runs:
    """Divide the kept pairs of each column.

    Args:
        kept: bool `[L, N]`, key columns by queries, nearest first.

    Returns:
        The division; it follows from the mask alone, so only the mask is stored.
    """
    column = np.nonzero(kept)[0]
    counts = np.bincount(column, minlength=len(kept))
    position = np.arange(len(column)) - (np.cumsum(counts) - counts)[column]
    of_long = growing_runs(kept.shape[1], growth)
    short = counts < SHORT_COLUMN
    runs = np.where(short, counts, of_long[counts - 1] + 1 if len(of_long) else 0)
    within = np.where(short[column], position, of_long[position])
    return Runs(column, (np.cumsum(runs) - runs)[column] + within, counts, int(runs.sum()))


def encode_columns(ratios: FloatArray, kept: np.ndarray, *, growth: int, levels: int) -> tuple[np.ndarray, CodeArray]:
    """Reduce kept pairs to column means and coded runs.

    Args:
        ratios: float32 `[L, N]`, key columns by queries, nearest first, relative to the sink threshold: kept pairs are at most 1.
        kept: bool `[L, N]`; kept pairs are positive.

    Returns:
        Means over kept pairs, float16 `[L]`, 0 for a column without; codes of the runs, uint8 `[R]`.
    """
    runs = find_runs(kept, growth)
    own = ratios[kept].astype(np.float64)  # key-major, as `find_runs` counts
    sums = np.bincount(runs.column, own, len(kept))
    run_means = np.bincount(runs.run, own, runs.total) / np.bincount(runs.run, minlength=runs.total)
    return column_means(sums, runs.counts), np.maximum(encode_roots(run_means, levels), 1)


def decode_columns(means: np.ndarray, codes: CodeArray, kept: np.ndarray, *, growth: int, levels: int) -> FloatArray:
    """Ratios of kept pairs; the inverse of `encode_columns`.

    Args:
        means: float `[L]`.
        codes: uint8 `[R]`.
        kept: bool `[L, N]`.

    Returns:
        float32 `[L, N]`; 0 where nothing is kept. The mean of a column's kept pairs is the stored one.

    Raises:
        CacheFormatError: If there are more or fewer codes than the mask has runs.
    """
    runs = find_runs(kept, growth)
    if codes.shape != (runs.total,):
        raise CacheFormatError(
            f"visual map of a record: its mask has {runs.total} runs, but it holds codes of shape {codes.shape}; "
            "the cache is damaged: run `cachectl verify`"
        )
    shape = decode_roots(codes, levels)[runs.run]
    factor = fit_columns(means, np.bincount(runs.column, shape, len(kept)), runs.counts)
    ratios = np.zeros(kept.shape, np.float32)
    ratios[kept] = shape * factor[runs.column]
    return ratios


def column_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means of positive values as float16, of any shape; 0 only where there are none."""
    means = np.maximum(sums / np.maximum(counts, 1), _LEAST_MEAN)
    stored: np.ndarray = np.where(counts > 0, means, 0).astype(np.float16)
    return stored


def fit_columns(means: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Factor of each column's decoded values by which their mean over `counts` pairs becomes the stored one."""
    wanted = means.astype(np.float64) * counts
    factors: np.ndarray = np.divide(wanted, sums, out=np.zeros(wanted.shape), where=sums > 0)
    return factors


def pack_mask(kept: np.ndarray, *, causal: bool) -> CodeArray:
    """Pack a mask into bits, key-major; each group as what differs from the group before it.

    Neighbouring layer groups share layers, or nearly agree: their difference is mostly zeros, which compress.

    Args:
        kept: bool `[G, N, N]`, keys by queries.
        causal: Only queries from the key on can be kept, and only their bits are stored.

    Returns:
        uint8 `[G * ceil(pairs / 8)]`.
    """
    chosen = kept[:, *_pairs(kept.shape[-1], causal=causal)]  # [G, pairs]
    changes = chosen.copy()
    changes[1:] ^= chosen[:-1]
    return np.packbits(changes, axis=1).reshape(-1)


def unpack_mask(packed: CodeArray, groups: int, cells: int, *, causal: bool) -> np.ndarray:
    """The inverse of `pack_mask`: bool `[G, N, N]`, keys by queries.

    Raises:
        CacheFormatError: If there are more or fewer bytes than such masks have.
    """
    pairs = cells * (cells + 1) // 2 if causal else cells * cells
    if packed.ndim != 1 or len(packed) != groups * -(-pairs // 8):
        raise CacheFormatError(
            f"visual map of a record: expected {groups * -(-pairs // 8)} bytes of mask for {groups} maps of "
            f"{cells} cells, got {packed.shape}; the cache is damaged: run `cachectl verify`"
        )
    bits = np.unpackbits(packed.reshape(groups, -1), axis=1, count=pairs).astype(bool)
    kept = np.zeros((groups, cells, cells), dtype=bool)
    kept[:, *_pairs(cells, causal=causal)] = np.logical_xor.accumulate(bits, axis=0)
    return kept


def _pairs(cells: int, *, causal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Keys and queries of the stored pairs, key-major."""
    if causal:
        return np.triu_indices(cells)
    keys, queries = np.indices((cells, cells)).reshape(2, -1)
    return keys, queries


def means_damage(
    record: Record,
    counts: np.ndarray,
    codes: np.ndarray,
    column: np.ndarray,
    levels: int,
    *,
    above: np.ndarray | int = 0,
) -> Iterator[str]:
    """Compare column means with what the codes of their kept pairs can stand for, and all of them with a mass of one a row.

    Args:
        counts: Kept pairs of each column, ``[G * N]``.
        above: Pairs above the threshold of each group, as far as they are known, ``[G]``.
    """
    means = record["map_means"].astype(np.float64).T.reshape(-1)
    cells = len(record["map_means"])
    mass = record["map_scale"][0] * ((means * counts).reshape(-1, cells).sum(axis=1) + above)  # [G]
    if (mass > cells * (1 + 5 * _MEAN_ERROR)).any():
        yield f"map_means and map_scale have a mass of {mass.max():.4g} in {cells} rows; a row has at most 1"
    if (record["map_scale"][0][counts.reshape(-1, len(record["map_means"])).any(axis=1)] == 0).any():
        yield "map_scale is 0 where the map has pairs below it"
    if ((means > 0) != (counts > 0)).any():
        yield "map_means does not have a mean for exactly the columns with kept pairs"
        return
    roots = codes.astype(np.float64) / levels
    size, divisor = len(means), np.maximum(counts, 1)
    high = np.bincount(column, roots**2, size) / divisor
    low = np.bincount(column, np.maximum(roots - 1 / levels, 0) ** 2, size) / divisor
    least = 2 * _LEAST_MEAN
    wrong = (means > high * (1 + _MEAN_ERROR) + least) | (means < low * (1 - _MEAN_ERROR) - least)
    if wrong.any():
        worst = int(np.argmax(wrong))
        yield f"map_means has {means[worst]:.4g}; the codes of its pairs say {low[worst]:.4g} to {high[worst]:.4g}"
