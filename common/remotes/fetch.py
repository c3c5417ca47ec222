"""Bringing files here from a remote: in parallel, resumable, and under their names only once both digests fit.

A file that is arriving is ``.tmp-NAME-fetch`` beside its place, and locked. A run that was killed leaves it
there, and the next one goes on at its end; two runs at once share the work and wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_distill_cache.common.cache.documents import parse_document, safe_path
from vlm_distill_cache.common.cache.manifest import MANIFEST, PLAN, Manifest
from vlm_distill_cache.common.errors import CacheFormatError, TransferError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, publish_file
from vlm_distill_cache.common.files.disk import AGAIN, name_full_disk
from vlm_distill_cache.common.files.hashing import file_digests
from vlm_distill_cache.common.remotes.streams import StoppedError, stop_waiting_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from vlm_distill_cache.common.cache.sidecar import FileEntry
    from vlm_distill_cache.common.remotes import Remote

JOBS = 8
MAX_MANIFEST_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True)
class Transferred:
    """What a transfer moved.

    Attributes:
        files: Files that were copied.
        bytes: Bytes of them that came, or went, over the network.
        present: Files that were there already and are right.
    """

    files: int = 0
    bytes: int = 0
    present: int = 0

    def __str__(self) -> str:
        if not self.files:
            return f"nothing to copy, all {self.present:,} files were there already"
        there = f"; {self.present:,} were there already" if self.present else ""
        return f"{self.files:,} files copied, {self.bytes:,} bytes{there}"

    def __add__(self, other: Transferred) -> Transferred:
        return Transferred(
            files=self.files + other.files,
            bytes=self.bytes + other.bytes,
            present=self.present + other.present,
        )


class Progress:
    """Sums what several threads report.

    Args:
        total: Bytes of the whole.
        on_progress: Told the sum and the total each time.
    """

    def __init__(self, total: int, on_progress: Callable[[int, int], object] | None) -> None:
        self._done, self._total, self._tell = 0, total, on_progress
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count bytes."""
        with self._lock:
            self._done += size
            if self._tell is not None:
                self._tell(self._done, self._total)


def read_remote_manifest(remote: Remote) -> tuple[Manifest, bytes]:
    """Read what a remote cache holds.

    Returns:
        The manifest and the bytes of its file.

    Raises:
        CacheFormatError: If there is no cache, or one whose push has not finished, or it is damaged.
    """
    where = f"{remote.location}/{MANIFEST}"
    try:
        raw = remote.read(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        if remote.size(PLAN) is not None:
            raise CacheFormatError(
                f"{remote.location}: not complete: there is {PLAN} but no {MANIFEST}; run `cachectl push` again "
                "where the cache is, or `teacher-cache build` if it is being built there"
            ) from None
        raise CacheFormatError(f"{remote.location}: no teacher cache (no {MANIFEST}); check the address") from None
    manifest = Manifest.from_dict(parse_document(raw, where), where)
    if PLAN not in manifest.files:
        raise CacheFormatError(f"{where}: does not list {PLAN}; damaged, push the cache again")
    return manifest, raw


def fetch_files(
    remote: Remote,
    root: Path,
    files: Mapping[str, FileEntry] | Iterable[tuple[str, FileEntry]],
    *,
    jobs: int = JOBS,
    on_bytes: Callable[[int], object] | None = None,
) -> Transferred:
    """Bring files here that are not here yet, each checked against its size and both digests.

    Args:
        remote: Where from.
        root: The folder to put them under; safe to use by several processes at once.
        files: Entries by name relative to ``root``; pairs are taken one by one, as they are needed.
        jobs: Files at a time.
        on_bytes: Called with every number of bytes that are here now; files that were here count too, and
            what turned out damaged counts negatively. Called from several threads.

    Returns:
        What was moved.

    Raises:
        TransferError: If a file cannot be fetched, or arrives damaged twice. What is verified stays, and
            the next call goes on where this one stopped.
    """
    pairs = files.items() if isinstance(files, Mapping) else files
    results: list[Transferred] = []

    def fetch(name: str, entry: FileEntry, stop: threading.Event) -> None:
        def report(size: int) -> None:
            if stop.is_set():
                raise StoppedError
            if on_bytes is not None:
                on_bytes(size)

        results.append(_fetch(remote, root, safe_path(name, remote.location), entry, report))

    in_parallel((partial(fetch, name, entry) for name, entry in pairs), jobs)
    return sum(results, Transferred())


def in_parallel(tasks: Iterable[Callable[[threading.Event], None]], jobs: int) -> None:
    """Run tasks on threads; the first error ends all and is raised.

    Args:
        tasks: Taken one by one, as threads become free. Each gets the event that tells it to give up.
        jobs: Threads.
    """
    stop, lock, waiting = threading.Event(), threading.Lock(), iter(tasks)

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(waiting, None)
            if task is None:
                return
            task(stop)

    with ThreadPoolExecutor(jobs, "transfer", initializer=stop_waiting_on, initargs=(stop,)) as pool:
        try:
            for done in as_completed([pool.submit(work) for _ in range(jobs)]):
                done.result()
        finally:
            stop.set()  # for those still at work when one failed, or when somebody pressed Ctrl-C


def cache_bytes(manifest: Manifest) -> int:
    """Return the bytes of all files of a cache that have digests: all but the manifest and the card."""
    return (
        manifest.totals["bytes"]
        + sum(shard.sidecar.size for shard in manifest.shards)
        + sum(entry.size for entry in manifest.files.values())
    )


def is_intact(path: Path, entry: FileEntry) -> bool:
    """Whether a plain file is there with this size and these digests."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
            return False
        return file_digests(path) == (entry.xxh3_128, entry.sha256, entry.size)
    except OSError:
        return False  # unreadable: fetch it again


def _fetch(remote: Remote, root: Path, name: str, entry: FileEntry, report: Callable[[int], object]) -> Transferred:
    final = root / name
    here = Transferred(present=1)
    with name_full_disk(final):
        if is_intact(final, entry):
            report(entry.size)
            return here
        final.parent.mkdir(parents=True, exist_ok=True)
        arriving = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-fetch")
        with _locked(arriving):
            if is_intact(final, entry):  # another process brought it while we waited for the lock
                arriving.unlink()
                report(entry.size)
                return here
            moved = _download_checked(remote, name, arriving, entry, report)
            publish_file(arriving, final)
            return Transferred(files=1, bytes=moved)


def _download_checked(
    remote: Remote, name: str, arriving: Path, entry: FileEntry, report: Callable[[int], object]
) -> int:
    """Complete ``arriving`` and return the bytes that came over the network."""
    moved = 0

    def count(size: int) -> None:
        nonlocal moved
        moved += size
        report(size)

    found = ("", "", 0)
    for _ in range(2):  # the second time from its beginning: half of it may be from an older file
        if (have := arriving.stat().st_size) > entry.size:
            os.truncate(arriving, have := 0)
        # A size is only what somebody says: nobody shall fill this disk with it.
        if entry.size - have > (free := shutil.disk_usage(arriving.parent).free):
            raise TransferError(
                f"{arriving.parent / Path(name).name}: needs {entry.size - have:,} bytes more, but there are "
                f"{free:,} free; make room, then {AGAIN}"
            )
        report(have)
        try:
            remote.download(name, arriving, size=entry.size, on_bytes=count)
        except FileNotFoundError as error:
            raise TransferError(
                f"{remote.location}/{name}: missing, although the cache's description lists it; push the cache "
                "again, with --overwrite"
            ) from error
        with arriving.open("rb") as file:
            os.fsync(file.fileno())
        found = file_digests(arriving)
        if found == (entry.xxh3_128, entry.sha256, entry.size):
            return moved
        os.truncate(arriving, 0)
        report(-entry.size)
    raise TransferError(
        f"{remote.location}/{name}: damaged or changed: expected xxh3_128 {entry.xxh3_128} and sha256 "
        f"{entry.sha256} ({entry.size} bytes), twice got {found[0]} and {found[1]} ({found[2]} bytes); "
        "run `cachectl verify` on the cache it was pushed from, and push it again"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Create a file, or take the one that is there, and keep others off it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            with contextlib.suppress(OSError):  # some network mounts have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever had the lock before may have given the file its final name.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False)):
                    yield
                    return
        finally:
            os.close(descriptor)
