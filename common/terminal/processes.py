"""Several fresh processes of ours on one piece of work: started, watched, and stopped together.

Torch is imported where it is used, so that a process that fails does so at once.
"""

import contextlib
import importlib
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, NoReturn

from vlm_distill_cache.common.errors import DistillError, ProcessFailedError
from vlm_distill_cache.common.terminal.command_line import (
    end_with_parent,
    quiet_libraries,
    start_logging,
    without_interrupts,
)

_POLL_S = 1.0
_CLOSE_S = 5.0


def run_processes(
    target: Callable[..., None],
    jobs: Sequence[tuple[str, tuple[Any, ...]]],
    *,
    on_wait: Callable[[], None],
    kept: str,
) -> None:
    """Run ``target`` in one fresh process for each job, and wait for all of them.

    Args:
        target: Function of a module.
        jobs: What messages call each, and its arguments, which are pickled.
        on_wait: Called about once a second.
        kept: What becomes of finished work after a failure, a clause for the error.

    Raises:
        ProcessFailedError: With the first failure as its process tells it; the others are stopped.
    """
    context = multiprocessing.get_context("spawn")  # CUDA and zarr's event loop do not survive a fork
    processes: list[tuple[str, SpawnProcess, Connection]] = []
    try:
        for name, arguments in jobs:
            here, there = context.Pipe(duplex=False)
            # By name: its module imports torch, seconds in which the parent may be killed.
            named = (target.__module__, target.__name__)
            process = context.Process(target=_process, args=(*named, name, arguments, there))
            # Ctrl-C is for this process, which ends the others: one that is just importing would show a traceback.
            with without_interrupts():
                process.start()
            there.close()
            processes.append((name, process, here))
        running = list(processes)
        while running:
            wait([process.sentinel for _, process, _ in running], timeout=_POLL_S)
            on_wait()
            for entry in [entry for entry in running if entry[1].exitcode is not None]:
                running.remove(entry)
                if entry[1].exitcode:
                    _raise_failure(*entry, kept=kept)
    finally:
        for _, process, _ in processes:
            process.terminate()
        for _, process, connection in processes:
            process.join()
            connection.close()


def start_beside(
    module: str, target: str, jobs: Sequence[tuple[str, tuple[Any, ...]]], *, on_end: Callable[[str], None]
) -> Callable[[], None]:
    """Start a function in one fresh process for each job; they end with this process at the latest.

    Args:
        module, target: The function, by name.
        jobs: As of `run_processes`.
        on_end: Called from a thread with what is known of the first that ends, unless `close` was called before.

    Returns:
        ``close``: waits until all have ended, a few seconds at most.
    """
    context = multiprocessing.get_context("spawn")
    started, closing = [], threading.Event()
    for name, arguments in jobs:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_process, args=(module, target, name, arguments, there), daemon=True)
        with without_interrupts():
            process.start()
        there.close()
        started.append((name, process, here))

    def watch() -> None:
        ended = wait([process.sentinel for _, process, _ in started])
        if not closing.is_set():
            name, process, here = next(entry for entry in started if entry[1].sentinel in ended)
            process.join()  # its end may be seen before its exit code
            on_end(f"the process of {name} failed: {_told(here) or _ended(process)}")

    def close() -> None:
        closing.set()
        for _, process, _ in started:
            process.join(_CLOSE_S)

    threading.Thread(target=watch, name="ranks", daemon=True).start()
    return close


def run_apart(target: Callable[..., Any], *arguments: Any, name: str) -> Any:
    """The result of ``target`` in a fresh process: whatever it held of a GPU, its context too, is free when this returns.

    Args:
        target: Function of a module; arguments and result are pickled.
        name: What messages call it.

    Raises:
        DistillError: As ``target`` raised it; or OSError.
        ProcessFailedError: If the process dies.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    named = (target.__module__, target.__name__)
    process = context.Process(target=_apart, args=(*named, arguments, there))
    with without_interrupts():
        process.start()
    there.close()
    try:
        failed, outcome = here.recv()
    except EOFError as error:
        process.join()
        raise ProcessFailedError(f"the process that {name} failed: {_ended(process)}") from error
    except BaseException:  # this one is stopped
        process.terminate()
        raise
    finally:
        process.join()
        here.close()
    if failed:
        raise outcome
    return outcome


def _apart(module: str, target: str, arguments: tuple[Any, ...], connection: Connection) -> None:
    end_with_parent()
    start_logging()
    quiet_libraries()
    try:
        outcome = False, getattr(importlib.import_module(module), target)(*arguments)
    except (DistillError, OSError) as error:
        outcome = True, error
    connection.send(outcome)


def _ended(process: SpawnProcess) -> str:
    code = process.exitcode or 0
    if code < 0:
        return f"it was killed by {signal.Signals(-code).name}; if nobody did that, memory ran out"
    return f"it ended with exit code {code}; what it printed is above"


def _told(connection: Connection) -> str:
    """What a process said went wrong; empty if it died before it could."""
    with contextlib.suppress(EOFError):
        if connection.poll():
            return str(connection.recv())
    return ""


def _raise_failure(name: str, process: SpawnProcess, connection: Connection, *, kept: str) -> NoReturn:
    raise ProcessFailedError(
        f"the process of {name} failed: {_told(connection) or _ended(process)}\n"
        f"The others were stopped; {kept}. Fix that, then run the same command again "
        "(another number of processes is fine)."
    )


def _process(module: str, target: str, name: str, arguments: tuple[Any, ...], connection: Connection) -> None:
    """Do one job in this process, and tell the parent what went wrong."""
    end_with_parent()
    start_logging(logging.ERROR, prefix=f"{name}: ")  # the parent gives the warnings
    quiet_libraries()
    try:
        getattr(importlib.import_module(module), target)(*arguments)
    except DistillError as error:
        connection.send(str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        connection.send(f"{place}{error.strerror or error}")
    else:
        return
    connection.close()
    raise SystemExit(1)
