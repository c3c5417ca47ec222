"""Picture files as a video: in the order of their numbers, at times that are given or follow from a rate."""

import io
import pickle

import PIL.Image
import pytest
from video_clips import number_in, painted

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.load import ImageBytes
from vlm_distill_cache.data.images.video import FrameFolder
from vlm_distill_cache.data.sample import FrameSampling, VideoSource

EACH = FrameSampling(fps=1000, most=100)


@pytest.fixture
def folder(tmp_path):
    for name, number in {"f10.jpg": 3, "f2.png": 1, "f1.png": 0, "F9.PNG": 9, "f02.png": 2}.items():
        PIL.Image.fromarray(painted(number)).save(tmp_path / name, quality=95)
    for name in ("notes.txt", ".hidden.png", "Thumbs.db"):
        (tmp_path / name).write_text("no frame")
    return tmp_path


def read(source, sampling=EACH):
    return [(number_in(frame.image), frame.time) for frame in source.frames(sampling)]


def test_a_folder_is_read_by_the_numbers_in_its_names(folder):
    source = pickle.loads(pickle.dumps(FrameFolder(folder)))  # noqa: S301
    assert isinstance(source, VideoSource)
    # "F" stands before "f"; f02 and f2 are equal numbers
    assert read(source) == [(9, 0.0), (0, 1.0), (2, 2.0), (1, 3.0), (3, 4.0)]
    assert read(FrameFolder(folder, fps=2)) == [(9, 0.0), (0, 0.5), (2, 1.0), (1, 1.5), (3, 2.0)]
    assert read(FrameFolder(folder, fps=2), FrameSampling(fps=1)) == [(9, 0.0), (2, 1.0), (3, 2.0)]


def test_a_list_keeps_its_order_and_takes_any_source_and_times(folder):
    buffer = io.BytesIO()
    PIL.Image.fromarray(painted(77)).save(buffer, "PNG")
    paths = (folder / "f10.jpg", ImageBytes(buffer.getvalue(), "held"), folder / "f1.png")
    assert read(FrameFolder(paths)) == [(3, 0.0), (77, 1.0), (0, 2.0)]
    assert read(FrameFolder(paths, times=(5.5, 5.8, 9.0))) == [(3, 0.0), (77, 0.3), (0, 3.5)]
    assert read(FrameFolder(paths, times=(5.5, 5.8, 9.0)), FrameSampling(fps=1, most=1)) == [(0, 3.5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"times": (0.0, 1.0)}, "has 5 frames, but 2 times"),
        ({"times": (0.0, 1.0, 1.0, 2.0, 3.0)}, "do not rise"),
        ({"times": (0.0, 1.0, float("nan"), 2.0, 3.0)}, "do not rise"),
        ({"fps": 0.0}, "expected frames a second above 0, got 0.0"),
    ],
)
def test_times_that_are_none_are_refused(folder, options, message):
    with pytest.raises(SampleError, match=message):
        FrameFolder(folder, **options).frames(EACH)


def test_what_has_no_frames_or_bad_ones_is_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    cases = {
        FrameFolder(tmp_path / "empty", shown="clip"): "video clip has no frames",
        FrameFolder(()): "has no frames",
        FrameFolder(tmp_path / "none", hint="paths start here"): "No such file or directory; paths start here",
        FrameFolder(folder / "f1.png"): "Not a directory",
        FrameFolder(
            (folder / "f1.png", folder / "notes.txt"), shown="clip"
        ): "video clip, frame 2: image notes.txt cannot",
    }
    for source, message in cases.items():
        with pytest.raises(SampleError, match=message):
            source.frames(EACH)
    PIL.Image.new("RGB", (5, 5)).save(folder / "f11.png")
    with pytest.raises(SampleError, match=r"frames of 2 sizes: \[\(5, 5\), \(64, 32\)\]"):
        FrameFolder(folder).frames(EACH)
