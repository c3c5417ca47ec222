"""Workers that an engine starts: what one does on its machine, what is recorded, what SLURM is told. Without Ray."""

import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vlm_distill_cache.common.errors import ConfigError, ProcessFailedError
from vlm_distill_cache.common.terminal.engines.jobs import (
    Job,
    WorkerLostError,
    submission_lines,
    submissions,
    work,
    write_record,
)
from vlm_distill_cache.common.terminal.engines.on_slurm import SlurmWorker, submit_to_slurm


@pytest.fixture
def job(tmp_path: Path):
    """A job whose command is a script of the shell, in a folder of its own."""
    (tmp_path / "here").mkdir()
    folder = tmp_path / "cache.jobs" / "20260101-000000-000"
    folder.mkdir(parents=True)

    def make(script: str, **options) -> Job:
        options = {"directory": tmp_path / "here", "folder": folder, "name": "mine"} | options
        return Job(command=("/bin/sh", "-c", script), **options)

    return make


def failed(job: Job) -> Path:
    return job.folder / "worker-3.failed"


def test_a_worker_runs_its_command_where_and_with_what_it_was_submitted_and_logs_all_it_says(job):
    mine = job('echo "$PWD $ONE $TWO"; echo more >&2; exec sleep 0', environment={"TWO": "2"})
    failed(mine).write_text("of an earlier start")
    work(mine, 3, environment={"ONE": "1", "TWO": "0"}, again=True)
    said = (mine.folder / "worker-3.log").read_text().splitlines()
    assert said[0].startswith("--- start on ")
    assert said[1:] == [f"{mine.directory} 1 2", "more"]
    assert not failed(mine).exists()


def test_a_command_that_fails_is_not_to_be_started_again_and_its_error_is_kept(job):
    mine = job("echo before; echo 'error: no such teacher'; echo '  write another'; exit 1")
    with pytest.raises(ProcessFailedError, match=r"exit code 1\. error: no such teacher\n  write another") as found:
        work(mine, 3, environment={}, again=True)
    assert not isinstance(found.value, WorkerLostError)
    assert failed(mine).read_text() == str(found.value)
    assert "before" not in str(found.value)
    assert str(mine.folder / "worker-3.log") in str(found.value)
    assert type(pickle.loads(pickle.dumps(found.value))) is ProcessFailedError  # noqa: S301 - as engines hand it over


@pytest.mark.parametrize(
    "script", ["kill -9 $$", "kill -TERM $$", "exit 143", "echo 'error: it was killed by SIGKILL'; exit 1"]
)
def test_a_command_that_is_killed_may_be_started_again_as_often_as_asked(job, script):
    mine = job(script, restarts=1)
    for _ in range(2):
        with pytest.raises(WorkerLostError, match="was killed"):
            work(mine, 3, environment={}, again=True)
        assert not failed(mine).exists()
    with pytest.raises(ProcessFailedError, match=r"worker-3 was killed 2 times \(--restarts 1\)") as found:
        work(mine, 3, environment={}, again=True)
    assert not isinstance(found.value, WorkerLostError)
    assert failed(mine).exists()
    failed(mine).unlink()
    with pytest.raises(ProcessFailedError, match=r"worker-3 on .* was killed") as found:  # by an engine that does not
        work(mine, 3, environment={}, again=False)
    assert not isinstance(found.value, WorkerLostError)
    assert failed(mine).exists()


def test_a_command_that_is_not_there_and_a_folder_that_is_not_shared_are_named(job, tmp_path):
    with pytest.raises(ProcessFailedError, match="nothing-here: No such file"):
        work(Job(**{**vars(job("")), "command": ("nothing-here",)}), 3, environment={}, again=True)
    with pytest.raises(ProcessFailedError, match=rf"{tmp_path}/gone is not there on .*disk that all machines share"):
        work(job("", directory=tmp_path / "gone"), 3, environment={}, again=True)


@pytest.mark.parametrize("alone", [True, False])
def test_a_command_may_watch_its_worker_only_where_nothing_stands_between(job, alone):
    mine = job("echo parent=$VLM_DISTILL_PARENT", alone=alone)
    work(mine, 0, environment={"VLM_DISTILL_PARENT": "1"}, again=False)
    assert f"parent={os.getpid() if alone else ''}\n" in (mine.folder / "worker-0.log").read_text()


def test_what_stops_a_worker_stops_its_command_in_good_order_which_engines_signals_do_not_reach(job):
    """As submitit stops one: by a signal to all of its processes."""
    mine = job("")
    stops = "lambda *_: (print('stopped', flush=True), sys.exit(143))"
    waits = f"import signal, sys, time; signal.signal(15, {stops}); print('ready', flush=True); time.sleep(60)"
    command = (sys.executable, "-I", "-S", "-c", waits)
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from vlm_distill_cache.common.terminal.engines.jobs import Job, work
        signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7))
        work(Job(name="mine", command={command!r}, folder=Path({str(mine.folder)!r}), directory=Path("/")), 0,
             environment={{}}, again=False)
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], start_new_session=True)
    log = mine.folder / "worker-0.log"
    until(lambda: log.exists() and "ready" in log.read_text())
    os.killpg(worker.pid, signal.SIGUSR2)
    assert worker.wait() == 7
    assert log.read_text().endswith("ready\nstopped\n")


def until(is_so) -> None:
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_submissions_are_recorded_without_secrets_and_listed_with_their_failures(job, tmp_path):
    mine = job("exec fetch s3://me:secret@host/bucket", workers=2, environment={"TOKEN": "hidden"})
    write_record(mine, engine="slurm", identity="job 5", stop="`scancel 5` ends it")
    failed(mine).write_text("worker-3 ended with exit code 1. error: no such teacher")
    (mine.folder.parent / "20270101-000000-000").mkdir()  # not ours
    (mine.folder.parent / "20270101-000000-000" / "job.json").write_text("{}")
    text = (mine.folder / "job.json").read_text()
    assert "secret" not in text
    assert "hidden" not in text
    found = submissions(tmp_path / "cache")
    assert [told["folder"] for told in found] == [mine.folder]
    first, second = submission_lines(found)
    assert "2 workers by slurm (job 5)" in first
    assert f"{mine.folder}/worker-*.log; `scancel 5` ends it" in first
    assert second == "  worker-3 failed: worker-3 ended with exit code 1. error: no such teacher"
    assert submissions(tmp_path / "other") == []
    failed(mine).write_bytes(b"error: \xff")  # by another program, or cut
    assert "worker-3 failed: error: " in submission_lines(submissions(tmp_path / "cache"))[1]


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch):
    """Programs of SLURM's names: ``sbatch`` keeps what it is given. Returns their folder."""
    pytest.importorskip("submitit", reason="needs submitit: pip install 'vlm-distill-cache[slurm]'")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"sbatch": f"cp $1 {tmp_path}/script; echo Submitted batch job 77", "srun": "exit 1"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs


def test_slurm_is_asked_for_an_array_that_it_may_requeue(job, slurm, tmp_path):
    mine = job(
        "", workers=3, gpus=4, cpus=16, restarts=2, settings={"partition": "gpu", "mem": "64G", "exclusive": True}
    )
    assert submit_to_slurm(mine, hours=1.5) == "77"
    script = (tmp_path / "script").read_text()
    lines = re.findall(r"#SBATCH --(.*)", script)
    assert {
        "array=0-2%3", "gpus-per-node=4", "cpus-per-task=16", "time=90", "nodes=1", "ntasks-per-node=1", "requeue",
        "open-mode=append", "signal=USR2@90", "job-name=mine", "partition=gpu", "mem=64G", "exclusive",
    } <= {*lines}  # fmt: skip
    assert re.search(
        r"^srun .*--cpus-per-task=16 --kill-on-bad-exit=1 .*python.* -m submitit.core._submit ", script, re.MULTILINE
    )
    assert (mine.folder / "77_submission.sh").read_text() == script
    assert submit_to_slurm(job("", workers=1), hours=1) == "77"
    assert "array" not in (tmp_path / "script").read_text()
    assert "gpus" not in (tmp_path / "script").read_text()


def test_what_slurm_says_against_a_job_is_told_and_where_there_is_none(job, slurm, monkeypatch):
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'error: invalid partition specified: gpu' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match=r"sbatch refused the job: (.|\n)*invalid partition(.|\n)*--engine-set"):
        submit_to_slurm(job(""), hours=1)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="sbatch and srun not found on this machine's PATH; run this on a machine"):
        submit_to_slurm(job(""), hours=1)


def test_machines_of_one_training_are_told_where_they_meet(job, slurm, monkeypatch):
    mine = job("env | grep ^PET_ | sort", nodes=2)
    told = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    for name, value in (told | {"SUBMITIT_EXECUTOR": "slurm"}).items():
        monkeypatch.setenv(name, value)
    SlurmWorker(job=mine, index=0)()
    said = (mine.folder / "worker-0.1.log").read_text().splitlines()[1:]
    assert [line for line in said if "ENDPOINT" not in line] == [
        "PET_NNODES=2",
        "PET_RDZV_BACKEND=c10d",
        "PET_RDZV_ID=77",
    ]
    assert re.fullmatch(r"PET_RDZV_ENDPOINT=gpu07:[23]\d{4}", said[2])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # its process
def test_submitit_runs_the_workers_and_takes_one_up_again_that_is_preempted(job, slurm):
    """Its executor on this machine, which sends the signals that SLURM does."""
    script = "trap 'echo stopped; exit 143' TERM; test -e again && exit 0; touch again; echo ready; while :; do sleep 0.05; done"
    mine = job(script, restarts=1)
    number = submit_to_slurm(mine, hours=0.05, cluster="local")
    log = mine.folder / "worker-0.log"
    until(lambda: log.exists() and "ready" in log.read_text())
    worker = int(re.search(r"process (\d+),", log.read_text())[1])
    os.kill(worker, signal.SIGUSR2)
    until(lambda: (mine.folder / f"{number}_0_result.pkl").exists())
    said = [re.sub(" on .*", "", line) for line in log.read_text().splitlines()]
    assert said == ["--- start", "ready", "stopped", "--- start"]
    assert not [*mine.folder.glob("*.failed")]
