"""`verify --deep` on values that fit every range, and yet contradict each other."""

import numpy as np
import pytest
import torch

from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.checks import value_damage
from vlm_distill_cache.common.codecs.live import select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec

TILES = np.array([[3, 4, 0, 0, 1, 1]], np.float32)


def sound(preset):
    """A record with logits and a map of twelve tokens, and the plan of its cache."""
    generator = torch.Generator().manual_seed(3)
    logits, maps = LogitCodec.from_preset("default"), VisualMapCodec(groups=2, preset=preset)
    labels = torch.tensor([4, 9])
    dense = 3 * torch.randn(2, 100, generator=generator)
    values = torch.rand(2, 12, 12, generator=generator).square().tril() / 12
    record = {
        "image_hash": np.ones((1, 16), np.uint8), "labels": labels.numpy().astype(np.uint32), "tiles": TILES,
        **logits.encode(select_entries(logits, dense, labels)), **maps.encode(values, tiles=tiles_from_array(TILES)),
    }  # fmt: skip
    plan = Plan(
        store="zarr", sample_count=1, shard_size=1, fingerprints={},
        signals={"logits": logits.to_dict(), "visual_map": maps.to_dict()},
        fields={"logits": logits.fields(), "visual_map": maps.fields()},
    )  # fmt: skip
    return record, plan


def changed(array, place, value):
    copy = array.copy()
    copy.reshape(-1)[place] = value
    return copy


@pytest.mark.parametrize("preset", ["exact", "blocks", "compact", "exact8", "f4"])
def test_what_a_codec_writes_stands_every_check(preset):
    record, plan = sound(preset)
    assert list(value_damage(record, plan)) == []


@pytest.mark.parametrize(("preset", "name", "place", "value", "reason"), [
    ("exact", "map_means", 1, 9.0, "map_means is"),
    ("exact", "map_means", 1, 0.0, "does not have a mean for exactly the columns"),
    ("exact", "map_means", 1, 0.9, "the codes of its pairs say"),
    ("exact", "map_largest", 0, -1.0, "map_largest is"),
    ("exact", "map_largest", 0, 0.0, "map_largest is below map_scale"),
    ("exact", "map_scale", 0, 0.0, "map_scale is 0 where"),
    ("blocks", "map_codes", 0, 0, "expected 1 to 127"),
    ("compact", "map_codes", 0, 200, "expected 1 to 63"),
    ("blocks", "map_mask", 0, 0x55, "map_codes has"),
    ("blocks", "map_means", 1, 0.0, "does not have a mean for exactly the columns"),
    ("exact", "image_hash", slice(None), 0, "there are tiles of one"),
    ("exact", "tiles", 0, 4.0, "the tiles of the image say"),
    ("f4", "tiles", 1, 3.0, "the tiles of the image say"),
    ("exact", "tail_logmass", 0, -2.5, "have a mass of"),
    ("exact", "tail_logmass", 1, -np.inf, "finite at a lower one"),
])  # fmt: skip
def test_values_that_contradict_others_are_found(preset, name, place, value, reason):
    record, plan = sound(preset)
    record[name] = changed(record[name], place, value)
    assert reason in "; ".join(value_damage(record, plan))
