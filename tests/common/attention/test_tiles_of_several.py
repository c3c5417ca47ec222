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
        ([(0, 1), (1, 2)], [-1, 1, 2], "frames of one video if several"),
        ([(1, 1), (0, 1)], [-1, -1, -1], "expected those from 0 on"),
        ([(0, 1), (1, 0)], [-1, -1, -1], "expected those from 1 on"),
        ([(0, 0), (0, 3)], [0, 0, 0], "expected those from 0 on"),
        ([(0, 1)], [-1, -1, -1], "tile_pictures has 1 entries for 2 tiles; expected 2, of 3 pictures"),
        ([], [-1, -1, -1], "tile_pictures has 0 entries for 2 tiles"),
    ],
)
def test_damaged_places_are_refused(spans, videos, words):
    times = [(video, np.nan if video < 0 else 0.0) for video in videos] if max(videos) >= 0 else []
    record = {
        "image_hash": np.ones((3, 16), np.uint8),
        "tiles": np.array([(2, 2, *WHOLE)] * 2, np.float32),
        "tile_pictures": np.array(spans, np.uint16).reshape(-1, 2),
        "frame_times": np.array(times, np.float32).reshape(-1, 2),
    }
    with pytest.raises(CacheFormatError, match=words):
        tiles_of(record)


NAN, INF = np.nan, np.inf


@pytest.mark.parametrize(
    "times",
    [
        [(0, 0.0), (0, 1.0)],
        [(0, 0.0), (0, 1.0), (0, INF)],
        [(0, 0.0), (0, 1.0), (0, NAN)],
        [(0, -1.0), (0, 1.0), (0, 2.0)],
        [(0, 0.0), (0, 2.0), (0, 1.0)],
        [(NAN, 0.0), (0, 1.0), (0, 2.0)],
        [(0.5, 0.0), (0.5, 1.0), (0.5, 2.0)],
        [(1e38, 0.0), (1e38, 1.0), (1e38, 2.0)],
        [(-2, NAN), (1, 1.0), (1, 2.0)],
        [(-1, 0.0), (1, 1.0), (1, 2.0)],
        [(1, 0.0), (1, 1.0), (0, 2.0)],
        [(-1, NAN), (-1, NAN), (-1, NAN)],
    ],
)
def test_impossible_times_of_frames_are_refused(times):
    record = several_to_arrays([Tile(2, 2, WHOLE, (n, n + 1.0)) for n in range(3)], times, 3)
    with pytest.raises(CacheFormatError, match="frame_times"):
        tiles_of(record | {"image_hash": np.ones((3, 16), np.uint8)})


@pytest.mark.parametrize(("pictures", "tiles"), [(1, 0), (0, 1)])
def test_pictures_without_tiles_and_tiles_without_pictures_are_refused(pictures, tiles):
    record = several_to_arrays([Tile(2, 2, WHOLE)] * tiles, (), pictures)
    with pytest.raises(CacheFormatError, match=f"image_hash has {pictures} pictures, but there are {tiles} tiles"):
        tiles_of(record | {"image_hash": np.ones((pictures, 16), np.uint8)})
