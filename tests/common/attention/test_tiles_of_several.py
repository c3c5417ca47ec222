"""Tiles of several pictures: what a record keeps of them, and what it may not say."""

import numpy as np
import pytest

from vlm_distill_cache.common.attention.tiles import Tile, View, of_view, several_to_arrays, tiles_of, views_of
from vlm_distill_cache.common.errors import CacheFormatError

WHOLE = (0.0, 0.0, 1.0, 1.0)
STILL = (-1, float("nan"))


def record_of(tiles, times, pictures):
    return several_to_arrays(tiles, times, pictures) | {"image_hash": np.ones((pictures, 16), np.uint8)}


@pytest.mark.parametrize(
    ("tiles", "times", "pictures"),
    [
        ((), (), 0),
        ((Tile(2, 3, WHOLE),), (), 1),
        ((Tile(2, 3, WHOLE), Tile(1, 1, (0.0, 0.0, 0.5, 1.0)), Tile(4, 4, WHOLE, (1.0, 2.0))), (), 2),
        (
            (Tile(2, 2, WHOLE), Tile(2, 2, WHOLE, (1.0, 3.0), True), Tile(2, 2, WHOLE, (3.0, 5.0), True)),
            (STILL, (1, 0.0), (1, 0.5), (1, 1.0), (1, 1.5)),
            5,
        ),
        ((Tile(2, 2, WHOLE, (0.0, 1.0), True),), ((0, 0.0),), 1),
    ],
)
def test_tiles_come_back_as_they_were_kept(tiles, times, pictures):
    record = record_of(tiles, times, pictures)
    assert tiles_of(record) == tiles
    assert len(record["tile_pictures"]) == (len(tiles) if pictures > 1 else 0)
    assert len(record["frame_times"]) == len(times)


def test_views_are_pictures_or_frames_that_tokens_show_together():
    tiles = (Tile(2, 2, WHOLE), Tile(1, 2, WHOLE), Tile(3, 3, WHOLE, (1.0, 3.0), True))
    assert views_of(tiles) == (View((0.0, 1.0)), View((1.0, 3.0), True))
    assert of_view(tiles, views_of(tiles)[1]) == (Tile(3, 3, WHOLE, (0.0, 1.0), True),)


@pytest.mark.parametrize(
    ("spans", "videos", "words"),
    [
        ([(0, 1), (2, 1)], [-1, -1, -1], "expected those from 1 on"),
        ([(0, 1), (1, 1)], [-1, -1, -1], "3 pictures, but tiles of 2"),
        ([(0, 1), (1, 2)], [-1, -1, -1], "frames of one video if several"),
        ([(0, 1), (1, 2)], [-1, 0, 1], "frames of one video if several"),
        ([(1, 1), (0, 1)], [-1, -1, -1], "expected those from 0 on"),
        ([(0, 1), (1, 0)], [-1, -1, -1], "expected those from 1 on"),
        ([(0, 1)], [-1, -1, -1], "have 1 and 3 entries for 2 tiles of 3 pictures"),
    ],
)
def test_damaged_places_are_refused(spans, videos, words):
    record = {
        "image_hash": np.ones((3, 16), np.uint8),
        "tiles": np.array([(2, 2, *WHOLE)] * 2, np.float32),
        "tile_pictures": np.array(spans, np.uint16),
        "frame_times": np.array([(video, 0.0) for video in videos], np.float32),
    }
    with pytest.raises(CacheFormatError, match=words):
        tiles_of(record)
