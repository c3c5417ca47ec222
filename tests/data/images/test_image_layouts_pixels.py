"""Pixels are the library processor's own, and each token's box is where its own pixels come from."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from layout_cases import CASES, gradient, one_vision, square, token_colours
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector
from transformers.models.internvl.modeling_internvl import InternVLModel

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.images.layouts import image_encoder_from_dict
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.images.layouts.dynamic import DynamicEncoder
from vlm_distill_cache.data.images.layouts.framed import FramedEncoder
from vlm_distill_cache.data.images.layouts.split import SplitEncoder
from vlm_distill_cache.data.images.layouts.thumbnail import ThumbnailEncoder

SIZES = [
    (1, 1),
    (3, 1),
    (1, 3),
    (3, 3),
    (2, 7),
    (31, 33),
    (64, 48),
    (97, 40),
    (40, 130),
    (300, 200),
    (500, 7),
]
LIBRARY_OPTIONS = {"internvl": {"crop_to_patches": True}}
TILED = [name for name, encoder in CASES.items() if not isinstance(encoder, ImageEncoder)]


def noise(width, height, seed=0):
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8), "RGB")


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_the_library_processors_own(name, size):
    encoder, image = CASES[name], noise(*size)
    encoded = encoder(image)
    output = encoder.processor(image, **LIBRARY_OPTIONS.get(name, {}))
    expected = output["pixel_values"]
    if not isinstance(encoder, DynamicEncoder | ThumbnailEncoder | FramedEncoder):
        expected = expected[0]
    np.testing.assert_array_equal(encoded.inputs["pixel_values"], np.asarray(expected, dtype=np.float32))
    for key in ("image_sizes", "image_grid_thw"):
        if key in output:
            np.testing.assert_array_equal(encoded.inputs[key], np.asarray(output[key]))
            assert encoded.inputs[key].dtype == np.int64
    assert encoded.inputs["pixel_values"].dtype == np.float32


@pytest.mark.parametrize("name", [name for name in TILED if not name.startswith("qwen")])
@pytest.mark.parametrize("size", [(3000, 1), (1, 3000)], ids=str)
def test_a_line_of_pixels_still_has_boxes_inside_the_picture(name, size):
    encoder = CASES[name]
    encoded = encoder(noise(*size))
    boxes = tile_boxes(encoded.tiles)
    assert len(boxes) == len(token_colours(encoder, encoded))
    assert content_mask(boxes).sum() >= encoder.least_token_count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_number_of_visual_tokens_lies_between_the_encoders_bounds(name, size):
    encoder = CASES[name]
    encoded = encoder(noise(*size))
    count = sum(tile.token_count for tile in encoded.tiles)
    # Rounding to whole tokens may exceed the dynamic layout's most pixels for elongated pictures only.
    most = encoder.token_count if max(size) < 40 * min(size) else 4 * encoder.token_count
    assert encoder.least_token_count <= count <= most
    assert max(encoder.attention_grid()) <= 12


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (50, 130), (200, 70), (161, 243)], ids=str)
def test_boxes_are_where_each_tokens_pixels_come_from(name, size):
    encoder, image = CASES[name], gradient(*size)
    encoded = encoder(image)
    boxes = tile_boxes(encoded.tiles)[:, :4]
    colours = token_colours(encoder, encoded)
    assert colours.shape == (len(boxes), 3)
    inside = (boxes[:, :4].clamp(0, 1) == boxes[:, :4]).all(dim=1).numpy() & ~np.isnan(colours[:, 0])
    centres = ((boxes[:, :2] + boxes[:, 2:4]) / 2).numpy()[inside]
    extent = (boxes[:, 2:4] - boxes[:, :2]).numpy()[inside]
    # Half a token where seams of tiles have gaps or tokens were resampled, else a tenth and the grey levels.
    slack = 0.5 if "uneven" in name or "shrunk" in name else 0.1
    assert inside.sum() >= 4
    assert (np.abs(colours[inside, :2] - centres) <= slack * extent + 0.012).all()


@pytest.mark.parametrize("name", [name for name, encoder in CASES.items() if isinstance(encoder, AnyResolutionEncoder)])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_newline_tokens_are_the_models_and_have_no_area(name, size):
    encoder = CASES[name]
    encoded = encoder(noise(*size))
    boxes = tile_boxes(encoded.tiles).clamp(0, 1)
    newline = np.isnan(token_colours(encoder, encoded)[:, 0])
    area = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).numpy()
    assert (area[newline] == 0).all()
    assert not content_mask(tile_boxes(encoded.tiles)).numpy()[newline].any()
    joined = encoded.tiles[1:]
    assert newline.sum() == sum(tile.rows for tile in joined)


@pytest.mark.parametrize("name", ["idefics3", "internvl"])
def test_the_models_pixel_shuffle_keeps_tokens_row_by_row(name):
    """Patches in the tower's order, merged by the model's own code: each token is the square of patches of its place."""
    encoder = CASES[name]
    patches, merge = 8, 8 // encoder.grid[0]
    places = torch.arange(patches * patches, dtype=torch.float32).view(1, patches, patches, 1)
    if name == "idefics3":
        merged = Idefics3Connector.pixel_shuffle(None, places.flatten(1, 2), merge)
    else:
        merged = InternVLModel.pixel_shuffle(None, places, 1 / merge).flatten(1, 2)
    expected = torch.nn.functional.avg_pool2d(places.permute(0, 3, 1, 2), merge).flatten()
    torch.testing.assert_close(merged.mean(dim=-1).flatten(), expected)


@pytest.mark.parametrize("name", CASES)
def test_a_stored_geometry_is_json_and_rebuilds_the_encoder(name):
    encoder = CASES[name]
    stored = json.loads(json.dumps(encoder.to_dict()))
    rebuilt = image_encoder_from_dict(stored, encoder.processor)
    assert rebuilt == encoder
    assert rebuilt.to_dict() == encoder.to_dict()
    assert ("kind" in stored) == (not isinstance(encoder, ImageEncoder))


def test_the_fixed_encoders_dict_is_that_of_old_plans():
    assert list(CASES["square"].to_dict()) == ["layout", "grid", "patch_size", "processor"]
    assert CASES["first dropped"].to_dict()["drops_first"] is True


def test_a_geometry_with_another_processor_or_an_unknown_kind_is_refused():
    stored = CASES["qwen"].to_dict()
    with pytest.raises(ConfigError, match=r"image processor's image_mean is .* stored geometry was made with"):
        image_encoder_from_dict(stored, CASES["qwen3"].processor)
    with pytest.raises(ConfigError, match="kind 'hexagons' is unknown; known: any_resolution"):
        image_encoder_from_dict(stored | {"kind": "hexagons"}, CASES["qwen"].processor)
    with pytest.raises(ConfigError, match="cannot be read"):
        image_encoder_from_dict(stored | {"colour": 1}, CASES["qwen"].processor)


def test_pictures_that_a_processor_cannot_take_are_refused_with_the_reason():
    with pytest.raises(SampleError, match="1 x 201 pixels is more than 200 times"):
        CASES["qwen"](noise(1, 201))
    assert CASES["qwen"](noise(1, 200)).tiles
    tiles = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    zero = type(CASES["smolvlm"].processor)(**tiles, image_mean=[0.0] * 3, image_std=[1.0] * 3)
    with pytest.raises(SampleError, match="reads as no picture at all"):
        SplitEncoder(processor=zero, grid=(2, 2), patch_size=4)(PIL.Image.new("RGB", (64, 64)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: DynamicEncoder(processor=CASES["square"].processor),
            "has no patch_size, temporal_patch_size",
        ),
        (
            lambda: AnyResolutionEncoder(processor=CASES["square"].processor, patch_size=4),
            "no image_grid_pinpoints",
        ),
        (
            lambda: AnyResolutionEncoder(processor=one_vision(24, 9).processor, patch_size=48),
            "must be 1..24 pixels",
        ),
        (
            lambda: AnyResolutionEncoder(
                processor=transformers.LlavaNextImageProcessorPil(
                    size={"shortest_edge": 24}, crop_size=square(24), image_grid_pinpoints=[[24, 40]]
                ),
                patch_size=4,
            ),
            r"\[\[24, 40\]\] are no multiples of a tile's side, 24",
        ),
        (
            lambda: SplitEncoder(processor=CASES["smolvlm"].processor, grid=(0, 2), patch_size=4),
            "at least 1 x 1",
        ),
        (lambda: ThumbnailEncoder(processor=CASES["internvl"].processor, grid=(0, 1)), "at least 1 x 1"),
        (
            lambda: FramedEncoder(
                fixed=ImageEncoder(
                    processor=transformers.Gemma3ImageProcessorPil(size=square(32), do_pan_and_scan=True),
                    layout="square",
                    grid=(4, 4),
                ),
                image_token="<i>",
                before="",
                after="",
            ),
            "set do_pan_and_scan to false",
        ),
        (
            lambda: DynamicEncoder(processor=transformers.Qwen2VLImageProcessorPil(do_resize=False)),
            "set do_resize to true",
        ),
    ],
)
def test_impossible_encoders_are_refused_when_built(build, message):
    with pytest.raises(ConfigError, match=message):
        build()
