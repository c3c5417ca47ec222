"""The ids of a file's entries, and where these begin, as arrays: found once, kept, and mapped by every later process.

As Python's texts and numbers they take 100 bytes a sample and more, and all of the file has to be read for them. Here they
take 28 bytes and the id's own, of which a process maps those that it asks for.
"""

from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.index import hash_ids
from vlm_distill_cache.data.sources.kept.store import Kept, kept_path, read_kept, write_kept

_AT_A_TIME = 1 << 16  # ids


def pack_entries(
    ids: Sequence[str], odd: Mapping[int, str], *, offsets: "Sequence[int] | array[int]" = (), notes: Mapping[str, Any]
) -> Kept:
    """What is kept of entries.

    Args:
        ids: And what is wrong with them, ``odd``, as of `data.sample.resolve_ids`.
        offsets: Where each begins in its file, if that is known, and, if they stand one behind the other, where the last one
            ends; bytes.
        notes: What else was found out; JSON.
    """
    sizes = np.fromiter((len(sample_id.encode()) for sample_id in ids), dtype=np.uint64, count=len(ids))
    ends = np.concatenate([np.zeros(1, np.uint64), np.cumsum(sizes, dtype=np.uint64)])
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.frombuffer("".join(ids).encode(), dtype=np.uint8),
        "id_at": ends.astype(np.uint32) if ends[-1] < 1 << 32 else ends,
        "hash": np.stack(hash_ids(ids), axis=1),
        "offset": np.array(offsets, dtype=np.uint64),
    }
    return Kept({**notes, "odd": {str(place): reason for place, reason in odd.items()}}, arrays)


class KeptEntries:
    """What `pack_entries` made of a file or several; picklable, and where it is kept, copies map the same bytes.

    Attributes:
        of: What it was made of, JSON: kinds, names, sizes and times; None: it is not kept.
    """

    def __init__(self, of: Callable[[], Any] | None, find: Callable[[], Kept]) -> None:
        """Map what is kept, or find it out.

        Args:
            of: Says what it is made of, at this moment: what changes meanwhile is not kept. None: of few, nothing is.
            find: Looks at all entries; both picklable.
        """
        self.of: Any = None if of is None else of()
        self._now, self._find = of, find
        self._kept = self._open()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) if self.of is None else vars(self) | {"_kept": None}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        if self.of is not None:
            self._kept = self._open()

    def _open(self) -> Kept:
        if self._now is None:
            return self._find()
        path = kept_path("entries", self.of)
        found = read_kept(path, self.of)
        if found is None:
            made = self._find()
            written = self._now() == self.of and write_kept(path, self.of, made)
            found = (read_kept(path, self.of) if written else None) or made
        return found

    def __len__(self) -> int:
        return len(self._kept.arrays["hash"])

    @property
    def notes(self) -> Mapping[str, Any]:
        """What else was found out."""
        return self._kept.notes

    @property
    def odd(self) -> dict[int, str]:
        """What is wrong with ids, by position."""
        return {int(place): reason for place, reason in self._kept.notes["odd"].items()}

    def id_at(self, index: int) -> str:
        """One id."""
        return self._ids(index, index + 1)[0]

    def ids(self) -> Iterator[str]:
        """All ids in order."""
        for start in range(0, len(self), _AT_A_TIME):
            yield from self._ids(start, min(start + _AT_A_TIME, len(self)))

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """The halves of their xxh3_128, some ids at a time, u8 ``[n, 2]``."""
        for start in range(0, len(self), _AT_A_TIME):
            yield self._kept.arrays["hash"][start : start + _AT_A_TIME]

    def _ids(self, start: int, stop: int) -> list[str]:
        ends = self._kept.arrays["id_at"][start : stop + 1].tolist()
        data = self._kept.arrays["ids"][ends[0] : ends[-1]].tobytes()
        return [data[a - ends[0] : b - ends[0]].decode() for a, b in pairwise(ends)]

    def offset(self, index: int) -> int:
        """Where an entry begins in its file, or where the one before it ends."""
        return int(self._kept.arrays["offset"][index])
