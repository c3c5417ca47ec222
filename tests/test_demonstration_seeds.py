"""The demonstration over several seeds: its table is that of the stored scores."""

import json

import pytest

from tests.benchmarks import demonstration
from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.demonstration import BEGIN, END, MODELS, SEEDS, STORED, run_seed, tables


def result(seed: int, sft: float, distilled: float) -> dict:
    """A seed's scores: the same share of right answers in all measures."""
    names = ("likelihood", "likelihood/swap_obj", "likelihood/add_obj", "questions", "teacher/top1")
    values = dict(zip(MODELS, (sft, distilled), strict=True))
    return {"seed": seed, "scores": {model: dict.fromkeys(names, value) for model, value in values.items()}}


def test_gains_are_paired_by_seed_and_their_interval_is_students():
    lines = tables({"results": [result(0, 0.5, 0.6), result(1, 0.4, 0.7)]}).splitlines()
    # Two seeds: the quantile of t with one degree of freedom is 12.706, and the differences are 10 and 30.
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[0] == "captions by likelihood, %"
    assert cells[3] == f"+20.0 ± {12.706 * 10:.1f}"
    assert cells[4] == "+10.0, +30.0"
    assert lines[-1] == "| swap_obj | 45.0 | 65.0 |"
    assert tables({"results": []}) == ""


def test_a_seed_runs_what_the_target_runs_and_its_scores_are_read(tmp_path, monkeypatch):
    commands = []

    def run(command, *, check):
        commands.append([str(part) for part in command])
        (tmp_path / "run-3").mkdir()
        scores = {"likelihood": {"value": 0.5, "low": 0.4, "high": 0.6, "items": 9}}
        (tmp_path / "run-3" / "evaluation.json").write_text(json.dumps({m: {"scores": scores} for m in MODELS}))

    monkeypatch.setattr(demonstration.subprocess, "run", run)
    assert run_seed(tmp_path, 3) == {"seed": 3, "scores": {model: {"likelihood": 0.5} for model in MODELS}}
    assert commands[0][1:] == [
        "run", "--student", "mobilevlm", "--cache", str(tmp_path / "cache"), "--output", str(tmp_path / "run-3"),
        "--set", "seed=3",
    ]  # fmt: skip


@pytest.mark.skipif(not STORED.is_file(), reason="not run yet")
def test_the_page_has_the_table_of_what_is_stored():
    stored = json.loads(STORED.read_text())
    assert [found["seed"] for found in stored["results"]] == list(SEEDS)
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == tables(stored)
