"""The memory table in docs/scale.md is the stored measurement, and what estimates reckon with is what was counted."""

import json

import pytest
import torch

from tests.benchmarks.bench_memory import BEGIN, END, PAGE, STORED, WAYS, config_of, measured, student, table
from vlm_distill_cache.stage2_student.training.memory import predicted


def stored() -> dict:
    return json.loads(STORED.read_text(encoding="utf-8"))


def test_the_page_shows_the_stored_figures():
    page = PAGE.read_text(encoding="utf-8")
    assert page.partition(BEGIN)[2].partition(END)[0] == table(stored())
    assert [row["name"] for row in stored()["rows"]] == [name for name, _, _ in WAYS]


@pytest.mark.parametrize(("name", "run", "phase"), WAYS, ids=[name for name, _, _ in WAYS])
def test_what_is_reckoned_from_shapes_is_what_tensors_take(name, run, phase):
    """To the byte, of the very ways of the table; and the stored rows are of the same code."""
    if {"optimizer", "quantisation"} & run.keys():
        pytest.importorskip("bitsandbytes")
    if "trainable" in phase:
        pytest.importorskip("peft")
    config, model = config_of(run, phase, 8), student(width=64, layers=1)
    with torch.device("meta"):
        shell = type(model)(model.config)
    expected = predicted(shell, config, config.dft)
    assert all(value.is_meta for value in shell.parameters())
    assert measured(config, model) == expected
    assert expected.total == expected.weights + expected.gradients + expected.averages
