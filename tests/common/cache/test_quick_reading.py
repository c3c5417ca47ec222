"""What readers and writers do to be quick gives what zarr-python, safetensors and tarfile give, and refuses what they refuse."""

import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import zarr
from cache_factory import assert_equal_records, make_plan, make_record, sample_id
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs.zstd import Zstd
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, MemoryStore

from vlm_distill_cache.common.cache.schema import SEVERAL_FIELDS, Field, check_record
from vlm_distill_cache.common.cache.stores import finish_shard, open_reader, open_writer, webdataset_store
from vlm_distill_cache.common.cache.stores.base import DAMAGE_ERRORS
from vlm_distill_cache.common.cache.stores.zarr_chunks import read_chunks
from vlm_distill_cache.common.cache.stores.zarr_metadata import check_metadata
from vlm_distill_cache.common.errors import CacheFormatError

FIELDS = make_plan("webdataset").all_fields
ENTRY_FIELDS = (
    *SEVERAL_FIELDS,
    Field(name="entry_count", dtype="u1", axis="row"),
    Field(name="token_ids", dtype="u4", axis="entry"),
    Field(name="tail_logmass", dtype="f2", axis="row", trailing=(2,)),
)


def slow_read(data, name, fields):
    """As members were read before there were layouts."""
    found, record = webdataset_store.decode_member(data, "here")
    if found != name:
        raise CacheFormatError(found)
    record = {field.name: field.empty() for field in fields} | record
    check_record(record, fields)
    return record


def outcome(read):
    """What a reader gives, or that it refuses."""
    try:
        return {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in read().items()}
    except CacheFormatError:
        return None


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 3)] * 4), min_size=1, max_size=5), st.text(min_size=1, max_size=9))
def test_members_of_any_lengths_are_read_as_by_safetensors(tmp_path_factory, lengths, text):
    folder = tmp_path_factory.mktemp("tar")
    writer, records = open_writer("webdataset", folder, 0, ENTRY_FIELDS), {}
    for number, (rows, tiles, pictures, entries) in enumerate(lengths):
        rng = np.random.default_rng(number)
        counts = rng.multinomial(entries, [1 / rows] * rows) if rows else np.zeros(0)
        sizes = {
            "row": rows,
            "entry": int(counts.sum()),
            "tile": tiles,
            "picture": pictures,
            "placed": tiles,
            "timed": pictures,
        }
        record = {
            field.name: rng.integers(0, 200, (sizes[field.axis], *field.trailing)).astype(field.numpy_dtype)
            for field in ENTRY_FIELDS
        }
        records[f"{number}{text}"] = record | {"entry_count": counts.astype(np.uint8)}
        try:
            writer.append(f"{number}{text}", records[f"{number}{text}"])
        except UnicodeEncodeError:  # a lone surrogate
            writer.abort()
            return
    finish_shard(writer)
    reader = open_reader("webdataset", folder, 0, ENTRY_FIELDS)
    for _ in range(2):  # the first time layouts are met
        for position, (name, record) in enumerate(records.items()):
            found = reader.read(position)
            assert_equal_records(found, record)
            assert all(array.flags.writeable and array.flags.aligned for array in found.values())
            assert_equal_records(reader.read(position, ["labels"]), {"labels": record["labels"]})
            assert outcome(lambda at=position: reader.read(at)) == outcome(
                lambda at=position, key=name: slow_read(reader._pread(*reader._members[at][:0:-1]), key, ENTRY_FIELDS)
            )


def test_members_like_one_before_are_read_by_its_layout(tmp_path, monkeypatch):
    writer = open_writer("webdataset", tmp_path, 0, FIELDS)
    for position in (4, 5, 6):
        writer.append(sample_id(position), make_record(position))
    finish_shard(writer)
    reader = open_reader("webdataset", tmp_path, 0, FIELDS)
    reader.read(0)
    monkeypatch.setattr(webdataset_store, "decode_member", None)
    for place, position in enumerate((4, 5, 6)):
        assert_equal_records(reader.read(place), make_record(position))


def test_a_layout_takes_nothing_that_the_rule_refuses_or_reads_otherwise(tmp_path):
    """Every byte of a member's header and some behind it in turn, and headers that are other than they should be."""
    writer = open_writer("webdataset", tmp_path, 0, FIELDS)
    writer.append(sample_id(5), make_record(5))
    finish_shard(writer)
    reader = open_reader("webdataset", tmp_path, 0, FIELDS)
    reader.read(0)
    data, name = webdataset_store.encode_member(sample_id(5), make_record(5)), sample_id(5)
    plain = bytes(Zstd().decode(data))
    size = int.from_bytes(plain[:8], "little")
    header = json.loads(plain[8 : 8 + size])
    changed = [plain[:at] + bytes([plain[at] ^ flip]) + plain[at + 1 :] for at in range(size + 40) for flip in (1, 16)]
    changed += [plain[:-1], plain + b"\0", plain[: 8 + size], plain[:4], b""]
    for field in ("labels", "token_ids", "entry_count"):
        for part, value in (("dtype", "F32"), ("shape", [1]), ("shape", []), ("shape", [-1]), ("data_offsets", [0, 4])):
            text = json.dumps(header | {field: header[field] | {part: value}}, separators=(",", ":")).encode()
            changed.append(len(text).to_bytes(8, "little") + text + plain[8 + size :])
    refused = 0
    for bytes_of_it in changed:
        member = bytes(Zstd(level=1).encode(bytes_of_it))
        expected = outcome(lambda member=member: slow_read(member, name, FIELDS))
        found = reader._as_written(member, name)
        assert found is None or outcome(lambda found=found: found) == expected
        refused += expected is None
    assert refused > size  # most bytes of a header matter
    for cut in (0, 4, len(data) // 2, len(data) - 1):
        assert reader._as_written(data[:cut], name) is None


headers = st.tuples(st.text("abcXYZ019_-~", max_size=84), st.integers(0, 8**11 - 1))


@given(st.lists(headers, min_size=1, max_size=4), st.integers(0, 511), st.integers(1, 255), st.integers(0))
def test_headers_of_members_are_those_of_tarfile(members, place, change, which):
    made = []
    for name, size in members:
        member = tarfile.TarInfo(name + webdataset_store.EXTENSION)
        member.size, member.mode = size, 0o644
        made.append(member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
        assert webdataset_store._read_header(made[-1]) == (member.name, size)
    assert not webdataset_store._other_headers(made)
    which %= len(made)
    changed = bytearray(made[which])
    changed[place] ^= change
    made[which] = bytes(changed)
    assert webdataset_store._other_headers(made) == [made[which]]


COMPRESSORS = {
    "blosc": [BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=4)],
    "zstd": [ZstdCodec(level=3)],
    "none": [],
}


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "crc32c"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("dtype", ["u1", "u4", "f2"])
def test_arrays_are_those_that_zarr_reads_and_damage_is_seen_as_zarr_sees_it(tmp_path, compressor, checked, dtype):
    field = replace(FIELDS[1], name="values", dtype=dtype, trailing=(3,))
    values = np.random.default_rng(1).integers(0, 9, (4000, 3)).astype(field.numpy_dtype)
    group = zarr.create_group(LocalStore(tmp_path), zarr_format=3)
    serial = [*COMPRESSORS[compressor], *([Crc32cCodec()] if checked else [])]
    array = group.create_array(
        "values", shape=values.shape, dtype=values.dtype, chunks=(1500, 3), shards=(4500, 3), compressors=serial
    )
    array[...] = values
    metadata = json.loads((tmp_path / "values" / "zarr.json").read_text())
    layout = check_metadata({"values": metadata}, {"values": (field, 1 << 20)}, tmp_path)["values"]
    file = tmp_path / "values" / "c" / "0" / "0"
    found = read_chunks(file, layout, field.numpy_dtype)
    assert found.dtype == field.numpy_dtype
    np.testing.assert_array_equal(found, array[...], strict=True)
    sound = file.read_bytes()
    places = [*range(0, 40, 3), *range(len(sound) - 60, len(sound), 4), *range(40, len(sound) - 60, len(sound) // 5)]
    for place in places:
        file.write_bytes(sound[:place] + bytes([sound[place] ^ 64]) + sound[place + 1 :])
        try:
            theirs = zarr.open_group(LocalStore(tmp_path), mode="r")["values"][...]
        except DAMAGE_ERRORS:
            with pytest.raises(DAMAGE_ERRORS):
                read_chunks(file, layout, field.numpy_dtype)
            continue
        try:
            ours = read_chunks(file, layout, field.numpy_dtype)
        except DAMAGE_ERRORS:
            continue  # a chunk that declares another size: refused before it is decoded
        np.testing.assert_array_equal(ours, theirs, strict=True)


def written_by_zarr(fields, ids, parts, version):
    """The files of a shard's group, each array made, compressed and consolidated by zarr-python."""
    stored = {}
    group = zarr.create_group(
        MemoryStore(stored), zarr_format=3, attributes={"format_version": version, "samples": len(ids)}
    )

    def put(name, data, axis, *, written=True):
        row_bytes = data.itemsize * int(np.prod(data.shape[1:]))
        rows = max(1, min((256 << 10) // row_bytes, len(data)))
        array = group.create_array(
            name, shape=data.shape, dtype=data.dtype, chunks=(rows, *data.shape[1:]), filters=None, fill_value=0,
            shards=(max(1, -(-len(data) // rows)) * rows, *data.shape[1:]), config={"write_empty_chunks": True},
            dimension_names=[axis, *[None] * (data.ndim - 1)],
            compressors=BloscCodec(
                cname="zstd", clevel=7 if row_bytes <= 8 else 5, typesize=data.itemsize,
                shuffle="shuffle" if data.itemsize > 1 else "noshuffle",
            ),
        )  # fmt: skip
        if len(data) and written:
            array[...] = data

    def bounds(lengths):
        return np.cumsum([0, *lengths], dtype=np.int64)

    for field in fields:
        data = np.concatenate([field.empty(), *parts[field.name]])
        put(field.name, data, field.axis)
        empty = version == 2 and not len(data)
        put(
            f"{field.name}_offsets",
            bounds([len(part) for part in parts[field.name]]),
            "sample_bounds",
            written=not empty,
        )
    put("sample_ids", np.frombuffer("".join(ids).encode(), np.uint8), "byte")
    put("sample_ids_offsets", bounds([len(name.encode()) for name in ids]), "sample_bounds")
    zarr.consolidate_metadata(group.store)
    return {name: buffer.to_bytes() for name, buffer in stored.items()}


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
@pytest.mark.parametrize("fields", [ENTRY_FIELDS, FIELDS], ids=["several", "one picture"])
@pytest.mark.parametrize("lengths", [[], [0], [3, 0, 70], [70_000, 1], [131_072, 131_072]], ids=str)
def test_a_shard_is_written_as_zarr_writes_it(fields, lengths, tmp_path):
    rng = np.random.default_rng(len(lengths))
    extra = Field(name="cells", dtype="f4", axis="look", trailing=(3, 5))
    fields, ids = (*fields, extra), [f"s\xe9{number}" for number in range(len(lengths))]
    parts = {
        field.name: [
            rng.integers(0, 9, (min(length, 700) if field.trailing else length, *field.trailing)).astype(
                field.numpy_dtype
            )
            for length in lengths
        ]
        for field in fields
    }
    writer = open_writer("zarr", tmp_path, 0, fields)
    writer.sample_ids, writer._parts = ids, parts
    written = writer._encode()
    expected = written_by_zarr(fields, ids, parts, writer.format_version)
    assert list(written) == sorted(expected)
    for name, data in expected.items():
        if name.endswith("zarr.json"):
            assert json.loads(written[name]) == json.loads(data), name
        else:
            assert written[name] == data, name
