"""The document that ``make bench`` stores: machine, ratios, figures, their spreads, and the groups they stand in."""

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import zarr

from tests.benchmarks.bench_measure import Measured, Spread

STORED = Path(__file__).parent / "results" / "bench.json"
Results = dict[str, Any]
"""``ratios`` and ``figures``: {name: number}; ``spreads``: {name: [lowest, highest]} of those that were repeated; ``cpu``:
{name: [median, lowest, highest]} of the ratios of processor time; ``groups``: {title: [names]} in order; ``machine``."""


def describe_machine() -> dict[str, Any]:
    """Processor, cores and threads, how many processes want to run, and the versions of what computes."""
    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zarr": zarr.__version__,
    }


def processor_name() -> str:
    """As Linux names it, with its architecture; elsewhere the architecture."""
    architecture = platform.machine()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0]} ({architecture})" if named else architecture


def rounded(value: float) -> float:
    """To four digits: more are noise."""
    return float(f"{value:.4g}")


def gather(parts: Mapping[str, list[Measured]], machine: Mapping[str, Any]) -> Results:
    """Join what the parts measured.

    Args:
        parts: Ratios and figures of each part, by the title of its group.
        machine: As `describe_machine` says.

    Raises:
        ValueError: If two parts use one name.
    """
    results: Results = {"machine": dict(machine), "ratios": {}, "figures": {}, "spreads": {}, "cpu": {}, "groups": {}}
    for title, measured in parts.items():
        # All ratios of a group stand before its figures.
        for place, kind in enumerate(("ratios", "figures")):
            for part in measured:
                for name, value in part[place].items():
                    if name in results["ratios"] or name in results["figures"]:
                        raise ValueError(f"two parts of the bench measure {name!r}; rename one")
                    results["groups"].setdefault(title, []).append(name)
                    if isinstance(value, Spread):
                        results["spreads"][name] = [rounded(value.lowest), rounded(value.highest)]
                        if value.cpu is not None:
                            results["cpu"][name] = [rounded(part) for part in value.cpu]
                        value = value.median
                    results[kind][name] = rounded(value)
    return results


def numbers(results: Results) -> dict[str, float]:
    """Ratios and figures, by name."""
    return {**results["ratios"], **results["figures"]}


def write_parts(parts: Mapping[str, Measured], path: Path) -> None:
    """Keep what some parts measured, by their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(parts, indent=1, ensure_ascii=False) + "\n")


def read_parts(path: Path) -> dict[str, Measured]:
    """Read what `write_parts` kept; nothing where there is no file."""

    def values(stored: Mapping[str, Any]) -> dict[str, float | Spread]:
        return {name: spread(*value) if isinstance(value, list) else value for name, value in stored.items()}

    def spread(median: float, lowest: float, highest: float, cpu: list[float] | None = None) -> Spread:
        return Spread(median, lowest, highest, None if cpu is None else (cpu[0], cpu[1], cpu[2]))

    parts = json.loads(path.read_text()) if path.is_file() else {}
    return {name: (values(ratios), values(figures)) for name, (ratios, figures) in parts.items()}


def write_results(results: Results, path: Path) -> None:
    """Write JSON, one number a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def read_results(path: Path) -> Results:
    """Read what `write_results` wrote.

    Raises:
        FileNotFoundError: If there is none; says how to make it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no stored results of the bench; run `make bench` on this machine first")
    results: Results = json.loads(path.read_text())
    return results
