"""A cache in another folder: a disk, a network mount, a colleague's home."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import (
    clean_stale,
    create_temporary,
    hold_folder,
    publish_file,
    write_bytes_atomic,
)
from vlm_distill_cache.common.files.disk import AGAIN, name_full_disk
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.streams import Body, Retries

_BLOCK_BYTES = 1 << 20
_ONCE = Retries(
    attempts=1,
    timeout=math.inf,
    remedy=f"the source is damaged or being changed: run `cachectl verify` there, then {AGAIN}",
)


class DirectoryRemote(Remote):
    """A folder that this machine sees; created by the first write."""

    keeps_conditions = False

    def __init__(self, root: Path) -> None:
        super().__init__(str(root), _ONCE)
        self.root = root

    def _open(self, name: str, start: int = 0, stop: int | None = None) -> Body:
        # Links are followed: model hubs' local copies are full of them. A pipe would block for ever.
        path = self.root / name
        if path.exists() and not path.is_file():
            raise CacheFormatError(f"{path}: not a plain file; a cache holds plain files and folders only")
        file = path.open("rb")
        file.seek(start)
        return Body(start, os.fstat(file.fileno()).st_size, file.read, file.close)

    @contextmanager
    def hold(self) -> Iterator[Callable[[], object]]:
        """Keep other pushes and builds off; see ``Remote``. The lock goes with the process, however that ends."""
        self.root.mkdir(parents=True, exist_ok=True)
        with hold_folder(
            self.root, busy="another process is writing there; wait until it has ended, or push elsewhere"
        ):
            yield lambda: None

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
            with suppress(OSError):  # not empty, or gone already
                while (path := path.parent) != self.root and path.parent != self.root:
                    path.rmdir()
