"""Scores on the way: they change nothing of the training, and are those of `distill evaluate` on the student kept then."""

import json
import shutil
from dataclasses import replace

import lora_runs
import pytest
import train_runs
from broken_runs import Copies
from click.testing import CliRunner

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.final_folder import BEST, FINAL, read_final, read_provenance
from vlm_distill_cache.stage2_student.scores.on_the_way import EVALUATIONS, read_evaluations, read_kept
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.checkpoint import CHECKPOINTS
from vlm_distill_cache.stage2_student.training.trackers import Trackers

HOW = train_runs.ON_THE_WAY
RUNS = {"plain": train_runs.make_config, "lora": lora_runs.make_config}


def timeless(lines):
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module", params=RUNS)
def scored(request, tiny_cache, tmp_path_factory):
    """A training that is scored on the way, a copy of its folder after each step, and how it is made."""
    folder, make = tmp_path_factory.mktemp(request.param), RUNS[request.param]
    copies = Copies(folder / request.param)
    result = train(make(tiny_cache[0], copies.output, evaluation=HOW), after_step=copies)
    return result, copies, lambda output, **changes: make(tiny_cache[0], output, **changes)


@pytest.mark.slow
def test_a_training_is_the_same_to_the_last_bit_with_and_without(scored, tmp_path):
    result, copies, make = scored
    plain = train(make(tmp_path / "run"))
    assert lora_runs.losses(result.log) == lora_runs.losses(plain.log)
    assert lora_runs.equal_weights(result.model, plain.model)
    assert (
        read_final(result.final)["files"]["model.safetensors"] == read_final(plain.final)["files"]["model.safetensors"]
    )
    kept = sorted(path.name for path in (copies.output / CHECKPOINTS).iterdir())
    assert kept == sorted(path.name for path in (tmp_path / "run" / CHECKPOINTS).iterdir())
    for name in kept:
        found, expected = (
            (place / CHECKPOINTS / name / "tensors.pt").read_bytes() for place in (copies.output, tmp_path / "run")
        )
        assert found == expected, name
    assert not (tmp_path / "run" / EVALUATIONS).exists()
    assert not plain.scores


def test_every_so_many_steps_and_the_last_are_scored_and_the_best_is_kept(scored):
    result, copies, _ = scored
    lines, last = read_evaluations(copies.output), result.log[-1]["step"]
    assert lines == result.scores
    assert [line["step"] for line in lines] == [*range(3, last, 3), last]
    assert {(line["split"], line["limit"], line["by"]) for line in lines} == {("validation", 1, "teacher/kl")}
    assert (
        {line["scored"]["pairs"] for line in lines} == {line["scores"]["likelihood"]["items"] for line in lines} != {0}
    )
    values = [line["scores"]["teacher/kl"]["value"] for line in lines]
    assert len(set(values)) == len(values)
    assert [line["best"] for line in lines] == [value == min(values[: place + 1]) for place, value in enumerate(values)]
    kept = read_kept(copies.output)
    assert (kept.step, kept.value) == (lines[values.index(min(values))]["step"], min(values))


def test_the_numbers_are_those_of_evaluate_on_the_student_that_was_kept(scored, tmp_path):
    """Of any step that was the best at its time: its folder was copied then."""
    result, copies, _ = scored
    for line in [line for line in result.scores if line["best"]][-2:]:
        copies.killed_after(line["step"], place := tmp_path / str(line["step"]))
        folder = place / BEST
        command = ["evaluate", folder, "--split", line["split"], "--limit", line["limit"], "--json"]
        told = CliRunner().invoke(main, [*map(str, command)])
        assert told.exit_code == 0, told.output
        assert json.loads(told.stdout)["scores"] == line["scores"]
    assert read_provenance(folder)["fingerprint"] != read_provenance(result.final)["fingerprint"]
    assert sum(phase["steps"] for phase in read_provenance(folder)["origin"]["phases"]) == line["step"]
    assert f"after step {line['step']} of run" in (folder / "README.md").read_text()


@pytest.mark.slow(quick=("lora",))
def test_a_killed_training_ends_with_the_same_scores_and_the_same_best(scored, tmp_path):
    """Killed behind a scored step whose checkpoint was not written yet, and among adapters."""
    result, copies, make = scored
    copies.killed_after({"plain": 3, "lora": 4}[copies.output.name], output := tmp_path / "run")
    resumed = train(make(output, evaluation=HOW))
    assert timeless(resumed.scores) == timeless(result.scores) == timeless(read_evaluations(output))
    assert read_kept(output) == read_kept(copies.output)
    assert read_final(output / BEST)["files"] == read_final(copies.output / BEST)["files"]


@pytest.mark.slow
def test_in_two_processes_the_scores_are_those_of_one(scored, in_two_processes):
    result, copies, _ = scored
    two = in_two_processes[copies.output.name]
    for one, other in zip(result.scores, read_evaluations(two), strict=True):
        assert (one["step"], one["phase"], one["scored"]) == (other["step"], other["phase"], other["scored"])
        for name in ("teacher/kl", "attention/cosine"):
            assert other["scores"][name]["value"] == pytest.approx(one["scores"][name]["value"], rel=1e-2)
    kept = read_kept(two)
    assert kept.value == min(line["scores"]["teacher/kl"]["value"] for line in read_evaluations(two))
    assert read_final(two / BEST)["best"] == vars(kept)


def test_what_cannot_be_chosen_by_is_refused_before_the_first_step(tiny_cache, tmp_path):
    config = train_runs.make_config(tiny_cache[0], tmp_path / "run", evaluation={**HOW, "agreement_samples": 0})
    with pytest.raises(ConfigError, match=r"evaluation\.best=teacher/kl is not scored; choose likelihood or questions"):
        train(config)
    assert not (tmp_path / "run" / CHECKPOINTS).exists()


@pytest.mark.parametrize("scored", ["lora"], indirect=True)
def test_another_runs_best_student_is_not_written_over(scored, tmp_path):
    _, copies, make = scored
    (tmp_path / "run").mkdir()
    shutil.copytree(copies.output / BEST, tmp_path / "run" / BEST)
    with pytest.raises(ConfigError, match=r"best belongs to another run"):
        train(make(tmp_path / "run", evaluation=HOW, seed=5))


def test_in_mixed_precision_the_student_is_scored_as_it_is_saved(tiny_cache, tmp_path, monkeypatch):
    """In float32, though the loop runs it in bfloat16, before and behind; trackers may wait only when all is saved."""
    there = []
    monkeypatch.setattr(Trackers, "close", lambda _: there.append((tmp_path / "run" / FINAL).is_dir()))
    config = train_runs.make_config(tiny_cache[0], tmp_path / "run", dtype="bfloat16", evaluation=HOW)
    config = replace(config, phases=("dpt",))
    line = train(config).scores[-1]
    assert there == [True] == [line["best"]]
    command = ["evaluate", str(tmp_path / "run" / BEST), "--split", "validation", "--limit", "1", "--json"]
    assert json.loads(CliRunner().invoke(main, command).stdout)["scores"] == line["scores"]
