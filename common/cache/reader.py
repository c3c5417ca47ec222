"""Read access to a finished cache: a folder in, records by sample id out. No torch, no network.

The cache describes itself: which signals it holds, in which fields, made from what. Opening reads plan and
manifest and maps the index; a sidecar is read with its shard, so that neither time nor memory grows with the
number of records. Every shard is checked against its sidecar when it is opened, and a file beside the shards
when it is asked for, so a damaged file is an error here and never a training step.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.index import INDEX, Place, SampleIndex, build_index, hashes_of
from vlm_distill_cache.common.cache.manifest import Manifest, ShardSummary, read_manifest, refuse_other_plan
from vlm_distill_cache.common.cache.placing import planned_places
from vlm_distill_cache.common.cache.plan import Plan, read_plan, with_more
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.cache.shared_images import SharedImages
from vlm_distill_cache.common.cache.side_files import check_digests, check_file, check_size, check_sizes
from vlm_distill_cache.common.cache.sidecar import ShardSidecar, parse_sidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.cache.stores.base import ShardReader
from vlm_distill_cache.common.cache.versions import identity, moved_to
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, SampleNotCachedError
from vlm_distill_cache.common.files.atomic import read_bounded
from vlm_distill_cache.common.printing import brief

_T = TypeVar("_T")


class SampleIds(Sequence[str]):
    """All records' ids in the data set's order; iterating, indexing and slicing read one shard at a time."""

    def __init__(
        self, starts: NDArray[np.int64], sidecar: Callable[[int], ShardSidecar], contains: Callable[[object], bool]
    ) -> None:
        """Describe them; ``starts``: records before each shard, and their total at the end, int64 ``[shards + 1]``."""
        self._starts, self._sidecar, self._contains = starts, sidecar, contains

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        for shard in range(len(self._starts) - 1):
            yield from self._sidecar(shard).sample_ids

    def __contains__(self, sample_id: object) -> bool:
        return self._contains(sample_id)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        """Return one id, or those of a slice."""
        if isinstance(place, slice):
            return tuple(self[i] for i in range(*place.indices(len(self))))
        at = place + len(self) if place < 0 else place
        if not 0 <= at < len(self):
            raise IndexError(f"no sample {place}; there are {len(self)}")
        shard = int(np.searchsorted(self._starts, at, side="right")) - 1
        return self._sidecar(shard).sample_ids[at - int(self._starts[shard])]

    def __eq__(self, other: object) -> bool:
        """Whether the same ids stand in the same order in another sequence, of whatever kind."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class FailedSamples(Mapping[str, str]):
    """Why each missing sample could not be read, by sample id; reads the sidecars of shards that have some."""

    def __init__(
        self, counts: Sequence[int], sidecar: Callable[[int], ShardSidecar], find: Callable[[str], Place | None]
    ) -> None:
        """Describe them; ``counts``: failed samples of each shard."""
        self._counts, self._sidecar, self._find = counts, sidecar, find

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[str]:
        for shard, count in enumerate(self._counts):
            if count:
                yield from (name for name, _ in self._sidecar(shard).failed)

    def __getitem__(self, sample_id: str) -> str:
        """Return the reason; a KeyError if the sample did not fail."""
        place = self._find(sample_id)
        if place is None or not place.failed:
            raise KeyError(sample_id)
        return dict(self._sidecar(place.shard).failed)[sample_id]

    def __repr__(self) -> str:
        return repr(dict(self))


_REMEDY = "run `cachectl verify` to see all damage, then build or copy that shard again"


class OpenShard(NamedTuple):
    """A shard being read; keep a reference until the read is done, since it may be evicted meanwhile."""

    reader: ShardReader
    held: object  # whatever keeps its files where they are


class OpenShards:
    """Opens shards after checking every byte, and sidecars after comparing them with the manifest."""

    def __init__(
        self, path: Path, plan: Plan, manifest: Manifest, *, limit: int, before_open: Callable[[int], object] | None
    ) -> None:
        """Open none yet; keep at most ``limit`` shards and sidecars. ``before_open``: as for ``TeacherCache``."""
        self.path, self._plan, self._manifest = path, plan, manifest
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
        """Return a shard's sidecar; does not bring the shard itself here. Raises CacheFormatError, as ``open``."""
        self._follow_fork()
        with self._lock:
            sidecar = self._sidecars.get(shard)
        if sidecar is None:
            sidecar = self._read_sidecar(shard)
            with self._lock:
                _keep(self._sidecars, shard, sidecar, self._limit)
        return sidecar

    def open(self, shard: int) -> OpenShard:
        """Return a shard, opened if it is not open; a CacheFormatError if it or its sidecar is missing or damaged."""
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

    def moved(self, path: Path) -> OpenShards:
        """The same shards in another folder, none of them open."""
        return OpenShards(path, self._plan, self._manifest, limit=self._limit, before_open=self._before_open)

    def check_sizes(self) -> None:
        """Refuse a shard whose files are not there in full length; does not read them."""
        for shard in range(self._plan.shard_count):
            for name, entry in self._read_sidecar(shard).files.items():
                check_size(self.path, name, entry, _REMEDY)

    def _read_sidecar(self, shard: int) -> ShardSidecar:
        path = sidecar_path(self.path, shard)
        try:
            data = read_bounded(path)
        except FileNotFoundError:
            raise CacheFormatError(
                f"{self.path}: the sidecar of shard {shard} is missing; "
                "run `cachectl verify`, then build or copy that shard again"
            ) from None
        sidecar = parse_sidecar(data, shard, str(path))
        if ShardSummary.of(sidecar, data) != self._manifest.shards[shard]:
            raise CacheFormatError(
                f"{self.path}: the sidecar of shard {shard} is not the one in manifest.json; "
                "run `cachectl verify`, and `teacher-cache seal` if the shard was built anew"
            )
        return sidecar

    def _open(self, shard: int) -> OpenShard:
        held = self._before_open(shard) if self._before_open is not None else None
        sidecar = self.sidecar(shard)
        for name, entry in sidecar.files.items():
            check_file(self.path, name, entry, _REMEDY)
        reader = open_reader(self._plan.store, self.path, shard, self._plan.all_fields)
        if reader.sample_ids != sidecar.sample_ids:
            raise CacheFormatError(f"{self.path}: shard {shard} holds other samples than its sidecar says")
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


OPEN_SHARDS = 8


class Codec(Protocol):
    """How records keep one signal (``common.codecs``): frozen settings, and ``encode`` beside ``decode``."""

    def fields(self) -> tuple[Field, ...]:
        """The arrays of a record that hold the signal."""
        ...

    def decode(self, record: Record) -> Any:
        """Rebuild the signal from these arrays; the codec's own docstring says as what, with shapes and units."""
        ...


class TeacherCache:
    """A finished cache: records by sample id. Safe to use from several threads; forks and pickled copies open their own.

    ``cache[sample_id]`` is a sample's record, ``for sample_id in cache`` goes through the data set's order, and ``len``
    counts records. Where another cache takes its place (``teacher-cache extend``), what was opened is read on. A record
    is a dict of plain numpy arrays. Every record has ``image_hash`` u1 ``[1, 16]``, ``labels`` u4 ``[A]``, the token
    ids of the A supervised rows, and ``tiles`` f4 ``[tiles, 6]``: rows and columns of visual tokens, and the region
    ``x0, y0, x1, y1`` that they cover, in units of the image's width and height. The others belong to signals,
    compressed as ``common.cache.schema`` says field by field: ``decode`` turns them into numbers to work with.

    Attributes:
        path: The folder; of a cache that was opened by its address, its local mirror.
        place: What it was opened by, the folder or the address without secrets: for messages.
        plan: What it was planned to hold: teacher, data, and each signal's codec.
        manifest: What it holds: counts, bytes, digests, and its fidelity to the teacher.
    """

    path: Path
    place: str
    plan: Plan
    manifest: Manifest

    def __init__(
        self,
        path: Path,
        *,
        place: str = "",
        open_shards: int = OPEN_SHARDS,
        before_open: Callable[[int], object] | None = None,
        codec_of: Callable[[Mapping[str, Any]], Codec] | None = None,
    ) -> None:
        """Open it; ``open_cache`` does so for a folder or an address.

        Args:
            place: What messages call it; empty: the folder.
            open_shards: Shards kept open at a time.
            before_open: Called with a shard's number before its files are read, by whichever thread needs
                them, and brings them here; what it returns is kept as long as the shard is open.
            codec_of: Rebuilds a codec from the settings that the plan stores; None: nothing can be decoded.

        Raises:
            CacheFormatError: If it is no cache, not sealed, damaged, or from a newer format version.
        """
        if open_shards < 1:
            raise ValueError(f"open_shards is {open_shards}; expected 1 or more")
        self.path, self.place, self._name = path, place or str(path), path
        self._opened = identity(path)
        self._read_documents()
        while (now := identity(path)) != self._opened:
            self._opened = now  # another cache took its place meanwhile
            self._read_documents()
        self._images = SharedImages(self.plan.all_fields)
        self._fetches, self._codec_of = before_open is not None, codec_of
        self._codecs: dict[str, Codec] = {}
        self._shards = OpenShards(path, self.plan, self.manifest, limit=open_shards, before_open=before_open)
        self._starts = np.array([0, *accumulate(s.samples for s in self.manifest.shards)], dtype=np.int64)
        self._checked: set[str] = set()
        self._index: SampleIndex | None = None
        if INDEX in self.manifest.files:
            self._index = self.steady(lambda _: self._open_index())

    def _read_documents(self) -> None:
        try:
            self.plan, self.manifest = read_plan(self.path), read_manifest(self.path)
            refuse_other_plan(self.manifest, self.plan, str(self.path))
            check_sizes(self.path, self.manifest.files)
        except CacheFormatError:
            if identity(self.path) == self._opened:
                raise

    def steady(self, read: Callable[[OpenShards], _T]) -> _T:
        """Read files of the cache; again, where it lies now, if another one took its place meanwhile.

        Args:
            read: Given the cache's shards, whose ``path`` is the folder to read in.
        """
        while True:
            shards = self._shards
            try:
                found = read(shards)
            except (CacheFormatError, OSError):
                if not self._follow(shards):
                    raise
            else:
                if not self._follow(shards):
                    return found

    def _follow(self, shards: OpenShards) -> bool:
        """Whether these shards' folder is another cache's by now, and this one's is known."""
        if self._fetches or self._opened is None or identity(shards.path) == self._opened:
            return False
        place = moved_to(self._name, self.manifest, self._opened)
        if place is None:
            return False
        if self._shards is shards:  # else another thread has followed already
            self.path, self._shards = place, shards.moved(place)
        return True

    def _sidecar(self, shard: int) -> ShardSidecar:
        return self.steady(lambda shards: shards.sidecar(shard))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}  # a copy maps the index itself

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
    def sample_ids(self) -> SampleIds:
        """All records' sample ids, in the data set's order; read from the sidecars as they are asked for."""
        return SampleIds(self._starts, self._sidecar, self.__contains__)

    @property
    def failed(self) -> Mapping[str, str]:
        """Why each missing sample could not be read, by sample id."""
        counts = [shard.failed for shard in self.manifest.shards]
        return FailedSamples(counts, self._sidecar, self._find)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(self.sample_ids)

    def __getitem__(self, sample_id: str) -> Record:
        """Return a sample's record, as ``read`` does; an unknown sample is a KeyError that says why."""
        return self.read(sample_id)

    def items(self) -> Iterator[tuple[str, Record]]:
        """Yield each sample's id and record, shard after shard in the data set's order."""
        for sample_id in self:
            yield sample_id, self.read(sample_id)

    def codec(self, signal: str) -> Codec:
        """Return a signal's codec with the cache's settings.

        Raises:
            CacheMismatchError: If the cache does not hold the signal.
            CacheFormatError: If its settings are damaged, or from a newer version.
        """
        if signal not in self.plan.signals:
            more = f"--signals {','.join((*self.signals, signal))}"
            raise CacheMismatchError(
                f"{self.place}: no signal {signal!r}; the cache holds {', '.join(self.signals)}: take one of these, or "
                + with_more(self.plan, f"build a cache with {more}", options=more)
            )
        if self._codec_of is None:
            raise CacheMismatchError(f"{self.place}: opened without codecs; `open_cache` opens it with them")
        if signal not in self._codecs:
            self._codecs[signal] = self._codec_of(self.plan.signals[signal])
        return self._codecs[signal]

    def decode(self, signal: str, record: Record) -> Any:
        """Rebuild a signal from a record of this cache.

        ``logits`` become ``log_probs``, float32 ``[A, K]`` in nats, of each supervised row's kept tokens (``token_ids``
        ``[A, K]``); ``answer_attention`` becomes ``cells``, float32 ``[A, G, C]``: each row's probability mass on each cell
        of a grid over the image, by layer group. Each codec's ``decode`` says more.

        Raises:
            CacheMismatchError: If the cache does not hold the signal.
            CacheFormatError: If the record is damaged.
        """
        return self.codec(signal).decode(record)

    def __contains__(self, sample_id: object) -> bool:
        if not isinstance(sample_id, str):
            return False
        place = self._find(sample_id)
        return place is not None and not place.failed

    def shard_of(self, sample_id: str) -> int:
        """Return the shard that holds a sample; raises SampleNotCachedError, as ``read``."""
        return self._place(sample_id)[0]

    def shard_sample_ids(self, shard: int) -> tuple[str, ...]:
        """Return the sample ids of a shard, in stored order; reading them in turn opens it once."""
        return self._sidecar(shard).sample_ids

    def positions(self, sample_ids: Iterable[str]) -> NDArray[np.int64]:
        """Look up n samples at once, without reading a sidecar.

        Returns:
            Each one's place in ``self.sample_ids``, int64 ``[n]``; -1 for samples the cache holds no record of.

        Raises:
            CacheFormatError: If the index does not fit the manifest.
        """
        return np.concatenate([np.zeros(0, np.int64), *self.positions_of_some(sample_ids)])

    def positions_of_some(self, sample_ids: Iterable[str]) -> Iterator[NDArray[np.int64]]:
        """As `positions`, of about a million samples at a time, in order: what many millions take is not held at once."""
        index = self._indexed()
        for high, low in hashes_of(sample_ids):
            shard, position = index.find_many(high, low)
            held = shard >= 0
            places = np.where(held, self._starts[shard] + position, -1)
            if bool((held & (places >= self._starts[shard + 1])).any()):
                raise self._misplaced("its positions lie beyond the ends of their shards")
            yield places

    def places_in(self, sample_ids: Sequence[str]) -> NDArray[np.int64]:
        """Where each of the cache's samples is among those of a data set, int64 ``[len(self)]``; -1 if it is not."""
        places = planned_places(self._indexed(), self.plan, self._starts, sample_ids)
        if places is None:
            places, done = np.full(len(self), -1, dtype=np.int64), 0
            for found in self.positions_of_some(sample_ids):
                held = np.flatnonzero(found >= 0)
                places[found[held]] = done + held
                done += len(found)
        return places

    def read(self, sample_id: str, names: Collection[str] | None = None) -> Record:
        """Return a sample's record.

        Args:
            sample_id: As the data set names it.
            names: Only these fields; None for all.

        Returns:
            Arrays by field name, which the caller owns; dtypes and shapes as ``fields`` say. Those that the
            record shares with others of its image are in it, wherever in the shard they lie.

        Raises:
            SampleNotCachedError: If the cache does not hold the sample, with the reason if it failed; also a KeyError.
            CacheFormatError: If its shard is missing or damaged.
        """

        def read(shards: OpenShards) -> Record:
            opened, position = self._locate(shards, sample_id)
            return self._images.read(opened.reader, position, names, where=f"sample {sample_id!r} of {self.place}")

        return self.steady(read)

    def read_stored(self, sample_id: str) -> Record:
        """Return a record as stored: arrays another one of its image holds are empty. Raises as ``read``."""

        def read(shards: OpenShards) -> Record:
            opened, position = self._locate(shards, sample_id)
            return opened.reader.read(position)

        return self.steady(read)

    def check_side_files(self, names: Collection[str] | None = None) -> None:
        """Check the digests of files beside the shards, each once; call before something in them is used.

        Args:
            names: Files, or folders of them, relative to the cache; None for all.

        Raises:
            CacheFormatError: Naming the first that is lost or damaged.
        """
        wanted = {
            name: entry
            for name, entry in self.manifest.files.items()
            if name not in self._checked
            and (names is None or any(name == part or name.startswith(f"{part}/") for part in names))
        }
        self.steady(lambda shards: check_digests(shards.path, wanted))
        self._checked |= wanted.keys()

    def check_shard_files(self) -> None:
        """Refuse a shard whose files are not there in full length; does not read them.

        A cache whose shards are fetched as they are needed is checked then.
        """
        if not self._fetches:
            self.steady(lambda shards: shards.check_sizes())

    def close(self) -> None:
        """Close all shards; they are opened again when needed."""
        self._shards.close()

    def _locate(self, shards: OpenShards, sample_id: str) -> tuple[OpenShard, int]:
        shard, position = self._place(sample_id)
        opened = shards.open(shard)
        stored = opened.reader.sample_ids
        if position >= len(stored) or stored[position] != sample_id:
            raise self._misplaced(f"sample {sample_id!r} is not record {position} of shard {shard}")
        return opened, position

    def _find(self, sample_id: str) -> Place | None:
        return self._indexed().find(sample_id)

    def _place(self, sample_id: str) -> tuple[int, int]:
        place = self._find(sample_id) if isinstance(sample_id, str) else None
        if place is None:
            raise SampleNotCachedError(
                f"{self.place}: no sample {sample_id!r} among its {len(self)}; "
                "use the data set and split the cache was built from"
            )
        if not place.failed:
            return place.shard, place.position
        failed = self._sidecar(place.shard).failed
        if place.position >= len(failed) or failed[place.position][0] != sample_id:
            raise self._misplaced(f"sample {sample_id!r} is not among the failed ones of shard {place.shard}")
        raise SampleNotCachedError(
            f"{self.place}: sample {sample_id!r} failed when the cache was built: "
            f"{brief(failed[place.position][1])}; skip it, or "
            + with_more(
                self.plan, "mend it and run `teacher-cache extend` on the cache, with the same data and teacher"
            )
        )

    def _misplaced(self, what: str) -> CacheFormatError:
        return CacheFormatError(f"{self.path / INDEX}: {what}; run `teacher-cache seal` to write it anew")

    def _indexed(self) -> SampleIndex:
        index = self._index
        if index is None:  # two threads may both open it; no harm is done
            index = self._index = self.steady(lambda _: self._open_index())
        return index

    def _open_index(self) -> SampleIndex:
        entry = self.manifest.files.get(INDEX)
        if entry is None:  # sealed before there was an index
            sidecars = (self._sidecar(shard) for shard in range(self.plan.shard_count))
            with build_index(self.path, self.plan, sidecars) as file:
                return SampleIndex(file.read(), str(self.path))
        index = SampleIndex.open(self.path / INDEX, entry)
        failed = sum(shard.failed for shard in self.manifest.shards)
        found = (index.shard_count, len(index), index.failed_count)
        if found != (self.plan.shard_count, len(self) + failed, failed):
            raise self._misplaced("it is another cache's: shards or samples differ in number")
        return index
