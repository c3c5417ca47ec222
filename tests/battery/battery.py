"""How this project stands what goes wrong: kills, damages, hostile values, faulty transfers, full disks, a long run.

    make battery        # opt-in: under half an hour on 2 cores

Every case runs a real command against this code, in a process of its own, and is judged from outside: bytes compared with
those of an undisturbed run, exit codes, output, time, memory, processes left. What fails is printed with what repeats it,
and the exit code is 1. A whole run is stored, and docs/reliability.md written from it.
"""

import argparse
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import tqdm

from tests.battery.battery_cases import Case, Outcome, counts, failures, run_all
from tests.battery.battery_damages import damages
from tests.battery.battery_hostile import hostile
from tests.battery.battery_kills import kills
from tests.battery.battery_material import Material, make_material
from tests.battery.battery_page import STORED, describe, store, table
from tests.battery.battery_process import end_all
from tests.battery.battery_surroundings import soak, surroundings, unmount_all
from tests.battery.battery_transfers import transfers

KINDS: dict[str, Callable[[Material], list[Case]]] = {
    "kills": kills, "damages": damages, "hostile": hostile, "transfers": transfers, "surroundings": surroundings, "soak": soak,
}  # fmt: skip
WAITING = {"transfers": 4}  # times as many at once: they wait more than they work
_AT_LEAST = 2  # of a kind, however small the share


def chosen(cases: list[Case], share: float, only: list[int]) -> list[int]:
    """The numbers of the cases to run: spread evenly over all, or those asked for."""
    if only:
        return [number for number in only if number < len(cases)]
    count = min(len(cases), max(_AT_LEAST, round(share * len(cases))))
    return [int(place * len(cases) / count) for place in range(count)]


def run_battery(
    kinds: list[str], *, seed: str, share: float, jobs: int, only: list[int], scratch: Path
) -> list[Outcome]:
    """Run kinds of cases, one kind after the other; says how far it is on one line, and what failed on lines of their own."""
    began = time.monotonic()
    for name in ("HOME", "XDG_CACHE_HOME", "VLM_DISTILL_CACHE_DIR"):  # nothing is remembered beyond this run
        os.environ[name] = str(scratch / "home")
    made = make_material(scratch / "material")
    gc.freeze()  # what is loaded needs no collecting in the forks
    outcomes: list[Outcome] = []
    for kind in kinds:
        cases = KINDS[kind](made)
        numbers = chosen(cases, share, only)
        for outcome in run_all(
            [cases[n] for n in numbers], seed=seed, jobs=jobs * WAITING.get(kind, 1), scratch=scratch, numbers=numbers
        ):
            outcomes.append(outcome)
            if outcome.how == "failed":
                again = f"--only {kind} --seed {seed} --case {outcome.number}"
                print(f"\rFAILED {outcome.name} ({again}, {outcome.seconds} s): {outcome.message}", flush=True)
            failed = sum(o.how == "failed" for o in outcomes)
            done = sum(o.kind == kind for o in outcomes)
            if sys.stdout.isatty() or done == len(numbers):
                print(
                    f"\r{kind} {done}/{len(numbers)}; {failed} failed; {time.monotonic() - began:.0f} s ",
                    end="",
                    flush=True,
                )
        print(flush=True)
    return outcomes


def main() -> int:
    """Run, print the table, store a whole run."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.battery.battery",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--case", nargs="+", type=int, default=[], metavar="N", help="only these cases of each kind")
    parser.add_argument("--seed", default="1", help="other random moments, places and values")
    parser.add_argument("--share", type=float, default=1.0, help="of the cases of each kind")
    parser.add_argument("--store", action="store_true", help="store and show it although it is a share")
    parser.add_argument("--jobs", type=int, default=2, help="cases at the same time")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread of ours may live through a fork
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = Path(tempfile.mkdtemp(prefix="battery-"))
    began = time.monotonic()
    try:
        outcomes = run_battery(
            given.only or list(KINDS),
            seed=given.seed,
            share=given.share,
            jobs=given.jobs,
            only=given.case,
            scratch=scratch,
        )
    finally:
        end_all()
        unmount_all(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
    results = describe(seed=given.seed, share=given.share, seconds=time.monotonic() - began)
    results |= {"counts": counts(outcomes), "failures": failures(outcomes)}
    print(table(results), end="")
    if given.only is None and not given.case and (given.share == 1 or given.store):
        store(results)
        print(f"stored in {STORED}")
    return int(bool(results["failures"]))


if __name__ == "__main__":
    sys.exit(main())
