"""A cache in another folder: a disk, a network mount, a colleague's home."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_distill_cache.common.errors import CacheFormatError, TransferError
from vlm_distill_cache.common.files.atomic import clean_stale, create_temporary, publish_file, write_bytes_atomic
from vlm_distill_cache.common.files.disk import name_full_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_BLOCK_BYTES = 1 << 20


class DirectoryRemote:
    """A folder that this machine sees; created by the first write.

    Args:
        root: The folder.
    """

    upload_files = 1
    upload_jobs = 8

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """Return a small file whole; see ``Remote``."""
        path = self._existing(name)
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise CacheFormatError(f"{path}: larger than {max_bytes} bytes; not a file of this cache")
        return data

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None; see ``Remote``."""
        try:
            return self._existing(name).stat().st_size
        except FileNotFoundError:
            return None

    def download(self, name: str, target: Path, *, size: int, on_bytes: Callable[[int], object] | None = None) -> None:
        """Append what is missing to ``target``; see ``Remote``."""
        path = self._existing(name)
        found = path.stat().st_size
        if found != size:
            raise TransferError(
                f"{path}: {found} bytes; expected {size}; the source is damaged or being changed: "
                "run `cachectl verify` there"
            )
        with path.open("rb") as source, target.open("ab") as copy:
            have = copy.tell()
            if have > size:
                copy.truncate(have := 0)
            source.seek(have)
            while have < size and (block := source.read(min(_BLOCK_BYTES, size - have))):
                copy.write(block)
                have += len(block)
                if on_bytes is not None:
                    on_bytes(len(block))
        if have < size:
            raise TransferError(f"{path}: ends after {have} of {size} bytes; it is being changed: pull again")

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy files here, one after the other, each atomically; see ``Remote``."""
        for name, source in files.items():
            final = self.root / name
            final.parent.mkdir(parents=True, exist_ok=True)
            clean_stale(final.parent, final.name)
            temporary, lock = create_temporary(final)
            try:
                with name_full_disk(final):
                    with source.open("rb") as file, temporary.open("wb") as copy:
                        while block := file.read(_BLOCK_BYTES):
                            copy.write(block)
                            if on_bytes is not None:
                                on_bytes(len(block))
                        copy.flush()
                        os.fsync(copy.fileno())
                    publish_file(temporary, final)
            finally:
                temporary.unlink(missing_ok=True)
                if lock is not None:
                    lock.release()

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file, or return False; see ``Remote``."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        clean_stale(path.parent, path.name)
        if path.exists():
            return False
        try:
            write_bytes_atomic(path, data, create_only=True)
        except FileExistsError:
            return False
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Remove files, and the folders of shards that they leave empty; see ``Remote``."""
        for name in names:
            path = self.root / name
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty, or gone already
                while (path := path.parent) != self.root and path.parent != self.root:
                    path.rmdir()

    def _existing(self, name: str) -> Path:
        # Links are followed: model hubs' local copies are full of them. A pipe would block for ever.
        path = self.root / name
        if path.exists() and not path.is_file():
            raise CacheFormatError(f"{path}: not a plain file; a cache holds plain files and folders only")
        if not path.exists():
            raise FileNotFoundError(2, "no such file", str(path))
        return path
