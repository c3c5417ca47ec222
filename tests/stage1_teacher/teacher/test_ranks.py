"""A teacher that several ranks hold together says what one process says, and is one worker; what cannot be so is refused."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rank_workers
import torch
from click.testing import CliRunner
from tiny_families import save_tiny

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal.launch import Launch
from vlm_distill_cache.data.families.models import describe_family_model
from vlm_distill_cache.data.families.shares import refuse_shares
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.planning.batch_size import largest_batch, of_all_ranks
from vlm_distill_cache.stage1_teacher.planning.parts import count_workers, fix_ranks, refuse_ranks
from vlm_distill_cache.stage1_teacher.teacher import ranks
from vlm_distill_cache.stage1_teacher.teacher.ranks import join_launched, refuse_devices
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

CLOSE = 1e-5
OTHERS = (
    "qwen2_5_vl",
    "smolvlm",
    "internvl",
    "gemma3",
    "paligemma",
    "llava_next",
    "llava_onevision",
    "idefics3",
    "llava_original",
)


def run_workers(folder: Path, teachers: list[Path]) -> dict[str, Any]:
    folder.mkdir()
    script = Path(rank_workers.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, teachers)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks did, each part once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_workers(folder / "runs", [save_tiny(name, folder / name) for name in ("llava", "qwen2_vl")])


def assert_same_as_one_process(compared: dict[str, Any]) -> None:
    assert compared["codes"] == [0, 0], compared["said"]
    for name, of_teacher in compared["found"].items():
        assert {"logits", "answer_attention", "visual_columns", "hidden"} <= of_teacher["differences"].keys()
        for signal, difference in of_teacher["differences"].items():
            assert difference <= CLOSE, (name, signal)
        assert of_teacher["answers"][0] == of_teacher["answers"][1], name
        assert of_teacher["fingerprints"], name
        whole, own = of_teacher["weights"]
        assert own < 0.8 * whole, name  # tower and projector are whole


def test_logits_attention_states_and_answers_are_those_of_one_process(found):
    assert_same_as_one_process(found["float32"])


@pytest.mark.slow
def test_every_family_that_the_library_divides_says_what_one_process_says(tmp_path: Path):
    teachers = [save_tiny(name, tmp_path / name) for name in OTHERS]
    assert_same_as_one_process(run_workers(tmp_path / "runs", [*teachers, builtin_teacher_directory()])["float32"])


def test_logits_of_half_precision_are_projected_in_float32(found):
    [of_teacher] = found["bfloat16"]["found"].values()
    assert of_teacher["rounded"] < 0.1  # numbers that bfloat16 has, too
    assert of_teacher["differences"]["logits"] < 0.1  # its sums are rounded in other places


def test_two_ranks_write_one_cache_that_is_that_of_one_process_but_for_rounding(found):
    built = found["build"]
    assert built["codes"] == [0, 0], built["said"]
    worst = built["found"]["worst"]
    assert worst.pop("token_ids") >= 0  # ranks of tokens that are as likely
    assert max(worst.values()) <= CLOSE


def test_a_resumed_build_has_as_many_ranks_as_its_plan_says_and_the_same_bytes(found):
    built = found["build"]["found"]
    assert built["extra"]["tensor_parallel"] == 2
    assert (built["built"], built["differing"]) == (1, [])


def test_a_batch_that_no_rank_has_memory_for_runs_in_halves(found):
    assert found["all lack"]["codes"] == [0, 0], found["all lack"]["said"]
    assert found["all lack"]["found"] == [1, 1]  # batches of two


def test_a_rank_that_lacks_memory_alone_ends_all(found):
    lacking = found["one lacks"]
    assert lacking["codes"] == [1, 1]
    assert "rank 1 of 2 lacks memory, and the others do not" in lacking["said"][1]
    assert "rank 0 of 2 lost the others" in lacking["said"][0]


def test_a_rank_that_is_killed_ends_all_and_its_shard_is_free(found):
    killed = found["killed"]
    assert killed["codes"] == [1, -9]
    assert "rank 0 of 2 lost the others" in killed["said"][0]
    assert killed["missing"] == [1]
    assert killed["held"] == []


@pytest.mark.parametrize(
    ("family", "count", "message"),
    [
        ("llava", 3, r"4 heads \(num_attention_heads\), which 3 processes cannot share; set 2, or quantise it"),
        ("llava", 4, r"2 heads \(num_key_value_heads\), which 4 processes cannot share; set 2, or quantise it"),
        ("qwen3_vl", 2, "no plan to divide the language model of model_type 'qwen3_vl'; quantise it"),
        ("mobilevlm_v2", 2, "no plan to divide the language model of this layout"),
    ],
)
def test_a_teacher_that_cannot_be_divided_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch, family: str, count: int, message: str
):
    folder = save_tiny(family, tmp_path / family)
    model = describe_family_model(folder)
    refuse_shares(folder, model.model, model.family, 1)
    monkeypatch.setattr(ranks, "TCPStore", None)  # nothing is started
    with pytest.raises(ConfigError, match=message):
        Teacher(folder, tensor_parallel=count)
    with pytest.raises(ConfigError, match=message):
        Teacher(folder, tensor_parallel=count, loads=False)


@pytest.mark.parametrize("beside", [{"device_map": "auto"}, {"quantisation": "4bit"}])
def test_one_way_to_fit_a_large_teacher_at_a_time(beside: dict[str, Any]):
    with pytest.raises(ConfigError, match="do not go together; leave one of them out"):
        BuildConfig(tensor_parallel=2, **beside)


def test_processes_are_ranks_and_come_out_even(tmp_path: Path):
    config = BuildConfig(cache=str(tmp_path / "none"), tensor_parallel=4)
    assert [count_workers(config, processes) for processes in (4, 8)] == [1, 2]
    with pytest.raises(ConfigError, match="--nproc a multiple of 4"):
        count_workers(config, 6)
    assert fix_ranks(BuildConfig(cache=str(tmp_path / "none"))).tensor_parallel == 0
    launch = Launch(launcher="torchrun", rank=5, size=6, names=("RANK", "WORLD_SIZE"))
    assert launch.of_groups(2) == Launch(launcher="torchrun", rank=2, size=3, names=("RANK", "WORLD_SIZE"))
    with pytest.raises(ConfigError, match="torchrun started 6 processes, which is no multiple"):
        join_launched(launch, 4, torch.device("cpu"))
    with pytest.raises(ConfigError, match="measures a teacher that one process holds"):
        refuse_ranks(config, "estimate")


def test_devices_that_ranks_cannot_have_are_refused(monkeypatch):
    refuse_devices(2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="kind cpu on this machine; leave device out"):
        refuse_devices(2, torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    refuse_devices(4, torch.device("cuda"))
    refuse_devices(2, torch.device("cuda:2"))
    with pytest.raises(ConfigError, match="a GPU of its own, and 4 are here"):
        refuse_devices(4, torch.device("cuda:2"))


@pytest.mark.parametrize(("rooms", "expected"), [((1000, 1000), 8), ((1000, 310), 2), ((230, 1000), 1)])
def test_the_batch_size_is_what_all_ranks_have_room_for_and_none_is_tried_that_may_not_fit(rooms, expected: int):
    """A pass takes 120 bytes a sample of the leader, and 100 of the other rank."""
    others, tried = SimpleNamespace(taken=()), []

    def measure(size: int) -> list[int]:
        tried.append(size)
        others.taken = (90 * size, 100 * size)
        return [120 * size]

    assert largest_batch(of_all_ranks(others, measure, rooms), budget=rooms, most=64) == expected
    assert all(120 * size <= rooms[0] and 100 * size <= rooms[1] for size in tried)


@pytest.fixture
def command(tmp_path: Path, tiny_llava: Path) -> Callable[..., list[str]]:
    def build(cache: str, *more: str) -> list[str]:
        return [
            "build", "--teacher", str(tiny_llava), "--data", "shapes", "--cache", str(tmp_path / cache), "--limit", "4", "--set",
            "tensor_parallel=2", "--set", "shard_size=2", "--set", "batch_size=2", "--set", "threads=1", "--set", "template=short",
            "--set", "fidelity_samples=0", *more,
        ]  # fmt: skip

    return build


def test_a_dry_run_looks_at_the_heads(command):
    shown = CliRunner().invoke(main, [*command("none", "--dry-run"), "--set", "tensor_parallel=3"])
    assert shown.exit_code == 1
    assert "which 3 processes cannot share" in shown.output


@pytest.mark.slow
def test_one_command_torchrun_and_nproc_make_the_same_cache(tmp_path: Path, command):
    program = [sys.executable, "-m", "vlm_distill_cache.stage1_teacher.cli"]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--nproc-per-node", "4", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for line in (
        [*program, *command("alone")],
        [*torchrun, *program, *command("launched")],
        [*program, *command("workers", "--nproc", "4")],
    ):
        done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    trees = [rank_workers.tree(tmp_path / name) for name in ("alone", "launched", "workers")]
    assert trees[0] == trees[1] == trees[2]
    assert read_plan(tmp_path / "alone").extra["tensor_parallel"] == 2
