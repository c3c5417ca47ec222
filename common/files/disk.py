"""Places to write: what a full disk means, and folders that lie inside each other."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from vlm_distill_cache.common.errors import ConfigError, NoRoomError
from vlm_distill_cache.common.locations import is_url

AGAIN = "run the same command again: it goes on where it stopped"
_NO_ROOM = {errno.ENOSPC: "make room", errno.EDQUOT: "make room or raise the quota", errno.EFBIG: "raise `ulimit -f`"}


@contextlib.contextmanager
def name_full_disk(place: Path) -> Iterator[None]:
    """Say where there is no room and what to do: the system's own error of a write often names no file.

    Args:
        place: The file or folder that is written; an error that names a file elsewhere is told of that one.

    Raises:
        NoRoomError: Instead of an ``OSError`` of a full disk, quota or file.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        where = place if is_below(error.filename, place.parent) else error.filename
        raise NoRoomError(f"{where}: {error.strerror}; {_NO_ROOM[error.errno]}, then {AGAIN}") from error


def is_below(filename: object, folder: Path) -> bool:
    """Whether the file that an ``OSError`` names lies in a folder; one that names none may."""
    if not isinstance(filename, str | bytes):
        return True
    return Path(os.fsdecode(filename)).absolute().is_relative_to(folder.absolute())


def refuse_overlap(folder: Path, *others: str | Path) -> None:
    """Refuse a folder that is, or lies inside, one of others, or the other way round; addresses never do."""
    inner = folder.resolve()
    for other in others:
        if is_url(other):
            continue
        outer = Path(other).resolve()
        if inner.is_relative_to(outer) or outer.is_relative_to(inner):
            raise ConfigError(
                f"{folder} and {other} are one folder or lie inside each other; a cache holds nothing else: choose a "
                "folder beside it"
            )
