"""What all commands have in common: how much they say, progress, one JSON document instead of text, options as flags.

What is chosen stands in the environment: processes that this one starts choose the same.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import typing
from collections.abc import Callable, Mapping
from typing import Any

import click
from click.core import ParameterSource
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from vlm_distill_cache import __version__
from vlm_distill_cache.common.config import canonical_overrides, known_names, last_given, option_names, words_of
from vlm_distill_cache.common.files.versions import installed_versions
from vlm_distill_cache.common.locations import slips
from vlm_distill_cache.common.printing import hide_secrets
from vlm_distill_cache.common.recipes import recipe_names
from vlm_distill_cache.common.terminal.launch import enter_launch

_VERBOSITY = "VLM_DISTILL_VERBOSITY"  # quiet or verbose
_NO_BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
_OURS = logging.getLogger("vlm_distill_cache")
Completed = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@dataclasses.dataclass
class _Chosen:
    """Of the command that is running: the variables it set, the document it answers with, where standard output was."""

    variables: list[str] = dataclasses.field(default_factory=list)
    document: dict[str, Any] | None = None
    stdout: int | None = None


_chosen = _Chosen()


def forget_choices() -> None:
    """Begin a command as if none had run in this process."""
    for name in _chosen.variables:
        os.environ.pop(name, None)
    _chosen.variables.clear()
    _OURS.setLevel(logging.NOTSET)


def is_quiet() -> bool:
    """Whether results, warnings and errors are all that is said."""
    return os.environ.get(_VERBOSITY) == "quiet"


def hides_progress() -> bool:
    """Whether no progress is shown; any text in the variable says so, as tqdm reads it."""
    return bool(os.environ.get(_NO_BARS[0]))


def set_levels() -> None:
    """Log what was chosen; processes that log errors only go on so."""
    root = logging.getLogger()
    if is_quiet():
        root.setLevel(max(root.level, logging.WARNING))
    elif os.environ.get(_VERBOSITY) == "verbose" and root.level < logging.ERROR:
        _OURS.setLevel(logging.DEBUG)


def _choose(name: str, value: str) -> None:
    if name not in os.environ:
        _chosen.variables.append(name)
        os.environ[name] = value


def _hide_progress(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    if given and not ctx.resilient_parsing:
        for name in _NO_BARS:
            _choose(name, "1")


def _set_verbosity(ctx: click.Context, param: click.Parameter, given: bool) -> None:
    if not given or ctx.resilient_parsing:
        return
    _choose(_VERBOSITY, str(param.name))
    if os.environ[_VERBOSITY] != param.name:
        raise click.UsageError("--verbose and --quiet: give one of the two")
    if param.name == "quiet":
        _hide_progress(ctx, param, given)
    if enter_launch().rank == 0:
        set_levels()


def _option(*names: str, help: str, callback: Any) -> click.Option:  # noqa: A002 - click's name
    return click.Option(names, is_flag=True, expose_value=False, is_eager=True, help=help, callback=callback)


_GENERAL = (
    _option("-v", "--verbose", help="Say more: what options come to, what is done.", callback=_set_verbosity),
    _option("-q", "--quiet", help="Say only results, warnings and errors.", callback=_set_verbosity),
    _option(
        "--no-progress",
        help="Show no progress, as with TQDM_DISABLE=1 in the environment.",
        callback=_hide_progress,
    ),
)
JSON = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    help="Print one JSON document, the result, and all else to standard error; after a failure it has `error`.",
)


def version_text(program: str) -> str:
    """Our version, Python's and those of the two libraries that decide most; nothing is imported for it."""
    libraries = ("torch", "transformers")
    found = {"python": ".".join(map(str, sys.version_info[:3])), **dict.fromkeys(libraries, "not installed")}
    found |= installed_versions(libraries)
    return f"{program} {__version__} ({', '.join(f'{name} {version}' for name, version in found.items())})"


def start_document() -> None:
    """From here on standard output is for one document; what this process and its children print goes to standard error."""
    if _chosen.document is not None:
        return
    _chosen.document = {}
    if sys.stdout is sys.__stdout__ and sys.stdout is not None:
        sys.stdout.flush()
        _chosen.stdout = os.dup(1)
        os.dup2(2, 1)


def has_document() -> bool:
    """Whether the result is to be a document."""
    return _chosen.document is not None


def answer(**result: Any) -> None:
    """Add to the document that a command ends with; without --json nothing happens.

    Args:
        **result: Dataclasses, mappings, lists, paths and scalars, numpy's too; numbers that are not finite become null.
    """
    if _chosen.document is not None:
        _chosen.document.update({name: _plain(value) for name, value in result.items()})


def end_document() -> str | None:
    """The document as text, and standard output as it was; None if none was begun."""
    document, _chosen.document = _chosen.document, None
    if _chosen.stdout is not None:
        sys.stdout.flush()
        os.dup2(_chosen.stdout, 1)
        os.close(_chosen.stdout)
        _chosen.stdout = None
        atexit.register(_end_stdout)
    if document is None or enter_launch().rank:  # of several processes one answers
        return None
    # ASCII, so that no text in it controls a terminal.
    return json.dumps(document, indent=2, allow_nan=False).replace("\x7f", "\\u007f")


def _end_stdout() -> None:
    """What libraries print when the process ends goes to standard error, too; called before what they registered."""
    with contextlib.suppress(OSError, ValueError):  # closed by whoever reads
        sys.stdout.flush()
        os.dup2(2, 1)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {hide_secrets(str(key)): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int) else hide_secrets(str(value))


# As scripts write them behind a switch: `--bf16 True`.
_SWITCHED = {
    word: value
    for value, words in {"true": "true yes on 1", "false": "false no off 0"}.items()
    for word in words.split()
}


class Overrides(click.Option):
    """``--set``: any option of a configuration; the command takes them as flags of their own, too."""

    def __init__(self, *names: Any, settings: Callable[[], type], **options: Any) -> None:
        super().__init__(*names, **options)
        self._settings = settings

    @property
    def settings(self) -> type:
        """The configuration; with all that it needs it is imported when an option of it is looked for."""
        return self._settings()

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names of options; behind one its values, where these are few."""
        key, equals, value = incomplete.partition("=")
        names = option_names(self.settings)
        if not equals:
            return [CompletionItem(f"{name}=") for name in (*names, "recipe") if name.startswith(key)]
        hint = bool if names.get(key) is bool else typing.get_args(names.get(key))
        known = ("true", "false") if hint is bool else recipe_names() if key == "recipe" else hint
        return [CompletionItem(f"{key}={item}") for item in known if str(item).startswith(value)]

    def takes(self, name: str) -> bool:
        """Whether there is such an option, under whatever word."""
        *above, last = name.split(".")
        hint: Any = option_names(self.settings).get(".".join(above)) if above else self.settings
        return name in option_names(self.settings) or (dataclasses.is_dataclass(hint) and last in words_of(hint))  # type: ignore[arg-type]

    def is_switch(self, name: str) -> bool:
        """Whether a flag of this name may stand alone, for true."""
        word, hint = words_of(self.settings).get(name), option_names(self.settings).get(name)
        known = () if word is None else [value for value in word.values or () if value is not None]
        return hint is bool or (bool(known) and all(isinstance(value, bool) for value in known))

    def near(self, name: str) -> list[str]:
        """Flags of options and words that are spelt like this one."""
        return [f"--{word.replace('_', '-')}" for word in slips(name, known_names(self.settings))]


def overrides(settings: Callable[[], type]) -> Callable[[Any], Any]:
    """The option ``--set`` of commands that are configured by what ``settings`` returns."""
    return click.option(
        "--set",
        "overrides",
        cls=Overrides,
        settings=settings,
        multiple=True,
        metavar="KEY=VALUE",
        help="Any option of the YAML file, or recipe=NAME: a publication's options, under yours; repeatable. --KEY VALUE is "
        "the same (--batch-size 8). Misspelt options suggest the closest match.",
    )


class Described(click.Command):
    """Has the options that all commands have, and lists them apart from its own, the required ones first."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """All options and arguments."""
        own = super().get_params(ctx)
        return [*own[:-1], *_GENERAL, *own[-1:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help's lists of options."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        general = [param for param in options if param in _GENERAL or param.is_eager or "--json" in param.opts]
        own = sorted((param for param in options if param not in general), key=lambda param: not param.required)
        for title, params in (("Options", own), ("Options of all commands", general)):
            records = [record for param in params if (record := param.get_help_record(ctx)) is not None]
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def get_short_help_str(self, limit: int = 45) -> str:
        """The first sentence of the help, whole: what is too long for a line gets more of them."""
        return super().get_short_help_str(max(limit, 1000))


class Command(Described):
    """A command: its options are taken as flags, and with --json it answers with one document."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.context_settings.setdefault("help_option_names", ["-h", "--help"])  # also without its group

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the arguments."""
        if not ctx.resilient_parsing:
            end = args.index("--") if "--" in args else len(args)
            places = [place for place, argument in enumerate(args[:end]) if argument == "--json"]
            option = next((param for param in self.params if "--json" in param.opts), None)
            alone = [place for place in places if getattr(option, "is_flag", False) or _ends(args, place + 1)]
            if option is not None and alone:
                start_document()
            for param in self.params:
                if isinstance(param, Overrides):
                    args = self._as_settings(ctx, args, param)
        try:
            left = super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            # click's own proposals are of names that have little more than some letters in common
            flag = error.option_name
            near = slips(flag, (name for param in self.get_params(ctx) for name in param.opts))
            for param in self.params:
                if isinstance(param, Overrides):
                    near += param.near(flag.removeprefix("--").replace("-", "_"))
            hint = f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else ""
            raise click.NoSuchOption(flag, f"No such option {flag!r}.{hint}", ctx=ctx) from None
        for param in self.params:
            if isinstance(param, Overrides) and not ctx.resilient_parsing:
                self._refuse_twice(ctx, param)
        return left

    def _refuse_twice(self, ctx: click.Context, settings: Overrides) -> None:
        """Refuse an option that is given on its own, and otherwise by ``--set``, under whatever word."""
        given = ctx.params.get(str(settings.name)) or ()
        named = canonical_overrides(settings.settings, given) if given else []
        keys = {text.partition("=")[0].strip() for text in named}
        for param in self.params:
            name, value = str(param.name), ctx.params.get(str(param.name))
            if name not in keys or ctx.get_parameter_source(name) is not ParameterSource.COMMANDLINE:
                continue
            if (other := last_given(named, name)) != str(value):
                raise click.UsageError(
                    f"{param.opts[0]} {value} and --set {name}={other} are the same option; give one of them", ctx
                )

    def _as_settings(self, ctx: click.Context, args: list[str], settings: Overrides) -> list[str]:
        """``--learning-rate 1e-4`` as ``--set learning_rate=1e-4``, of flags that the command does not have itself."""
        known = {name: param for param in self.get_params(ctx) for name in param.opts}
        read, left = list[str](), list(args)
        while left:
            argument = left.pop(0)
            flag, equals, value = argument.partition("=")
            name = flag.removeprefix("--").replace("-", "_")
            if argument == "--":
                return [*read, argument, *left]
            if not flag.startswith("--") or flag in known or not settings.takes(name):
                read.append(argument)
                option = known.get(flag)
                if isinstance(option, click.Option) and not equals and not option.is_flag and left:
                    read.append(left.pop(0))
                continue
            switch = settings.is_switch(name)
            if not equals and switch and (_ends(left, 0) or left[0].lower() not in _SWITCHED):
                value = "true"
            elif not equals:
                if not left:
                    raise click.UsageError(f"Option '{flag}' requires an argument.", ctx)
                value = left.pop(0)
            read += ["--set", f"{name}={_SWITCHED.get(value.lower(), value) if switch else value}"]
        return read


def _ends(args: list[str], place: int) -> bool:
    """Whether no value stands at this place, but another option or nothing."""
    return len(args) <= place or args[place].startswith("-")


class _Bash(BashComplete):
    """Completes ``KEY=VALUE``, which bash hands over, and wants back, as words of their own: KEY, =, VALUE."""

    source_template = BashComplete.source_template.replace(
        "COMPREPLY+=($value)", "COMPREPLY+=($value)\n            [[ $value != *= ]] || compopt -o nospace 2> /dev/null"
    )

    before = ""  # of the word to complete, what bash keeps

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one to complete, and that one, put together around each ``=``."""
        args, last = super().get_completion_args()
        joined = list[str]()
        for word, previous in zip([*args, last], ["", *args], strict=True):
            if joined and "=" in (word, previous):
                joined[-1] += word
            else:
                joined.append(word)
        self.before = joined[-1] if last == "=" else joined[-1].removesuffix(last)
        return joined[:-1], joined[-1]

    def format_completion(self, item: CompletionItem) -> str:
        """The line that the shell reads."""
        return f"{item.type},{str(item.value).removeprefix(self.before)}"


add_completion_class(_Bash)


def completes(words: Callable[[], list[str]], *, several: bool = False) -> Completed:
    """Complete an option with one of these words, or with ``several`` of them behind commas; else with files."""

    def complete(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",") if several else ("", "", incomplete)
        found = [CompletionItem(f"{before}{comma}{word}") for word in words() if word.startswith(last)]
        return found or [CompletionItem(incomplete, type="file")]

    return complete


def complete_folder(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete an option with a folder."""
    return [CompletionItem(incomplete, type="dir")]
