"""Ids of samples that nobody holds: they are read from what is kept, when they are asked for, of several data sets too."""

import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress, islice
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.index import hash_ids
from vlm_distill_cache.data.sample import Values

_AT_A_TIME = 1 << 16  # ids
_NUMBERED = re.compile(r"#\d+\Z")


class KnowsIds(Protocol):
    """What is kept of samples, their ids among it."""

    def __len__(self) -> int: ...

    def id_at(self, index: int) -> str:
        """One id."""
        ...

    def ids(self) -> Iterator[str]:
        """All ids in order."""
        ...

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """The halves of their xxh3_128, some ids at a time, u8 ``[n, 2]``."""
        ...


class KeptIds(Values[str]):
    """The ids of such samples."""

    def __init__(self, kept: KnowsIds) -> None:
        self._kept = kept

    def __len__(self) -> int:
        return len(self._kept)

    def at(self, index: int) -> str:
        """One id."""
        return self._kept.id_at(index)

    def __iter__(self) -> Iterator[str]:
        return self._kept.ids()

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """The halves of their xxh3_128, some ids at a time, u8 ``[n, 2]``."""
        return self._kept.hashes()


class JoinedIds(Values[str]):
    """The ids of several data sets in any order that keeps the order of each."""

    def __init__(self, ids: Sequence[Sequence[str]], parts: NDArray[np.int64], places: NDArray[np.int64]) -> None:
        """Join.

        Args:
            parts: Which data set each is from, int64 ``[n]``.
            places: Its position there, int64 ``[n]``.
        """
        self._ids, self._parts, self._places = ids, parts, places

    def __len__(self) -> int:
        return len(self._parts)

    def at(self, index: int) -> str:
        """One id."""
        return self._ids[int(self._parts[index])][int(self._places[index])]

    def __iter__(self) -> Iterator[str]:
        of_each = [iter(ids) for ids in self._ids]
        for start in range(0, len(self), _AT_A_TIME):
            for part in self._parts[start : start + _AT_A_TIME].tolist():
                yield next(of_each[part])

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """The halves of their xxh3_128, some ids at a time, u8 ``[n, 2]``."""
        of_each = [_Hashes(ids) for ids in self._ids]
        for start in range(0, len(self), _AT_A_TIME):
            parts = self._parts[start : start + _AT_A_TIME]
            found = np.empty((len(parts), 2), np.uint64)
            for part in np.unique(parts).tolist():
                mine = parts == part
                found[mine] = of_each[part].take(int(mine.sum()))
            yield found


class _ChangedIds(Values[str]):
    """The ids of a data set, some of them changed: those that are marked by another number than 0."""

    def __init__(self, ids: Sequence[str], marks: NDArray[Any]) -> None:
        self._ids, self._marks = ids, marks

    @abstractmethod
    def change(self, sample_id: str, mark: int) -> str:
        """What an id becomes."""

    def __len__(self) -> int:
        return len(self._ids)

    def at(self, index: int) -> str:
        """One id."""
        mark = int(self._marks[index])
        return self.change(self._ids[index], mark) if mark else self._ids[index]

    def __iter__(self) -> Iterator[str]:
        remaining = iter(self._ids)
        for start in range(0, len(self), _AT_A_TIME):
            for mark in self._marks[start : start + _AT_A_TIME].tolist():
                sample_id = next(remaining)
                yield self.change(sample_id, mark) if mark else sample_id

    def hashes(self) -> Iterator[NDArray[np.uint64]]:
        """The halves of their xxh3_128, some ids at a time, u8 ``[n, 2]``."""
        own = _Hashes(self._ids)
        for start in range(0, len(self), _AT_A_TIME):
            marked = np.flatnonzero(self._marks[start : start + _AT_A_TIME])
            found = own.take(min(_AT_A_TIME, len(self) - start)).copy()
            found[marked] = np.stack(hash_ids(self.at(start + place) for place in marked.tolist()), axis=1)
            yield found


class _NamedIds(_ChangedIds):
    def __init__(self, ids: Sequence[str], marks: NDArray[Any], name: str) -> None:
        super().__init__(ids, marks)
        self._name = name

    def change(self, sample_id: str, mark: int) -> str:
        return f"{self._name}/{sample_id}"


class _NumberedIds(_ChangedIds):
    def change(self, sample_id: str, mark: int) -> str:
        return f"{sample_id}#{mark}"


class _Hashes:
    """The hashes of ids, in order."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._parts = _hashes_of(ids)
        self._left = np.empty((0, 2), np.uint64)

    def take(self, count: int) -> NDArray[np.uint64]:
        """The next ones, u8 ``[count, 2]``."""
        while len(self._left) < count:
            self._left = np.concatenate([self._left, next(self._parts)])
        taken, self._left = self._left[:count], self._left[count:]
        return taken


def _hashes_of(ids: Iterable[str]) -> Iterator[NDArray[np.uint64]]:
    """Some at a time, u8 ``[n, 2]``; of ids that know their hashes none is made."""
    if known := getattr(ids, "hashes", None):
        yield from known()
        return
    remaining = iter(ids)
    while some := list(islice(remaining, _AT_A_TIME)):
        yield np.stack(hash_ids(some), axis=1)


def tell_apart(ids: Sequence[Sequence[str]], names: Sequence[str] | None = None) -> list[Sequence[str]]:
    """Make the ids of several data sets unique, as `data.sample.number_repeats` would of all of them, one after another.

    Args:
        names: Of each data set: an id that occurs more than once gets it in front, and a number only if that is an id, too.
    """
    repeated = _repeated(ids)
    if repeated is None:
        return [*ids]
    ends = np.cumsum([len(own) for own in ids])[:-1]
    if names is not None:
        ids = [_NamedIds(*own) for own in zip(ids, np.split(repeated, ends), names, strict=True)]
        repeated = _repeated(ids)
        if repeated is None:
            return [*ids]
    numbers = _numbers(ids, repeated)
    return [_NumberedIds(*own) for own in zip(ids, np.split(numbers, ends), strict=True)]


def _repeated(ids: Sequence[Sequence[str]]) -> NDArray[np.bool_] | None:
    """Which ids, one data set after another, occur more than once, bool ``[n]``; None: none does.

    Eight bytes an id are held meanwhile, and more only where an upper half of their hashes occurs more than once.
    """
    high = _half(ids, 0)
    high.sort()
    if not (high[1:] == high[:-1]).any():
        return None
    high, low = _half(ids, 0), _half(ids, 1)
    order = np.lexsort((low, high))
    same = (np.diff(high[order]) == 0) & (np.diff(low[order]) == 0)
    found = np.zeros(len(order), np.bool_)
    found[order[1:][same]] = found[order[:-1][same]] = True
    return found if found.any() else None


def _half(ids: Sequence[Sequence[str]], which: int) -> NDArray[np.uint64]:
    """The upper (0) or lower (1) halves of all hashes, u8 ``[n]``."""
    found = np.empty(sum(map(len, ids)), np.uint64)
    at = 0
    for part in chain.from_iterable(map(_hashes_of, ids)):
        found[at : at + len(part)] = part[:, which]
        at += len(part)
    return found


def _numbers(ids: Sequence[Sequence[str]], repeated: NDArray[np.bool_]) -> NDArray[np.uint32]:
    """The number behind each id, one data set after another, u4 ``[n]``; 0: none."""
    numbers = np.zeros(len(repeated), np.uint32)
    # What a number makes of an id can only meet one that ends in a number.
    taken = {sample_id for sample_id in chain.from_iterable(ids) if _NUMBERED.search(sample_id)}
    seen = Counter[str]()
    chosen = zip(np.flatnonzero(repeated).tolist(), compress(chain.from_iterable(ids), repeated), strict=True)
    for position, sample_id in chosen:
        seen[sample_id] += 1
        if seen[sample_id] > 1:
            while (numbered := f"{sample_id}#{seen[sample_id]}") in taken:
                seen[sample_id] += 1
            taken.add(numbered)
            numbers[position] = seen[sample_id]
    return numbers
