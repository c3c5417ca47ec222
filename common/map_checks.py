"""What every ``visual_map`` of a sound cache fulfils: asked by ``common.codecs.checks``, without torch.

Means, masks and codes of a map say the same thing in several ways, and must agree.

Dims: G layer groups, N cells of the map.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_distill_cache.common.codecs.kept_columns import RUNS, find_runs, nearest_first, unpack_mask
from vlm_distill_cache.common.codecs.map_codes import KEPT_LEVELS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vlm_distill_cache.common.cache.schema import Record

_MOST = 1 + 2e-3  # a mass, with the rounding of float16
_MEAN_ERROR = 2e-3  # relative, of a float16 mean; twice over
_LEAST_MEAN = 2.0**-23


def token_count_damage(record: Record, signals: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield fields of the image that have another number of tokens than its tiles.

    Args:
        record: As stored: one that follows another holds no such arrays.
        signals: Of the plan.
    """
    tiles = record["tiles"]
    tokens = round(float(np.sum(tiles[:, 0].astype(np.float64) * tiles[:, 1])))
    grid = signals.get("visual_map", {}).get("grid", 0)
    cells = len(tiles) * grid**2 if isinstance(grid, int) and grid else tokens
    expected = {
        **dict.fromkeys(
            ("visual_columns", "visual_hidden", "projector_output", "visual_entry_count"), tokens
        ),
        "visual_map": cells**2 if grid else cells * (cells + 1) // 2,
        "map_means": cells,
        "map_scale": min(cells, 1),
        "map_largest": min(cells, 1),
    }
    held = {name: len(record[name]) for name in expected if name in record}
    if "visual_source" in record and not any(held.values()):
        return  # `common.cache.shared_images` says where they are
    for name, length in held.items():
        if length != expected[name]:
            yield f"{name} has {length} along its first axis; the tiles of the image say {expected[name]}"


def map_damage(record: Record, settings: dict[str, Any]) -> Iterator[str]:
    """Yield what the codec does not write.

    Args:
        record: Whose arrays have as many tokens as its tiles.
        settings: Of the codec, as the plan has them.
    """
    groups = settings.get("groups")
    for name in ("visual_map", "map_means", "map_largest", "map_scale"):
        values = record.get(name)
        if values is None:
            continue
        if isinstance(groups, int) and values.shape[1:] != (groups,):
            yield f"{name} has rows of {values.shape[1:]}; the codec says {groups} groups"
            return
        most = 2.0 if name == "map_scale" else _MOST  # a mean and a standard deviation
        if values.size and values.dtype.kind == "f" and not 0 <= values.min() <= values.max() <= most:
            yield f"{name} is {values.min()} to {values.max()}; expected 0 to {math.floor(most)}"
            return
    if "map_means" in record and len(record["map_means"]):
        pooled = bool(settings.get("grid", 0))
        if "visual_map" in record:
            yield from _exact_damage(record, pooled=pooled)
        else:
            yield from _runs_damage(record, settings, pooled=pooled)


def _exact_damage(record: Record, *, pooled: bool) -> Iterator[str]:
    codes = record["visual_map"]  # [pairs, G]
    cells = len(record["map_means"])
    keys = np.tile(np.arange(cells), cells) if pooled else np.tril_indices(cells)[1]
    kept = (codes > 0) & (codes <= KEPT_LEVELS)
    column = np.arange(codes.shape[1]) * cells + keys[:, None]  # [pairs, G]
    size = cells * codes.shape[1]
    yield from _means_damage(
        record, np.bincount(column[kept], minlength=size), codes[kept], column[kept], KEPT_LEVELS
    )
    sinks, scale, largest = codes > KEPT_LEVELS, record["map_scale"][0], record["map_largest"][0]
    if (largest[sinks.any(axis=0)] < scale[sinks.any(axis=0)] * (1 - 1e-6)).any():
        yield "visual_map has sinks, but map_largest is below map_scale"
    if (largest[codes.any(axis=0)] == 0).any():
        yield "map_largest is 0, but visual_map has codes of some mass"


def _runs_damage(record: Record, settings: dict[str, Any], *, pooled: bool) -> Iterator[str]:
    coding, tiles = RUNS.get(str(settings.get("preset"))), record["tiles"]
    cells, groups = record["map_means"].shape
    kept = unpack_mask(record["map_mask"], groups, cells, causal=not pooled)  # [G, key, query]
    if coding is None:
        return
    side = int(settings.get("grid", 0))
    grids = tuple((side, side) if side else (int(rows), int(cols)) for rows, cols in tiles[:, :2].tolist())
    near = nearest_first(grids)
    runs = find_runs(np.take_along_axis(kept, near[None], axis=2).reshape(-1, cells), coding.growth)
    codes = record["map_codes"]
    if len(codes) != runs.total:
        yield f"map_codes has {len(codes)} codes; its mask says {runs.total}"
    elif len(codes) and not 1 <= codes.min() <= codes.max() <= coding.levels:
        yield f"map_codes is {codes.min()} to {codes.max()}; expected 1 to {coding.levels}"
    else:
        yield from _means_damage(record, runs.counts, codes[runs.run], runs.column, coding.levels)


def _means_damage(
    record: Record, counts: np.ndarray, codes: np.ndarray, column: np.ndarray, levels: int
) -> Iterator[str]:
    """Compare column means with what the codes of their kept pairs can stand for.

    Args:
        record: With ``map_means`` and ``map_scale``.
        counts: Kept pairs of each column, ``[G * N]``.
        codes: Of each kept pair.
        column: Of each kept pair.
        levels: Of the codes.
    """
    means = record["map_means"].astype(np.float64).T.reshape(-1)
    if (record["map_scale"][0][counts.reshape(-1, len(record["map_means"])).any(axis=1)] == 0).any():
        yield "map_scale is 0 where the map has pairs below it"
    if ((means > 0) != (counts > 0)).any():
        yield "map_means does not have a mean for exactly the columns with kept pairs"
        return
    roots = codes.astype(np.float64) / levels
    size, divisor = len(means), np.maximum(counts, 1)
    high = np.bincount(column, roots**2, size) / divisor
    low = np.bincount(column, np.maximum(roots - 1 / levels, 0) ** 2, size) / divisor
    wrong = (means > high * (1 + _MEAN_ERROR) + _LEAST_MEAN) | (means < low * (1 - _MEAN_ERROR) - _LEAST_MEAN)
    if wrong.any():
        worst = int(np.argmax(wrong))
        yield f"map_means has {means[worst]:.4g}; the codes of its pairs say {low[worst]:.4g} to {high[worst]:.4g}"
