"""The files beside the shards: projector, vision tower, processor, index, plan; sizes at once, digests on use."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.plan import PLAN, SHARDS
from vlm_distill_cache.common.cache.sidecar import FileEntry
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX
from vlm_distill_cache.common.files.hashing import stream_checksum


def open_plain(root: Path, name: str) -> BinaryIO:
    """Open a file of a cache for reading, following no link below ``root``.

    Args:
        name: Relative POSIX path, as ``documents.safe_path`` allows it.

    Raises:
        OSError: If it is missing, or it or a folder on the way is a link, a device or a pipe.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not make us wait
    *folders, last = name.split("/")
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folders:
            inner = os.open(part, flags | os.O_DIRECTORY, dir_fd=folder)
            os.close(folder)
            folder = inner
        descriptor = os.open(last, flags, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise OSError(error.errno, "a link or device instead of a plain file", str(root / name)) from error
        raise
    finally:
        os.close(folder)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "a folder or device instead of a plain file", str(root / name))
    return os.fdopen(descriptor, "rb")


def is_below_links(root: Path, name: str) -> bool:
    """Say whether a folder on the way to ``name`` is a link; ``name`` itself may be one."""
    parts = name.split("/")[:-1]
    return any(root.joinpath(*parts[: i + 1]).is_symlink() for i in range(len(parts)))


def check_size(root: Path, name: str, entry: FileEntry, remedy: str) -> None:
    """Refuse a file that is lost, cut or longer than its entry says, without reading it."""
    path = root / name
    try:
        size = path.stat(follow_symlinks=False).st_size
    except OSError as error:
        raise CacheFormatError(f"{path}: lost, or cannot be read ({error.strerror}); {remedy}") from error
    if size != entry.size:
        raise CacheFormatError(f"{path}: damaged: expected {entry.size} bytes, found {size} bytes; {remedy}")


def check_file(root: Path, name: str, entry: FileEntry, remedy: str) -> None:
    """Refuse a file that is lost or has other bytes than its entry says; follows no link."""
    check_size(root, name, entry, remedy)
    try:
        with open_plain(root, name) as file:
            found = stream_checksum(file)
    except OSError as error:
        raise CacheFormatError(f"{root / name}: cannot be read: {error.strerror}; {remedy}") from error
    if found != entry.xxh3_128:
        raise CacheFormatError(f"{root / name}: damaged: expected {entry.xxh3_128}, found {found}; {remedy}")


MANIFEST, CARD = "manifest.json", "README.md"
SINKS = "sinks.json"  # of what the records say; written anew whenever a cache is sealed
LEASES = f"{TEMPORARY_PREFIX}leases"  # of the workers that build a cache together; gone once it is sealed
MAX_CARD_BYTES = 4 << 20

_REMEDY = "run `teacher-cache build` again with the same options to write it anew, or copy it from an intact cache"


def check_sizes(cache_dir: Path, files: Mapping[str, FileEntry]) -> None:
    """Refuse files that are lost, cut or longer than they were sealed, without reading them."""
    for name, entry in files.items():
        check_size(cache_dir, name, entry, _REMEDY)


def check_digests(cache_dir: Path, files: Mapping[str, FileEntry]) -> None:
    """Refuse files that are lost or have other bytes than they were sealed with."""
    for name, entry in files.items():
        check_file(cache_dir, name, entry, _REMEDY)


def refuse_occupied(target: Path) -> None:
    """Refuse to write a cache into a folder of other things.

    Raises:
        ConfigError: If it is a file, lies in a cache or a student's folder, or holds anything but a cache or what a killed
            run left before its plan.
    """
    refuse_inside(target)
    if target.is_dir():
        if (target / PLAN).is_file() or all(map(is_leftover, target.iterdir())):
            return
    elif not target.exists():
        return
    raise ConfigError(f"{target}: not empty and no cache; give a new folder")


def is_leftover(path: Path) -> bool:
    """Whether an entry of a folder is what a run leaves that is killed before it wrote its plan."""
    if path.name == SHARDS and path.is_dir():
        return all(inner.name.startswith(TEMPORARY_PREFIX) for inner in path.iterdir())
    return path.name.startswith(TEMPORARY_PREFIX)


def side_files(cache_dir: Path) -> list[str]:
    """Return the relative paths of all files outside ``shards/``, except the manifest and the card."""
    return sorted(name for name in walk_files(cache_dir, skip=(SHARDS,)) if name not in (MANIFEST, CARD))


def walk_files(root: Path, skip: Iterable[str] = ()) -> list[str]:
    """Return the relative paths of all files below ``root`` but temporaries; refuses links, devices and pipes."""
    names, folders = [], [""]
    while folders:
        folder = folders.pop()
        with os.scandir(root / folder) as found:  # a Path's own methods take five times as long
            entries = sorted(found, key=attrgetter("name"))
        for entry in entries:
            name = f"{folder}{entry.name}"
            if name in skip or entry.name.startswith(TEMPORARY_PREFIX):
                continue
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{name}/")
            elif entry.is_file(follow_symlinks=False):
                names.append(name)
            else:
                raise CacheFormatError(f"{root / name}: a link or device; a cache holds plain files and folders only")
    return sorted(names)
