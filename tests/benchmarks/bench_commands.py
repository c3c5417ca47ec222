"""How long commands take that need no model, from their start to their end. Part of ``make bench``."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

from tests.benchmarks.bench_measure import Spread, Values

COMMANDS = ("cachectl inspect", "cachectl verify", "teacher-cache --help", "distill --help")


def bench_commands(cache: Path, *, rounds: int = 7) -> Values:
    """Seconds of each command, in turn; ``cpu``: of the processor. A first round, which writes bytecode, is not counted.

    Args:
        cache: What is inspected and verified.
        rounds: Repetitions of each that count.
    """
    seconds: dict[str, list[tuple[float, float]]] = {command: [] for command in COMMANDS}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    for turn in range(rounds + 1):
        for command, spent in seconds.items():
            name, *options = command.split()
            words = [
                str(Path(sys.executable).with_name(name)),
                *options,
                *([] if "--help" in options else [str(cache)]),
            ]
            before, began = _processor_seconds(), time.perf_counter()
            subprocess.run(words, check=True, capture_output=True, env=environment)
            if turn:
                spent.append((time.perf_counter() - began, _processor_seconds() - before))
    return {
        f"{command}, s": Spread.of(clock for clock, _ in spent)._replace(cpu=Spread.of(cpu for _, cpu in spent)[:3])
        for command, spent in seconds.items()
    }


def _processor_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
