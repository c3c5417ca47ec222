"""Cases whose verdict is known: run as ``python -m tests.battery.battery_judged FOLDER``; prints what the battery makes of them."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.battery import battery_process
from tests.battery.battery_cases import REFUSED, SAME, Case, Failed, refused, run_all
from tests.battery.battery_process import GIB, call, start


def _say(text: str, code: int) -> None:
    sys.stdout.write(text)
    raise SystemExit(code)


def _leave_a_process() -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(600)


def judge(name: str, folder: Path, _rng: random.Random) -> str:
    """As the cases judge a command, with small limits."""
    killed, slow = (3 if name == HANGS else 60), (0.5 if name == SLOW else 30)
    said = call(FUNCTIONS[name], folder / "said.txt", limit_s=killed)
    return REFUSED if refused(said, limit_s=slow, memory=GIB // 16) else SAME


def known(folder: Path, _rng: random.Random) -> str:
    """A command of ours that is wrong, and is told to stop while it waits."""
    said = start(["cachectl", "verify", str(folder / "none")], folder / "said.txt").finish(30)
    if not refused(said):
        raise Failed("a cache that is not there is sound")
    waiting = start([], folder / "waits.txt", before=lambda: time.sleep(600)).finish(
        30, after=0.2, number=signal.SIGTERM
    )
    return SAME if waiting.code == -signal.SIGTERM else REFUSED


def _hang(_folder: Path, _rng: random.Random) -> str:
    time.sleep(600)
    return SAME


SLOW, HANGS = "too slow", "a command that hangs"
FUNCTIONS: dict[str, Callable[[], object]] = {
    "fine": lambda: None,
    "refuses": partial(_say, "error: no", 1),
    "refuses without a word": partial(_say, "", 1),
    "an exit code of nobody's": partial(_say, "error", 7),
    "a traceback": lambda: 1 / 0,
    "a traceback that it survives": partial(_say, "Traceback (most recent call last):\n", 0),
    SLOW: lambda: time.sleep(1),
    HANGS: lambda: time.sleep(600),
    "leaves a process": _leave_a_process,
    "takes memory": lambda: bytearray(GIB // 8).count(1),
    "dies": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


def main() -> None:
    """Print the verdicts as JSON."""
    battery_process.GRACE_S = 1.0
    cases = [Case(kind="known", name=name, work=partial(judge, name)) for name in FUNCTIONS]
    cases.append(Case(kind="known", name="a command of ours", work=known))
    cases.append(Case(kind="known", name="a case that hangs", work=_hang, limit_s=2))
    found = run_all(cases, seed="1", jobs=8, scratch=Path(sys.argv[1]), numbers=range(len(cases)))
    sys.stdout.write(json.dumps({outcome.name: [outcome.how, outcome.message] for outcome in found}))


if __name__ == "__main__":
    main()
