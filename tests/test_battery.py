"""The battery's judges see what they must see, and its page shows the stored run."""

import json
import os
import subprocess
import sys

import pytest

from tests.battery.battery_cases import ROOT
from tests.battery.battery_page import STORED, TITLES, table, table_in_page

EXPECTED = {
    "fine": ("same", ""),
    "refuses": ("refused", ""),
    "a command of ours": ("same", ""),
    "refuses without a word": ("failed", "refused without a word"),
    "an exit code of nobody's": ("failed", "exit code 7"),
    "a traceback": ("failed", "ZeroDivisionError"),
    "a traceback that it survives": ("failed", "ended with a traceback"),
    "too slow": ("failed", "took 1."),
    "a command that hangs": ("failed", "hung; killed after 3 s"),
    "leaves a process": ("failed", "left processes behind"),
    "takes memory": ("failed", "GiB"),
    "dies": ("failed", "exit code -9"),
    "a case that hangs": ("failed", "hung for 2 s"),
}


def test_the_judges_see_every_kind_of_failure_and_nothing_else(tmp_path):
    said = subprocess.run(
        [sys.executable, "-m", "tests.battery.battery_judged", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    found = json.loads(said.stdout)
    assert found.keys() == EXPECTED.keys()
    for name, (how, words) in EXPECTED.items():
        assert found[name][0] == how, (name, found[name])
        assert words in found[name][1], (name, found[name])


def test_the_page_shows_the_stored_run_of_every_kind():
    stored = json.loads(STORED.read_text())
    assert table_in_page() == table(stored)
    assert stored["counts"].keys() == TITLES.keys()


def test_what_is_stored_names_no_place_of_a_machine():
    text = STORED.read_text()
    assert str(ROOT) not in text
    assert os.path.expanduser("~") not in text  # noqa: PTH111


@pytest.mark.slow
def test_a_small_share_of_every_kind_survives():
    done = subprocess.run(
        [sys.executable, "-m", "tests.battery.battery", "--share", "0.01", "--only", *(kind for kind in TITLES if kind != "soak")],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
