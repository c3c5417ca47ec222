"""A bright square in a picture attracts the pooled mass at its place, whatever the two layouts."""

import numpy as np
import PIL.Image
import pytest
import torch
from layout_cases import CASES, token_colours

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, tile_boxes
from vlm_distill_cache.common.attention.tiles import grid_tile
from vlm_distill_cache.stage2_student.batches.grid import meet, meet_cells

CELLS = (3, 4)
PICTURES = {
    "wide": ((240, 120), (0.5, 1 / 3, 0.75, 2 / 3), 6),  # size, the square's place, its cell of 3 x 4
    "tall": ((120, 240), (0.25, 2 / 3, 0.5, 1.0), 9),
    "even": ((132, 132), (0.5, 0.0, 0.75, 1 / 3), 2),
}


def drawn(size, place):
    width, height = size
    pixels = np.full((height, width, 3), 30, dtype=np.uint8)
    x0, y0, x1, y1 = (round(part * side) for part, side in zip(place, (width, height) * 2, strict=True))
    pixels[y0:y1, x0:x1] = 250
    return PIL.Image.fromarray(pixels)


def look_at_light(name, image):
    """Attention of a model that looks at bright tokens alone ``[N]``, and its tiles; sums to 1."""
    encoded = CASES[name](image)
    brightness = torch.from_numpy(np.nan_to_num(token_colours(CASES[name], encoded).mean(axis=1)))
    attention = (brightness.double() - 0.35).clamp_min(0)
    attention = attention * content_mask(tile_boxes(encoded.tiles))
    return (attention / attention.sum()).float(), encoded.tiles


@pytest.mark.parametrize("shape", PICTURES)
@pytest.mark.parametrize("name", CASES)
def test_the_mass_lands_where_the_square_is(name, shape):
    size, place, cell = PICTURES[shape]
    if name == "crop" and shape != "even":
        size = (132, 132)  # a crop may cut the square off
    attention, tiles = look_at_light(name, drawn(size, place))
    pooled = attention @ overlap_matrix(tile_boxes(tiles), tile_boxes([grid_tile(*CELLS)]))
    assert pooled.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert pooled.argmax().item() == cell
    # Tokens that are as large as the square reach beyond it; most of their mass does not.
    assert pooled[cell].item() > 0.5


@pytest.mark.parametrize("teacher", CASES)
@pytest.mark.parametrize("student", CASES)
def test_two_layouts_agree_on_the_place_in_their_common_cells(teacher, student):
    size, place, cell = PICTURES["even"]
    image = drawn(size, place)
    (teacher_mass, teacher_tiles), (student_mass, student_tiles) = (
        look_at_light(name, image) for name in (teacher, student)
    )
    common = meet(teacher_tiles, student_tiles)
    looks = torch.stack([teacher_mass @ common.teacher_pool, student_mass @ common.student_pool])
    torch.testing.assert_close(looks.sum(dim=1), torch.ones(2), atol=1e-5, rtol=0)
    assert torch.nn.functional.cosine_similarity(looks[0], looks[1], dim=0) > 0.7
    # A cached grid in between changes nothing about that.
    cells = overlap_matrix(tile_boxes(teacher_tiles), tile_boxes([grid_tile(*CELLS)]))
    through = meet_cells((grid_tile(*CELLS),), student_tiles)
    pooled = torch.stack([teacher_mass @ cells @ through.teacher_pool, student_mass @ through.student_pool])
    torch.testing.assert_close(pooled.sum(dim=1), torch.ones(2), atol=1e-5, rtol=0)
    assert pooled.argmax(dim=1).tolist() == [cell, cell]
