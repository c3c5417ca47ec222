"""Read access to a finished cache: a path in, records by sample id out. No torch, no codecs.

The cache describes itself: which signals it holds, in which fields, made from what. Every shard is checked
against its sidecar when it is opened, so a damaged file is an error here and never a training step.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import CacheFormatError, CacheMismatchError
from common.hashing import file_checksum
from common.manifest import (
    Manifest,
    ShardSidecar,
    ShardSummary,
    check_side_files,
    read_manifest,
    read_plan,
    read_sidecar,
)
from common.stores import open_reader

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from common.manifest import FileEntry
    from common.plan import Plan
    from common.schema import Field, Record
    from common.stores import ShardReader

OPEN_SHARDS = 8


def open_cache(path: Path, *, open_shards: int = OPEN_SHARDS) -> TeacherCache:
    """Open a finished cache for reading; a read-only folder will do.

    Args:
        path: The cache folder.
        open_shards: Shards kept open, and decoded in memory, at a time.

    Raises:
        CacheFormatError: If it is no cache, not sealed, damaged, or from a newer format version.
    """
    return TeacherCache(path, open_shards=open_shards)


@dataclass(frozen=True)
class _Index:
    """Where every sample is; read from the sidecars on first use."""

    sidecars: tuple[ShardSidecar, ...]
    places: dict[str, tuple[int, int]]  # sample id -> (shard, position in it)
    failed: dict[str, str]


class TeacherCache:
    """A finished cache. Safe to use from several threads; a fork or a pickled copy opens its own shards.

    Attributes:
        path: The folder.
        plan: What it was planned to hold.
        manifest: What it holds.
    """

    path: Path
    plan: Plan
    manifest: Manifest

    def __init__(self, path: Path, *, open_shards: int = OPEN_SHARDS) -> None:
        if open_shards < 1:
            raise ValueError(f"open_shards is {open_shards}; expected 1 or more")
        self.path = path
        self.plan = read_plan(path)
        self.manifest = read_manifest(path)
        if self.manifest.plan_hash != self.plan.hash or len(self.manifest.shards) != self.plan.shard_count:
            raise CacheFormatError(
                f"{path}: manifest.json belongs to another plan.json (plan {self.plan.hash}, manifest made "
                f"for {self.manifest.plan_hash}); run `teacher-cache seal`, or copy the cache again"
            )
        check_side_files(path, self.manifest)
        self._open_shards = open_shards
        self._index: _Index | None = None
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_readers", "_process")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of the signals, sorted; ``plan.signals`` has their codecs' settings."""
        return tuple(sorted(self.plan.signals))

    @property
    def fields(self) -> tuple[Field, ...]:
        """All fields of a record."""
        return self.plan.all_fields

    @property
    def manifest_hash(self) -> str:
        """Fingerprint of the manifest: names this cache's exact content."""
        return self.manifest.hash

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """All records' sample ids, in the data set's order."""
        return tuple(self._indexed().places)

    @property
    def failed(self) -> dict[str, str]:
        """Why each missing sample could not be read, by sample id."""
        return dict(self._indexed().failed)

    def __len__(self) -> int:
        return self.manifest.totals["samples"]

    def __contains__(self, sample_id: object) -> bool:
        return sample_id in self._indexed().places

    def shard_of(self, sample_id: str) -> int:
        """Return the shard that holds a sample.

        Raises:
            CacheMismatchError: If the cache does not hold it.
        """
        return self._place(sample_id)[0]

    def shard_sample_ids(self, shard: int) -> tuple[str, ...]:
        """Return the sample ids of a shard, in stored order; reading them in turn opens it once."""
        return self._indexed().sidecars[shard].sample_ids

    def read(self, sample_id: str, names: Collection[str] | None = None) -> Record:
        """Return a sample's record.

        Args:
            sample_id: Of the sample.
            names: Only these fields; None for all.

        Returns:
            Arrays by field name, which the caller owns; dtypes and shapes as ``fields`` say.

        Raises:
            CacheMismatchError: If the cache does not hold the sample, with the reason if it failed.
            CacheFormatError: If its shard is missing or damaged.
        """
        shard, position = self._place(sample_id)
        return self._reader(shard).read(position, names)

    def check_shard_files(self) -> None:
        """Look, without reading them, whether every shard's files are there in full length.

        Raises:
            CacheFormatError: Naming the first that is not.
        """
        for sidecar in self._indexed().sidecars:
            for name, entry in sidecar.files.items():
                _check_size(self.path / name, entry)

    def close(self) -> None:
        """Close all shards; they are opened again when needed."""
        with self._lock:
            self._readers.clear()

    def _place(self, sample_id: str) -> tuple[int, int]:
        index = self._indexed()
        place = index.places.get(sample_id)
        if place is None:
            if sample_id in index.failed:
                raise CacheMismatchError(
                    f"{self.path}: sample {sample_id!r} failed when the cache was built: "
                    f"{index.failed[sample_id]}; skip it, or mend it and build the cache again"
                )
            raise CacheMismatchError(
                f"{self.path}: no sample {sample_id!r} among its {len(self)}; "
                "use the data set and split the cache was built from"
            )
        return place

    def _indexed(self) -> _Index:
        self._follow_fork()
        with self._lock:
            if self._index is None:
                sidecars = tuple(self._sidecar(shard) for shard in range(self.plan.shard_count))
                places = {
                    name: (shard, position)
                    for shard, sidecar in enumerate(sidecars)
                    for position, name in enumerate(sidecar.sample_ids)
                }
                failed = {name: reason for sidecar in sidecars for name, reason in sidecar.failed}
                self._index = _Index(sidecars, places, failed)
            return self._index

    def _sidecar(self, shard: int) -> ShardSidecar:
        try:
            sidecar = read_sidecar(self.path, shard)
        except FileNotFoundError:
            raise CacheFormatError(
                f"{self.path}: the sidecar of shard {shard} is missing; "
                "run `cachectl verify`, then build or copy that shard again"
            ) from None
        if ShardSummary.of(sidecar) != self.manifest.shards[shard]:
            raise CacheFormatError(
                f"{self.path}: the sidecar of shard {shard} is not the one in manifest.json; "
                "run `cachectl verify`, and `teacher-cache seal` if the shard was built anew"
            )
        return sidecar

    def _reader(self, shard: int) -> ShardReader:
        self._follow_fork()
        with self._lock:
            reader = self._readers.get(shard)
            if reader is None:
                reader = self._readers[shard] = self._open(shard)
                if len(self._readers) > self._open_shards:
                    # Not closed here: another thread may be reading. It closes when the last user drops it.
                    self._readers.popitem(last=False)
            self._readers.move_to_end(shard)
            return reader

    def _open(self, shard: int) -> ShardReader:
        sidecar = self._indexed().sidecars[shard]
        for name, entry in sidecar.files.items():
            path = self.path / name
            _check_size(path, entry)
            try:
                found = file_checksum(path)
            except OSError as error:
                raise CacheFormatError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from error
            if found != entry.xxh3_128:
                raise CacheFormatError(
                    f"{path}: damaged: expected {entry.xxh3_128}, found {found}; {_REMEDY}"
                )
        reader = open_reader(self.plan.store, self.path, shard, self.plan.all_fields)
        if reader.sample_ids != sidecar.sample_ids:
            raise CacheFormatError(f"{self.path}: shard {shard} holds other samples than its sidecar says")
        return reader

    def _follow_fork(self) -> None:
        # A lock that another thread held at the fork would never be released in the child.
        if self._process != os.getpid():
            self._reset()


def _check_size(path: Path, entry: FileEntry) -> None:
    try:
        size = path.stat(follow_symlinks=False).st_size
    except OSError as error:
        raise CacheFormatError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from error
    if size != entry.size:
        raise CacheFormatError(f"{path}: damaged: expected {entry.size} bytes, found {size} bytes; {_REMEDY}")


_REMEDY = "run `cachectl verify` to see all damage, then build or copy that shard again"
