"""Records by a key in one file that several processes add to and read: for what can always be made again.

A record is read only if its checksum fits, so neither a process that is killed while it writes nor a machine that stops
makes a wrong one: what was cut off is overwritten by the next that writes; a file that begins otherwise is somebody else's,
and left alone. Reading and writing never fail and never wait:
a record that cannot be read is not there, one that cannot be written is left out, as is one for which there is no room.

A record: ``VDR1``, key (16 bytes), <u8 length, <u4 CRC-32 of the data, <u4 CRC-32 of these 32 bytes, the data. The file is
read with ``pread``, not mapped: processes share the system's cache of it either way, and a disk that fails is an error of the
read, not the end of the process.
"""

import contextlib
import errno
import fcntl
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

KEY_BYTES = 16
MOST_BYTES = 1 << 30  # of a record: the system writes no more than twice that at once
_HEAD, _SUM = struct.Struct("<4s16sQI"), struct.Struct("<I")
_HEADER = _HEAD.size + _SUM.size
_MAGIC = b"VDR1"
_PAUSES = (0.0, 0.001, 0.002, 0.004)  # seconds, while another process writes
_log = logging.getLogger(__name__)


class RecordFile:
    """One file of records; safe for threads, and may be pickled or forked."""

    def __init__(self, path: Path, limit: int) -> None:
        """Read and write records of a file of at most ``limit`` bytes; nothing is created before the first is written."""
        self._path, self._limit = path, limit
        self._lock = threading.Lock()
        self._file: int | None = None
        self._writes = True
        self._places: dict[bytes, tuple[int, int, int]] = {}  # where the data begin, how long they are, their checksum
        self._end = 0  # of the last whole record that was seen

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self._path, "limit": self._limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and write no more; may be called twice."""
        self._writes = False
        if self._file is not None:
            os.close(self._file)
        self._file = None

    def get(self, key: bytes) -> bytes | None:
        """The data of a key's record; None if there is none that is whole."""
        with contextlib.suppress(OSError):
            with self._lock:
                if key not in self._places:
                    self._look()
                file, place = self._file, self._places.get(key)
            if file is None or place is None:
                return None
            offset, length, checksum = place
            data = os.pread(file, length, offset)
            if len(data) == length and zlib.crc32(data) == checksum:
                return data
            with self._lock:
                self._places.pop(key, None)
        return None

    def put(self, key: bytes, parts: Sequence[bytes | memoryview]) -> None:
        """Add a record, if it has room and no other process writes all the while."""
        length, checksum = 0, 0
        for part in parts:
            length, checksum = length + memoryview(part).nbytes, zlib.crc32(part, checksum)
        if not self._writes or length > MOST_BYTES:
            return
        head = _HEAD.pack(_MAGIC, key, length, checksum)
        pieces: list[bytes | memoryview] = [head, _SUM.pack(zlib.crc32(head)), *parts]
        with self._lock:
            try:
                with self._alone() as file:
                    if file is not None and key not in self._places:
                        self._add(file, pieces, _HEADER + length)
            except OSError as error:
                self._stop(error.strerror or str(error))

    def _add(self, file: int, pieces: Sequence[bytes | memoryview], size: int) -> None:
        if self._end + size > self._limit:
            self._stop(f"it may have {self._limit} bytes")
            return
        if os.fstat(file).st_size > self._end:  # a killed process left a record half written
            if not self._end and not _MAGIC.startswith(os.pread(file, len(_MAGIC), 0)):
                self._stop("it is another kind of file")
                return
            os.ftruncate(file, self._end)
        written = 0
        try:
            written = os.pwritev(file, pieces, self._end)
        finally:
            if written != size:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, self._end)
        if written != size:
            self._stop(os.strerror(errno.ENOSPC))
        self._look()

    def _stop(self, why: str) -> None:
        self._writes = False
        _log.info("%s takes no more: %s", self._path, why)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[int | None]:
        """The file, open to write while no other process does, and all of its records known; None: another one does."""
        file = os.open(
            self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666
        )  # a lock of its own, for forked processes
        try:
            locked = any(_try_lock(file, pause) for pause in _PAUSES)
            if locked:
                self._look(anew=self._file is None or not os.path.samestat(os.fstat(file), os.fstat(self._file)))
            yield file if locked else None
        finally:
            os.close(file)

    def _look(self, *, anew: bool = False) -> None:
        """Find the records that were added since; ``anew``: the file is another one than before."""
        if self._file is None or anew:
            if self._file is not None:
                os.close(self._file)
                self._file = None
            self._places, self._end = {}, 0
            # Without blocking: nobody is waited for where it is a pipe.
            self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        size = os.fstat(self._file).st_size
        while self._end + _HEADER <= size:
            header = os.pread(self._file, _HEADER, self._end)
            if len(header) != _HEADER or _SUM.unpack_from(header, _HEAD.size)[0] != zlib.crc32(header[: _HEAD.size]):
                return
            magic, key, length, checksum = _HEAD.unpack_from(header)
            start = self._end + _HEADER
            if magic != _MAGIC or start + length > size:
                return
            self._places[key] = (start, length, checksum)
            self._end = start + length


def _try_lock(file: int, pause: float) -> bool:
    """Whether nobody else has the file's lock, a little later."""
    time.sleep(pause)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
