"""Format version 2 in both stores: what it costs where samples have one picture, and what is read back."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from cache_factory import make_plan, make_record

from vlm_distill_cache.common.attention.tiles import Tile, several_to_arrays
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import SEVERAL_PICTURES
from vlm_distill_cache.common.cache.shared_images import prefix_key
from vlm_distill_cache.common.cache.sidecar import check_sidecar, read_sidecar
from vlm_distill_cache.common.cache.stores import finish_shard, open_reader, open_writer
from vlm_distill_cache.common.codecs.row_attention import AttentionRows, RowAttentionCodec
from vlm_distill_cache.common.errors import CacheFormatError

STORES = ("zarr", "webdataset")
WHOLE = (0.0, 0.0, 1.0, 1.0)
SAMPLES = 40
METADATA = 16 << 10
"""Bytes of a shard's metadata for the arrays that version 2 adds, whatever the number of samples."""


def codec_of(version):
    several = {"several": True, "frame_grid": (4, 4)} if version == SEVERAL_PICTURES else {}
    return RowAttentionCodec(grid=(3, 4), groups=1, **several)


def plan_of(store, version) -> Plan:
    plan, codec = make_plan(store, samples=SAMPLES, shard_size=SAMPLES), codec_of(version)
    return make_plan(
        store,
        samples=SAMPLES,
        shard_size=SAMPLES,
        format_version=version,
        signals={"logits": plan.signals["logits"], codec.signal: codec.to_dict()},
        fields={"logits": plan.fields["logits"], codec.signal: codec.fields()},
    )


def record_of(position, version):
    """One with a picture, or in the third place of each ten with none."""
    record, codec = make_record(position % 10), codec_of(version)
    tiles = tuple(Tile(int(rows), int(cols), WHOLE) for rows, cols, *_ in record["tiles"])
    cells = np.random.default_rng(position).random((len(record["labels"]), 1, 12)).astype(np.float32) / 12
    if version == SEVERAL_PICTURES:
        rows = cells if tiles else cells[:, :, :0]
        record |= codec.encode(AttentionRows(rows, rows.sum(axis=2)), tiles=tiles)
        record["image_hash"] = record["image_hash"][: len(tiles)]
        return record | several_to_arrays(tiles, (), len(tiles))
    rows = cells if tiles else 0 * cells
    record["image_hash"] = record["image_hash"] if tiles else 0 * record["image_hash"]
    return record | codec.encode(AttentionRows(rows, rows.sum(axis=2)))


def write(folder, store, version, records=None):
    records = records or [record_of(position, version) for position in range(SAMPLES)]
    plan = replace(plan_of(store, version), sample_count=len(records))
    write_plan(folder, plan)
    writer = open_writer(store, folder, 0, plan.all_fields)
    for position, record in enumerate(records):
        writer.append(f"s{position}", {field.name: record[field.name] for field in plan.all_fields})
    sidecar = finish_shard(writer)
    check_sidecar(sidecar, plan, "there")
    return plan, {name: entry.size for name, entry in sidecar.files.items()}


@pytest.mark.parametrize("store", STORES)
def test_a_sample_of_one_picture_costs_no_byte_more(store, tmp_path):
    (_, before), (_, after) = (write(tmp_path / str(version), store, version) for version in (1, 2))
    if store == "webdataset":
        readers = [open_reader(store, tmp_path / str(v), 0, plan_of(store, v).all_fields) for v in (1, 2)]
        sizes = [[size for _, _, size in reader._members] for reader in readers]
        assert all(two <= one for one, two in zip(*sizes, strict=True))
    arrays = [name for name in after if not name.endswith("zarr.json")]
    assert {name for name in arrays if name not in before} == set()  # nothing is written of what is empty
    assert all(after[name] <= before[name] for name in arrays)
    assert sum(after.values()) - sum(before.values()) < METADATA


@pytest.mark.parametrize("store", STORES)
def test_what_was_left_out_is_read_as_empty(store, tmp_path):
    plan, _ = write(tmp_path, store, SEVERAL_PICTURES)
    seal(tmp_path)
    cache = TeacherCache(tmp_path)
    assert cache.manifest.format_version == read_sidecar(tmp_path, 0).format_version == SEVERAL_PICTURES
    for position in range(12):
        record, expected = cache.read(f"s{position}"), record_of(position, SEVERAL_PICTURES)
        assert record.keys() == {field.name for field in plan.all_fields}
        for name, array in record.items():
            np.testing.assert_array_equal(array, expected[name])
            assert array.dtype == expected[name].dtype
    if store == "zarr":  # whoever reads without this code finds zeros, as the fill value says
        group = zarr.open_group(tmp_path / "shards" / "00000.zarr", mode="r")
        assert group["answer_frames_offsets"][...].tolist() == [0] * (SAMPLES + 1)
        assert group.attrs["format_version"] == SEVERAL_PICTURES


def test_a_shard_with_frames_keeps_its_offsets(tmp_path):
    """Where an array is not empty, a lost file of its offsets is damage."""
    record = record_of(0, SEVERAL_PICTURES)
    tiles, rows = (Tile(2, 2, WHOLE, (0.0, 1.0), True),), len(record["labels"])
    record |= several_to_arrays(tiles, ((0, 0.5),), 1)
    record |= codec_of(2).encode(
        AttentionRows(np.arange(16.0) / 120 + np.zeros((rows, 1, 1)), np.ones((rows, 1))), tiles=tiles
    )
    plan, files = write(tmp_path, "zarr", SEVERAL_PICTURES, [record])
    lost = next(name for name in files if "answer_frames_offsets/c" in name)
    reader = open_reader("zarr", tmp_path, 0, plan.all_fields)
    np.testing.assert_array_equal(reader.read(0)["frame_times"], [[0, 0.5]])
    page = (Path(__file__).parents[3] / "docs" / "cache-format.md").read_text().partition("## Format version 2")[2]
    example = page.partition("```python\n")[2].partition("```")[0]  # what the documentation tells people to do
    found: dict[str, np.ndarray] = {}
    exec(example.replace("CACHE", str(tmp_path)), found)
    expected = codec_of(2).decode(reader.read(0)).cells
    np.testing.assert_allclose(found["cells"].reshape(expected.shape), expected, rtol=1e-5)
    (tmp_path / lost).unlink()
    with pytest.raises(CacheFormatError, match="its data is missing"):
        open_reader("zarr", tmp_path, 0, plan.all_fields).read(0)


def test_a_sidecar_of_another_version_is_refused(tmp_path):
    write(tmp_path, "webdataset", SEVERAL_PICTURES)
    with pytest.raises(CacheFormatError, match="is of format version 2; the plan is of 1"):
        check_sidecar(read_sidecar(tmp_path, 0), plan_of("webdataset", 1), "there")


def test_frames_at_other_times_are_another_prefix():
    ids = np.arange(5)
    keys = {prefix_key(b"a" * 32, ids, times) for times in ((), ((0, 0.0), (0, 1.0)), ((0, 0.0), (0, 2.0)))}
    assert len(keys) == 3
    assert prefix_key(b"a" * 16, ids) == prefix_key(b"a" * 16, ids, ())
