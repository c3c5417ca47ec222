"""Codecs of format version 2: a row's gaze on each picture, columns and maps of each view, and what damage of them is found."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.tiles import Tile, of_view, several_to_arrays, views_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import SEVERAL_PICTURES, base_fields, check_record
from vlm_distill_cache.common.codecs.checks import value_damage
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap, as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import AttentionRows, RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError

WHOLE = (0.0, 0.0, 1.0, 1.0)
STILL = (-1, float("nan"))
MIXED = (  # two pictures, one of them in two tiles, and a clip of four frames of which tokens show two each
    Tile(2, 3, WHOLE),
    Tile(1, 1, (0.0, 0.0, 0.5, 1.0)),
    Tile(2, 2, WHOLE, (1.0, 3.0), True),
    Tile(2, 2, WHOLE, (3.0, 5.0), True),
    Tile(3, 2, WHOLE, (5.0, 6.0)),
)
TIMES = (STILL, (1, 0.0), (1, 0.5), (1, 1.0), (1, 1.5), STILL)


def base_of(tiles=MIXED, times=TIMES, pictures=6, rows=3):
    return several_to_arrays(tiles, times, pictures) | {
        "image_hash": np.arange(1, 1 + 16 * pictures, dtype=np.uint8).reshape(-1, 16),
        "labels": np.arange(rows, dtype="<u4"),
    }


def plan_of(codec, **changes):
    signals, fields = {codec.signal: codec.to_dict()}, {codec.signal: codec.fields()}
    given = {"store": "zarr", "sample_count": 1, "shard_size": 1, "format_version": SEVERAL_PICTURES} | changes
    return Plan(signals=signals, fields=fields, **given)


def rows_of(generator, rows, groups, cells):
    """Attention that leaves some mass off the pictures, and some cells at zero."""
    found = generator.random((rows, groups, cells)).astype(np.float32) ** 4
    found[found < 0.01] = 0
    return AttentionRows(found / cells, (found / cells).sum(axis=2))


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 99), rows=st.integers(0, 3), frames=st.sampled_from([None, (2, 2)]), exact=st.booleans(),
    kind=st.sampled_from([RowAttentionCodec, TextAttentionCodec]),
    tiles=st.sampled_from([MIXED, MIXED[:2], MIXED[2:4], ()]),
)  # fmt: skip
def test_each_view_is_kept_as_the_one_picture_of_a_sample(seed, rows, frames, exact, kind, tiles):
    """Against a codec of one picture on each view by itself."""
    views = views_of(tiles)
    begin = int(views[0].span[0]) if views else 0
    tiles = tuple(replace(t, span=(t.span[0] - begin, t.span[1] - begin)) for t in tiles)
    end = int(tiles[-1].span[1]) if tiles else 0
    times = TIMES[begin : begin + end] if any(t.is_frame for t in tiles) else ()
    codec = kind(grid=(2, 3), groups=2, exact=exact, several=True, frame_grid=frames)
    cells = codec.cells_of(tiles)
    assert [(cell.span, cell.is_frame) for cell in cells] == [(v.span, v.is_frame) for v in views_of(tiles)]
    live = rows_of(np.random.default_rng(seed), rows, 2, sum(cell.token_count for cell in cells))
    record = codec.encode(live, tiles=tiles) | base_of(tiles, times, end, rows)
    check_record(record, (*base_fields(SEVERAL_PICTURES), *codec.fields()))
    assert list(value_damage(record, plan_of(codec))) == []
    assert codec_from_dict(codec.to_dict()) == codec
    found = codec.decode(record)
    count = rows if kind is RowAttentionCodec or tiles else 0
    assert found.cells.shape == (count, 2, live.cells.shape[2])
    place, masses = 0, np.zeros((count, 2), np.float32)
    for cell in cells:
        alone = kind(grid=(cell.rows, cell.cols), groups=2, exact=exact)
        of_view_ = live.cells[:, :, place : place + cell.token_count]
        expected = alone.decode(alone.encode(AttentionRows(of_view_, of_view_.sum(axis=2))))
        np.testing.assert_array_equal(found.cells[:, :, place : place + cell.token_count], expected.cells)
        masses += expected.image_mass
        place += cell.token_count
    np.testing.assert_allclose(found.image_mass, masses, rtol=1e-6)


def test_one_picture_has_the_very_arrays_of_version_1():
    live = rows_of(np.random.default_rng(0), 5, 2, 6)
    for exact in (False, True):
        one = RowAttentionCodec(grid=(2, 3), groups=2, exact=exact).encode(live)
        several = RowAttentionCodec(grid=(2, 3), groups=2, exact=exact, several=True, frame_grid=(4, 4))
        found = several.encode(live, tiles=MIXED[:2])
        assert all(found[name].tobytes() == one[name].tobytes() for name in one)
        assert not any(len(found[name]) for name in found.keys() - one.keys())


def test_a_row_of_32_frames_takes_less_than_600_bytes():
    frames = tuple(Tile(12, 12, WHOLE, (float(n), n + 1.0), True) for n in range(32))
    codec = RowAttentionCodec(grid=(12, 12), groups=1, several=True, frame_grid=(4, 4))
    record = codec.encode(rows_of(np.random.default_rng(0), 7, 1, 32 * 16), tiles=frames)
    assert sum(array.nbytes for array in record.values()) / 7 == 576


def test_a_plan_of_one_picture_says_nothing_of_several():
    assert RowAttentionCodec(grid=(2, 3), groups=2).to_dict() == {
        "codec": "answer_attention", "grid": [2, 3], "groups": 2, "exact": False
    }  # fmt: skip
    with pytest.raises(ConfigError, match="frame_grid: only a codec for several pictures"):
        RowAttentionCodec(grid=(2, 3), groups=2, frame_grid=(4, 4))


@pytest.mark.parametrize("preset", ["exact", "blocks", "compact", "f4", "exact8"])
@pytest.mark.parametrize("grid", [0, 2])
def test_the_map_of_each_view_is_kept_as_if_it_were_alone(preset, grid):
    generator, codec = np.random.default_rng(1), VisualMapCodec(groups=2, preset=preset, grid=grid)
    views = [of_view(MIXED, view) for view in views_of(MIXED)]
    sizes = [sum(tile.token_count for tile in codec.cells_of(view)) for view in views]
    assert len(codec.cells_of(MIXED)) >= len(views) == 4
    maps = [generator.random((2, size, size)).astype(np.float32) ** 3 / size for size in sizes]
    maps = [one if grid else np.tril(one) for one in maps]
    record = base_of() | codec.encode(maps, tiles=MIXED)
    check_record(record, (*base_fields(SEVERAL_PICTURES), *codec.fields()))
    assert list(value_damage(record, plan_of(codec))) == []
    found = as_tensors(codec.decode(record))
    assert isinstance(found, tuple)
    for one, view, decoded in zip(maps, views, found, strict=True):
        alone = codec.decode(several_to_arrays(view, (), 1) | codec.encode(one, tiles=view))
        assert isinstance(decoded, TeacherMap)
        np.testing.assert_array_equal(decoded.values.numpy(), alone.values)
        np.testing.assert_array_equal(decoded.kept.numpy(), alone.kept)
    for field in codec.fields():
        for longer in (False, True):
            array = record[field.name]
            wrong = np.concatenate([array, array[:1]]) if longer else array[:-1]
            assert list(value_damage(record | {field.name: wrong}, plan_of(codec))), (field.name, longer)


def test_columns_of_each_view_have_a_mass_of_one_at_most():
    codec = VisualColumnsCodec(groups=1)
    sizes = [7, 4, 4, 6]
    columns = np.concatenate([np.full((1, size), 1 / size, np.float32) for size in sizes], axis=1)
    record = base_of() | codec.encode(columns)
    assert list(value_damage(record, plan_of(codec))) == []
    np.testing.assert_allclose(codec.decode(record), columns, rtol=1e-3)
    columns[:, 7:9] += 0.1  # the sum over all is still far below four
    record |= codec.encode(columns)
    with pytest.raises(CacheFormatError, match=r"visual_columns has 1\.2 of the mass in one row"):
        codec.decode(record)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_hash": np.zeros((6, 16), np.uint8)}, "image_hash has a picture of zeros"),
        ({"tile_pictures": np.zeros((0, 2), "<u2")}, "tile_pictures has 0 entries for 5 tiles"),
        ({"tile_pictures": np.zeros((0, 2), "<u2"), "frame_times": np.zeros((0, 2), "<f4")}, "expected 5, of 6 pictures"),
        ({"tiles": np.zeros((0, 6), "<f4"), "tile_pictures": np.zeros((0, 2), "<u2"),
          "frame_times": np.zeros((0, 2), "<f4")}, "has 6 pictures, but there are 0 tiles"),
        ({"frame_times": np.array([STILL] * 6, "<f4")}, "no frame; there should be no entries"),
        ({"frame_times": np.array([(-1, 0.5), *TIMES[1:]], "<f4")}, "a still one (-1) with a second"),
        ({"frame_times": np.array([STILL, *[(1, 3.0), (1, 0.5)] * 2, STILL], "<f4")}, "frame_times falls"),
        ({"labels": np.zeros(2, "<u4")}, "expected one of [2, 3] rows"),
        ({"answer_attention": np.zeros((5, 1, 6), "u1"), "answer_image_mass": np.zeros((5, 1), "<f2")}, "has 5 entries"),
        ({"answer_frames_mass": np.full((6, 1), 0.9, "<f2")}, "the mass on all pictures"),
        ({"answer_frames": np.full((6, 1, 4), 7, "u1")}, "a row whose largest code is neither 0 nor"),
    ],
)  # fmt: skip
def test_damage_of_records_of_several_pictures_is_named(changes, words):
    codec = RowAttentionCodec(grid=(2, 3), groups=1, several=True, frame_grid=(2, 2))
    live = rows_of(np.random.default_rng(0), 3, 1, 6 + 4 + 4 + 6)
    record = base_of() | codec.encode(live, tiles=MIXED)
    assert list(value_damage(record, plan_of(codec))) == []
    assert any(words in line for line in value_damage(record | changes, plan_of(codec)))


def test_a_codec_of_one_picture_is_damage_in_a_cache_of_several():
    codec = RowAttentionCodec(grid=(2, 3), groups=1)
    record = base_of((), (), 0) | codec.encode(AttentionRows(np.zeros((3, 1, 6)), np.zeros((3, 1))))
    assert any("has several=false" in line for line in value_damage(record, plan_of(codec)))


def test_what_is_decoded_is_the_live_type():
    codec = RowAttentionCodec(grid=(2, 3), groups=1, several=True)
    record = base_of() | codec.encode(rows_of(np.random.default_rng(0), 3, 1, 24), tiles=MIXED)
    assert isinstance(as_tensors(codec.decode(record)), RowAttention)
