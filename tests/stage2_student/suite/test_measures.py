"""Measures: ratios of sums with intervals, and paired gains, against resampling one draw at a time."""

import numpy as np
import pytest

from vlm_distill_cache.stage2_student.scores.metrics import summarise
from vlm_distill_cache.stage2_student.scores.results import format_score
from vlm_distill_cache.stage2_student.suite import measures
from vlm_distill_cache.stage2_student.suite.measures import Measure, gain, mean_measure, score


def named(*given: Measure) -> dict[str, Measure]:
    return {measure.name: measure for measure in given}


def slow(hits: np.ndarray, of: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """Draw units by index, one resample after another."""
    generator = np.random.default_rng(1)
    ratios = []
    for _ in range(resamples):
        drawn = generator.integers(0, len(of), len(of))
        ratios.append(hits[drawn].sum() / of[drawn].sum())
    return tuple(np.quantile(ratios, [0.025, 0.975]))


def test_a_ratio_and_its_interval_are_those_of_drawing_units_one_by_one(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(0)
    hits, of = generator.integers(0, 3, 120).astype(float), generator.integers(2, 6, 120).astype(float)
    measure = Measure(name="f1", units=[str(unit) for unit in range(120)], hits=hits, of=of)
    found = score(measure, {})
    assert found is not None
    assert found.value == pytest.approx(hits.sum() / of.sum())
    assert (found.low, found.high) == pytest.approx(slow(hits, of), abs=0.01)
    monkeypatch.setattr(measures, "_MOST_DRAWS", 120 * 7)  # in blocks
    assert score(measure, {}) == found


def test_gains_are_paired_by_unit_and_not_by_place():
    units = [str(unit) for unit in range(200)]
    values = np.random.default_rng(0).integers(0, 2, 200).astype(float)
    one = mean_measure("accuracy", units, values)
    same = mean_measure("accuracy", units[::-1], values[::-1])
    assert gain(one, same, ({}, {})).high == 0  # no doubt is left where the same items are right
    better = mean_measure("accuracy", units[:100], np.maximum(values[:100], np.arange(100) % 4 == 0))
    found = gain(better, one, ({}, {}))
    assert found.items == 100
    assert found.value == pytest.approx((np.asarray(better.hits) - values[:100]).mean())
    assert found.low > 0


def test_parts_are_resampled_apart():
    """The interval of a mean of equal parts is narrower than that of one; alike draws would leave it as wide."""
    parts = [mean_measure(f"a/{part}", [str(unit) for unit in range(40)], [1.0, 0.0] * 20) for part in range(9)]
    mean = Measure(name="a", parts=[part.name for part in parts])
    whole, one = score(mean, named(*parts)), score(parts[0], {})
    assert whole is not None
    assert one is not None
    assert (whole.high - whole.low) * 3 == pytest.approx(one.high - one.low, rel=0.15)
    worse = [mean_measure(part.name, part.units, [0.0, 1.0] * 20) for part in parts]
    difference = gain(mean, mean, (named(*parts), named(*worse)))
    alone = gain(parts[0], worse[0], ({}, {}))
    assert difference is not None
    assert alone is not None
    assert (difference.high - difference.low) * 3 == pytest.approx(alone.high - alone.low, rel=0.15)


def test_parts_are_averaged_without_weights_or_added_up():
    few, many = mean_measure("a/few", ["1", "2"], [1, 1]), mean_measure("a/many", ["3", "4", "5", "6"], [0, 0, 0, 1])
    mean = Measure(name="a", parts=["a/few", "a/many"])
    assert score(mean, named(few, many)).value == pytest.approx((1 + 0.25) / 2)
    assert score(mean, named(few, many)).items == 6
    total = Measure(name="a", parts=["a/few", "a/many"], summed=True)
    assert score(total, named(few, many)).value == pytest.approx(1.25)
    assert gain(mean, mean, (named(few, many), named(few, many))).value == 0


def test_without_a_denominator_there_is_no_score():
    nothing_called_yes = Measure(name="precision", units=["1"], hits=[0], of=[0])
    assert score(nothing_called_yes, {}) is None
    assert score(Measure(name="empty"), {}) is None
    assert gain(mean_measure("a", ["1"], [1]), mean_measure("a", ["2"], [1]), ({}, {})) is None
    assert gain(Measure(name="a", parts=["b"]), mean_measure("a", ["1"], [1]), ({}, {})) is None


def test_rounding_keeps_no_interval_from_0_and_none_without_width_is_shown_without_how_many_it_counts():
    nothing = summarise(0.1 + 0.2 - 0.3, np.full(9, 0.3 - 0.1 - 0.2), 9)
    assert (nothing.value, nothing.low, nothing.high) == (0, 0, 0)
    assert format_score(nothing, 100, sign="+") == ("+0.0", "[+0.0, +0.0] of 9")
    called_yes = [1.0] * 12 + [0.0] * 48
    precision = score(Measure(name="p", units=[str(unit) for unit in range(60)], hits=called_yes, of=called_yes), {})
    assert format_score(precision, 100) == ("100.0", "[100.0, 100.0] of 12")
    many = mean_measure("many", [str(unit) for unit in range(10)], [1, 0] * 5)
    assert format_score(score(many, {}), 100)[1].endswith("]")
    assert " of " not in format_score(score(many, {}), 100)[1]
    assert format_score(score(mean_measure("few", "abcd", [1, 0, 1, 0]), {}), 100)[1].endswith("] of 4")
