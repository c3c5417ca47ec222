"""The gaze through an answer: equal to a slow reading of the rule, and to values by hand."""

import numpy as np
import pytest

from vlm_distill_cache.common.attention.shift import gaze_shift, kept_count, ratio_intervals


def slow_best(shares, k):
    """The k best places, the lower one of equals, one after the other."""
    left = list(range(len(shares)))
    chosen = []
    for _ in range(k):
        best = max(left, key=lambda place: (shares[place], -place))
        chosen.append(best)
        left.remove(best)
    return set(chosen)


def slow_shift(gaze, k, threshold):
    shares = [[value / sum(row) for value in row] for row in gaze]
    kept = first = slow_best(shares[0], k)
    found = []
    for row in shares:
        own = slow_best(row, k)
        on_first, best = sum(row[p] for p in first), sum(row[p] for p in own)
        event = sum(row[p] for p in kept) < threshold * best
        if event:
            kept = own
        found.append((on_first, best, len(own & first) / k, event))
    return found


@pytest.mark.parametrize(("places", "keep", "threshold"), [(9, None, 0.75), (7, 3, 0.9), (4, 4, 0.75), (2, None, 1.0)])
def test_it_follows_the_rule_as_a_slow_reading_does(places, keep, threshold):
    rng = np.random.default_rng(places)
    gaze = rng.integers(0, 6, (12, places)) / 10 + 1e-3  # with ties
    found = gaze_shift(gaze, keep=keep, threshold=threshold)
    expected = slow_shift(gaze.tolist(), keep or max(1, places // 3), threshold)
    np.testing.assert_allclose(np.stack([found.first, found.best, found.common], 1), [row[:3] for row in expected])
    assert found.event.tolist() == [row[3] for row in expected]
    assert found.event.any() == (places != 4)  # all places kept: nothing can shift


def test_by_hand():
    gaze = np.array(
        [[6, 3, 1, 0, 0, 0], [0, 0, 2, 2, 0, 0], [0, 0, 1, 3, 0, 0], [0, 0, 0, 0, 0, 0], [5, 5, 0, 0, 0, 0]]
    )
    found = gaze_shift(gaze)
    assert (kept_count(6), found.kept.tolist()) == (2, [0, 1])
    np.testing.assert_allclose(found.first, [0.9, 0, 0, np.nan, 1])
    np.testing.assert_allclose(found.best, [0.9, 1, 1, np.nan, 1])
    np.testing.assert_allclose(found.common, [1, 0, 0, np.nan, 1])
    # The second looks elsewhere; the third where the second did; the last goes back: with token 0's places it would have
    # been no event, with those of the second it is one.
    assert found.event.tolist() == [False, True, False, False, True]
    assert found.measured.tolist() == [True, True, True, False, True]
    still = np.random.default_rng(0).random((1, 300)).repeat(5, axis=0)
    assert not gaze_shift(still, threshold=1.0).event.any()  # to the last bit
    blind = gaze_shift(np.array([[0.0, 0], [1, 0]]))
    assert not blind.measured.any()
    assert not blind.event.any()
    assert gaze_shift(np.zeros((0, 3))).event.shape == (0,)
    with pytest.raises(ValueError, match=r"k from 1 to 6, got 7"):
        gaze_shift(gaze, keep=7)
    with pytest.raises(ValueError, match=r"gaze \[T, C\]"):
        gaze_shift([1.0, 2.0])


def test_intervals_are_of_samples_and_cover_the_mean():
    """Against a plain loop that draws samples again, each with all that it holds."""
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 5, (30, 1)).astype(float)
    sums = counts * rng.random((30, 1))
    [found] = ratio_intervals(sums, counts)
    means = []
    for _ in range(2000):
        drawn = rng.integers(0, 30, 30)
        means.append(sums[drawn].sum() / counts[drawn].sum())
    assert found.value == pytest.approx(sums.sum() / counts.sum())
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)).tolist(), abs=0.02)
    assert np.isnan(ratio_intervals(sums, 0 * counts)).all()
    [one] = ratio_intervals(sums[counts[:, 0] > 0][:1], counts[counts[:, 0] > 0][:1])
    assert one.value == pytest.approx(one.low) == pytest.approx(one.high)
