"""The estimate of a training: its sums, what fits, a student without weights, and a probe that writes nothing."""

import json

import pytest
from click.testing import CliRunner
from train_runs import make_config

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.stage2_student.cli import ESTIMATE
from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
from vlm_distill_cache.stage2_student.students.build import preset_shell
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.estimate import (
    Choice,
    Estimate,
    PhaseFigures,
    estimate,
    estimate_text,
)
from vlm_distill_cache.stage2_student.training.memory import Held, decoder_activations, predicted
from vlm_distill_cache.stage2_student.training.resolve import open_caches

HELD = Held(trained=100, parameters=150, weights=600, gradients=400, averages=800)


def figures(**changes) -> Estimate:
    phases = (
        PhaseFigures(name="dpt", steps=100, samples=8, passed=8, tokens=None, held=HELD, step_bytes=1000, seconds=2.0),
        PhaseFigures(name="dft", steps=300, samples=8, passed=8, tokens=None, held=HELD, step_bytes=2000, seconds=4.0),
    )
    choices = (
        Choice(options="", memory=3800),
        Choice(options="dft.micro_batch_size=1", memory=2500),
        Choice(options="optimizer=adamw8bit", memory=2000, same=False),
        Choice(options="sharding=fsdp2", memory=900, processes=4),
    )
    made = {
        "student": "s", "parameters": 150, "device": "CPU, 1 threads", "phases": phases, "choices": choices, "load": 200.0,
        "unknown": None, "memory_limit": None, "price": None,
    }  # fmt: skip
    return Estimate(**made | changes)


def test_memory_is_the_largest_phases_and_hours_are_the_plain_sum():
    found = figures(price=3.0)
    assert found.memory == 600 + 400 + 800 + 2000
    assert found.hours == pytest.approx((200 + 100 * 2 + 300 * 4) / 3600)
    stored = found.to_dict()
    assert stored["cost"] == pytest.approx(3 * found.hours)
    assert json.loads(json.dumps(stored)) == stored
    assert ESTIMATE(json.dumps(stored).encode())
    assert "Hours: 26.7 min, cost 1.33" in estimate_text(found)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        (4000, "Memory at its peak: 3.8 KB (fits 4.0 KB)"), (2600, "Fits: --set dft.micro_batch_size=1"),
        (2100, "Fits: --set optimizer=adamw8bit"), (1000, "Fits: --set sharding=fsdp2, with 4 processes"),
        (800, "None of these fits 800 B: choose a smaller student"),
    ],
)  # fmt: skip
def test_the_first_way_that_fits_is_named_and_those_of_the_same_result_come_first(limit, said):
    assert said in estimate_text(figures(memory_limit=limit))


def test_what_was_not_run_has_no_hours_and_says_why():
    found = figures(unknown="its weights are not here")
    assert found.to_dict()["hours"] is found.to_dict()["cost"] is None
    assert "Hours: not known: its weights are not here" in estimate_text(found)


@pytest.mark.slow
def test_a_published_student_is_told_from_its_configuration(tmp_path):
    """MobileVLM V2 1.7B by hand: 16 bytes a trained parameter, 4 a frozen one."""
    shell = preset_shell("mobilevlm-1.7b", tmp_path, projector=None)
    config = TrainConfig(cache="c", output="o")
    held = predicted(shell, config, PhaseConfig())
    tower = sum(value.numel() for name, value in shell.named_parameters() if "vision" in name)
    assert held.trained == held.parameters - tower
    assert held.parameters == pytest.approx(1.67e9, rel=0.01)
    assert held.weights + held.gradients + held.averages == pytest.approx(16 * held.trained + 4 * tower, rel=1e-6)
    divided = TrainConfig(cache="c", output="o", sharding="fsdp2")
    shared = predicted(shell, divided, PhaseConfig(), processes=4)
    assert shared.averages == pytest.approx(held.averages / 4, rel=1e-6)
    sizes = [
        decoder_activations(shell, tokens=64, samples=samples, half=half, checkpointing=again)
        for samples, half, again in ((1, False, False), (2, False, False), (1, True, False), (1, False, True))
    ]
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01)
    assert sizes[2] < 0.7 * sizes[0]
    assert sizes[3] < 0.2 * sizes[0]


def test_a_probe_says_what_it_runs_and_measures_it_and_leaves_nothing_where_the_student_would_be(
    tiny_cache, tmp_path, caplog
):
    caplog.set_level("INFO")
    dpt = {"steps": 2, "batch_size": 2, "trainable": "projector"}
    config = make_config(tiny_cache[0], tmp_path / "out", phases=["dpt"], dpt=dpt)
    found = estimate(config, open_caches(config), train=train, steps=1, memory=1.0)
    assert "dpt: 3 steps of 2 samples are run to be measured" in caplog.text
    (phase,) = found.phases
    assert (phase.name, phase.steps, phase.samples, phase.passed) == ("dpt", 2, 2, 2)
    assert phase.seconds > 0
    assert phase.step_bytes > 2 * 4 * 3 * 72 * 72  # more than the pictures
    assert found.hours >= 2 * phase.seconds / 3600
    assert [choice.options for choice in found.choices][:2] == ["", "dpt.micro_batch_size=1"]
    assert found.choices[1].memory < found.choices[0].memory
    assert [*tmp_path.iterdir()] == []


def test_the_command_refuses_what_is_no_size_and_several_processes(tiny_cache, monkeypatch):
    def told(*words):
        result = CliRunner().invoke(group_of("stage2_student"), ["estimate", "--cache", str(tiny_cache[0]), *words])
        return " ".join(f"{result.output} {result.exception}".split())

    assert "--memory: expected a size such as 20GB, 500MB or 1.5TiB, got 'much'" in told("--memory", "much")
    assert "Invalid value for '--price'" in told("--price", "nan")
