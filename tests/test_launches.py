"""Both stages under what launchers leave behind, and in launches that are there: the same bytes, and an end."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from vlm_distill_cache.stage1_teacher.cli import main as teacher_cache
from vlm_distill_cache.stage2_student.cli import main as distill

ROOT = Path(__file__).parents[1]
STAGES = {"one": "vlm_distill_cache.stage1_teacher.cli", "two": "vlm_distill_cache.stage2_student.cli"}
# Both stages in one interpreter, each in the environment that it began with.
BOTH = """
import importlib, os, sys
from vlm_distill_cache.common.terminal.launch import enter_launch
began = dict(os.environ)
arguments = sys.argv[1:]
while arguments:
    module, count, *arguments = arguments
    try:
        importlib.import_module(module).main(arguments[: int(count)])
    except SystemExit as done:
        if done.code:
            raise
    arguments = arguments[int(count) :]
    os.environ.clear()
    os.environ.update(began)
    enter_launch.cache_clear()
"""
LEFT = {
    "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "0", "PET_NNODES": "2", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "PMI_SIZE": "two", "PMI_RANK": "1", "MV2_COMM_WORLD_SIZE": "4",
    "MV2_COMM_WORLD_RANK": "3", "SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "maybe",
    "CUDA_VISIBLE_DEVICES": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def command(tiny_llava: Path, tmp_path_factory):
    """The arguments of a tiny build into a folder, and of a tiny training from the cache of an undisturbed one."""

    def build(folder: Path) -> list[str]:
        sets = ["template=short", "limit=10", "shard_size=4", "batch_size=3", "fidelity_samples=2", "threads=1"]
        options = [part for option in sets for part in ("--set", option)]
        return ["build", "--teacher", str(tiny_llava), "--data", "shapes", "--cache", str(folder), *options]

    cache = tmp_path_factory.mktemp("undisturbed") / "cache"
    here(teacher_cache, build(cache))

    def train(folder: Path) -> list[str]:
        sets = ["limit=10", "dft.steps=2", "dft.batch_size=4", "device=cpu"]
        options = [part for option in sets for part in ("--set", option)]
        files = ["--data", "shapes", "--cache", str(cache), "--output", str(folder)]
        return ["train", "--student", "mobilevlm-tiny", "--phases", "dft", *files, *options]

    return {"one": build, "two": train, "cache": cache}


def here(main, arguments: list[str]) -> None:
    """Run a command in this process, with one thread as those that are started have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        done = CliRunner().invoke(main, arguments)
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output


def start(stage: str, arguments: list[str], left: dict[str, str]) -> subprocess.Popen:
    return begin(["-m", STAGES[stage], *arguments], left)


def begin(words: list[str], left: dict[str, str]) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | left,
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """What a stage makes: shards, or weights."""
    kept = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "tensorboard"]
    of = {"shards", "final"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in kept
        if of & set(path.parts) and path.suffix != ".json"
    }


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "student"
    here(distill, command["two"](output))
    return {"one": content(command["cache"]), "two": content(output)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.slow
def test_left_over_variables_change_one_line_and_no_byte(stage: str, command, undisturbed, tmp_path: Path):
    said, _ = start(stage, command[stage](tmp_path / "made"), LEFT).communicate(timeout=200)
    assert content(tmp_path / "made") == undisturbed[stage] != {}, said
    assert said.count("runs alone: RANK, WORLD_SIZE") == 1
    assert "Traceback" not in said


@pytest.mark.slow
def test_processes_that_srun_started_share_the_work(command, undisturbed, tmp_path: Path):
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    words = []
    for stage, module in STAGES.items():
        arguments = command[stage](tmp_path / stage)
        words += [module, str(len(arguments)), *arguments]
    both = [begin(["-c", BOTH, *words], step | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert content(tmp_path / "one") == undisturbed["one"]
    # A sum of two gradients may differ in the last bit.
    assert content(tmp_path / "two").keys() == undisturbed["two"].keys()


@pytest.mark.parametrize("how", ["timeout", signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_who_waits_for_processes_that_nobody_started_ends(how, command, tmp_path: Path):
    left = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "1"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        left |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(server.getsockname()[1]),
            "VLM_DISTILL_LAUNCH_WAIT": "1" if how == "timeout" else "300",
        }
        process = start("two", command["two"](tmp_path / "made"), left)
        server.settimeout(100)
        server.accept()[0].close()  # it asks for process 0, and nobody answers: from now on it waits
        if how != "timeout":
            process.send_signal(how)
            began = time.monotonic()
        said, _ = process.communicate(timeout=100)
    assert process.returncode != 0
    assert "Traceback" not in said
    if how == "timeout":
        assert "`unset SLURM_STEP_ID SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID`" in said
    else:
        assert time.monotonic() - began < 10


def test_of_a_command_for_one_process_the_first_does_the_work(tmp_path: Path):
    launched = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}
    for rank, code, told in (("0", 2, "does not exist"), ("1", 0, "process 1 of 2 (srun: SLURM_PROCID")):
        process = start("two", ["report", str(tmp_path / "none")], launched | {"SLURM_PROCID": rank})
        said, _ = process.communicate(timeout=100)
        assert (process.returncode, told in said) == (code, True), said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flags", "configuration"])
def test_of_a_launch_that_would_shard_only_a_student_by_fsdp2_is_trained(
    how: str, command, undisturbed, tmp_path: Path
):
    """`accelerate launch` itself: FSDP 1 by its flags, FSDP 2 by its default configuration file."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    if how == "flags":
        launch += ["--use_fsdp", "--fsdp_version", "1", "--fsdp_auto_wrap_policy", "NO_WRAP"]
    else:
        settings = tmp_path / "accelerate" / "default_config.yaml"
        settings.parent.mkdir()
        settings.write_text(
            "{compute_environment: LOCAL_MACHINE, distributed_type: FSDP, num_machines: 1, machine_rank: 0, use_cpu: false,\n"
            "mixed_precision: 'no', fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}}\n"
        )
    for stage in STAGES:
        ran = subprocess.run(
            [*launch, "-m", STAGES[stage], *command[stage](tmp_path / "made")],
            env=os.environ | {"HF_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        if stage == "two" and how == "configuration":
            assert ran.returncode == 0, ran.stderr
            assert ran.stderr.count("the student is divided among 2 processes by FSDP2") == 1
            assert content(tmp_path / "made").keys() == undisturbed["two"].keys()
            assert list((tmp_path / "made").rglob("shard-00002-*.safetensors"))
            continue
        kind = "FSDP" if how == "flags" else "FSDP2"
        assert ran.returncode == 1
        assert ran.stderr.count(f"error: not supported: {kind} (ACCELERATE_USE_FSDP=true)") == 1, ran.stderr
        assert str(tmp_path / "accelerate" / "default_config.yaml") in ran.stderr
        assert not (tmp_path / "made").exists()
