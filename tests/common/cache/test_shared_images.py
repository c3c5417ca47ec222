"""Arrays of the image alone are held once a shard and image, and every reader sees them as if they were not."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest
from cache_factory import FIELDS, make_plan, make_record
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import write_plan
from vlm_distill_cache.common.cache.schema import check_record
from vlm_distill_cache.common.cache.shared_images import (
    VISUAL_SOURCE,
    ImageSharer,
    SharedImages,
    SourceCheck,
    prefix_key,
    with_visual_source,
)
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.cache.stores import finish_shard, open_reader, open_writer
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.common.tools.verify import content_damage

SHARED = with_visual_source(FIELDS)
NAMES = ("visual_columns", "visual_map")
IMAGE_FIELDS = ("image_hash", "tiles", *NAMES)
# Images by sample: a is seen by 0, 2 and 5; b by 1 and 3; 4 has none. Shards of 4: a is held twice.
IMAGES = ("a", "b", "a", "b", None, "a", "c")
PICTURES = {"a": 10, "b": 11, "c": 12, None: 2}  # seeds of `make_record`; 2 is a text-only one


def live_record(position: int) -> dict[str, np.ndarray]:
    """What a teacher says of a sample: own rows, its image's arrays."""
    record = make_record(30 + position)
    picture = make_record(PICTURES[IMAGES[position]])
    return record | {name: picture[name] for name in IMAGE_FIELDS}


def key(position: int) -> str | None:
    return IMAGES[position] and f"key of {IMAGES[position]}"


def write_cache(path, store, change=lambda position, record: record, *, sealed=True):
    """A cache of 7 samples in shards of 4, each record changed on its way into the store."""
    plan = make_plan(store, samples=len(IMAGES), fields=SHARED)
    write_plan(path, plan)
    for index in range(plan.shard_count):
        writer = open_writer(store, path, index, plan.all_fields)
        sharer = ImageSharer(SharedImages(plan.all_fields))
        for position in plan.shard_range(index):
            writer.append(f"s{position}", change(position, sharer.share(live_record(position), key(position))))
        finish_shard(writer)
    if sealed:
        seal(path)
    return plan


@pytest.fixture(params=["zarr", "webdataset"])
def store(request):
    return request.param


def test_each_record_reads_as_if_it_held_its_images_arrays(tmp_path, store):
    write_cache(tmp_path, store)
    cache = pickle.loads(pickle.dumps(open_cache(tmp_path)))  # noqa: S301
    for position in range(len(IMAGES)):
        record, expected = cache.read(f"s{position}"), live_record(position)
        for name, array in expected.items():
            np.testing.assert_array_equal(record[name], array)
            assert record[name].dtype == array.dtype
    sources = [int(cache.read(f"s{position}")["visual_source"][0]) for position in range(len(IMAGES))]
    assert sources == [0, 1, 0, 1, 0, 1, 2]


def test_a_follower_is_resolved_whichever_fields_are_asked_for(tmp_path, store):
    plan = write_cache(tmp_path, store)
    cache, expected = open_cache(tmp_path), live_record(2)
    names = [field.name for field in plan.all_fields]
    for wanted in [*([name] for name in names), *itertools.combinations(names, 2)]:
        record = cache.read("s2", wanted)
        assert record.keys() == set(wanted)
        for name in set(wanted) - {"visual_source"}:
            np.testing.assert_array_equal(record[name], expected[name])


def test_only_holders_store_arrays_and_the_caller_owns_what_it_reads(tmp_path, store):
    write_cache(tmp_path, store)
    cache = open_cache(tmp_path)
    lengths = [len(cache.read_stored(f"s{position}")["visual_columns"]) for position in range(len(IMAGES))]
    assert [bool(length) for length in lengths] == [True, True, False, False, False, True, True]
    cache.read("s2")["visual_columns"][:] = 7
    np.testing.assert_array_equal(cache.read("s0")["visual_columns"], live_record(0)["visual_columns"])
    np.testing.assert_array_equal(cache.read("s2")["visual_columns"], live_record(2)["visual_columns"])


def test_converting_there_and_back_keeps_what_is_shared_byte_for_byte(tmp_path):
    write_cache(tmp_path / "zarr", "zarr")
    write_cache(tmp_path / "webdataset", "webdataset")
    convert(tmp_path / "zarr", tmp_path / "converted", "webdataset")
    for name in ("shards/00000.tar", "shards/00001.tar"):
        assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "webdataset" / name).read_bytes()


class ListReader:
    """A shard in memory."""

    def __init__(self, records):
        self.records = records

    def read(self, position, names=None):
        record = self.records[position]
        return {name: record[name].copy() for name in record if names is None or name in names}


@settings(deadline=None, max_examples=60)
@given(images=st.lists(st.sampled_from(["a", "b", "c", None]), max_size=12))
def test_any_sequence_of_images_is_read_back_and_held_once_each(images):
    fields = make_plan(fields=SHARED).all_fields
    shared = SharedImages(fields)
    live = [make_record(40 + n) | {x: make_record(PICTURES[i])[x] for x in IMAGE_FIELDS} for n, i in enumerate(images)]
    for keys in (images, [shared.content_key(record) for record in live]):
        sharer, check = ImageSharer(shared), SourceCheck(shared)
        stored = [sharer.share(record, k) for record, k in zip(live, keys, strict=True)]
        assert [check.damage(position, record) for position, record in enumerate(stored)] == [None] * len(live)
        held = sum(len(record["visual_map"]) > 0 for record in stored)
        assert held == len({image for image in images if image is not None})
        for position, expected in enumerate(live):
            found = shared.read(ListReader(stored), position, where="here")
            assert all(found[name].tobytes() == array.tobytes() for name, array in expected.items())


def test_followers_fit_the_schema_and_plans_without_the_field_share_nothing():
    shared, plain = (SharedImages(make_plan(fields=fields).all_fields) for fields in (SHARED, FIELDS))
    sharer = ImageSharer(shared)
    for position in range(len(IMAGES)):
        check_record(sharer.share(live_record(position), key(position)), make_plan(fields=SHARED).all_fields)
    record = live_record(0)
    assert plain.names == frozenset()
    assert ImageSharer(plain).share(record, "k") is record


def test_the_field_stands_in_one_group_and_only_where_there_is_something_to_share():
    assert VISUAL_SOURCE in SHARED["visual_map"]
    assert with_visual_source(SHARED) == SHARED
    words = {"logits": FIELDS["logits"]}
    assert with_visual_source(words) == words
    columns, maps = ((field,) for field in FIELDS["visual_map"])
    both = with_visual_source({"b": maps, "a": columns})
    assert both == {"b": maps, "a": (*columns, VISUAL_SOURCE)}
    # A derived cache that leaves out the group with the field gets it in another one.
    assert with_visual_source({"b": both["b"]}) == {"b": (*maps, VISUAL_SOURCE)}


def test_keys_tell_apart_pictures_prefixes_and_contents():
    ids, other = np.array([1, 9, 9]), np.array([2, 9, 9])
    keys = {prefix_key(b"a" * 16, ids), prefix_key(b"b" * 16, ids), prefix_key(b"a" * 16, other)}
    assert len(keys) == 3
    assert prefix_key(b"a" * 16, ids.astype(np.int32)) == prefix_key(b"a" * 16, ids)
    images = SharedImages(make_plan(fields=SHARED).all_fields)
    assert images.content_key(live_record(0)) == images.content_key(live_record(5))
    assert images.content_key(live_record(0)) != images.content_key(live_record(1))
    assert images.content_key(live_record(4)) is None
    changed = live_record(0)
    changed["visual_map"] = changed["visual_map"] ^ 1
    assert images.content_key(changed) != images.content_key(live_record(0))


def source(value):
    return {"visual_source": np.array([value], np.uint32)}


FAULTS = {
    "beyond the shard": (2, lambda record: record | source(9), "beyond the record itself"),
    "a later record": (0, lambda record: record | source(2), "beyond the record itself"),
    "a follower": (3, lambda record: record | source(2), "which follows another record"),
    "another image": (2, lambda record: record | source(1), "of another image"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_source_is_refused_by_readers_and_found_by_verify(tmp_path, store, fault):
    where, damage, message = FAULTS[fault]
    plan = write_cache(tmp_path, store, lambda position, record: damage(record) if position == where else record)
    with pytest.raises(CacheFormatError, match=rf"sample 's{where}'.*{message}.*cachectl verify --deep"):
        open_cache(tmp_path).read(f"s{where}", ["visual_columns"])
    found = content_damage(tmp_path, plan, read_sidecar(tmp_path, 0), deep=True)
    assert found is not None
    assert f"'s{where}'" in found.reason
    if where:  # a holder that names a later record still has its own arrays, which is what a checker meets first
        assert message in found.reason


def test_missing_arrays_are_refused_by_readers_and_found_by_verify(tmp_path, store):
    def empty(position, record):
        cleared = {field.name: field.empty() for field in FIELDS["visual_map"]}
        return record | cleared if position == 0 else record

    plan = write_cache(tmp_path, store, empty)
    with pytest.raises(CacheFormatError, match=r"sample 's2'.*a record without arrays of an image"):
        open_cache(tmp_path).read("s2")
    found = content_damage(tmp_path, plan, read_sidecar(tmp_path, 0), deep=True)
    assert found is not None
    assert "has an image but no arrays of it" in found.reason


def test_a_follower_with_arrays_of_its_own_is_found(tmp_path, store):
    plan = write_cache(
        tmp_path, store, lambda position, record: live_record(position) | source(0 if position < 3 else 1)
    )
    check = SourceCheck(SharedImages(plan.all_fields))
    reader = open_reader(store, tmp_path, 0, plan.all_fields)
    found = [check.damage(position, reader.read(position)) for position in range(3)]
    assert found[0] is None
    assert "of another image" in (found[1] or "") or "arrays of its own" in (found[1] or "")
    assert "arrays of its own" in (found[2] or "")


def test_verify_is_content_with_what_is_written(tmp_path, store):
    plan = write_cache(tmp_path, store)
    check = SourceCheck(SharedImages(plan.all_fields))
    reader = open_reader(store, tmp_path, 1, plan.all_fields)
    assert [check.damage(position, reader.read(position)) for position in range(3)] == [None, None, None]
