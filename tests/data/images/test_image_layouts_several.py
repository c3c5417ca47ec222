"""A bright square in the second of two pictures attracts the pooled mass there, and at its place, whatever the layout."""

import numpy as np
import PIL.Image
import pytest
import torch
from layout_cases import CASES, gradient, token_colours
from test_image_layouts_drawing import CELLS, PICTURES, drawn

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, tile_boxes
from vlm_distill_cache.common.attention.tiles import View, grid_tile, views_of
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.encoder import CountingEncoder
from vlm_distill_cache.data.text.chat import Marker
from vlm_distill_cache.data.text.media import EncodedMedium, joined_media

ONEVISION = [name for name in CASES if name.startswith("onevision")]


def among_two(name):
    """How one of two pictures is encoded."""
    encoder = CASES[name]
    return encoder.among(2) if isinstance(encoder, CountingEncoder) else encoder


def look_at_light(name, images):
    """Attention of a model that looks at bright tokens alone ``[N]``, and its tiles; sums to 1."""
    encoded = [among_two(name)(image) for image in images]
    media = [EncodedMedium((Marker("<image>"),), (one,), (bytes(16),)) for one in encoded]
    tiles = joined_media(media)["tiles"]
    colours = np.concatenate([token_colours(CASES[name], one) for one in encoded])
    attention = (torch.from_numpy(np.nan_to_num(colours.mean(axis=1))).double() - 0.35).clamp_min(0)
    attention = attention * content_mask(tile_boxes(tiles))
    return (attention / attention.sum()).float(), tiles


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("name", CASES)
def test_the_mass_lands_in_the_second_picture_where_the_square_is(name, shape):
    size, place, cell = PICTURES[shape]
    if name == "crop" and shape != "even":
        size = (132, 132)  # a crop may cut the square off
    dark = PIL.Image.new("RGB", (90, 60), (30, 30, 30))
    attention, tiles = look_at_light(name, [dark, drawn(size, place)])
    assert views_of(tiles) == (View((0.0, 1.0)), View((1.0, 2.0)))
    grids = [grid_tile(*CELLS, view) for view in views_of(tiles)]
    pooled = (attention @ overlap_matrix(tile_boxes(tiles), tile_boxes(grids))).view(2, -1)
    torch.testing.assert_close(pooled.sum(dim=1), torch.tensor([0.0, 1.0]), atol=1e-5, rtol=0)
    assert pooled[1].argmax().item() == cell
    # Tokens that are as large as the square reach beyond it, those of a padded picture by half.
    assert pooled[1, cell].item() > 0.45


@pytest.mark.parametrize("name", ONEVISION)
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (50, 130)], ids=str)
def test_of_several_pictures_onevision_sees_each_whole_in_a_square(name, size):
    encoder = CASES[name]
    assert encoder.among(1) is encoder
    encoded = encoder.among(2)(gradient(*size))
    boxes = tile_boxes(encoded.tiles)
    colours = token_colours(encoder, encoded)
    assert np.isnan(colours[:, 0]).nonzero()[0].tolist() == [len(boxes) - 1]  # the newline
    assert not content_mask(boxes)[-1]
    inside = (boxes[:, :4].clamp(0, 1) == boxes[:, :4]).all(dim=1).numpy() & ~np.isnan(colours[:, 0])
    centres = ((boxes[:, :2] + boxes[:, 2:4]) / 2).numpy()[inside]
    extent = (boxes[:, 2:4] - boxes[:, :2]).numpy()[inside]
    assert inside.sum() >= 4
    assert (np.abs(colours[inside, :2] - centres) <= 0.1 * extent + 0.012).all()


def test_a_picture_too_long_to_be_padded_is_refused_and_one_without_several_ways_has_one():
    with pytest.raises(SampleError, match=r"would be padded to 40000 x 40000.*crop it first"):
        CASES["onevision"].among(3)(PIL.Image.new("RGB", (40000, 1)))
    assert CASES["llava-next"].among(3) is CASES["llava-next"]
