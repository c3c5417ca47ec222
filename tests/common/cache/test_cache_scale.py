"""What a cache costs to open and to ask does not grow with its records; old caches answer the same."""

import gc
import json
import pickle
import threading
import weakref

import numpy as np
import pytest
from cache_factory import FAILED, assert_equal_records, build_cache, make_plan, make_record, sample_id

from vlm_distill_cache.common.cache.document_rules import MAX_SHARDS
from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import SHARDS, write_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.opening import open_cache

POSITIONS = [p for p in range(10) if p != FAILED]
IDS = [sample_id(p) for p in POSITIONS]


@pytest.fixture
def cache(tmp_path):
    build_cache(tmp_path / "cache", make_plan("webdataset"))
    return tmp_path / "cache"


def forget_index(folder):
    """Make a cache as code sealed it before there was an index."""
    body = read_document(folder / MANIFEST)
    del body["files"][INDEX]
    (folder / MANIFEST).write_bytes(document_bytes(body))
    (folder / INDEX).unlink()


def sidecars(folder):
    return sorted((folder / SHARDS).glob("*.json"))


def test_caches_sealed_before_there_was_an_index_answer_the_same(cache):
    def answers(opened):
        asked = [*IDS, "other", sample_id(FAILED)]
        return opened.positions(asked).tolist(), list(opened.sample_ids), dict(opened.failed)

    new = open_cache(cache)
    expected = answers(new)
    forget_index(cache)
    old = open_cache(cache)
    assert answers(old) == expected
    assert [old.shard_of(name) for name in IDS] == [new.shard_of(name) for name in IDS]
    assert_equal_records(old.read(IDS[-1]), make_record(9))
    with pytest.raises(CacheMismatchError, match="failed when the cache was built: image is truncated"):
        old.read(sample_id(FAILED))
    assert INDEX in seal(cache).files


def test_opening_and_looking_up_read_no_sidecar_and_reading_reads_one(cache):
    kept = {path.name: path.read_bytes() for path in sidecars(cache)}
    for path in sidecars(cache):
        path.unlink()
    opened = open_cache(cache)
    assert len(opened) == len(IDS)
    assert [opened.shard_of(name) for name in IDS] == [p // 4 for p in POSITIONS]
    assert "other" not in opened
    assert sample_id(FAILED) not in opened
    assert opened.positions(reversed(IDS)).tolist() == list(reversed(range(9)))
    (cache / SHARDS / "00001.json").write_bytes(kept["00001.json"])
    assert_equal_records(opened.read(sample_id(5)), make_record(5))
    with pytest.raises(CacheFormatError, match="sidecar of shard 0 is missing"):
        opened.read(sample_id(0))
    with pytest.raises(CacheFormatError, match="sidecar of shard 0 is missing"):
        list(opened.sample_ids)


def test_sample_ids_behave_as_the_tuple_of_them(cache):
    found, expected = open_cache(cache).sample_ids, tuple(IDS)
    assert found == expected == tuple(found)
    assert list(IDS) == found
    assert found != (*IDS[:-1], "x")
    assert found != expected[:-1]
    assert found != "text"
    assert len(found) == 9
    assert [found[i] for i in range(-9, 9)] == [expected[i] for i in range(-9, 9)]
    for piece in (
        slice(2, 7),
        slice(None),
        slice(7, 2),
        slice(-3, None),
        slice(None, None, -2),
        slice(8, 99),
    ):
        assert found[piece] == expected[piece]
    for place in (9, -10):
        with pytest.raises(IndexError, match="there are 9"):
            found[place]
    assert found.index(IDS[5]) == 5
    assert "other" not in found
    assert 3 not in found


def test_failed_samples_behave_as_a_dictionary(cache):
    failed = open_cache(cache).failed
    assert failed == {sample_id(FAILED): "image is truncated"}
    assert len(failed) == 1
    assert repr(failed) == repr(dict(failed))
    for name in (sample_id(0), "other"):
        assert name not in failed
        with pytest.raises(KeyError):
            failed[name]


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_cache_without_one_readable_sample_that_an_older_version_sealed_opens(tmp_path, store, monkeypatch):
    monkeypatch.setattr("vlm_distill_cache.common.cache.manifest.refuse_nothing_usable", lambda *_: None)
    plan = make_plan(store, samples=5, shard_size=3)
    write_plan(tmp_path, plan)
    for shard in range(2):
        failed = [(sample_id(p), f"reason {p}") for p in plan.shard_range(shard)]
        finish_shard(open_writer(store, tmp_path, shard, plan.all_fields), failed)
    seal(tmp_path)
    cache = open_cache(tmp_path)
    assert len(cache) == len(cache.sample_ids) == 0
    assert tuple(cache.sample_ids) == cache.sample_ids[:] == ()
    assert cache.failed == {sample_id(p): f"reason {p}" for p in range(5)}
    assert cache.positions(map(sample_id, range(5))).tolist() == [-1] * 5
    with pytest.raises(CacheMismatchError, match="reason 4"):
        cache.read(sample_id(4))


def test_a_pickled_cache_carries_no_index(cache):
    opened = open_cache(cache)
    opened.read(IDS[0])
    data = pickle.dumps(opened)
    assert (cache / INDEX).read_bytes()[64:128] not in data
    assert len(data) < 20_000
    copy = pickle.loads(data)  # noqa: S301 - as a data loader's worker gets it
    assert [copy.shard_of(name) for name in IDS] == [p // 4 for p in POSITIONS]
    (cache / INDEX).write_bytes(bytes(304))
    with pytest.raises(CacheFormatError, match=r"index\.bin: not the file that was sealed"):
        pickle.loads(data).read(IDS[0])  # noqa: S301 - as above


def test_shards_are_brought_here_before_they_are_read_and_held_while_open(cache, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    for path in (cache / SHARDS).glob("*.tar"):
        path.rename(away / path.name)

    class Held:
        pass

    brought, held = [], {}

    def bring(shard):
        brought.append(shard)
        name = f"{shard:05d}.tar"
        (cache / SHARDS / name).write_bytes((away / name).read_bytes())
        token = Held()
        held[shard] = weakref.ref(token)
        return token

    opened = TeacherCache(cache, open_shards=1, before_open=bring)
    opened.check_shard_files()  # what is not here yet is not missing
    assert brought == []
    assert_equal_records(opened.read(sample_id(0)), make_record(0))
    opened.read(sample_id(1))
    assert brought == [0]
    assert held[0]() is not None
    opened.read(sample_id(5))
    gc.collect()
    assert brought == [0, 1]
    assert held[0]() is None
    assert held[1]() is not None
    with pytest.raises(CacheFormatError, match="No such file"):
        open_cache(cache).check_shard_files()


def test_a_slow_shard_keeps_nobody_from_those_that_are_open(cache):
    arrived, go_on = threading.Event(), threading.Event()

    def bring(shard):
        if shard == 1:
            arrived.set()
            assert go_on.wait(30)

    opened = TeacherCache(cache, before_open=bring)
    opened.read(sample_id(0))
    results = []
    slow = [threading.Thread(target=lambda: results.append(opened.read(sample_id(5)))) for _ in range(2)]
    for thread in slow:
        thread.start()
    assert arrived.wait(30)
    assert_equal_records(opened.read(sample_id(1)), make_record(1))
    assert results == []
    go_on.set()
    for thread in slow:
        thread.join()
    assert len(results) == 2


@pytest.mark.parametrize("name", ["processor/note.json", "projector.safetensors"])
def test_files_beside_the_shards_are_checked_when_they_are_asked_for(cache, name):
    path = cache / name
    path.write_bytes(b"0123456789")
    seal(cache, rewritten=True)
    path.write_bytes(b"0123456788")
    opened = open_cache(cache)  # a vision tower of gigabytes is not read to open a cache
    opened.check_side_files(["plan.json"])
    for names in ([name], [name.partition("/")[0]], None):
        with pytest.raises(CacheFormatError, match=rf"{name}: damaged: expected"):
            opened.check_side_files(names)
    path.write_bytes(b"0123456789")
    opened.check_side_files()
    path.write_bytes(b"0123456")
    opened.check_side_files()  # each once
    with pytest.raises(CacheFormatError, match=rf"{name}: damaged: expected 10 bytes, found 7"):
        open_cache(cache)


def test_numbers_that_are_not_finite_make_no_document(cache):
    text = json.dumps(read_document(cache / MANIFEST))
    (cache / MANIFEST).write_text(text.replace('"field_bytes": {', '"field_bytes": {"x": 1e999, '))
    with pytest.raises(CacheFormatError, match=r"manifest\.json: damaged: Out of range float"):
        open_cache(cache)


def test_positions_beyond_a_shards_end_are_refused(cache):
    opened = open_cache(cache)
    opened._starts = np.array([0, 1, 2, 9])  # as if the index were of larger shards
    with pytest.raises(CacheFormatError, match="beyond the ends of their shards"):
        opened.positions(IDS)


def test_a_cache_has_no_more_shards_than_numbers_of_five_digits():
    assert make_plan(samples=20_000_000, shard_size=200).shard_count == MAX_SHARDS == 100_000
    with pytest.raises(CacheFormatError, match="above 100000; use 201 or more a shard"):
        make_plan(samples=20_000_001, shard_size=200)


def test_missing_shards_are_those_without_a_sidecar_file(tmp_path):
    plan = make_plan(samples=60, shard_size=10)
    assert missing_shards(tmp_path, plan) == [*range(6)]
    (tmp_path / SHARDS).mkdir()
    for name in ("00001.json", "00002.tar", ".tmp-00003.json-1-a", "00004.json.json"):
        (tmp_path / SHARDS / name).touch()
    (tmp_path / SHARDS / "00005.json").mkdir()
    assert missing_shards(tmp_path, plan) == [0, 2, 3, 4, 5]
