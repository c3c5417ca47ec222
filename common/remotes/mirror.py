"""Training straight from an address: a cache's shards are fetched when they are read, and kept within bounds.

``find_mirror(URL)`` reads the manifest once and brings plan, sidecars, projector and processor here; shards arrive
when they are opened, each byte checked against sha256. They lie in ``$VLM_DISTILL_CACHE_DIR/<manifest hash>``
(default ``~/.cache/vlm-distill-cache``) and take at most ``$VLM_DISTILL_CACHE_BYTES`` (default 50 GB); the least
recently used leave first. Several processes share the folder. A shard that is open never leaves: where the shards
in use at a time are larger than the limit, they stay, and a warning says so.

The manifest is read once a process and then holds for it: a remote that changes meanwhile is an error as soon
as a shard no longer fits. If the remote cannot be reached and all of the cache is here, it is used as it is.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.document_rules import MAX_SHARDS
from vlm_distill_cache.common.cache.layout import files_of_shard, shard_stem
from vlm_distill_cache.common.cache.manifest import Manifest, ShardSummary, read_manifest
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST, SINKS, check_digests, check_sizes
from vlm_distill_cache.common.cache.sidecar import FileEntry, check_sidecar, read_sidecar, sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, TransferError
from vlm_distill_cache.common.files.atomic import (
    HeldLock,
    clean_stale,
    read_json,
    remove,
    try_lock,
    write_bytes_atomic,
    write_json_atomic,
)
from vlm_distill_cache.common.files.disk import name_full_disk
from vlm_distill_cache.common.files.hashing import checksum, file_checksum
from vlm_distill_cache.common.locations import is_url, public_location, whole_location
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import descriptions, fetch_files, lock, locked, read_remote_manifest

FOLDER_VARIABLE, LIMIT_VARIABLE = "VLM_DISTILL_CACHE_DIR", "VLM_DISTILL_CACHE_BYTES"
DEFAULT_LIMIT = 50_000_000_000
_CACHE, _HELD, _LOCATIONS = "cache", "held", "locations"
_log = logging.getLogger(__name__)


class Mirror:
    """The local part of a cache that lies elsewhere. Safe to use from several threads; may be pickled.

    All mirrors share one folder, and a limit of bytes that their shards may take together. A shard's lock file,
    ``MANIFEST HASH/held/SHARD``, holds its bytes while it is here, and its time is that of the last use.

    Attributes:
        manifest: As it was when this process first read it.
        folder: A cache folder whose shards come and go.
    """

    def __init__(self, location: str, manifest: Manifest, root: Path, limit: int) -> None:
        self.location = location
        self.manifest = manifest
        self.folder = _folder(root, manifest.hash)
        self._root, self._limit = root, limit
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._remote: Remote | None = None
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._expected: frozenset[int] = frozenset()
        self._told = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Mirror, (self.location, self.manifest, self._root, self._limit)

    def hold(self, shard: int) -> HeldLock:
        """Bring a shard here and keep it until what is returned is released or dropped.

        If several processes want a shard, one fetches it and the others wait.

        Raises:
            CacheMismatchError: If the remote holds another cache now.
        """
        self._follow_fork()
        path = self._state_path(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            reading = lock(path, shared=True)
            if self._is_here(shard):
                os.utime(path)  # the least recently used leave first; whoever may write may set it to now
                return reading
            reading.release()
            with locked(path):
                if not self._is_here(shard):
                    self._reserve(path, self.manifest.shards[shard].bytes)
                    self._fetch_checked(self._files(shard))
            # Between the two locks another process may have removed it again: then once more.

    def expect(self, shards: Iterable[int]) -> None:
        """Fetch shards that will be read soon, one at a time on a background thread, as long as they fit."""
        self._follow_fork()
        wanted = frozenset(shards)
        with self._lock:
            news = sorted(wanted - self._expected)
            self._expected = wanted
            if news and self._pool is None:
                self._pool = ThreadPoolExecutor(1, "mirror")
            for shard in news:
                self._pool.submit(self._fetch_early, shard)  # type: ignore[union-attr]

    def wait(self) -> None:
        """Wait until everything expected has been fetched, or given up."""
        if self._pool is not None:
            self._pool.submit(int).result()

    def fetch_descriptions(self, raw: bytes) -> None:
        """Bring everything but the shards here; ``raw``: the manifest's file, written last."""
        held = read_manifest(self.folder) if (self.folder / MANIFEST).is_file() else None
        # The folder's name is a fast hash, which somebody could forge; the sha256 in the manifest is not.
        if held is not None and _hashed(held) != _hashed(self.manifest):
            raise CacheFormatError(
                f"{self.folder}: holds another cache than {public_location(self.location)} under the same hash; "
                "one of the two is forged: delete the folder, and ask who gave you either"
            )
        files = descriptions(self.manifest)
        as_held = held is not None and held.files == self.manifest.files
        if not as_held and SINKS in files:  # found since, or elsewhere: those of this address, whatever lies here
            self._fetch_checked({SINKS: files[SINKS]})
        self._fetch_checked({n: entry for n, entry in files.items() if not _is_there(self.folder / n, entry)})
        if not as_held:
            write_bytes_atomic(self.folder / MANIFEST, raw)

    def is_complete(self) -> bool:
        """Whether nothing is left to fetch; looks at sizes, not at content."""
        try:
            check_digests(self.folder, self.manifest.files)
            for shard in range(len(self.manifest.shards)):
                check_sizes(self.folder, self._files(shard))
        except (OSError, CacheFormatError):
            return False
        return True

    def _follow_fork(self) -> None:
        if self._process != os.getpid():  # connections and threads do not survive a fork
            self._reset()

    def _files(self, shard: int) -> dict[str, FileEntry]:
        """A shard's files, as a sidecar says that is the manifest's and keeps to its shard."""
        path = sidecar_path(self.folder, shard)
        sidecar = read_sidecar(self.folder, shard)
        check_sidecar(sidecar, read_plan(self.folder), str(path))
        if ShardSummary.of(sidecar) != self.manifest.shards[shard]:
            raise CacheFormatError(f"{path}: not the sidecar that the manifest lists; delete {self.folder.parent}")
        return sidecar.files

    def _is_here(self, shard: int) -> bool:
        return all(_is_there(self.folder / name, entry) for name, entry in self._files(shard).items())

    def _fetch_early(self, shard: int) -> None:
        if shard not in self._expected or not self._fits(shard):
            return
        try:
            self.hold(shard).release()
        except (TransferError, CacheFormatError, CacheMismatchError, OSError) as error:
            _log.info("shard %d could not be fetched ahead: %s", shard, error)  # whoever reads it is told

    def _fetch_checked(self, files: Mapping[str, FileEntry]) -> None:
        if self._remote is None:
            self._remote = open_remote(self.location)
        try:
            fetch_files(self._remote, self.folder, files)
        except (TransferError, CacheFormatError) as error:
            with contextlib.suppress(TransferError, CacheFormatError):
                found, _ = read_remote_manifest(self._remote)
                if found.hash != self.manifest.hash:
                    raise CacheMismatchError(
                        f"{public_location(self.location)}: the cache there changed during this run: its manifest was "
                        f"{self.manifest.hash} and is {found.hash} now. Put the old one back, or begin again with the "
                        "new one and another --output"
                    ) from error
            raise

    def _fits(self, shard: int) -> bool:
        """Whether a shard fits once all that are neither in use nor expected are removed."""
        own, taken = self._state_path(shard), self.manifest.shards[shard].bytes
        expected = {self._state_path(other) for other in self._expected}
        for _, path, size in self._states():
            if path == own:
                continue
            free = try_lock(path)
            if free is None or path in expected:
                taken += size
            if free is not None:
                free.release()
        return taken <= self._limit

    def _reserve(self, path: Path, size: int) -> None:
        """Make room for a shard and reserve it; shards in use stay, even above the limit."""
        own = _bytes_in(path)
        with locked(self._root / "lock"):
            total = sum(held for _, _, held in self._states()) - own + size
            for _, other, held in sorted(self._states()):
                if total <= self._limit:
                    break
                if other != path and _evict(other):
                    total -= held
            with name_full_disk(path):
                path.write_bytes(str(size).encode())
        if total > self._limit and not self._told:
            self._told = True
            remedy = f"so many shards are in use at a time. Raise {LIMIT_VARIABLE}, or lower shuffle_window"
            _log.warning("%s takes %d bytes, above its limit of %d: %s", self._root, total, self._limit, remedy)

    def _states(self) -> list[tuple[int, Path, int]]:
        """When each shard of any mirror was last used (ns), its lock file, and its bytes; absent ones are left out."""
        return [
            (path.stat().st_mtime_ns, path, held)
            for folder in self._root.glob(f"*/{_HELD}")
            for path in folder.iterdir()
            if path.name.isdigit() and (held := _bytes_in(path))
        ]

    def _state_path(self, shard: int) -> Path:
        return self.folder.with_name(_HELD) / f"{shard:05d}"


def _bytes_in(path: Path) -> int:
    text = path.read_bytes()
    return int(text) if text.isdigit() else 0


def _evict(path: Path) -> bool:
    """Remove the shard of this lock file unless it is being read or fetched; its sidecar stays."""
    free = try_lock(path)
    if free is None:
        return False
    try:
        folder, shard = path.parent.with_name(_CACHE), int(path.name)
        for stem in (shard_stem(shard, 0), shard_stem(shard, MAX_SHARDS)):  # of few shards, or of many
            for file in files_of_shard(folder, stem):
                remove(file)
            clean_stale((folder / stem).parent, f"{path.name}.")
        path.write_bytes(b"")
    finally:
        free.release()
    return True


_pinned: dict[tuple[str, str], Mirror] = {}
_pinning = threading.Lock()


def local_folder(location: str | Path) -> Path:
    """Return a folder with everything of a cache but its shards: a path as it is, an address's mirror."""
    return find_mirror(str(location)).folder if is_url(location) else Path(location)


def find_mirror(location: str) -> Mirror:
    """Return this process's mirror of an address; the first call reads the manifest there.

    Raises:
        TransferError: If the address cannot be reached and not all of its cache is here.
        CacheFormatError: If there is no sealed cache.
        ConfigError: If a variable of the environment is no size, or names a folder that cannot be written.
    """
    root, limit = mirror_settings()
    location = whole_location(location)
    with _pinning:
        mirror = _pinned.get((location, str(root)))
        if mirror is None:
            try:
                mirror = _make_mirror(location, root, limit)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                raise ConfigError(
                    f"{error.filename or root}: {error.strerror}; set {FOLDER_VARIABLE} to a folder that you may "
                    "write, or, where several people share one, let their group write in it (umask 002)"
                ) from error
            _pinned[location, str(root)] = mirror
        return mirror


def forget_mirrors() -> None:
    """Let this process read manifests anew; for long-lived processes such as notebooks."""
    with _pinning:
        _pinned.clear()


def mirror_settings() -> tuple[Path, int]:
    """Return folder and limit in bytes, as the environment says."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    root = Path(folder) if folder else Path("~/.cache/vlm-distill-cache").expanduser()
    text = os.environ.get(LIMIT_VARIABLE, "") or str(DEFAULT_LIMIT)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{LIMIT_VARIABLE} is {text!r}; it must be a whole number of bytes, such as {DEFAULT_LIMIT}")
    return root.absolute(), int(text)


def _make_mirror(location: str, root: Path, limit: int) -> Mirror:
    note = root / _LOCATIONS / f"{checksum(public_location(location).encode())}.json"  # signatures change
    try:
        manifest, raw = read_remote_manifest(open_remote(location))
    except TransferError as error:
        known = _known_mirror(note, location, root, limit)
        if known is None:
            raise
        said = str(error).partition("; ")[0]  # without the remedy
        _log.warning("%s; all of the cache is in %s, which is used instead", said, known.folder)
        return known
    mirror = Mirror(location, manifest, root, limit)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    with locked(mirror.folder.with_name("lock")):
        mirror.fetch_descriptions(raw)
    note.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(note, {"manifest": manifest.hash})
    return mirror


def _known_mirror(note: Path, location: str, root: Path, limit: int) -> Mirror | None:
    """The mirror of the cache that an address held when it could last be reached, if all of it is here."""
    try:
        name = str(read_json(note)["manifest"])
        manifest = read_manifest(_folder(root, name))
    except (OSError, CacheFormatError, LookupError, TypeError):
        return None
    mirror = Mirror(location, manifest, root, limit)
    return mirror if mirror.folder == _folder(root, name) and mirror.is_complete() else None


def _hashed(manifest: Manifest) -> Manifest:
    """What the hash of a manifest covers."""
    files = {name: entry for name, entry in manifest.files.items() if name != SINKS}
    return replace(manifest, fidelity=None, files=files)


def _is_there(path: Path, entry: FileEntry) -> bool:
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    if file_checksum(path) != entry.xxh3_128:  # sha256 was checked when it came
        _log.warning("%s: damaged; it is fetched again", path)
        return False
    return True


def _folder(root: Path, manifest_hash: str) -> Path:
    return root / manifest_hash / _CACHE
