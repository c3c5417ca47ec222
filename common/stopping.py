"""What SIGTERM and Ctrl-C do: everything that was started is stopped, and temporary files go."""

import logging
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NoReturn

logger = logging.getLogger(__name__)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Clean up on SIGTERM, which schedulers send, as on Ctrl-C: stop the other processes, remove temporary files.

    Raises:
        SystemExit: With 143, after SIGTERM.
    """

    def stop(*_: object) -> NoReturn:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # once is enough: a second one must not stop the cleaning up
        logger.warning("stopped by SIGTERM; run the same command again to go on where it stopped")
        raise SystemExit(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run a command to its end; where this process is stopped meanwhile, by SIGTERM or Ctrl-C, so is the command.

    A launcher that is killed outright (`subprocess.run` does that) leaves its own processes behind.

    Args:
        command: Program and arguments.
        environment: All of its variables.

    Returns:
        The exit code.
    """
    with subprocess.Popen(command, env=environment) as process:
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # torch's launcher then stops its processes
                process.wait()


def end_with_parent() -> None:
    """End this process of multiprocessing when its parent is gone, however it went: an orphan keeps GPU and locks."""
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
