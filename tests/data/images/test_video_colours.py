"""Luma and chroma become RGB by the standards' formula, whatever depth, range and matrix a video has."""

import av
import numpy as np
import pytest
from video_clips import make_clip

from vlm_distill_cache.data.images import colours
from vlm_distill_cache.data.images.colours import frame_to_rgb, luma_to_rgb
from vlm_distill_cache.data.images.video import VideoBytes
from vlm_distill_cache.data.sample import FrameSampling


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("weights", [(0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)])
def test_integers_agree_with_the_formula_within_a_level(bits, full, weights):
    rng = np.random.default_rng(0)
    luma = rng.integers(0, 2**bits, (6, 7))
    small = rng.integers(0, 2**bits, (2, 3, 4))
    dtype = np.uint8 if bits == 8 else np.uint16
    found = luma_to_rgb(luma.astype(dtype), (small[0].astype(dtype), small[1].astype(dtype), 2, 2), bits, full, weights)
    unit = 2 ** (bits - 8)
    black, luma_span, chroma_span = (0, 2**bits - 1, 2**bits - 1) if full else (16 * unit, 219 * unit, 224 * unit)
    for row in range(6):
        for column in range(7):
            y = (luma[row, column] - black) / luma_span
            cb, cr = ((small[n, row // 2, column // 2] - 128 * unit) / chroma_span for n in (0, 1))
            red, blue = y + 2 * (1 - weights[0]) * cr, y + 2 * (1 - weights[1]) * cb
            green = (y - weights[0] * red - weights[1] * blue) / (1 - sum(weights))
            expected = np.clip(np.round(255 * np.array([red, green, blue])), 0, 255)
            assert np.abs(found[row, column].astype(int) - expected).max() <= 1


COLOURS = np.array(
    [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [90, 20, 200], [128] * 3, [0] * 3, [255] * 3], np.uint8
)


@pytest.mark.parametrize(
    "pixel_format",
    ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv411p", "yuv410p", "yuv440p", "yuv420p10le", "yuv444p16be", "yuva420p",
     "nv12", "nv21", "p010le", "yuyv422", "uyvy422", "gray", "gray10le", "rgb24", "bgr24", "gbrp", "rgba", "bgr0", "rgb48le"],
)  # fmt: skip
def test_every_pixel_format_gives_its_colours(pixel_format):
    """As far as FFmpeg's conversion to it keeps them; blocks wider than any chroma."""
    picture = COLOURS.reshape(2, 4, 3).repeat(16, axis=0).repeat(16, axis=1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixel_format)
    found = np.asarray(frame_to_rgb(frame)).astype(int)[8::16, 8::16].reshape(-1, 3)
    expected = COLOURS.astype(int)
    if pixel_format.startswith("gray"):
        expected = (expected @ [0.299, 0.587, 0.114]).round()[:, None].repeat(3, axis=1)
    assert np.abs(found - expected).max() <= 6


def test_the_stated_matrix_is_used():
    picture = np.full((32, 32, 3), (200, 30, 60), np.uint8)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    wide = frame.reformat(format="yuv444p", dst_colorspace="ITU709")
    wide.colorspace = 1
    assert np.abs(np.asarray(frame_to_rgb(wide)).astype(int) - picture).max() <= 3


def test_strips_join_without_a_seam(monkeypatch):
    rng = np.random.default_rng(0)
    luma, small = rng.integers(0, 255, (33, 21)).astype(np.uint8), rng.integers(0, 255, (9, 6)).astype(np.uint8)
    for chroma in (None, (small, small, 4, 4)):
        whole = luma_to_rgb(luma, chroma, 8, False, (0.299, 0.114))
        monkeypatch.setattr(colours, "_STRIP", 150)
        np.testing.assert_array_equal(luma_to_rgb(luma, chroma, 8, False, (0.299, 0.114)), whole)
        monkeypatch.undo()


def test_odd_sizes_keep_their_last_row_and_column():
    picture = np.zeros((17, 19, 3), np.uint8)
    picture[-1], picture[:, -1] = 255, 255
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
    found = np.asarray(frame_to_rgb(frame))
    assert found.shape == (17, 19, 3)
    assert found[-1, :, 1].min() > 200
    assert found[:, -1, 1].min() > 200


def test_clear_pixels_are_white():
    pixels = np.zeros((32, 64, 4), np.uint8)
    pixels[:, 32:] = (255, 0, 0, 255)
    for pixel_format in ("rgba", "yuva420p", "yuva444p"):
        frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pixel_format)
        found = np.asarray(frame_to_rgb(frame))
        assert found[5, 5].min() >= 250
        assert found[5, 50, 0] >= 250
        assert found[5, 50, 1] <= 5


def test_pixels_of_a_clip_without_loss_come_back():
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (32, 48, 3)).astype(np.uint8)
    data = make_clip(
        "matroska", "libx264rgb", pixel_format="rgb24", options={"qp": "0"}, count=1, picture=lambda _: picture
    )
    (frame,) = VideoBytes(data, "clip").frames(FrameSampling())
    np.testing.assert_array_equal(np.asarray(frame.image), picture)
