"""The shards of a cache that are open, and the sidecars read lately: a few of each, whatever the cache's size.

Safe to use from several threads: while one opens a shard, the others go on reading those that are open. A
fork or a pickled copy opens its own.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, NamedTuple

from vlm_distill_cache.common.cache.manifest import summarise
from vlm_distill_cache.common.cache.sidecar import parse_sidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import read_bounded
from vlm_distill_cache.common.plain_files import check_file, check_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vlm_distill_cache.common.cache.manifest import Manifest
    from vlm_distill_cache.common.cache.plan import Plan
    from vlm_distill_cache.common.cache.sidecar import ShardSidecar
    from vlm_distill_cache.common.cache.stores import ShardReader

_REMEDY = "run `cachectl verify` to see all damage, then build or copy that shard again"


class OpenShard(NamedTuple):
    """A shard being read; keep it until the read is done, it may be dropped from the open ones meanwhile."""

    reader: ShardReader
    held: object  # whatever keeps its files where they are


class OpenShards:
    """Opens shards after checking every byte, and sidecars after comparing them with the manifest."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        manifest: Manifest,
        *,
        limit: int,
        before_open: Callable[[int], object] | None,
    ) -> None:
        """Open none yet.

        Args:
            path: The cache folder.
            plan: The cache's.
            manifest: The cache's.
            limit: Shards, and sidecars, kept at a time.
            before_open: Called with a shard's number before its files are read, to bring them here; what it
                returns is kept as long as the shard is open.
        """
        self._path, self._plan, self._manifest = path, plan, manifest
        self._limit, self._before_open = limit, before_open
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._opening: dict[int, threading.Lock] = {}
        self._shards: OrderedDict[int, OpenShard] = OrderedDict()
        self._sidecars: OrderedDict[int, ShardSidecar] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        own = ("_process", "_lock", "_opening", "_shards", "_sidecars")
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def close(self) -> None:
        """Close all; they are opened again when needed."""
        with self._lock:
            self._shards.clear()
            self._sidecars.clear()

    def sidecar(self, shard: int) -> ShardSidecar:
        """Return a shard's sidecar; does not bring the shard itself here.

        Raises:
            CacheFormatError: If it is missing, damaged or not the one in the manifest.
        """
        self._follow_fork()
        with self._lock:
            sidecar = self._sidecars.get(shard)
        if sidecar is None:
            sidecar = self._read_sidecar(shard)
            with self._lock:
                _keep(self._sidecars, shard, sidecar, self._limit)
        return sidecar

    def open(self, shard: int) -> OpenShard:
        """Return a shard, opened if it is not open.

        Raises:
            CacheFormatError: If it or its sidecar is missing or damaged.
        """
        self._follow_fork()
        with self._lock:
            found = self._shards.get(shard)
            if found is not None:
                self._shards.move_to_end(shard)
                return found
            opening = self._opening.setdefault(shard, threading.Lock())
        with opening:
            with self._lock:
                found = self._shards.get(shard)  # another thread may just have opened it
            if found is None:
                found = self._open(shard)
                with self._lock:
                    # The one that leaves is not closed: another thread may be reading. It closes when dropped.
                    _keep(self._shards, shard, found, self._limit)
                    self._opening.pop(shard, None)
        return found

    def check_sizes(self) -> None:
        """Look, without reading them, whether every shard's files are there in full length.

        Raises:
            CacheFormatError: Naming the first that is not.
        """
        for shard in range(self._plan.shard_count):
            for name, entry in self._read_sidecar(shard).files.items():
                check_size(self._path, name, entry, _REMEDY)

    def _read_sidecar(self, shard: int) -> ShardSidecar:
        path = sidecar_path(self._path, shard)
        try:
            data = read_bounded(path)
        except FileNotFoundError:
            raise CacheFormatError(
                f"{self._path}: the sidecar of shard {shard} is missing; "
                "run `cachectl verify`, then build or copy that shard again"
            ) from None
        sidecar = parse_sidecar(data, shard, str(path))
        if summarise(sidecar, data) != self._manifest.shards[shard]:
            raise CacheFormatError(
                f"{self._path}: the sidecar of shard {shard} is not the one in manifest.json; "
                "run `cachectl verify`, and `teacher-cache seal` if the shard was built anew"
            )
        return sidecar

    def _open(self, shard: int) -> OpenShard:
        held = self._before_open(shard) if self._before_open is not None else None
        sidecar = self.sidecar(shard)
        for name, entry in sidecar.files.items():
            check_file(self._path, name, entry, _REMEDY)
        reader = open_reader(self._plan.store, self._path, shard, self._plan.all_fields)
        if reader.sample_ids != sidecar.sample_ids:
            raise CacheFormatError(f"{self._path}: shard {shard} holds other samples than its sidecar says")
        return OpenShard(reader, held)

    def _follow_fork(self) -> None:
        # A lock that another thread held at the fork would never be released in the child.
        if self._process != os.getpid():
            self._reset()


def _keep(recent: OrderedDict[int, Any], shard: int, value: object, limit: int) -> None:
    """Keep a value, and drop the one that was used longest ago if there are too many."""
    recent[shard] = value
    recent.move_to_end(shard)
    if len(recent) > limit:
        recent.popitem(last=False)
