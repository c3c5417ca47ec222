"""Attention codecs: stated bounds, zeros, triangles, and dictionaries that rebuild them."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.cache.schema import check_record
from vlm_distill_cache.common.codecs.live import RowAttention, as_tensors
from vlm_distill_cache.common.codecs.quantise import decode_log8, encode_log8, log8_half_step, log8_table
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RANGE_NATS, RowAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import MAP_RANGE_NATS, VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError

HALF_TINY = 2**-25  # half the spacing of float16 near zero


def random_cells(rows: int, groups: int, cells: int, *, seed: int = 0, power: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(rows, groups, cells, generator=generator, dtype=torch.float64) ** power
    mass = torch.rand(rows, groups, 1, generator=generator)
    return (mass * raw / raw.sum(-1, keepdim=True)).float()


def random_maps(groups: int, tokens: int, *, seed: int = 0) -> torch.Tensor:
    scores = 4 * torch.randn(groups, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return 0.3 * scores.masked_fill(future, -math.inf).softmax(-1)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(0, 6), groups=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)), power=st.sampled_from([0.0, 1.0, 8.0, 60.0]),
)  # fmt: skip
def test_row_attention_round_trip_is_within_the_stated_bound(
    seed: int, rows: int, groups: int, grid: tuple[int, int], power: float
):
    codec = RowAttentionCodec(grid=grid, groups=groups)
    live = RowAttention.from_cells(random_cells(rows, groups, codec.cells, seed=seed, power=power))
    record = codec.encode(live)
    check_record(record, codec.fields())
    cached = as_tensors(codec.decode(record))
    torch.testing.assert_close(cached.image_mass, live.image_mass, rtol=2**-11, atol=HALF_TINY)
    torch.testing.assert_close(cached.cells.sum(-1), cached.image_mass, rtol=1e-5, atol=1e-9)
    share = live.cells / live.image_mass[..., None]
    cached_share = cached.cells / cached.image_mass[..., None]
    spill = codec.cells * math.exp(-RANGE_NATS)  # cells below the range, seen by all others through rescaling
    factor = math.exp(2 * log8_half_step(RANGE_NATS)) * (1 + spill) + 1e-5
    small = math.exp(-RANGE_NATS) * factor * share.amax(-1, keepdim=True)
    assert bool((cached_share <= share * factor + small).all())
    assert bool((cached_share >= share / factor - small).all())


def test_rows_without_image_stay_exactly_zero():
    cells = random_cells(5, 2, 9)
    cells[1], cells[3, 0] = 0, 0
    codec = RowAttentionCodec(grid=(3, 3), groups=2)
    cached = as_tensors(codec.decode(codec.encode(RowAttention.from_cells(cells))))
    assert torch.equal(cached.cells == 0, cells == 0)
    assert torch.equal(cached.image_mass == 0, cells.sum(-1) == 0)


def test_zero_cells_stay_zero_and_faint_ones_stay_visible():
    cells = torch.tensor([[[0.5, 0.0, 1e-30, 0.25]]])
    codec = RowAttentionCodec(grid=(2, 2), groups=1)
    cached = as_tensors(codec.decode(codec.encode(RowAttention.from_cells(cells)))).cells[0, 0]
    assert cached[1] == 0
    assert 0 < cached[2] < 1e-5


@pytest.mark.parametrize("rows", [0, 4])
def test_exact_row_attention_is_bit_for_bit(rows: int):
    codec = RowAttentionCodec(grid=(2, 3), groups=2, exact=True)
    live = RowAttention.from_cells(random_cells(rows, 2, 6))
    record = codec.encode(live)
    check_record(record, codec.fields())
    cached = as_tensors(codec.decode(record))
    assert torch.equal(cached.cells, live.cells)
    assert torch.equal(cached.image_mass, live.image_mass)


def test_row_attention_joins():
    parts = [RowAttention.from_cells(random_cells(n, 1, 4, seed=n)) for n in (2, 3)]
    joined = RowAttention.cat(parts)
    assert len(joined) == 5
    torch.testing.assert_close(joined.cells.sum(-1), joined.image_mass)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.1])
def test_attention_that_is_no_mass_is_refused(bad: float):
    cells = random_cells(2, 1, 4)
    cells[1, 0, 2] = bad
    with pytest.raises(SampleError, match="answer attention: expected finite masses of at least 0"):
        RowAttentionCodec(grid=(2, 2), groups=1).encode(RowAttention.from_cells(cells))


def test_shapes_of_another_codec_are_refused():
    codec = RowAttentionCodec(grid=(2, 2), groups=1)
    with pytest.raises(ValueError, match=r"expected cells \[2, 1, 4\]"):
        codec.encode(RowAttention.from_cells(random_cells(2, 1, 9)))
    record = RowAttentionCodec(grid=(3, 3), groups=1).encode(RowAttention.from_cells(random_cells(2, 1, 9)))
    with pytest.raises(CacheFormatError, match=r"expected cells \(2, 1, 4\)"):
        as_tensors(codec.decode(record))
    with pytest.raises(ValueError, match=r"columns \[1, N\]"):
        VisualColumnsCodec(groups=1).encode(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"maps \[1, N, N\]"):
        VisualMapCodec(groups=1).encode(torch.zeros(1, 4, 5))
    with pytest.raises(CacheFormatError, match=r"expected \(N, 2\)"):
        as_tensors(VisualColumnsCodec(groups=2).decode({"visual_columns": np.zeros((5, 1), np.float16)}))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 36])
def test_visual_columns_round_trip(exact: bool, tokens: int):
    columns = random_maps(3, tokens).mean(1) if tokens else torch.zeros(3, 0)
    codec = VisualColumnsCodec(groups=3, exact=exact)
    record = codec.encode(columns)
    check_record(record, codec.fields())
    cached = as_tensors(codec.decode(record))
    assert cached.shape == columns.shape
    if exact:
        assert torch.equal(cached, columns)
    else:
        torch.testing.assert_close(cached, columns, rtol=2**-11, atol=HALF_TINY)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), groups=st.integers(1, 3), tokens=st.integers(0, 12))
def test_visual_map_round_trip_is_within_the_stated_bound(seed: int, groups: int, tokens: int):
    maps = random_maps(groups, tokens, seed=seed)
    coarse, exact = VisualMapCodec(groups=groups), VisualMapCodec(groups=groups, preset="f4")
    for codec in (coarse, exact):
        check_record(codec.encode(maps), codec.fields())
    assert torch.equal(as_tensors(exact.decode(exact.encode(maps))).values, maps)
    cached = as_tensors(coarse.decode(coarse.encode(maps))).values
    assert torch.equal(cached == 0, maps == 0)
    factor, least = math.exp(log8_half_step(MAP_RANGE_NATS)), math.exp(-MAP_RANGE_NATS)
    in_range = maps >= least
    assert bool((cached <= maps * factor)[in_range].all())
    assert bool((cached >= maps / factor)[in_range].all())
    faint = (maps > 0) & ~in_range
    assert bool((cached[faint] <= least * 1.001).all())


def test_the_triangle_is_stored_row_by_row():
    maps = torch.tensor([[[0.5, 0.0, 0.0], [0.1, 0.2, 0.0], [0.3, 0.4, 0.25]]])
    record = VisualMapCodec(groups=1, preset="f4").encode(maps)
    assert record["visual_map"][:, 0].tolist() == pytest.approx([0.5, 0.1, 0.2, 0.3, 0.4, 0.25])


def test_a_map_that_looks_ahead_or_is_no_probability_is_refused():
    ahead = random_maps(1, 4)
    ahead[0, 1, 3] = 0.1
    with pytest.raises(SampleError, match="attends to a later one"):
        VisualMapCodec(groups=1).encode(ahead)
    with pytest.raises(SampleError, match="at most 1, got"):
        VisualMapCodec(groups=1).encode(torch.eye(3)[None] * 2)
    with pytest.raises(SampleError, match="visual map: expected finite"):
        VisualMapCodec(groups=1).encode(torch.full((1, 2, 2), math.nan))


def test_a_length_that_is_no_triangle_is_refused():
    with pytest.raises(CacheFormatError, match="cachectl verify"):
        as_tensors(VisualMapCodec(groups=1).decode({"visual_map": np.zeros((5, 1), np.uint8)}))


def test_log8_codes_decode_to_values_that_encode_to_them():
    codes = np.arange(256, dtype=np.uint8)
    assert encode_log8(decode_log8(codes, 12.0), 12.0).tolist() == codes.tolist()
    table = log8_table(12.0)
    assert table[0] == 0
    assert table[255] == 1
    assert table[1] == pytest.approx(math.exp(-12.0))


@pytest.mark.parametrize(
    "codec",
    [
        RowAttentionCodec(grid=(12, 12), groups=7),
        RowAttentionCodec(grid=(3, 4), groups=1, exact=True),
        VisualColumnsCodec(groups=2),
        VisualMapCodec(groups=1, preset="f4"),
    ],
)
def test_the_stored_dictionary_is_plain_json_and_rebuilds_the_codec(codec: RowAttentionCodec):
    stored = json.loads(json.dumps(codec.to_dict()))
    assert stored["codec"] == codec.signal
    assert codec_from_dict(stored) == codec


def test_a_damaged_dictionary_is_refused():
    stored = VisualMapCodec(groups=1).to_dict()
    with pytest.raises(CacheFormatError, match="preset: expected one of"):
        codec_from_dict(stored | {"preset": "half"})
    with pytest.raises(CacheFormatError, match="expected codec 'visual_columns', got 'visual_map'"):
        VisualColumnsCodec.from_dict(stored)
    with pytest.raises(CacheFormatError, match="newer version"):
        codec_from_dict({})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RowAttentionCodec(grid=(0, 3), groups=1), "grid rows"),
        (lambda: RowAttentionCodec(grid=(3, 3.0), groups=1), "grid cols"),  # type: ignore[arg-type]
        (lambda: RowAttentionCodec(grid=[3, 3], groups=1), "grid"),  # type: ignore[arg-type]
        (lambda: RowAttentionCodec(grid=(3, 3), groups=0), "groups"),
        (lambda: RowAttentionCodec(grid=(3, 3), groups=1, exact=1), "exact"),  # type: ignore[arg-type]
        (lambda: VisualColumnsCodec(groups=-1), "groups"),
        (lambda: VisualMapCodec(groups=1, preset="f2"), "preset"),  # type: ignore[arg-type]
    ],
)
def test_a_codec_can_only_be_built_valid(build, message: str):
    with pytest.raises(ConfigError, match=message):
        build()
