"""What a run of the battery found, as it is stored and as docs/reliability.md shows it."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

from tests.battery.battery_cases import ROOT
from tests.benchmarks.bench_results import describe_machine

STORED = ROOT / "tests" / "benchmarks" / "results" / "battery.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- battery -->\n", "<!-- /battery -->\n"
TITLES = {
    "kills": "a signal at a random moment, then the same command again",
    "damages": "a damaged, lost or swapped file of a cache, a run or a checkpoint",
    "hostile": "a hostile cache, chat template or data file, with checksums that fit",
    "transfers": "a faulty server or network, simultaneous pushes",
    "surroundings": "full disks, unreadable files, clocks that jump, names with escape sequences and scripts",
    "soak": "minutes of repeated epochs: memory and open files",
}


def describe(*, seed: str, share: float, seconds: float) -> dict[str, Any]:
    """When, of which code and on what machine."""
    return {
        "commit": _git("rev-parse", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain")),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seed": seed,
        "share": share,
        "minutes": round(seconds / 60, 1),
        "machine": describe_machine()
        | {"system": f"{platform.system()} {platform.release()}", "cores": os.cpu_count()},
    }


def _git(*words: str) -> str:
    try:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def table(results: Mapping[str, Any]) -> str:
    """The table and, above it, what it is of."""
    machine = results["machine"]
    share = "" if results["share"] == 1 else f"only a share of {results['share']:g} of the cases; "
    changed = ", with changes that were not committed" if results["changed"] else ""
    lines = [
        f"Commit `{results['commit'][:12]}`{changed}; {share}{results['date']}, seed {results['seed']}, "
        f"{results['minutes']:g} minutes "
        f"on {machine['cores']} cores ({machine['processor']}, Python {machine['python']}, torch {machine['torch']}).",
        "",
        "| what goes wrong | tried | refused in words | same result | failed |",
        "|---|---|---|---|---|",
    ]
    for kind, row in results["counts"].items():
        lines.append(
            f"| {TITLES[kind]} (`{kind}`) | {row['tried']} | {row['refused']} | {row['same']} | {row['failed']} |"
        )
    for failure in results["failures"]:
        first = " ".join(str(failure["message"]).split())[:200]
        lines.append("")
        lines.append(
            f"Failed: {failure['kind']} {failure['number']}, {failure['name']}: `{first.replace('`', chr(39))}`"
        )
    return "\n".join(lines) + "\n"


def store(results: Mapping[str, Any]) -> None:
    """Keep a whole run, and rewrite the page's table."""
    STORED.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table(results)}{END}{rest.partition(END)[2]}", encoding="utf-8")


def table_in_page() -> str:
    """What stands between the page's marks."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
