"""Where two layouts of visual tokens meet: the cells on which a teacher's and a student's attention are compared.

Dims: N_t teacher and N_s student visual tokens, C common cells.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import area_pool, content_mask, overlap_matrix, show_twice, tile_boxes
from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, Tile, grid_tile, tiles_to_array

PAIRS_KEPT = 64
"""Pairs of layouts whose pooling is kept; where layouts follow the picture's size one may take megabytes."""


@dataclass(frozen=True)
class CommonGrid:
    """How two sides' visual tokens meet.

    Attributes:
        teacher_pool: Shares of each teacher token in each common cell, float32 ``[N_t, C]``.
        student_pool: Shares of each student token, float32 ``[N_s, C]``.
        content: Which common cells carry image, bool ``[C]``.
        is_teachers: Whether the common cells are the teacher's tokens, in their order.
    """

    teacher_pool: Tensor
    student_pool: Tensor
    content: Tensor
    is_teachers: bool = True


@lru_cache(maxsize=PAIRS_KEPT)
def meet(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    """Choose the common cells of two token layouts: the side with fewer tokens that carry image.

    A layout whose tiles show a part of the picture twice (a small picture, and its tiles) cannot give the cells:
    nothing says how another model's attention should be divided between the two views. Equal layouts still meet
    token by token; others on a grid over the picture, as fine as the side with fewer tokens, at most 12 x 12.
    """
    teacher_boxes, student_boxes = tile_boxes(teacher), tile_boxes(student)
    teacher_content, student_content = content_mask(teacher_boxes), content_mask(student_boxes)
    is_students = int(student_content.sum()) <= int(teacher_content.sum())
    if show_twice(student if is_students else teacher):
        if np.array_equal(tiles_to_array(teacher), tiles_to_array(student)):
            identity = torch.diag(student_content.float())
            return CommonGrid(teacher_pool=identity, student_pool=identity, content=student_content)
        return _meet_on_grid(teacher_boxes, student_boxes, int(min(teacher_content.sum(), student_content.sum())))
    if is_students:
        teacher_pool = area_pool(teacher_boxes, student_boxes)
        identity = torch.diag(student_content.float())
        return CommonGrid(
            teacher_pool=teacher_pool,
            student_pool=identity,
            content=student_content,
            is_teachers=torch.equal(teacher_pool, identity),
        )
    return CommonGrid(
        teacher_pool=torch.diag(teacher_content.float()),
        student_pool=area_pool(student_boxes, teacher_boxes),
        content=teacher_content,
    )


def _meet_on_grid(teacher_boxes: Tensor, student_boxes: Tensor, tokens: int) -> CommonGrid:
    """Both sides pooled to a square grid of no more cells than ``tokens``."""
    side = max(1, min(FINEST_SIDE, isqrt(tokens)))
    cells = tile_boxes((grid_tile(side, side),))
    return CommonGrid(
        teacher_pool=overlap_matrix(teacher_boxes, cells),
        student_pool=overlap_matrix(student_boxes, cells),
        content=torch.ones(side * side, dtype=torch.bool),
        is_teachers=False,
    )


@lru_cache(maxsize=PAIRS_KEPT)
def meet_cells(grid: tuple[int, int], student: tuple[Tile, ...]) -> CommonGrid:
    """Choose the common cells of a cached grid over the whole picture and a student's tokens.

    The teacher's tokens were pooled to the grid; the student's go through it too. Where the grid cuts tokens
    (padded and cropped pictures), a student that looks like its teacher then still matches it.
    """
    cells = (grid_tile(*grid),)
    common = meet(cells, student)
    through = overlap_matrix(tile_boxes(student), tile_boxes(cells))  # [N_s, cells]
    return replace(common, student_pool=through @ common.teacher_pool)
