"""Transient failures: wait and retry, and give up halfway once the work is no longer wanted."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from vlm_distill_cache.common.errors import TransferError
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.printing import brief

_T = TypeVar("_T")
_LONGEST_WAIT, _LONGEST_TOLD_WAIT = 30.0, 120.0  # seconds: of our own accord, and when the server asks
_NONSENSE_WAIT = 3600.0  # seconds; whoever asks for more than that means nothing by it
_ABSENT = "not there yet"
_ABSENT_TRIES = 4  # a file that was pushed just now may be absent for some seconds
_PROGRESS_BYTES = 1 << 20  # a try that brought this much was no failure: a large file may need many tries

logger = logging.getLogger(__name__)


class PassingError(Exception):
    """A failure that may pass by itself; ``retry_after``: seconds the server asked us to wait, if it did."""

    def __init__(self, reason: str, *, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.retry_after = retry_after


def said(error: BaseException) -> str:
    """Return what another library's error says: one short line, without secrets."""
    return brief(" ".join(str(error).split())) or type(error).__name__


class RangeRefusedError(PassingError):
    """The server says that the file ends before the byte we asked for."""


class Body(NamedTuple):
    """Bytes of a file that are arriving.

    Attributes:
        start: Position in the file of the first byte of this body.
        total: Bytes of the whole file, if the server says so.
        read: Returns the next bytes, at most so many, none at the end; raises ``PassingError`` if the connection breaks.
        close: Gives the connection back; may be called before the end.
        version: What the server calls these bytes of the file: an ETag, or when it was changed; empty: it does not say.
    """

    start: int
    total: int | None
    read: Callable[[int], bytes]
    close: Callable[[], object]
    version: str = ""


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How patient to be; ``attempts`` and ``timeout`` as for ``open_remote``, ``remedy``: what to do after the last."""

    attempts: int
    timeout: float
    remedy: str = f"check the network and the address, then {AGAIN}"

    def __post_init__(self) -> None:
        if self.attempts < 1 or self.timeout <= 0:
            raise ValueError(f"attempts {self.attempts}, timeout {self.timeout}; expected 1 or more, above 0")

    def run(
        self,
        where: str,
        action: Callable[[], _T],
        position: Callable[[], int] | None = None,
        *,
        expected: bool = False,
    ) -> _T:
        """Retry an action until it succeeds, waiting longer after each failure.

        Args:
            action: Raises ``PassingError`` for what may pass.
            position: Bytes on disk; a try after which it has grown well is not counted as a failure.
            expected: There must be such a file: that it is absent may pass, too, and is believed after some tries.

        Raises:
            TransferError: After all attempts.
            FileNotFoundError: If the file is absent.
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
                    what = f"failed {failures} times, lastly: {error}" if failures > 1 else str(error)
                    raise TransferError(f"{where}: {what}; {self.remedy}") from error
                seconds, what = waiting_time(failures, error.retry_after), str(error)
            except FileNotFoundError:
                failures += 1
                if not expected or failures >= min(self.attempts, _ABSENT_TRIES):
                    raise
                seconds, what = waiting_time(failures, None), _ABSENT
            if what != _ABSENT or failures == 1:  # a wrong address is told of once
                logger.warning("%s: %s; next try in %.1f s", where, what, seconds)
            wait(seconds)


class StoppedError(Exception):
    """Raised in a thread whose work is no longer wanted."""


_stop = threading.local()


def stop_waiting_on(event: threading.Event) -> None:
    """Let this thread give up as soon as ``event`` is set, even while it waits."""
    _stop.event = event


def stoppable(report: Callable[[int], object]) -> Callable[[int], None]:
    """Make a progress callback raise ``StoppedError``, in whichever thread, once this thread should give up."""
    event: threading.Event | None = getattr(_stop, "event", None)

    def checked(size: int) -> None:
        if event is not None and event.is_set():
            raise StoppedError
        report(size)

    return checked


def wait(seconds: float) -> None:
    """Sleep, or raise ``StoppedError`` once this thread should give up; tests replace this."""
    event: threading.Event | None = getattr(_stop, "event", None)
    if event is None:
        time.sleep(seconds)
    elif event.wait(seconds):
        raise StoppedError


def waiting_time(failures: int, retry_after: float | None) -> float:
    """Return seconds to wait: doubling from half a second, with jitter; or as the server asks, within reason."""
    if retry_after is not None and retry_after <= _NONSENSE_WAIT:
        return min(max(retry_after, 0.0), _LONGEST_TOLD_WAIT)
    return min(_LONGEST_WAIT, 0.5 * 2.0 ** (failures - 1)) * random.uniform(0.5, 1.0)
