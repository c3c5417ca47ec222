"""Boxes and overlaps: nested grids pool exactly, mass is conserved, padding carries nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, pool_keys, pool_queries, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile, tiles_from_array, tiles_to_array
from vlm_distill_cache.common.errors import CacheFormatError, SampleError

sides = st.integers(1, 9)
corners = st.tuples(st.floats(-0.6, 0.4), st.floats(-0.6, 0.4), st.floats(0.6, 1.6), st.floats(0.6, 1.6))
spans = st.sampled_from([(0.0, 1.0), (1.0, 2.0), (0.0, 2.0), (0.5, 2.5)])
tiles = st.builds(Tile, rows=sides, cols=sides, region=corners)
of_several = st.builds(Tile, rows=sides, cols=sides, region=corners, span=spans)


def slow_overlap(source, target):
    """One box at a time, in plain Python floats."""
    weights = np.zeros((len(source), len(target)))
    for i, (a0, b0, a1, b1, begin, end) in enumerate(source.tolist()):
        full = (a1 - a0) * (b1 - b0)
        a0, b0, a1, b1 = (min(max(v, 0.0), 1.0) for v in (a0, b0, a1, b1))
        if (a1 - a0) * (b1 - b0) < 0.5 * full:
            continue
        for j, (c0, d0, c1, d1, first, last) in enumerate(target.tolist()):
            c0, d0, c1, d1 = (min(max(v, 0.0), 1.0) for v in (c0, d0, c1, d1))
            weights[i, j] = max(min(a1, c1) - max(a0, c0), 0.0) * max(min(b1, d1) - max(b0, d0), 0.0)
            weights[i, j] *= max(min(end, last) - max(begin, first), 0.0)
        if weights[i].sum() > 0:
            weights[i] /= weights[i].sum()
    return weights


def test_24x24_against_12x12_is_exactly_a_2x2_pool():
    overlap = overlap_matrix(tile_boxes([grid_tile(24, 24)]), tile_boxes([grid_tile(12, 12)]))
    assert set(overlap.unique().tolist()) == {0.0, 1.0}
    attention = torch.rand(3, 24 * 24)
    expected = torch.nn.functional.avg_pool2d(attention.view(3, 1, 24, 24), 2) * 4
    torch.testing.assert_close(pool_keys(attention, overlap), expected.view(3, 144))
    rows = torch.rand(24 * 24, 5)
    expected = torch.nn.functional.avg_pool2d(rows.T.reshape(5, 1, 24, 24), 2).view(5, 144).T
    torch.testing.assert_close(pool_queries(rows, overlap), expected)


@given(side=st.integers(1, 12), factor=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_nested_grids_have_weights_of_zero_and_one(side, factor):
    overlap = overlap_matrix(tile_boxes([grid_tile(side * factor, side)]), tile_boxes([grid_tile(side, side)]))
    assert set(overlap.unique().tolist()) <= {0.0, 1.0}
    assert overlap.sum(0).unique().tolist() == [float(factor)]


@given(source=st.lists(of_several, min_size=1, max_size=3), target=st.lists(of_several, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_overlap_equals_the_slow_reference(source, target):
    source_boxes, target_boxes = tile_boxes(source), tile_boxes(target)
    expected = slow_overlap(source_boxes, target_boxes)
    clear = np.abs(content_margin(source_boxes)) > 1e-4  # boxes cut almost exactly in half may go either way
    got = overlap_matrix(source_boxes, target_boxes).numpy()
    # A share below 1e-5 is dropped as rounding; a row that has nothing else is then left empty.
    full = (expected.sum(1) > 0) & (got.sum(1) > 0) & clear
    np.testing.assert_allclose(got[full], expected[full], atol=2e-4)
    assert (got[clear & (expected.sum(1) == 0)] == 0).all()


def content_margin(boxes):
    exact = boxes.double()
    inside = exact.clamp(0, 1)
    area = (exact[:, 2] - exact[:, 0]) * (exact[:, 3] - exact[:, 1])
    return ((inside[:, 2] - inside[:, 0]) * (inside[:, 3] - inside[:, 1]) / area - 0.5).numpy()


@given(source=st.lists(tiles, min_size=1, max_size=3), rows=sides, cols=sides)
@settings(max_examples=60, deadline=None)
def test_mass_of_content_tokens_is_conserved_on_a_grid_over_the_image(source, rows, cols):
    boxes = tile_boxes(source)
    overlap = overlap_matrix(boxes, tile_boxes([grid_tile(rows, cols)]))
    content = content_mask(boxes)
    torch.testing.assert_close(overlap.sum(1), content.float())
    attention = torch.rand(len(boxes))
    torch.testing.assert_close(pool_keys(attention, overlap).sum(), attention[content].sum())


def test_a_bright_square_attracts_its_mass_whatever_the_geometry():
    """A square at (0.5..0.75, 0.25..0.5) of a wide picture, seen padded, cropped and tiled."""
    geometries = {
        "resized": [grid_tile(24, 24)],
        # twice as wide as high: the square it is padded to reaches half a picture beyond above and below
        "padded": [Tile(rows=16, cols=16, region=(0.0, -0.5, 1.0, 1.5))],
        "cropped": [Tile(rows=8, cols=8, region=(0.25, 0.0, 0.75, 1.0))],
        "tiled": [grid_tile(4, 4), Tile(12, 12, (0.0, 0.0, 0.5, 1.0)), Tile(12, 12, (0.5, 0.0, 1.0, 1.0))],
    }
    cells = tile_boxes([grid_tile(4, 4)])
    for name, geometry in geometries.items():
        boxes = tile_boxes(geometry)
        centre_x, centre_y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
        bright = (centre_x > 0.5) & (centre_x < 0.75) & (centre_y > 0.25) & (centre_y < 0.5)
        attention = bright.float() / bright.sum()
        pooled = pool_keys(attention, overlap_matrix(boxes, cells))
        assert pooled.argmax() == 1 * 4 + 2, name
        assert pooled.sum() == pytest.approx(1.0), name
        assert pooled.max() == pytest.approx(1.0, abs=1e-5), name


def test_padding_tokens_are_masked_and_half_covered_ones_kept():
    boxes = tile_boxes([Tile(rows=4, cols=1, region=(0.0, -0.25, 1.0, 1.25))])  # token height 0.375
    assert content_mask(boxes).tolist() == [False, True, True, False]
    half = tile_boxes([Tile(rows=1, cols=1, region=(0.0, -1.0, 1.0, 1.0))])
    assert content_mask(half).tolist() == [True]
    overlap = overlap_matrix(boxes, tile_boxes([grid_tile(2, 2)]))
    assert overlap.sum(1).tolist() == [0.0, 1.0, 1.0, 0.0]


def test_tokens_outside_every_target_lose_their_mass_and_empty_targets_get_none():
    left_half = tile_boxes([Tile(rows=1, cols=1, region=(0.0, 0.0, 0.5, 1.0))])
    overlap = overlap_matrix(tile_boxes([grid_tile(1, 4)]), left_half)
    assert overlap.flatten().tolist() == [1.0, 1.0, 0.0, 0.0]
    back = overlap_matrix(left_half, tile_boxes([grid_tile(1, 2)]))
    assert pool_queries(torch.ones(1, 3), back).tolist() == [[1.0] * 3, [0.0] * 3]


def test_tokens_run_row_by_row_and_tile_after_tile():
    boxes = tile_boxes([grid_tile(1, 2), Tile(rows=2, cols=1, region=(0.0, 0.0, 0.5, 1.0))])
    assert boxes.dtype == torch.float32
    assert boxes.tolist() == [
        [0.0, 0.0, 0.5, 1.0, 0.0, 1.0],
        [0.5, 0.0, 1.0, 1.0, 0.0, 1.0],
        [0.0, 0.0, 0.5, 0.5, 0.0, 1.0],
        [0.0, 0.5, 0.5, 1.0, 0.0, 1.0],
    ]


@given(st.lists(tiles, max_size=4))
def test_tiles_survive_the_cache_as_float32(some):
    array = tiles_to_array(some)
    assert array.dtype == np.float32
    assert array.shape == (len(some), 6)
    back = tiles_from_array(array)
    np.testing.assert_array_equal(tiles_to_array(back), array)
    assert [t.token_count for t in back] == [t.rows * t.cols for t in some]


def test_a_text_only_sample_has_no_boxes():
    assert tiles_to_array([]).shape == (0, 6)
    assert tile_boxes(tiles_from_array(np.zeros((0, 6), np.float32))).shape == (0, 6)
    assert overlap_matrix(tile_boxes([]), tile_boxes([grid_tile(2, 2)])).shape == (0, 4)


def test_impossible_tiles_are_refused():
    with pytest.raises(SampleError, match="at least 1x1"):
        Tile(rows=0, cols=2, region=(0.0, 0.0, 1.0, 1.0))
    with pytest.raises(SampleError, match="x0 < x1"):
        Tile(rows=1, cols=2, region=(0.5, 0.0, 0.5, 1.0))
    with pytest.raises(SampleError, match="finite"):
        Tile(rows=1, cols=2, region=(0.0, float("nan"), 0.5, 1.0))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 5), np.float32), r"\[2, 5\]"),
        (np.array([[1.5, 2, 0, 0, 1, 1]], np.float32), "whole numbers"),
        (np.array([[0, 2, 0, 0, 1, 1]], np.float32), "whole numbers of at least 1"),
    ],
)
def test_damaged_tiles_in_a_cache_are_refused_with_the_remedy(array, message):
    with pytest.raises(CacheFormatError, match=message) as error:
        tiles_from_array(array)
    assert "cachectl verify" in str(error.value)
