"""Ratios of ``make bench`` in instructions, which a shared machine does not disturb.

    make bench-instructions    # opt-in: needs valgrind; half an hour on one core

callgrind counts what one thread executes, of Python and arithmetic alike, but neither waiting nor what memory costs: of a
training the thread that computes its steps, over the same step with each of its losses; of stage one the thread that drives
the teacher. Two runs on one kind of processor agree to some in a thousand. Stores the ratios, and writes the table of
docs/results.md.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_docs import short, table_in

STORED = Path(__file__).parent / "results" / "bench_instructions.json"
BEGIN, END = "<!-- bench-instructions -->\n", "<!-- /bench-instructions -->\n"
SAMPLES = 96  # of the cache: none comes twice in the steps of a training
OF_STAGE_ONE = 16  # samples, one batch
NOTHING = "nothing"  # what telling callgrind to count takes itself
_TOTAL = re.compile(r"^desc: Trigger: dump (.+?)$.*?^summary: (\d+)$", re.MULTILINE | re.DOTALL)


def count_under_callgrind(words: list[str], folder: Path) -> dict[str, int]:
    """Run a command that uses `Counter`; the instructions of its first thread, by name.

    Args:
        words: The command.
        folder: Scratch.

    Raises:
        SystemExit: If there is no valgrind, or the command fails.
    """
    if shutil.which("valgrind") is None:
        raise SystemExit(
            "valgrind is not installed: run `apt-get install valgrind`, or use your system's package of it"
        )
    found = folder / "count"
    options = ["--tool=callgrind", "--instr-atstart=no", "--separate-threads=yes", f"--callgrind-out-file={found}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["valgrind", "--quiet", *options, *words], env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: ended with {done.returncode} under valgrind; see what it says above")
    return read_counts(folder)


def read_counts(folder: Path) -> dict[str, int]:
    """Instructions of the first thread by the names that `Counter` gave, less those of counting itself."""
    texts = (path.read_text() for path in sorted(folder.glob("count.*-01")))
    counts = {match[1]: int(match[2]) for text in texts if (match := _TOTAL.search(text))}
    own = counts.pop(NOTHING)
    return {name: count - own for name, count in counts.items()}


class Counter:
    """Tells the callgrind that this process runs under what to count."""

    def begin(self) -> None:
        """Count from here on."""
        self._tell("--instr=on")
        self._tell("--zero")

    def end(self, name: str) -> None:
        """Keep the count since `begin` under a name, and count no longer."""
        self._tell(f"--dump={name}")
        self._tell("--instr=off")

    def call(self, name: str, function: Callable[[], Any]) -> None:
        """Count one call."""
        self.begin()
        function()
        self.end(name)

    def _tell(self, what: str) -> None:
        subprocess.run(["callgrind_control", what, str(os.getpid())], check=True, capture_output=True)


def count_all(scratch: Path) -> None:
    """What is counted, in a process under callgrind, which is slow from its start on."""
    counter = Counter()
    counter.call(NOTHING, lambda: None)
    _count_steps(counter, scratch)
    _count_stage_one(counter, scratch)


class _Enough(Exception):  # noqa: N818 - not an error
    """What was to be counted is."""


def _count_steps(counter: Counter, scratch: Path) -> None:
    """The second step of each training: the first prepares what later ones use."""
    from tests.benchmarks.bench_training import LOSSES, TRAINABLE, train_for_bench

    cache = scratch / "builtin" / "cache"
    for phase in TRAINABLE:
        for losses in LOSSES:
            taken = 0

            def after_step(*_: object, name: str = f"{phase} step: {losses}") -> None:
                nonlocal taken
                taken += 1
                if taken == 1:
                    counter.begin()
                    return
                counter.end(name)
                raise _Enough

            with suppress(_Enough):
                train_for_bench(losses, after_step, cache=cache, folder=scratch / phase, phase=phase, steps=4)


def _count_stage_one(counter: Counter, scratch: Path) -> None:
    """The teacher's thread over a shard of one batch, and a bare pass over this batch."""
    from tests.benchmarks.bench_stage_one import bare_pass, batches_of
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
    from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard
    from vlm_distill_cache.stage1_teacher.planning.open import open_build

    work = open_build(BuildConfig(cache=str(scratch / "bare"), limit=OF_STAGE_ONE, threads=1))
    samples = [work.encoder(work.dataset[position]) for position in work.plan.shard_range(0)]
    batches = list(batches_of(work))

    def stage_one() -> None:
        for _ in run_shard(work, EncodedShard(index=0, samples=list(samples)), work.plan.batch_size):
            pass

    def bare() -> None:
        for batch in batches:
            bare_pass(work.teacher, batch)

    stage_one()
    counter.call("stage one, built-in teacher", stage_one)
    work.teacher.model.set_attn_implementation("sdpa")
    bare()
    counter.call("bare forward, built-in teacher", bare)


def ratios_of(counts: Mapping[str, int]) -> dict[str, float]:
    """Ratios by the names that ``make bench`` gives them."""

    def ratios() -> Iterator[tuple[str, float]]:
        for name, count in counts.items():
            step, _, losses = name.rpartition(": ")
            if step and losses != "SFT":
                yield f"{name} / SFT", count / counts[f"{step}: SFT"]
            kind, _, rest = name.partition(", ")
            if kind == "stage one":
                yield f"stage one / bare forward, {rest}", count / counts[f"bare forward, {rest}"]

    return dict(ratios())


def table(ratios: Mapping[str, float], machine: Mapping[str, Any]) -> str:
    """The table of docs/results.md."""
    rows = "".join(f"| {name} | {short(value)} |\n" for name, value in ratios.items())
    return f"| instructions; {machine['processor']}, torch {machine['torch']} | ratio |\n|---|---|\n{rows}"


def main() -> None:
    """Count, store, and write the page."""
    from tests.benchmarks.bench_results import describe_machine, rounded, write_results
    from tests.benchmarks.bench_storage import build_builtin_cache

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counted", type=Path, help="do what is counted, in this folder, under callgrind")
    arguments = parser.parse_args()
    if arguments.counted is not None:
        count_all(arguments.counted)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        build_builtin_cache(folder / "builtin", limit=SAMPLES)
        words = [sys.executable, "-m", "tests.benchmarks.bench_instructions", "--counted", scratch]
        counts = count_under_callgrind(words, folder)
    machine = describe_machine()
    ratios = {name: rounded(value) for name, value in ratios_of(counts).items()}
    write_results({"machine": machine, "instructions": counts, "ratios": ratios}, STORED)
    page = STORED.parents[3] / "docs" / "results.md"
    text = page.read_text()
    old, new = (f"{BEGIN}{block}{END}" for block in (table_in(text, BEGIN, END), table(ratios, machine)))
    page.write_text(text.replace(old, new))
    sys.stdout.write(json.dumps(ratios, indent=1) + "\n")


if __name__ == "__main__":
    main()
