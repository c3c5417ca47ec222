"""Batches hold every sample unchanged, and masks show each token exactly what it may see."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.tiles import grid_tile
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.text.collate import (
    collate,
    join_image_inputs,
    joinable,
    length_buckets,
    supervised_rows,
    visual_keys,
)
from vlm_distill_cache.data.text.encoding import EncodedSample


def make_encoded(sample_id, shared, segments=(), *, image=True, rng=None):
    """A sample of ``shared`` common tokens and packed segments of the given lengths."""
    rng = rng or np.random.default_rng(0)
    total = shared + sum(segments)
    segment_ids = np.repeat(np.arange(len(segments) + 1), [shared, *segments])
    positions = np.concatenate([np.arange(shared), *(np.arange(shared, shared + n) for n in segments)])
    labels = np.where(rng.random(total) < 0.4, rng.integers(0, 90, total), IGNORE_INDEX)
    visual_mask = np.zeros(total, dtype=bool)
    visual_mask[1:3] = image
    return EncodedSample(
        sample_id=sample_id,
        input_ids=rng.integers(0, 90, total),
        labels=labels,
        visual_mask=visual_mask,
        position_ids=positions,
        segment_ids=segment_ids,
        image_inputs={"pixel_values": rng.random((1, 3, 4, 4)).astype(np.float32)} if image else {},
        tiles=(grid_tile(1, 2),) if image else (),
        image_hashes=(bytes([1] * 16),) if image else (),
    )


def samples_of(*shapes):
    rng = np.random.default_rng(7)
    return [make_encoded(f"s{i}", shared, segments, rng=rng) for i, (shared, segments) in enumerate(shapes)]


def test_unpacked_batches_get_a_two_dimensional_mask():
    samples = samples_of((5, ()), (8, ()))
    batch = collate(samples, pad_token_id=99)
    assert batch.attention_mask.dtype == torch.bool
    assert batch.attention_mask.tolist() == [[True] * 5 + [False] * 3, [True] * 8]
    for row, sample in enumerate(samples):
        length = len(sample)
        for name in ("input_ids", "labels", "position_ids", "visual_mask"):
            np.testing.assert_array_equal(getattr(batch, name)[row, :length], getattr(sample, name))
    assert batch.input_ids[0, 5:].tolist() == [99] * 3
    assert batch.labels[0, 5:].tolist() == [IGNORE_INDEX] * 3
    assert batch.lengths == (5, 8)
    assert batch.sample_ids == ("s0", "s1")
    assert len(batch) == 2


def test_packed_mask_equals_the_slow_definition():
    samples = samples_of((4, (2, 3)), (6, ()), (3, (1, 1, 2)))
    mask = collate(samples, pad_token_id=0).attention_mask
    longest = max(len(sample) for sample in samples)
    assert mask.shape == (3, 1, longest, longest)
    for row, sample in enumerate(samples):
        for query in range(longest):
            for key in range(longest):
                if query >= len(sample) or key >= len(sample):
                    expected = query == key
                else:
                    segments = sample.segment_ids
                    expected = key <= query and segments[key] in (0, segments[query])
                assert bool(mask[row, 0, query, key]) == expected


def test_no_row_of_a_packed_mask_is_empty():
    """A softmax over no key is NaN, and NaN times a zero loss weight is still NaN."""
    batch = collate(samples_of((4, (2, 3)), (2, ())), pad_token_id=0)
    assert batch.attention_mask.any(dim=-1).all()
    length = batch.input_ids.shape[1]
    query = torch.randn(2, 1, length, 8)
    out = torch.nn.functional.scaled_dot_product_attention(query, query, query, attn_mask=batch.attention_mask)
    assert torch.isfinite(out).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(3, 6), st.lists(st.integers(1, 4), max_size=3)), min_size=1, max_size=4))
def test_positions_helpers_equal_flatnonzero(shapes):
    samples = samples_of(*shapes)
    batch = collate(samples, pad_token_id=0)
    for found, expected in (
        (supervised_rows(batch), [sample.supervised_rows for sample in samples]),
        (visual_keys(batch), [np.flatnonzero(sample.visual_mask) for sample in samples]),
    ):
        assert found.shape == (len(samples), max(len(rows) for rows in expected))
        for row, positions in zip(found.tolist(), expected, strict=True):
            assert row == positions.tolist() + [-1] * (len(row) - len(positions))


def test_text_only_samples_among_images_keep_the_order_of_images():
    rng = np.random.default_rng(1)
    samples = [make_encoded(f"s{i}", 5, image=i != 1, rng=rng) for i in range(3)]
    batch = collate(samples, pad_token_id=0)
    assert batch.image_inputs["pixel_values"].shape == (2, 3, 4, 4)
    np.testing.assert_array_equal(batch.image_inputs["pixel_values"][1], samples[2].image_inputs["pixel_values"][0])
    assert [len(tiles) for tiles in batch.tiles] == [1, 0, 1]
    assert batch.image_hashes[1] == bytes(16)
    text = collate(samples[1:2], pad_token_id=0)
    assert text.image_inputs == {}
    assert set(text.model_inputs()) == {"input_ids", "attention_mask", "position_ids"}
    assert visual_keys(text).shape == (1, 0)
    assert text.to("cpu").image_inputs == {}


def test_model_inputs_and_device_move_carry_the_same_tensors():
    batch = collate(samples_of((5, ())), pad_token_id=0)
    moved = batch.to("cpu")
    assert set(moved.model_inputs()) == {"input_ids", "attention_mask", "position_ids", "pixel_values"}
    assert torch.equal(moved.labels, batch.labels)


def test_impossible_batches_are_refused():
    with pytest.raises(ConfigError, match="0 samples"):
        collate([], pad_token_id=0)
    rng = np.random.default_rng(0)
    odd = [make_encoded("a", 5, rng=rng), make_encoded("b", 5, rng=rng)]
    object.__setattr__(odd[1], "image_inputs", {"pixel_values": np.zeros((1, 3, 5, 5), dtype=np.float32)})
    with pytest.raises(ConfigError, match="differ in size"):
        collate(odd, pad_token_id=0)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 7))
def test_buckets_hold_every_index_once_and_neighbours_in_length(lengths, batch_size):
    buckets = length_buckets(lengths, batch_size)
    assert sorted(index for bucket in buckets for index in bucket) == list(range(len(lengths)))
    assert all(0 < len(bucket) <= batch_size for bucket in buckets)
    assert len(buckets) == -(-len(lengths) // batch_size)
    order = [lengths[index] for bucket in buckets for index in bucket]
    assert order == sorted(lengths, reverse=True)
    assert buckets == length_buckets(list(lengths), batch_size)


def test_buckets_of_no_size_are_refused():
    with pytest.raises(ConfigError, match="at least 1 sample, got 0"):
        length_buckets([1, 2], 0)


def test_pictures_that_cannot_be_joined_come_in_groups_that_can():
    """Against the slow way: every pair of a group collates, and no picture of one fits another's."""

    def with_inputs(name, **shapes):
        inputs = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
        return dataclasses.replace(make_encoded("x", 4, image=False), sample_id=name, image_inputs=inputs)

    small, wide = {"pixel_values": (1, 3, 4, 4)}, {"pixel_values": (2, 3, 4, 8)}
    more = {"pixel_values": (5, 3, 4, 4), "image_sizes": (1, 2)}
    samples = [
        with_inputs("t0"), with_inputs("a", **small), with_inputs("b", **wide), with_inputs("t1"),
        with_inputs("c", **small | {"pixel_values": (7, 3, 4, 4)}), with_inputs("d", **more),
    ]  # fmt: skip
    groups = joinable(samples)
    assert [[sample.sample_id for sample in group] for group in groups] == [["t0", "a", "c"], ["b", "t1"], ["d"]]
    for group in groups:
        join_image_inputs(group)
    for group, other in itertools.combinations(groups, 2):
        with pytest.raises(ConfigError):
            join_image_inputs([*group, *other])
    assert joinable([with_inputs("t"), with_inputs("u")])[0][1].sample_id == "u"
    assert joinable([]) == []
