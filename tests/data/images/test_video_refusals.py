"""Whatever is wrong with a video is a `SampleError` that names it, says what, and leaves nothing open."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from video_clips import make_clip

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images import containers, frame_limits
from vlm_distill_cache.data.images.truncation import stated_size
from vlm_distill_cache.data.images.video import VideoBytes, VideoFile, VideoSlice
from vlm_distill_cache.data.sample import FrameSampling

SAMPLING = FrameSampling(fps=100, most=8)


@pytest.fixture(scope="module")
def clips():
    faststart = {"container_options": {"movflags": "faststart"}}
    return {
        "mp4": make_clip(), "faststart": make_clip(**faststart), "webm": make_clip("webm", "libvpx"),
        "avi": make_clip("avi", "mpeg4"), "ts": make_clip("mpegts"), "wmv": make_clip("asf", "wmv2", b_frames=0),
    }  # fmt: skip


def refusal(source):
    with pytest.raises(SampleError) as caught:
        source.frames(SAMPLING)
    assert "clip" in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"not a video but a text\n" * 30,
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/hostname\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        np.random.default_rng(0).bytes(4000),
        b"\x00\x00\x00\x18ftypmp42" + bytes(12),
        b"\x1a\x45\xdf\xa3",
        b"RIFF\x10\0\0\0AVI LIST",
        b"GIF89a",
        b"\x89PNG\r\n\x1a\n" + bytes(50),
    ],
)
def test_what_is_no_video_is_refused(data):
    assert re.search("cannot be decoded|no pictures|cut off", refusal(VideoBytes(data, "clip")))


@pytest.mark.parametrize("form", ["JPEG", "BMP", "TIFF"])
def test_a_still_picture_is_called_one(form):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8)).save(buffer, form)
    assert "is a still picture: name it under 'image'" in refusal(VideoBytes(buffer.getvalue(), "clip"))


def test_nothing_is_no_video():
    assert "is empty (0 bytes)" in refusal(VideoBytes(b"", "clip"))


def test_sound_alone_is_no_video():
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=48000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        frame.rate = 48000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert "has no pictures (audio alone)" in refusal(VideoBytes(buffer.getvalue(), "clip"))


@pytest.mark.parametrize("name", ["mp4", "faststart", "webm", "avi", "wmv"])
@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_a_file_that_is_cut_off_is_refused(name, share, clips):
    data = clips[name]
    assert stated_size(io.BytesIO(data)) == len(data)
    assert f"got {int(share * len(data))}; fetch it again" in refusal(
        VideoBytes(data[: int(share * len(data))], "clip")
    )


def open_files():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_damaged_bytes_end_no_run(clips):
    rng = np.random.default_rng(0)
    before = open_files()
    for data in clips.values():
        for _ in range(5):
            hurt = bytearray(data)
            for place in rng.integers(0, len(data), 5):
                hurt[place] = rng.integers(256)
            try:
                found = VideoBytes(bytes(hurt), "clip").frames(SAMPLING)
            except SampleError:
                continue
            assert found
    assert open_files() == before


def test_files_that_cannot_be_read(tmp_path, clips, monkeypatch):
    assert "No such file" in refusal(VideoFile(tmp_path / "clip.mp4"))
    assert "; paths start here" in refusal(VideoFile(tmp_path / "clip.mp4", hint="paths start here"))
    assert "null byte" in refusal(VideoFile(Path("clip\0.mp4")))
    assert "is a folder" in refusal(VideoFile(tmp_path, shown="clip"))
    os.mkfifo(tmp_path / "clip.fifo")
    assert "not a regular file" in refusal(VideoFile(tmp_path / "clip.fifo"))
    (tmp_path / "clip.tar").write_bytes(clips["mp4"])
    assert "is cut off: expected 99999 bytes" in refusal(VideoSlice(tmp_path / "clip.tar", 5, 99999, "clip"))
    assert "No such file" in refusal(VideoSlice(tmp_path / "none.tar", 0, 9, "clip"))

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", forbidden)
    assert "cannot be read: Permission denied" in refusal(VideoFile(tmp_path / "clip.tar", shown="clip"))


def test_without_pyav_the_remedy_is_said_and_animations_are_read(monkeypatch, clips):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "run `pip install 'vlm-distill-cache[video]'`" in refusal(VideoBytes(clips["mp4"], "clip"))


def test_pyav_is_imported_only_when_a_video_is_decoded():
    code = "import sys, vlm_distill_cache.data.images.video; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_limits(monkeypatch, clips):
    monkeypatch.setattr(containers, "MAX_HOURS", 1 / 3600)
    assert "hours long, more than the" in refusal(VideoBytes(clips["mp4"], "clip"))
    assert "hours long, more than the" in refusal(VideoBytes(clips["avi"], "clip"))
    monkeypatch.undo()
    monkeypatch.setattr(containers, "MAX_FRAMES", 11)
    assert "more than 11 frames" in refusal(VideoBytes(clips["webm"], "clip"))
    monkeypatch.undo()
    monkeypatch.setattr(containers, "MAX_DECODED", 5 * 64 * 32)
    assert "would have to be decoded" in refusal(VideoBytes(clips["avi"], "clip"))
    monkeypatch.undo()
    monkeypatch.setattr(frame_limits, "MAX_PIXELS", 64 * 32 - 1)
    assert "64 x 32 pixels, more than" in refusal(VideoBytes(clips["mp4"], "clip"))
    monkeypatch.undo()
    monkeypatch.setattr(frame_limits, "MAX_HELD", 7 * 64 * 32)
    assert "8 frames of 64 x 32 pixels are more than" in refusal(VideoBytes(clips["ts"], "clip"))


def test_a_file_of_a_stated_size_may_have_more_behind_it(tmp_path, clips):
    for data in clips.values():
        assert len(VideoBytes(data + bytes(100), "clip").frames(SAMPLING)) == 8
