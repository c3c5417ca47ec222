"""Commands of this project as real processes, forked from one that has imported everything, and all that became of them.

A fork saves the seconds that importing torch takes; what runs in it is the command's own `main`, with its own signals,
limits and children. Nothing of the code that is tried decides what became of it: exit code, output, clock, memory and the
processes left behind are the system's.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_distill_cache.commands import group_of

PACKAGES = {"teacher-cache": "stage1_teacher", "distill": "stage2_student", "cachectl": "common"}
GIB = 1 << 30
GRACE_S = 10.0  # for processes of a command that has ended
HUNG = "hung"
_SUBREAPER, _ARENAS = 36, -8  # of prctl and mallopt
_libc = ctypes.CDLL(None)


@dataclass(frozen=True, kw_only=True)
class Said:
    """What became of a command.

    Attributes:
        code: Its exit code; negative: the signal that killed it.
        text: All that it printed.
        grown: Bytes of memory that it took at most, beyond what it began with.
        left: Command lines of the processes that it left behind.
        hung: It was killed because its time was over.
    """

    code: int
    text: str
    seconds: float
    grown: int
    left: tuple[str, ...] = ()
    hung: bool = False


@dataclass
class Running:
    """A command that was started."""

    process: int
    log: Path
    began: float
    others: frozenset[int]
    base: int

    def send(self, number: int) -> None:
        """Send a signal to it alone, Ctrl-C and a closed terminal to all its processes."""
        with contextlib.suppress(ProcessLookupError):
            if number in (signal.SIGINT, signal.SIGHUP):
                os.killpg(self.process, number)
            else:
                os.kill(self.process, number)

    def finish(self, limit_s: float, *, after: float | None = None, number: int = signal.SIGKILL) -> Said:
        """Wait for its end, and for that of its processes.

        Args:
            limit_s: When to kill it, seconds from its start.
            after: When to send it a signal, seconds from its start; None: never.
        """
        hung = False
        while True:
            ended, status, used = os.wait4(self.process, os.WNOHANG)
            now = time.monotonic() - self.began
            if ended:
                break
            if after is not None and now >= after:
                self.send(number)
                after = None
            if now >= limit_s and not hung:
                hung = True
                end_all(self.others)
            time.sleep(0.005)
        left = _wait_for_others(self.others)
        end_all(self.others)
        return Said(
            code=os.waitstatus_to_exitcode(status),
            text=self.log.read_text(errors="surrogateescape"),
            seconds=now,
            grown=max(0, used.ru_maxrss * 1024 - self.base),
            left=left,
            hung=hung,
        )


def start(
    command: Sequence[str],
    log: Path,
    *,
    before: Callable[[], object] | None = None,
    memory: int | None = None,
    forked: bool = True,
) -> Running:
    """Start a command of ours.

    Args:
        command: ``teacher-cache``, ``distill`` or ``cachectl``, and its arguments.
        log: File for what it prints.
        before: Called in its process first: changes the world that the command sees.
        memory: Bytes of address space that it may take beyond what is imported.
        forked: Run `main` in a fork; else the installed program, which imports everything anew.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    others = frozenset(children(os.getpid()))
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    process = os.fork()
    if process == 0:
        _become(command, log, before, memory, forked=forked)
    return Running(process, log, time.monotonic(), others, base)


def run(command: Sequence[str], log: Path, *, limit_s: float = 120.0, **options: object) -> Said:
    """Run a command to its end."""
    return start(command, log, **options).finish(limit_s)  # type: ignore[arg-type]


def call(function: Callable[[], object], log: Path, *, limit_s: float = 120.0) -> Said:
    """Run a function in a process of its own; exit code 0 if it returns."""
    return start([], log, before=function).finish(limit_s)


def _become(
    command: Sequence[str], log: Path, before: Callable[[], object] | None, memory: int | None, *, forked: bool
) -> None:
    """Be the command, in a session of its own; does not return."""
    code = 99
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if not forked:
            program = Path(sys.executable).parent / command[0]
            os.execv(program, [str(program), *command[1:]])
        os.fsync = lambda descriptor: None  # no machine crashes here, only processes die
        if before is not None:
            before()
        for name, number in (("stdout", 1), ("stderr", 2)):  # what these are is not what they were before the fork
            setattr(sys, name, os.fdopen(number, "w", closefd=False))
        if command:
            limit_memory(memory)
            sys.argv = list(command)
            group_of(PACKAGES[command[0]]).main(list(command[1:]), prog_name=command[0])
        code = 0
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else int(done.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter would end
        traceback.print_exc()
        code = 1
    finally:
        _end(code)


def _end(code: int) -> None:
    """End as the interpreter does: what was registered is called, and what was said is written."""
    import atexit
    import multiprocessing.util
    import threading

    try:
        threading._shutdown()
        multiprocessing.util._exit_function()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - the same
        traceback.print_exc()
    finally:
        os._exit(code)


def limit_memory(bytes_more: int | None) -> None:
    """Refuse this process more address space than it has, plus so much; one heap for all threads, which else reserve their own."""
    if bytes_more is not None:
        _libc.mallopt(_ARENAS, 1)
        has = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (has + bytes_more,) * 2)


def adopt_orphans() -> None:
    """Become the parent of processes whose own parent died, so that none can hide."""
    _libc.prctl(_SUBREAPER, 1, 0, 0, 0)


def children(process: int) -> list[int]:
    """The processes that a process started or adopted."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
        return [int(number) for thread in threads for number in (thread / "children").read_text().split()]
    except OSError:
        return []


def _descendants(process: int) -> list[int]:
    found = children(process)
    return found + [below for child in found for below in _descendants(child)]


def _collect(others: frozenset[int]) -> list[int]:
    """Reap children that ended; returns those that live."""
    living = []
    for child in children(os.getpid()):
        if child not in others:
            try:
                if os.waitpid(child, os.WNOHANG) == (0, 0):
                    living.append(child)
            except ChildProcessError:
                pass
    return living


def _wait_for_others(others: frozenset[int]) -> tuple[str, ...]:
    """Give processes of a command that ended a moment to end too; returns the command lines of those that did not."""
    until = time.monotonic() + GRACE_S
    while (living := _collect(others)) and time.monotonic() < until:
        time.sleep(0.02)
    return tuple(_line_of(process) for process in living)


def _line_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return str(process)


def end_all(others: frozenset[int] = frozenset()) -> None:
    """Kill what this process started or adopted, and what those did, except the processes that were there before."""
    for process in [p for child in children(os.getpid()) if child not in others for p in (child, *_descendants(child))]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
