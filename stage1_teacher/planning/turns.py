"""Which shards a process builds, one after the other: those of its part, or the next free one of a queue. Needs no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

from vlm_distill_cache.common.cache.manifest import Manifest, format_ranges
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import missing_shards, sidecar_path
from vlm_distill_cache.common.files.atomic import remove
from vlm_distill_cache.stage1_teacher.planning.cache_folder import intact_manifest, refuse_replaced
from vlm_distill_cache.stage1_teacher.planning.leases import SEAL, LeaseHolder
from vlm_distill_cache.stage1_teacher.planning.parts import Part

logger = logging.getLogger(__name__)

LOOK_S = (0.5, 5.0)  # between looks at what others still have: at first, and at most, but
LOOK_EACH_S = 0.02  # more where they have much: each look reads a file of each


class OwnShards:
    """The missing shards of a part, which nobody is asked for; nobody is waited for.

    Attributes:
        part: As it turned out to be.
        todo: What was missing of it at first.
    """

    def __init__(self, cache_dir: Path, plan: Plan, part: Part) -> None:
        self._cache_dir, self._plan = cache_dir, plan
        missing = missing_shards(cache_dir, plan)
        self.part = part.for_resume(missing)
        self.todo = self.part.share(missing)

    def __enter__(self) -> OwnShards:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is to be given back."""

    def rounds(self, on_others: Callable[[int], object]) -> Iterator[Iterable[int]]:
        """Shards to build, until none is missing: what another process left is done here."""
        while todo := self.part.share(missing_shards(self._cache_dir, self._plan)):
            yield todo

    def count(self, samples: int) -> None:
        """Nobody asks how far this is."""

    def sealed_by_others(self) -> Manifest | None:
        """Whoever finds no shard missing seals."""
        return None


class Queue:
    """All missing shards, each taken when it is wanted; see `OwnShards` and ``leases``.

    Attributes:
        part: Any of the shards.
        todo: What was missing at first.
    """

    def __init__(self, cache_dir: Path, plan: Plan, part: Part) -> None:
        self._cache_dir, self._plan, self.part = cache_dir, plan, part
        sealed = (cache_dir / MANIFEST).exists()  # before the shards are looked at, which others finish meanwhile
        self.todo = missing_shards(cache_dir, plan)
        if sealed and self.todo:
            remove(
                cache_dir / MANIFEST
            )  # of a cache that lost shards: nobody is to take it for sealed by another worker
        self._left = dict.fromkeys(self.todo)
        self._taken: set[int] = set()
        self._leases = LeaseHolder(cache_dir)
        self._on_others: Callable[[int], object] = lambda index: None

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        """Give back what is not finished, and remove the leases of a cache that is sealed."""
        self._leases.close()
        if (self._cache_dir / MANIFEST).is_file():
            self._leases.remove()

    def rounds(self, on_others: Callable[[int], object]) -> Iterator[Iterable[int]]:
        """Shards to build, until none is missing; while others have all that is left, this waits for them or their end.

        A round is to be built and written before the next one.

        Args:
            on_others: Called with each shard that another worker has finished, once that is seen.
        """
        self._on_others, waited = on_others, 0.0
        while True:
            for _ in self._missing():
                pass
            if not self._left:
                return
            self._leases.finish_all()
            if (first := self._take()) is None:
                waited = self._wait(
                    waited, f"other workers have all that is left (shards {format_ranges([*self._left])})"
                )
            else:
                yield chain([first], iter(self._take, None))
                waited = 0.0

    def count(self, samples: int) -> None:
        """Let others see how many more samples this process has done."""
        self._leases.count(samples)

    def sealed_by_others(self) -> Manifest | None:
        """Wait until another worker has sealed the cache, or it is for this one to do (None)."""
        waited = 0.0
        while (manifest := intact_manifest(self._cache_dir)) is None:
            if self._leases.take_first([SEAL]) is not None:
                return intact_manifest(self._cache_dir)  # who had it may have finished
            waited = self._wait(waited, "another worker seals the cache")
        return manifest

    def _take(self) -> int | None:
        while (found := self._leases.take_first(map("{:05d}".format, self._missing()))) is not None:
            index = int(found)
            if not sidecar_path(self._cache_dir, index).is_file():  # who had it may have finished
                self._taken.add(index)
                return index
        return None

    def _missing(self) -> Iterator[int]:
        for index in [*self._left]:
            if not sidecar_path(self._cache_dir, index).is_file():
                yield index
                continue
            del self._left[index]
            if index not in self._taken:
                self._on_others(index)

    def _wait(self, waited: float, why: str) -> float:
        """Sleep for a while; returns how long this wait is now."""
        if not waited:
            logger.info("%s: this one waits, and takes over where one ends without having finished", why)
        seconds = min(max(LOOK_S[0], waited / 10), LOOK_S[1]) + LOOK_EACH_S * len(self._left)
        time.sleep(seconds)
        refuse_replaced(self._cache_dir, self._plan)
        return waited + seconds


def take_turns(cache_dir: Path, plan: Plan, part: Part) -> OwnShards | Queue:
    """The shards of a process, as its part says."""
    return Queue(cache_dir, plan, part) if part.queued else OwnShards(cache_dir, plan, part)
