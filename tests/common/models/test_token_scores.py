"""Scores, choices and pools of visual tokens against loops and values by hand."""

import pytest
import torch

from vlm_distill_cache.common.models.tokens.visual_tokens import (
    choose,
    picture_noise,
    pool_cells,
    pooled_grid,
    predicted_gaze,
    repeated_places,
    split_budget,
    without,
    without_sinks,
)


def test_the_best_tokens_are_chosen_and_of_equal_ones_the_first():
    scores = torch.randint(0, 5, (6, 9), generator=torch.Generator().manual_seed(0)).float()
    scores[2, 4:] = -torch.inf
    for k in range(10):
        expected = torch.zeros(6, 9, dtype=torch.bool)
        for m, row in enumerate(scores.tolist()):
            for n in sorted(range(9), key=lambda n: (-row[n], n))[:k]:
                expected[m, n] = row[n] > -torch.inf
        assert torch.equal(choose(scores, k), expected)
    assert choose(scores, [0, 1, 2, 3, 4, 9]).sum(1).tolist() == [0, 1, 2, 3, 4, 9]


def test_sinks_count_against_attention_and_a_regression_is_a_line():
    left = without_sinks(torch.tensor([0.5, 0.3, 0.2]), torch.tensor([1.0, 0.0, 0.5]), 0.3)
    torch.testing.assert_close(left, torch.tensor([0.2, 0.3, 0.05]))
    features = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=torch.bfloat16)
    assert predicted_gaze(features, torch.tensor([3.0, 4.0]), -5.0).tolist() == [6.0, -9.0]


@pytest.mark.parametrize(
    ("rows", "cols", "k", "expected"),
    [(24, 24, 144, (12, 12)), (24, 24, 23, (5, 4)), (24, 24, 3, (1, 3)), (2, 6, 4, (1, 4)), (10, 1, 4, (4, 1)), (3, 3, 9, (3, 3))],
)  # fmt: skip
def test_a_pooled_grid_is_as_large_as_square_cells_allow(rows, cols, k, expected):
    assert pooled_grid(rows, cols, k) == expected
    for most in range(1, rows * cols + 1):
        r, c = pooled_grid(rows, cols, most)
        assert 1 <= r <= rows
        assert 1 <= c <= cols
        assert r * c <= most


@pytest.mark.parametrize(("rows", "cols", "k"), [(4, 4, 4), (5, 7, 9), (3, 8, 23), (6, 6, 1), (27, 27, 100)])
def test_cells_are_disjoint_rectangles_and_their_middle_stands_for_them(rows, cols, k):
    index = torch.arange(rows * cols)
    stands = pool_cells(index // cols, index % cols, rows, cols, k)
    r, c = pooled_grid(rows, cols, k)
    assert len(stands.unique()) == r * c
    for middle in stands.unique().tolist():
        members = (stands == middle).nonzero()[:, 0]
        y, x = (members // cols).unique(), (members % cols).unique()
        assert len(members) == len(y) * len(x)
        assert rows // r <= len(y) <= -(-rows // r)
        assert cols // c <= len(x) <= -(-cols // c)
        assert middle == y[(len(y) - 1) // 2] * cols + x[(len(x) - 1) // 2]
    # Of a cell without its middle the first token stands; line ends stand for nothing.
    some = pool_cells(torch.tensor([0, -1, 1, 1]), torch.tensor([1, -1, 0, 1]), 2, 2, 1)
    assert some.tolist() == [0, -1, 0, 0]


def test_what_is_left_of_a_pool_is_fed_when_its_middle_is_gone():
    stands = torch.tensor([[1, 1, 1, 4, 4, -1]]).expand(3, -1)
    gone = torch.zeros(3, 6, dtype=torch.bool)
    gone[0, 1] = gone[1, 0] = gone[2, 3] = gone[2, 4] = True
    assert without(stands, gone).tolist() == [[0, -1, 0, 4, 4, -1], [-1, 1, 1, 4, 4, -1], [1, 1, 1, -1, -1, -1]]


def test_a_budget_is_divided_in_proportion():
    assert split_budget([9, 9, 15], 10) == [3, 3, 4]
    assert split_budget([9, 9, 9], 2) == [1, 1, 0]
    assert split_budget([4, 2], 99) == [4, 2]


def test_places_that_stay_alike_repeat_and_sinks_sooner():
    frames = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(1))
    frames[2, 1] = 3 * frames[1, 1]
    sinks = torch.linspace(0, 1, 6)
    found = repeated_places(frames, sinks, above=0.3, sink_weight=0.5)
    for t in range(4):
        for place in range(6):
            if t == 0:
                assert not found[t, place]
                continue
            a, b = frames[t - 1, place], frames[t, place]
            alike = float(a @ b / (a.norm() * b.norm())) + 0.5 * float(sinks[place])
            assert bool(found[t, place]) == (alike > 0.3)
    assert repeated_places(frames, None, above=0.999).nonzero().tolist() == [[2, 1]]
    assert repeated_places(frames[:1], None, above=0.0).tolist() == [[False] * 6]


def test_noise_is_of_the_picture_and_the_seed():
    picture = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(2))
    first = picture_noise(picture, 9, 0)
    assert torch.equal(first, picture_noise(picture.to(torch.bfloat16), 9, 0))
    assert not torch.equal(first, picture_noise(picture, 9, 1))
    assert not torch.equal(first, picture_noise(picture + 1, 9, 0))
