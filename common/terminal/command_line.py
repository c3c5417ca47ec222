"""What the three command lines share: errors, the system's signals, what is logged and said once, kinds of arguments."""

from __future__ import annotations

import atexit
import io
import logging
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NoReturn

import click
from click.shell_completion import CompletionItem

from vlm_distill_cache.common.cache.other_folders import IS_SKETCH, cache_above, is_sketch, refuse_inside
from vlm_distill_cache.common.errors import ConfigError, DistillError, LaunchError
from vlm_distill_cache.common.files.disk import disk_words
from vlm_distill_cache.common.files.hashing import checksum
from vlm_distill_cache.common.locations import is_url, nearest_path
from vlm_distill_cache.common.printing import CONTROL, SURROGATE, hide_secrets, message, one_line, printable
from vlm_distill_cache.common.terminal.general import (
    Command,
    Described,
    answer,
    complete_folder,
    end_document,
    forget_choices,
    has_document,
    is_quiet,
    set_levels,
    start_document,
    version_text,
)
from vlm_distill_cache.common.terminal.launch import SAY_S, enter_launch

logger = logging.getLogger(__name__)
PARENT = "VLM_DISTILL_PARENT"  # the process that another one of ours was started by
_WATCH_S = 0.5
SAID = "VLM_DISTILL_SAID"  # of a process that another one of ours started: what that one has said


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Clean up on SIGTERM, which schedulers send, as on Ctrl-C: stop the other processes, remove temporary files.

    Raises:
        SystemExit: With 143, after SIGTERM.
    """
    process = os.getpid()

    def stop(*_: object) -> NoReturn:
        if os.getpid() != process:  # forked from this one, which says it
            os._exit(128 + signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: a second one must not stop the cleaning up
        logger.warning("stopped by SIGTERM; run the same command again to continue")
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


@contextmanager
def without_interrupts() -> Iterator[None]:
    """Keep Ctrl-C for afterwards, and from the processes that are started inside the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def join_launch(ctx: click.Context, *, several: Sequence[str]) -> None:
    """Find out whether this process is one of several; of all but the ``several`` commands process 0 does the work.

    The others say no more than that, and errors. One that somebody started alone says what ended it.
    """
    launch = enter_launch()
    if launch.size == 1:
        if PARENT not in os.environ:
            ctx.with_resource(stopped_by_sigterm())
        return
    if launch.rank:
        for name in ("", "vlm_distill_cache"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if ctx.invoked_subcommand not in several:
            names = ", ".join(launch.names)
            say(f"process {launch.rank} of {launch.size} ({launch.launcher}: {names}): process 0 does this", err=True)
            ctx.exit(0)


def run_command(
    command: Sequence[str], environment: Mapping[str, str], *, output: IO[bytes] | int | None = None
) -> int:
    """Run a command of ours to its end and return its exit code; SIGTERM or Ctrl-C to this process stops it too.

    Its standard output goes to ``output``, as `subprocess` takes it.

    Neither is a launcher killed outright, which would leave its own processes behind (`subprocess.run` does that), nor
    does one outlive this process, if it calls `end_with_parent`.
    """
    import subprocess

    # Ctrl-C reaches all processes of a terminal: this one ends the others, which would each end in their own way.
    with without_interrupts():
        process = subprocess.Popen(command, env={**environment, PARENT: str(os.getpid())}, stdout=output)
    with process:
        try:
            return process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # torch's launcher then stops its processes
                process.wait()


def end_with_parent() -> None:
    """End this worker process when its parent dies, for whatever reason: an orphan would keep its GPU and locks."""
    # Of one that `run_command` started, or a launcher: the parent may be dead before this one looks.
    expected = os.environ.get(PARENT, "")
    parent = int(expected) if expected.isdecimal() else os.getppid()
    threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_with(parent: int) -> None:
    import multiprocessing

    worker_of = multiprocessing.parent_process()
    if worker_of is not None:
        worker_of.join()
        os._exit(1)
    while os.getppid() == parent:  # orphans are adopted
        time.sleep(_WATCH_S)
    os._exit(1)


def _show_version(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        say(version_text(str(ctx.find_root().info_name)))
        ctx.exit()


_VERSION = click.Option(
    ["--version"],
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the versions of this program, of Python, torch and transformers.",
)


class CommandGroup(Described, click.Group):
    """Prints an expected error as one message without a traceback, and exits with 1 (click's usage errors with 2).

    Commands end with the document that `answer` collected, if they were asked for one; after an error it says which.
    """

    command_class = Command

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All options."""
        own = super().get_params(ctx)
        return [*own[:-1], _VERSION, *own[-1:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help's lists of options and commands."""
        super().format_options(ctx, formatter)
        self.format_commands(ctx, formatter)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; whoever asks for `help` is told how it is called."""
        if args[0] == "help" and not ctx.resilient_parsing:
            of = next((f" {name}" for name in args[1:] if name in self.commands), "")
            raise click.UsageError(f"No such command 'help'. Write `{ctx.info_name}{of} --help`.", ctx)
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse names that could be neither stored nor shown, before anything is done with them."""
        forget_choices()
        # Whatever is printed from here on, no character of it ends the command.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        command = next((place for place, argument in enumerate(args) if not argument.startswith("-")), 0)
        for place, argument in enumerate(args):
            # A sample's id may be any text, and the values of these options may stand on several lines.
            several_lines = args[place - 1] in ("--set", "--phases", "--signals")
            is_id = (
                args[command] == "inspect" and place > command + 1 and args[place - 1] not in ("--picture", "--image")
            )
            printed = "" if is_id else " ".join(argument.split()) if several_lines else argument
            if reason := unusable_name(argument, printed=printed):
                self._fail_early(ctx, args, f"{one_line(argument)}: {reason}")
        if "--json" in args and not ctx.resilient_parsing and not {"-h", "--help"} & {*args}:
            if "--json" in args[: command + 1]:
                name = next((argument for argument in args if argument in self.commands), "COMMAND")
                self._fail_early(ctx, args, f"--json stands behind the command: {ctx.info_name} {name} --json")
            if args[command] not in self.commands:
                start_document()  # of a command, it does so itself
        return super().parse_args(ctx, args)

    def _fail_early(self, ctx: click.Context, args: list[str], text: str) -> NoReturn:
        """End before a command is known, with a document if one is asked for."""
        before = args[: next((place for place, one in enumerate(args) if one in self.commands), 0)]
        # Of some commands it may have a value.
        behind = dict(zip(args, [*args[1:], "-"], strict=True)).get("--json", "")
        if "--json" in before or behind.startswith("-"):
            start_document()
        fail(text)
        if (document := end_document()) is not None:
            _write(document, err=False)
        ctx.exit(2)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        # A forked loader would otherwise be warned about at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        began = time.monotonic()
        try:
            return self._invoke(ctx)
        except SystemExit as error:
            if error.code:
                answer(error="stopped by SIGTERM; run the same command again to continue")
            raise
        except click.exceptions.Exit:
            raise
        except Exception as error:
            answer(error=message(f"{type(error).__name__}: {error}"))
            raise
        finally:
            if logger.isEnabledFor(logging.DEBUG):  # looking versions up takes time
                logger.debug("%s: %.1f s", version_text(str(ctx.info_name)), time.monotonic() - began)
            if (document := end_document()) is not None:
                _write(document, err=False)
            forget_choices()

    def _invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            shown = io.StringIO()
            error.show(shown)
            fail(message(error.format_message()), shown=message(shown.getvalue().rstrip("\n")))
            return ctx.exit(error.exit_code)
        except DistillError as error:
            if isinstance(error, LaunchError) and enter_launch().rank:
                time.sleep(SAY_S)  # a launcher ends all with the first that ends: process 0 is to say it
                return ctx.exit(1)
            fail(message(str(error)))
        except BrokenPipeError:
            sys.stderr.close()  # the reader of our output left; the interpreter must not complain about it
        except OSError as error:
            fail(message(disk_words(error)))
        except UnicodeEncodeError as error:
            if not SURROGATE.search(str(error.object)):
                raise
            around = error.object[max(0, error.start - 40) : error.end + 40]
            fail(f"...{one_line(around)}...: {NOT_UTF8}")
        except KeyboardInterrupt:
            fail(_STOPPED, shown=_STOPPED)
            return ctx.exit(130)
        finally:
            atexit.unregister(_ignore_interrupts)
            atexit.register(_ignore_interrupts)  # the last that is registered is the first that is called
        return ctx.exit(1)


_STOPPED = "stopped; run the same command again to continue"


def fail(text: str, *, shown: str = "") -> None:
    """Say what went wrong, and keep it for the document."""
    say(shown or f"error: {text}", err=True)
    answer(error=text)


def _ignore_interrupts() -> None:
    """Ctrl-C finds nothing left to stop when all is done: the libraries' own last steps would end in tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Once(logging.Filter):
    """Lets each text through once: a run's second student would repeat what the first one logged. Of libraries, warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.said = set(os.environ.get(SAID, "").split())

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether this text is new, and not a library's progress; errors always are."""
        if record.levelno < logging.WARNING and record.name.partition(".")[0] not in ("vlm_distill_cache", "__main__"):
            return False
        try:
            text = checksum(record.getMessage().encode(errors="replace"))
        except Exception:  # noqa: BLE001 - a library's malformed call: the handler reports it, a filter must not raise
            return True
        known = text in self.said
        self.said.add(text)
        return not known or record.levelno >= logging.ERROR


class _Shown(logging.Formatter):
    """Writes names of unknown origin so that they neither control the terminal nor fill it."""

    def format(self, record: logging.LogRecord) -> str:
        """The text to print."""
        return message(super().format(record))


_once = _Once()


def start_logging(level: int = logging.INFO, *, prefix: str = "") -> None:
    """Show this project's log, each message once, and the libraries' warnings; HTTP and S3 clients only warn.

    ``prefix`` stands before each line: of a process that is one of several.
    """
    # A handler without a formatter, as huggingface_hub brings its own, escapes too.
    logging._defaultFormatter = _Shown("%(message)s")  # type: ignore[attr-defined]
    root = logging.getLogger()
    if not root.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(_once)
        handler.setFormatter(_Shown(f"{prefix}%(message)s"))
        root.addHandler(handler)
        root.setLevel(level)
        logging.captureWarnings(capture=True)
        sys.excepthook = show_failure
    elif level < root.level and any(isinstance(handler.formatter, _Shown) for handler in root.handlers):
        root.setLevel(level)  # a command that says more than its group
    set_levels()
    for client in ("httpx", "httpx2", "botocore", "boto3", "s3transfer", "urllib3"):
        logging.getLogger(client).setLevel(logging.WARNING)


def show_failure(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """Show an error that nobody expected; what it quotes does not control the terminal either."""
    say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), err=True)


def said_so_far() -> dict[str, str]:
    """An environment variable that keeps child processes from repeating what was said here."""
    return {SAID: " ".join(sorted(_once.said)[:1000])}  # a variable may be 128 KiB long


# By logger of the model library: warnings about its own inner workings, of which a user can do nothing with any.
_MEANINGLESS = {
    # Its tokenizers read config.json as one of no model at all; ids outside of the vocabulary stop nothing here.
    "transformers.configuration_utils": (
        "You are using a model of type",
        "Model config: ",
        "`torch_dtype` is deprecated",
    ),
    # A table of missing weights, which are an error of ours, and of left-over ones, which get a line of ours.
    "transformers.modeling_utils": ("LOAD REPORT", "`torch_dtype` is deprecated"),
    # Samples that are too long are recorded with their length and the remedy.
    "transformers.tokenization_utils_base": ("Token indices sequence length is longer",),
    "huggingface_hub.serialization._torch": ("successfully saved",),  # to a name that is temporary
    # Settings of sampling in a checkpoint's generation_config.json, while answers are generated as our options say.
    "transformers.generation.configuration_utils": ("The following generation flags are not valid",),
}


def _means_something(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _MEANINGLESS[record.name])


def quiet_libraries() -> None:
    """Switch off the model library's progress bars and tqdm's complaint when stopped; log the library's warnings as ours."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    for name in _MEANINGLESS:
        logging.getLogger(name).addFilter(_means_something)
    logging.getLogger("bitsandbytes.backends").setLevel(logging.ERROR)  # it proposes packages that nothing here needs
    from tqdm import tqdm  # not before the environment says whether there are to be bars

    # tqdm's own lock is a semaphore of the system, which Python reports as leaked when a process is stopped.
    tqdm.set_lock(threading.RLock())


def quoted(place: str | Path) -> str:
    """Write a path or an address as a shell reads it back, for the commands that we propose; always on one line."""
    text = str(place)
    text = f"./{text}" if text.startswith("-") else text  # else it would be an option
    if text.isprintable():
        return shlex.quote(text)
    # bash and zsh know this form
    return "$'" + "".join(c if c.isprintable() and c not in "\\'" else _escaped(c) for c in text) + "'"


def _escaped(character: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))


NOT_UTF8 = (
    "is not UTF-8, and caches and configurations keep names as UTF-8; rename it, or give a link to it with another name"
)


def unusable_name(argument: str, *, printed: str) -> str:
    """Why an argument can be no name here; empty if it can.

    Args:
        argument: As the system gave it.
        printed: What of it must be characters that print.
    """
    if SURROGATE.search(argument):
        try:
            os.fsencode(argument).decode("utf-8")
        except UnicodeError:
            return NOT_UTF8
        return f"this locale ({sys.getfilesystemencoding()}) cannot read it; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    if CONTROL.search(printed):
        return "holds characters that do not print, such as line feeds or escape sequences; leave them out, or give it another name"
    return ""


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


class ConfigFile(click.Path):
    """A YAML file of options; of a run of older versions, which kept none, that of its distilled student is named."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        path = Path(value)
        if not os.path.lexists(path):
            student = path.parent / "distilled" / path.name
            of_run = f"; of that run, give --config {quoted(student)} --output {quoted(path.parent)}"
            self.fail(f"{path}: there is no such file{of_run if student.is_file() else nearest_path(path)}", param, ctx)
        return super().convert(value, param, ctx)


CONFIG = click.option(
    "--config",
    type=ConfigFile(exists=True, dir_okay=False, path_type=Path),
    help="YAML file of options; relative paths in it start from the working directory.",
)


DRY_RUN = click.option("--dry-run", is_flag=True, help="Only say what would be done and what stands in the way.")


def shared_options(*given: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Combine several decorators; the help lists their options in this order."""

    def add(command: Any) -> Any:
        for option in reversed(given):
            command = option(command)
        return command

    return add


def _refuse_file(kind: click.ParamType, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> None:
    """Refuse a file in the place of a cache, naming the cache that it lies in."""
    if Path(value).is_file():
        cache = cache_above(Path(value))
        kind.fail(f"{value}: is a file; give {'the folder of a cache' if cache is None else cache}", param, ctx)


class CacheLocation(click.ParamType):
    """A cache to read: an existing folder, or an address, kept as text because a path would alter it."""

    name = "folder or address"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Folders."""
        return complete_folder(ctx, param, incomplete)

    def convert(self, value: str | Path, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the address as it is, or the folder's path."""
        if is_url(value):
            return str(value)
        if not Path(value).is_dir():
            _refuse_file(self, value, param, ctx)
            near = nearest_path(value)
            self.fail(f"{value}: neither a folder nor an address (s3://, hf://datasets/, https://){near}", param, ctx)
        return str(Path(value))


class NewFolder(click.Path):
    """A local folder; refuses addresses, which a path would turn into a folder named ``s3:``, and places in a cache or student."""

    remedy = "give a folder of this machine (a cache can then be pushed there: `cachectl push`)"

    def __init__(self, **checks: bool) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if is_url(value):
            self.fail(f"{value}: an address; {self.remedy.format(place=quoted(value))}", param, ctx)
        if above := next((one for one in Path(value).absolute().parents if one.is_file()), None):
            self.fail(f"{value}: {above} is a file, so nothing can lie in it; give another folder", param, ctx)
        if not self.exists:
            try:
                refuse_inside(Path(value))
            except ConfigError as error:
                self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


class CacheFolder(NewFolder):
    """A cache in a local folder; for an address, the error says how to bring the cache here."""

    remedy = (
        "this command works on a folder of this machine. Bring the cache here first: "
        "`cachectl pull {place} FOLDER`, which checks every file"
    )

    def __init__(self) -> None:
        super().__init__(exists=True, file_okay=False)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path."""
        if not is_url(value):
            _refuse_file(self, value, param, ctx)
            if near := nearest_path(value):
                self.fail(f"{value}: there is no such folder{near}", param, ctx)
        path = super().convert(value, param, ctx)
        if is_sketch(Path(os.fsdecode(path))):
            self.fail(f"{value}: {IS_SKETCH}", param, ctx)
        return path


def say(text: str, *, err: bool = False) -> None:
    """Print text that may hold names of unknown origin; nothing else here prints.

    Control characters and what cannot be encoded are escaped; secrets of addresses are left out. Where standard output is
    for a document, all goes to standard error, or nowhere with --quiet: the document is the result.
    """
    if err or not (has_document() and is_quiet()):
        _write(printable(hide_secrets(text)), err=err or has_document())


def _write(text: str, *, err: bool) -> None:
    encoding = (sys.stderr if err else sys.stdout).encoding or "ascii"
    click.echo(text.encode(encoding, "backslashreplace").decode(encoding), err=err)


def tell(text: str) -> None:
    """Print what is no result: what is being done, and what may be done next. Not with --quiet."""
    if not is_quiet():
        say(text)


def can_print(text: str) -> bool:
    """Say whether standard output's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True


SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 120}
