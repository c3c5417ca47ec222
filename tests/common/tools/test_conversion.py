"""Conversion to the other store and back is byte-identical; what cannot be converted is refused."""

import pytest
from cache_factory import build_cache, make_plan, tree

from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.verify import verify


def test_there_and_back_is_byte_identical(whole, tmp_path):
    store = open_cache(whole).plan.store
    other = {"zarr": "webdataset", "webdataset": "zarr"}[store]
    shards = []
    convert(whole, tmp_path / "there", other, on_shard=lambda: shards.append(1))
    assert verify(tmp_path / "there", deep=True) == []
    assert (tmp_path / "there" / CARD).read_text() == f"# a card\n- Store: {other}, format version 1\n"
    manifest = convert(tmp_path / "there", tmp_path / "back", store)
    assert tree(tmp_path / "back") == tree(whole)
    assert manifest.fidelity == {"kl": 0.25}
    assert len(shards) == 3
    first, second = open_cache(whole), open_cache(tmp_path / "there")
    assert first.failed == second.failed
    assert first.sample_ids == second.sample_ids


def test_conversion_resumes(whole, tmp_path):
    store = open_cache(whole).plan.store
    other = {"zarr": "webdataset", "webdataset": "zarr"}[store]
    convert(whole, tmp_path / "complete", other)

    class StopError(Exception):
        pass

    def stop():
        raise StopError

    with pytest.raises(StopError):
        convert(whole, tmp_path / "resumed", other, on_shard=stop)
    assert len(list((tmp_path / "resumed" / "shards").glob("*.json"))) == 1
    convert(whole, tmp_path / "resumed", other)
    assert tree(tmp_path / "resumed") == tree(tmp_path / "complete")


def test_impossible_conversions_are_refused(copy, tmp_path):
    store = open_cache(copy).plan.store
    other = {"zarr": "webdataset", "webdataset": "zarr"}[store]
    with pytest.raises(ConfigError, match=f"is a {store} cache already"):
        convert(copy, tmp_path / "new", store)
    for target in (copy, copy / "inside", copy.parent):
        with pytest.raises(ConfigError, match="lie inside each other"):
            convert(copy, target, other)
    build_cache(tmp_path / "different", make_plan(other, shard_size=5))
    with pytest.raises(CacheMismatchError, match="shard_size: the cache has 5, this run has 4"):
        convert(copy, tmp_path / "different", other)
    (copy / "processor" / "note.json").write_text("{  }")
    with pytest.raises(CacheFormatError, match=r"note\.json: damaged: expected"):
        convert(copy, tmp_path / "new", other)
