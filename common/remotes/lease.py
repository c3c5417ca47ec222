"""One push at a time at a place that has no locks: a small file there says who writes, and is renewed while he does.

A push that was killed leaves its file behind; it is stale once nobody has renewed it for `_STALE` seconds.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator

from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, TransferError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX
from vlm_distill_cache.common.files.disk import AGAIN
from vlm_distill_cache.common.remotes import streams
from vlm_distill_cache.common.remotes.base import Remote

LEASE = f"{TEMPORARY_PREFIX}push"
_MOST_BYTES = 100
_RENEWED, _STALE = 5.0, 20.0  # seconds: between renewals, and without one
_LOOKS = 10  # while waiting whether it is stale
_SETTLED = 2.0  # seconds after which a store without conditional writes shows who of two wrote last


@contextlib.contextmanager
def lease(remote: Remote) -> Iterator[Callable[[], None]]:
    """Hold a place against other pushes; gives a check that raises once another has taken over.

    Raises:
        CacheMismatchError: If another push is writing there.
    """
    token = secrets.token_hex(16).encode()
    _take(remote, token)
    done = threading.Event()
    thread = threading.Thread(target=_renew, args=(remote, token, done), daemon=True)
    thread.start()
    try:
        yield lambda: _refuse_lost(remote, token)
    finally:
        done.set()
        thread.join(_RENEWED)
        with contextlib.suppress(TransferError):  # then it is stale soon
            if _is_ours(remote, token):
                remote.delete([LEASE])


def _take(remote: Remote, token: bytes) -> None:
    if (seen := _read(remote)) is None:
        taken = remote.create(LEASE, token) or _is_ours(remote, token)  # the latter: an answer that was lost
    else:
        streams.logger.warning("%s: another push is or was writing there; looking for %.0f s whether it is alive",
                               remote.location, _STALE)  # fmt: skip
        taken = not _changes(remote, seen) and remote.exchange(LEASE, seen, token)
    # Where the conditions of a write are ignored, two may have taken it: a second creation shows it, and the last one
    # that wrote keeps it.
    if taken and (remote.create(LEASE, token) or not remote.keeps_conditions):
        streams.wait(_SETTLED)
    if not taken or not _is_ours(remote, token):
        raise CacheMismatchError(
            f"{remote.location}: another push is writing there; wait until it has ended, then {AGAIN}, or push to "
            "another place"
        )


def _changes(remote: Remote, seen: bytes) -> bool:
    """Whether a lease is renewed or given up before it would be stale."""
    for _ in range(_LOOKS):
        streams.wait(_STALE / _LOOKS)
        if _read(remote) != seen:
            return True
    return False


def _renew(remote: Remote, token: bytes, done: threading.Event) -> None:
    count, mine = 0, token
    while not done.wait(_RENEWED):
        new = b"%s %d" % (token, count + 1)
        with contextlib.suppress(TransferError):  # the push meets the same trouble, and says so
            if not remote.exchange(LEASE, mine, new):
                return
            count, mine = count + 1, new


def _refuse_lost(remote: Remote, token: bytes) -> None:
    if not _is_ours(remote, token):
        raise CacheMismatchError(
            f"{remote.location}: another push has taken over, after this one had been silent for {_STALE:.0f} s or more; "
            f"see what it has left there, then {AGAIN}, or push to another place"
        )


def _is_ours(remote: Remote, token: bytes) -> bool:
    return (_read(remote) or b"").startswith(token)


def _read(remote: Remote) -> bytes | None:
    try:
        return remote.read(LEASE, max_bytes=_MOST_BYTES)
    except FileNotFoundError:
        return None
    except CacheFormatError:
        return b"?"  # no push of ours wrote that: it is never renewed
