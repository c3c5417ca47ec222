"""Ids of samples that nobody holds: they are read from what is kept, when they are asked for."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.data.sample import Values


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
