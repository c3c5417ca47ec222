"""Pixels are the processor's own, and every visual token's box lies on the pixels it was made from."""

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vlm_distill_cache.common.attention.boxes import tile_boxes
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.images.encoder import ImageEncoder

SIDE, GRID = 96, (6, 6)


def layouts():
    size = {"height": SIDE, "width": SIDE}
    return {
        "square": CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        "siglip": SiglipImageProcessorPil(size=size),
        "pad": LlavaImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size, do_pad=True),
        "crop": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size),
        "small crop": CLIPImageProcessorPil(size={"shortest_edge": SIDE + 16}, crop_size=size, do_center_crop=True),
        "border": CLIPImageProcessorPil(size={"shortest_edge": SIDE - 24}, crop_size=size),
    }


@pytest.mark.parametrize("layout", layouts())
@pytest.mark.parametrize("size", [(96, 96), (200, 90), (77, 161), (64, 63)])
def test_a_bright_square_lights_up_the_tokens_whose_boxes_it_covers(layout, size):
    """Brightness of each token's pixels against the share of its box that the square covers."""
    encoder = ImageEncoder.from_processor(layouts()[layout], GRID)
    width, height = size
    x0, x1 = 0.40 * width, 0.60 * width
    y0, y1 = 0.30 * height, 0.70 * height
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[round(y0) : round(y1), round(x0) : round(x1)] = 255
    encoded = encoder(PIL.Image.fromarray(array))
    pixels, tiles = encoded.inputs["pixel_values"][0], encoded.tiles
    boxes = tile_boxes(tiles)[:, :4].double().numpy() * [width, height, width, height]
    overlap_x = np.minimum(boxes[:, 2], round(x1)) - np.maximum(boxes[:, 0], round(x0))
    overlap_y = np.minimum(boxes[:, 3], round(y1)) - np.maximum(boxes[:, 1], round(y0))
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    expected = overlap_x.clip(0) * overlap_y.clip(0) / area
    mean, std = encoder.processor.image_mean[1], encoder.processor.image_std[1]
    bright = pixels[1] * std + mean
    cell = SIDE // 6
    found = bright.reshape(6, cell, 6, cell).mean(axis=(1, 3)).ravel()
    inside = (boxes[:, 0] >= 0) & (boxes[:, 1] >= 0) & (boxes[:, 2] <= width) & (boxes[:, 3] <= height)
    assert np.abs(found - expected)[inside].max() < 0.12
    assert np.argmax(found * inside) in np.flatnonzero(expected * inside > expected[inside].max() - 0.15)


@pytest.mark.parametrize("size", [(200, 90), (77, 161), (64, 63), (96, 96)])
def test_padding_equals_the_library_processor(size):
    """LLaVA's own expand2square and ours give the same pixels, and a CLIP processor padded by us too."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = PIL.Image.fromarray(noise)
    processor = layouts()["pad"]
    expected = processor(image)["pixel_values"][0]
    np.testing.assert_array_equal(
        ImageEncoder.from_processor(processor, GRID)(image).inputs["pixel_values"][0], expected
    )
    clip = ImageEncoder(processor=layouts()["crop"], layout="pad", grid=GRID)
    np.testing.assert_array_equal(clip(image).inputs["pixel_values"][0], expected)


@pytest.mark.parametrize("layout", ["square", "siglip", "crop", "small crop", "border"])
def test_pixels_are_the_processors_own(layout):
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 131, 3), dtype=np.uint8))
    processor = layouts()[layout]
    np.testing.assert_array_equal(
        ImageEncoder.from_processor(processor, GRID)(image).inputs["pixel_values"][0],
        processor(image)["pixel_values"][0],
    )


@pytest.mark.parametrize(
    ("layout", "size", "region"),
    [
        ("square", (200, 90), (0, 0, 1, 1)),
        ("pad", (200, 100), (0, -0.5, 1, 1.5)),
        ("pad", (50, 200), (-1.5, 0, 2.5, 1)),
        ("crop", (200, 100), (0.25, 0, 0.75, 1)),
        ("crop", (100, 400), (0, 0.375, 1, 0.625)),
    ],
)
def test_regions_by_hand(layout, size, region):
    (tile,) = ImageEncoder.from_processor(layouts()[layout], GRID)(PIL.Image.new("RGB", size)).tiles
    assert tile.region == pytest.approx(region)
    assert (tile.rows, tile.cols) == GRID


def test_pixels_that_no_patch_covers_are_left_out_of_the_tile():
    """SigLIP so400m: 27 patches of 14 pixels see 378 of 384."""
    size = {"height": 384, "width": 384}
    encoder = ImageEncoder.from_processor(SiglipImageProcessorPil(size=size), (27, 27), patch_size=14)
    (tile,) = encoder(PIL.Image.new("RGB", (500, 300))).tiles
    assert tile.region == pytest.approx((0, 0, 378 / 384, 378 / 384))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 3)])
@pytest.mark.parametrize("layout", layouts())
def test_one_pixel_sides_can_be_encoded(layout, size):
    encoded = ImageEncoder.from_processor(layouts()[layout], GRID)(PIL.Image.new("RGB", size))
    assert encoded.inputs["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert torch.isfinite(tile_boxes(encoded.tiles)).all()


def test_strips_that_would_not_fit_in_memory_are_refused():
    for layout in ("pad", "crop"):
        encoder = ImageEncoder.from_processor(layouts()[layout], GRID)
        with pytest.raises(SampleError, match="crop it first"):
            encoder(PIL.Image.new("RGB", (60_000, 1)))


def test_processors_without_a_fixed_size_are_refused():
    with pytest.raises(ConfigError, match="fixed size"):
        ImageEncoder.from_processor(CLIPImageProcessorPil(size={"shortest_edge": 96}, do_center_crop=False), GRID)
    with pytest.raises(ConfigError, match="'square' needs height and width"):
        ImageEncoder(processor=layouts()["crop"], layout="square", grid=GRID)
    with pytest.raises(ConfigError, match="layout must be one of"):
        ImageEncoder(processor=layouts()["crop"], layout="stretch", grid=GRID)
    with pytest.raises(ConfigError, match="at least 1 x 1"):
        ImageEncoder.from_processor(layouts()["crop"], (0, 3))


def test_geometry_dict_is_json_and_differs_by_what_changes_pixels():
    dicts = [ImageEncoder.from_processor(processor, GRID).to_dict() for processor in layouts().values()]
    assert len({json.dumps(entry, sort_keys=True) for entry in dicts}) == len(dicts)
    assert json.loads(json.dumps(dicts)) == dicts


@pytest.mark.parametrize(
    ("grid", "expected"),
    [((6, 6), (6, 6)), ((24, 24), (12, 12)), ((48, 24), (12, 6)), ((27, 27), (12, 12)), ((16, 16), (8, 8))],
)
def test_attention_grid_halves_the_tokens_grid_until_it_is_coarse_enough(grid, expected):
    assert ImageEncoder.from_processor(layouts()["square"], grid).attention_grid() == expected


@pytest.mark.parametrize("grid", [(1, 3), (3, 1), (3, 4)])
def test_a_dropped_first_token_leaves_the_other_boxes_where_they_were(grid):
    encoder = ImageEncoder.from_processor(layouts()["square"], grid)
    image = PIL.Image.new("RGB", (40, 30))
    rest = replace(encoder, drops_first=True)
    boxes, kept = (tile_boxes(one(image).tiles) for one in (encoder, rest))
    torch.testing.assert_close(kept, boxes[1:])
    assert rest.token_count == encoder.token_count - 1 == len(kept)
    with pytest.raises(ConfigError, match="at least 1 x 1"):
        replace(rest, grid=(1, 1))
