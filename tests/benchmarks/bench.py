"""Speed and size, as ratios measured side by side in one run: ``make bench``.

Every ratio is the median over interleaved repetitions (A B A B ...), so that a machine whose speed drifts slows both
sides alike; its spread is the lowest and the highest of them. A whole run stores its results beside this file, with
the machine and the versions, and writes the documentation's table from them. ``--only PART`` prints some parts and stores nothing.
Finished parts are kept in ``build/bench.json``; ``--go-on`` takes them from there after a run that was stopped.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from functools import cached_property
from pathlib import Path

import torch

from tests.benchmarks.bench_commands import bench_commands
from tests.benchmarks.bench_docs import bench_table, rewrite_pages
from tests.benchmarks.bench_epoch import bench_epoch
from tests.benchmarks.bench_fused import bench_fused
from tests.benchmarks.bench_measure import Measured, Values
from tests.benchmarks.bench_online import bench_online
from tests.benchmarks.bench_processes import bench_processes
from tests.benchmarks.bench_results import (
    STORED,
    Results,
    describe_machine,
    gather,
    read_parts,
    read_results,
    write_parts,
    write_results,
)
from tests.benchmarks.bench_scale import bench_scale
from tests.benchmarks.bench_stage_one import bench_stage_one
from tests.benchmarks.bench_storage import bench_codecs, bench_readers, build_builtin_cache
from tests.benchmarks.bench_training import bench_training
from vlm_distill_cache.stage2_student.run import set_up_libraries


class Scratch:
    """A folder for each part, and the built-in cache for those that need one, built once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, name: str) -> Path:
        """A new folder."""
        path = self._folder / name
        path.mkdir()
        return path

    @cached_property
    def builtin(self) -> tuple[Values, Path]:
        """What the built-in cache takes, and where it is."""
        return build_builtin_cache(self.folder("builtin"))


KEPT = Path("build/bench.json")
PARTS: dict[str, tuple[str, Callable[[Scratch], Measured]]] = {
    "stage-one": ("Stage one", lambda scratch: bench_stage_one(scratch.folder("stage-one"))),
    "training": (
        "Stage two",
        lambda scratch: bench_training(scratch.builtin[1], scratch.folder("training")),
    ),
    "online": (
        "Cached against online, as released",
        lambda scratch: bench_online(scratch.folder("online")),
    ),
    "processes": ("Processes", lambda scratch: bench_processes(scratch.folder("processes"))),
    "fused": ("Fused loss", lambda _: bench_fused()),
    "bytes": ("Cache", lambda scratch: ({}, scratch.builtin[0])),
    "codecs": ("Cache", lambda _: bench_codecs()),
    "readers": ("Cache", lambda scratch: bench_readers(scratch.builtin[1], scratch.folder("readers"))),
    "epoch": ("Cache", lambda scratch: bench_epoch(scratch.builtin[1], scratch.folder("epoch"))),
    "scale": ("Cache", lambda scratch: bench_scale(scratch.folder("scale"))),
    "commands": ("Commands", lambda scratch: ({}, bench_commands(scratch.builtin[1]))),
}
"""Of each part, the group of its rows, and what measures it."""


def prepare() -> None:
    """One thread, and libraries that keep quiet."""
    set_up_libraries()
    torch.set_num_threads(1)


def measure(names: Collection[str], kept: dict[str, Measured], keep: Callable[[], object]) -> Results:
    """Run parts, and say how long each took.

    Args:
        names: The parts wanted.
        kept: Parts that are measured already; each new one is added.
        keep: Called after each part.
    """
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        for name in (name for name in PARTS if name in names and name not in kept):
            started = time.monotonic()
            kept[name] = PARTS[name][1](scratch)
            keep()
            torch.set_num_threads(1)  # a part may have built a cache, which sets its own number
            sys.stderr.write(f"{name}: {time.monotonic() - started:.0f} s\n")
    measured: dict[str, list[Measured]] = {}
    for name in (name for name in PARTS if name in names):
        measured.setdefault(PARTS[name][0], []).append(kept[name])
    return gather(measured, describe_machine())


def main() -> None:
    """Measure and print; store a whole run."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--output", type=Path, help="write JSON here; the documentation and the stored results stay")
    parser.add_argument("--go-on", action="store_true", help="measure only what a stopped run left")
    options = parser.parse_args()
    prepare()
    kept = read_parts(KEPT) if options.go_on else {}
    results = measure(options.only or tuple(PARTS), kept, lambda: write_parts(kept, KEPT))
    sys.stdout.write(bench_table(results))
    if options.output is not None:
        write_results(results, options.output)
    elif options.only is None:
        before = read_results(STORED) if STORED.is_file() else None
        rewrite_pages(before, results)
        write_results(results, STORED)


if __name__ == "__main__":
    main()
