"""`index.bin`: finds what a dictionary finds; damage and forgery never give a wrong answer."""

import mmap
import struct
import tempfile
from io import BytesIO
from itertools import islice

import numpy as np
import pytest
import xxhash
from cache_factory import FAILED, assert_equal_records, build_cache, make_plan, make_record, sample_id
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.cache import index as index_module
from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.index import (
    INDEX,
    IndexBuilder,
    Place,
    SampleIndex,
    hash_ids,
    hashes_of,
    index_damage,
    index_file,
    refuse_repeats,
)
from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, read_sidecar
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.tools.verify import verify

HEADER = 64
IDS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), unique=True)


@pytest.fixture
def cache(tmp_path):
    build_cache(tmp_path / "cache", make_plan("webdataset"))
    return tmp_path / "cache"


def make_sidecar(index, sample_ids, failed=()):
    return ShardSidecar(
        index=index,
        sample_ids=tuple(sample_ids),
        rows=0,
        field_bytes={},
        files={},
        failed=tuple((name, "why") for name in failed),
    )


def build(sidecars):
    builder = IndexBuilder()
    for sidecar in sidecars:
        builder.add(sidecar)
    file, repeated = builder.finish(len(sidecars))
    with file:
        return file.read(), repeated


def expected_index(cache):
    """What its sidecars call for, in memory."""
    with index_file(cache, read_plan(cache)) as file:
        return file.read()


def forge(folder, data):
    """Replace the index as an attacker would: with digests that fit."""
    (folder / INDEX).write_bytes(data)
    body = read_document(folder / MANIFEST)
    body["files"][INDEX] = FileEntry.of_bytes(bytes(data)).to_dict()
    (folder / MANIFEST).write_bytes(document_bytes(body))


@given(IDS, st.lists(st.integers(0, 6), max_size=9), IDS)
def test_an_index_finds_what_a_dictionary_finds(ids, sizes, others):
    remaining, sidecars, reference = iter(ids), [], {}
    for shard, size in enumerate([*sizes, len(ids)]):
        names = list(islice(remaining, size))
        failed = names[len(names) // 2 + 1 :: 2]
        kept = [name for name in names if name not in failed]
        sidecars.append(make_sidecar(shard, kept, failed))
        reference |= {name: Place(shard, i, failed=False) for i, name in enumerate(kept)}
        reference |= {name: Place(shard, i, failed=True) for i, name in enumerate(failed)}
    data, repeated = build(sidecars)
    index = SampleIndex(data, "here")
    assert repeated is None
    assert len(index) == len(reference)
    assert index.failed_count == sum(place.failed for place in reference.values())
    asked = [*ids, *others]
    assert {name: index.find(name) for name in asked} == {name: reference.get(name) for name in asked}
    shard, position = index.find_many(*hash_ids(asked))
    for name, found in zip(asked, zip(shard.tolist(), position.tolist(), strict=True), strict=True):
        place = reference.get(name)
        assert found == ((-1, -1) if place is None or place.failed else place[:2])


def test_the_bytes_depend_on_the_sidecars_alone(cache, tmp_path):
    build_cache(tmp_path / "zarr", make_plan("zarr"))
    data = (cache / INDEX).read_bytes()
    assert data == expected_index(cache) == (tmp_path / "zarr" / INDEX).read_bytes()
    assert len(data) == HEADER + 24 * 10
    assert data[:8] == b"VLMDIDX\0"
    high = np.frombuffer(data, "<u8", count=10, offset=HEADER)
    assert (high[:-1] <= high[1:]).all()
    assert set(high.tolist()) == set(hash_ids(map(sample_id, range(10)))[0].tolist())


@pytest.mark.parametrize("held", [1, 4, 64, 1000])
def test_an_index_of_more_than_is_held_in_memory_has_the_same_bytes(held, tmp_path, monkeypatch):
    sidecars = [make_sidecar(i, [f"a{i}-{j}" for j in range(i)], [f"b{i}-{j}" for j in range(3)]) for i in range(20)]
    entries = sorted(
        (*divmod(xxhash.xxh3_128_intdigest(name.encode()), 1 << 64), sidecar.index, position)
        for sidecar in sidecars
        for names, top in ((sidecar.sample_ids, 0), ([name for name, _ in sidecar.failed], 1 << 31))
        for position, name in enumerate(names, start=top)
    )
    columns = [
        np.array(column, dtype)
        for column, dtype in zip(zip(*entries, strict=True), ("<u8", "<u8", "<u4", "<u4"), strict=True)
    ]
    header = struct.pack("<8sIIQQ32x", b"VLMDIDX\0", 1, 20, len(entries), 60)
    monkeypatch.setattr(index_module, "_HELD", held)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build(sidecars) == (header + b"".join(column.tobytes() for column in columns), None)
    repeated = [*sidecars, make_sidecar(20, ["new", "b4-1"], ["a7-2"])]
    first, second = build(repeated)[1]
    assert {first, second} in (
        {Place(4, 1, failed=True), Place(20, 1, failed=False)},
        {Place(7, 2, failed=False), Place(20, 0, failed=True)},
    )
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("held", [1, 1000])
def test_entries_with_one_upper_half_are_sorted_by_the_lower(held, monkeypatch):
    lows = {"a": 7, "b": 3, "c": 9, "d": 1}
    monkeypatch.setattr(
        index_module,
        "hash_ids",
        lambda ids: (np.full(len(ids), 5, np.uint64), np.array([lows[name] for name in ids], np.uint64)),
    )
    monkeypatch.setattr(index_module, "_HELD", held)
    data, repeated = build([make_sidecar(0, ["a", "b"]), make_sidecar(1, ["c", "d"])])
    assert repeated is None
    assert np.frombuffer(data, "<u8", count=4, offset=HEADER + 4 * 8).tolist() == [1, 3, 7, 9]


class KnownIds(list):
    """Ids that know their hashes."""

    def hashes(self):
        for start in range(0, len(self), 3):
            yield np.stack(hash_ids(self[start : start + 3]), axis=1)


@pytest.mark.parametrize("at_a_time", [1, 4, 100])
def test_ids_are_looked_up_some_at_a_time_as_all_at_once(monkeypatch, at_a_time):
    monkeypatch.setattr(index_module, "_LOOKED_UP_AT_A_TIME", at_a_time)
    ids = list(map(sample_id, range(10)))
    for asked in (ids, iter(ids), KnownIds(ids)):
        parts = list(hashes_of(asked))
        assert max(len(high) for high, _ in parts) <= at_a_time + 2
        for half, whole in zip(zip(*parts, strict=True), hash_ids(ids), strict=True):
            assert np.array_equal(np.concatenate(half), whole)


@pytest.mark.parametrize("near", [-1, 1])
def test_ids_with_one_upper_half_are_told_apart(near):
    """That takes 10 billion samples to happen by itself."""
    (high,), (low,) = (half.tolist() for half in hash_ids(["a"]))
    lows = sorted([low, (low + near) % 2**64])
    data = struct.pack("<8sIIQQ32x", b"VLMDIDX\0", 1, 9, 2, 0)
    data += struct.pack("<4Q4I", high, high, *lows, 5, 6, 7, 8)
    index = SampleIndex(data, "here")
    at = lows.index(low)
    assert index.find("a") == Place(5 + at, 7 + at, failed=False)
    assert [column.tolist() for column in index.find_many(*hash_ids(["b", "a"]))] == [[-1, 5 + at], [-1, 7 + at]]


def test_every_flipped_byte_and_every_cut_is_noticed_on_opening(cache):
    data = (cache / INDEX).read_bytes()
    for place in range(len(data)):
        flipped = bytearray(data)
        flipped[place] ^= 1 << place % 8
        (cache / INDEX).write_bytes(flipped)
        with pytest.raises(CacheFormatError, match=r"index\.bin: not the file that was sealed.*teacher-cache seal"):
            open_cache(cache)
    for length in [*range(0, len(data), 9), len(data) + 1]:
        (cache / INDEX).write_bytes((data + b"\0")[:length])
        with pytest.raises(CacheFormatError, match=r"index\.bin: damaged: expected 304 bytes"):
            open_cache(cache)
    (cache / INDEX).unlink()
    with pytest.raises(CacheFormatError, match=r"index\.bin: lost"):
        open_cache(cache)
    (cache / INDEX).symlink_to(cache / "plan.json")
    with pytest.raises(CacheFormatError, match=r"index\.bin"):
        open_cache(cache)


def test_a_forged_index_never_passes_one_sample_off_for_another(cache):
    """Every byte changed in turn, the manifest made to fit: an error, or the right record."""
    data = (cache / INDEX).read_bytes()
    expected, right = expected_index(cache), 0
    assert index_damage(cache, BytesIO(expected)) is None
    for place in range(len(data)):
        forged = bytearray(data)
        forged[place] ^= 255
        forge(cache, forged)
        assert index_damage(cache, BytesIO(expected)) is not None
        try:
            opened = open_cache(cache)
        except CacheFormatError:
            assert place < HEADER
            continue
        for position in (place % 10, FAILED):
            try:
                record = opened.read(sample_id(position))
            except (CacheFormatError, CacheMismatchError):
                continue
            assert_equal_records(record, make_record(position))
            right += 1
        try:
            places = opened.positions(map(sample_id, range(10)))
        except CacheFormatError:
            continue
        assert set(places.tolist()) <= set(range(-1, 9))
    assert right > 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((0, b"X"), "does not begin as an index"),
        ((8, b"\2"), "index version 2, this code reads 1; update the code"),
        ((12, b"\4"), "another cache's"),
        ((16, b"\t"), r"declares 9 entries.*expected 280 bytes"),
        ((23, b"\xff"), r"declares \d+ entries, 1 of them failed, in 304 bytes"),
        ((24, b"\2"), "another cache's"),
        ((31, b"\xff"), "of them failed"),
        ((63, b"\1"), "unused part of its header"),
    ],
)
def test_headers_are_believed_only_as_far_as_they_fit(cache, change, message):
    place, value = change
    data = (cache / INDEX).read_bytes()
    forge(cache, data[:place] + value + data[place + 1 :])
    with pytest.raises(CacheFormatError, match=message):
        open_cache(cache)
    forge(cache, data[: HEADER - 1])
    with pytest.raises(CacheFormatError, match="63 bytes are no index"):
        open_cache(cache)


def test_another_caches_index_is_refused(cache, tmp_path):
    build_cache(tmp_path / "other", make_plan("webdataset", samples=9))
    forge(cache, (tmp_path / "other" / INDEX).read_bytes())
    with pytest.raises(CacheFormatError, match="it is another cache's"):
        open_cache(cache)


def test_equal_ids_are_found_wherever_they_are():
    cases = {
        (0, 1): [make_sidecar(0, ["a", "b"]), make_sidecar(1, ["c", "a"])],
        (1, 1): [make_sidecar(0, ["b"]), make_sidecar(1, ["a", "a"])],
        (0, 2): [make_sidecar(0, [], ["é"]), make_sidecar(1, ["x"]), make_sidecar(2, ["é"])],
    }
    for shards, sidecars in cases.items():
        _, repeated = build(sidecars)
        assert (repeated[0].shard, repeated[1].shard) == shards


def test_ids_with_one_hash_are_refused_by_name(cache):
    places = (Place(0, 0, failed=False), Place(0, 0, failed=True))
    with pytest.raises(CacheFormatError, match=r"samples 'set/é\.0' and 'set/é\.3' are in shards 0 and 0"):
        refuse_repeats(cache, places)
    refuse_repeats(cache, None)


def test_where_files_cannot_be_mapped_the_index_is_read(cache, monkeypatch):
    def refuse(*_args, **_options):
        raise OSError(19, "No such device")

    monkeypatch.setattr(mmap, "mmap", refuse)
    opened = open_cache(cache)
    assert [position for position in range(10) if sample_id(position) in opened] == [
        p for p in range(10) if p != FAILED
    ]


def test_the_manifest_lists_the_index_and_sealing_does_not_depend_on_the_old_one(cache):
    before, data = read_manifest(cache), (cache / INDEX).read_bytes()
    assert before.files[INDEX] == FileEntry.of_bytes(data)
    (cache / INDEX).write_bytes(b"damaged")
    assert index_damage(cache, BytesIO(expected_index(cache))) is not None
    assert seal(cache) == before
    (cache / INDEX).unlink()
    assert index_damage(cache, BytesIO(expected_index(cache))) == "missing"
    assert seal(cache) == before
    assert (cache / INDEX).read_bytes() == data


def test_verify_notices_an_index_that_only_the_manifest_believes(cache, tmp_path):
    assert verify(cache) == []
    other = IndexBuilder()
    for shard in reversed(range(3)):
        other.add(read_sidecar(cache, shard))
    assert other.finish(3)[0].read() == (cache / INDEX).read_bytes()  # whatever order they come in
    forged = bytearray((cache / INDEX).read_bytes())
    forged[-40:-36], forged[-36:-32] = forged[-36:-32], forged[-40:-36]
    assert forged != (cache / INDEX).read_bytes()
    forge(cache, forged)
    assert [damage.path for damage in verify(cache)] == [INDEX]
