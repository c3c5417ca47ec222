"""What every record of a sound cache fulfils, whoever wrote it: asked by ``verify``, without torch.

A checksum tells that bytes are the ones that were written. These checks tell that somebody's codec could have
written them: a cache whose checksums were made anew after a change must still stand them.

Dims: A supervised rows, E entries of all rows, N visual tokens, G layer groups.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_distill_cache.common.cache.schema import MAX_TRAILING_ELEMENTS
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.description import MAX_ENTRIES
from vlm_distill_cache.common.codecs.kept_columns import KEPT_LEVELS, RUNS, find_runs, nearest_first, unpack_mask
from vlm_distill_cache.common.codecs.quantise import GAP_REACH, GAP_TABLE, gap_codes
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.printing import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vlm_distill_cache.common.cache.manifest import Plan
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
        **dict.fromkeys(("visual_columns", "visual_hidden", "projector_output", "visual_entry_count"), tokens),
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
    yield from _means_damage(record, np.bincount(column[kept], minlength=size), codes[kept], column[kept], KEPT_LEVELS)
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


_TOKEN_FIELDS = ("labels", "token_ids", "visual_token_ids")
_UNBOUNDED = {
    "tail_logmass": -np.inf,
    "log_gap": np.inf,
    "visual_tail_logmass": -np.inf,
    "visual_log_gap": np.inf,
}  # a mass of zero, a probability of zero
_ROUNDING = 2e-3  # of a float16 near 1, twice over
_MASS_ERROR = 1e-3  # kept mass and tail may miss 1 by this beyond the rounding of gaps and of float16
_MOST_FLOAT = float(np.finfo(np.float64).max)
_FULL_CODE = 255  # of the largest cell of a row


def codec_damage(signals: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """Say of which signals nobody here can check the values.

    Args:
        signals: Of the plan.

    Returns:
        Codecs and settings that this version does not know; and settings of codecs it knows that none can have.
    """
    newer: list[str] = []
    impossible: list[str] = []
    for signal, settings in sorted(signals.items()):
        codec, name = settings.get("codec"), one_line(signal)
        known = _SETTINGS.get(codec) if isinstance(codec, str) else None
        if known is None:
            newer.append(f"{name}: codec {one_line(repr(codec), limit=40)} is not known")
        elif unknown := settings.keys() - known.keys() - {"codec"}:
            newer.append(f"{name}: settings {one_line(sorted(unknown), limit=80)} of codec {codec!r} are not known")
        else:
            impossible += [
                f"{name}: {setting} is {one_line(repr(settings[setting]), limit=40)}, which codec {codec!r} never has"
                for setting, is_possible in known.items()
                if setting in settings and not is_possible(settings[setting])
            ]
            least, most = settings.get("min_k"), settings.get("max_k")
            if isinstance(least, int) and isinstance(most, int) and least > most:
                impossible.append(f"{name}: min_k is above max_k, which codec {codec!r} never has")
    return newer, impossible


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    """A number from ``low`` on and below ``high``; compared only, for a plan's integer may be beyond any float."""
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value < high


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _distinct(item: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(item, value)) and 0 < len(value) == len(set(value))


def _grid(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_whole(1, MAX_TRAILING_ELEMENTS), value))


def value_damage(record: Record, plan: Plan) -> Iterator[str]:
    """Yield what no codec of the plan writes: token ids, counts, masses and codes out of their range.

    Args:
        record: Of the plan's fields, dtypes and shapes.
        plan: Of the cache.
    """
    for name, array in record.items():
        if array.dtype.kind == "f":
            allowed = np.isfinite(array) | (array == _UNBOUNDED.get(name, 0.0))
            if not allowed.all():
                yield f"{name} holds {array[~allowed][0]}; expected finite values"
    vocabulary: Any = plan.teacher.get("vocabulary")
    for name in _TOKEN_FIELDS:
        if name in record and isinstance(vocabulary, int) and (record[name] >= vocabulary).any():
            yield f"{name} has {record[name].max()}, the vocabulary has {vocabulary}"
    wrong_tiles = list(_tiles_damage(record["tiles"], record["image_hash"]))
    wrong_tiles = wrong_tiles or list(token_count_damage(record, plan.signals))
    yield from wrong_tiles
    if wrong_tiles:
        return  # the others build on the number of tokens
    for settings in plan.signals.values():
        check = _CHECKS.get(str(settings.get("codec")))
        if check is not None:
            yield from check(record, settings)


def entry_gaps(record: Record, settings: dict[str, Any]) -> np.ndarray:
    """Return the gap of each entry to its row's top log-probability, nats, float64 ``[E]``.

    Args:
        record: With the fields of ``logits``, whose counts fit.
        settings: Of the codec, as the plan has them.
    """
    stored = record["log_gap"]
    if stored.dtype.kind == "f":
        return stored.astype(np.float64)
    gaps: np.ndarray = GAP_TABLE[entry_codes(record, settings)].astype(np.float64)
    return gaps


def entry_codes(record: Record, settings: dict[str, Any]) -> np.ndarray:
    """Return the 8-bit code of each entry's gap, uint8 ``[E]``; arguments as `entry_gaps`, not with ``exact``."""
    stored = record["log_gap"]
    if settings.get("gap_steps"):
        codes: np.ndarray = gap_codes(stored, record["entry_count"].astype(np.int64))
        return codes
    return stored


def _tiles_damage(tiles: np.ndarray, image_hash: np.ndarray) -> Iterator[str]:
    sizes, boxes = tiles[:, :2], tiles[:, 2:]
    if (sizes < 1).any() or (sizes != np.rint(sizes)).any():
        yield f"tiles have {sizes.min()} rows or columns; expected whole numbers of at least 1"
    if (boxes[:, :2] >= boxes[:, 2:]).any():
        yield "tiles cover an empty or reversed region"
    if len(tiles) and not image_hash.any():
        yield "image_hash is zero, which says that there is no image, but there are tiles of one"


def _logits_damage(record: Record, settings: dict[str, Any]) -> Iterator[str]:
    counts = record["entry_count"].astype(np.int64)  # [A]
    if not len(counts):
        return
    limit = settings.get("max_k", 255)
    if counts.min() < 1 or (isinstance(limit, int) and counts.max() > limit):
        yield f"entry_count is {counts.min()} to {counts.max()}; the codec keeps 1 to {limit}"
        return
    starts = np.cumsum(counts) - counts  # [A]
    rows = np.repeat(np.arange(len(counts)), counts)  # [E]
    gaps, ids = entry_gaps(record, settings), record["token_ids"]
    falling = (gaps[1:] < gaps[:-1]) & (rows[1:] == rows[:-1])
    if (gaps[starts] != 0).any() or falling.any():
        yield "log_gap is not 0 at the top token or falls with the rank; entries are stored by rank"
    pairs = np.unique(np.stack([rows, ids.astype(np.int64)]), axis=1)  # [2, distinct]
    if pairs.shape[1] != len(ids):
        yield "token_ids of a row repeat"
    truth = ids == record["labels"][rows]
    if not np.bincount(rows[truth], minlength=len(counts)).all():
        yield "token_ids lack the ground truth of a row, which the codec always keeps"
    top, tail = record["top_logprob"].astype(np.float64), record["tail_logmass"].astype(np.float64)
    if top.max() > _ROUNDING or tail.max(initial=-1.0) > _ROUNDING:
        yield f"log-probabilities reach {max(top.max(), tail.max(initial=-1.0))}; at most 0 is possible"
    temperatures = settings.get("temperatures")
    if isinstance(temperatures, list) and 1.0 in temperatures and len(temperatures) == tail.shape[1]:
        yield from _mass_damage(record, settings, gaps, starts, tail[:, temperatures.index(1.0)])
        # A tail of no mass at all has none at any temperature, but for what a low one makes too small to write.
        empty = np.isinf(tail[:, np.argsort(temperatures)])  # [A, T]
        if (empty[:, 1:] & ~empty[:, :-1]).any():
            yield "tail_logmass is infinite at a temperature, but finite at a lower one"


def _visual_logits_damage(record: Record, settings: dict[str, Any]) -> Iterator[str]:
    """The same questions at visual tokens, whose likeliest token stands for the ground truth."""
    plain = {name.removeprefix("visual_"): record[name] for name in record if name.startswith("visual_")}
    counts = plain["entry_count"].astype(np.int64)
    starts = np.cumsum(counts) - counts
    inside = starts < len(plain["token_ids"])
    plain["labels"] = np.where(inside, plain["token_ids"][np.where(inside, starts, 0)], 0) if len(starts) else counts
    yield from (f"visual_{line}" for line in _logits_damage(plain, settings))


def _mass_damage(
    record: Record, settings: dict[str, Any], gaps: np.ndarray, starts: np.ndarray, tail: np.ndarray
) -> Iterator[str]:
    """Ask whether kept tokens and tail can have had a mass of one before they were rounded."""
    top, others = record["top_logprob"].astype(np.float64), np.exp(tail)
    weights = np.exp(-gaps)  # [E]
    kept = np.exp(top) * np.add.reduceat(weights, starts)  # [A]
    least = most = kept
    allowed = np.full(len(top), _MASS_ERROR)
    if record["log_gap"].dtype == np.uint8:
        above, below = GAP_REACH[:, entry_codes(record, settings)].astype(np.float64)  # [E]
        above[starts] = below[starts] = 0
        least = np.exp(top) * np.add.reduceat(weights * np.exp(-above), starts)
        most = np.exp(top) * np.add.reduceat(weights * np.exp(below), starts)
        finite_tail = np.where(np.isfinite(tail), tail, 0)
        allowed += 2.0**-10 * (kept * np.abs(top) + others * np.abs(finite_tail))
    off = np.maximum(least + others - 1, 1 - most - others)
    if (off > allowed).any():
        worst = (kept + others)[(off - allowed).argmax()]
        yield f"kept tokens and tail have a mass of {worst:.4f} together; expected 1"


def _row_attention_damage(name: str, mass_name: str) -> Callable[[Record, dict[str, Any]], Iterator[str]]:
    def check(record: Record, settings: dict[str, Any]) -> Iterator[str]:
        cells, mass = record[name], record[mass_name].astype(np.float64)  # [A, G, C], [A, G]
        grid, groups = settings.get("grid"), settings.get("groups")
        if isinstance(grid, list) and cells.shape[1:] != (groups, int(np.prod(grid))):
            yield f"{name} has rows of {cells.shape[1:]}; the codec says {groups} groups of a grid {grid}"
        if mass.size and not 0 <= mass.min() <= mass.max() <= 1 + _ROUNDING:
            yield f"{mass_name} is {mass.min()} to {mass.max()}; expected 0 to 1"
        if not cells.size:
            return
        largest = cells.max(axis=2)
        if cells.dtype == np.uint8 and not np.isin(largest, (0, _FULL_CODE)).all():
            yield f"{name} has a row whose largest code is neither 0 nor {_FULL_CODE}"
        if cells.dtype.kind == "f" and (cells.min() < 0 or cells.max() > 1 + _ROUNDING):
            yield f"{name} is {cells.min()} to {cells.max()}; expected 0 to 1"
        if cells.dtype.kind == "f" and (np.abs(cells.sum(axis=2, dtype=np.float64) - mass) > _ROUNDING).any():
            yield f"{mass_name} is not the sum of the cells of {name}"

    return check


def _columns_damage(record: Record, settings: dict[str, Any]) -> Iterator[str]:
    yield from _masses_damage("visual_columns", record["visual_columns"], settings)


def _masses_damage(name: str, values: np.ndarray, settings: dict[str, Any]) -> Iterator[str]:
    groups = settings.get("groups")
    if isinstance(groups, int) and values.shape[1:] != (groups,):
        yield f"{name} has rows of {values.shape[1:]}; the codec says {groups} groups"
    if values.size and values.dtype.kind == "f" and not 0 <= values.min() <= values.max() <= 1 + _ROUNDING:
        yield f"{name} is {values.min()} to {values.max()}; expected 0 to 1"


def _answers_damage(record: Record, settings: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the answers' text."""
    try:
        answers = AnswersCodec.from_dict(settings).decode(record)
    except CacheFormatError as error:
        yield str(error)
        return
    if not answers or not all(answer.strip() for answer in answers):
        yield f"answer_text holds {answers!r:.80}; expected an answer for each turn"


_CHECKS: dict[str, Callable[[Record, dict[str, Any]], Iterator[str]]] = {
    "answers": _answers_damage,
    "logits": _logits_damage,
    "answer_attention": _row_attention_damage("answer_attention", "answer_image_mass"),
    "text_attention": _row_attention_damage("text_attention", "text_image_mass"),
    "visual_columns": _columns_damage,
    "visual_map": map_damage,
    "visual_logits": _visual_logits_damage,
}

_WIDE = _whole(1, MAX_TRAILING_ELEMENTS)  # more fits in no field
_LOGITS = {
    "floor": _number(0, 1),
    "min_k": _whole(1, MAX_ENTRIES),
    "max_k": _whole(2, MAX_ENTRIES),
    "temperatures": lambda value: _distinct(_number(5e-324, _MOST_FLOAT))(value) and 1 in value,
    **dict.fromkeys(("exact", "gap_steps", "balanced"), _flag),
}
_ROWS = {"grid": _grid, "groups": _WIDE, "exact": _flag}
_HIDDEN = {"layers": _distinct(_whole(0, MAX_TRAILING_ELEMENTS)), "width": _WIDE, "exact": _flag}
_PRESETS = ("exact", "exact8", "f4", *RUNS)
# What the codecs themselves ask of their settings when they are built, for which torch would have to be imported.
_SETTINGS: dict[str, dict[str, Callable[[Any], bool]]] = {
    "answers": {
        "max_new_tokens": lambda value: isinstance(value, int) and value >= 1,
        "temperature": _number(0, _MOST_FLOAT),
        "top_p": lambda value: _number(0, 2)(value) and 0 < value <= 1,
        "seed": lambda value: isinstance(value, int) and value >= 0,
    },
    "logits": _LOGITS,
    "visual_logits": _LOGITS,
    "answer_attention": _ROWS,
    "text_attention": _ROWS,
    "visual_columns": {"groups": _WIDE, "exact": _flag},
    "visual_map": {"groups": _WIDE, "grid": _whole(0, 256), "preset": lambda value: value in _PRESETS},
    **dict.fromkeys(("hidden", "visual_hidden", "projector_output"), _HIDDEN),
}
