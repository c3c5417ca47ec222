"""Where two layouts of visual tokens meet: the cells on which a teacher's and a student's attention are compared.

Pictures of a sample meet one by one: the views of both sides that share a picture are a **meeting**, whose cells are those of
the side with fewer tokens. Where the two sides see other frames of a video, or a model's tokens show several frames, a
meeting has several views.

Dims: N_t teacher and N_s student visual tokens, C common cells.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import isqrt

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import area_pool, content_mask, overlap_matrix, show_twice, tile_boxes
from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, SLIVER, Tile, grid_tile, tiles_to_array, views_of

PAIRS_KEPT = 64
"""Pairs of layouts of one meeting whose pooling is kept; where layouts follow the picture's size one may take megabytes."""
VIEWS_KEPT = 4
"""Most views of a meeting whose pooling is kept: a picture of each side, or the frames of one token. Whole videos that were
read at other times would take a hundred megabytes each."""


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


@dataclass(frozen=True)
class Meeting:
    """The pictures, or frames, that some views of both sides show, and no other view does.

    Attributes:
        teacher: The teacher's tiles, with spans from 0 on.
        student: The student's; none where it does not see what the teacher saw.
        teacher_tokens: Places of its visual tokens in the sample: the first, and the end.
        student_tokens: The same of the student's.
    """

    teacher: tuple[Tile, ...]
    student: tuple[Tile, ...]
    teacher_tokens: tuple[int, int]
    student_tokens: tuple[int, int]


def meetings(teacher: Sequence[Tile], student: Sequence[Tile]) -> tuple[Meeting, ...]:
    """Part two layouts into what shares no picture, in order.

    Args:
        teacher: In the order of their spans.
        student: The same; spans are on the teacher's pictures (`batches.frames.on_teachers_pictures`).
    """
    spans = sorted(view.span for tiles in (teacher, student) for view in views_of(tiles))
    bounds: list[list[float]] = []
    for first, end in spans:
        if bounds and first < bounds[-1][1] - SLIVER:
            bounds[-1][1] = max(bounds[-1][1], end)
        else:
            bounds.append([first, end])
    found = []
    places = [0, 0]
    for first, end in bounds:
        sides, tokens = [], []
        for side, tiles in enumerate((teacher, student)):
            own = [tile for tile in tiles if first - SLIVER < tile.span[0] < end - SLIVER]
            sides.append(tuple(_moved(tile, first) for tile in own))
            count = sum(tile.token_count for tile in own)
            tokens.append((places[side], places[side] + count))
            places[side] += count
        found.append(Meeting(sides[0], sides[1], tokens[0], tokens[1]))
    return tuple(found)


def _moved(tile: Tile, first: float) -> Tile:
    """A tile with the pictures counted from one on, so that frames of one layout are one layout."""
    if first == 0 and not tile.is_frame:
        return tile
    return replace(tile, span=(max(0.0, tile.span[0] - first), tile.span[1] - first), is_frame=False)


def meet(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    """Choose the common cells of two token layouts: of each meeting those of the side with fewer tokens that carry image.

    A layout whose tiles show a part of the picture twice (a small picture, and its tiles) cannot give the cells:
    nothing says how another model's attention should be divided between the two views. Equal layouts still meet
    token by token; others on a grid over the picture, as fine as the side with fewer tokens, at most 12 x 12.

    Returns:
        Cells of all meetings, one behind the other; what only the teacher sees has none.
    """
    return _joined([(part, meet_alone(part.teacher, part.student)) for part in meetings(teacher, student)])


def meet_alone(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    """`meet` of one meeting."""
    return (_kept_pair if _is_kept(teacher, student) else _pair)(teacher, student)


def _is_kept(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> bool:
    return len(views_of(teacher)) + len(views_of(student)) <= VIEWS_KEPT


def _pair(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    teacher_boxes, student_boxes = tile_boxes(teacher), tile_boxes(student)
    teacher_content, student_content = content_mask(teacher_boxes), content_mask(student_boxes)
    is_students = int(student_content.sum()) <= int(teacher_content.sum())
    if show_twice(student if is_students else teacher):
        if _are_equal(teacher, student):
            identity = torch.diag(student_content.float())
            return CommonGrid(teacher_pool=identity, student_pool=identity, content=student_content)
        return _meet_on_grid(teacher, student, int(min(teacher_content.sum(), student_content.sum())))
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


_kept_pair = lru_cache(maxsize=PAIRS_KEPT)(_pair)


def _are_equal(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> bool:
    """Whether two layouts have the same tokens; regions of a cache are rounded to float32."""
    return np.array_equal(tiles_to_array(teacher), tiles_to_array(student)) and [t.span for t in teacher] == [
        t.span for t in student
    ]


def _meet_on_grid(teacher: tuple[Tile, ...], student: tuple[Tile, ...], tokens: int) -> CommonGrid:
    """Both sides pooled to a square grid on each view of the side with fewer views, of no more cells than ``tokens`` in all."""
    views = min(views_of(student), views_of(teacher), key=len)
    side = max(1, min(FINEST_SIDE, isqrt(tokens // len(views))))
    cells = tile_boxes([grid_tile(side, side, view) for view in views])
    return CommonGrid(
        teacher_pool=overlap_matrix(tile_boxes(teacher), cells),
        student_pool=overlap_matrix(tile_boxes(student), cells),
        content=torch.ones(len(cells), dtype=torch.bool),
        is_teachers=False,
    )


def meet_cells(cells: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    """Choose the common cells of the cached grids over whole pictures and a student's tokens.

    The teacher's tokens were pooled to the grids; the student's go through them too. Where a grid cuts tokens
    (padded and cropped pictures), a student that looks like its teacher then still matches it.

    Args:
        cells: A grid for each of the teacher's views, from the codec's ``cells_of``.
    """
    found = []
    for part in meetings(cells, student):
        pair = _kept_cells if _is_kept(part.teacher, part.student) else _cells
        found.append((part, pair(part.teacher, part.student)))
    return _joined(found)


def _cells(cells: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    common = meet_alone(cells, student)
    through = overlap_matrix(tile_boxes(student), tile_boxes(cells))  # [N_s, cells]
    return replace(common, student_pool=through @ common.teacher_pool)


_kept_cells = lru_cache(maxsize=PAIRS_KEPT)(_cells)


def _joined(parts: Sequence[tuple[Meeting, CommonGrid]]) -> CommonGrid:
    """The grids of all meetings as one, whose pools are zero between them."""
    if len(parts) == 1 and parts[0][0].student:
        return parts[0][1]
    kept = [(part, grid) for part, grid in parts if part.student and part.teacher]
    cells = sum(len(grid.content) for _, grid in kept)
    teacher_pool = torch.zeros(parts[-1][0].teacher_tokens[1] if parts else 0, cells)
    student_pool = torch.zeros(parts[-1][0].student_tokens[1] if parts else 0, cells)
    at = 0
    for part, grid in kept:
        end = at + len(grid.content)
        teacher_pool[slice(*part.teacher_tokens), at:end] = grid.teacher_pool
        student_pool[slice(*part.student_tokens), at:end] = grid.student_pool
        at = end
    return CommonGrid(
        teacher_pool=teacher_pool,
        student_pool=student_pool,
        content=torch.cat([torch.zeros(0, dtype=torch.bool), *(grid.content for _, grid in kept)]),
        is_teachers=len(kept) == len(parts) and all(grid.is_teachers for _, grid in kept),
    )
