"""Leases on shards: which worker of a queue makes which shard, so that no two make the same one. Needs no torch.

They are advice only: publishing is create-only, so that a lease that is lost or held twice costs time, never bytes.

``CACHE/.tmp-leases`` holds a file for each worker (``HOST-PID-RANDOM.worker``: who it is and what it has done, locked while
it lives and renewed every 5 s) and one for each lease (``00012.0``: the name of the worker that has shard 12). No lease is
changed or removed before the cache is sealed: who takes over from a dead worker creates the next one (``00012.1``), and of
several that try, one succeeds, on any file system that can create a file where there is none.

A worker is dead once its file says that it has ended; where its lock is free, which the kernel sees to however it ends; or
where its file has not changed for a minute of looking. Locks are asked for by workers of the same machine and mount alone:
those of a network disk may not reach further, or not be there at all. Clocks of machines are never compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import re
import secrets
import shutil
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vlm_distill_cache.common.cache.side_files import LEASES, open_plain
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, json_bytes, parse_json
from vlm_distill_cache.common.files.rules import FLAG, check, number, record, text, whole

logger = logging.getLogger(__name__)

SEAL = "seal"  # has a lease as shards have: one worker seals
BEAT_S = 5.0  # between renewals of a worker's file
SILENT_S = 60.0  # of looking, after which a worker whose file is not renewed is dead
WORKER = ".worker"
_WORKER_BYTES = 2048  # always: written in place and in one piece, nobody finds half of it
_LEASE = re.compile(rf"(\d{{5}}|{SEAL})\.(0|[1-9]\d{{0,8}})")
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Worker:
    """What the file of a worker says.

    Attributes:
        name: Of its file, without the ending.
        machine: The same for processes that see each other's locks.
        began: Unix time by its own clock; only shown.
        locked: Its file has a lock as long as it lives.
        ended: It has stopped, with or without an error.
        samples: That it put through the teacher, those that failed included.
        seconds: From its first shard to the last of these samples.
        beats: How often this was renewed.
    """

    name: str
    host: str
    pid: int
    machine: str
    began: float
    locked: bool
    ended: bool = False
    samples: int = 0
    seconds: float = 0.0
    beats: int = 0

    @property
    def rate(self) -> float:
        """Samples a second."""
        return self.samples / self.seconds if self.seconds else 0.0


_MOST = 1 << 53
_WORKER = record(
    {
        "name": text(100), "host": text(300), "machine": text(400), "pid": whole(0, _MOST), "began": number(0, _MOST),
        "locked": FLAG, "ended": FLAG, "samples": whole(0, _MOST), "seconds": number(0, _MOST), "beats": whole(0, _MOST),
    }
)  # fmt: skip


class Leases:
    """The leases of a cache and the workers that have them, as one process sees them; changes nothing."""

    def __init__(self, cache_dir: Path) -> None:
        self.folder = cache_dir / LEASES
        self._holders: dict[str, str] = {}
        self._seen: dict[str, tuple[object, float, float]] = {}  # what was seen, when last, seconds without a change

    def newest(self) -> dict[str, str]:
        """The lease that counts, the last one, of each shard that ever had any; by its number in five digits, or `SEAL`.

        Raises:
            ConfigError: If something else has the place of the folder.
        """
        found: dict[str, int] = {}
        for name in self._names():
            if (match := _LEASE.fullmatch(name)) is not None:
                found[match[1]] = max(int(match[2]), found.get(match[1], 0))
        return {of: f"{of}.{number}" for of, number in found.items()}

    def workers(self) -> list[Worker]:
        """All workers there were since the cache was begun or sealed, by name."""
        names = sorted(name.removesuffix(WORKER) for name in self._names() if name.endswith(WORKER))
        read = (self.worker(name) for name in names)
        return [worker for worker in read if worker is not None]

    def worker(self, name: str) -> Worker | None:
        """One worker; None if there is none of that name, or its file is none of ours."""
        if not _NAME.fullmatch(name):
            return None
        where = f"{name}{WORKER}"
        try:
            worker = Worker(**check(parse_json(self._read(where), where), _WORKER, where))
        except CacheFormatError:
            return None
        return worker if worker.name == name else None

    def holder(self, lease: str) -> str:
        """The name of the worker that has a lease; empty if that is not written yet."""
        if lease not in self._holders:
            name, end, _ = self._read(lease).decode(errors="replace").partition("\n")
            if not (end and _NAME.fullmatch(name)):
                return ""
            self._holders[lease] = name  # for good
        return self._holders[lease]

    def sees_locks_of(self, worker: Worker) -> bool:
        """Whether `is_dead` knows at once."""
        try:
            return worker.locked and worker.machine == _machine(self.folder)
        except FileNotFoundError:  # the cache was sealed at this moment
            return False

    def is_dead(self, worker: Worker) -> bool:
        """Whether a worker is known to have ended."""
        return worker.ended or (self.sees_locks_of(worker) and _is_unlocked(self.folder / f"{worker.name}{WORKER}"))

    def is_held(self, lease: str) -> bool:
        """Whether the worker that has a lease is alive, as far as is known."""
        name = self.holder(lease)
        worker = self.worker(name)
        if worker is not None and self.is_dead(worker):
            return False
        state, now = (name, worker), time.monotonic()
        seen, looked, silent = self._seen.get(lease, (state, now, 0.0))
        # Only time of looking counts: where nobody looked, or could look, a sign of life may have been missed.
        silent = silent + min(now - looked, BEAT_S) if seen == state else 0.0
        self._seen[lease] = state, now, silent
        return silent < SILENT_S

    def _names(self) -> list[str]:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise self._refusal(self.folder, "not a folder")
        try:
            return os.listdir(self.folder)  # noqa: PTH208 - names are all that is wanted
        except FileNotFoundError:
            return []

    def _read(self, name: str) -> bytes:
        try:
            with open_plain(self.folder, name) as file:
                return file.read(_WORKER_BYTES)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise self._refusal(self.folder / name, error.strerror or str(error)) from error

    def _refusal(self, place: Path, why: str) -> ConfigError:
        return ConfigError(
            f"{place}: {why}; the workers of `teacher-cache build --part any` keep there who makes which shard. Stop those of "
            f"this cache, remove {self.folder}, then start them again; finished shards are kept"
        )


class LeaseHolder(Leases):
    """As `Leases`, of a worker that takes some. Its file is written with its first lease; closed, it is dead."""

    def __init__(self, cache_dir: Path) -> None:
        super().__init__(cache_dir)
        self._me: Worker | None = None
        self._descriptor = self._in_folder = -1
        self._writing = threading.Lock()  # the three above, and the file
        self._making: set[str] = set()
        self._had: set[str] | None = None  # what is known to have a lease, this one's or another's; None: nobody looked
        self._began = 0.0
        self._samples, self._seconds = 0, 0.0
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, name="lease", daemon=True)

    def take_first(self, wanted: Iterable[str]) -> str | None:
        """Take the first lease that nobody ever had, or else the first one of a dead worker; None if there is none.

        Args:
            wanted: Shards by their numbers in five digits, or `SEAL`; those that this one is making count as had.

        Raises:
            ConfigError: If something else is in the place of leases.
            OSError: If they cannot be written.
        """
        me = self._enter()
        if self._had is None:
            self._had = {*self.newest()}
        known, had = self._had, []
        for of in wanted:
            if of not in known and of not in self._making and self._create(f"{of}.0", me):
                self._making.add(of)
                return of
            known.add(of)
            had.append(of)
        newest = self.newest() if had else {}  # once more only now: there may be many thousands
        for of in had:
            if of not in newest:  # the cache was sealed at this moment
                known.discard(of)
                continue
            former = self.holder(newest[of])
            if of in self._making or (former != me and self.is_held(newest[of])):
                continue
            if former != me:
                if not self._create(f"{of}.{int(newest[of].partition('.')[2]) + 1}", me):
                    continue  # another one was faster
                logger.info("%s: worker %s is gone, this one takes it over", of, former or "without a name")
            self._making.add(of)
            return of
        return None

    def finish_all(self) -> None:
        """Nothing that was taken is in the making any more: what is missing nevertheless may be taken again."""
        self._making.clear()

    def count(self, samples: int) -> None:
        """Count samples that are done, for whoever asks how far the work is."""
        self._samples += samples
        self._seconds = time.monotonic() - self._began

    def close(self) -> None:
        """Say that this worker has ended: its leases are free. May be called twice."""
        self._stop.set()
        with contextlib.suppress(OSError):  # then its lock says so, which goes with it
            self._renew(ended=True)
        self._leave()

    def remove(self) -> None:
        """Remove all leases, of a cache that is sealed; several workers may do so at once."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _enter(self) -> str:
        """Write who this is, with the lock held before anybody finds the file; returns its name."""
        while self._me is None:
            self._names()  # refuses what is no folder
            host = re.sub(r"[^A-Za-z0-9_-]", "_", platform.node())[:60] or "host"
            name = f"{host}-{os.getpid()}-{secrets.token_hex(4)}"
            temporary = self.folder / f"{TEMPORARY_PREFIX}{name}"
            try:
                self.folder.mkdir(exist_ok=True)
                self._in_folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
                with contextlib.suppress(OSError):  # no locks here, nor does anybody take it for a leftover then
                    fcntl.flock(self._in_folder, fcntl.LOCK_SH)
                self._descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
                self._me = Worker(
                    name=name, host=platform.node()[:300], pid=os.getpid(), machine=_machine(self.folder),
                    began=time.time(), locked=_lock(self._descriptor),
                )  # fmt: skip
                self._renew()
                temporary.rename(self.folder / f"{name}{WORKER}")
            except FileNotFoundError as error:  # another worker has sealed the cache and removed the folder
                self._leave()
                if not self.folder.parent.is_dir():
                    raise ConfigError(
                        f"{self.folder.parent} was moved or removed while this build ran; give its place now (cache=FOLDER), or "
                        "run the same command again to begin it anew"
                    ) from error
            except BaseException:
                self._leave()
                raise
        if not self._began:
            self._began = time.monotonic()
            self._beats.start()
        return self._me.name

    def _leave(self) -> None:
        with self._writing:
            for descriptor in (self._descriptor, self._in_folder):
                if descriptor >= 0:
                    os.close(descriptor)
            self._me, self._descriptor, self._in_folder = None, -1, -1
        self._holders.clear()  # of leases that may be gone
        self._had = None

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with contextlib.suppress(OSError):  # the work meets the same trouble, and says so
                self._renew()

    def _renew(self, *, ended: bool = False) -> None:
        with self._writing:
            if self._me is not None:
                self._me = replace(
                    self._me, beats=self._me.beats + 1, ended=ended, samples=self._samples, seconds=self._seconds
                )
                os.pwrite(self._descriptor, json_bytes(asdict(self._me)).ljust(_WORKER_BYTES), 0)
                os.fsync(self._descriptor)  # so that other machines see it

    def _create(self, lease: str, name: str) -> bool:
        try:
            descriptor = os.open(self.folder / lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError:  # all was removed: because the cache is sealed, or by hand
            self._leave()
            return False
        with os.fdopen(descriptor, "wb") as file:
            file.write(f"{name}\n".encode())
        return True


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # no locks here
        return False
    return True


def _is_unlocked(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # those who ask do not disturb each other
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)


def _machine(folder: Path) -> str:
    """The same for processes of one running system and one mount, whose locks are the same."""
    try:
        system = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        system = f"{platform.node()}-{uuid.getnode():x}"
    return f"{system}-{folder.stat().st_dev}"
