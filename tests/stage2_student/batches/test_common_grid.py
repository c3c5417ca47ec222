"""Two layouts meet on cells that show the picture once; mass is kept, and simple layouts meet as they always did."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.boxes import area_pool, content_mask, show_twice, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile, pooled_tiles
from vlm_distill_cache.stage2_student.batches.grid import meet, meet_cells
from vlm_distill_cache.stage2_student.scores.taught import seen_once

PADDED = (0.0, -0.5, 1.0, 1.5)


def split(rows, cols, side):
    """Tiles of side x side tokens, then the whole picture (SmolVLM, InternVL)."""
    tiles = [
        Tile(side, side, (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows))
        for row in range(rows)
        for col in range(cols)
    ]
    return (*tiles, grid_tile(side, side))


def joined(side, rows, cols):
    """The small picture, then a large grid with a newline column (LLaVA-NeXT)."""
    return grid_tile(side, side), Tile(rows, cols + 1, (0.0, -0.1, 1.0 + 1 / cols, 1.1))


simple = st.one_of(
    st.builds(lambda rows, cols: (grid_tile(rows, cols),), st.integers(1, 9), st.integers(1, 9)),
    st.builds(lambda side: (Tile(side, side, PADDED),), st.integers(3, 9)),
)
doubled = st.one_of(
    st.builds(split, st.integers(1, 3), st.integers(2, 3), st.integers(1, 5)),
    st.builds(joined, st.integers(1, 4), st.integers(3, 9), st.integers(2, 9)),
)
layouts = st.one_of(simple, doubled)


@given(teacher=layouts, student=layouts, seed=st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_mass_on_content_is_conserved_on_both_sides(teacher, student, seed):
    common = meet(teacher, student)
    for tiles, pool in ((teacher, common.teacher_pool), (student, common.student_pool)):
        boxes = tile_boxes(tiles)
        content = content_mask(boxes)
        mass = torch.rand(len(boxes), generator=torch.Generator().manual_seed(seed))
        pooled = mass @ pool
        # What touches no token that carries image for the other side has nowhere to go.
        seen = content & (pool.sum(dim=1) > 0)
        torch.testing.assert_close(pooled.sum(), mass[seen].sum(), atol=1e-4, rtol=1e-4)
        assert (pool[~content] == 0).all()
        assert (pooled[~common.content] == 0).all()
        assert (seen == content).all() or PADDED in (layout[0].region for layout in (teacher, student))


def test_a_token_on_the_edge_of_padding_keeps_its_mass():
    teacher, student = (Tile(3, 3, PADDED),), (Tile(4, 4, PADDED),)
    rows = meet(teacher, student).student_pool.sum(dim=1)
    torch.testing.assert_close(rows, content_mask(tile_boxes(student)).float())


@given(teacher=simple, student=simple)
@settings(max_examples=60, deadline=None)
def test_layouts_that_show_the_picture_once_meet_on_the_coarser_sides_tokens(teacher, student):
    boxes = [tile_boxes(tiles) for tiles in (teacher, student)]
    counts = [int(content_mask(box).sum()) for box in boxes]
    common = meet(teacher, student)
    coarser = boxes[1] if counts[1] <= counts[0] else boxes[0]
    assert common.content.tolist() == content_mask(coarser).tolist()
    if counts[1] <= counts[0]:
        torch.testing.assert_close(common.teacher_pool, area_pool(boxes[0], boxes[1]))
        torch.testing.assert_close(common.student_pool, torch.diag(content_mask(boxes[1]).float()))


@given(layout=layouts)
@settings(max_examples=40, deadline=None)
def test_equal_layouts_meet_token_by_token(layout):
    common = meet(layout, layout)
    assert common.is_teachers
    identity = torch.diag(content_mask(tile_boxes(layout)).float())
    torch.testing.assert_close(common.teacher_pool, identity)
    torch.testing.assert_close(common.student_pool, identity)


def test_a_layout_that_shows_the_picture_twice_gives_no_cells():
    student = split(2, 2, 4)  # 80 tokens
    common = meet((grid_tile(24, 24),), student)
    assert common.content.shape == (64,)  # 8 x 8: no finer than the student
    assert not common.is_teachers
    # The whole-picture tokens and the tiles' tokens of one place add up there, in whatever shares.
    at = torch.zeros(80)
    at[0], at[64] = 0.3, 0.2  # both in the upper left corner
    pooled = at @ common.student_pool
    assert pooled.view(8, 8)[:2, :2].sum().item() == pytest.approx(0.5)
    assert meet(student, (grid_tile(6, 6),)).content.shape == (36,)  # a coarser student's own cells
    assert meet(student, joined(4, 9, 9)).content.shape == (64,)
    assert meet((grid_tile(40, 40),), split(3, 3, 8)).content.shape == (144,)  # never finer than 12 x 12


@given(
    student=st.one_of(doubled, st.builds(lambda side: (grid_tile(side, side),), st.integers(1, 9))),
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
)
@settings(max_examples=60, deadline=None)
def test_a_cached_grid_and_any_student_meet_without_losing_mass(student, rows, cols):
    common = meet_cells((grid_tile(rows, cols),), student)
    torch.testing.assert_close(common.teacher_pool.sum(dim=1), torch.ones(rows * cols))
    content = content_mask(tile_boxes(student))
    torch.testing.assert_close(common.student_pool.sum(dim=1), content.float(), atol=1e-4, rtol=0)


def test_only_areas_inside_the_picture_count_as_shown_twice():
    assert not show_twice((Tile(2, 2, (0.0, 0.0, 0.5, 1.0)), Tile(2, 2, (0.5, 0.0, 1.0, 1.0))))
    assert not show_twice((grid_tile(2, 2), Tile(1, 4, (1.0, 0.0, 2.0, 1.0))))
    assert not show_twice(split(3, 3, 2)[:-1])
    assert show_twice(split(3, 3, 2))
    assert show_twice(joined(4, 6, 6))
    assert not show_twice(())


def test_maps_of_several_tiles_are_pooled_to_one_grid_over_the_picture():
    assert pooled_tiles(joined(4, 9, 9), 3) == (grid_tile(3, 3),)
    padded = Tile(8, 8, PADDED)
    assert pooled_tiles((padded,), 3) == (Tile(3, 3, padded.region),)


def test_what_is_drawn_adds_both_views_of_a_place_and_leaves_newline_tokens_out():
    tiles = joined(4, 8, 8)
    mass = torch.zeros(16 + 8 * 9)
    mass[15] = 0.25  # lower right of the small picture
    mass[16 + 6 * 9 + 7] = 0.5  # near the right edge, well down the large one
    mass[16 + 6 * 9 + 8] = 9.0  # the newline behind it
    seen, boxes = seen_once(mass, tiles)
    assert seen.sum().item() == pytest.approx(0.75)
    assert (boxes[seen > 0][:, 0] >= 0.7).all()
    assert (boxes[seen > 0][:, 1] >= 0.6).all()
    alone = (grid_tile(2, 2),)
    drawn, boxes = seen_once(torch.arange(4.0), alone)
    assert drawn.tolist() == [0.0, 1.0, 2.0, 3.0]
    torch.testing.assert_close(boxes, tile_boxes(alone))
