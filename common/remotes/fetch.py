"""Fetch files from a remote: in parallel, resumable, and renamed into place only once both digests match.

A file that is arriving is ``.tmp-NAME-fetch`` beside its place, and locked. A run that was killed leaves it
there, and the next one goes on at its end; two runs at once share the work and wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from vlm_distill_cache.common.cache.documents import parse_document, safe_path
from vlm_distill_cache.common.cache.manifest import Manifest
from vlm_distill_cache.common.cache.other_folders import describe_folder
from vlm_distill_cache.common.cache.plan import PLAN
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import FileEntry, sidecar_name
from vlm_distill_cache.common.errors import CacheFormatError, NewerFormatError, TransferError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, HeldLock, publish_file
from vlm_distill_cache.common.files.disk import AGAIN, free_bytes, name_written
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.streams import stop_waiting_on, stoppable, wait

_T = TypeVar("_T")
JOBS = 8
MAX_MANIFEST_BYTES = 64 << 20
_MANIFEST_TRIES = 3


@dataclass(frozen=True)
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
        return Transferred(self.files + other.files, self.bytes + other.bytes, self.present + other.present)


class Progress:
    """Sums what several threads report; ``on_progress`` is told the sum and the total, in bytes, each time."""

    def __init__(self, total: int = 0, on_progress: Callable[[int, int], object] | None = None) -> None:
        self._done, self._total, self._tell = 0, total, on_progress
        self._lock = threading.Lock()

    def add(self, size: int) -> None:
        """Count bytes."""
        with self._lock:
            self._done += size
            if self._tell is not None:
                self._tell(self._done, self._total)


def read_remote_manifest(remote: Remote) -> tuple[Manifest, bytes]:
    """Read what a remote cache holds: the manifest, and the bytes of its file.

    Raises:
        CacheFormatError: If there is no cache, or one whose push has not finished, or it is damaged.
    """
    where = f"{remote.location}/{MANIFEST}"
    try:
        for left in reversed(range(min(remote.attempts, _MANIFEST_TRIES))):
            raw = remote.read(MANIFEST, max_bytes=MAX_MANIFEST_BYTES, expected=True)
            try:
                manifest = Manifest.from_dict(parse_document(raw, where), where)
            except NewerFormatError:
                raise
            except CacheFormatError:
                if not left:
                    raise
                wait(1.0)  # what came may be cut or a proxy's page, and nothing tells that it is
            else:
                break
    except FileNotFoundError:
        if remote.size(PLAN) is not None:
            raise CacheFormatError(
                f"{remote.location}: not complete: there is {PLAN} but no {MANIFEST}; run `cachectl push` again "
                "where the cache is, or `teacher-cache build` if it is being built there"
            ) from None
        told = "check the address" if is_url(remote.location) else describe_folder(Path(remote.location))
        raise CacheFormatError(f"{remote.location}: no teacher cache (no {MANIFEST}); {told}") from None
    if PLAN not in manifest.files:
        raise CacheFormatError(f"{where}: does not list {PLAN}; damaged, push the cache again")
    return manifest, raw


def fetch_files(
    remote: Remote,
    root: Path,
    files: Mapping[str, FileEntry] | Iterable[tuple[str, FileEntry]],
    *,
    jobs: int = JOBS,
    progress: Progress | None = None,
) -> Transferred:
    """Fetch the files that are not here yet, and check each one's size and both digests.

    Args:
        root: The folder to put them under; safe to use by several processes at once.
        files: Entries by name relative to ``root``; pairs are taken one by one, as they are needed.
        jobs: Files at a time.
        progress: Told of the bytes that are here now; files that were here count too, and what turned out
            damaged counts negatively.

    Raises:
        TransferError: If a file cannot be fetched, or arrives damaged twice. What is verified stays, and
            the next call goes on where this one stopped.
    """
    pairs = files.items() if isinstance(files, Mapping) else files
    report = (progress or Progress()).add
    tasks = (partial(_fetch, remote, root, safe_path(name, remote.location), entry, report) for name, entry in pairs)
    return sum(in_parallel(tasks, jobs), Transferred())


def in_parallel(tasks: Iterable[Callable[[], _T]], jobs: int) -> list[_T]:
    """Run tasks on several threads, each as a thread becomes free; the first error stops all and is raised.

    Returns:
        What they returned, in any order.
    """
    stop, lock, waiting = threading.Event(), threading.Lock(), iter(tasks)
    results: list[_T] = []

    def work() -> None:
        while not stop.is_set():
            with lock:
                task = next(waiting, None)
            if task is None:
                return
            results.append(task())

    with ThreadPoolExecutor(jobs, "transfer", initializer=stop_waiting_on, initargs=(stop,)) as pool:
        try:
            for done in as_completed([pool.submit(work) for _ in range(jobs)]):
                done.result()
        finally:
            stop.set()  # for those still at work when one failed, or when somebody pressed Ctrl-C
    return results


def descriptions(manifest: Manifest) -> dict[str, FileEntry]:
    """Return everything of a cache that its manifest lists: sidecars, and the files beside the shards."""
    count = len(manifest.shards)
    return manifest.files | {sidecar_name(shard.index, count): shard.sidecar for shard in manifest.shards}


def cache_bytes(manifest: Manifest) -> int:
    """Return the bytes of all files of a cache that have digests: all but the manifest and the card."""
    return manifest.totals["bytes"] + sum(entry.size for entry in descriptions(manifest).values())


def check_room(place: Path, needed: int, remedy: str) -> None:
    """Refuse to begin what cannot be finished: a file or folder that needs more bytes than are free."""
    if needed > (free := free_bytes(place)):
        raise TransferError(f"{place}: needs {needed:,} bytes more, but there are {free:,} free; make room, {remedy}")


def is_intact(path: Path, entry: FileEntry) -> bool:
    """Whether a plain file is there with this size and these digests."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size != entry.size:
            return False
        return FileEntry.of(path) == entry
    except OSError:
        return False  # unreadable: fetch it again


def _fetch(remote: Remote, root: Path, name: str, entry: FileEntry, report: Callable[[int], object]) -> Transferred:
    final, report = root / name, stoppable(report)
    arriving = final.with_name(f"{TEMPORARY_PREFIX}{final.name}-fetch")
    with name_written(final, arriving):
        if not is_intact(final, entry):
            final.parent.mkdir(parents=True, exist_ok=True)
            with locked(arriving):
                if not is_intact(final, entry):  # else another process brought it while we waited for the lock
                    moved = _download_checked(remote, name, arriving, entry, report)
                    publish_file(arriving, final)
                    return Transferred(files=1, bytes=moved)
                arriving.unlink()
        report(entry.size)
        return Transferred(present=1)


def _download_checked(
    remote: Remote, name: str, arriving: Path, entry: FileEntry, report: Callable[[int], object]
) -> int:
    """Complete ``arriving`` and return the bytes that came over the network."""
    moved = 0

    def count(size: int) -> None:
        nonlocal moved
        moved += size
        report(size)

    for _ in range(2):  # the second time from its beginning: half of it may be from an older file
        if (have := arriving.stat().st_size) > entry.size:
            os.truncate(arriving, have := 0)
        # A declared size is not trusted: it must not fill this disk.
        check_room(arriving.with_name(Path(name).name), entry.size - have, f"then {AGAIN}")
        report(have)
        try:
            remote.download(name, arriving, size=entry.size, on_bytes=count)
        except FileNotFoundError as error:
            raise TransferError(
                f"{remote.location}/{name}: missing, although the cache's description lists it, also when asked again; "
                f"if it was pushed just now, {AGAIN}; else whoever has the cache can mend what is there: "
                f"`cachectl push CACHE {remote.location} --overwrite`"
            ) from error
        with arriving.open("rb") as file:
            os.fsync(file.fileno())
        if (found := FileEntry.of(arriving)) == entry:
            return moved
        os.truncate(arriving, 0)
        report(-entry.size)
    raise TransferError(
        f"{remote.location}/{name}: damaged or changed: expected xxh3_128 {entry.xxh3_128} and sha256 "
        f"{entry.sha256} ({entry.size} bytes), twice got {found.xxh3_128} and {found.sha256} ({found.size} "
        "bytes); run `cachectl verify` on the cache it was pushed from, and push it again"
    )


def lock(path: Path, *, shared: bool = False) -> HeldLock:
    """Create a file, or take the one that is there, and wait for a lock on it.

    On file systems without ``flock`` it keeps nobody off; ``try_lock`` fails there, so nothing is ever removed.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        held = HeldLock(descriptor)
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        # Whoever had the lock before may have given the file its final name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=False)):
                return held
        held.release()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep others off a file, which is created if missing."""
    held = lock(path)
    try:
        yield
    finally:
        held.release()
