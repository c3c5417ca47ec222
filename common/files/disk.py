"""Places to write: what a full disk means, and folders that lie inside each other."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from vlm_distill_cache.common.errors import ConfigError, DistillError, NoRoomError
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.printing import one_line

AGAIN = "run the same command again: it goes on where it stopped"
_NO_ROOM = {errno.ENOSPC: "make room", errno.EDQUOT: "make room or raise the quota", errno.EFBIG: "raise `ulimit -f`"}
_REMEDIES = {code: f"{remedy}, then run the same command again" for code, remedy in _NO_ROOM.items()} | {
    errno.EROFS: "give a place that can be written",
    errno.EACCES: "change its owner or mode (chown, chmod), or give another place",
    errno.EPERM: "change its owner or mode (chown, chmod), or give another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "make its folder first, or correct the name",
    errno.ENOTDIR: "a part of it is a file; give another name",
    errno.EISDIR: "it is a folder; give the name of a file",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise `ulimit -n`",
}
# How the writers of weights and tokenizers, which are not Python's, speak of the system's errors.
_FOREIGN = re.compile(r"\(os error (\d+)\)|\bOs \{ code: (\d+)")


@contextlib.contextmanager
def name_full_disk(place: Path) -> Iterator[None]:
    """Say where there is no room and what to do: the system's own error of a write often names no file.

    Args:
        place: The file or folder that is written; an error that names a file elsewhere is told of that one.

    Raises:
        NoRoomError: Instead of the system's or a library's error of a full disk, quota or file.
    """
    try:
        yield
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else _foreign_code(error)
        if code not in _NO_ROOM:
            raise
        named = getattr(error, "filename", None)
        where = place if is_below(named, place.parent) else named
        raise NoRoomError(f"{where}: {os.strerror(code)}; {_REMEDIES[code]}") from error


def _foreign_code(error: Exception) -> int | None:
    found = None if isinstance(error, DistillError) else _FOREIGN.search(str(error))
    return int(found[1] or found[2]) if found else None


@contextlib.contextmanager
def name_written(final: Path, temporary: Path) -> Iterator[None]:
    """As `name_full_disk`, for what is written under another name first, which tells nobody anything."""
    try:
        with name_full_disk(final):
            yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else Path()
        if not named.is_relative_to(temporary):
            raise
        raise OSError(error.errno, error.strerror, str(final / named.relative_to(temporary))) from error


def refuse_no_disk(place: Path) -> None:
    """Refuse a folder such as ``/proc``, where nothing can be made, whatever its mode says.

    Only where the system tells of no disk at all this is tried, since some disks of networks tell of none.

    Raises:
        OSError: Naming it.
    """
    if os.statvfs(place).f_blocks:
        return
    try:
        import tempfile

        with tempfile.TemporaryDirectory(dir=place):
            pass
    except OSError as error:
        raise OSError(error.errno, "nothing can be written there; give a folder of a disk", str(place)) from error


def disk_words(error: OSError) -> str:
    """An error of the system: the file that it names, what is wrong, and what to do where that is known and not said yet."""
    place = f"{one_line(os.fsdecode(error.filename))}: " if isinstance(error.filename, str | bytes) else ""
    plain = error.errno is not None and error.strerror == os.strerror(error.errno)
    remedy = _REMEDIES.get(error.errno or 0, "") if plain else ""
    return f"{place}{error.strerror or error}{remedy and f'; {remedy}'}"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and below; 0 if it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def nearest_there(place: Path) -> Path:
    """A place, or the nearest folder above it where it is not there yet."""
    return next(found for found in (place.absolute(), *place.absolute().parents) if found.exists())


def free_bytes(place: Path) -> int:
    """Free bytes of the disk that a place is on, or will be."""
    return shutil.disk_usage(nearest_there(place)).free


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


def is_mount_point(folder: Path) -> bool:
    """Whether something is mounted on a folder, be it another folder of the same disk."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return False
    places = (line.split(" ")[4] for line in lines)
    return str(folder) in (re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), place) for place in places)


def parse_bytes(text: str, option: str) -> float:
    """Read a size: ``20GB``, ``1.5 TiB``, ``500000``; ``option`` is whose value it is.

    Raises:
        ConfigError: If it is none.
    """
    units = {f"{prefix}{kind}": base**power for base, kind in ((1000, "b"), (1024, "ib"))
             for power, prefix in enumerate(("k", "m", "g", "t", "p"), start=1)}  # fmt: skip
    lowered = text.strip().lower()
    number = lowered.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = lowered[len(number) :].strip() or "b"
    try:
        size = float(number) * float(({"b": 1} | units)[unit])
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise ConfigError(f"{option}: expected a size such as 20GB, 500MB or 1.5TiB, got {text!r}")
    return size


def free_main_memory() -> int:
    """Bytes of main memory that this process could have."""
    told = Path("/proc/meminfo")  # Linux alone has it, and counts there what the disk cache would give back
    for line in told.read_text().splitlines() if told.is_file() else ():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return int(rest.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
