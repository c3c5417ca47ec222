"""`make gpu-check`: what it says where it cannot run, and that its parts run and fail alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import gpu_check

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("why", ["a CUDA GPU", "zarr pillow"])
def test_a_machine_that_cannot_run_it_is_told_so_in_one_line(monkeypatch, capsys, why: str):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(gpu_check, "_has_gpu", lambda: False)
    monkeypatch.setattr(gpu_check, "lacking", lambda: ["zarr", "pillow"] if "zarr" in why else [])
    assert gpu_check.main() == 2
    said = capsys.readouterr().out
    assert why in said
    assert said.count("\n") == 1


def test_what_is_lacking_is_named_as_its_wheel(monkeypatch):
    assert gpu_check.lacking() == []
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name in ("PIL", "zarr") else True)
    assert gpu_check.lacking() == ["zarr", "pillow"]


def test_a_part_that_fails_loses_no_other_and_none_begins_without_time(monkeypatch, tmp_path, capsys):
    now = [0.0]
    monkeypatch.setattr(gpu_check.time, "perf_counter", lambda: now[0])
    limits = []

    def run(name: str, folder: Path, *, tiny: bool, limit_s: float):
        now[0] += 150
        limits.append(limit_s)
        if name == "stage one":
            return {"ok": False, "seconds": 150.0, "error": "Traceback\nValueError: no"}
        return {"ok": True, "seconds": 150.0, "figures": {"device": "H200"}}

    found = gpu_check.run_all(tmp_path, tiny=False, run=run)
    assert found["device"] == "H200"
    assert list(found["parts"]) == list(gpu_check.PARTS)
    assert [part["ok"] for part in found["parts"].values()] == [True, False, True, False, False, False, False]
    assert "no time was left" in found["parts"]["tests"]["error"]
    assert limits == [60, 150, 120]
    assert "stage one: 150 s, FAILED: ValueError: no" in capsys.readouterr().out


def test_parts_and_their_functions_have_the_same_names():
    source = (ROOT / "tests" / "benchmarks" / "gpu_check_parts.py").read_text()
    for name in gpu_check.PARTS:
        assert f'    "{name}": {name.replace(" ", "_")},' in source
    assert sum(gpu_check.PARTS.values()) > gpu_check.BUDGET_S  # each may take long, all together may not
    assert gpu_check.BUDGET_S < 480


@pytest.mark.slow
def test_all_parts_run_on_tiny_models_without_a_gpu(tmp_path):
    output = tmp_path / "found.json"
    command = [sys.executable, "-m", "tests.benchmarks.gpu_check", "--tiny", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(output.read_text())
    assert {name: part.get("error") for name, part in found["parts"].items() if not part["ok"]} == {}
    assert done.returncode == 0
    assert found["parts"]["out of memory"]["figures"]["divided"] == [4, 2, 2]
