"""Read access to a finished cache: a path in, records by sample id out. No torch, no codecs.

The cache describes itself: which signals it holds, in which fields, made from what. Opening reads plan and
manifest and maps the index; a sidecar is read with its shard, so that neither time nor memory grows with the
number of records. Every shard is checked against its sidecar when it is opened, and a file beside the shards
when it is asked for, so a damaged file is an error here and never a training step.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_distill_cache.common.cache.index import INDEX, SampleIndex
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest, read_plan
from vlm_distill_cache.common.cache.shared_images import SharedImages
from vlm_distill_cache.common.cache.side_files import check_digests, check_sizes
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.index_build import build_index
from vlm_distill_cache.common.open_shards import OpenShards
from vlm_distill_cache.common.sample_ids import FailedSamples, SampleIds

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

    from numpy.typing import NDArray

    from vlm_distill_cache.common.cache.index import Place
    from vlm_distill_cache.common.cache.plan import Plan
    from vlm_distill_cache.common.cache.schema import Field, Record
    from vlm_distill_cache.common.open_shards import OpenShard

OPEN_SHARDS = 8


def open_cache(location: Path | str, *, open_shards: int = OPEN_SHARDS) -> TeacherCache:
    """Open a finished cache for reading; a read-only folder will do.

    Args:
        location: The cache folder; or a URL, whose files are fetched into a local mirror as they are needed.
        open_shards: Shards kept open, and decoded in memory, at a time.

    Raises:
        CacheFormatError: If it is no cache, not sealed, damaged, or from a newer format version.
        TransferError: If a URL cannot be read.
    """
    if isinstance(location, str):
        from vlm_distill_cache.common.remotes import is_url  # loads no client library

        if is_url(location):
            from vlm_distill_cache.common.remotes.mirror import (
                open_mirror,  # only who reads from afar needs it
            )

            return open_mirror(location, open_shards=open_shards)
    return TeacherCache(Path(location), open_shards=open_shards)


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

    def __init__(
        self,
        path: Path,
        *,
        open_shards: int = OPEN_SHARDS,
        before_open: Callable[[int], object] | None = None,
    ) -> None:
        """Open it.

        Args:
            path: The cache folder.
            open_shards: Shards kept open at a time.
            before_open: Called with a shard's number before its files are read, by whichever thread needs
                them, and brings them here; what it returns is kept as long as the shard is open.

        Raises:
            CacheFormatError: If it is no cache, not sealed, damaged, or from a newer format version.
        """
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
        check_sizes(path, self.manifest.files)
        self._images = SharedImages(self.plan.all_fields)
        self._fetches = before_open is not None
        self._shards = OpenShards(path, self.plan, self.manifest, limit=open_shards, before_open=before_open)
        self._starts = np.array([0, *accumulate(s.samples for s in self.manifest.shards)], dtype=np.int64)
        self._checked: set[str] = set()
        self._index: SampleIndex | None = None
        if INDEX in self.manifest.files:
            self._index = self._open_index()

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
        return SampleIds(self._starts, self._shards.sidecar, self.__contains__)

    @property
    def failed(self) -> Mapping[str, str]:
        """Why each missing sample could not be read, by sample id."""
        counts = [shard.failed for shard in self.manifest.shards]
        return FailedSamples(counts, self._shards.sidecar, self._find)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __contains__(self, sample_id: object) -> bool:
        if not isinstance(sample_id, str):
            return False
        place = self._find(sample_id)
        return place is not None and not place.failed

    def shard_of(self, sample_id: str) -> int:
        """Return the shard that holds a sample.

        Raises:
            CacheMismatchError: If the cache does not hold it.
        """
        return self._place(sample_id)[0]

    def shard_sample_ids(self, shard: int) -> tuple[str, ...]:
        """Return the sample ids of a shard, in stored order; reading them in turn opens it once."""
        return self._shards.sidecar(shard).sample_ids

    def positions(self, sample_ids: Iterable[str]) -> NDArray[np.int64]:
        """Look up many samples at once, without reading a sidecar.

        Args:
            sample_ids: Of a data set, n of them.

        Returns:
            Each one's place in ``self.sample_ids``, int64 ``[n]``; -1 for samples the cache holds no record of.

        Raises:
            CacheFormatError: If the index does not fit the manifest.
        """
        shard, position = self._indexed().find_many(sample_ids)
        held = shard >= 0
        places = np.where(held, self._starts[shard] + position, -1)
        if bool((held & (places >= self._starts[shard + 1])).any()):
            raise self._misplaced("its positions lie beyond the ends of their shards")
        return places

    def read(self, sample_id: str, names: Collection[str] | None = None) -> Record:
        """Return a sample's record.

        Args:
            sample_id: Of the sample.
            names: Only these fields; None for all.

        Returns:
            Arrays by field name, which the caller owns; dtypes and shapes as ``fields`` say. Those that the
            record shares with others of its image are in it, wherever in the shard they lie.

        Raises:
            CacheMismatchError: If the cache does not hold the sample, with the reason if it failed.
            CacheFormatError: If its shard is missing or damaged.
        """
        opened, position = self._locate(sample_id)
        return self._images.read(opened.reader, position, names, where=f"sample {sample_id!r} of {self.path}")

    def read_stored(self, sample_id: str) -> Record:
        """Return a record as stored: arrays another one of its image holds are empty. Raises as ``read``."""
        opened, position = self._locate(sample_id)
        return opened.reader.read(position)

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
        check_digests(self.path, wanted)
        self._checked |= wanted.keys()

    def check_shard_files(self) -> None:
        """Look, without reading them, whether every shard's files are there in full length.

        A cache whose shards are fetched as they are needed is checked then.

        Raises:
            CacheFormatError: Naming the first that is not.
        """
        if not self._fetches:
            self._shards.check_sizes()

    def close(self) -> None:
        """Close all shards; they are opened again when needed."""
        self._shards.close()

    def _locate(self, sample_id: str) -> tuple[OpenShard, int]:
        shard, position = self._place(sample_id)
        opened = self._shards.open(shard)
        stored = opened.reader.sample_ids
        if position >= len(stored) or stored[position] != sample_id:
            raise self._misplaced(f"sample {sample_id!r} is not record {position} of shard {shard}")
        return opened, position

    def _find(self, sample_id: str) -> Place | None:
        return self._indexed().find(sample_id)

    def _place(self, sample_id: str) -> tuple[int, int]:
        place = self._find(sample_id)
        if place is None:
            raise CacheMismatchError(
                f"{self.path}: no sample {sample_id!r} among its {len(self)}; "
                "use the data set and split the cache was built from"
            )
        if not place.failed:
            return place.shard, place.position
        failed = self._shards.sidecar(place.shard).failed
        if place.position >= len(failed) or failed[place.position][0] != sample_id:
            raise self._misplaced(f"sample {sample_id!r} is not among the failed ones of shard {place.shard}")
        raise CacheMismatchError(
            f"{self.path}: sample {sample_id!r} failed when the cache was built: "
            f"{failed[place.position][1]}; skip it, or mend it and build the cache again"
        )

    def _misplaced(self, what: str) -> CacheFormatError:
        return CacheFormatError(f"{self.path / INDEX}: {what}; run `teacher-cache seal` to write it anew")

    def _indexed(self) -> SampleIndex:
        index = self._index
        if index is None:  # two threads may both open it; no harm is done
            index = self._index = self._open_index()
        return index

    def _open_index(self) -> SampleIndex:
        entry = self.manifest.files.get(INDEX)
        if entry is None:  # sealed before there was an index
            sidecars = (self._shards.sidecar(shard) for shard in range(self.plan.shard_count))
            return SampleIndex(build_index(self.path, self.plan, sidecars), str(self.path))
        index = SampleIndex.open(self.path / INDEX, entry)
        failed = sum(shard.failed for shard in self.manifest.shards)
        found = (index.shard_count, len(index), index.failed_count)
        if found != (self.plan.shard_count, len(self) + failed, failed):
            raise self._misplaced("it is another cache's: shards or samples differ in number")
        return index
