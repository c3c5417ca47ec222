"""One push at a time at a place that has no locks: a small file there says who writes, and is renewed while he does.

A push that was killed leaves its file behind; it is stale once nobody has renewed it for `_STALE` seconds.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, TransferError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.remotes import streams

LEASE = f"{TEMPORARY_PREFIX}push"
_MOST_BYTES = 100
_RENEWED, _STALE = 5.0, 20.0  # seconds: between renewals, and without one
_SETTLED = 2.0  # seconds after which a store without conditional writes shows who of two wrote last


class Store(Protocol):
    """What a lease asks of a place; as ``S3Remote`` has it."""

    location: str
    keeps_conditions: bool

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """As ``Remote.read``."""

    def create(self, name: str, data: bytes) -> bool:
        """As ``Remote.create``."""

    def exchange(self, name: str, old: bytes, new: bytes) -> bool:
        """As ``S3Remote.exchange``."""

    def delete(self, names: Iterable[str]) -> None:
        """As ``Remote.delete``."""


@contextlib.contextmanager
def lease(store: Store) -> Iterator[Callable[[], None]]:
    """Hold a place against other pushes; gives a check that raises once another has taken over.

    Raises:
        CacheMismatchError: If another push is writing there.
    """
    token = secrets.token_hex(16).encode()
    _take(store, token)
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(store, token, done), daemon=True)
    thread.start()
    try:
        yield lambda: _refuse_lost(store, token)
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(TransferError):  # then it is stale soon
            if _is_ours(store, token):
                store.delete([LEASE])


def _take(store: Store, token: bytes) -> None:
    if (seen := _read(store)) is None:
        taken = store.create(LEASE, token) or _is_ours(store, token)  # the latter: an answer that was lost
    else:
        streams.logger.warning("%s: another push is or was writing there; looking for %.0f s whether it is alive",
                               store.location, _STALE)  # fmt: skip
        streams.wait(_STALE)
        taken = _read(store) == seen and store.exchange(LEASE, seen, token)
    # Where the conditions of a write are ignored, two may have taken it: a second creation shows it, and the last one
    # that wrote keeps it.
    if taken and (store.create(LEASE, token) or not store.keeps_conditions):
        streams.wait(_SETTLED)
    if not taken or not _is_ours(store, token):
        raise CacheMismatchError(
            f"{store.location}: another push is writing there; wait until it has ended, then {AGAIN}, or push to "
            "another place"
        )


def _renew(store: Store, token: bytes, done: threading.Event) -> None:
    count, mine = 0, token
    while not done.wait(_RENEWED):
        new = b"%s %d" % (token, count + 1)
        with contextlib.suppress(TransferError):  # the push meets the same trouble, and says so
            if not store.exchange(LEASE, mine, new):
                return
            count, mine = count + 1, new


def _refuse_lost(store: Store, token: bytes) -> None:
    if not _is_ours(store, token):
        raise CacheMismatchError(
            f"{store.location}: another push has taken over, after this one had been silent for {_STALE:.0f} s or more; "
            f"see what it has left there, then {AGAIN}, or push to another place"
        )


def _is_ours(store: Store, token: bytes) -> bool:
    return (_read(store) or b"").startswith(token)


def _read(store: Store) -> bytes | None:
    try:
        return store.read(LEASE, max_bytes=_MOST_BYTES)
    except FileNotFoundError:
        return None
    except CacheFormatError:
        return b"?"  # no push of ours wrote that: it is never renewed
