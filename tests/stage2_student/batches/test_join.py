"""Joining a cache with a data set finds what a dictionary of all ids finds, and refuses what it refuses."""

import re
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.batches.dataset import (
    join_cache,
    merged_fingerprints,
    missing_samples,
    splits_and_limits,
)
from vlm_distill_cache.stage2_student.training.preparation import open_cached_data


class ListOfIds:
    name = "list"

    def __init__(self, sample_ids):
        self.sample_ids = sample_ids

    def __len__(self):
        return len(self.sample_ids)


class CacheOfIds:
    """What joining needs of a cache, the slow way."""

    path = "folder"

    def __init__(self, shards, parts=None):
        self.sample_ids = [name for shard in shards for name in shard]
        self.place = "folder"
        self.manifest = SimpleNamespace(shards=[SimpleNamespace(samples=len(shard)) for shard in shards])
        self.plan = SimpleNamespace(teacher={}, data={} if parts is None else {"parts": parts})

    def __len__(self):
        return len(self.sample_ids)

    def places_in(self, sample_ids):
        return np.array([sample_ids.index(name) if name in sample_ids else -1 for name in self.sample_ids], np.int64)


@st.composite
def joins(draw):
    ids = draw(st.lists(st.text(max_size=3), unique=True, min_size=1, max_size=12))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=3)))
    edges = [0, *cuts, len(ids)]
    shards = [ids[a:b] for a, b in pairwise(edges)]
    strangers = draw(st.lists(st.text(max_size=3).map("new ".__add__), unique=True, max_size=3))
    data = draw(st.permutations([*draw(st.lists(st.sampled_from(ids), unique=True)), *strangers]))
    return shards, data if draw(st.booleans()) else draw(st.permutations([*ids, *strangers]))


@given(joins(), st.none() | st.integers(1, 14), st.booleans())
def test_a_join_is_what_a_dictionary_gives(case, limit, merged):
    shards, data = case
    cache = CacheOfIds(shards, parts=[{"fingerprint": "a"}] if merged else None)
    where = {name: i for i, name in enumerate(data)}
    wanted = [name for name in cache.sample_ids if not merged or name in where][:limit]
    missing = [name for name in wanted if name not in where]
    if missing or not wanted:
        first = missing[0] if missing else cache.sample_ids[0]
        count = len(missing) or len(cache)
        message = f"{count} of the {len(wanted) or len(cache)} samples in folder are not in.* first is {first!r}"
        with pytest.raises(CacheMismatchError, match=re.escape(message).replace(r"\.\*", "(.|\n)*")):
            join_cache(cache, ListOfIds(data), limit=limit)
        return
    join = join_cache(cache, ListOfIds(data), limit=limit)
    assert join.sample_ids == wanted
    assert join.places.tolist() == [where[name] for name in wanted]
    assert len(join.shards) == len(shards)
    assert np.concatenate(join.shards).tolist() == list(range(len(wanted)))
    for positions, shard in zip(join.shards, shards, strict=True):
        assert [join.sample_ids[i] for i in positions] == [name for name in shard if name in wanted]


def test_missing_samples_are_counted_and_the_first_is_named():
    cache = CacheOfIds([["a", "b"], ["c"]])
    assert missing_samples(cache, ["c", "x"]) == (2, "a")
    assert missing_samples(cache, ["c", "b", "a"]) == (0, "")


def test_parts_that_are_none_are_no_parts():
    assert merged_fingerprints(CacheOfIds([["a"]])) == ()
    assert merged_fingerprints(CacheOfIds([["a"]], parts="text")) == ()
    assert merged_fingerprints(CacheOfIds([["a"]], parts=[3, {"fingerprint": "f"}])) == ("f",)


def merged_of(*limits):
    parts = [
        {
            "name": (data := open_dataset("shapes:images=9", limit=limit)).name,
            "fingerprint": data.fingerprint(),
            "limit": limit or 0,
            "samples": len(data),
            "split": "train",
        }
        for limit in limits
    ]
    return CacheOfIds([["a"]], parts=parts)


@pytest.mark.parametrize(("limits", "opened"), [((4, 6), 6), ((6, 4), 6), ((4, None), None), ((5, 5), 5)])
def test_a_merge_of_parts_of_one_data_set_is_trained_on_the_largest(limits, opened):
    cache = merged_of(*limits)
    data = open_cached_data(cache, data="shapes:images=9", images=None)
    assert len(data) == len(open_dataset("shapes:images=9", limit=opened))
    assert data.fingerprint() in merged_fingerprints(cache)


def test_split_and_limit_are_those_of_the_build_where_nothing_was_merged():
    cache = CacheOfIds([["a"]])
    assert splits_and_limits(cache) == [("train", None)]
    cache.plan.data = {"split": "test", "limit": 3}
    assert splits_and_limits(cache) == [("test", 3)]
