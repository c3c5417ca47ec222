"""What changed since the stored results: ``make bench-compare``, or ``... bench_compare OLD.json NEW.json``.

Without files it runs the whole bench, keeps its results in ``build/bench.json`` and compares them with the stored ones.
Ratios are judged by processor time where both results have it: what else the machine did changes it least.
"""

import sys
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.bench_docs import short
from tests.benchmarks.bench_results import STORED, Results, describe_machine, numbers, read_results, write_results

MACHINE = ("processor", "cores", "threads")
NOW = Path("build") / "bench.json"


class OtherMachineError(ValueError):
    """Two results that were not measured on one machine."""


class Change(NamedTuple):
    """One number then and now."""

    name: str
    stored: float
    now: float
    percent: float
    outside: bool
    """Of what was seen when the stored one was measured; False where nothing was repeated and nothing changed."""


def compare(old: Results, new: Results) -> list[Change]:
    """The numbers that both results have, the largest change first.

    Raises:
        OtherMachineError: If they are of two machines; shows both.
    """
    refuse_other_machine(old["machine"], new["machine"])
    then, now = numbers(old), numbers(new)
    robust_then, robust_now = old.get("cpu", {}), new.get("cpu", {})
    changes = []
    for name in (name for name in then if name in now):
        stored, found = then[name], now[name]
        lowest, highest = old.get("spreads", {}).get(name, (stored, stored))
        shown = name
        if name in robust_then and name in robust_now:
            (stored, lowest, highest), found = robust_then[name], robust_now[name][0]
            shown = f"{name}, processor time"
        percent = 100 * (found - stored) / abs(stored) if stored else 0.0
        changes.append(Change(shown, stored, found, percent, not lowest <= found <= highest))
    return sorted(changes, key=lambda change: -abs(change.percent))


def refuse_other_machine(old: dict[str, object], new: dict[str, object]) -> None:
    """Refuse a comparison that would be one of machines; other versions of libraries are what one may look for."""
    if any(old.get(part) != new.get(part) for part in MACHINE):
        shown = "\n".join(f"  {when}: {machine}" for when, machine in (("stored", old), ("now", new)))
        raise OtherMachineError(
            f"the two results are of different machines:\n{shown}\n"
            "Run the bench of the older code here (`python -m tests.benchmarks.bench --output OLD.json`) and compare "
            "with that: `python -m tests.benchmarks.bench_compare OLD.json NEW.json`"
        )


def change_table(old: Results, new: Results) -> str:
    """Changes as a table, those outside of the stored spread marked, and what only one of both has."""
    lines = ["| name | stored | now | change | outside the stored spread |", "|---|---|---|---|---|"]
    for change in compare(old, new):
        mark = "yes" if change.outside else ""
        shown = f"{short(change.stored)} | {short(change.now)} | {change.percent:+.1f} %"
        lines.append(f"| {change.name} | {shown} | {mark} |")
    then, now = numbers(old), numbers(new)
    lines += [f"gone: {name}" for name in then if name not in now]
    lines += [f"new: {name} {short(now[name])}" for name in now if name not in then]
    versions = {part for part in {*old["machine"], *new["machine"]} if part not in MACHINE}
    lines += [
        f"{part}: {old['machine'].get(part)}, now {new['machine'].get(part)}"
        for part in sorted(versions)
        if old["machine"].get(part) != new["machine"].get(part)
    ]
    return "\n".join(lines) + "\n"


def measure_now() -> tuple[Results, Results]:
    """The stored results, and those of this machine, measured if there is something to compare them with."""
    from tests.benchmarks.bench import PARTS, measure, prepare  # loads everything that is measured

    old = read_results(STORED)
    prepare()
    refuse_other_machine(old["machine"], describe_machine())
    new = measure(PARTS, {}, lambda: None)
    write_results(new, NOW)
    return old, new


def main(arguments: list[str]) -> int:
    """Compare two files, or this machine with the stored results."""
    if len(arguments) not in (0, 2):
        sys.stderr.write("usage: python -m tests.benchmarks.bench_compare [OLD.json NEW.json]\n")
        return 2
    try:
        old, new = [read_results(Path(name)) for name in arguments] if arguments else measure_now()
        sys.stdout.write(change_table(old, new))
    except (FileNotFoundError, OtherMachineError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
