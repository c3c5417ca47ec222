"""Every visual token is a box on the original picture; two token grids meet through shared area.

Square resize, pad-to-square, centre crop, 2x2 pooling, and the tiles of a high-resolution processor
then need no code of their own: each gives a list of tiles, a tile gives boxes, and the boxes of two
sides give one matrix. **Keys pool by sum of probability mass, queries by mean.** 24x24 tokens against
12x12 is exactly a 2x2 pool.

Dims: N visual tokens of the source side, C target boxes (another model's tokens, or grid cells).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.errors import CacheFormatError, SampleError

# Box corners are float32: two grids that should share an edge miss it by up to about 1e-6 of a token.
# Such slivers are dropped, so that nested grids give weights of exactly 0 and 1.
_SLIVER = 1e-5

FINEST_SIDE = 12
"""Most rows or columns of a grid that attention is pooled to where nobody asks for one."""


@dataclass(frozen=True)
class Tile:
    """One rectangle of visual tokens, laid row-major over a region of the original image.

    Attributes:
        rows: Token rows, at least 1.
        cols: Token columns, at least 1.
        region: ``(x0, y0, x1, y1)`` in units of the original image's width and height; what lies
            outside ``[0, 1]`` is padding.

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


def grid_tile(rows: int, cols: int) -> Tile:
    """A grid of cells over the whole original image, without padding."""
    return Tile(rows=rows, cols=cols, region=(0.0, 0.0, 1.0, 1.0))


def pooled_tiles(tiles: Sequence[Tile], side: int) -> tuple[Tile, ...]:
    """One tile's region, or the whole picture that several tiles show, cut into `side` x `side` cells."""
    if len(tiles) > 1:
        return (grid_tile(side, side),)
    return tuple(Tile(rows=side, cols=side, region=tile.region) for tile in tiles)


def show_twice(tiles: Sequence[Tile]) -> bool:
    """Whether some part of the picture is seen by tokens of more than one tile (a small picture, and its parts)."""
    regions = torch.tensor([tile.region for tile in tiles], dtype=torch.float64).reshape(-1, 4).clamp(0.0, 1.0)
    shared = _shared_areas(regions, regions).fill_diagonal_(0.0)
    return bool((shared > _SLIVER * _area(regions)[:, None]).any())


def tiles_to_array(tiles: Sequence[Tile]) -> np.ndarray:
    """The cache's form of a sample's tiles: float32 ``[n, 6]``, ``rows, cols, x0, y0, x1, y1``."""
    return np.array([(t.rows, t.cols, *t.region) for t in tiles], dtype=np.float32).reshape(-1, 6)


def tiles_from_array(array: np.ndarray) -> tuple[Tile, ...]:
    """Inverse of :func:`tiles_to_array`; regions come back rounded to float32. A text-only sample has none.

    Raises:
        CacheFormatError: If the array has another shape or names impossible tiles.
    """
    if array.ndim != 2 or array.shape[1] != 6:
        raise CacheFormatError(
            f"field `tiles` must be float32 [n, 6] (rows, cols, x0, y0, x1, y1), got {array.dtype} "
            f"{list(array.shape)}; run `cachectl verify` on the cache"
        )
    tiles = []
    for rows, cols, *region in array.tolist():
        if rows != int(rows) or cols != int(cols):
            raise CacheFormatError(
                f"field `tiles` holds a tile of {rows} x {cols} tokens, expected whole numbers; "
                "run `cachectl verify` on the cache"
            )
        try:
            tiles.append(Tile(rows=int(rows), cols=int(cols), region=(region[0], region[1], region[2], region[3])))
        except SampleError as error:
            raise CacheFormatError(f"field `tiles` is damaged: {error}; run `cachectl verify` on the cache") from error
    return tuple(tiles)


def tile_boxes(tiles: Sequence[Tile]) -> Tensor:
    """Boxes of all visual tokens in the order the language model reads them: tile after tile, row by row.

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
    return torch.from_numpy(np.concatenate(boxes).astype(np.float32))


def content_mask(boxes: Tensor) -> Tensor:
    """Which tokens, boxes ``[N, 4]``, lie at least by half inside the original picture: bool ``[N]``; False: padding."""
    exact = boxes.double()
    inside = _area(exact.clamp(0.0, 1.0))
    # The tolerance keeps a box cut exactly in half on the image's side despite float32 corners.
    return inside >= _area(exact) * (0.5 - _SLIVER)


def overlap_matrix(source_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """The share of each source token's picture area that falls on each target box.

    Areas are clipped to the picture first, so a token that is partly padding gives its whole mass to
    the picture it saw. Where targets overlap or leave gaps, a row is renormalised: mass is conserved.

    Args:
        source_boxes: float32 ``[N, 4]``; tokens whose attention is to be moved.
        target_boxes: float32 ``[C, 4]``; where it goes.

    Returns:
        float32 ``[N, C]`` on the source's device. A row sums to 1, or is all 0 for a token that lies
        mostly in padding (:func:`content_mask`) or touches no target.
    """
    source = source_boxes.double().clamp(0.0, 1.0)
    target = target_boxes.to(source.device).double().clamp(0.0, 1.0)
    shares = _shared_areas(source, target) / _area(source).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    keep = (shares > _SLIVER) & content_mask(source_boxes)[:, None]
    shares = torch.where(keep, shares, shares.new_zeros(()))
    total = shares.sum(dim=1, keepdim=True)
    return (shares / torch.where(total > 0, total, torch.ones_like(total))).float()


def area_pool(source_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """:func:`overlap_matrix` without the targets that lie mostly in padding: float32 ``[N, C]``.

    A token that lies partly on such a target gives its whole mass to the others it touches.
    """
    content = content_mask(target_boxes).to(source_boxes.device)
    pool = torch.zeros(len(source_boxes), len(target_boxes), device=source_boxes.device)
    pool[:, content] = overlap_matrix(source_boxes, target_boxes.to(source_boxes.device)[content])
    return pool


def pool_keys(attention: Tensor, overlap: Tensor) -> Tensor:
    """Move mass ``[..., N]`` on source tokens to target boxes, where it adds up: ``[..., C]`` in the attention's dtype.

    ``overlap`` is float32 ``[N, C]`` from :func:`overlap_matrix`.
    """
    return attention @ overlap.to(dtype=attention.dtype, device=attention.device)


def pool_queries(attention: Tensor, overlap: Tensor) -> Tensor:
    """Average the rows ``[..., N, M]`` of source query tokens over each target box, weighted by their shares in it.

    Returns:
        ``[..., C, M]`` in the attention's dtype; rows of targets that no token touches are 0.
    """
    weights = overlap.to(dtype=attention.dtype, device=attention.device)
    total = weights.sum(dim=0)
    weights = weights / torch.where(total > 0, total, torch.ones_like(total))
    return weights.T @ attention


def _area(boxes: Tensor) -> Tensor:
    """Areas ``[N]`` of boxes ``[N, 4]``."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _shared_areas(some: Tensor, others: Tensor) -> Tensor:
    """Areas ``[N, C]`` that each of N boxes shares with each of C."""
    low = torch.maximum(some[:, None, :2], others[None, :, :2])
    high = torch.minimum(some[:, None, 2:], others[None, :, 2:])
    return (high - low).clamp_min(0.0).prod(dim=-1)
