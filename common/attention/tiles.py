"""Every visual token is a box on the original picture: tiles of tokens, their boxes, and which carry image.

Square resize, pad-to-square, centre crop, 2x2 pooling, and the tiles of a high-resolution processor then need no code
of their own: each gives a list of tiles, and a tile gives boxes. No torch in here; `common.attention.boxes` has the
rest.

Dims: N visual tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    Raises:
        SampleError: If the tile has no tokens or its region has no area.
    """

    rows: int
    cols: int
    region: tuple[float, float, float, float]

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

    @property
    def token_count(self) -> int:
        """Number of visual tokens in this tile."""
        return self.rows * self.cols


NOWHERE = (1.0, 0.0, 2.0, 1.0)
"""The region of tokens that show nobody knows what: beside the picture."""


def grid_tile(rows: int, cols: int) -> Tile:
    """A grid of cells over the whole original image, without padding."""
    return Tile(rows=rows, cols=cols, region=(0.0, 0.0, 1.0, 1.0))


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
        float32 ``[N, 4]``: ``x0, y0, x1, y1`` in units of the original image; ``[0, 4]`` without tiles.
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
