"""Every visual token is a box on a sample's pictures: tiles of tokens, their boxes, and which carry image.

Square resize, pad-to-square, centre crop, 2x2 pooling, and the tiles of a high-resolution processor then need no code
of their own: each gives a list of tiles, and a tile gives boxes. Several pictures, frames of a video among them, lie one
behind the other: a tile says which of them it shows (`Tile.span`), so a token that shows two frames is a deeper box. No
torch in here; `common.attention.boxes` has the rest.

Dims: N visual tokens, P pictures of a sample.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vlm_distill_cache.common.errors import CacheFormatError, SampleError

SLIVER = 1e-5
"""Box corners are float32: two grids that should share an edge miss it by up to about 1e-6 of a token. Such slivers are
dropped, so that nested grids give weights of exactly 0 and 1."""

MOST_VISUAL_TOKENS = 1 << 16
"""Of one picture: no known model has more than a quarter of it, and boxes are made of each."""
FARTHEST = float(1 << 17)
"""How far padding may reach, in sides of the picture: amply for the most oblong one that a decoder opens."""

FINEST_SIDE = 12
"""Most rows or columns of a grid that attention is pooled to unless a grid is asked for."""


def pooled_grid(rows: int, cols: int) -> tuple[int, int]:
    """A model's own grid of visual tokens, halved until no side exceeds 12 (an area pool stays exact), else 12 x 12."""
    while max(rows, cols) > FINEST_SIDE:
        if rows % 2 or cols % 2:
            return FINEST_SIDE, FINEST_SIDE
        rows, cols = rows // 2, cols // 2
    return rows, cols


@dataclass(frozen=True)
class Tile:
    """One rectangle of visual tokens, laid row-major over a region of the original image.

    Attributes:
        rows: Token rows, at least 1.
        cols: Token columns, at least 1.
        region: ``(x0, y0, x1, y1)`` in units of the original image's width and height; what lies
            outside ``[0, 1]`` is padding.
        span: Which of the sample's pictures it shows, counted from 0: the first, and the one behind the last. ``(2, 3)`` is
            the third picture, ``(2, 4)`` both of two frames; of a student whose frames stand for others, also fractions.
        is_frame: Whether these are frames of a video.

    Raises:
        SampleError: If the tile has no tokens or its region has no area, or shows no picture.
    """

    rows: int
    cols: int
    region: tuple[float, float, float, float]
    span: tuple[float, float] = (0.0, 1.0)
    is_frame: bool = False

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise SampleError(
                f"a visual tile needs at least 1x1 tokens, got {self.rows}x{self.cols}; "
                "check the image processor's patch and image size"
            )
        x0, y0, x1, y1 = self.region
        if not all(np.isfinite(self.region)) or x1 <= x0 or y1 <= y0:
            raise SampleError(
                f"a visual tile's region must be finite (x0, y0, x1, y1) with x0 < x1 and y0 < y1, "
                f"got {self.region}; check the image's size and how the processor places it"
            )
        if not (0 <= self.span[0] < self.span[1] < np.inf):
            raise SampleError(
                f"a visual tile's span must be the first of its pictures and an end behind it, got {self.span}"
            )

    @property
    def token_count(self) -> int:
        """Number of visual tokens in this tile."""
        return self.rows * self.cols


NOWHERE = (1.0, 0.0, 2.0, 1.0)
"""The region of tokens that show nobody knows what: beside the picture."""


@dataclass(frozen=True)
class View:
    """What is looked at as one: a picture, or frames that a model's tokens show together.

    Attributes:
        span: As `Tile.span`.
    """

    span: tuple[float, float] = (0.0, 1.0)
    is_frame: bool = False


def views_of(tiles: Sequence[Tile]) -> tuple[View, ...]:
    """The views that tiles show, in order."""
    return tuple(dict.fromkeys(View(tile.span, tile.is_frame) for tile in tiles))


def of_view(tiles: Sequence[Tile], view: View) -> tuple[Tile, ...]:
    """The tiles that show one view, as those of a sample with no other picture."""
    return tuple(replace(tile, span=(0.0, 1.0)) for tile in tiles if tile.span == view.span)


def grid_tile(rows: int, cols: int, view: View = View()) -> Tile:
    """A grid of cells over the whole of an original image, without padding."""
    return Tile(rows=rows, cols=cols, region=(0.0, 0.0, 1.0, 1.0), span=view.span, is_frame=view.is_frame)


def pooled_tiles(tiles: Sequence[Tile], side: int) -> tuple[Tile, ...]:
    """One tile's region, or the whole picture that several tiles show, cut into `side` x `side` cells."""
    if len(tiles) > 1:
        return (grid_tile(side, side),)
    return tuple(Tile(rows=side, cols=side, region=tile.region) for tile in tiles)


def tiles_to_array(tiles: Sequence[Tile]) -> np.ndarray:
    """The cache's form of a sample's tiles: float32 ``[n, 6]``, ``rows, cols, x0, y0, x1, y1``."""
    return np.array([(t.rows, t.cols, *t.region) for t in tiles], dtype=np.float32).reshape(-1, 6)


def tiles_from_array(array: np.ndarray) -> tuple[Tile, ...]:
    """Inverse of :func:`tiles_to_array`; regions come back rounded to float32.

    Args:
        array: float32 ``[n, 6]``; ``n`` is 0 for a text-only sample.

    Raises:
        CacheFormatError: If the array has another shape or names impossible tiles: no whole numbers of tokens, more than
            ``MOST_VISUAL_TOKENS`` of them, regions without area or farther away than ``FARTHEST``, or none on the picture
            though not all are ``NOWHERE``.
    """
    if array.ndim != 2 or array.shape[1] != 6:
        raise CacheFormatError(
            f"field `tiles` must be float32 [n, 6] (rows, cols, x0, y0, x1, y1), got {array.dtype} "
            f"{list(array.shape)}; run `cachectl verify` on the cache"
        )
    tiles = []
    sizes = array[:, :2].astype(np.float64)
    # NaN is none of these.
    if not ((sizes >= 1) & (sizes <= MOST_VISUAL_TOKENS) & (sizes == np.rint(sizes))).all() or (
        sizes.prod(axis=1).sum() > MOST_VISUAL_TOKENS
    ):
        raise CacheFormatError(
            f"field `tiles` holds tiles of {sizes[:4].tolist()} rows and columns of tokens; expected whole numbers of at "
            f"least 1, and at most {MOST_VISUAL_TOKENS} tokens in all; run `cachectl verify --deep` on the cache"
        )
    if not (np.abs(array[:, 2:]) <= FARTHEST).all():
        raise CacheFormatError(
            f"field `tiles` holds the regions {array[:4, 2:].tolist()}; expected corners at most {FARTHEST:.0f} sides of the "
            "picture away from it; run `cachectl verify --deep` on the cache"
        )
    for rows, cols, *region in array.tolist():
        try:
            tiles.append(Tile(rows=int(rows), cols=int(cols), region=(region[0], region[1], region[2], region[3])))
        except SampleError as error:
            raise CacheFormatError(f"field `tiles` is damaged: {error}; run `cachectl verify` on the cache") from error
    if any(tile.region != NOWHERE for tile in tiles) and not _show_the_picture(tiles):
        raise CacheFormatError(
            f"field `tiles` holds the regions {array[:4, 2:].tolist()}; expected tokens on the picture, and sides of at least "
            f"1/{FARTHEST:.0f} of its; run `cachectl verify --deep` on the cache"
        )
    return tuple(tiles)


def several_to_arrays(
    tiles: Sequence[Tile], frame_times: Sequence[tuple[int, float]], pictures: int
) -> dict[str, np.ndarray]:
    """The fields of a record of format version 2 that say where visual tokens are.

    Args:
        tiles: Spans of whole pictures.
        frame_times: Of each picture, or none: the medium that it is a frame of (-1: it is none) and its second.
        pictures: How many there are, P.

    Returns:
        ``tiles`` f4 ``[n, 6]``; ``tile_pictures`` u2 ``[n, 2]``, first picture and number, empty with one picture or none;
        ``frame_times`` f4 ``[P, 2]``, empty without a frame.
    """
    spans = [(int(tile.span[0]), int(tile.span[1] - tile.span[0])) for tile in tiles] if pictures > 1 else []
    return {
        "tiles": tiles_to_array(tiles),
        "tile_pictures": np.array(spans, dtype="<u2").reshape(-1, 2),
        "frame_times": np.array(frame_times, dtype="<f4").reshape(-1, 2),
    }


def tiles_of(record: Mapping[str, Any]) -> tuple[Tile, ...]:
    """The visual tiles of a record of either format version.

    Raises:
        CacheFormatError: As `tiles_from_array`; or ``tile_pictures`` and ``frame_times`` do not fit the tiles and pictures:
            each view begins where the one in front of it ends, and shows a still or frames of one video, in order of time.
    """
    tiles = tiles_from_array(np.asarray(record["tiles"]))
    spans = np.asarray(record.get("tile_pictures", np.zeros((0, 2)))).astype(np.int64)
    times = np.asarray(record.get("frame_times", np.zeros((0, 2)))).astype(np.float64)
    if not {"tile_pictures", "image_hash"} <= record.keys() and not len(spans) and not len(times):
        return tiles  # of format version 1
    pictures = len(record["image_hash"])
    for wrong in _impossible_pictures(pictures, len(tiles), len(spans), times):
        raise CacheFormatError(f"{wrong}; run `cachectl verify --deep` on the cache")
    if not len(spans):
        spans = np.array([(0, 1)] * len(tiles), dtype=np.int64).reshape(-1, 2)
    video = times[:, 0] if len(times) else np.full(pictures, -1.0)
    found, begin, end = [], 0, 0
    for tile, (first, count) in zip(tiles, spans.tolist(), strict=True):
        if not count or (first, first + count) != (begin, end):
            begin, end = end, first + count
            whose = video[begin:end]
            if (
                first != begin
                or not begin < end <= pictures
                or not (whose == whose[0]).all()
                or (count > 1 and whose[0] < 0)
            ):
                raise CacheFormatError(
                    f"field `tile_pictures`: a tile shows pictures {first} to {first + count - 1} of {pictures}, expected "
                    f"those from {begin} on, frames of one video if several; run `cachectl verify --deep` on the cache"
                )
        found.append(replace(tile, span=(float(begin), float(end)), is_frame=bool(video[begin] >= 0)))
    if end != pictures:
        raise CacheFormatError(
            f"field `tile_pictures`: {pictures} pictures, but tiles of {end} of them; run `cachectl verify --deep` on the cache"
        )
    return tuple(found)


def _impossible_pictures(pictures: int, tiles: int, spans: int, times: np.ndarray) -> Iterator[str]:
    """Yield what a record of format version 2 says of its pictures and cannot be, by their numbers.

    Args:
        times: float64 ``[P or 0, 2]``.
    """
    if bool(pictures) != bool(tiles):
        yield f"image_hash has {pictures} pictures, but there are {tiles} tiles of them"
    placed = tiles if pictures > 1 else 0
    if spans != placed:
        yield f"tile_pictures has {spans} entries for {tiles} tiles; expected {placed}, of {pictures} pictures"
    if len(times) not in (0, pictures):
        yield f"frame_times has {len(times)} entries for {pictures} pictures"
        return
    medium, second = times[:, 0], times[:, 1]
    stills = medium == -1
    of_video = (medium >= 0) & (medium < pictures) & (medium == np.rint(medium))
    if not np.where(stills, np.isnan(second), of_video & np.isfinite(second) & (second >= 0)).all():
        yield "frame_times has a picture without a video's number and second, or a still one (-1) with a second"
    elif len(times) and stills.all():
        yield "frame_times says of every picture that it is no frame; there should be no entries then"
    elif (np.diff(medium[~stills]) < 0).any() or ((np.diff(second) < 0) & (np.diff(medium) == 0)).any():
        yield "frame_times falls: videos and their frames stand in order"


def _show_the_picture(tiles: Sequence[Tile]) -> bool:
    """Whether some token meets the picture with at least half its width or height, and no region is next to nothing.

    The most oblong pictures are padded so far that no token lies in them by half: there one side does.
    """
    regions = np.array([tile.region for tile in tiles])
    boxes = box_array(tiles).astype(np.float64)
    inside = np.clip(boxes, 0.0, 1.0)
    sides, shown = boxes[:, 2:] - boxes[:, :2], inside[:, 2:] - inside[:, :2]  # [N, 2]
    met = (shown > 0).all(axis=1) & (shown >= sides * (0.5 - SLIVER)).any(axis=1)
    return bool(met.any() and (regions[:, 2:] - regions[:, :2] >= 1 / FARTHEST).all())


def box_array(tiles: Sequence[Tile]) -> np.ndarray:
    """Boxes of all visual tokens in the order the language model reads them.

    Args:
        tiles: In reading order; within a tile tokens run row by row.

    Returns:
        float32 ``[N, 4]``: ``x0, y0, x1, y1`` in units of the original image; ``[0, 4]`` without tiles. Which picture a
        token shows is said by `span_array`.
    """
    boxes = [np.zeros((0, 4))]
    for tile in tiles:
        x0, y0, x1, y1 = tile.region
        xs = x0 + (x1 - x0) * np.arange(tile.cols + 1) / tile.cols
        ys = y0 + (y1 - y0) * np.arange(tile.rows + 1) / tile.rows
        left, top = np.meshgrid(xs[:-1], ys[:-1])  # [rows, cols] each
        right, bottom = np.meshgrid(xs[1:], ys[1:])
        boxes.append(np.stack([left, top, right, bottom], axis=-1).reshape(-1, 4))
    return np.concatenate(boxes).astype(np.float32)


def span_array(tiles: Sequence[Tile]) -> np.ndarray:
    """Which pictures each token of `box_array` shows, first and end: float32 ``[N, 2]``."""
    spans = np.array([tile.span for tile in tiles], dtype=np.float32).reshape(-1, 2)
    return np.repeat(spans, [tile.token_count for tile in tiles], axis=0)


def carries_image(boxes: np.ndarray) -> np.ndarray:
    """Which tokens have at least half of their area inside the original picture.

    Args:
        boxes: float32 ``[N, 4]``.

    Returns:
        bool ``[N]``; False for tokens that lie mostly in padding.
    """
    exact = boxes.astype(np.float64)
    inside = np.clip(exact, 0.0, 1.0)
    areas = [(b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]) for b in (inside, exact)]
    # The tolerance keeps a box cut exactly in half on the image's side despite float32 corners.
    content: np.ndarray = areas[0] >= areas[1] * (0.5 - SLIVER)
    return content
