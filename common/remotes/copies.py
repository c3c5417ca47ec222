"""Large files of data that lie at an address: read by ranges, or through a copy here that is made when it is needed.

Copies lie in ``$VLM_DISTILL_CACHE_DIR/files`` and take at most ``$VLM_DISTILL_CACHE_BYTES``, as much again as shards of
caches may (`common.remotes.mirror`); those that were opened longest ago leave first. Several processes share them: one fetches
a file, and goes on where a killed one ended. One that is open stays readable when it leaves.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from vlm_distill_cache.common.errors import DataError, TransferError
from vlm_distill_cache.common.files.atomic import remove
from vlm_distill_cache.common.files.disk import name_full_disk
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import locked
from vlm_distill_cache.common.remotes.mirror import mirror_settings

_ASKED_AT_ONCE = 16
_PART = ".part"


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address, as it was when this process first asked for it; picklable.

    Attributes:
        folder: The address of its folder.
        name: Its name there.
        size: Bytes.
        version: What the server calls these bytes (an ETag, or a time); empty: it does not say.
    """

    folder: str
    name: str
    size: int
    version: str

    def __str__(self) -> str:
        return f"{public_location(self.folder)}/{self.name}"

    def stamp(self) -> list[object]:
        """What tells the file from others, and from itself when it was changed, JSON."""
        return [str(self), self.size, self.version]

    def open(self, mode: str = "rb") -> BinaryIO:
        """Open a copy of it that lies here, which is fetched if it does not.

        Raises:
            TransferError: It cannot be reached, or has changed.
        """
        path = self._copy()
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = path.open("rb")
                with contextlib.suppress(OSError):  # the last one to be opened leaves last
                    os.utime(path)
                return file
            path.parent.mkdir(parents=True, exist_ok=True)
            with locked(path.parent / "lock"):
                if not path.exists():
                    self._fetch(path)

    def ranges(self) -> RangeFile:
        """Open it there, to be read by ranges."""
        return RangeFile(self)

    def refuse_changed(self) -> None:
        """Refuse to go on if another file has taken its place.

        Raises:
            TransferError: With both sizes.
        """
        now = describe_file(self.folder, self.name)
        if (now.size, now.version) != (self.size, self.version):
            raise TransferError(
                f"{self} changed while it was read: it had {self.size} bytes, version {self.version or 'unknown'}, and has "
                f"{now.size}, version {now.version or 'unknown'}; put the old file back, or begin again with the new one and "
                "another folder"
            )

    def _copy(self) -> Path:
        return mirror_settings()[0] / "files" / fingerprint(self.stamp()) / self.name

    def _fetch(self, path: Path) -> None:
        part = path.with_name(path.name + _PART)
        self.refuse_changed()
        make_room(path.parents[1], self.size, keep=path.parent)
        with name_full_disk(path):
            _remote(self.folder).download(self.name, part, size=self.size)
        self.refuse_changed()
        part.replace(path)


class RangeFile(io.RawIOBase):
    """A file at an address, each read of which is a request."""

    def __init__(self, file: RemoteFile) -> None:
        self._remote_file, self._at = file, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; nothing is asked for."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._remote_file.size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:
        """Where it stands."""
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """Read as much as there is room for, or as is left.

        Raises:
            TransferError: It cannot be had any more, or not by ranges, or has changed.
        """
        file = self._remote_file
        stop = min(self._at + len(buffer), file.size)
        if stop <= self._at:
            return 0
        try:
            data, version = _remote(file.folder).read_range(file.name, self._at, stop)
        except FileNotFoundError as error:
            raise TransferError(f"{file} is not there any more; put it back, or name other data") from error
        if version != file.version:
            file.refuse_changed()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def describe_files(addresses: Iterable[str]) -> list[RemoteFile]:
    """Ask for size and version of files, several at a time.

    Raises:
        DataError: One is not there.
        TransferError: One cannot be reached.
    """
    with ThreadPoolExecutor(_ASKED_AT_ONCE) as threads:
        return list(threads.map(lambda address: describe_file(*_split(address)), addresses))


def describe_file(folder: str, name: str) -> RemoteFile:
    """Ask for size and version of a file."""
    found = _remote(folder).describe(name)
    if found is None:
        raise DataError(
            f"{public_location(folder)}/{name}: there is no such file; check the address, and that you may read it"
        )
    return RemoteFile(folder, name, *found)


def make_room(root: Path, size: int, *, keep: Path) -> None:
    """Remove copies, the longest unused first, until another of so many bytes fits into what all may take."""
    limit = mirror_settings()[1]
    with locked(root / "lock"):
        copies = []
        for path in root.glob("*/*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                copies.append((status.st_mtime_ns, path, status.st_size))
        total = size + sum(held for _, _, held in copies)
        for _, path, held in sorted(copies):
            if total <= limit:
                break
            if path.parent != keep and path.name != "lock" and not path.name.endswith(_PART):
                remove(path)
                total -= held


def _split(address: str) -> tuple[str, str]:
    """The folder of a file at an address, and its name."""
    folder, _, name = address.rpartition("/")
    return folder, name


@functools.cache
def _opened(folder: str, process: int) -> Remote:
    return open_remote(folder)


def _remote(folder: str) -> Remote:
    return _opened(folder, os.getpid())  # connections do not survive a fork
