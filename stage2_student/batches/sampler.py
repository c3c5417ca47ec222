"""The order of training: a pure function of seed and epoch, read shard by shard.

Reading a million records in random order costs a seek and a decompression each; reading shards in
sequence trains on neighbours. The middle way: shuffle the shards, then shuffle the samples inside a window of
consecutive shards, so that only ``window`` shards are open at a time. The whole state is **one number, the
samples consumed**, so that a run resumes exactly, with another number of processes too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import ConfigError

Indices = NDArray[np.int64]


def epoch_order(shards: Sequence[Indices], *, seed: int, epoch: int, window: int, number: int = 0) -> Indices:
    """Shuffle shards, then the samples inside each window of ``window`` shards.

    Args:
        window: Shards whose samples are mixed, at least 1; a reader needs that many shards open.
        number: Of the pass, where an epoch has several.

    Returns:
        Every index exactly once, int64 ``[sum n_i]``; the same for the same arguments on every process.
    """
    mixed = _mixed_windows(shards, _generator(seed, epoch, number), window)
    return np.concatenate([np.zeros(0, dtype=np.int64), *mixed])


def _mixed_windows(shards: Sequence[Indices], generator: np.random.Generator, window: int) -> Iterator[Indices]:
    """The samples of each window of shards, shuffled."""
    for chosen in _shard_windows(shards, generator, window):
        yield generator.permutation(np.concatenate([shards[i] for i in chosen]))


def _generator(seed: int, epoch: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, epoch, number] if number else [seed, epoch])


def _shard_windows(shards: Sequence[Indices], generator: np.random.Generator, window: int) -> list[Indices]:
    """The shards that hold samples, in a new order, cut into windows."""
    filled = np.flatnonzero([len(shard) for shard in shards])
    order = filled[generator.permutation(len(filled))]
    return [order[start : start + window] for start in range(0, len(order), window)]


@dataclass(frozen=True, kw_only=True)
class ShardShuffle:
    """The endless stream of sample indices: epoch after epoch, each in its own order.

    Attributes:
        shards: Sample indices of each shard, int64 ``[n_i]``; empty shards are allowed, not all of them.
        repeats: How often each sample is seen in an epoch, int64 by its index; None: once. An epoch then has as many
            passes over the shards as the most frequent sample, and a sample's repeats are spread over these.
        length: Samples of an epoch, with their repeats.
    """

    shards: Sequence[Indices]
    seed: int
    window: int = 8
    repeats: Indices | None = None
    length: int = field(init=False)

    def __post_init__(self) -> None:
        length = sum(len(shard) if self.repeats is None else int(self.repeats[shard].sum()) for shard in self.shards)
        if length == 0:
            raise ConfigError("no sample to train on: every shard of the cache is empty or failed in stage one")
        if self.window < 1:
            raise ConfigError(f"shuffle_window is {self.window} shards; use 1 or more")
        object.__setattr__(self, "length", length)
        # The current and the next epoch: a step may take from both.
        object.__setattr__(self, "_order", lru_cache(maxsize=2)(self._shuffled))
        object.__setattr__(self, "_windows", lru_cache(maxsize=2)(self._shard_windows))

    def _shuffled(self, epoch: int) -> NDArray[np.integer[Any]]:
        """An epoch's order, in 4 bytes a sample where their numbers allow: each process of a run holds one, or two."""
        largest = max(int(shard.max()) for shard in self.shards if len(shard))
        order = np.empty(self.length, dtype=np.min_scalar_type(max(largest, 1 << 16)))
        at = 0
        for number, shards in enumerate(self._passes(epoch)):
            for mixed in _mixed_windows(shards, _generator(self.seed, epoch, number), self.window):
                order[at : at + len(mixed)] = mixed
                at += len(mixed)
        return order

    def _passes(self, epoch: int) -> list[Sequence[Indices]]:
        """The shards of each pass over them in an epoch."""
        if self.repeats is None:
            return [self.shards]
        most = int(self.repeats.max())
        # Repeat j of c falls into pass floor((j + u) * most / c), u random: never two into one, each pass alike.
        unit = 1 << 20
        offsets = np.random.default_rng([self.seed, epoch, unit]).integers(unit, size=len(self.repeats))
        seen = np.zeros((most, len(self.repeats)), dtype=bool)
        for repeat in range(most):
            places = np.flatnonzero(self.repeats > repeat)
            seen[(repeat * unit + offsets[places]) * most // (self.repeats[places] * unit), places] = True
        return [[shard[row[shard]] for shard in self.shards] for row in seen]

    def _shard_windows(self, epoch: int) -> tuple[list[Indices], Indices]:
        """An epoch's windows of shards, and how many samples are consumed at the end of each."""
        windows: list[Indices] = []
        sizes: list[int] = []
        for number, shards in enumerate(self._passes(epoch)):
            found = _shard_windows(shards, _generator(self.seed, epoch, number), self.window)
            windows += found
            sizes += [sum(len(shards[shard]) for shard in chosen) for chosen in found]
        return windows, np.cumsum(sizes, dtype=np.int64)

    def upcoming(self, consumed: int, until: int) -> list[int]:
        """The shards of the window after the one that the next sample comes from: worth fetching now.

        Args:
            until: Samples consumed when all is done; a window that begins then or later is not needed.
        """
        epoch, offset = divmod(consumed, self.length)
        windows, ends = self._windows(epoch)  # type: ignore[attr-defined]
        following = int(np.searchsorted(ends, offset, side="right")) + 1
        if epoch * self.length + int(ends[following - 1]) >= until:
            return []
        if following == len(windows):
            windows, following = self._windows(epoch + 1)[0], 0  # type: ignore[attr-defined]
        return [int(shard) for shard in windows[following]]

    def take(self, consumed: int, count: int) -> Indices:
        """The next ``count`` sample indices after ``consumed`` ones, int64 ``[count]``, crossing epochs."""
        parts: list[Indices] = []
        position, left = consumed, count
        while left > 0:
            epoch, offset = divmod(position, self.length)
            part = self._order(epoch)[offset : offset + left]  # type: ignore[attr-defined]
            parts.append(part.astype(np.int64))
            position, left = position + len(part), left - len(part)
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def micro_batch_count(batch_size: int, *, world_size: int, micro_batch_size: int | None) -> int:
    """Micro-batches each process runs in one optimizer step."""
    if batch_size < world_size:
        raise ConfigError(
            f"batch_size is {batch_size} samples for {world_size} processes: each needs one; "
            f"raise batch_size to {world_size} or start fewer processes"
        )
    each = -(-batch_size // world_size)
    return 1 if micro_batch_size is None else min(-(-each // micro_batch_size), batch_size // world_size)


def split_step(indices: Indices, *, rank: int, world_size: int, micro_batches: int) -> list[Indices]:
    """One process's share of a step's samples, as micro-batches.

    All parts of all processes together are the step's samples, each once, and sizes differ by one at most:
    which samples a step sees never depends on how many processes run it.
    """
    parts = np.array_split(indices, world_size * micro_batches)
    return parts[rank * micro_batches : (rank + 1) * micro_batches]
