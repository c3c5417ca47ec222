"""Visual maps in every preset: an exact sink mask, stated bounds on values, and damage that is refused."""

import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, tiles_to_array
from vlm_distill_cache.common.cache.schema import MAP_AXES, check_record
from vlm_distill_cache.common.codecs.kept_columns import (
    KEPT_LEVELS,
    RUNS,
    SHORT_COLUMN,
    SINK_STEPS,
    growing_runs,
    nearest_first,
    pack_mask,
    unpack_mask,
)
from vlm_distill_cache.common.codecs.live import TeacherMap, as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError

FILTERED = ("exact", "blocks", "compact")


def maps_of(groups: int, cells: int, *, seed: int, causal: bool = True, spread: float = 2.0) -> Tensor:
    """Attention-like maps with a few sinks."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(groups, cells, cells, generator=generator)
    scores += 3.0 * (torch.rand(groups, 1, cells, generator=generator) < 0.1)
    if causal:
        scores.masked_fill_(torch.ones(cells, cells, dtype=torch.bool).triu(1), -math.inf)
    return 0.5 * scores.softmax(-1).nan_to_num()


def reference_mask(maps: Tensor, content: Tensor | None) -> Tensor:
    """The released filter's teacher half, group by group in float64."""
    kept = torch.zeros_like(maps, dtype=torch.bool)
    where = torch.ones(maps.shape[1], dtype=torch.bool) if content is None else content
    pairs = where[:, None] & where
    for group, one in enumerate(maps.double()):
        if not pairs.any():
            continue
        inside = one[pairs]
        std = inside.std(unbiased=True) if len(inside) > 1 else torch.tensor(0.0)
        kept[group] = pairs & (one <= inside.mean() + std) & (one != 0)
    return kept


def tiles_of(cells: int, *, padding: int = 0) -> tuple[Tile, ...]:
    """A tile of one row, of whose tokens the last ones lie in padding."""
    return (Tile(1, cells, (0.0, 0.0, cells / (cells - padding), 1.0)),) if cells else ()


def square(side: int) -> tuple[Tile, ...]:
    return (Tile(side, side, (0.0, 0.0, 1.0, 1.0)),)


def cached(codec: VisualMapCodec, maps: Tensor, tiles: tuple[Tile, ...] | None = None) -> TeacherMap:
    """Through a record and back; a pooled map's cells are those of one tile."""
    if tiles is None:
        tiles = square(codec.grid) if codec.grid and maps.shape[1] else tiles_of(maps.shape[1])
    record = codec.encode(maps, tiles=tiles)
    check_record(record, codec.fields())
    return as_tensors(codec.decode(record | {"tiles": tiles_to_array(tiles)}))


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**31), groups=st.integers(1, 3), cells=st.integers(0, 14), padding=st.integers(0, 5),
    preset=st.sampled_from(FILTERED), spread=st.sampled_from([0.0, 1.0, 4.0, 30.0]),
)  # fmt: skip
def test_the_sink_mask_is_exact(seed: int, groups: int, cells: int, padding: int, preset: str, spread: float):
    maps = maps_of(groups, cells, seed=seed, spread=spread)
    tiles = tiles_of(cells, padding=max(0, min(padding, cells - 1)))
    content = content_mask(tile_boxes(tiles))
    found = cached(VisualMapCodec(groups=groups, preset=preset), maps, tiles)  # type: ignore[arg-type]
    assert torch.equal(found.kept, reference_mask(maps, content))
    assert torch.equal(found.kept, TeacherMap.from_maps(maps, token_mask=content).kept)
    assert found.values.shape == maps.shape
    assert bool((found.values[found.kept] > 0).all())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), side=st.integers(1, 4), preset=st.sampled_from(FILTERED))
def test_the_sink_mask_of_a_pooled_map_is_exact(seed: int, side: int, preset: str):
    maps = maps_of(2, side * side, seed=seed, causal=False)
    found = cached(VisualMapCodec(groups=2, preset=preset, grid=side), maps)  # type: ignore[arg-type]
    assert torch.equal(found.kept, reference_mask(maps, None))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), cells=st.integers(1, 90), spread=st.sampled_from([0.5, 2.0, 6.0]))
def test_values_of_exact_are_within_the_stated_bound(seed: int, cells: int, spread: float):
    maps = maps_of(2, cells, seed=seed, spread=spread)
    found = cached(VisualMapCodec(groups=2, preset="exact"), maps)
    assert torch.equal(found.values == 0, maps == 0)
    for group in range(2):
        one, decoded, kept = maps[group].double(), found.values[group].double(), found.kept[group]
        threshold = one.mean() + (one.std() if cells > 1 else 0)
        sinks = ~kept & (one > 0)
        factor = (one.max() / threshold).log().clamp_min(0) / (2 * SINK_STEPS) + 1e-4
        assert bool(((decoded[sinks] / one[sinks]).log().abs() <= factor).all())
        column = (decoded * kept).sum(0) / kept.sum(0).clamp_min(1)
        ratio = (decoded / column.clamp_min(1e-300)).sqrt()
        bound = (1 + ratio) / (2 * KEPT_LEVELS) + 2**-11 + 2**-12
        error = (decoded / threshold).sqrt() - (one / threshold).sqrt()
        assert bool((error.abs() <= bound)[kept].all())


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**31), cells=st.integers(1, 100), preset=st.sampled_from(FILTERED))
def test_the_mean_over_the_kept_pairs_of_a_column_is_float16(seed: int, cells: int, preset: str):
    maps = maps_of(2, cells, seed=seed)
    found = cached(VisualMapCodec(groups=2, preset=preset), maps)  # type: ignore[arg-type]
    count = found.kept.sum(1).clamp_min(1)
    expected = (maps.double() * found.kept).sum(1) / count
    threshold = maps.double().flatten(1).mean(1) + (maps.double().flatten(1).std(1) if cells > 1 else 0)
    got = (found.values.double() * found.kept).sum(1) / count
    torch.testing.assert_close(got, expected, rtol=2**-11 + 1e-5, atol=float(threshold.max()) * 2**-24)


@pytest.mark.parametrize("preset", ["blocks", "compact"])
def test_a_long_column_keeps_the_means_of_its_runs(preset: str):
    cells, tiles = 150, (Tile(10, 15, (0.0, 0.0, 1.0, 1.0)),)
    maps = maps_of(1, cells, seed=3)
    found = cached(VisualMapCodec(groups=1, preset=preset), maps, tiles)  # type: ignore[arg-type]
    one, decoded, kept = maps[0].double(), found.values[0].double(), found.kept[0]
    threshold = float(one.mean() + one.std())
    runs, checked = RUNS[preset], 0
    for key in range(cells):
        steps = [(q // 15 - key // 15) ** 2 + (q % 15 - key % 15) ** 2 for q in range(cells)]
        near = sorted(range(cells), key=lambda query, steps=steps: (steps[query], query))
        queries = torch.tensor([query for query in near if kept[query, key]])
        if len(queries) < SHORT_COLUMN:
            continue
        run_of = torch.from_numpy(growing_runs(cells, runs.growth)[: len(queries)])
        column = float(one[queries, key].mean())
        for run in run_of.unique():
            members = queries[run_of == run]
            values = decoded[members, key]
            assert float(values.max() - values.min()) <= 1e-6 * float(values.max())
            bound = (1 + math.sqrt(float(values[0]) / column)) / (2 * runs.levels) + 2**-10
            error = math.sqrt(float(values[0]) / threshold) - math.sqrt(float(one[members, key].mean()) / threshold)
            assert abs(error) <= bound
            checked += 1
    assert checked > 500


@pytest.mark.parametrize("preset", ["exact", "blocks", "compact", "exact8", "f4"])
def test_degenerate_maps_survive(preset: str):
    codec = VisualMapCodec(groups=1, preset=preset)  # type: ignore[arg-type]
    assert cached(codec, torch.zeros(1, 0, 0)).values.shape == (1, 0, 0)
    one = cached(codec, torch.full((1, 1, 1), 0.25))
    assert bool(one.kept.all())  # its own mean is no sink, whatever the rounding
    assert float(one.values) == pytest.approx(0.25, rel=0.04)
    empty = cached(codec, torch.zeros(1, 9, 9))
    assert not bool(empty.values.any())
    assert not bool(empty.kept.any())
    faint = torch.full((1, 5, 5), 1e-38).tril()
    assert torch.equal(cached(codec, faint).kept, TeacherMap.from_maps(faint).kept) or preset == "exact8"


@pytest.mark.parametrize("preset", FILTERED)
def test_uniform_maps_have_no_sinks(preset: str):
    """Mean and threshold are equal there: a sum rounded down would make every pair a sink."""
    even = torch.full((1, 49, 49), 0.7 / 49)
    found = cached(VisualMapCodec(groups=1, preset=preset, grid=7), even)  # type: ignore[arg-type]
    assert bool(found.kept.all())
    torch.testing.assert_close(found.values, even, rtol=1e-3, atol=0)


@pytest.mark.parametrize("preset", FILTERED)
def test_the_last_value_below_the_threshold_and_the_first_above_it_are_told_apart(preset: str):
    """Neighbouring floats on either side of mean + std, found by bisection over their bits."""
    base = maps_of(1, 12, seed=5)

    def with_value(bits: int) -> Tensor:
        maps = base.clone()
        maps[0, 11, 4] = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
        return maps

    low, high = (int(torch.tensor(value).view(torch.int32)) for value in (1e-6, 0.9))
    while high - low > 1:
        middle = (low + high) // 2
        kept = bool(reference_mask(with_value(middle), None)[0, 11, 4])
        low, high = (middle, high) if kept else (low, middle)
    for bits, kept in ((low, True), (high, False)):
        found = cached(VisualMapCodec(groups=1, preset=preset), with_value(bits))  # type: ignore[arg-type]
        assert bool(found.kept[0, 11, 4]) is kept
        assert torch.equal(found.kept, reference_mask(with_value(bits), None))


@pytest.mark.parametrize("preset", FILTERED)
def test_padding_is_stored_as_zero_and_leaves_the_statistics_alone(preset: str):
    tiles = tiles_of(9, padding=3)
    maps = maps_of(1, 9, seed=7)
    loud = maps.clone()
    loud[:, 6:, :] = 0.1
    codec = VisualMapCodec(groups=1, preset=preset)  # type: ignore[arg-type]
    quiet, found = cached(codec, maps, tiles), cached(codec, loud.tril(), tiles)
    assert torch.equal(found.kept, quiet.kept)
    torch.testing.assert_close(found.values * found.kept, quiet.values * quiet.kept)
    assert not bool(found.kept[:, 6:].any())


@pytest.mark.parametrize("preset", ["blocks", "compact"])
def test_a_map_without_single_values_refuses_other_losses(preset: str):
    found = cached(VisualMapCodec(groups=1, preset=preset), maps_of(1, 9, seed=0))  # type: ignore[arg-type]
    with pytest.raises(CacheMismatchError, match=r"the loss of the test needs .*map_preset=exact"):
        found.whole("the loss of the test")


def test_maps_of_sinks_only_are_not_empty():
    """A loss leaves out samples whose teacher has no mass, and must not take sinks for that."""
    maps = torch.zeros(1, 30, 30)
    maps[0, 29, 3] = 0.9
    for preset in FILTERED:
        found = cached(VisualMapCodec(groups=1, preset=preset), maps)  # type: ignore[arg-type]
        assert bool(found.values.any())
        assert not bool(found.kept.any())


@settings(deadline=None, max_examples=60)
@given(
    groups=st.integers(1, 4), cells=st.integers(0, 12), causal=st.booleans(), seed=st.integers(0, 2**31),
    share=st.floats(0, 1),
)  # fmt: skip
def test_masks_pack_and_unpack(groups: int, cells: int, causal: bool, seed: int, share: float):
    kept = np.random.default_rng(seed).random((groups, cells, cells)) < share
    if causal:
        kept = np.triu(kept)
    packed = pack_mask(kept, causal=causal)
    assert np.array_equal(unpack_mask(packed, groups, cells, causal=causal), kept)
    with pytest.raises(CacheFormatError, match="bytes of mask"):
        unpack_mask(np.append(packed, np.uint8(0)), groups, cells, causal=causal)


def test_runs_grow_and_leave_no_gap():
    assert growing_runs(0, 2).tolist() == []
    runs = growing_runs(576, 2)
    assert runs[:8].tolist() == [0, 1, 2, 3, 4, 4, 5, 5]
    assert set(np.diff(runs)) == {0, 1}
    lengths = np.bincount(runs)[:-1]
    assert (np.diff(lengths) >= 0).all()


@settings(deadline=None, max_examples=200)
@given(preset=st.sampled_from(FILTERED), grid=st.sampled_from([0, 3]), seed=st.integers(0, 2**31), data=st.data())
def test_damaged_arrays_are_refused_or_give_finite_maps(preset: str, grid: int, seed: int, data: st.DataObject):
    codec = VisualMapCodec(groups=2, preset=preset, grid=grid)  # type: ignore[arg-type]
    record = codec.encode(maps_of(2, 9, seed=seed, causal=not grid), tiles=square(3))
    name = data.draw(st.sampled_from(sorted(record)))
    record["tiles"] = tiles_to_array(square(3))
    array = record[name]
    kind = data.draw(st.sampled_from(["bytes", "short", "long", "empty", "shape"]))
    if kind == "bytes":
        raw = np.random.default_rng(seed).integers(0, 256, array.nbytes, dtype=np.uint8)
        array = raw.view(array.dtype).reshape(array.shape)
    elif kind == "shape":
        array = array[..., None]
    else:
        array = {"short": array[:-1], "long": np.concatenate([array, array[:1]]), "empty": array[:0]}[kind]
    record[name] = array
    if kind != "bytes":
        with pytest.raises(CacheFormatError, match="cachectl verify"):
            as_tensors(codec.decode(record))
        return
    with suppress(CacheFormatError):
        found = as_tensors(codec.decode(record))
        assert bool(found.values.isfinite().all())
        assert bool((found.values >= 0).all())


@pytest.mark.parametrize("preset", FILTERED)
def test_a_map_of_other_tokens_than_the_tiles_is_refused(preset: str):
    codec = VisualMapCodec(groups=1, preset=preset)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a map of 16 cells"):
        codec.encode(maps_of(1, 9, seed=0), tiles=square(4))
    if codec.complete:
        return
    with pytest.raises(ValueError, match="needs the tiles of the 9 cells"):
        codec.encode(maps_of(1, 9, seed=0))
    record = codec.encode(maps_of(1, 9, seed=0), tiles=square(3))
    with pytest.raises(CacheFormatError, match="its map has 9 cells, its tiles 16"):
        as_tensors(codec.decode(record | {"tiles": tiles_to_array(square(4))}))


def test_queries_are_taken_nearest_first_and_other_tiles_last():
    order = nearest_first(((2, 2), (1, 2)))
    assert order[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert order[3].tolist() == [3, 1, 2, 0, 4, 5]
    assert order[5].tolist() == [5, 4, 0, 1, 2, 3]
    assert nearest_first(()).shape == (0, 0)


@pytest.mark.parametrize("preset", FILTERED)
def test_the_fields_depend_on_the_image_alone(preset: str):
    """Records of other conversations about the same picture leave them empty."""
    codec = VisualMapCodec(groups=2, preset=preset)  # type: ignore[arg-type]
    assert {field.axis for field in codec.fields()} <= set(MAP_AXES)
    record = codec.encode(torch.zeros(2, 0, 0))
    assert {name: len(array) for name, array in record.items()} == {field.name: 0 for field in codec.fields()}


def test_plans_from_before_maps_could_be_pooled_are_read():
    stored = {"codec": "visual_map", "groups": 7, "preset": "exact8"}
    assert codec_from_dict(stored) == VisualMapCodec(groups=7, preset="exact8")
    assert VisualMapCodec(groups=7, preset="exact8").to_dict() == stored
    pooled = VisualMapCodec(groups=1, preset="blocks", grid=12)
    assert codec_from_dict(pooled.to_dict()) == pooled


def test_the_stored_arrays_are_the_pinned_ones():
    """Old caches are read with these tables: if this fails, the format changed."""
    maps = torch.tensor(
        [[[1 / 2, 0, 0, 0], [1 / 4, 1 / 8, 0, 0], [1 / 16, 1 / 32, 1 / 4, 0], [2**-7, 1 / 2, 1 / 32, 2**-9]]]
    )
    record = {preset: VisualMapCodec(groups=1, preset=preset).encode(maps, tiles=square(2)) for preset in FILTERED}  # type: ignore[arg-type]
    for found in record.values():
        assert found["map_scale"].tolist() == [[pytest.approx(0.283767, abs=1e-6)]]
        assert found["map_means"][:, 0].tolist() == [
            0.376220703125,
            0.275390625,
            0.49560546875,
            0.0068817138671875,
        ]
    assert record["exact"]["visual_map"][:, 0].tolist() == [255, 90, 64, 45, 32, 90, 16, 255, 32, 8]
    assert record["exact"]["map_largest"].tolist() == [[0.5]]
    for preset, codes in (
        ("blocks", [120, 60, 22, 85, 43, 120, 43, 11]),
        ("compact", [60, 30, 11, 42, 21, 60, 21, 6]),
    ):
        assert record[preset]["map_mask"].tolist() == [0b01111101, 0b11000000]
        assert record[preset]["map_codes"].tolist() == codes
