"""A cache's sample ids and failed samples, read from the sidecars when somebody asks; never all in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vlm_distill_cache.common.cache.index import Place
    from vlm_distill_cache.common.cache.sidecar import ShardSidecar


class SampleIds(Sequence[str]):
    """All records' ids in the data set's order; iterating, indexing and slicing read one shard at a time."""

    def __init__(
        self,
        starts: NDArray[np.int64],
        sidecar: Callable[[int], ShardSidecar],
        contains: Callable[[object], bool],
    ) -> None:
        """Describe them.

        Args:
            starts: Records before each shard, and their total at the end, int64 ``[shards + 1]``.
            sidecar: Reads a shard's sidecar.
            contains: Looks an id up.
        """
        self._starts, self._sidecar, self._contains = starts, sidecar, contains

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __iter__(self) -> Iterator[str]:
        return self._between(0, len(self))

    def _between(self, first: int, last: int) -> Iterator[str]:
        """Yield the ids of a range, opening each sidecar once."""
        while first < last:
            shard = self._shard_of(first)
            start, end = self._starts[shard : shard + 2].tolist()
            yield from self._sidecar(shard).sample_ids[first - start : last - start]
            first = end

    def _shard_of(self, at: int) -> int:
        return int(np.searchsorted(self._starts, at, side="right")) - 1

    def __contains__(self, sample_id: object) -> bool:
        return self._contains(sample_id)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[str, ...]: ...
    def __getitem__(self, place: int | slice) -> str | tuple[str, ...]:
        """Return one id, or those of a slice."""
        if isinstance(place, slice):
            chosen = range(*place.indices(len(self)))
            if chosen.step == 1:
                return tuple(self._between(chosen.start, chosen.stop))
            return tuple(self[i] for i in chosen)
        at = place + len(self) if place < 0 else place
        if not 0 <= at < len(self):
            raise IndexError(f"no sample {place}; there are {len(self)}")
        shard = self._shard_of(at)
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
        self,
        counts: Sequence[int],
        sidecar: Callable[[int], ShardSidecar],
        find: Callable[[str], Place | None],
    ) -> None:
        """Describe them.

        Args:
            counts: Failed samples of each shard.
            sidecar: Reads a shard's sidecar.
            find: Looks an id up.
        """
        self._counts, self._sidecar, self._find = counts, sidecar, find

    def __len__(self) -> int:
        return sum(self._counts)

    def __iter__(self) -> Iterator[str]:
        for shard, count in enumerate(self._counts):
            if count:
                yield from (name for name, _ in self._sidecar(shard).failed)

    def __getitem__(self, sample_id: str) -> str:
        """Return the reason.

        Raises:
            KeyError: If the sample did not fail.
        """
        place = self._find(sample_id)
        if place is None or not place.failed:
            raise KeyError(sample_id)
        return dict(self._sidecar(place.shard).failed)[sample_id]

    def __repr__(self) -> str:
        return repr(dict(self))
