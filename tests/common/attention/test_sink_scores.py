"""Sink scores against the formula number by number, and where a map of them lies for other layouts of visual tokens."""

import numpy as np
import pytest
import torch

from vlm_distill_cache.common.attention.boxes import overlap_matrix
from vlm_distill_cache.common.attention.sinks import are_sinks, find_sinks, mean_over, on_cells, overlaps, sink_scores
from vlm_distill_cache.common.attention.tiles import Tile, box_array, grid_tile


def slow_scores(attention: np.ndarray, present: np.ndarray, gamma: float) -> list[float]:
    """Mean over the pictures that show a place, to the power gamma, then from the least to the most."""
    raised: list[float | None] = []
    for place in range(attention.shape[1]):
        seen = [float(attention[p, place]) for p in range(len(attention)) if present[p, place]]
        raised.append((sum(seen) / len(seen)) ** gamma if seen else None)
    known = [value for value in raised if value is not None]
    low, high = min(known), max(known)
    return [0.0 if value is None else (value - low) / (high - low) for value in raised]


@pytest.mark.parametrize("gamma", [1.1, 1.0, 3.0])
def test_scores_are_the_published_formula(gamma: float):
    rng = np.random.default_rng(0)
    attention, present = rng.random((5, 9)) ** 3, rng.random((5, 9)) < 0.7
    present[:, 4] = False  # a place that is always padding
    np.testing.assert_allclose(sink_scores(attention, gamma, present=present), slow_scores(attention, present, gamma))
    everywhere = np.ones_like(present)
    np.testing.assert_allclose(sink_scores(attention, gamma), slow_scores(attention, everywhere, gamma))


def test_scores_by_hand_take_the_power_of_the_mean_and_stay_finite_where_there_is_nothing_to_tell_apart():
    # Means 1, 2, 4; squares 1, 4, 16. The mean of squares would be 1, 5, 16.
    assert sink_scores([[1.0, 1.0, 4.0], [1.0, 3.0, 4.0]], 2.0).tolist() == [0.0, 0.2, 1.0]
    for same in (np.full((3, 4), 0.25), np.zeros((2, 4)), np.zeros((0, 4)), np.ones((1, 4))):
        assert sink_scores(same).tolist() == [0.0] * 4
    assert sink_scores(np.ones((2, 3)), present=np.zeros((2, 3))).tolist() == [0.0] * 3


def test_a_sink_is_above_the_mean_and_one_unbiased_deviation_of_what_carries_image():
    rng = np.random.default_rng(1)
    received, content = rng.random(40) ** 4, rng.random(40) < 0.8
    inside = received[content].tolist()
    mean = sum(inside) / len(inside)
    limit = mean + (sum((value - mean) ** 2 for value in inside) / (len(inside) - 1)) ** 0.5
    assert are_sinks(received, content).tolist() == [
        bool(c and r > limit) for r, c in zip(received, content, strict=True)
    ]
    assert not are_sinks(received, np.arange(40) == 3).any()


def test_shares_of_boxes_are_those_of_the_losses():
    rng = np.random.default_rng(2)
    low = rng.random((30, 2)) * 1.4 - 0.4
    boxes = np.concatenate([low, low + 0.05 + rng.random((30, 2)) * 0.5], axis=1).astype(np.float32)
    cells = box_array((grid_tile(5, 3),))
    here, there = (
        torch.cat([torch.from_numpy(part), torch.tensor([[0.0, 1.0]] * len(part))], 1) for part in (boxes, cells)
    )
    expected = overlap_matrix(here, there)
    np.testing.assert_allclose(overlaps(boxes, cells), expected, atol=1e-6)
    # Tokens of tiles, some of them in padding, are moved to a grid in one go.
    tiles = (Tile(5, 9, (-0.3, 0.1, 1.2, 0.8)), Tile(7, 4, (0.2, -0.6, 0.9, 1.4)), Tile(2, 1, (1.0, 0.0, 2.0, 1.0)))
    received = rng.random(sum(tile.token_count for tile in tiles))
    shares = overlaps(box_array(tiles), box_array((grid_tile(6, 6),)))
    np.testing.assert_allclose(on_cells(tiles, received, 6), received @ shares, atol=1e-6)


def pictures(layouts: list[tuple[Tile, ...]], seed: int = 3) -> list[tuple[tuple[Tile, ...], np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [(tiles, rng.random(sum(tile.token_count for tile in tiles)) / 9) for tiles in layouts]


def test_equal_layouts_are_compared_token_by_token_whatever_their_padding():
    padded = [(Tile(4, 4, (0.0, -1.0, 1.0, 2.0)),), (Tile(4, 4, (-0.5, 0.0, 1.5, 1.0)),), (grid_tile(4, 4),)]
    shown = pictures(padded)
    found = find_sinks(shown)
    assert found is not None
    assert (found.places, found.pictures, found.tiles) == ("token", 3, padded[0])
    attention = np.stack([received for _, received in shown])
    present = np.ones((3, 4, 4), bool)
    present[0, [0, 3]] = False  # rows that lie above and below the picture
    present[1][:, [0, 3]] = False
    present = present.reshape(3, 16)
    np.testing.assert_allclose(found.scores, slow_scores(attention, present, 1.1))
    np.testing.assert_allclose(found.received, np.where(present, attention, 0).sum(0) / present.sum(0))
    assert (
        found.often.tolist()
        == sum(are_sinks(a, p).astype(int) for a, p in zip(attention, present, strict=True)).tolist()
    )  # type: ignore[union-attr]
    assert found.on(padded[1]).tolist() == found.scores.tolist()
    # A student with half as many rows and columns has the mean of four, wherever the picture lies in the frame.
    halved = found.scores.reshape(2, 2, 2, 2).mean(axis=(1, 3)).ravel()
    np.testing.assert_allclose(found.on((Tile(2, 2, (0.0, -1.0, 1.0, 2.0)),)), halved)
    np.testing.assert_allclose(
        found.on((Tile(8, 8, (0.0, 0.0, 1.0, 1.0)),)).reshape(8, 8)[::2, ::2].ravel(), found.scores
    )


def test_pictures_of_more_or_fewer_equal_tiles_are_compared_within_a_tile():
    tile, half = Tile(2, 3, (0.0, 0.0, 0.5, 1.0)), Tile(2, 3, (0.5, 0.0, 1.0, 1.0))
    shown = pictures([(tile, half, grid_tile(2, 3)), (grid_tile(2, 3),)])
    found = find_sinks(shown)
    assert found is not None
    assert (found.places, found.pictures, found.tiles) == ("tile", 4, (grid_tile(2, 3),))
    attention = np.stack([*np.split(shown[0][1], 3), shown[1][1]])
    np.testing.assert_allclose(found.scores, sink_scores(attention))
    np.testing.assert_allclose(found.on((tile, half)), [*found.scores, *found.scores])
    np.testing.assert_allclose(found.on((Tile(1, 1, tile.region),)), [found.scores.mean()])


def test_pictures_of_different_grids_are_compared_on_cells_of_the_picture():
    layouts = [(grid_tile(24, 12),), (grid_tile(12, 24), Tile(1, 1, (1.0, 0.0, 2.0, 1.0)))]
    shown = pictures(layouts)
    found = find_sinks(shown)
    assert found is not None
    assert (found.places, found.pictures, found.tiles) == ("cell", 2, (grid_tile(12, 12),))
    first = shown[0][1].reshape(12, 2, 12).sum(axis=1).ravel()
    second = shown[1][1][:-1].reshape(12, 12, 2).sum(axis=2).ravel()  # a token beside the picture gives nothing
    np.testing.assert_allclose(found.scores, sink_scores(np.stack([first, second])))
    np.testing.assert_allclose(
        found.on(layouts[0]).reshape(12, 2, 12), np.repeat(found.scores.reshape(12, 1, 12), 2, 1)
    )
    assert found.on(layouts[1])[-1] == 0
    # What was pooled to a grid over the picture is about its cells, whatever the tiles.
    pooled = find_sinks([(layouts[0], np.arange(6.0)), (layouts[1], np.arange(6.0))], grid=(2, 3))
    assert pooled is not None
    assert (pooled.places, pooled.tiles) == ("cell", (grid_tile(2, 3),))


def test_nothing_is_found_where_no_picture_has_attention():
    assert find_sinks([]) is None
    assert find_sinks([((grid_tile(2, 2),), np.zeros(4))]) is None


def test_means_over_boxes_are_weighted_by_shared_area():
    source, target = box_array((grid_tile(1, 3),)), box_array((grid_tile(1, 2),))
    np.testing.assert_allclose(mean_over(np.array([0.0, 0.6, 0.9]), source, target), [0.2, 0.8], atol=1e-6)
