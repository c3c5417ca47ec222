"""Background loading changes when items are made, never which or in what order."""

import threading

import pytest

from vlm_distill_cache.stage2_student.batches.prefetch import Prefetcher


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_items_come_in_order_whatever_the_number_of_threads(num_workers):
    release = threading.Event()
    release.set()

    def load(index):
        if index % 2:  # odd items finish after even ones
            release.wait(0.001)
        return index * index

    with Prefetcher(load, 3, 12, num_workers=num_workers) as items:
        assert list(items) == [index * index for index in range(3, 12)]
        assert items.waited >= 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_is_raised_where_its_item_would_have_come(num_workers):
    def load(index):
        if index == 2:
            raise ValueError("sample 2 is broken")
        return index

    with Prefetcher(load, 0, 5, num_workers=num_workers) as items:
        seen = iter(items)
        assert [next(seen), next(seen)] == [0, 1]
        with pytest.raises(ValueError, match="sample 2 is broken"):
            next(seen)


def test_work_is_bounded_and_happens_off_the_consumers_thread():
    threads, started = set(), []

    def load(index):
        threads.add(threading.current_thread())
        started.append(index)
        return index

    with Prefetcher(load, 0, 1000, num_workers=1, depth=2) as items:
        assert next(iter(items)) == 0
    assert len(started) <= 4
    assert threading.current_thread() not in threads
