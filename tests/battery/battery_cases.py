"""One case of the battery and how it is judged: alone in a process, within a time, by what it left and said."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.battery.battery_process import GIB, Said, adopt_orphans, end_all

Work = Callable[[Path, random.Random], str]
"""Takes an empty folder and random numbers of its own; returns how it survived, or raises `Failed`."""
SAME, REFUSED = "same", "refused"
ROOT = Path(__file__).parents[2]
_BACKTRACE = re.compile(r"^Traceback \(most recent call last\)|^Exception ignored in|^Fatal Python error", re.M)
_LIBRARY = re.compile(r"[\w./-]*/((?:site-packages|python3\.\d+)/)")
_BUSY_S = 0.02


class Failed(Exception):  # noqa: N818 - a verdict, not an error
    """What should not have happened."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something that is done to this project.

    Attributes:
        kind: The line of the table that counts it.
        name: What is done.
        limit_s: Seconds after which it hangs.
    """

    kind: str
    name: str
    work: Work
    limit_s: float = 240.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a case; ``how`` is one of `SAME`, `REFUSED` and ``failed``."""

    kind: str
    number: int
    name: str
    how: str
    message: str = ""
    seconds: float = 0.0


def refuse_unclean(said: Said, *, limit_s: float | None = None, memory: int | None = None, what: str = "") -> None:
    """Fail on a traceback, a hang, processes left behind, an exit code of nobody's, or too much time or memory."""
    tail = said.text[-800:]
    if said.hung:
        raise Failed(f"{what} hung; killed after {said.seconds:.0f} s: {tail}")
    if _BACKTRACE.search(said.text):
        raise Failed(f"{what} ended with a traceback (exit code {said.code}): {tail}")
    if said.left:
        raise Failed(f"{what} left processes behind: {'; '.join(said.left)}: {tail}")
    if limit_s is not None and said.seconds > limit_s:
        raise Failed(f"{what} took {said.seconds:.1f} s, above {limit_s:.0f}: {tail}")
    if memory is not None and said.grown > memory:
        raise Failed(f"{what} took {said.grown / GIB:.2f} GiB: {tail}")


def refused(said: Said, *, what: str = "", **limits: float | int | None) -> bool:
    """Whether a command refused in words, False if it did its work; fails on anything else."""
    refuse_unclean(said, what=what, **limits)  # type: ignore[arg-type]
    if said.code not in (0, 1, 2):
        raise Failed(f"{what} ended with exit code {said.code}: {said.text[-800:]}")
    if said.code and not said.text.strip():
        raise Failed(f"{what} refused without a word (exit code {said.code})")
    return said.code != 0


def run_all(cases: Sequence[Case], *, seed: str, jobs: int, scratch: Path, numbers: Sequence[int]) -> Iterator[Outcome]:
    """Run cases, some at the same time, each in a fork and a folder of its own; yields what became of each as they end."""
    waiting = list(zip(numbers, cases, strict=True))[::-1]
    running: dict[int, tuple[int, Case, Path, float]] = {}
    adopt_orphans()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, case = waiting.pop()
            folder = scratch / f"{case.kind}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            sys.stdout.flush()
            process = os.fork()
            if process == 0:
                _judge(case, folder, random.Random(f"{seed} {case.kind} {number}"))
            running[process] = (number, case, folder, time.monotonic())
        ended, _ = os.waitpid(-1, os.WNOHANG)
        if ended in running:
            number, case, folder, began = running.pop(ended)
            yield _outcome(number, case, folder, time.monotonic() - began)
            continue
        for process, (_, case, folder, began) in running.items():
            if time.monotonic() - began > case.limit_s:
                (folder / "verdict.json").write_text(json.dumps(["failed", f"hung for {case.limit_s:.0f} s"]))
                end_all(frozenset(running) - {process})
        time.sleep(_BUSY_S)


def _outcome(number: int, case: Case, folder: Path, seconds: float) -> Outcome:
    try:
        how, message = json.loads((folder / "verdict.json").read_text())
    except (OSError, ValueError):
        how, message = "failed", "the case's own process died"
    for path, name in ((folder, "CASE"), (folder.parent, "SCRATCH"), (ROOT, ".")):
        message = message.replace(str(path), name)  # what is stored says nothing of this machine
    message = _LIBRARY.sub(r"\1", message)
    if how != "failed":
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(kind=case.kind, number=number, name=case.name, how=how, message=message, seconds=round(seconds, 1))


def _judge(case: Case, folder: Path, rng: random.Random) -> None:
    """Run a case and write its verdict; does not return."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    adopt_orphans()
    try:
        how, message = case.work(folder / "work", rng), ""
    except Failed as failure:
        how, message = "failed", str(failure)
    except BaseException:  # noqa: BLE001 - a case that cannot be judged did not survive
        how, message = "failed", f"the case itself: {traceback.format_exc()[-800:]}"
    if not (folder / "verdict.json").exists():
        (folder / "verdict.json").write_text(json.dumps([how, message]))
    end_all()
    os._exit(0)


def counts(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Tried, refused, same and failed, by kind."""
    found: dict[str, dict[str, int]] = {}
    for outcome in outcomes:
        row = found.setdefault(outcome.kind, {"tried": 0, REFUSED: 0, SAME: 0, "failed": 0})
        row["tried"] += 1
        row[outcome.how] += 1
    return found


def failures(outcomes: Sequence[Outcome]) -> list[dict[str, object]]:
    """Those that failed, as they are stored."""
    return [asdict(outcome) for outcome in outcomes if outcome.how == "failed"]
