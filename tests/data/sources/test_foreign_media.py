"""Oddities of published files with several pictures and videos: nothing is misplaced or passed over in silence."""

import io
import json
import tarfile

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sample import VideoSource
from vlm_distill_cache.data.sources.webdataset import WebDataset

AB = ["a.png", "b.png"]


def asked(question, **media):
    return {"question": question, "answer": "A.", **media}


def written(sample):
    """The questions with what they show in brackets."""
    names = iter(sample.images)
    found = []
    for turn in sample.placed():
        parts = (part if part is not None else f"[{called(next(names))}]" for part in turn.parts())
        found.append("".join(parts))
    return found


def called(medium):
    kind = "v:" if isinstance(medium, VideoSource) else ""
    return kind + medium.name.split(" from ")[0].rpartition("tar:")[2]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("描述<|image_2|>和<|image_1|>吗", "描述[b.png]和[a.png]吗"),
        ("See<|image_1|>and<|image_2|>", "See[a.png]and[b.png]"),
        ("图<ImageHere>图<ImageHere>", "图[a.png]图[b.png]"),
        ("x<IMG_CONTEXT>y<IMG_CONTEXT>", "x[a.png]y[b.png]"),
        ("x<image_placeholder>y<image_placeholder>", "x[a.png]y[b.png]"),
        ("x<image1>y<image2>", "x[a.png]y[b.png]"),
        ("图<|vision_start|><|image_pad|><|vision_end|>图<|vision_start|><|image_pad|><|vision_end|>", "图[a.png]图[b.png]"),
    ],
)  # fmt: skip
def test_a_marker_behind_a_word_is_one(read, question, expected):
    assert written(read(asked(question, images=AB))) == [expected]


def test_a_video_marker_behind_a_word_is_one(read):
    assert written(read(asked("看<video>和<video>", videos=["1.mp4", "2.mp4"]))) == ["看[v:1.mp4]和[v:2.mp4]"]
    assert written(read(asked("Look at it<video>", video="1.mp4"))) == ["[v:1.mp4]Look at it"]
    mixed = {"query": "<video>then<video>", "response": "A.", "videos": ["1.mp4", "2.mp4"]}
    assert written(read(mixed)) == ["[v:1.mp4]then[v:2.mp4]"]


@pytest.mark.parametrize(
    ("question", "left"),
    [
        ("描述<|image_1|>", "描述<|image_1|>"),
        ("x<ImageHere>y", "x<ImageHere>y"),
        ("图<|vision_start|><|image_pad|><|vision_end|>吗", "图<|vision_start|>吗"),
        ("Is it List<Image>?", "Is it List<Image>?"),
    ],
)
def test_the_text_of_one_picture_is_as_it_was(read, question, left):
    sample = read(asked(f"<image>\n{question}", image="a.png"))
    assert [(turn.question, turn.places) for turn in sample.turns] == [(left, ())]


def test_numbered_keys_are_in_the_order_of_their_numbers(read):
    columns = {"image_1": "a.png", "image_10": "c.png", "image_2": "b.png"}
    assert written(read(asked("Same?", **columns))) == ["[a.png][b.png][c.png]Same?"]
    assert written(read(asked("Same?", right_image="b.png", left_image="a.png"))) == ["[a.png][b.png]Same?"]
    assert written(read(asked("<image 10>?", image_10="c.png"))) == ["[c.png]?"]
    marked = {"<image_01>": "b.png", "<image_00>": "a.png"}
    assert written(read(asked("<image_01> or <image_00>?", image=marked))) == ["[b.png]or [a.png]?"]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            asked("<video>?", video="1.mp4", clip=[1.0, 4.5]),
            "'clip' .* part of the video .* cut the video, then remove",
        ),
        (asked("<video>?", video="1.mp4", meta={"split": [0.0, 9.5]}), "'split' .* part of the video"),
        (asked("<video>?", video="1.mp4") | {"answer": "See <video>."}, "the answer of turn 1 has <video>"),
        (asked("Which follows <image>?", images=AB) | {"answer": "<image>"}, "the answer of turn 1 has <image>"),
    ],
)
def test_what_would_be_misread_is_named(read, entry, message):
    with pytest.raises(SampleError, match=message):
        read(entry)


def test_what_only_looks_like_a_part_of_a_video_is_none(read):
    for more in ({"clip": "c17"}, {"segment": 3}, {"split": "train"}, {"meta": {"split": "train"}}, {"clip": [0, 0]}):
        assert written(read(asked("<video>?", video="1.mp4", **more))) == ["[v:1.mp4]?"]


@pytest.fixture
def tar(tmp_path):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "PNG")

    def of(*names, **entry):
        with tarfile.open(tmp_path / "a.tar", "w") as file:
            for name in (*names, "k.json"):
                data = json.dumps(entry).encode() if name.endswith("json") else buffer.getvalue()
                info = tarfile.TarInfo(name)
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
        return WebDataset(str(tmp_path / "a.tar"))[0]

    return of


@pytest.mark.parametrize(
    ("names", "entry", "expected"),
    [
        (["k.1.mp4", "k.0.mp4"], asked("<video>or <video>?"), "[v:k.0.mp4]or [v:k.1.mp4]?"),
        (["k.0.mp4", "k.1.mp4"], asked("Same?", video=["k.1.mp4", "0.mp4"]), "[v:k.1.mp4][v:k.0.mp4]Same?"),
        (["k.gif"], asked("What?", video="k.gif"), "[v:k.gif]What?"),
        (["k.gif"], asked("<image>\nWhat?", video="other.gif"), "[v:k.gif]What?"),
        (["k.gif"], asked("What?", image="k.gif"), "[k.gif]What?"),
        (["k.0.png", "k.1.png"], asked("<video>?", video=["k.1.png", "k.0.png"]), "[v:of frames]?"),
        (
            ["k.0.png", "k.1.png", "k.2.png"],
            asked("<image>or <video>?", image="k.2.png", video=["k.0.png", "k.1.png"]),
            "[k.2.png]or [v:of frames]?",
        ),
        (["k.png"], asked("What?", video="its/source.mp4"), "[k.png]What?"),
    ],
)
def test_a_video_of_a_tar_is_the_members_that_are_called_so(tar, names, entry, expected):
    assert written(tar(*names, **entry)) == [expected]


def test_pictures_of_a_tar_are_not_taken_for_those_of_another_video(tar):
    with pytest.raises(SampleError, match=r"names the video .*orig\.mp4.* and 2 pictures do; list them under 'video'"):
        tar("k.0.png", "k.1.png", **asked("What?", video="orig.mp4"))
    with pytest.raises(SampleError, match=r"'start' .* part of the video"):
        tar("k.mp4", **asked("What?", video="k.mp4", start=1.5))
