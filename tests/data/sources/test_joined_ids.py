"""Ids of several data sets, which nobody holds, are those that a list of all of them would be made into."""

import pickle
import random
from collections import Counter

import numpy as np
import pytest

from vlm_distill_cache.common.cache.index import hash_ids
from vlm_distill_cache.data.sample import Values, number_repeats
from vlm_distill_cache.data.sources.kept import ids as kept_ids
from vlm_distill_cache.data.sources.kept.ids import JoinedIds, tell_apart
from vlm_distill_cache.data.sources.mixture import deal

NAMES = ["m", "n", "m#2"]
TEXTS = ["a", "b", "é", "a#2", "a#3", "m/a", "m/a#2", "n/a", "m#2/a", "\ud83d", "", *"cdefghijk"]


class Known(Values):
    """Ids that know their hashes, as kept ones do."""

    def __init__(self, ids):
        self._ids = ids

    def __len__(self):
        return len(self._ids)

    def at(self, index):
        return self._ids[index]

    def hashes(self):
        for start in range(0, len(self), 2):
            yield np.stack(hash_ids(self._ids[start : start + 2]), axis=1)


def expected_ids(members, names):
    if names is not None:
        holders = Counter(name for ids in members for name in ids)
        members = [
            [f"{name}/{i}" if holders[i] > 1 else i for i in ids] for name, ids in zip(names, members, strict=True)
        ]
    return number_repeats([name for ids in members for name in ids])


def joined(members, names, order):
    sizes = [len(ids) for ids in members]
    owners = np.repeat(np.arange(len(sizes)), sizes)
    places = np.concatenate([np.arange(size) for size in sizes]).astype(np.int64)
    return JoinedIds(tell_apart(members, names), owners[order], places[order])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("dealt", [True, False])
@pytest.mark.parametrize("known", [True, False])
def test_joined_ids_are_those_of_a_list_of_all(named, dealt, known):
    draw = random.Random(f"{named} {dealt} {known}")
    for _ in range(60):  # some with repeats of their own
        members = [draw.choices(TEXTS, k=draw.randrange(dealt, 9)) for _ in range(draw.randrange(1, 4))]
        check(members, names=NAMES[: len(members)] if named else None, dealt=dealt, known=known)


def check(members, *, names, dealt, known):
    """Compare joined ids with a list of all."""
    order = deal([len(ids) for ids in members]) if dealt else np.arange(sum(map(len, members)))
    all_ids = expected_ids(members, names)
    expected = [all_ids[place] for place in order.tolist()]
    ids = joined([Known(i) for i in members] if known else members, names, order)
    for found in (ids, pickle.loads(pickle.dumps(ids))):  # noqa: S301 - made here
        assert (len(found), list(found), found[:]) == (len(expected), expected, expected)
        assert [found.index(name) for name in expected] == list(range(len(expected)))
        hashes = np.concatenate([np.empty((0, 2), np.uint64), *found.hashes()])
        assert (hashes == np.stack(hash_ids(expected), axis=1)).all()


@pytest.mark.parametrize("at_a_time", [1, 3, 7])
def test_parts_of_any_size_are_the_same(monkeypatch, at_a_time):
    monkeypatch.setattr(kept_ids, "_AT_A_TIME", at_a_time)
    members = [[f"{i % 7}" for i in range(20)], [f"{i}" for i in range(11)], ["5#2", "n/4", "6"]]
    all_ids = expected_ids(members, NAMES)
    order = deal([20, 11, 3])
    ids = joined(members, NAMES, order)
    assert list(ids) == [all_ids[place] for place in order.tolist()]
    hashes = np.concatenate([*ids.hashes()])
    assert (hashes == np.stack(hash_ids(ids[:]), axis=1)).all()


def test_equal_upper_halves_of_hashes_are_no_repeats(monkeypatch):
    real = kept_ids.hash_ids

    def half_alike(ids):
        high, low = real(ids)
        return np.zeros_like(high), low

    monkeypatch.setattr(kept_ids, "hash_ids", half_alike)
    assert [[*ids] for ids in tell_apart([["a", "b"], ["b", "c"]], ["m", "n"])] == [["a", "m/b"], ["n/b", "c"]]
    members = [["a", "b"], ["c"]]
    assert all(one is other for one, other in zip(tell_apart(members), members, strict=True))


def test_an_index_is_looked_for_where_it_is_asked_for():
    ids = joined([["a", "b", "a"]], None, np.arange(3))
    assert (ids.index("a"), ids.index("a#2", 1), "b" in ids, "c" in ids) == (0, 2, True, False)
    for start, stop in ((1, None), (1, 2), (-2, None)):
        with pytest.raises(ValueError, match="'a' is not there"):
            ids.index("a", start, stop)
