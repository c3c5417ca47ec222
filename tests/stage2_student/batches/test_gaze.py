"""The teacher's gaze on a student's tokens, and the regression that expects it, against slow references."""

import numpy as np
import pytest
import torch

from vlm_distill_cache.common.attention.boxes import tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.gaze import FLOOR, RIDGE, fit_gaze, gaze_on

FINE = 240  # points a side of the slow reference


def rastered(cells, grid, tiles):
    """The mass under each token's box, point by point."""
    rows, cols = grid
    points = (np.arange(FINE) + 0.5) / FINE
    density = np.asarray(cells).reshape(grid).repeat(FINE // rows, 0).repeat(FINE // cols, 1) * rows * cols / FINE**2
    found = []
    for x0, y0, x1, y1 in tile_boxes(tiles)[:, :4].tolist():
        inside = np.outer((points >= y0) & (points < y1), (points >= x0) & (points < x1))
        found.append(float(density[inside].sum()))
    return np.array(found)


@pytest.mark.parametrize(
    "tiles",
    [
        (grid_tile(6, 6),),
        (grid_tile(5, 3),),
        (Tile(rows=8, cols=8, region=(0.0, -0.5, 1.0, 1.5)),),  # padded above and below
        (grid_tile(4, 4), Tile(rows=4, cols=4, region=(0.0, 0.0, 0.5, 1.0))),  # a thumbnail and a tile
    ],
)
def test_a_gaze_falls_on_tokens_by_area(tiles):
    cells = torch.rand(16, generator=torch.Generator().manual_seed(0))
    found = gaze_on(cells, (grid_tile(4, 4),), tiles)
    assert np.allclose(found.numpy(), rastered(cells, (4, 4), tiles), atol=1e-6)
    whole = grid_tile(6, 6)
    assert float(gaze_on(cells, (grid_tile(4, 4),), (whole,)).sum()) == pytest.approx(float(cells.sum()), rel=1e-6)


def test_the_regression_minimises_what_it_says_and_finds_a_linear_gaze():
    rng = np.random.default_rng(0)
    true = rng.normal(size=5)
    pictures = []
    for _ in range(40):
        features = rng.normal(size=(16, 5)) * [1, 10, 0.1, 1, 1] + [0, 100, 0, 0, 0]
        features = np.concatenate([features, np.full((16, 1), 7.0)], axis=1)  # a constant: no weight
        gaze = np.exp((features[:, :5] - [0, 100, 0, 0, 0]) / [1, 10, 0.1, 1, 1] @ true * 0.3)
        pictures.append((features.astype(np.float32), (3 * gaze).astype(np.float32)))
    found = fit_gaze(pictures, where="here")
    x = np.concatenate([features for features, _ in pictures]).astype(np.float64)
    y = np.concatenate([np.log(np.maximum(g * 16 / g.sum(), FLOOR)) for _, g in pictures])
    weights = np.array(found["weights"])
    assert weights[5] == 0
    # The loss's gradient by finite differences: mean squared error plus RIDGE times the squares of scaled weights.
    scale = x.std(axis=0)

    def loss(w, b):
        return np.mean((x @ w + b - y) ** 2) + RIDGE * np.sum((w * scale)[:5] ** 2)

    best = loss(weights, found["bias"])
    for step in (1e-3, -1e-3):
        for place in range(5):
            moved = weights.copy()
            moved[place] += step / scale[place]
            assert loss(moved, found["bias"] - step / scale[place] * x[:, place].mean()) > best
    order = np.corrcoef(x @ weights, y)[0, 1]
    assert order > 0.97
    with pytest.raises(CacheMismatchError, match="no sample has a picture that the teacher looked at"):
        fit_gaze([(x[:4], np.zeros(4, np.float32))], where="here")
