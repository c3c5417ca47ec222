"""``distill submit``: the launcher's command, what is refused, and a training of two machines."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from finished_runs import FAST
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.terminal.engines.jobs import Job, submissions, write_record

CLI = "vlm_distill_cache.stage2_student.cli"
SEVERAL = "vlm_distill_cache.stage2_student.training.several"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained-from") / "tiny"
    build_tiny_cache(folder)
    return folder


@pytest.fixture
def _both_are_installed(monkeypatch):
    """As far as a dry run looks."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in ("ray", "submitit") or find(name))


def submit(cache, output, *words):
    given = ["--cache", cache, "--output", output, "--student", "mobilevlm-tiny", "--data", DATA, *words]
    return CliRunner().invoke(group_of("stage2_student"), ["submit", *map(str, given)])


def command(cache, output, *words):
    told = submit(cache, output, "--dry-run", "--json", *words)
    assert told.exit_code == 0, told.output
    return json.loads(told.stdout)["command"]


@pytest.mark.usefixtures("_both_are_installed")
def test_a_training_is_started_by_torchs_launcher_with_a_process_for_each_gpu(cache, tmp_path):
    output = tmp_path / "out"
    settings = ["--set", f'output="{output}"', "--set", 'student="mobilevlm-tiny"', "--set", f'data="{DATA}"']
    one = command(cache, output, "--engine", "ray", "--gpus", 4, "--set", "dft.lr=1e-3", "--extend")
    torch = [sys.executable, "-m", SEVERAL, "--nproc_per_node=4", "--standalone", "-m", CLI, "train"]
    assert one == [*torch, *settings, "--set", "dft.lr=1e-3", "--cache", str(cache), "--extend"]
    two = command(cache, output, "--engine", "slurm", "--nodes", 2, "--nproc", 3)
    assert two == [
        sys.executable,
        "-m",
        SEVERAL,
        "--nproc_per_node=3",
        "-m",
        CLI,
        "train",
        *settings,
        "--cache",
        str(cache),
    ]
    run = command(cache, output, "--engine", "slurm", "--job", "run", "--gpus", 2)
    assert run == [sys.executable, "-m", CLI, "run", *settings, "--cache", str(cache), "--nproc", "2"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("_both_are_installed")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--engine", "ray", "--nodes", "2"], "--nodes goes with --engine slurm and --job train"),
        (["--engine", "slurm", "--nodes", "2", "--job", "run"], "--nodes goes with --engine slurm and --job train"),
        (["--engine", "slurm", "--teacher", "t"], "--teacher goes with --job run"),
        (["--engine", "slurm", "--engine-set", "array=0-3"], "--engine-set array: this command says it itself"),
        (["--engine", "slurm", "--engine-set", "nodes=2"], "--engine-set nodes: give --nodes in its place"),
        (["--engine", "slurm", "--set", "dft.lr=fast"], "dft.lr is 'fast'"),
        (["--engine", "slurm", "--cache", "nowhere"], "nowhere is neither a folder nor an address"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(cache, tmp_path, words, message):
    told = submit(cache, tmp_path / "out", *words)
    assert told.exit_code in (1, 2)
    assert message in " ".join(told.output.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.usefixtures("_both_are_installed")
def test_a_cache_that_is_submitted_need_not_be_there_yet(tmp_path):
    cache, folder = tmp_path / "to-come", tmp_path / "to-come.jobs" / "1"
    folder.mkdir(parents=True)
    job = Job(name="teacher-cache", command=("x",), folder=folder, directory=tmp_path)
    write_record(job, engine="slurm", identity="job 5", stop="")
    told = submit(cache, tmp_path / "out", "--engine", "slurm", "--engine-set", "dependency=afterok:5", "--dry-run")
    assert told.exit_code == 0, told.output
    assert f"{cache} is not there yet, but submitted: the training's options are checked when it starts" in told.output


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do case $1 in --output | --error) shift 2 ;; *) shift ;; esac; done
for number in 0 1; do SLURM_PROCID=$number SLURM_NODEID=$number SLURM_LOCALID=0 "$@" & done
wait
"""
SBATCH = """#!/bin/bash
export SLURM_JOB_ID=77 SLURM_JOB_NODELIST=localhost SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=2
setsid bash "$1" > "$(dirname "$0")/said" 2>&1 < /dev/null &
echo Submitted batch job 77
"""


@pytest.mark.slow
def test_two_machines_of_slurm_train_one_student(cache, tmp_path, monkeypatch):
    """By programs of SLURM's names that start both here: the script that submitit writes, its worker, torch's rendezvous."""
    pytest.importorskip("submitit", reason="needs submitit: pip install 'vlm-distill-cache[slurm]'")
    programs, output = tmp_path / "bin", tmp_path / "out"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    fast = [word for setting in FAST for word in ("--set", setting)]
    told = submit(cache, "out", "--engine", "slurm", "--gpus", 0, "--nodes", 2, "--hours", 1, *fast)
    assert told.exit_code == 0, told.output
    (job,) = submissions(output)
    end = time.monotonic() + 900
    while len([*job["folder"].glob("77_*_result.pkl")]) < 2:
        assert time.monotonic() < end
        time.sleep(0.2)
    logs = {path.name: path.read_text() for path in job["folder"].glob("worker-*.log")}
    assert {*logs} == {"worker-0.log", "worker-0.1.log"}
    assert not [*job["folder"].glob("*.failed")], logs
    assert "Trains with 2 processes, started by torchrun" in "".join(logs.values())
    assert (output / "final" / "model.safetensors").exists()
