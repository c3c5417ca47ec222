"""``index.bin``: where each sample of a finished cache is, found by its id in about a microsecond.

Written by ``seal`` from the sidecars alone, so equal caches have equal bytes. It is mapped, not read: of a
million records a look-up touches a few pages, and no process holds a million ids. Little-endian throughout:

============ ======== ====================================================================================
part         dtype    content
============ ======== ====================================================================================
header       64 bytes magic, version u4, shards u4, entries n u8, failed samples u8, zeros
``high``     u8 [n]   upper half of xxh3_128 of the sample id's UTF-8, ascending
``low``      u8 [n]   lower half; ascending where ``high`` is equal
``shard``    u4 [n]   which shard
``position`` u4 [n]   place among its records, or, with the top bit set, among its failed samples
============ ======== ====================================================================================

An index only says where to look. Whoever reads a record compares the id there with the one asked for, so a
forged index can hide a sample but never pass another off for it. ``seal`` and ``pull`` replace the file by
a rename: one that is mapped does not change.
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.side_files import open_plain
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, check_sidecar, read_sidecar, sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, is_out_of_reach, read_bounded
from vlm_distill_cache.common.files.hashing import stream_checksum

INDEX = "index.bin"
INDEX_VERSION = 1

_MAGIC = b"VLMDIDX\0"
_HEADER = struct.Struct("<8sIIQQ32x")
COLUMN_DTYPES = ("<u8", "<u8", "<u4", "<u4")  # high, low, shard, position
_ENTRY = np.dtype([*zip(("high", "low", "shard", "position"), COLUMN_DTYPES, strict=True)])
_ENTRY_BYTES = _ENTRY.itemsize
FAILED_BIT = 1 << 31
_HASHED_AT_A_TIME = 1 << 16
_LOOKED_UP_AT_A_TIME = 1 << 20
_CONFIRMED_AT_A_TIME = 1 << 17
_COMPARED_AT_A_TIME = 1 << 20  # bytes
_HELD = 1 << 19  # entries, while an index is made
_RANGE_ENDS = (np.arange(1, 1025, dtype=np.uint64) << np.uint64(54)) - np.uint64(1)  # of the upper half of a hash
_SEAL = "run `teacher-cache seal` to write it anew, or copy it from an intact cache"


class Place(NamedTuple):
    """Where a sample is: a shard, and a position among its records or among its failed samples."""

    shard: int
    position: int
    failed: bool


def hash_ids(sample_ids: Iterable[str]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Return upper and lower halves of the ids' xxh3_128, u8 ``[n]`` each."""
    remaining = iter(sample_ids)
    parts = []
    while digests := [xxhash.xxh3_128_digest(_encoded(name)) for name in islice(remaining, _HASHED_AT_A_TIME)]:
        parts.append(np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2))
    pairs = np.concatenate([np.zeros((0, 2), dtype=">u8"), *parts]).astype(np.uint64)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def hashes_of(sample_ids: Iterable[str]) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.uint64]]]:
    """Yield what `hash_ids` returns, of about a million ids at a time; of ids that know their hashes none is made.

    Args:
        sample_ids: May have a method ``hashes``, which gives them in parts u8 ``[n_i, 2]``.
    """
    if known := getattr(sample_ids, "hashes", None):
        waiting: list[NDArray[np.uint64]] = []
        for part in known():
            waiting.append(part)
            if sum(map(len, waiting)) >= _LOOKED_UP_AT_A_TIME:
                yield _halves(waiting)
                waiting = []
        if waiting:
            yield _halves(waiting)
        return
    remaining = iter(sample_ids)
    while some := list(islice(remaining, _LOOKED_UP_AT_A_TIME)):
        yield hash_ids(some)


def _halves(parts: list[NDArray[np.uint64]]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    pairs = np.concatenate(parts)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])


def _encoded(sample_id: str) -> bytes:
    # A lone surrogate is in no cache, but may be asked for.
    return sample_id.encode("utf-8", "surrogatepass")


class SampleIndex:
    """Looks up samples in the bytes of an ``index.bin``."""

    def __init__(self, data: bytes | bytearray | mmap.mmap, where: str) -> None:
        """Take an index as it is in the file; its bytes are not copied."""
        self._where = where
        if len(data) < _HEADER.size:
            raise CacheFormatError(f"{where}: {len(data)} bytes are no index; {_SEAL}")
        magic, version, self.shard_count, count, self.failed_count = _HEADER.unpack_from(data)
        if magic != _MAGIC:
            raise CacheFormatError(f"{where}: does not begin as an index; {_SEAL}")
        if version != INDEX_VERSION:
            raise CacheFormatError(
                f"{where}: index version {version}, this code reads {INDEX_VERSION}; update the code, or {_SEAL}"
            )
        size = _HEADER.size + _ENTRY_BYTES * count
        if len(data) != size or self.failed_count > count:
            raise CacheFormatError(
                f"{where}: declares {count} entries, {self.failed_count} of them failed, in {len(data)} bytes; "
                f"expected {size} bytes; {_SEAL}"
            )
        if any(data[_HEADER.size - 32 : _HEADER.size]):
            raise CacheFormatError(f"{where}: the unused part of its header is not zero; {_SEAL}")
        self._count = int(count)
        self._high, self._low, self._shard, self._position = index_columns(data, self._count)

    @classmethod
    def open(cls, path: Path, entry: FileEntry) -> SampleIndex:
        """Map an index whose size and checksum are the ones sealed."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CacheFormatError(f"{path}: cannot be read: {error.strerror}; {_SEAL}") from error
        with os.fdopen(descriptor, "rb") as file:
            size = os.fstat(descriptor).st_size
            found = stream_checksum(file) if size == entry.size > 0 else f"{size} bytes"
            if found != entry.xxh3_128:
                raise CacheFormatError(
                    f"{path}: not the file that was sealed: expected {entry.size} bytes, {entry.xxh3_128}, "
                    f"found {found}; {_SEAL}"
                )
            try:
                mapped = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
            except OSError:  # some network mounts cannot map files
                return cls(read_bounded(path, max_bytes=size), str(path))
            return cls(mapped, str(path))

    def __len__(self) -> int:
        return self._count

    def find(self, sample_id: str) -> Place | None:
        """Return where a sample is; None if the cache was not built from it."""
        high, low = divmod(xxhash.xxh3_128_intdigest(_encoded(sample_id)), 1 << 64)
        entry = int(self._high.searchsorted(np.uint64(high)))
        while entry < self._count and int(self._high[entry]) == high:
            if int(self._low[entry]) == low:
                return self.place(entry)
            entry += 1
        return None

    def find_many(
        self, high: NDArray[np.uint64], low: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look up many samples at once, in arrays.

        Args:
            high, low: Halves of their hashes as of `hash_ids`, u8 ``[n]`` each.

        Returns:
            Shard and position of each record, int64 ``[n]``; -1 for samples that are absent or failed.
        """
        order = np.argsort(high)  # looked up in order, neighbours share pages: ten times faster at ten million
        entries = np.empty(len(high), dtype=np.int64)
        entries[order] = self._high.searchsorted(high[order])
        found = np.full(len(high), -1, dtype=np.int64)
        active = np.flatnonzero(entries < self._count)
        while len(active):  # once, unless two ids share the upper half of their hash
            at = entries[active]
            candidates = self._high[at] == high[active]
            hits = candidates & (self._low[at] == low[active])
            found[active[hits]] = at[hits]
            active = active[candidates & ~hits]
            entries[active] += 1
            active = active[entries[active] < self._count]
        shard, position = np.full_like(found, -1), np.full_like(found, -1)
        known = np.flatnonzero(found >= 0)
        shard[known], position[known] = self._shard[found[known]], self._position[found[known]]
        if int(shard.max(initial=-1)) >= self.shard_count:
            raise self._outside(int(shard.max()))
        shard[position >= FAILED_BIT] = -1
        position[position >= FAILED_BIT] = -1
        return shard, position

    def confirms(
        self,
        high: NDArray[np.uint64],
        low: NDArray[np.uint64],
        begins: NDArray[np.int64],
        samples: NDArray[np.int64],
    ) -> bool:
        """Whether the records of some shards are those of successive ids, in order; far less than to look these up.

        Args:
            high, low: Halves of the hashes of n ids, u8 ``[n]`` each.
            begins: Of each shard the first of its ids, int64 ``[shards]``; below 0: not asked about.
            samples: Records of each shard, int64 ``[shards]``.
        """
        confirmed = 0
        for begin in range(0, self._count, _CONFIRMED_AT_A_TIME):
            part = slice(begin, begin + _CONFIRMED_AT_A_TIME)
            shard, position = self._shard[part], self._position[part].astype(np.int64)
            if int(shard.max()) >= len(begins):
                return False
            asked = np.flatnonzero((begins[shard] >= 0) & (position < FAILED_BIT))
            at = begins[shard[asked]] + position[asked]
            if (position[asked] >= samples[shard[asked]]).any() or int(at.max(initial=-1)) >= len(high):
                return False
            if (high[at] != self._high[part][asked]).any() or (low[at] != self._low[part][asked]).any():
                return False
            confirmed += len(asked)
        return confirmed == int(samples[begins >= 0].sum())

    def place(self, entry: int) -> Place:
        """Return where the sample of an entry is."""
        shard, position = int(self._shard[entry]), int(self._position[entry])
        if shard >= self.shard_count:
            raise self._outside(shard)
        return Place(shard, position % FAILED_BIT, position >= FAILED_BIT)

    def _outside(self, shard: int) -> CacheFormatError:
        return CacheFormatError(f"{self._where}: names shard {shard} of {self.shard_count}; {_SEAL}")


def index_columns(data: bytes | bytearray | mmap.mmap, count: int) -> tuple[np.ndarray, ...]:
    """Return ``high``, ``low``, ``shard`` and ``position`` of an index with ``count`` entries, without a copy."""
    columns, offset = [], _HEADER.size
    for dtype in COLUMN_DTYPES:
        columns.append(np.frombuffer(data, dtype=dtype, count=count, offset=offset))
        offset += columns[-1].nbytes
    return tuple(columns)


class IndexBuilder:
    """Makes an index from sidecars, in any order. Holds no ids, and half a million entries at a time.

    What is more waits, sorted, in a file without a name: it takes 24 bytes a sample on disk, and none in memory.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Begin an index; ``folder``: where what waits lies, of one that is written there; None: where temporary files do."""
        self._folder = folder
        self._held: list[NDArray[np.void]] = []
        self._waiting: IO[bytes] | None = None
        self._runs: list[NDArray[np.int64]] = []  # of each in the file: entries before it, and each range's end
        self._count = self._failed = 0

    def add(self, sidecar: ShardSidecar) -> None:
        """Add the samples of a shard."""
        names = (*sidecar.sample_ids, *(name for name, _ in sidecar.failed))
        records, failed = len(sidecar.sample_ids), len(sidecar.failed)
        entries = np.empty(len(names), dtype=_ENTRY)
        entries["high"], entries["low"] = hash_ids(names)
        entries["shard"] = sidecar.index
        entries["position"] = np.arange(len(names), dtype=np.uint32)
        entries["position"][records:] += np.uint32(FAILED_BIT - records)
        self._held.append(entries)
        self._count += len(names)
        self._failed += failed
        if self._count - self._aside >= _HELD:
            self._put_aside()

    def finish(self, shard_count: int) -> tuple[IO[bytes], tuple[Place, Place] | None]:
        """Sort; the builder is used up.

        Returns:
            The file, to be read from its beginning and closed; and the places of the first two samples with one id, or None.
        """
        file: IO[bytes] = self._temporary() if self._runs else BytesIO()
        file.write(_HEADER.pack(_MAGIC, INDEX_VERSION, shard_count, self._count, self._failed))
        begins = np.cumsum(
            [_HEADER.size, *(self._count * np.dtype(dtype).itemsize for dtype in COLUMN_DTYPES)]
        ).tolist()
        repeated, done = None, 0
        for entries in self._sorted():
            for begin, name in zip(begins, _ENTRY.names or (), strict=False):
                column = np.ascontiguousarray(entries[name])
                file.seek(begin + done * column.itemsize)
                file.write(column.tobytes())
            done += len(entries)
            repeated = repeated or _first_repeated(entries)
        file.seek(0)
        if self._waiting is not None:
            self._waiting.close()
        return file, repeated

    @property
    def _aside(self) -> int:
        """How many entries wait in the file."""
        return int(self._runs[-1][-1]) if self._runs else 0

    def _temporary(self) -> IO[bytes]:
        return tempfile.TemporaryFile(dir=self._folder, prefix=f"{TEMPORARY_PREFIX}{INDEX}-")

    def _put_aside(self) -> None:
        """Sort what is held into a run of the file."""
        entries = _in_order(self._held)
        self._waiting = self._waiting or self._temporary()
        before = self._aside
        self._waiting.write(entries.tobytes())
        ends = entries["high"].searchsorted(_RANGE_ENDS, side="right")
        self._runs.append(before + np.array([0, *ends], dtype=np.int64))

    def _sorted(self) -> Iterator[NDArray[np.void]]:
        """All entries in order, some at a time."""
        if self._waiting is None:
            yield _in_order(self._held)
            return
        self._put_aside()
        self._waiting.flush()
        sizes = np.sum([np.diff(run) for run in self._runs], axis=0)  # of each range of hashes
        first = 0
        while first < len(sizes):
            last = first + max(1, int(np.cumsum(sizes[first:]).searchsorted(_HELD, side="right")))
            for run in self._runs:
                begin, end = (int(place) * _ENTRY_BYTES for place in (run[first], run[min(last, len(sizes))]))
                self._held.append(np.frombuffer(os.pread(self._waiting.fileno(), end - begin, begin), dtype=_ENTRY))
            yield _in_order(self._held)
            first = last


def _in_order(parts: list[NDArray[np.void]]) -> NDArray[np.void]:
    """The entries of several arrays, which are taken out of the list, by their hashes; equal ones as they come."""
    entries = np.concatenate([np.empty(0, dtype=_ENTRY), *parts])
    parts.clear()
    return entries[np.lexsort((entries["low"], entries["high"]))]


def _first_repeated(entries: NDArray[np.void]) -> tuple[Place, Place] | None:
    """The places of the first two entries, of some in order, with one hash."""
    high, low = entries["high"], entries["low"]
    repeats = np.flatnonzero((high[1:] == high[:-1]) & (low[1:] == low[:-1]))
    if not len(repeats):
        return None
    two = entries[int(repeats[0]) : int(repeats[0]) + 2]
    places = zip(two["shard"].tolist(), two["position"].tolist(), strict=True)
    first, second = sorted(Place(shard, at % FAILED_BIT, at >= FAILED_BIT) for shard, at in places)
    return first, second


def refuse_repeats(cache_dir: Path, repeated: tuple[Place, Place] | None) -> None:
    """Refuse samples with one id, which `IndexBuilder.finish` found."""
    if repeated is None:
        return
    names = []
    for place in repeated:
        sidecar = read_sidecar(cache_dir, place.shard)
        names.append(sidecar.failed[place.position][0] if place.failed else sidecar.sample_ids[place.position])
    what = f"sample {names[0]!r} is" if names[0] == names[1] else f"samples {names[0]!r} and {names[1]!r} are"
    raise CacheFormatError(
        f"{cache_dir}: {what} in shards {repeated[0].shard} and {repeated[1].shard}; ids must be unique, and "
        "so must their xxh3_128; rename one in the data set and build the cache again"
    )


def build_index(
    cache_dir: Path, plan: Plan, sidecars: Iterable[ShardSidecar], *, scratch: Path | None = None
) -> IO[bytes]:
    """Return the ``index.bin`` that all sidecars of a cache, in order, call for: a file to be closed.

    Args:
        scratch: As of `IndexBuilder`.
    """
    builder = IndexBuilder(scratch)
    for sidecar in sidecars:
        check_sidecar(sidecar, plan, str(sidecar_path(cache_dir, sidecar.index)))
        builder.add(sidecar)
    data, repeated = builder.finish(plan.shard_count)
    try:
        refuse_repeats(cache_dir, repeated)
    except CacheFormatError:
        data.close()
        raise
    return data


def index_file(cache_dir: Path, plan: Plan) -> IO[bytes]:
    """Return the ``index.bin`` that the sidecars in a folder call for, as `build_index` does; writes nothing there."""
    return build_index(cache_dir, plan, (read_sidecar(cache_dir, shard) for shard in range(plan.shard_count)))


def index_damage(cache_dir: Path, expected: IO[bytes]) -> str | None:
    """Return what is wrong with the index in a folder, whatever the manifest says of it; or None.

    Raises:
        CacheFormatError: If the system does not let it be read.
    """
    try:
        with open_plain(cache_dir, INDEX) as file:
            while (found := file.read(_COMPARED_AT_A_TIME)) == expected.read(_COMPARED_AT_A_TIME):
                if not found:
                    return None
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        if is_out_of_reach(error):
            raise CacheFormatError(f"{cache_dir / INDEX}: cannot be read: {error.strerror or error}") from error
        return f"cannot be read: {error.strerror or error}"
    return "does not list the samples that the sidecars list"
