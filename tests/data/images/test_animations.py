"""Animated pictures are videos whose frames are decoded as pictures are, at the times that they state."""

import io

import numpy as np
import PIL.Image
import pytest
from video_clips import number_in, painted

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import decode_image
from vlm_distill_cache.data.images import animations
from vlm_distill_cache.data.images.video import VideoBytes
from vlm_distill_cache.data.sample import FrameSampling

EACH = FrameSampling(fps=1000, most=100)
FORMS = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}}


def animation(form, durations, mode="RGB", **options):
    frames = [PIL.Image.fromarray(painted(number)).convert(mode) for number in range(len(durations))]
    buffer = io.BytesIO()
    options = {"duration": durations, "save_all": True, "append_images": frames[1:], **FORMS[form], **options}
    frames[0].save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_frames_and_their_times(form):
    data = animation(form, [100, 200, 50, 650, 100])
    frames = VideoBytes(data, "clip").frames(EACH)
    assert [number_in(frame.image) for frame in frames] == [0, 1, 2, 3, 4]
    assert [frame.time for frame in frames] == [0.0, 0.1, 0.3, 0.35, 1.0]
    for frame in frames:
        np.testing.assert_array_equal(np.asarray(frame.image), painted(number_in(frame.image)))
    np.testing.assert_array_equal(frames[0].image, decode_image(data, name="clip"))
    assert [number_in(frame.image) for frame in VideoBytes(data, "clip").frames(FrameSampling(fps=1))] == [0, 4]
    assert [number_in(f.image) for f in VideoBytes(data, "clip").frames(FrameSampling(fps=9, most=2))] == [2, 4]


def test_frames_without_a_duration_last_a_tenth_of_a_second():
    frames = VideoBytes(animation("GIF", [0, 0, 0]), "clip").frames(EACH)
    assert [frame.time for frame in frames] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("form", FORMS)
def test_one_picture_is_a_video_of_one_frame(form):
    (frame,) = VideoBytes(animation(form, [0]), "clip").frames(EACH)
    assert (number_in(frame.image), frame.time) == (0, 0.0)


def test_a_picture_for_viewers_without_animations_is_no_frame():
    data = animation("PNG", [100, 100, 100], default_image=True)
    assert [number_in(frame.image) for frame in VideoBytes(data, "clip").frames(EACH)] == [1, 2]


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_clear_pixels_are_white(form):
    frames = [PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0)) for _ in range(2)]
    frames[1].paste((255, 0, 0, 255), (0, 0, 4, 8))
    buffer = io.BytesIO()
    frames[0].save(buffer, form, save_all=True, append_images=frames[1:], duration=100)
    found = [np.asarray(frame.image) for frame in VideoBytes(buffer.getvalue(), "clip").frames(EACH)]
    assert (found[0] == 255).all()
    assert (found[1][:, 4:] == 255).all()
    assert (found[1][:, :4, 1] < 20).all()


@pytest.mark.parametrize(("name", "value"), [("MAX_FRAMES", 4), ("MAX_DRAWN", 4 * 64 * 32)])
def test_more_frames_than_allowed_are_refused(name, value, monkeypatch):
    data = animation("GIF", [100] * 5)
    monkeypatch.setattr(animations, name, value)
    with pytest.raises(SampleError, match="clip is an animation of more than 4 frames of 64 x 32 pixels"):
        VideoBytes(data, "clip").frames(FrameSampling(most=1))


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_animation_is_refused(form):
    data = animation(form, [100, 100])
    with pytest.raises(SampleError, match="video clip cannot be decoded"):
        VideoBytes(data[: len(data) // 2], "clip").frames(EACH)
