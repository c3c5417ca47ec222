"""``teacher-cache submit``: what is started, what is refused, and what ``status`` says of it."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.terminal.engines.jobs import submissions

SHAPES = "shapes:images=20,seed=5"


def submit(*words):
    return CliRunner().invoke(group_of("stage1_teacher"), ["submit", *map(str, words)])


def status(cache):
    return CliRunner().invoke(group_of("stage1_teacher"), ["status", str(cache)])


@pytest.fixture(autouse=True)
def _both_are_installed(monkeypatch):
    """As far as a dry run looks."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in ("ray", "submitit") or find(name))


def test_a_dry_run_says_what_would_be_started_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("build.yaml").write_text(f"data: {SHAPES}\ncache: caches/mine\n")
    told = submit(
        "--engine", "slurm", "--config", "build.yaml", "--workers", "16", "--batch-size", "4", "--hours", "2.5",
        "--engine-set", "partition=gpu", "--engine-set", "exclusive", "--env", "TOKEN=secret", "--dry-run", "--json",
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    document = json.loads(told.stdout)
    folder = document["logs"]
    assert re.fullmatch(rf"{tmp_path}/caches/mine\.jobs/\d{{8}}-\d{{6}}-\d{{3}}", folder)
    assert document["command"] == [
        sys.executable, "-m", "vlm_distill_cache.stage1_teacher.cli", "build", "--config", f"{folder}/options.yaml",
        "--set", "batch_size=4", "--part", "any",
    ]  # fmt: skip
    assert (document["workers"], document["directory"]) == (16, str(tmp_path))
    assert "16 workers by slurm, each: 1 GPUs, 8 CPUs, 2.5 hours" in told.stderr
    assert "options of slurm: partition=gpu, exclusive=True" in told.stderr
    assert "variables: TOKEN\n" in told.stderr
    assert "secret" not in told.output
    assert [path.name for path in tmp_path.iterdir()] == ["build.yaml"]


@pytest.mark.parametrize(
    ("options", "behind"),
    [
        ([], []), (["--gpus", "8"], ["--nproc", "8"]), (["--gpus", "8", "--set", "device_map=auto"], []),
        (["--gpus", "8", "--nproc", "4"], ["--nproc", "4"]), (["--gpus", "0"], []),
    ],
)  # fmt: skip
def test_a_worker_has_a_process_for_each_gpu_unless_the_teacher_takes_all(tmp_path, options, behind):
    told = submit("--engine", "ray", "--data", SHAPES, "--cache", tmp_path / "c", "--dry-run", "--json", *options)
    command = json.loads(told.stdout)["command"]
    assert command[command.index("--part") :] == ["--part", "any", *behind]


def test_behind_a_prefix_stands_the_python_of_whatever_it_opens(tmp_path):
    told = submit(
        "--engine", "ray", "--cache", tmp_path / "c", "--prefix", "apptainer exec 'my image'", "--dry-run", "--json"
    )
    assert json.loads(told.stdout)["command"][:5] == ["apptainer", "exec", "my image", "python", "-m"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "ray", "--hours", "2"], "--hours goes with --engine slurm"),
        (["--engine", "slurm", "--address", "auto"], "--address goes with --engine ray"),
        (["--engine", "slurm", "--engine-set", "time=10"], "--engine-set time: give --hours in its place"),
        (["--engine", "slurm", "--engine-set", "gpus-per-node=1"], "give --gpus in its place"),
        (["--engine", "slurm", "--engine-set", "ntasks-per-node=4"], "give --workers in its place"),
        (
            ["--engine", "slurm", "--engine-set", "nodes=4"],
            "--engine-set nodes: this command says it itself; leave it out",
        ),
        *((["--engine", "slurm", "--hours", hours], f"{hours} is not a finite number") for hours in ("nan", "inf")),
        (["--engine", "ray", "--engine-set", "resources={a"], "--engine-set resources:"),
        (["--engine", "ray", "--env", "HF_HOME"], "--env 'HF_HOME': expected NAME=VALUE"),
        (["--engine", "ray", "--prefix", "a 'b"], "--prefix: No closing quotation"),
        (["--engine", "ray", "--batch-sise", "2"], "Did you mean --batch-size"),
        (["--engine", "ray", "--set", "store=tar"], "store is 'tar'; expected one of"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_started(tmp_path, options, message):
    told = submit("--cache", tmp_path / "c", *options)
    assert told.exit_code in (1, 2)
    assert message in " ".join(told.output.split())
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("engine", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_engine_that_is_not_installed_names_the_line_that_does(tmp_path, monkeypatch, engine, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = submit("--engine", engine, "--cache", tmp_path / "c")
    assert told.exit_code == 1
    assert f"needs {package}, which is not installed: run `pip install 'vlm-distill-cache[{engine}]'`" in told.output


def test_what_was_submitted_is_recorded_with_a_copy_of_its_options_and_listed_before_a_worker_begins(
    tmp_path, monkeypatch
):
    """By a program of sbatch's name that takes the job."""
    pytest.importorskip("submitit", reason="needs submitit: pip install 'vlm-distill-cache[slurm]'")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho Submitted batch job 77\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file, cache = tmp_path / "build.yaml", tmp_path / "cache"
    file.write_text(f"data: {SHAPES}\n")
    assert "there is no such folder" in status(cache).output
    told = submit("--engine", "slurm", "--config", file, "--cache", cache, "--workers", 2)
    assert told.exit_code == 0, told.output
    assert "Submitted as job 77" in told.output
    (one,) = submissions(cache)
    assert (one["folder"] / "options.yaml").read_text() == file.read_text()
    assert f"`teacher-cache status {cache}` say how far it is; `scancel 77` ends it" in told.output
    shown = status(cache).output
    assert f"{cache}: no worker has begun it yet\n  submitted 20" in shown
    assert "2 workers by slurm (job 77)" in shown


def test_a_submission_that_is_refused_leaves_nothing_behind(tmp_path, monkeypatch):
    """By a program of sbatch's name that takes no job."""
    pytest.importorskip("submitit", reason="needs submitit: pip install 'vlm-distill-cache[slurm]'")
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text("#!/bin/sh\necho invalid partition >&2; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    place = tmp_path / "place"
    place.mkdir()
    told = submit("--engine", "slurm", "--cache", place / "cache")
    assert told.exit_code == 1
    assert "sbatch refused the job" in told.output
    assert not [*place.iterdir()]


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_ray_starts_killed_workers_again_and_more_may_join(tmp_path: Path, tiny_llava: Path, monkeypatch):
    """The bytes are those of one process; a worker that fails by itself ends with its error, and is not started again."""
    ray = pytest.importorskip("ray", reason="needs ray: pip install 'vlm-distill-cache[ray]'")
    from ray.cluster_utils import Cluster

    cache, one = tmp_path / "cache", tmp_path / "one"
    options = [
        "--teacher",
        tiny_llava,
        "--data",
        "shapes",
        "--limit",
        240,
        "--set",
        "template=short",
        "--set",
        "batch_size=2",
    ]
    options += ["--set", "shard_size=4", "--set", "fidelity_samples=1", "--signals", "logits", "--set", "device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    program = [sys.executable, "-m", "vlm_distill_cache.stage1_teacher.cli"]

    def start(*words):
        words = [*program, *map(str, words)]
        return subprocess.Popen(words, env=environment, text=True, stdout=-1, stderr=subprocess.STDOUT, cwd=tmp_path)

    def submitted(workers: int, *words):
        engine = ["--engine", "ray", "--gpus", 0, "--cpus", 1, "--workers", workers, "--address", cluster.address]
        return start("submit", *engine, *words)

    def log(submission: int, worker: int) -> str:
        found = submissions(cache)
        path = found[submission]["folder"] / f"worker-{worker}.log" if len(found) > submission else None
        return path.read_text() if path is not None and path.exists() else ""

    def until(is_so):
        end = time.monotonic() + 900
        while not is_so():
            assert time.monotonic() < end
            time.sleep(0.2)

    for name in ("RAY_worker_niceness", "RAY_USAGE_STATS_ENABLED", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, environment[name])
    # Ray gives a machine 30 s to begin, less than a busy one takes.
    patient = SimpleNamespace(**{**vars(time), "monotonic": lambda: time.monotonic() / 20})
    monkeypatch.setattr("ray._private.node.time", patient)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
    try:
        first = submitted(2, "--cache", cache, *options)  # of which one finds no room
        until(lambda: len([*cache.glob("shards/*.json")]) > 1)
        running = next(number for number in (0, 1) if log(0, number))
        waiting = 1 - running
        assert not log(0, waiting)
        worker = int(re.findall(r"process (\d+),", log(0, running))[-1])
        os.kill(worker, signal.SIGKILL)  # Ray's own process, with which the build ends
        cluster.add_node(num_cpus=2, object_store_memory=100 << 20)  # a machine joins: room for the other
        second = submitted(1, "--cache", cache, *options)  # and a worker is added
        until(lambda: log(0, running).count("--- start") == 2 and log(0, waiting) and log(1, 0))
        worker = re.findall(r"process (\d+),", log(1, 0))[-1]
        children = Path(f"/proc/{worker}/task/{worker}/children")
        until(children.read_text)
        os.kill(int(children.read_text().split()[0]), signal.SIGKILL)  # the build alone
        until(lambda: log(1, 0).count("--- start") == 2)
        for submission in (first, second):
            said, _ = submission.communicate(timeout=900)
            assert submission.returncode == 0, said
        wrong = submitted(2, "--cache", tmp_path / "wrong", "--teacher", tmp_path)
        said, _ = wrong.communicate(timeout=900)
        assert wrong.returncode == 1
        assert "no worker came to its end. The first one's error: worker-" in said
        assert (submissions(tmp_path / "wrong")[0]["folder"] / "worker-0.log").read_text().count("--- start") == 1
    finally:
        cluster.shutdown()
        ray.shutdown()
    alone = start("build", "--cache", one, *options)
    alone.communicate()
    assert tree(cache) == tree(one)
    assert "sealed" in status(cache).output
