"""Room for shards on this machine: bounded, shared by processes, the least recently used leave first.

Each shard has a small file here that is two things at once. Its lock: shared while somebody reads the shard,
exclusive while it is fetched or removed. And its state: the bytes it takes, written before the first byte
arrives and cleared after the last is gone, so that a killed process leaves a count that is too high, never
too low. The lock files are never removed: whoever waits for one must not wait for a nameless inode.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from typing import TYPE_CHECKING

from vlm_distill_cache.common.files.atomic import HeldLock, try_lock

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

HELD = "held"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS)
_log = logging.getLogger(__name__)


def lock(path: Path, *, shared: bool) -> HeldLock | None:
    """Wait for a lock on a file, which is created if missing.

    Returns:
        The lock; None on file systems without ``flock``, where nothing is ever removed.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    held = HeldLock(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
    except OSError as error:
        held.release()
        if error.errno not in _NO_LOCKS:
            raise
        return None
    return held


class MirrorSpace:
    """The shards of all mirrors under one folder, and how many bytes they may take.

    Args:
        root: Folder of all mirrors; each mirror keeps its lock files in ``root/NAME/held``.
        limit: Bytes that all shards together may take.
        remove: Removes the files of a shard: called with the mirror's name and the shard's number.
    """

    def __init__(self, root: Path, limit: int, remove: Callable[[str, int], None]) -> None:
        self.root = root
        self.limit = limit
        self._remove = remove
        self._told = False

    def hold(
        self, mirror: str, shard: int, *, size: int, present: Callable[[], bool], fetch: Callable[[], None]
    ) -> HeldLock | None:
        """Make sure that a shard is here, and that it stays until what is returned is released or dropped.

        Of several processes that want a shard, one fetches it and the others wait.

        Args:
            mirror: Name of the mirror.
            shard: Its number.
            size: Bytes of its files.
            present: Whether all of it is here, undamaged.
            fetch: Brings what is missing.

        Returns:
            The hold; None on file systems without locks, where nothing is removed anyway.
        """
        path = self._state_path(mirror, shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            reading = lock(path, shared=True)
            if present():
                os.utime(path)  # the least recently used leave first; whoever may write may set it to now
                return reading
            if reading is not None:
                reading.release()
            writing = lock(path, shared=False)
            try:
                if not present():
                    self._reserve(path, size)
                    fetch()
            finally:
                if writing is not None:
                    writing.release()
            # Between the two locks another process may have removed it again: then once more.

    def fits(self, mirror: str, shard: int, *, size: int, beside: Collection[int]) -> bool:
        """Whether a shard would find room if all left that is neither in use nor wanted beside it.

        Args:
            mirror: Name of the mirror.
            shard: Its number.
            size: Bytes of its files.
            beside: Shards of this mirror that shall stay.
        """
        own = self._state_path(mirror, shard)
        wanted = {self._state_path(mirror, other) for other in beside}
        taken = 0
        for _, path, held in self._states():
            if path == own:
                continue
            free = try_lock(path)
            if free is None or path in wanted:
                taken += held
            if free is not None:
                free.release()
        return taken + size <= self.limit

    def _reserve(self, path: Path, size: int) -> None:
        """Make room for a shard and write down that it is taken; what is in use stays, above the limit too."""
        own = _bytes_in(path)
        accounting = lock(self.root / "lock", shared=False)
        try:
            total = sum(held for _, _, held in self._states()) - own + size
            for _, other, held in sorted(self._states()):
                if total <= self.limit:
                    break
                if other != path and self._evict(other):
                    total -= held
            path.write_bytes(str(size).encode())
        finally:
            if accounting is not None:
                accounting.release()
        if total > self.limit and not self._told:
            self._told = True
            _log.warning(
                "%s takes %d bytes, above its limit of %d: so many shards are in use at a time. Raise "
                "VLM_DISTILL_CACHE_BYTES, or lower shuffle_window",
                self.root,
                total,
                self.limit,
            )

    def _evict(self, path: Path) -> bool:
        """Remove a shard unless somebody reads or fetches it."""
        free = try_lock(path)
        if free is None:
            return False
        try:
            self._remove(path.parent.parent.name, int(path.name))
            path.write_bytes(b"")
        finally:
            free.release()
        return True

    def _states(self) -> list[tuple[int, Path, int]]:
        """When each shard was last used (ns), its lock file, and its bytes; absent ones are left out."""
        return [
            (path.stat().st_mtime_ns, path, held)
            for folder in self.root.glob(f"*/{HELD}")
            for path in folder.iterdir()
            if path.name.isdigit() and (held := _bytes_in(path))
        ]

    def _state_path(self, mirror: str, shard: int) -> Path:
        return self.root / mirror / HELD / f"{shard:05d}"


def _bytes_in(path: Path) -> int:
    text = path.read_bytes()
    return int(text) if text.isdigit() else 0
