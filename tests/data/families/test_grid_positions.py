"""Positions by time, row and column are the library's, for any pictures and videos at any place of a batch."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_families import TINY

from vlm_distill_cache.common.attention.tiles import View, grid_tile
from vlm_distill_cache.data.families.inputs import grid_position_inputs
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import EncodedSample

STILL, VIDEO = 1, 2
TEXT = 5  # any ordinary token


def media_of(chance: random.Random, count: int):
    """Kind, temporal patches, rows and columns of tokens."""
    return [
        (kind, 1 if kind == STILL else chance.randint(1, 4), chance.randint(1, 4), chance.randint(1, 4))
        for kind in (chance.choice((STILL, VIDEO)) for _ in range(count))
    ]


def write(chance: random.Random, media, config, *, apart: bool):
    """A sequence with text around each picture and video: ids, kinds, tiles, times of frames; ``apart``: of each patch."""
    ids, tiles, times = [TEXT] * chance.randint(1, 3), [], []
    for number, (kind, patches, rows, cols) in enumerate(media):
        token = config.image_token_id if kind == STILL else config.video_token_id
        for patch in range(patches):
            span = (float(len(times)), len(times) + float(kind))  # two frames a token of a video
            times += [(-1, np.nan)] if kind == STILL else [(number, patch * 2.0), (number, patch * 2.0 + 1)]
            tiles.append(grid_tile(rows, cols, View(span, kind == VIDEO)))
            ids += [token] * rows * cols + [TEXT] * (chance.randint(1, 3) if apart else 0)
        ids += [TEXT] * chance.randint(1, 5)
    return ids, tiles, times


def encoded(name: str, ids, tiles, times, config, *, seconds=(), positions=None, segments=None) -> EncodedSample:
    ids = np.array(ids)
    shown = any(tile.is_frame for tile in tiles)
    return EncodedSample(
        sample_id=name,
        input_ids=ids,
        labels=np.full(len(ids), -100),
        visual_mask=(ids == config.image_token_id) | (ids == config.video_token_id),
        position_ids=np.arange(len(ids)) if positions is None else np.array(positions),
        segment_ids=np.zeros(len(ids), np.int64) if segments is None else np.array(segments),
        image_inputs={"second_per_grid_ts": np.array(seconds, np.float32)} if seconds else {},
        tiles=tuple(tiles),
        image_hashes=(bytes(16),) * len(times),
        frame_times=tuple(times) if shown else (),
    )


def library_positions(model, ids, media, seconds):
    """int64 ``[3, T]`` of one sequence."""
    ids = torch.tensor([ids])
    kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    merge = model.config.vision_config.spatial_merge_size
    grids = {
        kind: torch.tensor([[t, rows * merge, cols * merge] for one, t, rows, cols in media if one == kind])
        for kind in (1, 2)
    }
    given = {name: grids[kind] for name, kind in (("image_grid_thw", 1), ("video_grid_thw", 2)) if len(grids[kind])}
    if seconds:
        given["second_per_grid_ts"] = torch.tensor(seconds)
    positions, _ = model.model.get_rope_index(ids, kinds, **given)
    return positions[:, 0]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_of_padded_samples_are_the_librarys(name):
    model, _, _ = TINY[name](Path())
    config, chance = model.config, random.Random(name)
    apart = name == "qwen3_vl"  # a time is written in front of each temporal patch
    for _ in range(3):
        samples, expected = [], []
        for number in range(4):
            media = media_of(chance, number)
            seconds = [chance.uniform(0.1, 3) for one in media if one[0] == VIDEO] if name == "qwen2_5_vl" else []
            written = write(chance, media, config, apart=apart)
            samples.append(encoded(f"s{number}", *written, config, seconds=seconds))
            expected.append(library_positions(model, written[0], media, seconds))
        chance.shuffle(order := [*range(4)])
        batch = collate([samples[index] for index in order], 0)
        found = grid_position_inputs(config, batch, dtype=torch.bfloat16)["position_ids"]
        for row, index in enumerate(order):
            length = len(samples[index])
            assert found[:, row, :length].tolist() == expected[index].tolist()
            assert not found[:, row, length:].any()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_each_packed_conversation_keeps_the_positions_that_it_has_alone(name):
    model, _, _ = TINY[name](Path())
    config, chance = model.config, random.Random(name)
    media = [(STILL, 1, 2, 3), (VIDEO, 3, 2, 1), (STILL, 1, 4, 4)]
    front, tiles, times = write(chance, media, config, apart=name == "qwen3_vl")
    seconds, shared, tails = [0.7], len(front), (3, 5)
    packed = encoded(
        "packed", front + [TEXT] * sum(tails), tiles, times, config, seconds=seconds,
        positions=[*range(shared), *(shared + place for tail in tails for place in range(tail))],
        segments=[0] * shared + [1] * tails[0] + [2] * tails[1],
    )  # fmt: skip
    found = grid_position_inputs(config, collate([packed], 0), dtype=torch.float32)["position_ids"][:, 0]
    begin = shared
    for tail in tails:
        alone = library_positions(model, front + [TEXT] * tail, media, seconds if name == "qwen2_5_vl" else [])
        assert found[:, :shared].tolist() == alone[:, :shared].tolist()
        assert found[:, begin : begin + tail].tolist() == alone[:, shared:].tolist()
        begin += tail
