"""The parts of a mixture that have a cache each, as one: what `train()` reads instead of a single `CachedDataset`."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.attention.layers import Groups
from vlm_distill_cache.data.sample import Weighting
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch, TrainingSample
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset, LiveTeacher


class UnitedDataset:
    """Data sets, each joined with its cache, one after another; attributes as of `CachedDataset`."""

    def __init__(self, parts: Sequence[CachedDataset], weights: Sequence[float]) -> None:
        """Unite; ``weights``: how often the samples of each part are seen in an epoch."""
        self._parts, self._weights = list(parts), tuple(weights)
        self._starts = [0, *accumulate(len(part) for part in parts)]
        self.sample_ids = [sample_id for part in parts for sample_id in part.sample_ids]
        self.shards = [shard + start for part, start in zip(parts, self._starts, strict=False) for shard in part.shards]
        self.failed = sum(part.failed for part in parts)
        self.left_out = {name: reason for part in parts for name, reason in part.left_out.items()}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def entries_read(self) -> int:
        """Cached logit entries decoded so far."""
        return sum(part.entries_read for part in self._parts)

    @property
    def entries_beyond(self) -> int:
        """Those of them whose token has no row in the student."""
        return sum(part.entries_beyond for part in self._parts)

    def repeats(self, seed: int) -> NDArray[np.int64] | None:
        """How often each sample is seen in an epoch, int64 by position; None: once."""
        if set(self._weights) == {1.0}:
            return None
        parts = np.repeat(np.arange(len(self._parts)), [len(part) for part in self._parts])
        return Weighting(parts, self._weights).repeats(seed)

    def has_pictures(self) -> bool:
        """Whether any sample has a picture."""
        return any(part.has_pictures() for part in self._parts)

    def first_picture(self) -> int | None:
        """The position of the first sample with a picture; None if there is none."""
        for part, start in zip(self._parts, self._starts, strict=False):
            if (place := part.first_picture()) is not None:
                return place + start
        return None

    def student_groups(self, depth: int) -> Groups:
        """The layers of a student that meet the groups of its batches."""
        return self._parts[0].student_groups(depth)

    def load(self, position: int) -> TrainingSample:
        """Encode and decode one sample."""
        number = int(np.searchsorted(self._starts, position, side="right")) - 1
        return self._parts[number].load(position - self._starts[number])

    def live(self, positions: Sequence[int], teacher: LiveTeacher) -> list[TrainingSample]:
        """As `CachedDataset.live`."""
        owners = np.searchsorted(self._starts, positions, side="right") - 1
        made: dict[int, TrainingSample] = {}
        for number in np.unique(owners):
            chosen = [place for place, owner in zip(positions, owners, strict=True) if owner == number]
            start = self._starts[number]
            made |= zip(chosen, self._parts[number].live([place - start for place in chosen], teacher), strict=True)
        return [made[place] for place in positions]

    def collate(self, samples: Sequence[TrainingSample]) -> TrainingBatch:
        """Join samples to a micro-batch."""
        return self._parts[0].collate(samples)

    def batch(self, positions: Iterable[int]) -> TrainingBatch:
        """Load and collate a micro-batch."""
        return self.collate([self.load(int(position)) for position in positions])
