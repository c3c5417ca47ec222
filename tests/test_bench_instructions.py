"""`make bench-instructions`: counts are read from what callgrind leaves, and the page has the stored ratios."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks import bench_instructions
from tests.benchmarks.bench_commands import COMMANDS, bench_commands
from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.bench_instructions import (
    BEGIN,
    END,
    NOTHING,
    STORED,
    count_under_callgrind,
    ratios_of,
    read_counts,
    table,
)
from tests.stage2_student.tiny_cache import build_tiny_cache


def leave(folder, number, thread, trigger, count):
    text = f"version: 1\npid: 7\n\ndesc: Trigger: {trigger}\n\nevents: Ir\nsummary: {count}\n\nfn=(1)\n0 5\ntotals: {count}\n"
    (folder / f"count.{number}-{thread:02d}").write_text(text)


def test_counts_are_of_the_first_thread_by_name_less_those_of_counting(tmp_path):
    leave(tmp_path, 1, 1, f"dump {NOTHING}", 100)
    leave(tmp_path, 2, 1, "dump dft step: logits + answer attention", 1100)
    leave(tmp_path, 2, 2, "dump dft step: logits + answer attention", 9999)
    (tmp_path / "count-01").write_text("desc: Trigger: Program termination\nsummary: 5\n")
    assert read_counts(tmp_path) == {"dft step: logits + answer attention": 1000}


def test_each_ratio_is_over_what_it_is_compared_with():
    counts = {
        "dpt step: SFT": 100, "dpt step: logits": 103, "dft step: SFT": 200, "dft step: logits": 210,
        "stage one, built-in teacher": 330, "bare forward, built-in teacher": 300,
    }  # fmt: skip
    assert ratios_of(counts) == {
        "dpt step: logits / SFT": 1.03,
        "dft step: logits / SFT": 1.05,
        "stage one / bare forward, built-in teacher": 1.1,
    }


def test_without_valgrind_it_says_how_to_get_it_and_a_command_that_fails_is_no_count(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_instructions.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="apt-get install valgrind"):
        count_under_callgrind([sys.executable], tmp_path)
    monkeypatch.setattr(bench_instructions.shutil, "which", lambda name: name)
    monkeypatch.setattr(bench_instructions.subprocess, "run", lambda words, **_: subprocess.CompletedProcess(words, 3))
    with pytest.raises(SystemExit, match="ended with 3 under valgrind"):
        count_under_callgrind([sys.executable], tmp_path)


def test_the_table_in_the_documentation_is_that_of_the_stored_counts():
    stored = json.loads(STORED.read_text())
    assert {name: float(f"{value:.4g}") for name, value in ratios_of(stored["instructions"]).items()} == stored[
        "ratios"
    ]
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == table(stored["ratios"], stored["machine"])


def test_commands_are_measured_from_their_start_to_their_end(tmp_path):
    build_tiny_cache(tmp_path / "cache", store="zarr")
    measured = bench_commands(tmp_path / "cache", rounds=1)
    assert [*measured] == [f"{command}, s" for command in COMMANDS]
    assert all(0.02 < value.median < 60 and 0.02 < value.cpu[0] < 60 for value in measured.values())
