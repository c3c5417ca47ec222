"""Killed, or out of disk space, at any file operation, and run again: the cache is byte-identical."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = (
    "build",
    "refill",
    "rederive",
    "parts",
    "queue",
    "overwrite",
    "extend",
    "fidelity",
    "seal",
    "several",
    "lift",
)
PLACES = {
    "build": 80,
    "refill": 60,
    "rederive": 50,
    "parts": 120,
    "queue": 90,
    "overwrite": 90,
    "extend": 80,
    "fidelity": 12,
    "seal": 8,
    "several": 100,
    "lift": 100,
}


def break_everywhere(
    folder: Path, teacher: Path, store: str, how: str, stride: int, scenarios=SCENARIOS
) -> dict[str, int]:
    """Run `break_everywhere.py`; returns the number of places by scenario."""
    script = Path(__file__).parents[1] / "break_everywhere.py"
    result = subprocess.run(
        [sys.executable, "-W", "ignore", script, store, how, str(stride), folder, teacher, *scenarios],
        env={**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {name: int(count) for name, count in map(str.split, result.stdout.splitlines())}


@pytest.mark.slow
def test_broken_at_some_places_and_run_again_the_bytes_are_the_same(tmp_path: Path, tiny_llava: Path):
    stride = 61
    places = break_everywhere(tmp_path, tiny_llava, "webdataset", "both", stride)
    assert places.keys() == PLACES.keys()
    assert all(places[name] >= PLACES[name] // stride for name in places), places
    assert sum(places.values()) > 8


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
@pytest.mark.parametrize(
    ("store", "scenarios"),
    [("webdataset", SCENARIOS), ("zarr", ("build", "refill"))],  # elsewhere the store makes no difference
)
def test_broken_everywhere_and_run_again_the_bytes_are_the_same(
    tmp_path: Path, tiny_llava: Path, store: str, how: str, scenarios: tuple[str, ...]
):
    places = break_everywhere(tmp_path, tiny_llava, store, how, 1, scenarios)
    assert places.keys() == set(scenarios)
    assert all(places[name] >= PLACES[name] for name in places), places
