"""Signals at random moments; then the same command again, which must come to what an undisturbed one comes to."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.battery.battery_cases import SAME, Case, Failed, refuse_unclean
from tests.battery.battery_material import (
    CACHES,
    Material,
    build,
    left_by_training,
    refuse_differences,
    train,
    tree,
)
from tests.battery.battery_process import run, start

_SIGNALS = (signal.SIGKILL,) * 6 + (signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_FIRST_S = 0.15  # before, the command's own first line has not run
_STARTS_S = 8.0  # of a program that imports everything, on a busy machine
_LIMIT_S = 150.0


def disturb(
    folder: Path,
    rng: random.Random,
    *,
    command: Callable[[Path], list[str]],
    look: Callable[[Path], dict[str, object]],
    expected: dict[str, object],
    seconds: float,
    forked: bool = True,
) -> str:
    """Send a signal to a command, once or twice; then run it again and compare."""
    target = folder / "target"
    for _ in range(rng.choice((1, 1, 2))):
        number, moment = rng.choice(_SIGNALS), rng.uniform(_FIRST_S, max(2 * _FIRST_S, 0.95 * seconds))
        said = start(command(target), folder / "stopped.txt", forked=forked).finish(
            _LIMIT_S, after=moment, number=number
        )
        what = f"{signal.Signals(number).name} after {moment:.2f} s"
        refuse_unclean(said, what=what)
        if said.code not in (0, 1, 128 + number, -number):
            raise Failed(f"{what}: exit code {said.code}: {said.text[-800:]}")
    said = run(command(target), folder / "again.txt", limit_s=_LIMIT_S, forked=forked)
    refuse_unclean(said, what=f"{what}, then again")
    if said.code:
        raise Failed(f"{what}, then again: exit code {said.code}: {said.text[-800:]}")
    refuse_differences(look(target), expected, f"{what}, then again")
    return SAME


def kills(made: Material) -> list[Case]:
    """All cases: builds, runs, and the tools that write caches."""
    zarr = made.caches["zarr"]
    expected = {name: tree(cache) for name, cache in made.caches.items()}
    finished = left_by_training(made.finished)
    cases = []

    def add(count: int, name: str, **how: object) -> None:
        cases.extend(Case(kind="kills", name=name, work=partial(disturb, **how)) for _ in range(count))  # type: ignore[arg-type]

    for name, count in (("zarr", 18), ("webdataset", 10)):
        add(
            count,
            f"teacher-cache build --store {name}",
            command=partial(build, **CACHES[name]),
            look=tree,
            expected=expected[name],
            seconds=made.seconds["build zarr"],
        )
    add(
        24,
        "distill run",
        command=partial(train, "run", zarr),
        look=left_by_training,
        expected=finished,
        seconds=made.seconds["run"],
    )
    add(
        6,
        "distill train",
        command=partial(train, "train", zarr),
        look=left_by_training,
        expected=left_by_training(made.trained["zarr"]),
        seconds=made.seconds["train zarr"],
    )
    add(
        5,
        "teacher-cache build --nproc 2",
        command=lambda target: [*build(target, **CACHES["zarr"]), "--nproc", "2"],
        look=tree,
        expected=expected["zarr"],
        seconds=2 * _STARTS_S + made.seconds["build zarr"],
        forked=False,
    )
    for verb, name in (("pull", "zarr"), ("push", "webdataset")):
        add(
            3,
            f"cachectl {verb}",
            command=partial(
                lambda verb, name, target: ["cachectl", verb, str(made.caches[name]), str(target)], verb, name
            ),
            look=tree,
            expected=expected[name],
            seconds=0.5,
        )
    cases += [
        Case(kind="kills", name="distill run --nproc 2", work=partial(launcher, made), limit_s=600) for _ in range(3)
    ]
    return cases


def launcher(made: Material, folder: Path, rng: random.Random) -> str:
    """Kill one of the processes of a training in two, which must end all; then finish the run."""
    command = [*train("run", made.caches["zarr"], folder / "target"), "--nproc", "2"]
    number, moment = rng.choice(_SIGNALS), rng.uniform(2, 4 * _STARTS_S)
    said = start(command, folder / "stopped.txt", forked=False).finish(300, after=moment, number=number)
    what = f"{signal.Signals(number).name} after {moment:.2f} s"
    refuse_unclean(said, what=what)
    for place in (folder / "target", folder / "whole"):
        command[command.index("--output") + 1] = str(place)
        said = run(command, folder / "again.txt", limit_s=300, forked=False)
        refuse_unclean(said, what=f"{what}, then again")
        if said.code:
            raise Failed(f"{what}, then again: exit code {said.code}: {said.text[-800:]}")
    refuse_differences(left_by_training(folder / "target"), left_by_training(folder / "whole"), what)
    shutil.rmtree(folder / "whole")
    return SAME
