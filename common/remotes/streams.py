"""Reading files over connections that break: where a body ends too early, the next one goes on from there.

A backend opens a ``Body`` from some offset and says whether a failure may pass (``PassingError``) or not
(``TransferError``, ``FileNotFoundError``). Everything else, the same for all of them, is here: waiting and
trying again, appending at the right place whatever range the server answered with, and never taking more
bytes than the file has.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from vlm_distill_cache.common.errors import CacheFormatError, TransferError
from vlm_distill_cache.common.files.disk import AGAIN

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

_T = TypeVar("_T")
_BLOCK_BYTES = 256 << 10
_LONGEST_WAIT, _LONGEST_TOLD_WAIT = 30.0, 120.0  # seconds: of our own accord, and when the server asks
_SLOWEST = 1024  # bytes a second; below that a connection counts as stalled
_PROGRESS_BYTES = 1 << 20  # a try that brought this much was no failure: a large file may need many tries

logger = logging.getLogger(__name__)


class PassingError(Exception):
    """A failure that may pass by itself.

    Args:
        reason: What happened.
        retry_after: Seconds the server asked us to wait, if it did.
    """

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class RangeRefusedError(PassingError):
    """The server says that the file ends before the byte we asked for."""


class Body(Protocol):
    """Bytes of a file that are arriving.

    Attributes:
        start: Position in the file of the first byte of this body.
        total: Bytes of the whole file, if the server says so.
    """

    start: int
    total: int | None

    def read(self, limit: int) -> bytes:
        """Return the next bytes, at most ``limit``; none at the end.

        Raises:
            PassingError: If the connection breaks or stalls.
        """

    def close(self) -> None:
        """Give the connection back; may be called before the end."""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How patient to be.

    Attributes:
        attempts: Tries of a request before it counts as failed, 1 or more.
        timeout: Seconds without an answer, or with next to nothing arriving, that end a try.
    """

    attempts: int
    timeout: float

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout <= 0:
            raise ValueError(f"attempts {self.attempts}, timeout {self.timeout}; expected 1 or more, above 0")

    def run(self, where: str, action: Callable[[], _T], position: Callable[[], int] | None = None) -> _T:
        """Do something until it works, waiting longer after each failure.

        Args:
            where: The address, for the error.
            action: Raises ``PassingError`` for what may pass.
            position: Bytes on disk; a try after which it has grown well is not counted as a failure.

        Raises:
            TransferError: After all attempts.
        """
        failures, mark = 0, position() if position is not None else 0
        while True:
            try:
                return action()
            except PassingError as error:
                if position is not None and position() - mark >= _PROGRESS_BYTES:
                    failures, mark = 0, position()
                failures += 1
                if failures >= self.attempts:
                    raise TransferError(
                        f"{where}: failed {failures} times, lastly: {error}; check the network and the address, "
                        f"then {AGAIN}"
                    ) from error
                seconds = waiting_time(failures, error.retry_after)
                logger.warning("%s: %s; next try in %.1f s", where, error, seconds)
            wait(seconds)


class StoppedError(Exception):
    """Raised in a thread whose work is not wanted any more."""


_stop = threading.local()


def stop_waiting_on(event: threading.Event) -> None:
    """Let this thread give up as soon as ``event`` is set, in the middle of a wait too."""
    _stop.event = event


def wait(seconds: float) -> None:
    """Sleep; tests replace this.

    Raises:
        StoppedError: If this thread shall give up.
    """
    event: threading.Event | None = getattr(_stop, "event", None)
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise StoppedError


def waiting_time(failures: int, retry_after: float | None) -> float:
    """Return seconds to wait: doubling from half a second, with jitter; or as the server asks, within reason."""
    if retry_after is not None:
        return min(max(retry_after, 0.0), _LONGEST_TOLD_WAIT)
    return min(_LONGEST_WAIT, 0.5 * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)


def read_small(open_body: Callable[[], Body], where: str, *, max_bytes: int, retries: Retries) -> bytes:
    """Read a whole small file.

    Args:
        open_body: Opens it from its first byte.
        where: The address, for errors.
        max_bytes: The most to take.
        retries: How patient to be.

    Raises:
        CacheFormatError: If it is larger.
        TransferError: If it does not arrive.
    """

    def attempt() -> bytes:
        with contextlib.closing(open_body()) as body:
            if body.total is not None and body.total > max_bytes:
                raise CacheFormatError(
                    f"{where}: {body.total} bytes, larger than {max_bytes} bytes; not a file of this cache"
                )
            data = bytearray()
            meter = _Meter(retries.timeout)
            while len(data) <= max_bytes and (block := body.read(min(_BLOCK_BYTES, max_bytes + 1 - len(data)))):
                data += block
                meter.count(len(block))
            if len(data) > max_bytes:
                raise CacheFormatError(f"{where}: larger than {max_bytes} bytes; not a file of this cache")
            if body.total is not None and len(data) != body.total:
                raise PassingError(f"the connection ended after {len(data)} of {body.total} bytes")
            return bytes(data)

    return retries.run(where, attempt)


def download_file(
    open_body: Callable[[int], Body],
    where: str,
    target: Path,
    *,
    size: int,
    retries: Retries,
    on_bytes: Callable[[int], object] | None = None,
) -> None:
    """Append to ``target`` until it has ``size`` bytes; see ``Remote.download``.

    Args:
        open_body: Opens the file from the given position.
        where: The address, for errors.
        target: A local file, or nothing yet.
        size: Bytes of the whole file.
        retries: How patient to be.
        on_bytes: Called with the number of new bytes.

    Raises:
        TransferError: If it does not arrive.
    """

    def attempt() -> None:
        with target.open("ab") as file:
            have = file.tell()
            if have > size:
                file.truncate(have := 0)
            if have == size and size > 0:
                return
            try:
                body = open_body(have)
            except RangeRefusedError:
                file.truncate(0)  # what is here is longer than what is there: begin again
                raise
            with contextlib.closing(body):
                _append(body, file, have, size, retries.timeout, on_bytes)

    retries.run(where, attempt, lambda: target.stat().st_size if target.exists() else 0)


def _append(
    body: Body,
    file: BinaryIO,
    have: int,
    size: int,
    timeout: float,
    on_bytes: Callable[[int], object] | None,
) -> None:
    if body.total is not None and body.total != size:
        raise PassingError(f"the file there has {body.total} bytes; expected {size}")
    if body.start > have:
        raise PassingError(f"the answer begins at byte {body.start}; asked for {have}")
    skip = have - body.start  # a server without ranges sends the file from its beginning
    meter = _Meter(timeout)
    while have < size:
        block = body.read(min(_BLOCK_BYTES, skip + size - have))
        if not block:
            raise PassingError(f"the connection ended after {have} of {size} bytes")
        meter.count(len(block))
        new = block[skip:] if skip else block
        skip = max(skip - len(block), 0)
        file.write(new)
        file.flush()  # whoever is killed keeps it
        have += len(new)
        if on_bytes is not None and new:
            on_bytes(len(new))
    if body.total is None and body.read(1):
        raise PassingError(f"more bytes than the {size} expected")


class _Meter:
    """Ends a transfer that trickles: each single byte may come in time and the file never."""

    def __init__(self, timeout: float) -> None:
        self._timeout, self._since, self._bytes = timeout, time.monotonic(), 0

    def count(self, size: int) -> None:
        self._bytes += size
        passed = time.monotonic() - self._since
        if passed >= self._timeout:
            if self._bytes < _SLOWEST * passed:
                raise PassingError(f"only {self._bytes} bytes arrived in {passed:.0f} s")
            self._since, self._bytes = time.monotonic(), 0
