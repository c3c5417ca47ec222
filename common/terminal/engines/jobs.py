"""What an engine is given to start, what each worker does on its machine, and the record that is left beside the results.

``PLACE.jobs/TIME/`` beside a cache or a student's folder holds one submission: ``job.json``, the options as they were
(``options.yaml``: a file that is edited meanwhile changes no worker that starts later), ``worker-N.log`` with all that worker
N said, ``worker-N.failed`` with the error that ended it, and what the engine itself writes.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, NoReturn

from vlm_distill_cache.common.errors import CacheFormatError, ProcessFailedError
from vlm_distill_cache.common.files.atomic import read_json, write_json_atomic
from vlm_distill_cache.common.files.rules import check, items, record, text, whole
from vlm_distill_cache.common.printing import hide_secrets, message, one_line
from vlm_distill_cache.common.terminal.command_line import PARENT, quoted

JOBS = ".jobs"
_RECORD, _LOG, _FAILED = "job.json", ".log", ".failed"
_POLL_S = 0.2
_TAIL = 4096  # bytes of a log in which an error is looked for
_SHOWN = 1500
_BEGINS = b"--- start "
# Signals that engines send to all processes of a job: a worker takes them, and ends its command in good order.
_FOR_US = {signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True, kw_only=True)
class Job:
    """Workers that an engine is to start, all of one command.

    Attributes:
        name: What the engine calls them.
        command: What each runs.
        folder: Of their records and logs, absolute.
        directory: That relative paths start from, absolute.
        environment: Variables beside those that the engine gives.
        workers: How many.
        nodes: Machines of each worker.
        processes: Of the command, on each of these machines.
        gpus: Of each of these machines.
        cpus: Of each of these machines.
        restarts: How often a worker is started again that was killed (Ray), or used up its time (SLURM).
        alone: No process stands between the worker and its command, which may therefore watch the worker.
        settings: Options of the engine's own.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    directory: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    workers: int = 1
    nodes: int = 1
    processes: int = 1
    gpus: int = 0
    cpus: int = 1
    restarts: int = 0
    alone: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


class WorkerLostError(ProcessFailedError):
    """A worker's command was killed; started again, it may go on."""


def work(job: Job, index: int, *, rank: int = 0, environment: Mapping[str, str], again: bool) -> None:
    """Run a worker's command to its end, on whichever machine the engine chose.

    What stops this one stops the command too, by SIGTERM; what kills it does, if the job is ``alone``.

    Args:
        index: Of the worker, from 0.
        rank: Of its machine, from 0, where it has several.
        environment: Variables beside those of this process.
        again: The engine starts it again where it was killed; here the starts are counted.

    Raises:
        WorkerLostError: If the command was killed, and is to be started again.
        ProcessFailedError: If it failed, with what it said; or was killed more often than ``restarts``.
    """
    host, name = socket.gethostname(), f"worker-{index}" + (f".{rank}" if rank else "")
    for place in (job.folder, job.directory):
        if not place.is_dir():
            raise ProcessFailedError(
                f"{place} is not there on {host}: results, logs and the working directory belong on a disk that all machines "
                "share; submit from a folder there"
            )
    log, failed = job.folder / f"{name}{_LOG}", job.folder / f"{name}{_FAILED}"
    failed.unlink(missing_ok=True)
    with log.open("a+b") as file:
        began = file.seek(0, os.SEEK_END)
        file.seek(0)
        starts = sum(line.startswith(_BEGINS) for line in file) if again else 0
    if starts > job.restarts:
        _fail(failed, f"{name} was killed {starts} times (--restarts {job.restarts}). {_last_words(log, 0)}", log)
    with log.open("ab") as file:
        file.write(_BEGINS + f"on {one_line(host)}, process {os.getpid()}, {_utc()}\n".encode())
        file.flush()
        code = _run(job, file, {**os.environ, **environment, **job.environment})
    if code == 0:
        return
    said = _last_words(log, began)
    # Of several processes on a machine, the one that watches them says so of another one, and fails.
    killed = code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGTERM)
    if killed or "was killed by" in said:
        why = f"{name} on {host} was killed. {said}"
        if again:
            raise WorkerLostError(why)
        _fail(failed, why, log)
    ended = f"exit code {code}" if code > 0 else signal.Signals(-code).name
    _fail(failed, f"{name} on {host} ended with {ended}. {said}", log)


def _fail(failed: Path, why: str, log: Path) -> NoReturn:
    text = f"{message(why)}\nIts log: {log}"
    failed.write_text(text)
    raise ProcessFailedError(text)


def _run(job: Job, log: IO[bytes], environment: dict[str, str]) -> int:
    environment.pop(PARENT, None)
    if job.alone:
        environment[PARENT] = str(os.getpid())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _FOR_US)
    try:
        process = subprocess.Popen(
            job.command, cwd=job.directory, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    except OSError as error:
        log.write(f"error: {job.command[0]}: {error.strerror}\n".encode())
        return 127
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        while process.poll() is None:  # not in a system call, in which Ray's interrupt would not be noticed
            time.sleep(_POLL_S)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    return process.returncode


def _last_words(log: Path, began: int) -> str:
    """The error that a log ends with, or else its last lines, of what stands in it behind a place."""
    with log.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(began, end - _TAIL))
        said = file.read().decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip() and not line.startswith(_BEGINS.decode())]
    errors = [place for place, line in enumerate(lines) if line.startswith("error: ")]
    shown = lines[errors[-1] :] if errors else lines[-12:]
    return "\n".join(shown)[-_SHOWN:] or "It said nothing."


def new_folder(place: str | Path) -> Path:
    """Where a submission for this cache or student is recorded; made by `write_record`."""
    return Path(f"{os.path.realpath(place)}{JOBS}") / datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]


_STORED = record(
    {
        "engine": text(20), "submitted": text(40), "workers": whole(1, 1 << 20), "nodes": whole(1, 1 << 20),
        "gpus": whole(0, 1 << 20), "cpus": whole(1, 1 << 20), "host": text(300), "directory": text(4096),
        "command": items(text(1 << 17), most=10_000), "id": text(100), "stop": text(1000),
    }
)  # fmt: skip


def write_record(job: Job, *, engine: str, identity: str, stop: str) -> None:
    """Say what was submitted; addresses without their secrets, variables not at all.

    Args:
        engine: Which.
        identity: What the engine calls the job.
        stop: How it is ended, a clause.
    """
    told = {
        "engine": engine,
        "submitted": _utc(),
        "workers": job.workers,
        "nodes": job.nodes,
        "gpus": job.gpus,
        "cpus": job.cpus,
        "host": one_line(socket.gethostname()),
        "directory": str(job.directory),
        "command": [hide_secrets(word) for word in job.command],
        "id": identity,
        "stop": stop,
    }
    write_json_atomic(job.folder / _RECORD, told)


def submissions(place: str | Path) -> list[dict[str, Any]]:
    """The records of what was submitted for a cache or a student, the oldest first, with folder and failures of workers."""
    found = []
    with suppress(OSError):  # somebody else's: nobody but them reads it
        for folder in sorted(Path(f"{os.path.realpath(place)}{JOBS}").iterdir()):
            with suppress(OSError, CacheFormatError):
                told = check(read_json(folder / _RECORD), _STORED, str(folder / _RECORD))
                failed = {path.stem: path.read_text(errors="replace") for path in sorted(folder.glob(f"*{_FAILED}"))}
                found.append({**told, "folder": folder, "failed": failed})
    return found


def submission_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What was submitted, for people: where the logs are, how it is ended, and who failed."""
    lines = []
    for told in found:
        count = told["workers"]
        lines.append(
            f"submitted {told['submitted']}: {count} worker{'' if count == 1 else 's'} by {told['engine']} ({told['id']}); logs: "
            f"{quoted(told['folder'])}/worker-*{_LOG}; {told['stop']}"
        )
        lines += [f"  {name} failed: {message(text)}" for name, text in told["failed"].items()]
    return lines


def _utc() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
