"""Files and folders that options name to be written: never over what somebody else wrote, nor into a cache or a student."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import parse_json, read_bounded
from vlm_distill_cache.common.terminal.command_line import quoted

PICTURE_MARK = b"drawn by cachectl inspect"
_MOST = 64 << 20  # bytes of a result

IsOurs = Callable[[bytes], bool]


def json_of(*keys: str, others: bool = True) -> IsOurs:
    """Knows JSON by the keys of its object; with ``others`` it may have more of them."""

    def is_ours(content: bytes) -> bool:
        found = parse_json(content, "result")
        return isinstance(found, dict) and found.keys() >= {*keys} and (others or found.keys() <= {*keys})

    return is_ours


def marked(mark: bytes) -> IsOurs:
    """Knows a file by bytes in it."""
    return lambda content: mark in content


def refuse_others_file(path: Path, is_ours: IsOurs, *, ending: str = ".json") -> Path:
    """Refuse a place for a result where something else lies, or that belongs to a cache or a student.

    An empty file may be there, as `mktemp` makes them. A link is followed to its file.

    Args:
        is_ours: Whether these bytes are an earlier result of the same command; may raise `CacheFormatError` for no.
        ending: Of the name that is proposed where a folder was given.

    Returns:
        Where to write: the path, or where it leads if it is a link.

    Raises:
        ConfigError: With what to do instead.
    """
    if is_stream(path):
        raise ConfigError(
            f"{path}: a device, a pipe or this command's own output, and a result is written to a file that is whole or not "
            "there; give the name of a file (figures are printed by --json without one)"
        )
    shown, path = path, Path(os.path.realpath(path)) if path.is_symlink() else path
    refuse_inside(path)
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it, or choose another place")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give a file in it, {quoted(path / 'result')}{path.suffix or ending}")
    if not os.path.lexists(path):
        return path
    try:
        content = read_bounded(path, max_bytes=_MOST)
        earlier = not content or is_ours(content)
    except (FileNotFoundError, CacheFormatError):
        earlier = False
    if not earlier:
        raise ConfigError(
            f"{shown}: this is no earlier result of this command (or one of an older version, which cannot be told apart), and "
            "nothing else is overwritten; give another name, or delete it if nobody needs it"
        )
    return path


def is_stream(path: Path) -> bool:
    """Whether a path leads to something that takes bytes and keeps no file: also the file that this command prints to."""
    with contextlib.suppress(OSError):
        found = path.stat()
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            return True
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if os.path.samestat(found, os.fstat(descriptor)):
                    return True
    return False


class ResultFile(click.Path):
    """A file for a command's result, looked at before the work begins; see `refuse_others_file`."""

    def __init__(self, is_ours: IsOurs, *, ending: str = ".json") -> None:
        super().__init__(dir_okay=False, path_type=Path)
        self.is_ours, self.ending = is_ours, ending

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """Return the path; of an option without a value, the empty text that stands for it."""
        if value == "":
            return ""
        try:
            value = os.fspath(refuse_others_file(Path(value), self.is_ours, ending=self.ending))
        except ConfigError as error:
            self.fail(str(error), param, ctx)
        return super().convert(value, param, ctx)


def figures_file(is_ours: IsOurs) -> Callable[[Any], Any]:
    """The option ``--json [FILE]`` of a command that predicts: its figures in a file, or as the one document that is printed."""
    return click.option(
        "--json",
        "json_file",
        type=ResultFile(is_ours),
        is_flag=False,
        flag_value="",
        metavar="[FILE]",
        help="Also write all figures here; without FILE, print them and nothing else.",
    )


class Finite(click.FloatRange):
    """Refuses what `FloatRange` lets through: a NaN is neither below nor above a bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number
