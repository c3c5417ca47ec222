"""Medians with their spread, from calls that are timed in turn. Part of ``make bench``.

Ratios are of the clock, and of processor time where it is known: what else a machine does changes that least.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Seconds(float):
    """Seconds of the clock; ``cpu``: of a processor, that the same work took. Sums and products forget these."""

    cpu: float

    def __new__(cls, clock: float, cpu: float) -> "Seconds":
        """Both of one piece of work."""
        seconds = super().__new__(cls, clock)
        seconds.cpu = cpu
        return seconds


class Watch:
    """Measures work from its making on.

    Args:
        thread: Processor time of this thread alone, not of the process.
    """

    def __init__(self, *, thread: bool = False) -> None:
        self._cpu = time.thread_time if thread else time.process_time
        self._begin, self._begin_cpu = time.perf_counter(), self._cpu()

    def seconds(self) -> Seconds:
        """What was spent so far."""
        return Seconds(time.perf_counter() - self._begin, self._cpu() - self._begin_cpu)


class Spread(NamedTuple):
    """What was seen of one quantity over repetitions; ``cpu``: the same of processor time."""

    median: float
    lowest: float
    highest: float
    cpu: tuple[float, float, float] | None = None

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
    pairs = list(zip(above, below, strict=True))
    spread = Spread.of(a / b for a, b in pairs)
    cpu = [(a.cpu, b.cpu) for a, b in pairs if isinstance(a, Seconds) and isinstance(b, Seconds)]
    return spread._replace(cpu=Spread.of(a / b for a, b in cpu)[:3]) if len(cpu) == len(pairs) else spread


def paired_seconds(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, before: Callable[[], Any] | None = None
) -> dict[str, list[Seconds]]:
    """Time calls in turn (A B A B ...), after one round to warm up.

    Args:
        calls: By name.
        rounds: Repetitions of each that count.
        before: Called before each, untimed.

    Returns:
        `Seconds` of each call, ``rounds`` of them; of the processor, all threads.
    """
    seconds: dict[str, list[Seconds]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if before is not None:
                before()
            watch = Watch()
            call()
            if turn:
                seconds[name].append(watch.seconds())
    return seconds


def median_seconds(call: Callable[[], Any], rounds: int) -> Spread:
    """Seconds of one call over repetitions, after one to warm up."""
    return Spread.of(paired_seconds({"call": call}, rounds=rounds)["call"])


def scaled(factor: float, spread: Spread) -> Spread:
    """The same quantity in another unit; ``factor`` is positive."""
    return Spread(factor * spread.median, factor * spread.lowest, factor * spread.highest)
