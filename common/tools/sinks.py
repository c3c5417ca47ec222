"""The sinks of a cache's teacher: found in its records, kept beside them in ``sinks.json``, shown to a person.

The file says nothing that the records do not say, so a cache is the same cache with it and without it; where it is lost or
the cache is older than it, the same is found in the records again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from vlm_distill_cache.common.attention.sinks import GAMMA, Floats, SinkMap, find_sinks, mean_over, on_cells
from vlm_distill_cache.common.attention.tiles import (
    Tile,
    box_array,
    carries_image,
    grid_tile,
    of_view,
    tiles_from_array,
    tiles_of,
    tiles_to_array,
    views_of,
)
from vlm_distill_cache.common.cache.document_rules import SINKS as RULE
from vlm_distill_cache.common.cache.documents import read_document, write_document
from vlm_distill_cache.common.cache.plan import Plan, read_plan, with_more
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Record, base_fields
from vlm_distill_cache.common.cache.side_files import SINKS
from vlm_distill_cache.common.cache.spaced import MOST_RECORDS, spaced_records, spaced_unsealed
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import remove
from vlm_distill_cache.common.files.rules import check
from vlm_distill_cache.common.printing import markdown, one_line
from vlm_distill_cache.common.tools.picture import BLOCKS, WordMap, draw_picture, draw_text

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

Part = Literal["tower", "language_model", "visual_rows"]
PARTS: tuple[Part, ...] = get_args(Part)
_WORDS: Mapping[str, str] = {
    "tower": "vision tower",
    "language_model": "language model, where text looks",
    "visual_rows": "language model, where visual tokens look",
}
_SHORT: Mapping[str, str] = {"tower": "tower", "language_model": "text", "visual_rows": "visual"}
_SOURCES: Mapping[Part, tuple[str, ...]] = {
    "tower": (TowerAttentionCodec.signal,),
    "language_model": (RowAttentionCodec.signal, TextAttentionCodec.signal),
    "visual_rows": (VisualColumnsCodec.signal, VisualMapCodec.signal),
}
"""Signals to find them in, the best first. Text sees all visual tokens; of visual tokens in causal order the first are seen by
most, and receive more for that alone."""
_MOST_MAPS = 256  # a whole map takes a thousand times as long to decode as its column means
_MAX_BYTES = 64 << 20
_SHOWN = 10  # places
_DRAWN = 8  # tiles
_FINEST_DRAWN = 64  # rows or columns
_DIGITS = 6
_NEAR = 1e-3  # of scores: other libraries sum in another order


@dataclass(frozen=True, kw_only=True)
class Sinks:
    """What is known of a cache's sinks.

    Attributes:
        samples: Records that were looked at, pictures or not.
        maps: By part of the teacher; without those that the cache has nothing of.
        signals: From which signal each was found.
        gamma: The exponent of the scores.
    """

    samples: int
    maps: Mapping[str, SinkMap] = field(default_factory=dict)
    signals: Mapping[str, str] = field(default_factory=dict)
    gamma: float = GAMMA

    def to_dict(self) -> dict[str, Any]:
        """The JSON of ``sinks.json``."""
        return {
            "format_version": ONE_PICTURE,
            "gamma": self.gamma,
            "samples": self.samples,
            "maps": {
                part: {
                    "signal": self.signals[part],
                    "places": found.places,
                    "pictures": found.pictures,
                    "tiles": [
                        [int(rows), int(cols), *map(float, region)]
                        for rows, cols, *region in tiles_to_array(found.tiles).tolist()
                    ],
                    "received": [_rounded(value) for value in found.received],
                    "often": found.often.tolist(),
                    "scores": [_rounded(value) for value in found.scores],
                }
                for part, found in self.maps.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Sinks:
        """Read what ``to_dict`` wrote; a CacheFormatError if it is something else."""
        stored = check(data, RULE, where)
        maps: dict[str, SinkMap] = {}
        for part, values in stored["maps"].items():
            tiles = tiles_from_array(np.array(values["tiles"], np.float32).reshape(-1, 6))
            count = sum(tile.token_count for tile in tiles)
            arrays = [np.array(values[name]) for name in ("received", "often", "scores")]
            if part not in PARTS or {len(array) for array in arrays} != {count}:
                raise CacheFormatError(
                    f"{where}: maps.{one_line(part, limit=40)} has {[len(array) for array in arrays]} values; expected {count} "
                    f"of each, for its tiles, and one of {', '.join(PARTS)}; run `cachectl verify`"
                )
            if values["places"] != "token" and len(tiles) != 1:
                raise CacheFormatError(
                    f"{where}: maps.{part} has {len(tiles)} tiles; expected one, of which each place is a {values['places']}'s; "
                    "run `cachectl verify`"
                )
            received, often, scores = arrays
            maps[part] = SinkMap(
                places=values["places"],
                tiles=tiles,
                pictures=values["pictures"],
                received=received.astype(np.float64),
                often=often.astype(np.int64),
                scores=scores.astype(np.float64),
            )
        ordered: dict[str, SinkMap] = {part: maps[part] for part in PARTS if part in maps}  # JSON is stored by name
        signals = {part: stored["maps"][part]["signal"] for part in ordered}
        return cls(samples=stored["samples"], maps=ordered, signals=signals, gamma=stored["gamma"])


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _sources(plan: Plan) -> dict[Part, str]:
    """From which signal of a plan the sinks of each part of its teacher are found."""
    found: dict[Part, str] = {}
    for part, signals in _SOURCES.items():
        for name in signals:
            # Presets that keep what a sink filter leaves have no masses of sinks.
            if name in plan.signals and getattr(codec_from_dict(plan.signals[name]), "complete", True):
                found.setdefault(part, name)
    return found


def _find(plan: Plan, records: Callable[[Iterable[str], int], Iterable[tuple[str, Record]]]) -> Sinks:
    """Find the sinks of records. Of several pictures each is one, as are frames that visual tokens show together.

    Args:
        records: From fields and a number to evenly spaced records, at most so many.
    """
    sources = _sources(plan)
    # Several parts are read in one go, maps alone.
    runs: dict[int, list[Part]] = {}
    for part, name in sources.items():
        runs.setdefault(_MOST_MAPS if name == VisualMapCodec.signal else MOST_RECORDS, []).append(part)
    samples, maps = 0, dict[Part, SinkMap]()
    for most, parts in runs.items():
        codecs = {part: codec_from_dict(plan.signals[sources[part]]) for part in parts}
        names = {entry.name for part in parts for entry in plan.fields[sources[part]]}
        names |= {entry.name for entry in base_fields(plan.format_version)}
        pictures: dict[Part, list[tuple[tuple[Tile, ...], Floats]]] = {part: [] for part in parts}
        frames: dict[Part, list[tuple[tuple[Tile, ...], Floats]]] = {part: [] for part in parts}
        seen, known, tiled = 0, set[bytes](), False
        for _, record in records(names, most):
            seen += 1
            if not len(record["tiles"]):
                continue
            tiles = tiles_of(record)
            received = {part: _received(codec, record, tiles) for part, codec in codecs.items()}
            for number, view in enumerate(views_of(tiles)):
                image = record["image_hash"][int(view.span[0]) : int(view.span[1])].tobytes()
                for part, shown in received.items():
                    if part == "language_model" or image not in known:  # where text looks depends on the text
                        (frames if view.is_frame else pictures)[part].append(shown[number])
                known.add(image)
                tiled |= len(of_view(tiles, view)) > 1
        samples = max(samples, seen)
        for part, codec in codecs.items():
            rows = isinstance(codec, RowAttentionCodec)
            # Frames may be kept on a coarser grid: they tell where there is no picture.
            shown = pictures[part] or frames[part] if rows else [*pictures[part], *frames[part]]
            grid = (shown[0][0][0].rows, shown[0][0][0].cols) if rows and shown else None
            if isinstance(codec, VisualMapCodec) and (side := codec.grid) and tiled:
                # Of several tiles a map is pooled over the picture, of one over its frame, padding and all.
                grid = (side, side)
                shown = [((grid_tile(side, side),), on_cells(tiles, values, side)) for tiles, values in shown]
            if (found := find_sinks(shown, grid=grid)) is not None:
                maps[part] = found
    ordered: dict[str, SinkMap] = {part: maps[part] for part in PARTS if part in maps}
    return Sinks(samples=samples, maps=ordered, signals={part: sources[part] for part in PARTS if part in maps})


def _received(codec: Any, record: Record, tiles: tuple[Tile, ...]) -> list[tuple[tuple[Tile, ...], Floats]]:
    """What each visual token, or cell, of each view receives, mean over rows and layer groups: float64 ``[N]``, and its tiles."""
    decoded, layout = codec.decode(record), codec.cells_of(tiles)
    views = [of_view(layout, view) for view in views_of(layout)]
    if isinstance(codec, VisualMapCodec):
        maps = decoded if isinstance(decoded, tuple) else (decoded,)
        return [(view, _of_map(one.values, view)) for one, view in zip(maps, views, strict=True)]
    if isinstance(codec, RowAttentionCodec):
        cells = decoded.cells.astype(np.float64)  # [A, G, K]
        values = np.asarray(cells.mean(axis=(0, 1)) if len(cells) else np.zeros(cells.shape[2]))
    else:
        values = decoded.astype(np.float64)
        values = values.mean(axis=0) if values.ndim == 2 else values
    ends = np.cumsum([sum(tile.token_count for tile in view) for view in views])[:-1]
    return list(zip(views, np.split(values, ends), strict=True))


def _of_map(values: np.ndarray, tiles: tuple[Tile, ...]) -> Floats:
    """The same of the map ``[G, N, N]`` of one view, over the rows that carry image."""
    rows = values[:, carries_image(box_array(tiles))].astype(np.float64)  # [G, rows, N]
    return np.asarray(rows.mean(axis=(0, 1)) if rows.shape[1] else np.zeros(rows.shape[2]))


def write_sinks(cache_dir: Path) -> Sinks | None:
    """Find the sinks of a cache whose shards are all there, and write them beside its shards, before it is sealed.

    Returns:
        None, and no file, where the cache holds nothing to find them in.
    """
    plan = read_plan(cache_dir)
    try:
        found = _find(plan, lambda names, most: spaced_unsealed(cache_dir, plan, list(names), most=most))
    except CacheFormatError as error:  # a cache is sealed with what it has; who needs its sinks is told
        logger.warning("%s: its sinks are not written: %s", cache_dir, error)
        found = Sinks(samples=0)
    if found.maps:
        write_document(cache_dir / SINKS, found.to_dict())
        return found
    remove(cache_dir / SINKS)
    return None


def read_sinks(cache: TeacherCache) -> Sinks:
    """The sinks of a sealed cache: as they lie beside its shards, or found in its records.

    Raises:
        CacheFormatError: If ``sinks.json``, or a record that is needed, is damaged.
    """
    if SINKS in cache.manifest.files:
        cache.check_side_files([SINKS])
        return cache.steady(
            lambda shards: Sinks.from_dict(
                read_document(shards.path / SINKS, max_bytes=_MAX_BYTES), str(shards.path / SINKS)
            )
        )
    return _find(cache.plan, lambda names, most: spaced_records(cache, list(names), most=most))


def sinks_damage(cache_dir: Path, plan: Plan) -> str | None:
    """What ``sinks.json`` says that the records of a sound cache do not; None: nothing."""
    path = cache_dir / SINKS
    try:
        stored = Sinks.from_dict(read_document(path, max_bytes=_MAX_BYTES), str(path))
    except CacheFormatError as error:
        return str(error)
    found = _find(plan, lambda names, most: spaced_unsealed(cache_dir, plan, list(names), most=most))
    if (list(stored.maps), stored.signals, stored.samples) != (list(found.maps), found.signals, found.samples):
        said, given = ([one.samples, *one.signals.values()] for one in (stored, found))
        return f"is of samples and signals {said}; the records give {given}"
    if stored.gamma != found.gamma:
        return f"has scores of gamma {stored.gamma:g}; this version finds those of gamma {found.gamma:g}"
    for part, sinks in found.maps.items():
        kept = stored.maps[part]
        if (kept.places, kept.pictures) != (sinks.places, sinks.pictures) or not _alike(kept, sinks):
            return f"has other sinks of the {_WORDS[part]} than the records"
    return None


def _alike(one: SinkMap, other: SinkMap) -> bool:
    """Whether two maps are of one layout and say the same, but for rounding."""
    ours, theirs = (tiles_to_array(found.tiles) for found in (one, other))
    if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-6, atol=1e-6):
        return False
    # A token near the threshold of `are_sinks` may lie on either side of it elsewhere.
    unsure = max(1.0, _NEAR * one.pictures)
    return (
        float(np.abs(one.scores - other.scores).max()) <= _NEAR
        and float(np.abs(one.received - other.received).max()) <= _NEAR * float(other.received.max())
        and int(np.abs(one.often - other.often).max()) <= unsure
    )


def sinks_of(cache: TeacherCache, of: Part, *, known: Sinks | None = None) -> SinkMap:
    """The sinks of one part of a cache's teacher.

    Args:
        known: Of `read_sinks`, if that was called.

    Raises:
        CacheMismatchError: If the cache holds nothing to find them in: what to do.
    """
    if of not in PARTS:
        raise ValueError(f"of is {of!r}; expected one of {PARTS}")
    found = (read_sinks(cache) if known is None else known).maps
    # A cache without attention of text still says which visual tokens the others look at.
    chosen = "visual_rows" if of == "language_model" and of not in found else of
    if chosen not in found:
        raise CacheMismatchError(f"{cache.place}: {_lack(cache.plan, of)}")
    return found[chosen]


def _lack(plan: Plan, of: Part) -> str:
    """Why nothing is known of the sinks of a part, and what to do."""
    held = ", ".join(sorted(plan.signals))
    if of in _sources(plan):
        return (
            f"no sinks are known of its teacher's {_WORDS[of]}: none of the records that were looked at has a picture with any "
            f"attention ({_sources(plan)[of]}); give a cache of samples with pictures"
        )
    wanted = _SOURCES[of][0]
    built_in = str(plan.teacher.get("name")).startswith("built-in") and str(plan.data.get("name")).startswith("shapes")
    needed = "" if built_in else "--data DATA --teacher TEACHER "
    where = f"teacher-cache extend CACHE {needed}--signals {wanted}"
    single = " where that keeps single values" if VisualMapCodec.signal in _SOURCES[of] else ""
    return (
        f"no sinks are known of its teacher's {_WORDS[of]}: they are found in {' or '.join(_SOURCES[of])}{single}, and the cache "
        f"holds {held}; "
        + with_more(plan, f"add it with `{where}`", options=f"--signals {','.join((*plan.signals, wanted))}")
    )


def sink_map(cache: TeacherCache, of: Part, tiles: Sequence[Tile]) -> list[float]:
    """The sink score of each visual token of a layout, which may be a student's.

    Args:
        of: ``tower`` (inside the vision tower), ``language_model`` (where its text looks, or its visual tokens where the cache
            says nothing of text), or ``visual_rows`` (where its visual tokens look).
        tiles: Of a picture, as an image encoder gives them.

    Returns:
        One number in [0, 1] for each token, in reading order; see `SinkMap.on` for layouts other than the teacher's.

    Raises:
        CacheMismatchError: If the cache holds nothing to find them in.
    """
    return [_rounded(score) for score in sinks_of(cache, of).on(tiles)]


def place_name(found: SinkMap, place: int) -> str:
    """A place as a person finds it: row and column from 1, and the tile where there are several."""
    for number, tile in enumerate(found.tiles, start=1):
        if place < tile.token_count:
            name = f"row {place // tile.cols + 1} column {place % tile.cols + 1}"
            return name if len(found.tiles) == 1 else f"tile {number} {name}"
        place -= tile.token_count
    raise ValueError("there is no such place")


def _of_words(found: SinkMap, part: str, *, several: bool) -> str:
    """How many were looked at, and what a place is; ``several``: samples may have several pictures."""
    counted = "samples with a picture" if part == "language_model" else "pictures"
    if several:
        counted = "pictures and frames" + (", in each sample that shows them" if part == "language_model" else "")
    return f"of {found.pictures:,} {counted}; {_layout_words(found)}"


def _layout_words(found: SinkMap) -> str:
    shape = " and ".join(f"{tile.rows} x {tile.cols}" for tile in found.tiles)
    return {
        "token": f"a place is a visual token of {shape}, which all pictures have",
        "tile": f"layouts differ in tiles: a place is a visual token of a tile ({shape}), each tile counts as a picture",
        "cell": f"a place is a cell of a grid of {shape} over the picture",
    }[found.places]


def _rows(found: SinkMap) -> list[tuple[str, float, float, float]]:
    """Name, score, share of the attention and share of pictures of the first places."""
    shares = found.shares
    return [
        (
            place_name(found, place),
            float(found.scores[place]),
            float(shares[place]),
            float(found.often[place] / found.pictures),
        )
        for place in found.order[:_SHOWN].tolist()
    ]


def _together(found: SinkMap, part: str) -> str:
    count = len(found.order[:_SHOWN])
    held, even = float(found.shares[found.order[:_SHOWN]].sum()), count / len(found.scores)
    return (
        f"these {count} of {len(found.scores)} places receive {held:.1%} of the attention on the picture; equal places would "
        f"receive {even:.1%}{_causal(found) if part == 'visual_rows' else ''}"
    )


def _causal(found: SinkMap) -> str:
    """What the first places receive for their place alone, where each visual token sees those before it and itself."""
    if found.places != "token":
        return (
            "; in a causal language model the first tokens receive more, since more rows see them, which makes no sinks"
        )
    count = len(found.scores)
    seen = np.cumsum((1 / np.arange(1, count + 1))[::-1])[::-1] / count  # by rows that look alike at all they see
    return (
        f"; in a causal language model, where each row sees the tokens before it and itself, rows that look at all of these "
        f"equally would give these places {seen[found.order[:_SHOWN]].sum():.1%}: so much is no sign of sinks"
    )


def describe_sinks(cache: TeacherCache, found: Sinks, *, shades: str = BLOCKS) -> str:
    """The sinks of a cache as tables and heat maps in characters; ``shades`` as of `draw_text`."""
    several = cache.plan.format_version != ONE_PICTURE
    lines = [
        f"sinks of {cache.place}, in {found.samples:,} evenly spaced samples of {len(cache):,} (gamma {found.gamma:g})"
    ]
    for part in PARTS:
        if part not in found.maps:
            lines += ["", f"{_WORDS[part]}: {_lack(cache.plan, part)}"]
            continue
        sinks = found.maps[part]
        lines += [
            "",
            f"{_WORDS[part]}: {found.signals[part]} {_of_words(sinks, part, several=several)}",
            f"  {'place':<26}{'score':>7}{'of the attention':>18}{'a sink in':>12}",
        ]
        lines += [
            f"  {name:<26}{score:>7.3f}{share:>18.2%}{often:>12.0%}" for name, score, share, often in _rows(sinks)
        ]
        lines += [
            f"  {_together(sinks, part)}",
            "",
            *(f"  {line}".rstrip() for line in draw_text(_drawn(sinks, part), shades=shades)),
        ]
    lines += [
        "",
        "a sink in: the share of those in which the place receives more than the mean plus one standard deviation",
        "the number beside a map's name, here and in a picture: the share of the part's attention that the map's places receive",
    ]
    return "\n".join(lines)


def _drawn(found: SinkMap, part: str) -> list[WordMap]:
    """The scores of the first tiles as maps; the number beside each is its share of the attention.

    Tiles of different shapes (CompoDistill's, which lack the first place) are drawn as one, where they lie.
    """
    if len({(tile.rows, tile.cols) for tile in found.tiles}) > 1:
        return [WordMap(word=_SHORT[part], cells=_joined(found), image_mass=1.0)]
    ends = np.cumsum([tile.token_count for tile in found.tiles])[:-1]
    parts = zip(found.tiles, np.split(found.scores, ends), np.split(found.shares, ends), strict=True)
    several = len(found.tiles) > 1
    return [
        WordMap(
            word=f"{_SHORT[part]}{f' {number}' if several else ''}",
            cells=scores.reshape(tile.rows, tile.cols),
            image_mass=float(shares.sum()),
        )
        for number, (tile, scores, shares) in enumerate(parts, start=1)
    ][:_DRAWN]


def _joined(found: SinkMap) -> Floats:
    """The scores of all tiles on one grid over what they cover, as fine as the finest, ``[rows, cols]``."""
    regions = np.array([tile.region for tile in found.tiles])
    low, high = regions[:, :2].min(axis=0), regions[:, 2:].max(axis=0)
    counts = np.array([(tile.cols, tile.rows) for tile in found.tiles])
    fine = ((regions[:, 2:] - regions[:, :2]) / counts).min(axis=0)
    cols, rows = (max(1, min(_FINEST_DRAWN, round(side))) for side in ((high - low) / fine).tolist())
    frame = (np.concatenate([box_array((tile,)) for tile in found.tiles]) - [*low, *low]) / [
        *(high - low),
        *(high - low),
    ]
    return mean_over(found.scores, frame, box_array((grid_tile(rows, cols),))).reshape(rows, cols)


def draw_sinks(cache: TeacherCache, found: Sinks) -> Image:
    """Draw the scores of all parts that are known as heat maps on one sheet.

    Raises:
        CacheMismatchError: If nothing is known.
    """
    drawn = [shown for part in PARTS if part in found.maps for shown in _drawn(found.maps[part], part)]
    if not drawn:
        raise CacheMismatchError(f"{cache.place}: {_lack(cache.plan, 'language_model')}")
    return draw_picture(drawn, title=f"sinks of {one_line(cache.place, limit=60)}", image=None)


def sink_values(found: Sinks) -> dict[str, Any]:
    """What `describe_sinks` says, for programs; all places."""
    body = found.to_dict()
    for part, sinks in found.maps.items():
        body["maps"][part] |= {
            "shares": [_rounded(share) for share in sinks.shares],
            "often_share": [_rounded(count / sinks.pictures) for count in sinks.often],
            "top": [
                {"place": name, "score": score, "share": share, "sink_in": often}
                for name, score, share, often in _rows(sinks)
            ],
        }
    return {name: body[name] for name in ("gamma", "samples", "maps")}


def card_lines(found: Sinks | None, plan: Plan) -> str:
    """The section of a cache's card; empty where nothing is known."""
    several = plan.format_version != ONE_PICTURE
    if found is None or not found.maps:
        return ""
    lines = ["", "## Sinks: places that attract attention whatever the picture shows", ""]
    for part, sinks in found.maps.items():
        lines += [
            f"Of the {_WORDS[part]}, from {markdown(found.signals[part])} {_of_words(sinks, part, several=several)}.",
            "",
            "| place | score | share of the attention | a sink in |",
            "|---|---|---|---|",
            *(
                f"| {name} | {score:.3f} | {share:.2%} | {often:.0%} |"
                for name, score, share, often in _rows(sinks)[:5]
            ),
            "",
        ]
    return "\n".join([*lines, "`cachectl inspect THIS_FOLDER --sinks` shows all of them, `sinks.json` holds them.", ""])
