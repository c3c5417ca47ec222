"""Samples of several pictures on the page of a run: each picture where it belongs, gaze over the picture that it is on."""

import numpy as np
import pytest
import torch
from several_factory import ANSWER, SHOWN, picture, several_record

from vlm_distill_cache.common.attention.boxes import tile_boxes
from vlm_distill_cache.stage2_student.scores.taught import PICTURE_SIDE, heat_picture, lay_sheet


def sheet_of(name):
    return lay_sheet(several_record(name), [picture(seed) for seed in SHOWN[name][2]])


def test_one_picture_is_drawn_as_it_was():
    sheet, boxes = sheet_of("one"), tile_boxes(ANSWER.cells_of(SHOWN["one"][0]))
    mass = torch.rand(len(boxes))
    assert (sheet.places, sheet.note, max(sheet.picture.size)) == ((), "", PICTURE_SIDE)
    assert sheet.heat(mass, boxes).tobytes() == heat_picture(mass, boxes).tobytes()
    assert sheet_of("text").picture is None


@pytest.mark.parametrize("name", ["two", "clip", "both"])
def test_gaze_lies_over_its_own_picture_as_dense_as_it_is(name):
    sheet, grids = sheet_of(name), ANSWER.cells_of(SHOWN[name][0])
    boxes = tile_boxes(grids)
    mass = torch.rand(len(boxes), generator=torch.Generator().manual_seed(1))
    heat = sheet.heat(mass, boxes)
    assert heat.size == sheet.picture.size
    alpha, at, reference = np.asarray(heat)[..., 3], 0, []
    for grid, place in zip(grids, sheet.places, strict=True):
        cells = mass[at : at + grid.token_count].reshape(grid.rows, grid.cols).numpy() * grid.token_count
        at += grid.token_count
        for row in range(grid.rows):
            for col in range(grid.cols):
                x = place.left + int((col + 0.5) / grid.cols * place.size[0])
                y = place.top + int((row + 0.5) / grid.rows * place.size[1])
                reference.append((alpha[y, x], cells[row, col]))
    painted, dense = np.array(reference, np.float64).T
    np.testing.assert_allclose(painted, 255 * (0.1 + 0.6 * dense / dense.max()), atol=0.51)
    inside = np.zeros(alpha.shape, bool)
    for place in sheet.places:
        inside[place.top : place.top + place.size[1], place.left : place.left + place.size[0]] = True
    assert not alpha[~inside].any()
