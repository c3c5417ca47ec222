"""Medians with their spread, from calls that are timed in turn. Part of ``make bench``."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Spread(NamedTuple):
    """What was seen of one quantity over repetitions."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The median of at least one value, and the two ends."""
        seen = list(values)
        return cls(statistics.median(seen), min(seen), max(seen))


Values = dict[str, float | Spread]
"""By name; a plain number where there is nothing to repeat (bytes), or no spread was kept."""
Measured = tuple[Mapping[str, float | Spread], Mapping[str, float | Spread]]
"""Ratios and figures of a part of the bench."""


def ratio(above: Sequence[float], below: Sequence[float]) -> Spread:
    """The ratio of two quantities, each pair of it from one round, so that a drifting machine slows both alike."""
    return Spread.of(a / b for a, b in zip(above, below, strict=True))


def paired_seconds(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, before: Callable[[], Any] | None = None
) -> dict[str, list[float]]:
    """Time calls in turn (A B A B ...), after one round to warm up.

    Args:
        calls: By name.
        rounds: Repetitions of each that count.
        before: Called before each, untimed.

    Returns:
        Seconds of each call, ``rounds`` of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if before is not None:
                before()
            started = time.perf_counter()
            call()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median_seconds(call: Callable[[], Any], rounds: int) -> Spread:
    """Seconds of one call over repetitions, after one to warm up."""
    return Spread.of(paired_seconds({"call": call}, rounds=rounds)["call"])


def scaled(factor: float, spread: Spread) -> Spread:
    """The same quantity in another unit; ``factor`` is positive."""
    return Spread(factor * spread.median, factor * spread.lowest, factor * spread.highest)
