"""Row attention, of answers and of all text: bounds of cells and masses, and pooling that conserves mass."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, pool_keys, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile, grid_tile
from vlm_distill_cache.common.cache.schema import check_record
from vlm_distill_cache.common.codecs.live import RowAttention, as_tensors
from vlm_distill_cache.common.codecs.quantise import log8_half_step
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RANGE_NATS, RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.errors import CacheFormatError, SampleError

CODECS = [RowAttentionCodec, TextAttentionCodec]


def random_rows(rows: int, groups: int, cells: int, *, seed: int, power: float) -> torch.Tensor:
    """Masses from nearly flat (a small power) to a single peak, between 0 and 1 on the image."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.rand(rows, groups, cells, generator=generator, dtype=torch.float64) ** power
    mass = torch.rand(rows, groups, 1, generator=generator, dtype=torch.float64) ** power
    return (mass * raw / raw.sum(-1, keepdim=True).clamp_min(1e-300)).float()


@settings(deadline=None, max_examples=80)
@given(
    codec_class=st.sampled_from(CODECS),
    seed=st.integers(0, 2**31),
    rows=st.integers(0, 5),
    groups=st.integers(1, 3),
    grid=st.tuples(st.integers(1, 13), st.integers(1, 13)),
    power=st.sampled_from([0.1, 1.0, 8.0, 40.0]),
)
def test_cells_and_masses_on_and_off_the_image_keep_the_stated_bounds(codec_class, seed, rows, groups, grid, power):
    codec = codec_class(grid=grid, groups=groups)
    live = RowAttention.from_cells(random_rows(rows, groups, codec.cells, seed=seed, power=power))
    record = codec.encode(live)
    check_record(record, codec.fields())
    cached = as_tensors(codec.decode(record))
    mass, found = live.image_mass.double(), cached.image_mass.double()
    tolerance = (mass * 2**-11).clamp_min(2**-25)
    assert bool(((found - mass).abs() <= tolerance).all())
    off, cached_off = 1 - mass, 1 - found
    assert bool(((cached_off - off).abs() <= 2**-12).all())
    # Cells: a factor of two half steps relative to the mass, or off by less than e^-12 of the largest.
    steps = math.exp(2 * log8_half_step(RANGE_NATS))
    faint = codec.cells * math.exp(-RANGE_NATS)
    kept = (found > 0)[..., None] & (live.cells > 0)
    share, cached_share = (
        cells.double() / total.clamp_min(1e-300)[..., None]
        for cells, total in ((live.cells, mass), (cached.cells, found))
    )
    largest = share.amax(-1, keepdim=True).expand_as(share)
    high, low = share * steps * (1 + faint), share / (steps * (1 + faint))
    slack = largest * math.exp(-RANGE_NATS) * (1 + faint) * steps
    assert bool((cached_share <= high + slack)[kept].all())
    assert bool((cached_share >= low - slack)[kept].all())
    assert bool((cached.cells == 0)[~kept].all())
    torch.testing.assert_close(cached.cells.sum(-1), cached.image_mass, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("codec_class", CODECS)
def test_rows_that_do_not_look_at_the_image_and_no_rows_at_all(codec_class):
    codec = codec_class(grid=(2, 2), groups=1)
    blind = as_tensors(codec.decode(codec.encode(RowAttention.from_cells(torch.zeros(3, 1, 4)))))
    assert not blind.cells.any()
    assert not blind.image_mass.any()
    assert len(as_tensors(codec.decode(codec.encode(RowAttention.from_cells(torch.zeros(0, 1, 4)))))) == 0


def test_text_rows_have_names_and_an_axis_of_their_own():
    answer, text = RowAttentionCodec(grid=(3, 4), groups=2), TextAttentionCodec(grid=(3, 4), groups=2)
    assert [(field.name, field.axis) for field in text.fields()] == [
        ("text_attention", "text"),
        ("text_image_mass", "text"),
    ]
    both = answer.encode(RowAttention.from_cells(random_rows(2, 2, 12, seed=0, power=1.0)))
    both |= text.encode(RowAttention.from_cells(random_rows(5, 2, 12, seed=1, power=1.0)))
    check_record(both, (*answer.fields(), *text.fields()))
    assert len(as_tensors(answer.decode(both))) == 2
    assert len(as_tensors(text.decode(both))) == 5


def test_the_dictionaries_tell_the_two_apart_and_old_ones_are_read():
    text = TextAttentionCodec(grid=(3, 4), groups=2, exact=True)
    stored = json.loads(json.dumps(text.to_dict()))
    assert stored == {"codec": "text_attention", "grid": [3, 4], "groups": 2, "exact": True}
    assert codec_from_dict(stored) == text
    assert codec_from_dict(stored | {"codec": "answer_attention"}) != text
    with pytest.raises(CacheFormatError, match="expected codec 'text_attention', got 'answer_attention'"):
        TextAttentionCodec.from_dict(stored | {"codec": "answer_attention"})


def test_errors_name_the_signal():
    codec = TextAttentionCodec(grid=(2, 2), groups=1)
    with pytest.raises(SampleError, match="text attention: expected finite masses"):
        codec.encode(RowAttention.from_cells(torch.full((1, 1, 4), math.nan)))
    record = TextAttentionCodec(grid=(1, 3), groups=1).encode(RowAttention.from_cells(torch.ones(2, 1, 3) / 9))
    with pytest.raises(CacheFormatError, match=r"text attention of a record: expected cells \(2, 1, 4\)"):
        as_tensors(codec.decode(record))


GRIDS = [
    ((24, 24), (7, 7)),
    ((27, 27), (12, 12)),
    ((24, 24), (12, 12)),
    ((5, 3), (12, 12)),
    ((16, 9), (4, 7)),
]


@pytest.mark.parametrize(("tokens", "cells"), GRIDS)
def test_pooling_conserves_mass_whether_or_not_the_grids_divide(tokens, cells):
    overlap = overlap_matrix(tile_boxes((grid_tile(*tokens),)), tile_boxes((grid_tile(*cells),)))
    attention = random_rows(6, 2, tokens[0] * tokens[1], seed=3, power=8.0)
    pooled = pool_keys(attention, overlap)
    torch.testing.assert_close(pooled.sum(-1), attention.sum(-1), rtol=2e-6, atol=1e-7)
    assert bool((pooled >= 0).all())


@pytest.mark.parametrize(("tokens", "cells"), GRIDS)
def test_pooling_is_the_shared_area_token_by_token(tokens, cells):
    """A slow reference: each token's mass spread evenly over its box, cell by cell."""
    overlap = overlap_matrix(tile_boxes((grid_tile(*tokens),)), tile_boxes((grid_tile(*cells),)))
    attention = random_rows(1, 1, tokens[0] * tokens[1], seed=5, power=2.0)[0, 0]
    expected = torch.zeros(cells[0], cells[1], dtype=torch.float64)
    for row in range(tokens[0]):
        for col in range(tokens[1]):
            mass = float(attention[row * tokens[1] + col])
            for y in range(row * cells[0] // tokens[0], cells[0]):
                height = min((row + 1) / tokens[0], (y + 1) / cells[0]) - max(row / tokens[0], y / cells[0])
                if height <= 0:
                    break
                for x in range(col * cells[1] // tokens[1], cells[1]):
                    width = min((col + 1) / tokens[1], (x + 1) / cells[1]) - max(col / tokens[1], x / cells[1])
                    if width <= 0:
                        break
                    expected[y, x] += mass * height * width * tokens[0] * tokens[1]
    torch.testing.assert_close(pool_keys(attention, overlap).double(), expected.flatten(), rtol=1e-4, atol=1e-8)


def test_tokens_in_padding_are_left_out_and_others_conserve_their_mass():
    """A picture twice as wide as high, padded to a square: the upper and lower quarter carry no image."""
    tiles = (Tile(rows=24, cols=24, region=(0.0, -0.5, 1.0, 1.5)),)
    boxes = tile_boxes(tiles)
    attention = random_rows(4, 1, 576, seed=7, power=3.0)
    pooled = pool_keys(attention, overlap_matrix(boxes, tile_boxes((grid_tile(7, 7),))))
    seen = (attention * content_mask(boxes)).sum(-1)
    torch.testing.assert_close(pooled.sum(-1), seen, rtol=2e-6, atol=1e-7)
    assert bool((seen < attention.sum(-1)).all())
