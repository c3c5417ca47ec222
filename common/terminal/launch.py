"""Whether this process is one of several that a launcher started, or was only left a launcher's variables.

``WORLD_SIZE``, ``OMPI_COMM_WORLD_SIZE`` and their like outlive the launch that set them: in shells opened inside a job, in
containers, in a start-up file. Libraries believe them, and then wait for processes that nobody started. Here they count
only beside what the launcher alone sets and, where it can be seen, while it is still at work. Both stages ask here,
once, before any library looks; what is left in the environment then is true.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import logging
import os
import re
import stat
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import ConfigError, ProcessFailedError
from vlm_distill_cache.common.printing import first_line, one_line
from vlm_distill_cache.common.terminal.sharding import AS_FSDP2_DOES, FSDP2, OFF, find_sharding

logger = logging.getLogger(__name__)
# What gloo and NCCL say of a process that is gone.
_LOST = re.compile(r"\bgloo\b|\bNCCL\b|Connection (?:closed|reset) by peer")

WAIT = "VLM_DISTILL_LAUNCH_WAIT"
WAIT_S = 90.0  # for processes that are started together; the variable above gives slow clusters more
READY_S = 1800.0  # for processes that are reading models and data
SAY_S = 10.0  # a wait that is longer is told of
_CONNECT_S = 5.0
_GRACE_S = 2.0
_MOST = 1 << 20  # more processes than any launch has


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One of the processes that a launcher started; alone by default.

    Attributes:
        launcher: Its command; empty: none.
        rank: Which, from 0.
        size: How many there are.
        local: Which of those of this machine, from 0.
        names: The variables that say rank and size.
        address: Host and port where they meet; None where the launcher does not tell.
        hosted: The launcher holds the meeting place; else process 0 does.
        sharding: What the environment held to divide a model by, as from `find_sharding`.
    """

    launcher: str = ""
    rank: int = 0
    size: int = 1
    local: int = 0
    names: tuple[str, ...] = ()
    address: tuple[str, int] | None = None
    hosted: bool = False
    sharding: Mapping[str, str] = field(default_factory=dict, compare=False)

    def of_groups(self, size: int) -> Launch:
        """As if each of so many successive processes were one; whole groups alone, which the caller makes sure of."""
        return replace(self, rank=self.rank // size, size=max(1, self.size // size))


ALONE = Launch()
_AGENTS = frozenset(
    {
        "torchrun", "torch.distributed.run", "torch.distributed.launch", "accelerate", "accelerate-launch",
        "accelerate.commands.launch", "accelerate.commands.accelerate_cli", "launch.py", "deepspeed", "torchx",
        "vlm_distill_cache.stage2_student.training.several",
    }
)  # fmt: skip


def _is_below(commands: frozenset[str]) -> bool:
    """Whether one of these commands or modules started this process, directly or not; true where that cannot be seen."""
    process = os.getppid()
    try:
        while process > 1:
            folder = Path("/proc") / str(process)
            words = folder.joinpath("cmdline").read_bytes().decode(errors="replace").split("\0")
            if not commands.isdisjoint(word.rsplit("/", 1)[-1] for word in words[:8]):
                return True
            process = int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return True
    return False


def _agent_answers(environment: Mapping[str, str]) -> bool:
    """Whether torchrun's agent is there: it started this process, and where it holds the meeting place, it listens."""
    if not _is_below(_AGENTS):
        return False
    address = _address(environment)
    if address is None or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import socket

    try:
        socket.create_connection(address, timeout=_CONNECT_S).close()
    except (ConnectionRefusedError, socket.gaierror):
        return False
    except OSError:
        return True
    return True


def _folder_is_there(environment: Mapping[str, str]) -> bool:
    """Whether Open MPI's folder of this job is there, which it removes at the end."""
    folder = environment.get("PMIX_SERVER_TMPDIR")
    return folder is None or Path(folder).is_dir()


def _socket_is_open(environment: Mapping[str, str]) -> bool:
    """Whether the socket to MPICH's process manager, which a new shell has not, is there."""
    number = environment.get("PMI_FD", "")
    try:
        return not number or stat.S_ISSOCK(os.fstat(int(number)).st_mode)
    except (OSError, ValueError, OverflowError):
        return False


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """How a launcher tells its processes what they are.

    Attributes:
        marks: It alone sets one of these.
        here: How many of the processes are on this machine, or (``nodes``) how many machines there are.
        shell: Set where a person types into one of the processes.
        alive: Whether it is still at work.
    """

    name: str
    rank: str
    size: str
    local: tuple[str, ...]
    marks: tuple[str, ...]
    here: str = ""
    nodes: str = ""
    shell: str = ""
    job: tuple[str, ...] = ()
    alive: Callable[[Mapping[str, str]], bool] = field(default=lambda environment: True)


# The first that fits counts: mpirun starts its helpers by srun, and torchrun may run below either.
_LAUNCHERS = (
    _Launcher(
        name="torchrun", rank="RANK", size="WORLD_SIZE", local=("LOCAL_RANK",), marks=("TORCHELASTIC_RUN_ID",),
        here="LOCAL_WORLD_SIZE", alive=_agent_answers,
    ),
    _Launcher(
        name="mpirun", rank="OMPI_COMM_WORLD_RANK", size="OMPI_COMM_WORLD_SIZE", local=("OMPI_COMM_WORLD_LOCAL_RANK",),
        marks=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_hnp_uri"), here="OMPI_COMM_WORLD_LOCAL_SIZE",
        job=("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"), alive=_folder_is_there,
    ),
    _Launcher(
        name="mpirun_rsh", rank="MV2_COMM_WORLD_RANK", size="MV2_COMM_WORLD_SIZE", local=("MV2_COMM_WORLD_LOCAL_RANK",),
        marks=("MPISPAWN_ID", "PMI_FD", "PMI_PORT"), here="MV2_COMM_WORLD_LOCAL_SIZE", job=("PMI_PORT",),
        alive=_socket_is_open,
    ),
    _Launcher(
        name="mpiexec", rank="PMI_RANK", size="PMI_SIZE", local=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID"),
        marks=("PMI_FD", "PMI_PORT"), here="MPI_LOCALNRANKS", job=("PMI_PORT",), alive=_socket_is_open,
    ),
    _Launcher(
        name="srun", rank="SLURM_PROCID", size="SLURM_STEP_NUM_TASKS", local=("SLURM_LOCALID",),
        marks=("SLURM_STEP_ID",), nodes="SLURM_STEP_NUM_NODES", shell="SLURM_PTY_PORT",
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
    ),
)  # fmt: skip
_ACCELERATE = frozenset(name for name in _AGENTS if name.startswith("accelerate"))
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_SIZES = (*(launcher.size for launcher in _LAUNCHERS[1:]), "SLURM_NTASKS")
# What torch and accelerate read. ACCELERATE_ and the like are options of accelerate: ours stand in our configuration.
_READ = (
    *_TORCH, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "NODE_RANK",
    "FORK_LAUNCHED",
)  # fmt: skip
_OPTIONS = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")
_READ_PREFIXES = (
    "TORCHELASTIC_", "PET_", "OMPI_COMM_WORLD_", "PMI_", "MPI_LOCAL", "MV2_COMM_WORLD_", *_OPTIONS,
)  # fmt: skip
_KEPT_OF_TORCHRUN = ("GROUP_", "ROLE_", "TORCHELASTIC_")
_OURS = {"ACCELERATE_MIXED_PRECISION": "dtype", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "micro_batch_size",
         "ACCELERATE_GRADIENT_CLIPPING": "clip", "ACCELERATE_TORCH_DEVICE": "device",
         "FSDP_ACTIVATION_CHECKPOINTING": "gradient_checkpointing"}  # fmt: skip
_CPU = "ACCELERATE_USE_CPU"


def find_launch(environment: Mapping[str, str]) -> Launch:
    """Say which of several processes this one is, by what its launcher has set; alone unless all of it is there."""
    for launcher in _LAUNCHERS:
        local = next((environment[name] for name in launcher.local if name in environment), "")
        values = [environment.get(launcher.rank, ""), environment.get(launcher.size, ""), local]
        marked = any(mark in environment for mark in launcher.marks) and launcher.shell not in environment
        if not marked or not all(value.isdecimal() and len(value) < 10 for value in values):
            continue
        rank, size, local_rank = map(int, values)
        if not rank < size or not launcher.alive(environment):
            continue
        if size > 1:
            return Launch(
                launcher=launcher.name,
                rank=rank,
                size=size,
                local=local_rank,
                names=(launcher.rank, launcher.size),
                address=_address(environment) or _own_address(launcher, environment, size),
                hosted=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and launcher is _LAUNCHERS[0],
            )
    return ALONE


@functools.cache
def enter_launch() -> Launch:
    """Find the launch this process is part of, and leave only what is true of it in the environment; once a process.

    What somebody else left is taken out, and told of in one line.
    """
    launch = find_launch(os.environ)
    left = [] if launch.size > 1 else told_of_several(os.environ)
    options, options_set = ignored_options(os.environ), {*os.environ}
    launch = replace(launch, sharding=find_sharding(os.environ))
    clean_environment(os.environ, launch)
    if (
        {*left} == {"MASTER_ADDR", "MASTER_PORT"}
        and "ACCELERATE_MIXED_PRECISION" in options_set
        and _is_below(_ACCELERATE)
    ):
        logger.warning(
            "runs alone: `accelerate launch` starts a single process on a CPU, whatever --num_processes says, but through mpirun; "
            "`torchrun --nproc-per-node N --no-python distill train ...` and `distill run --nproc N ...` start several"
        )
    elif left:
        logger.warning(
            "runs alone: %s %s set, but no launcher of several processes (torchrun, accelerate launch, mpirun, srun) is at "
            "work here, or not all of what it sets is left; unset %s to be rid of this line",
            ", ".join(left),
            "is" if len(left) == 1 else "are",
            "it" if len(left) == 1 else "them",
        )
    if options and launch.rank == 0:
        logger.warning("not used, options of this command say it: %s", ", ".join(options))
    return launch


def told_of_several(environment: Mapping[str, str]) -> list[str]:
    """The variables that speak of several processes or of where they meet, whoever set them."""
    lone = environment.get("TORCHELASTIC_RUN_ID") is not None and environment.get("WORLD_SIZE") == "1"  # torchrun, one
    torch = [] if lone else [name for name in (*_TORCH, "TORCHELASTIC_RUN_ID") if name in environment]
    return torch + [name for name in _SIZES if environment.get(name, "1") not in ("0", "1")]


def ignored_options(environment: Mapping[str, str]) -> list[str]:
    """The options of ``accelerate launch`` that are on, with values: a command's own options say what is done.

    Those that are refused, or ask for FSDP2, `find_sharding` finds.
    """
    found = find_sharding(environment)
    usual = {name: (word,) for name, word in AS_FSDP2_DOES.items()} if FSDP2 in found.values() else {}
    return sorted(
        f"{name}={one_line(value)}" + (f" (here: {_OURS[name]})" if name in _OURS else "")
        for name, value in environment.items()
        if name.startswith(_OPTIONS)
        and name != _CPU
        and value.strip().lower() not in usual.get(name, OFF)
        and f"{name}={one_line(value)}" not in found
    )


def clean_environment(environment: MutableMapping[str, str], launch: Launch) -> None:
    """Leave what is true of a launch where torch and accelerate look for it, and nothing else that they would read."""
    true = {}
    if launch.size > 1:
        true = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.size), "LOCAL_RANK": str(launch.local)}
        if "LOCAL_WORLD_SIZE" in environment and launch.launcher == "torchrun":
            true["LOCAL_WORLD_SIZE"] = environment["LOCAL_WORLD_SIZE"]
        if launch.address is not None:
            true |= {"MASTER_ADDR": launch.address[0], "MASTER_PORT": str(launch.address[1])}
        if launch.launcher == "torchrun":
            true |= {name: value for name, value in environment.items() if name.startswith(_KEPT_OF_TORCHRUN)}
    if environment.get(_CPU, "").strip().lower() in ("1", "true", "yes", "y", "on", "t"):
        true[_CPU] = "true"  # a device, as CUDA_VISIBLE_DEVICES chooses one
    for name in [name for name in environment if name in _READ or name.startswith(_READ_PREFIXES)]:
        del environment[name]
    environment.update(true)


def _address(environment: Mapping[str, str]) -> tuple[str, int] | None:
    host, port = (environment.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    return (host, int(port)) if host and port.isdecimal() and 0 < int(port) < 1 << 16 else None


def _own_address(launcher: _Launcher, environment: Mapping[str, str], size: int) -> tuple[str, int] | None:
    """Where the processes of one machine meet whose launcher names no place: a port that all derive from their job."""
    if launcher is _LAUNCHERS[0]:
        return None
    nodes = environment.get(launcher.nodes, "1") if launcher.nodes else "1"
    if nodes != "1" or (launcher.here and environment.get(launcher.here) != str(size)):
        return None
    job = [environment[name] for name in launcher.job if name in environment] or [str(os.getppid())]
    return "127.0.0.1", 20000 + zlib.crc32(
        "/".join([launcher.name, str(os.getuid()), *job]).encode("utf-8", "replace")
    ) % 12000


_meetings = itertools.count()
_stores: list[Any] = []  # the meeting place of this process, which must outlive the meetings


def meet(launch: Launch, *, limit_s: float | None = None) -> None:
    """Wait until all processes of a launch have come as far as this one; may be interrupted at any time.

    All processes call it equally often, before torch makes its process group of them.

    Args:
        limit_s: Most seconds to wait; None: ``WAIT_S``, or what the environment says.

    Raises:
        ConfigError: If they do not come, cannot meet, or were told different things; names the variables that spoke of them.
    """
    if launch.size == 1:
        return
    limit = _wait_s() if limit_s is None else limit_s
    deadline = time.monotonic() + limit
    if not _stores:
        _stores.append(_open_store(launch, deadline, limit))
    key = f"vlm-distill/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_meetings)}"
    try:
        if int(_stores[0].add(f"{key}/{launch.rank}", 1)) > 1:
            raise _told_apart(launch, f"another one is process {launch.rank}, too")
        added = 1 + launch.size * _MOST  # one number counts those that came, and sums how many each was told of
        told = time.monotonic() + SAY_S
        while True:
            sizes, here = divmod(int(_stores[0].add(key, added)), _MOST)
            if sizes != here * launch.size:
                raise _told_apart(launch, "others were told of another number")
            if here >= launch.size:
                return
            if time.monotonic() >= deadline:
                raise _nobody_came(launch, f"{here} of {launch.size} processes came within {limit:.0f} s")
            if time.monotonic() >= told:
                told = float("inf")
                logger.warning("waiting for %d of %d processes, %.0f s at most", launch.size - here, launch.size, limit)
            added = 0
            time.sleep(0.1)
    except RuntimeError as error:  # torch's errors of a connection
        raise _nobody_came(launch, f"the other processes are gone ({first_line(error)})") from error


def meeting_place() -> Any:
    """The key-value store of torch in which the processes of a launch have met (`meet`)."""
    return _stores[0]


@contextlib.contextmanager
def explain_lost_processes(output: Path) -> Iterator[None]:
    """Say in a line that another process of a launch is gone, where torch would fail in whatever it was doing together.

    Raises:
        ProcessFailedError: Naming this process and the folder that a repeated command goes on in.
    """
    try:
        yield
    except RuntimeError as error:
        launch = enter_launch()
        if launch.size == 1 or not (type(error).__module__ == "torch.distributed" or _LOST.search(str(error))):
            raise
        raise ProcessFailedError(
            f"process {launch.rank} of {launch.size} lost the others: what the first one to fail said stands beside this "
            f"line, or in the log of {launch.launcher}; {output} keeps the checkpoints, and the same command goes on from there"
        ) from error


def _wait_s() -> float:
    given = os.environ.get(WAIT, "")
    try:
        return max(1.0, min(float(given), 86400.0)) if given else WAIT_S
    except ValueError as error:
        raise ConfigError(f"{WAIT}={given!r}: expected seconds, for example 600") from error


def _open_store(launch: Launch, deadline: float, limit: float) -> Any:
    """The key-value store where the processes meet: the launcher's, or one that process 0 holds."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    if launch.address is None:
        raise ConfigError(
            f"{launch.launcher} ({', '.join(launch.names)}) says that this is process {launch.rank} of {launch.size}, but not "
            "where they meet: export MASTER_ADDR (the host of process 0) and MASTER_PORT (a free port there), or, if nothing "
            f"was launched, {_unset(launch)}"
        )
    host, port = launch.address
    holds = launch.rank == 0 and not launch.hosted
    failed = "" if holds else _wait_for_listener(host, port, deadline, limit)
    if not failed:
        # In a thread: what listens there may be no meeting place, and then torch waits for ever.
        opened: list[Any] = []

        def open_store() -> None:
            try:
                left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
                opened.append(
                    TCPStore(
                        host, port, launch.size, holds, left, wait_for_workers=False, multi_tenant=not launch.hosted
                    )
                )
            except (RuntimeError, ValueError) as error:
                opened.append(first_line(error))

        thread = threading.Thread(target=open_store, daemon=True)
        thread.start()
        while thread.is_alive() and time.monotonic() < deadline + _GRACE_S:
            thread.join(0.1)
        if opened and not isinstance(opened[0], str):
            return opened[0]
        failed = opened[0] if opened else "what listens there does not answer as a meeting place"
    raise _nobody_came(
        launch, f"process {launch.rank} could not meet the others at {host}:{port} within {limit:.0f} s ({failed})"
    )


def _wait_for_listener(host: str, port: int, deadline: float, limit: float) -> str:
    """Wait until somebody listens; the reason if nobody does. torch's own client cannot be interrupted while it tries."""
    import socket

    told = time.monotonic() + SAY_S
    while True:
        try:
            socket.create_connection((host, port), timeout=_CONNECT_S).close()
        except OSError as error:
            failed = error.strerror or str(error) or errno.errorcode.get(error.errno or 0, "no answer")
        else:
            return ""
        if time.monotonic() >= deadline:
            return failed
        if time.monotonic() >= told:
            told = float("inf")
            logger.warning("waiting for process 0 at %s:%d, %.0f s at most (%s)", host, port, limit, failed)
        time.sleep(0.2)


def _nobody_came(launch: Launch, what: str) -> ConfigError:
    return ConfigError(
        f"{what}; {launch.launcher} ({', '.join(launch.names)}) says that this is process {launch.rank} of {launch.size}. "
        f"Start all of them within that time ({WAIT}=SECONDS gives them more), or, if nothing was launched, {_unset(launch)}"
    )


def _told_apart(launch: Launch, what: str) -> ConfigError:
    rank, size = (f"{name}={value}" for name, value in zip(launch.names, (launch.rank, launch.size), strict=True))
    return ConfigError(
        f"the processes that met were told different things: this one of {rank} and {size}, but {what}. Let {launch.launcher} "
        f"set these variables, which all scripts between must leave as they are; or, if nothing was launched, {_unset(launch)}"
    )


def _unset(launch: Launch) -> str:
    launcher = next(entry for entry in _LAUNCHERS if entry.name == launch.launcher)
    names = (*launcher.marks, *launch.names, *launcher.local, *(_TORCH[3:] if launcher is _LAUNCHERS[0] else ()))
    return f"`unset {' '.join(names)}` and run the command again"
