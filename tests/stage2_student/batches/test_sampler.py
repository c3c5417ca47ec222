"""The order of training: a function of seed and epoch alone, and of nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage2_student.batches.sampler import ShardShuffle, epoch_order, micro_batch_count, split_step


def make_shards(*sizes: int):
    bounds = np.cumsum([0, *sizes])
    return [np.arange(a, b, dtype=np.int64) for a, b in pairwise(bounds)]


@given(st.lists(st.integers(0, 7), min_size=1, max_size=9), st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_every_epoch_visits_each_sample_once(sizes, epoch, window):
    order = epoch_order(make_shards(*sizes), seed=1, epoch=epoch, window=window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_epochs_and_seeds_give_different_orders_and_the_same_arguments_the_same():
    shards = make_shards(16, 16, 16)
    first = epoch_order(shards, seed=1, epoch=0, window=2)
    assert np.array_equal(first, epoch_order(shards, seed=1, epoch=0, window=2))
    assert not np.array_equal(first, epoch_order(shards, seed=1, epoch=1, window=2))
    assert not np.array_equal(first, epoch_order(shards, seed=2, epoch=0, window=2))


def test_only_a_window_of_shards_is_open_at_a_time():
    shards = make_shards(*[10] * 6)
    order = epoch_order(shards, seed=3, epoch=0, window=2)
    for start in range(0, 60, 20):
        assert len({index // 10 for index in order[start : start + 20].tolist()}) == 2


def test_samples_are_mixed_inside_a_window():
    order = epoch_order(make_shards(32, 32), seed=0, epoch=0, window=2)
    first_half = [index // 32 for index in order[:32].tolist()]
    assert 8 < sum(first_half) < 24


@given(st.integers(0, 100), st.lists(st.integers(1, 17), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_taking_in_pieces_equals_taking_at_once_whatever_the_pieces(start, pieces):
    shuffle = ShardShuffle(shards=make_shards(5, 3, 4), seed=7, window=2)
    whole = shuffle.take(start, sum(pieces))
    parts, position = [], start
    for piece in pieces:
        parts.append(shuffle.take(position, piece))
        position += piece
    assert np.array_equal(np.concatenate(parts), whole)


def test_the_stream_is_epoch_after_epoch():
    shards = make_shards(5, 3)
    shuffle = ShardShuffle(shards=shards, seed=7, window=1)
    expected = np.concatenate([epoch_order(shards, seed=7, epoch=epoch, window=1) for epoch in range(3)])
    assert np.array_equal(shuffle.take(0, 24), expected)


def test_an_epochs_order_is_held_in_four_bytes_a_sample_and_given_as_it_was():
    shards = [np.arange(at, at + 40, dtype=np.int64) for at in (0, 70_000, 1 << 31)]
    shuffle = ShardShuffle(shards=shards, seed=7, window=2, repeats=None)
    taken = shuffle.take(0, 120)
    assert taken.dtype == np.int64
    assert np.array_equal(taken, epoch_order(shards, seed=7, epoch=0, window=2))
    assert shuffle._shuffled(0).itemsize == 4
    beyond = ShardShuffle(shards=[np.array([1 << 32, 5])], seed=7)
    assert sorted(beyond.take(0, 2).tolist()) == [5, 1 << 32]


@pytest.mark.parametrize(("world_size", "micro_batches"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1), (4, 2)])
def test_a_step_sees_the_same_samples_whatever_the_number_of_processes(world_size, micro_batches):
    indices = np.arange(100, 113)
    parts = [
        part
        for rank in range(world_size)
        for part in split_step(indices, rank=rank, world_size=world_size, micro_batches=micro_batches)
    ]
    assert np.array_equal(np.concatenate(parts), indices)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def test_micro_batches_respect_the_limit_of_one_forward_pass():
    assert micro_batch_count(16, world_size=1, micro_batch_size=None) == 1
    assert micro_batch_count(16, world_size=1, micro_batch_size=4) == 4
    assert micro_batch_count(16, world_size=2, micro_batch_size=3) == 3
    assert micro_batch_count(3, world_size=3, micro_batch_size=1) == 1


def test_more_processes_than_samples_is_refused_with_the_remedy():
    with pytest.raises(ConfigError, match=r"batch_size is 2 samples for 3 processes.*raise batch_size to 3"):
        micro_batch_count(2, world_size=3, micro_batch_size=None)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ConfigError, match="no sample to train on"):
        ShardShuffle(shards=[], seed=0)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
def test_what_is_upcoming_is_what_the_next_window_reads(window):
    sizes = [3, 0, 2, 4, 1, 0, 5]
    ends = np.cumsum([0, *sizes])
    shards = np.split(np.arange(ends[-1]), ends[1:-1])
    shuffle = ShardShuffle(shards=shards, seed=5, window=window)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    until = 3 * shuffle.length
    read = owner[shuffle.take(0, until)]  # which shard each sample comes from
    starts, chosen = [0], set()
    for position, shard in enumerate(read.tolist()):  # a window ends when all of its shards have been read whole
        chosen.add(shard)
        whole = sum(sizes[i] for i in chosen) == position + 1 - starts[-1]
        if whole and (len(chosen) == window or (position + 1) % shuffle.length == 0):
            starts.append(position + 1)
            chosen = set()
    for consumed in range(until):
        later = [start for start in starts if start > consumed]
        expected = set(read[later[0] : later[1]].tolist()) if len(later) > 1 else set()
        assert set(shuffle.upcoming(consumed, until)) == expected, consumed
    assert shuffle.upcoming(0, int(starts[1])) == []


repeated = st.lists(st.lists(st.integers(0, 4), max_size=6), min_size=1, max_size=6).filter(lambda s: any(map(any, s)))


@given(repeated, st.integers(0, 3), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_epoch_visits_each_sample_as_often_as_asked(repeats, epoch, window):
    shards = make_shards(*map(len, repeats))
    counts = np.array([count for shard in repeats for count in shard])
    shuffle = ShardShuffle(shards=shards, seed=2, window=window, repeats=counts)
    assert shuffle.length == counts.sum()
    order = shuffle.take(epoch * shuffle.length, shuffle.length)
    assert np.array_equal(np.bincount(order, minlength=len(counts)), counts)
    # Each pass over the shards has no sample twice; a sample seen as often as there are passes is in each of them.
    passes = shuffle._passes(epoch)
    assert len(passes) == counts.max()
    for shards_of_pass in passes:
        seen = np.concatenate(shards_of_pass)
        assert len(set(seen.tolist())) == len(seen)
        assert set(np.flatnonzero(counts == counts.max())) <= set(seen.tolist())


def test_repeats_are_spread_over_the_epoch():
    counts = np.array([1] * 200 + [4] * 50)
    shuffle = ShardShuffle(shards=make_shards(100, 100, 50), seed=0, window=3, repeats=counts)
    for quarter in np.split(shuffle.take(0, shuffle.length), 4):
        assert 30 <= (quarter < 200).sum() <= 70
        assert 40 <= (quarter >= 200).sum() <= 60


def test_each_sample_once_is_the_order_without_repeats():
    shards = make_shards(5, 3, 4)
    plain = ShardShuffle(shards=shards, seed=7, window=2)
    once = ShardShuffle(shards=shards, seed=7, window=2, repeats=np.ones(12, dtype=np.int64))
    assert np.array_equal(plain.take(3, 40), once.take(3, 40))


@pytest.mark.parametrize("window", [1, 2, 9])
def test_what_is_upcoming_is_what_the_next_window_reads_with_repeats(window):
    sizes = [3, 2, 4, 5]
    shards = make_shards(*sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    counts = np.array([(3 * i) % 4 for i in range(14)])
    shuffle = ShardShuffle(shards=shards, seed=5, window=window, repeats=counts)
    until = 2 * shuffle.length
    read, starts = owner[shuffle.take(0, until)], [0]
    for epoch in range(2):
        starts += [epoch * shuffle.length + end for end in shuffle._shard_windows(epoch)[1].tolist()]
    for consumed in range(until):
        later = [start for start in starts if start > consumed]
        expected = set(read[later[0] : later[1]].tolist()) if len(later) > 1 else set()
        assert set(shuffle.upcoming(consumed, until)) == expected, consumed
