"""Of every kind of video file the frames that the rule names come out, as if all had been decoded."""

import io
import pickle
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from video_clips import make_clip, number_in, painted

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images import containers
from vlm_distill_cache.data.images.video import VideoBytes, VideoFile, VideoSlice, is_video
from vlm_distill_cache.data.sample import FrameSampling, VideoSource, load_picture

# Form, encoder, options; whether its packets tell its frames, so that it is not decoded whole.
KINDS = {
    "mp4-h264": ("mp4", "libx264", {}, True),
    "mp4-mpeg4": ("mp4", "mpeg4", {}, True),
    "mov-h264": ("mov", "libx264", {"container_options": {"movflags": "faststart"}, "sound": True}, True),
    "webm-vp8": ("webm", "libvpx", {}, True),
    "webm-vp9": ("webm", "libvpx-vp9", {"options": {"cpu-used": "8"}}, True),
    "mkv-h264": ("matroska", "libx264", {"options": {"x264-params": "open-gop=1:scenecut=0"}}, True),
    "mkv-refresh": ("matroska", "libx264", {"options": {"intra-refresh": "1"}, "b_frames": 0}, None),
    "ts-h264": ("mpegts", "libx264", {}, True),
    "avi-mpeg4": ("avi", "mpeg4", {}, False),
    "avi-h264": ("avi", "libx264", {}, False),
}
EACH = FrameSampling(fps=1000, most=100)
READ_ALL = containers._read_all


@pytest.fixture(scope="module")
def clips():
    return {name: make_clip(form, codec, **options) for name, (form, codec, options, _) in KINDS.items()}


def read(data, sampling):
    return VideoBytes(data, "clip").frames(sampling)


def shown(frames):
    return [number_in(frame.image) for frame in frames]


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_of_the_rule(name, clips, monkeypatch):
    whole = []
    monkeypatch.setattr(containers, "_read_all", lambda *given: whole.append(given) or READ_ALL(*given))
    every = read(clips[name], EACH)
    assert shown(every) == list(range(12))
    assert [frame.time for frame in every] == [number / 10 for number in range(12)]
    for sampling, numbers in [
        (FrameSampling(fps=5, most=100), [0, 2, 4, 6, 8, 10]),
        (FrameSampling(fps=4, most=100), [0, 3, 5, 8, 10]),  # 0.25 s: the first frame not before it is that of 0.3 s
        (FrameSampling(fps=10, most=3), [2, 6, 10]),  # middles of 0 to 1.1 s in three: 0.18, 0.55, 0.92
        (FrameSampling(fps=0.1, most=3), [0]),
    ]:
        found = read(clips[name], sampling)
        assert shown(found) == numbers
        assert [frame.time for frame in found] == [number / 10 for number in numbers]
        for frame in found:
            np.testing.assert_array_equal(frame.image, every[number_in(frame.image)].image)
    if KINDS[name][3] is not None:
        assert bool(whole) is not KINDS[name][3]


@pytest.mark.parametrize(("form", "codec"), [("mp4", "libx264"), ("webm", "libvpx")])
def test_frames_at_odd_times_are_found_by_their_times(form, codec):
    """Against decoding all, and choosing one by one; in milliseconds, which webm rounds to."""
    stamps = [0, 10, 20, 500, 510, 990, 1000, 1001, 2400, 2410, 4000, 4999]
    data = make_clip(form, codec, rate=1000, count=len(stamps), stamps=[100 + stamp for stamp in stamps])
    with av.open(io.BytesIO(data)) as container:
        decoded = [Fraction(frame.pts) * frame.time_base for frame in container.decode(video=0)]
    times = [time - decoded[0] for time in decoded]
    assert [round(1000 * time) for time in times] == stamps
    for fps, most in [(1, 99), (2, 99), (3.5, 99), (100, 99), (100, 4), (2, 3)]:
        step = 1 / Fraction(str(fps))
        marks = [number * step for number in range(int(times[-1] / step) + 1)]
        chosen = sorted({min(n for n, time in enumerate(times) if time >= mark) for mark in marks})
        if len(chosen) > most:
            marks = [(2 * number + 1) * times[-1] / (2 * most) for number in range(most)]
            chosen = sorted({min(n for n, time in enumerate(times) if time >= mark) for mark in marks})
        found = read(data, FrameSampling(fps=fps, most=most))
        assert shown(found) == chosen
        assert [frame.time for frame in found] == [float(times[number]) for number in chosen]


def test_only_what_leads_from_a_key_frame_to_a_wanted_frame_is_decoded(monkeypatch):
    data = make_clip(count=200, gop=10, options={"sc_threshold": "0"})
    monkeypatch.setattr(containers, "MAX_DECODED", 14 * 64 * 32)
    assert shown(read(data, FrameSampling(fps=10, most=3))) == [34, 100, 166]  # after key frames 30, 100 and 160
    monkeypatch.setattr(containers, "MAX_DECODED", 13 * 64 * 32)
    with pytest.raises(SampleError, match=r"14 frames of 2048 pixels would have to be decoded"):
        read(data, FrameSampling(fps=10, most=3))


@pytest.mark.parametrize(
    ("codec", "pixel_format"),
    [
        ("libx264", "yuv420p10le"),
        ("libx264", "yuv444p"),
        ("ffv1", "gray"),
        ("ffv1", "yuv410p"),
        ("png", "rgba"),
        ("libx264rgb", "rgb24"),
    ],
)
def test_pixel_formats_are_known(codec, pixel_format):
    data = make_clip("mov" if codec == "png" else "matroska", codec, pixel_format=pixel_format, count=5, b_frames=0)
    assert shown(read(data, EACH)) == list(range(5))


def with_display_matrix(data, a, b, c, d):
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    return data[:at] + matrix + data[at + 36 :]


@pytest.mark.parametrize(
    ("matrix", "turned"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),  # a phone held upright: a quarter turn clockwise
        ((-1, 0, 0, -1), lambda p: np.rot90(p, 2)),
        ((0, -1, 1, 0), lambda p: np.rot90(p, 1)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    ],
)
def test_frames_are_turned_upright(matrix, turned):
    data = with_display_matrix(make_clip(count=1, picture=lambda _: painted(0b01110001)), *matrix)
    (frame,) = read(data, EACH)
    expected = turned(painted(0b01110001))
    assert np.asarray(frame.image).shape == expected.shape
    assert np.abs(np.asarray(frame.image).astype(int) - expected).mean() < 10


def test_frames_in_front_of_an_edit_are_not_shown():
    """A clip that a phone has trimmed: the frames are there, for those behind them to be decoded."""
    data = bytearray(make_clip(gop=12))
    begins = data.index(b"elst") + 16
    with av.open(io.BytesIO(data)) as container:
        unit = container.streams.video[0].time_base
    moved = int.from_bytes(data[begins : begins + 4], "big") + int(Fraction(3, 10) / unit)
    data[begins : begins + 4] = moved.to_bytes(4, "big")
    frames = read(bytes(data), EACH)
    assert shown(frames) == list(range(3, 12))
    assert [frame.time for frame in frames] == [number / 10 for number in range(9)]


@pytest.mark.parametrize(("shape", "size"), [("2/1", (128, 32)), ("1/2", (64, 64)), ("1/1", (64, 32))])
def test_pixels_become_square(shape, size):
    data = make_clip("mp4", "libx264", count=2, sample_shape=Fraction(shape))
    frames = read(data, EACH)
    assert [frame.image.size for frame in frames] == [size, size]
    assert shown(frames) == [0, 1]


def test_interlaced_frames_stay_woven():
    data = make_clip("mpegts", "mpeg2video", options={"flags": "+ildct+ilme"}, count=5)
    assert shown(read(data, EACH)) == list(range(5))


def test_sources_are_pickled_closed_and_give_the_same(tmp_path, clips):
    data = clips["mp4-h264"]
    (tmp_path / "clip.mp4").write_bytes(data)
    (tmp_path / "all.tar").write_bytes(b"x" * 512 + data + b"y" * 700)
    sources = [
        VideoFile(tmp_path / "clip.mp4", shown="clip.mp4"),
        VideoBytes(data, "clip.mp4"),
        VideoSlice(tmp_path / "all.tar", 512, len(data), "clip.mp4"),
    ]
    for source in sources:
        assert isinstance(source, VideoSource)
        assert source.name == "clip.mp4"
        again = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert shown(again.frames(FrameSampling(fps=5))) == [0, 2, 4, 6, 8, 10]
    assert number_in(load_picture(sources[0])) == 6


@pytest.mark.parametrize("name", KINDS)
def test_videos_are_told_by_their_first_bytes(name, clips):
    assert is_video(clips[name][:512])


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("clips/a b.MP4", True), ("https://x.org/v.webm?start=3", True), ("data:video/mp4;base64,AAAA", True),
        ("a.gif", False), ("a.jpg", False), ("what is in the video mp4?", False), ("", False), (b"", False),
        (b"GIF89a", False), (b"\x00\x00\x00\x1cftypheic", False), (b"\x00\x00\x00\x1cftypM4A ", False),
        (b"hello world, a text", False), (b"OggS\0\2" + bytes(23) + b"\x80theora", True), (b"OggS" + bytes(60), False),
        (b"RIFF\0\0\0\0AVI LIST", True), (b"RIFF\0\0\0\0WAVEfmt ", False), (b"G" * 188, False),
    ],
)  # fmt: skip
def test_names_and_marks_of_videos(given, found):
    assert is_video(given) is found
