"""What a place that holds caches must be able to do, and how files are read over connections that break.

A kind of place opens a ``Body`` from some offset and says whether a failure may pass (``PassingError``) or not
(``TransferError``, ``FileNotFoundError``). Everything else about reading is here: trying again, appending at the
right place whatever range the server answered with, and never taking more bytes than the file has.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, NoReturn

from vlm_distill_cache.common.errors import CacheFormatError, TransferError
from vlm_distill_cache.common.remotes.streams import Body, PassingError, RangeRefusedError, Retries

_BLOCK_BYTES = 256 << 10
_SLOWEST = 1024  # bytes a second; below that a connection counts as stalled
_LONGEST_READ = 600.0  # seconds that a small file may take, however it comes


class Remote(ABC):
    """A folder of files somewhere else. Names are relative POSIX paths; safe to use from several threads.

    Every method retries transient failures, and then raises ``TransferError`` with the address, what
    happened and what to do.

    Attributes:
        location: The address, for people; secrets in it are left out.
        upload_files: How many files one call to ``upload`` should hold at least: many where each call is a commit.
        upload_jobs: How many calls to ``upload`` may run at once.
        advised_files: How many files a place should hold at most, as its host asks; None: any number.
        keeps_conditions: Whether a file can be written on the condition that no other has come before; False where a
            lock keeps others off, and once a store has said that it cannot.
        commits: Each write holds only if nobody has written since the one before: nothing needs to be looked at later.
    """

    upload_files = 1
    upload_jobs = 8
    advised_files: int | None = None
    keeps_conditions = True
    commits = False

    def __init__(self, location: str, retries: Retries) -> None:
        self.location = location
        self._retries = retries

    @property
    def attempts(self) -> int:
        """How often a request is tried."""
        return self._retries.attempts

    def upload(self, files: Mapping[str, Path], *, on_bytes: Callable[[int], object] | None = None) -> None:
        """Copy local files here; each becomes visible only when complete, and the last one last."""
        self._refuse_to_write()

    def create(self, name: str, data: bytes) -> bool:
        """Write a small new file, or return False, without a change, if there is a file of that name already."""
        self._refuse_to_write()

    def exchange(self, name: str, old: bytes, new: bytes) -> bool:
        """Write a small file over one with the old bytes; False, without a change, if it holds neither old nor new."""
        self._refuse_to_write()

    def delete(self, names: Iterable[str]) -> None:
        """Remove files in this order; absent ones are fine."""
        self._refuse_to_write()

    def hold(self) -> AbstractContextManager[Callable[[], object]]:
        """Keep other pushes off while this one writes; gives a check that raises once another has taken over.

        Raises:
            ConfigError: If another process is writing into this folder.
            CacheMismatchError: If another push is writing to this address.
        """
        return contextlib.nullcontext(lambda: None)

    def _refuse_to_write(self) -> NoReturn:
        raise TransferError(
            f"{self.location}: pull only; to write, use a folder, s3://BUCKET/PREFIX or hf://datasets/ORG/NAME"
        )

    @abstractmethod
    def _open(self, name: str, start: int = 0, stop: int | None = None) -> Body:
        """Open a file at byte ``start``, to read as far as byte ``stop`` or its end; one try."""

    def _where(self, name: str) -> str:
        """The address of a file, for errors."""
        return f"{self.location}/{name}"

    def read(self, name: str, *, max_bytes: int, expected: bool = False) -> bytes:
        """Return a small file whole; one that is ``expected`` and absent is asked for again before that is believed.

        Raises:
            FileNotFoundError: If it is absent.
            CacheFormatError: If it is larger than ``max_bytes``; no more than that is held in memory.
        """
        where = self._where(name)

        def attempt() -> bytes:
            with contextlib.closing(self._open(name)) as body:
                if (body.total or 0) > max_bytes or len(data := self._take(where, body, max_bytes + 1)) > max_bytes:
                    found = f"{body.total} bytes, " if body.total is not None else ""
                    raise CacheFormatError(f"{where}: {found}larger than {max_bytes} bytes; not a file of this cache")
                if body.total not in (None, len(data)):
                    raise PassingError(f"ended after {len(data)} of {body.total} bytes")
                return data

        return self._retries.run(where, attempt, expected=expected)

    def size(self, name: str, *, expected: bool = False) -> int | None:
        """Return the bytes of a file, or None if it is absent; ``expected`` as for ``read``."""
        where = self._where(name)

        def attempt() -> int:
            body = self._open(name, stop=1)  # and no HEAD: signed addresses allow GET only
            body.close()
            if body.total is None:
                raise TransferError(f"{where}: the server does not say how large the file is; use another server")
            return body.total

        try:
            return self._retries.run(where, attempt, expected=expected)
        except FileNotFoundError:
            return None

    def describe(self, name: str) -> tuple[int, str] | None:
        """Return the bytes of a file and what the server calls this version of it; None if it is absent."""
        where = self._where(name)

        def attempt() -> tuple[int, str]:
            body = self._open(name, stop=1)
            body.close()
            if body.total is None:
                raise TransferError(f"{where}: the server does not say how large the file is; use another server")
            return body.total, body.version

        try:
            return self._retries.run(where, attempt)
        except FileNotFoundError:
            return None

    def read_range(self, name: str, start: int, stop: int) -> tuple[bytes, str]:
        """Return the bytes of a file from ``start`` up to ``stop``, and its version, as ``describe`` says it.

        Raises:
            TransferError: Also if the server sends whole files only.
        """
        where = self._where(name)

        def attempt() -> tuple[bytes, str]:
            with contextlib.closing(self._open(name, start, stop)) as body:
                if body.start != start:
                    raise TransferError(
                        f"{where}: the server sends whole files only, and this one is read by ranges; use a server that knows "
                        "them (nginx, S3), or copy the files here"
                    )
                data = self._take(where, body, stop - start)
                if len(data) < stop - start:
                    raise PassingError(f"ended after {len(data)} of {stop - start} bytes")
                return data, body.version

        return self._retries.run(where, attempt)

    def download(self, name: str, target: Path, *, size: int, on_bytes: Callable[[int], object] | None = None) -> None:
        """Append to ``target`` what is still missing of a file, until ``target`` has ``size`` bytes.

        What is there already is not fetched again and not checked: the caller compares digests at the end.

        Args:
            target: A local file, or nothing yet; longer than ``size`` means begin again.
            size: Bytes of the whole file.
            on_bytes: Called with the number of new bytes after each block.

        Raises:
            FileNotFoundError: If the file is absent, also when asked again.
        """
        where = self._where(name)

        def attempt() -> None:
            with target.open("ab") as file:
                have = file.tell()
                if have > size:
                    file.truncate(have := 0)
                if have == size and size > 0:
                    return
                try:
                    body = self._open(name, have)
                except RangeRefusedError:
                    file.truncate(0)  # what is here is longer than what is there: begin again
                    raise
                with contextlib.closing(body):
                    self._append(body, file, have, size, on_bytes)

        self._retries.run(where, attempt, lambda: target.stat().st_size if target.exists() else 0, expected=True)

    def _append(
        self, body: Body, file: BinaryIO, have: int, size: int, on_bytes: Callable[[int], object] | None
    ) -> None:
        if body.total not in (None, size):
            raise PassingError(f"the file there has {body.total} bytes; expected {size}")
        if body.start > have:
            raise PassingError(f"the answer begins at byte {body.start}; asked for {have}")
        skip = have - body.start  # a server without ranges sends the file from its beginning
        for block in self._blocks(body, skip + size - have):
            new, skip = block[skip:], max(skip - len(block), 0)
            file.write(new)
            file.flush()  # whoever is killed keeps it
            have += len(new)
            if on_bytes is not None and new:
                on_bytes(len(new))
        if have < size:
            raise PassingError(f"ended after {have} of {size} bytes")
        if body.total is None and self._take(self.location, body, 1):
            raise PassingError(f"more bytes than the {size} expected")

    def _take(self, where: str, body: Body, most: int) -> bytes:
        taken, since = bytearray(), time.monotonic()  # no list: a block may be a byte
        for block in self._blocks(body, most):
            taken += block
            if time.monotonic() - since > _LONGEST_READ:
                raise TransferError(
                    f"{where}: only {len(taken)} bytes arrived in {_LONGEST_READ:.0f} s; check the network and the server"
                )
        return bytes(taken)

    def _blocks(self, body: Body, most: int) -> Iterator[bytes]:
        """Yield at most ``most`` bytes as they arrive; give up on a trickle, which beats every timeout but never ends."""
        since, arrived = time.monotonic(), 0
        while most > 0 and (block := body.read(min(_BLOCK_BYTES, most))):
            most -= len(block)
            arrived += len(block)
            passed = time.monotonic() - since
            if passed >= self._retries.timeout:
                if arrived < _SLOWEST * passed:
                    raise PassingError(f"only {arrived} bytes arrived in {passed:.0f} s")
                since, arrived = time.monotonic(), 0
            yield block
