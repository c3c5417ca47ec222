"""What the three command lines share: how an expected error reaches the person who typed the command."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from vlm_distill_cache.common.errors import DistillError
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.printing import printable

logger = logging.getLogger(__name__)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Clean up on SIGTERM, which schedulers send, as on Ctrl-C: stop the other processes, remove temporary files.

    Raises:
        SystemExit: With 143, after SIGTERM.
    """

    def stop(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second one must not stop the cleaning up
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


def leave_one_core() -> int:
    """Let torch use all cores but one, unless ``OMP_NUM_THREADS`` says otherwise; returns the number of threads.

    Loading and encoding run on threads of their own. Where they compete with a full set of OpenMP threads, those
    spin at every barrier: a build on two busy cores was seen to take 20 times as long.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    return torch.get_num_threads()


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


class CommandGroup(click.Group):
    """Prints an expected error as one message without a traceback, and exits with 1 (click's usage errors with 2)."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        # A forked loader would otherwise be warned about at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            return super().invoke(ctx)
        except DistillError as error:
            say(f"error: {error}", err=True)
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output left; the interpreter must not complain about it
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            say(f"error: {place}{error.strerror or error}", err=True)
        except KeyboardInterrupt:
            click.echo("stopped; run the same command again to go on where it stopped", err=True)
            return ctx.exit(130)
        return ctx.exit(1)


def start_logging(level: int = logging.INFO) -> None:
    """Show what this project logs; of what HTTP and S3 clients log, only warnings.

    Args:
        level: The least that is shown.
    """
    logging.basicConfig(level=level, format="%(message)s")
    for client in ("httpx", "botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(client).setLevel(logging.WARNING)


def quoted(place: str | Path) -> str:
    """Write a path or an address as a shell reads it back, for the commands that we propose."""
    return shlex.quote(str(place))


class CacheLocation(click.ParamType):
    """A cache to read: a folder that exists, or an address; as text, which no path would keep as it is."""

    name = "folder or address"

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the address as it is, or the folder's path."""
        if is_url(value):
            return str(value)
        if not Path(value).is_dir():
            self.fail(f"{value}: no such folder, and no address (s3://, hf://datasets/, https://)", param, ctx)
        return str(Path(value))


class CacheFolder(click.Path):
    """A cache in a folder of this machine; of an address it is said how the cache comes here."""

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False, path_type=Path)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if is_url(value):
            self.fail(
                f"{value}: an address; this command works on a folder of this machine. Bring the cache here first: "
                f"`cachectl pull {quoted(value)} FOLDER`, which checks every file",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


class NewFolder(click.Path):
    """A folder of this machine to write; an address, which a path would turn into a folder named ``s3:``, is refused."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if is_url(value):
            self.fail(
                f"{value}: an address; give a folder of this machine (a cache can then be pushed there: `cachectl push`)",
                param,
                ctx,
            )
        return super().convert(value, param, ctx)


def say(text: str, *, err: bool = False) -> None:
    """Print what may hold names of unknown origin: control characters are spelt out, and all can be encoded."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "ascii"
    click.echo(printable(text).encode(encoding, "backslashreplace").decode(encoding), err=err)


def can_print(text: str) -> bool:
    """Say whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
