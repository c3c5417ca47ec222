"""Measured shares with intervals, paired between two models: every published score here is a ratio of sums over units.

A unit is what is resampled: an item, or a group of items that share a picture. Accuracy has denominators of 1; precision
counts the items that were called yes; F1 is 2 TP over 2 TP + FP + FN. Dims: U units, S bootstrap resamples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.stage2_student.scores.metrics import RESAMPLES, Score, summarise

_MOST_DRAWS = 20_000_000  # counts held at a time


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One score of a benchmark, unit by unit.

    Attributes:
        name: ``accuracy``; ``group``; of a subset ``accuracy/swap_obj``. Unique in its benchmark.
        units: What is resampled, unique ids; the same for the same items, whatever the model answers.
        hits: Numerators, float ``[U]``.
        of: Denominators, float ``[U]``, not negative.
        heading: What tables call it; empty: its name.
        factor: From the ratio to the printed number: 100 for percent, 1 for what has no unit.
        parts: Names of measures whose unweighted mean (times their number where ``summed``) this is, in place of a ratio of
            its own; its units are theirs. Empty: a ratio.
        summed: Whether the parts are added up, as MME's tasks are.
        gains: Whether more is better; None: neither (shares of yes, letter bias).
    """

    name: str
    units: Sequence[str] = ()
    hits: Sequence[float] = ()
    of: Sequence[float] = ()
    heading: str = ""
    factor: int = 100
    parts: Sequence[str] = ()
    summed: bool = False
    gains: bool | None = True


def mean_measure(name: str, units: Sequence[str], values: Sequence[float], **more: Any) -> Measure:
    """A plain mean over units."""
    return Measure(name=name, units=units, hits=list(values), of=[1.0] * len(units), **more)


def score(measure: Measure, others: Mapping[str, Measure], *, resamples: int = RESAMPLES) -> Score | None:
    """The value with a percentile interval from resampling the units, of each part apart.

    ``others`` are the benchmark's measures by name, among which the parts are.

    Returns:
        None where a denominator is 0: nothing was called yes, say, and there is no precision.
    """
    found = [_ratios([part], part.units, resamples, place) for place, part in enumerate(_parts(measure, others))]
    return _combined(measure, found)


def gain(
    after: Measure,
    before: Measure,
    others: tuple[Mapping[str, Measure], Mapping[str, Measure]],
    *,
    resamples: int = RESAMPLES,
) -> Score | None:
    """What one model scores more than another on the units that both have, resampled in pairs.

    ``others`` are the measures by name of the one and of the other.

    Returns:
        None where the two have different parts, share no unit, or a denominator is 0.
    """
    if tuple(after.parts) != tuple(before.parts):
        return None
    found = []
    for place, (one, other) in enumerate(zip(_parts(after, others[0]), _parts(before, others[1]), strict=True)):
        known = set(other.units)
        shared = [unit for unit in one.units if unit in known]
        found.append(_ratios([one, other], shared, resamples, place))
    return _combined(after, found)


def _parts(measure: Measure, others: Mapping[str, Measure]) -> list[Measure]:
    return [others[name] for name in measure.parts] if measure.parts else [measure]


def _ratios(
    measures: Sequence[Measure], units: Sequence[str], resamples: int, number: int
) -> tuple[float, NDArray[np.float64], int] | None:
    """The ratio of the first, less that of the second if there is one, over some units; and that of each resample ``[S]``.

    Last, how many of the units have a denominator. Both are resampled alike; parts of another ``number`` are not. A resample
    without a denominator counts as the ratio itself.
    """
    columns = []
    for measure in measures:
        place = {unit: index for index, unit in enumerate(measure.units)}
        chosen = [place[unit] for unit in units]
        columns += [np.asarray(column, np.float64)[chosen] for column in (measure.hits, measure.of)]
    table = np.stack(columns, axis=1)  # [U, 2 or 4]
    whole, counting = table.sum(axis=0), int((table[:, 1::2] > 0).any(axis=1).sum())
    if not len(units) or (whole[1::2] <= 0).any():
        return None
    generator = np.random.default_rng([0, number])  # parts that are drawn alike would rise and fall together
    sums = np.empty((resamples, table.shape[1]))
    # Units of equal counts are drawn as one: the same distribution, and 214,000 answers have ten values.
    table, counts = np.unique(table, axis=0, return_counts=True)  # [at most U, 2 or 4]
    block = max(1, _MOST_DRAWS // len(table))
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        draws = generator.multinomial(len(units), counts / len(units), size=stop - start)
        sums[start:stop] = draws @ table
    ratios = whole[0::2] / whole[1::2]  # [1 or 2]
    drawn = np.divide(sums[:, 0::2], sums[:, 1::2], out=np.tile(ratios, (resamples, 1)), where=sums[:, 1::2] > 0)
    sign = np.array([1.0, -1.0])[: len(ratios)]
    return float(ratios @ sign), drawn @ sign, counting


def _combined(measure: Measure, found: Sequence[tuple[float, NDArray[np.float64], int] | None]) -> Score | None:
    known = [entry for entry in found if entry is not None]
    if not known or len(known) < len(found):
        return None
    scale = 1 if measure.summed else len(known)
    resampled = np.sum([entry[1] for entry in known], axis=0) / scale
    return summarise(sum(entry[0] for entry in known) / scale, resampled, sum(entry[2] for entry in known))
