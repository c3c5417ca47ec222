"""Which records stand for a cache: all of a small one, evenly spaced ones of evenly spaced shards of a large one."""

from itertools import pairwise

import pytest
from cache_factory import assert_equal_records, build_cache, make_plan

from vlm_distill_cache.common.cache.spaced import spaced_places, spaced_records, spaced_unsealed
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.opening import open_cache


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_small_cache_is_looked_at_whole_sealed_or_not(tmp_path, store):
    build_cache(tmp_path / "cache", make_plan(store))
    cache = open_cache(tmp_path / "cache")
    sealed = list(spaced_records(cache, ("labels", "visual_columns")))
    assert [name for name, _ in sealed] == list(cache)
    for (name, record), (other, same) in zip(
        sealed, spaced_unsealed(cache.path, cache.plan, ("labels", "visual_columns")), strict=True
    ):
        assert name == other
        assert_equal_records(record, same)
        whole = cache.read(name)
        assert_equal_records(record, {field: whole[field] for field in record})
    few = [name for name, _ in spaced_records(cache, ("labels",), most=3)]
    assert few == [list(cache)[place] for place in (0, 3, 6)]


def test_damage_is_found_before_anything_is_read_of_it(tmp_path):
    build_cache(tmp_path / "cache", make_plan("webdataset"))
    cache = open_cache(tmp_path / "cache")
    [shard] = (tmp_path / "cache" / "shards").glob("00001*.tar")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    records = spaced_unsealed(cache.path, cache.plan, ("labels",))
    assert [next(records)[0] for _ in range(3)] == list(cache)[:3]
    with pytest.raises(CacheFormatError, match="cachectl repair"):
        next(records)


def test_places_are_even_bounded_and_skip_empty_shards():
    assert spaced_places([0, 0]) == []
    assert spaced_places([2, 0, 3], most=5) == [(0, [0, 1]), (2, [0, 1, 2])]
    large = spaced_places([256] * 5000, most=2048)
    assert len(large) == 64
    assert sum(len(inside) for _, inside in large) == 2048
    shards = [shard for shard, _ in large]
    assert {after - before for before, after in pairwise(shards)} <= {78, 79}
    small = spaced_places([4] * 5000, most=2048)  # shards of four records: as many as hold so many
    assert len(small) == 512
    assert all(inside == [0, 1, 2, 3] for _, inside in small)
