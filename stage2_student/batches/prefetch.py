"""Background loading: batches are encoded and decoded by threads while the student computes.

Threads, not worker processes: the heavy parts (image decoding and resizing, tokenising, decompression, array
arithmetic) release the interpreter lock, samples kept in memory are shared rather than copied per process,
and nothing is forked (Rust-backed readers deadlock after a fork). One thread is enough for the built-in
data; it costs no core while the queue is full.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Yields ``load(start)``, ..., ``load(stop - 1)`` in order, computed ahead by threads.

    Use as a context manager; leaving it cancels what has not begun. An error in ``load`` is raised where its
    item would have been yielded.

    Attributes:
        waited: Seconds the consumer has spent waiting for items so far.
    """

    def __init__(self, load: Callable[[int], Item], start: int, stop: int, *, num_workers: int, depth: int = 2) -> None:
        """Start loading.

        Args:
            load: Makes item ``i``; called from several threads at once.
            num_workers: Threads; 0 loads on the caller's thread, when asked.
            depth: Items kept ready for each thread.
        """
        self.waited = 0.0
        self._load = load
        self._next, self._stop = start, stop
        self._pool = ThreadPoolExecutor(num_workers, "prefetch") if num_workers > 0 else None
        self._ahead = num_workers * depth
        self._queue: deque[Future[Item]] = deque()
        self._fill()

    def _fill(self) -> None:
        while self._pool is not None and self._next < self._stop and len(self._queue) < self._ahead:
            self._queue.append(self._pool.submit(self._load, self._next))
            self._next += 1

    def __enter__(self) -> "Prefetcher[Item]":
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Item]:
        while self._queue or self._next < self._stop:
            began = time.perf_counter()
            if self._pool is None:
                item = self._load(self._next)
                self._next += 1
            else:
                item = self._queue.popleft().result()
                self._fill()
            self.waited += time.perf_counter() - began
            yield item
