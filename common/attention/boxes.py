"""Two grids of visual tokens meet through shared area; what a token is: `common.attention.tiles`.

The boxes of two sides give one matrix. **Keys pool by sum of probability mass, queries by mean.** 24x24 tokens against
12x12 is exactly a 2x2 pool. A box has a third side, the pictures that it shows: tokens of different pictures share
nothing, and a token that shows two frames gives half of its mass to each.

Dims: N visual tokens of the source side, C target boxes (another model's tokens, or grid cells).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.tiles import SLIVER, Tile, box_array, carries_image, span_array


def show_twice(tiles: Sequence[Tile]) -> bool:
    """Whether some part of a picture is seen by tokens of more than one tile (a small picture, and its parts)."""
    regions = torch.tensor([(*tile.region, *tile.span) for tile in tiles], dtype=torch.float64).reshape(-1, 6)
    regions = _inside(regions)
    shared = _shared_areas(regions, regions).fill_diagonal_(0.0)
    return bool((shared > SLIVER * _area(regions)[:, None]).any())


def tile_boxes(tiles: Sequence[Tile]) -> Tensor:
    """`box_array` with `span_array` behind it as a tensor, float32 ``[N, 6]``: ``x0, y0, x1, y1, first, end``."""
    return torch.from_numpy(np.concatenate([box_array(tiles), span_array(tiles)], axis=1))


def content_mask(boxes: Tensor) -> Tensor:
    """`carries_image` of boxes, float32 ``[N, 6]``: bool ``[N]`` on their device."""
    return torch.from_numpy(carries_image(boxes[:, :4].numpy(force=True))).to(boxes.device)


def overlap_matrix(source_boxes: Tensor, target_boxes: Tensor) -> Tensor:
    """The share of each source token's picture area that falls on each target box.

    Areas are clipped to the picture first, so a token that is partly padding gives its whole mass to
    the picture it saw. Where targets overlap or leave gaps, a row is renormalised: mass is conserved.

    Args:
        source_boxes: From `tile_boxes`, float32 ``[N, 6]``; tokens whose attention is to be moved.
        target_boxes: float32 ``[C, 6]``; where it goes.

    Returns:
        float32 ``[N, C]`` on the source's device. A row sums to 1, or is all 0 for a token that lies
        mostly in padding (:func:`content_mask`) or touches no target.
    """
    source = _inside(source_boxes.double())
    target = _inside(target_boxes.to(source_boxes.device).double())
    shares = _shared_areas(source, target) / _area(source).clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    keep = (shares > SLIVER) & content_mask(source_boxes)[:, None]
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


def _inside(boxes: Tensor) -> Tensor:
    """Boxes ``[N, 6]``, what lies outside their pictures cut off."""
    return torch.cat([boxes[:, :4].clamp(0.0, 1.0), boxes[:, 4:]], dim=1)


def _sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Where boxes ``[..., 6]`` begin and end: x, y and picture, ``[..., 3]`` each."""
    return boxes[..., [0, 1, 4]], boxes[..., [2, 3, 5]]


def _area(boxes: Tensor) -> Tensor:
    """Areas ``[N]`` of boxes ``[N, 6]``, times the pictures that they show."""
    low, high = _sides(boxes)
    return (high - low).prod(dim=-1)


def _shared_areas(some: Tensor, others: Tensor) -> Tensor:
    """Areas ``[N, C]`` that each of N boxes shares with each of C, times the pictures that both show."""
    (low, high), (begin, end) = _sides(some[:, None]), _sides(others[None])
    return (torch.minimum(high, end) - torch.maximum(low, begin)).clamp_min(0.0).prod(dim=-1)
