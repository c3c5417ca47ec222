"""A student that two processes divide is trained as one process trains it, and goes on with any number of them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import sharded_runs
import torch
from lora_runs import LOSSES
from safetensors.torch import load_file
from tiny_students import library_student, mobilevlm_student
from torch import nn

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.stage2_student import train as training
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.final_folder import read_final
from vlm_distill_cache.stage2_student.scores.on_the_way import read_evaluations
from vlm_distill_cache.stage2_student.students.shards import check_shardable
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.checkpoint import CHECKPOINTS, list_checkpoints, read_checkpoint
from vlm_distill_cache.stage2_student.training.log import read_log

CLOSE = 1e-5


@pytest.fixture
def one(in_two_processes):
    """The folder of the same run, by one process."""
    return in_two_processes["sharded-one"]


@pytest.fixture
def two(in_two_processes):
    return in_two_processes["sharded"]


def assert_same_training(found: Path, expected: Path):
    """The same losses; the same folder for others: files, names, shapes, dtypes, and weights but for rounding."""
    logs = [read_log(folder) for folder in (found, expected)]
    assert [len(log) for log in logs] == [5, 5] if "tower" not in found.name else logs[0]
    for mine, other in zip(*logs, strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() & {*LOSSES}:
            assert mine[name] == pytest.approx(other[name], rel=CLOSE, abs=CLOSE), (mine["step"], name)
    finals = [folder / "final" for folder in (found, expected)]
    mine, other = ({path.name for path in final.iterdir()} for final in finals)
    assert mine == other
    mine, other = (load_file(final / "model.safetensors") for final in finals)
    assert mine.keys() == other.keys()
    for name, value in mine.items():
        assert value.dtype == other[name].dtype
        # Adam divides gradients by their own size: of tiny ones, rounding is a share of a whole step (1e-2 and 2e-3).
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-4, msg=name)
    said = [json.loads((final / "config.json").read_text()) for final in finals]
    assert said[0] == said[1]
    assert [read_final(final)["fingerprint"] for final in finals][1:] == [read_final(finals[0])["fingerprint"]]


def test_two_processes_that_divide_a_student_train_it_as_one_does(two, one):
    assert_same_training(two, one)


def test_a_divided_student_is_scored_on_the_way_as_a_whole_one(two, one):
    mine, other = read_evaluations(two), read_evaluations(one)
    assert [line["step"] for line in mine] == [line["step"] for line in other] == [3, 5]
    for left, right in zip(mine, other, strict=True):
        assert left["best"] == right["best"]
        for name, score in right["scores"].items():
            assert left["scores"][name]["value"] == pytest.approx(score["value"], abs=1e-3), name


def test_a_divided_tower_goes_without_pictures_where_other_processes_have_some(in_two_processes):
    """Micro-batches of one sample: in each some process has text alone, whose pass reaches no projector and no tower."""
    assert_same_training(in_two_processes["sharded-tower"], in_two_processes["tower-one"])


def test_two_processes_go_on_where_one_stopped(in_two_processes, one):
    assert_same_training(in_two_processes["sharded-on"], one)


def test_one_process_goes_on_where_two_stopped(tiny_cache, two, one, tmp_path):
    """Behind step 4: adapters are merged, and half of a phase of the whole decoder is done."""
    output = sharded_runs.stopped_behind(4, two, tmp_path / "on")
    train(sharded_runs.make_config(tiny_cache[0], output))
    assert_same_training(output, one)
    assert sorted(path.name for path in (output / CHECKPOINTS / "step-00000005").iterdir()) == [
        "state.json",
        "tensors.pt",
    ]


def test_a_process_writes_its_share_of_what_is_trained_and_of_the_averages(two, one):
    mine, other = (list_checkpoints(folder)[-1] for folder in (two, one))
    sizes = [size for name, (size, _) in mine.files.items() if name.endswith(".safetensors")]
    assert len(sizes) == 2
    assert max(sizes) < 0.6 * other.files["tensors.pt"][0]
    assert mine.files["tensors.pt"][0] < 0.2 * other.files["tensors.pt"][0]


def test_the_checkpoint_of_a_divided_student_holds_what_that_of_a_whole_one_holds(two, one):
    for mine, other in zip(list_checkpoints(two), list_checkpoints(one), strict=True):
        assert mine.position == other.position
        left, right = (read_checkpoint(checkpoint)["student"] for checkpoint in (mine, other))
        assert left["frozen"] == right["frozen"]
        assert left["values"].keys() == right["values"].keys()
        for name, value in left["values"].items():
            torch.testing.assert_close(value, right["values"][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", ["changed", "shorter", "lost", "foreign"])
def test_a_damaged_share_is_named_and_its_checkpoint_left_out(two, damage, tmp_path, caplog):
    output = sharded_runs.stopped_behind(2, two, tmp_path / "run")
    folder = output / CHECKPOINTS / "step-00000002"
    file = max(folder.glob("*.safetensors"))
    if damage == "changed":
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "shorter":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "lost":
        file.unlink()
    else:
        file = file.with_name("another.safetensors")
        file.write_bytes(max(folder.glob("*.safetensors")).read_bytes())
    with caplog.at_level(logging.WARNING):
        *_, newest = list_checkpoints(output)
    if damage in ("shorter", "lost"):
        assert newest.position.total_steps == 1
        assert "ignoring incomplete checkpoint" in caplog.text
        assert file.name in caplog.text
    else:
        with pytest.raises(CacheFormatError, match=file.name):
            read_checkpoint(newest)


def test_what_cannot_be_divided_is_refused_in_words():
    for student, _ in (mobilevlm_student(), library_student()):
        check_shardable(student)
    student, _ = mobilevlm_student()
    student.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ConfigError, match="sharding=fsdp2: scale is a single number"):
        check_shardable(student)
    student, _ = library_student()
    del student.language_model.layers
    with pytest.raises(ConfigError, match=r"keeps its decoder layers is not known .* leave sharding out"):
        check_shardable(student)


def test_a_folder_that_some_process_does_not_see_is_refused_before_the_first_step(tmp_path, monkeypatch):
    """Each process would write its share to a disk of its own machine."""
    student, _ = mobilevlm_student()
    monkeypatch.setattr(training, "broadcast_object_list", lambda sent: sent)
    monkeypatch.setattr(training, "gather_object", lambda sent: [*sent, False])
    two = SimpleNamespace(num_processes=2, is_main_process=True)
    config = TrainConfig(cache="c", output=str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"process 1 does not see what process 0 writes to .* all machines of this run share"
    ):
        training.place_student(student, two, config, divides=True)
    monkeypatch.setattr(training, "gather_object", lambda sent: [*sent, True])
    assert training.place_student(student, two, config, divides=True) == (student, True)
    assert not any(tmp_path.iterdir())


def test_a_process_that_is_alone_trains_the_whole_student_and_writes_its_checkpoint(tiny_cache, tmp_path, caplog):
    config = sharded_runs.make_config(tiny_cache[0], tmp_path, phases=["dpt"], sharding="fsdp2", evaluation={})
    with caplog.at_level(logging.INFO):
        train(config)
    assert "there is one process, which trains the whole student" in caplog.text
    assert [set(checkpoint.files) for checkpoint in list_checkpoints(tmp_path)] == [{"tensors.pt"}]
