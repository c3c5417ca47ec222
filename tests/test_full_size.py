"""The stored run of full-sized models: what the page shows, and that no weights were held twice."""

import json
from pathlib import Path

import pytest

from tests.benchmarks.full_size import BEGIN, END, STORED, table

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stored():
    return json.loads(STORED.read_text(encoding="utf-8"))


def test_the_page_shows_the_stored_run(stored):
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table(stored)


def test_the_models_were_of_full_size_and_no_weights_were_held_twice(stored):
    sizes = {"LLaVA-1.5-7B": 14.1e9, "Qwen2.5-VL-3B": 7.5e9, "MobileVLM-V2-1.7B": 3.3e9}  # of the hub's own files
    for name, run in stored["teachers"].items():
        assert run["model_bytes"] == pytest.approx(sizes[name], rel=0.03)
        assert run["build"]["peak"] < 2 * run["model_bytes"]
    for run in stored["students"].values():
        assert run["steps"] == 2
