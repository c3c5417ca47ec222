"""What launchers leave in the environment: believed where they are at work, else taken out and told of."""

import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlm_distill_cache.common.errors import ConfigError, ProcessFailedError
from vlm_distill_cache.common.terminal import launch as launches
from vlm_distill_cache.common.terminal.launch import (
    ALONE,
    Launch,
    clean_environment,
    enter_launch,
    find_launch,
    ignored_options,
    meet,
    told_of_several,
)

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
MPIRUN = {f"OMPI_COMM_WORLD_{name}": value for name, value in
          {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
MV2 = {f"MV2_COMM_WORLD_{name}": value for name, value in
       {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items()}  # fmt: skip
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
ALLOCATION = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def _below_torchrun(monkeypatch):
    monkeypatch.setattr(launches, "_is_below", lambda commands: True)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (TORCHRUN, ("torchrun", 3, 8, 1)),
        (SRUN, ("srun", 2, 4, 1)),
        (MPIRUN | {"PMIX_NAMESPACE": "job@1"}, ("mpirun", 1, 2, 1)),
        (MV2 | {"MPISPAWN_ID": "0"}, ("mpirun_rsh", 1, 2, 1)),
        (HYDRA | {"PMI_PORT": "node:4000"}, ("mpiexec", 1, 2, 1)),
        # mpirun starts its helper on each machine by srun, and torchrun may run below srun
        (MPIRUN | {"PMIX_NAMESPACE": "job@1"} | SRUN, ("mpirun", 1, 2, 1)),
        (SRUN | TORCHRUN, ("torchrun", 3, 8, 1)),
        ({}, ("", 0, 1, 0)),
        (PLAIN, ("", 0, 1, 0)),
        (MPIRUN, ("", 0, 1, 0)),
        (MPIRUN | {"PMIX_NAMESPACE": "job@1", "PMIX_SERVER_TMPDIR": "/nonexistent"}, ("", 0, 1, 0)),
        (HYDRA, ("", 0, 1, 0)),
        (HYDRA | {"PMI_FD": "987654"}, ("", 0, 1, 0)),
        (HYDRA | {"PMI_FD": "x"}, ("", 0, 1, 0)),
        (MV2, ("", 0, 1, 0)),
        (ALLOCATION, ("", 0, 1, 0)),
        (SRUN | {"SLURM_PTY_PORT": "3000"}, ("", 0, 1, 0)),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, ("", 0, 1, 0)),
        (SRUN | {"SLURM_PROCID": ""}, ("", 0, 1, 0)),
        (SRUN | {"SLURM_PROCID": "4"}, ("", 0, 1, 0)),
        (TORCHRUN | {"WORLD_SIZE": "two"}, ("", 0, 1, 0)),
    ],
)
def test_a_launcher_is_believed_only_where_it_started_several_processes(environment, expected):
    found = find_launch(environment)
    assert (found.launcher, found.rank, found.size, found.local) == expected


def test_a_torchrun_whose_meeting_place_is_gone_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        assert find_launch(told) == Launch(
            launcher="torchrun", rank=3, size=8, local=1, names=("RANK", "WORLD_SIZE"), address=("127.0.0.1", port),
            hosted=True,
        )  # fmt: skip
    assert find_launch(told) == ALONE


def test_a_torchrun_that_did_not_start_this_process_is_not_there(monkeypatch):
    assert find_launch(TORCHRUN).launcher == "torchrun"
    monkeypatch.undo()
    assert find_launch(TORCHRUN) == ALONE  # of the processes above, none is torchrun


def test_what_listens_but_is_no_meeting_place_ends_the_wait(monkeypatch):
    monkeypatch.setattr(launches, "_stores", [])
    monkeypatch.setenv(launches.WAIT, "2")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = ("127.0.0.1", server.getsockname()[1])
        launch = Launch(launcher="torchrun", rank=1, size=2, names=("RANK", "WORLD_SIZE"), address=address)
        began = time.monotonic()
        with pytest.raises(ConfigError, match="could not meet the others at 127"):
            meet(launch)
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("left", [PLAIN, MPIRUN, MV2, HYDRA, {"RANK": "x"}, {"PMI_SIZE": "two"}, {"PET_NNODES": "2"}])
def test_nothing_that_torch_or_accelerate_would_read_is_left_to_a_lone_process(left):
    options = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "FSDP_VERSION": "2", "ACCELERATE_USE_CPU": "maybe"}
    environment = {"PATH": "/bin", "OMP_NUM_THREADS": "1", **left, **options}
    clean_environment(environment, find_launch(environment))
    assert environment == {"PATH": "/bin", "OMP_NUM_THREADS": "1"}


def test_a_launch_is_left_in_the_words_of_torch_and_of_no_other():
    environment = MPIRUN | {"PMIX_NAMESPACE": "job@1", "WORLD_SIZE": "9", "PMI_SIZE": "7", "ACCELERATE_USE_CPU": "True"}
    found = find_launch(environment)
    clean_environment(environment, found)
    host, port = found.address
    assert environment == {
        "PMIX_NAMESPACE": "job@1", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": host,
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    both = [
        find_launch(MPIRUN | {"PMIX_NAMESPACE": job, "OMPI_COMM_WORLD_RANK": "0"}).address for job in ("job@1", "2")
    ]
    assert both[0] == (host, port) != both[1]  # all processes of a job derive one port
    torchrun = TORCHRUN | {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    cleaned = dict(torchrun)
    clean_environment(cleaned, find_launch(torchrun))
    assert cleaned == torchrun


def test_processes_on_several_machines_must_be_told_where_they_meet():
    far = SRUN | {"SLURM_STEP_NUM_NODES": "2"}
    assert find_launch(far).address is None
    assert find_launch(far | {"MASTER_ADDR": "node1", "MASTER_PORT": "4000"}).address == ("node1", 4000)
    with pytest.raises(ConfigError, match=r"export MASTER_ADDR .* MASTER_PORT .*`unset SLURM_STEP_ID SLURM_PROCID"):
        meet(find_launch(far), limit_s=0.1)


def test_what_was_left_is_told_of_in_one_line(monkeypatch, caplog):
    for name, value in (
        MPIRUN | PLAIN | {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"}
    ).items():
        monkeypatch.setenv(name, value)
    enter_launch.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert enter_launch() == enter_launch() == ALONE
    finally:
        enter_launch.cache_clear()
    alone, unused = (record.getMessage() for record in caplog.records)
    assert "runs alone: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, OMPI_COMM_WORLD_SIZE are set" in alone
    assert unused.endswith("ACCELERATE_MIXED_PRECISION=bf16 (here: dtype)")
    assert not {*MPIRUN, *PLAIN} & os.environ.keys()


def test_what_accelerate_sets_beside_its_single_process_is_no_leftover(monkeypatch, caplog):
    monkeypatch.setattr(launches, "_is_below", lambda commands: "accelerate" in commands)
    for name, value in {"MASTER_ADDR": "h", "MASTER_PORT": "1", "ACCELERATE_MIXED_PRECISION": "no"}.items():
        monkeypatch.setenv(name, value)
    enter_launch.cache_clear()
    try:
        assert enter_launch() == ALONE
    finally:
        enter_launch.cache_clear()
    (told,) = (record.getMessage() for record in caplog.records)
    assert "single process on a CPU" in told
    assert "unset" not in told


@pytest.mark.parametrize("quiet", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, TORCHRUN | {"WORLD_SIZE": "1"}])
def test_nothing_is_said_where_nothing_speaks_of_several(quiet):
    assert told_of_several(quiet) == []
    assert ignored_options({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "True"}) == []


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_processes_meet_as_often_as_they_like(tmp_path: Path):
    code = (
        "import sys, time; from vlm_distill_cache.common.terminal.launch import Launch, meet\n"
        "rank, port = map(int, sys.argv[1:])\n"
        "launch = Launch(launcher='srun', rank=rank, size=3, address=('127.0.0.1', port))\n"
        "for step in range(3):\n"
        "    time.sleep(0.3 * rank); meet(launch, limit_s=60); print(step, flush=True)\n"
        "time.sleep(1)  # process 0 holds the place\n"
    )
    port = str(free_port())
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), port], stdout=subprocess.PIPE) for rank in range(3)
    ]
    assert [process.communicate()[0].split() for process in started] == [[b"0", b"1", b"2"]] * 3


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ([(0, 3)], "RANK=1 and WORLD_SIZE=2, but others were told of another number"),
        ([(1, 2)], "another one is process 1, too"),
    ],
)
def test_processes_that_were_told_different_things_say_so_at_once(others, said: str, monkeypatch):
    """Beside the others' adding to the store, as `meet` does; with a store of this process."""
    counts: dict[str, int] = {}

    class Store:
        def add(self, key: str, number: int) -> int:
            counts[key] = counts.get(key, 0) + number
            return counts[key]

    monkeypatch.setattr(launches, "_stores", [Store()])
    for rank, size in [*others, (1, 2)]:
        monkeypatch.setattr(launches, "_meetings", iter([0]))
        launch = Launch(launcher="torchrun", rank=rank, size=size, names=("RANK", "WORLD_SIZE"))
        with pytest.raises(ConfigError, match=said if (rank, size) == (1, 2) and counts else "within 0 s"):
            meet(launch, limit_s=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_in_vain_says_so_and_what_to_unset(rank: int, monkeypatch):
    monkeypatch.setattr(launches, "_stores", [])
    monkeypatch.setenv(launches.WAIT, "1")
    waiting = Launch(
        launcher="torchrun", rank=rank, size=2, names=("RANK", "WORLD_SIZE"), address=("127.0.0.1", free_port())
    )
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"within 1 s.*`unset TORCHELASTIC_RUN_ID RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR"
    ):
        meet(waiting)
    assert time.monotonic() - began < 20
    monkeypatch.setenv(launches.WAIT, "soon")
    with pytest.raises(ConfigError, match=r"'soon': expected seconds"):
        meet(waiting)


@pytest.mark.parametrize(
    "text", ["[third_party/gloo/pair.cc] Connection closed by peer", "NCCL error: remote process exited"]
)
def test_a_process_that_lost_the_others_says_so_in_a_line(text: str, monkeypatch, tmp_path):
    for size, said in ((2, ProcessFailedError), (1, RuntimeError)):
        monkeypatch.setattr(launches, "enter_launch", lambda size=size: Launch(launcher="torchrun", size=size))
        with pytest.raises(RuntimeError) as caught, launches.explain_lost_processes(tmp_path):
            raise RuntimeError(text)
        assert type(caught.value) is said
        with pytest.raises(RuntimeError, match="shapes differ"), launches.explain_lost_processes(tmp_path):
            raise RuntimeError("shapes differ")
