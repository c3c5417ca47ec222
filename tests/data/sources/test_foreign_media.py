"""Oddities of published files with several pictures and videos: nothing is misplaced or passed over in silence."""

import io
import json
import tarfile

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import VideoSource
from vlm_distill_cache.data.sources.csv_rows import CsvDataset
from vlm_distill_cache.data.sources.llava import LlavaDataset
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


@pytest.mark.parametrize("name", ["video_{}", "video{}", "Video {}"])
def test_numbered_videos_are_in_the_order_of_their_numbers(read, name):
    columns = {name.format(number): f"{number}.mp4" for number in (10, 2, 1)}
    assert written(read(asked("<video>, <video>, <video>?", **columns))) == ["[v:1.mp4], [v:2.mp4], [v:10.mp4]?"]


@pytest.mark.parametrize(
    ("beside", "fps", "times"),
    [
        ({"sample_fps": "2"}, 2.0, None),  # as Qwen's own examples write it
        ({"fps": ["0.5"]}, 0.5, None),
        ({"timestamps": ["00:00", "01:02.5"]}, None, (0, 62.5)),
        ({"frame_timestamps": ["0.0", "1.5s"]}, None, (0, 1.5)),
        ({"video_fps": 30}, None, None),  # of the video that the frames were taken from
        ({"fps": "fast", "timestamps": ["a", "b"]}, None, None),
    ],
)
def test_rates_and_times_of_frames_may_be_texts(read, beside, fps, times):
    for key in ("frames", "video"):
        (video,) = read(asked("?", **{key: AB}, **beside)).images
        assert (video.fps, video.times) == (fps, times)
    part = {"type": "video", "video": AB, **beside}
    messages = [
        {"role": "user", "content": [part, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "A."},
    ]
    (video,) = read({"messages": messages}).images
    assert (video.fps, video.times) == (fps, times)


def test_each_of_several_videos_of_frames_has_its_own_rate_and_times(read):
    videos = [AB, ["c.png", "d.png", "e.png"]]
    timed = read(asked("?", videos=videos, timestamps=[[0, 2], [0, 5, 7]])).images
    assert [video.times for video in timed] == [(0, 2), (0, 5, 7)]
    assert [video.fps for video in read(asked("?", videos=videos, fps=[2, 1])).images] == [2, 1]
    assert [video.fps for video in read(asked("?", videos=videos, fps=2)).images] == [2, 2]


@pytest.mark.parametrize(
    "sign",
    [
        "<|begin_of_video|><|video|><|end_of_video|>",
        "<vid_start><vid_patch><vid_patch><vid_patch><vid_end>",
        "<vi_start><video><vi_end>",
        "<vi_start><image><vi_end>",
        "<|video_start|><video><|video_end|>",
        "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>",
        "<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>",
        "<Video><VideoHere></Video>",
        "<Video><ImageHere></Video>",
        "<video></video>",
    ],
)
def test_signs_around_a_video_are_one_marker_with_it(read, sign):
    assert written(read(asked(f"{sign}\nWhat?", video="1.mp4"))) == ["[v:1.mp4]What?"]
    assert written(read(asked(f"So {sign}?", video="1.mp4"))) == ["[v:1.mp4]So ?"]
    if "<image>" not in sign:
        assert written(read(asked(f"Is {sign} <image>?", video="1.mp4", image="a.png"))) == ["Is [v:1.mp4] [a.png]?"]
        both = asked(f"{sign} or {sign}?", videos=["1.mp4", "2.mp4"])
        assert written(read(both)) == ["[v:1.mp4]or [v:2.mp4]?"]


@pytest.mark.parametrize(
    "text", ["Is </video> a tag?", "<|video_end|> x", "What is <image:1>?", "{image#1}", "<|image|"]
)
def test_without_a_video_its_signs_are_text_as_they_were(read, text):
    sample = read(asked(text, image="a.png"))
    assert [(turn.question, turn.places) for turn in sample.turns] == [(text, ())]


@pytest.mark.parametrize(
    "sign",
    [
        *(
            "<image:1>",
            "&lt;image&gt;",
            "<｜image｜>",
            "< image >",
            "<image id=1>",
            "<|img_sep|>",
            "<pic>",
            "<vid>",
            "</img>",
        ),
        *("{image#1}", "{{image_1}}", "<frame 1>", "<vi_start>", '<img src="a.png">'),
    ],
)
def test_what_looks_like_a_marker_and_is_none_is_not_left_in_the_text_of_several(read, sign):
    question = f"Is {sign} like it?"
    for media in ({"images": AB}, {"video": "1.mp4"}):
        with pytest.raises(
            SampleError, match=r"its text has '.*', which is no marker that is read: write <image> or <video>"
        ):
            read(asked(question, **media))
    for media, in_front in (({"images": AB}, "[a.png][b.png]"), ({"video": "1.mp4"}, "[v:1.mp4]")):
        assert written(read(asked(f"Is `{sign}` a tag?", **media))) == [f"{in_front}Is `{sign}` a tag?"]


def test_brackets_that_are_no_sign_stay_in_the_text_of_several(read):
    for text in (
        "In [Image 1], <b>?",
        r"Is \text{image 1} = {x}?",
        "a < image and b > 2?",
        "List<Integer> or <imaginary>?",
    ):
        assert written(read(asked(text, images=AB))) == [f"[a.png][b.png]{text}"]


@pytest.mark.parametrize("sign", ["<video>", "<image>"])
def test_several_markers_of_one_video_are_named(read, sign):
    with pytest.raises(SampleError, match=r"speaks of 2 videos, but the entry names 1 video"):
        read(asked(f"Frame 1: {sign}\nFrame 2: {sign}\nSame?", video="1.mp4"))
    with pytest.raises(SampleError, match=r"speaks of 2 videos, but the entry names 1 video"):
        read(asked(f"{sign}{sign}Same?", videos=AB))  # pictures under that key are the frames of one
    assert written(read(asked("<video1>, <video1>?", video="1.mp4"))) == ["[v:1.mp4], ?"]


@pytest.mark.parametrize("sign", ["<image>", "<ImageHere>", "<|image_2|>", "<image 2>", "<video>", "<|image_pad|>"])
def test_a_marker_in_an_answer_of_several_is_named(read, sign):
    with pytest.raises(SampleError, match=r"the answer of turn 1 has .*: pictures are read in questions alone"):
        read(asked("Which?", images=AB) | {"answer": f"It is {sign}"})
    for answer in ("See `<ImageHere>`.", '<p><img src="x.png"></p>', "![](x.png)"):
        assert read(asked("Which?", images=AB) | {"answer": answer}).turns[0].answer == answer


def test_the_one_picture_of_an_answer_is_not_taken_for_the_questions(read):
    drawn = {"query": "Draw it.", "response": "<image>", "images": ["a.png"]}
    with pytest.raises(SampleError, match="the answer of turn 1 has <image>"):
        read(drawn)
    assert read(drawn | {"query": "<image>Which tag?"}).turns[0].answer == "<image>"


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


@pytest.mark.parametrize(
    "beside",
    [
        {"start_frame": 3, "end_frame": 70},
        {"clip_start_time": 3.0},
        {"start_seconds": "00:03"},
        {"endFrame": 9},
        {"Start_timestamp": "00:00:03.500"},
        {"begin": 1},
        {"starts": [3.0], "ends": [4.0]},
        {"t_start": 2},
        {"segment": {"start": 0, "end": 5}},
        {"frame_range": [0, 5]},
        {"metadata": {"end_time": 5}},
    ],
)
def test_a_part_of_a_video_is_refused_however_it_is_called(read, beside):
    with pytest.raises(SampleError, match=r"says that a part of the video is meant, .* cut the video, then remove"):
        read(asked("<video>?", video="1.mp4", **beside))


def test_what_only_looks_like_a_part_of_a_video_is_none(read):
    for more in (
        {"duration": 12.5},
        {"timestamps": [[0, 1.5], [2, 3]]},
        {"segments": ["a"]},
        {"weekend": 3},
        {"segment": {"name": "x"}},
        {"end": "of the film"},
        {"start": "00:00", "end": None},
        {"metadata": {"fps": 30}},
    ):
        assert written(read(asked("<video>?", video="1.mp4", **more))) == ["[v:1.mp4]?"]
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
        (["k.mp4"], asked("What?", video="its/source.mp4", video_path="b/2.mp4"), "[v:k.mp4]What?"),
        (["k.img10.png", "k.img2.png"], asked("Same?"), "[k.img2.png][k.img10.png]Same?"),  # as sorted names lie
        (["k.frame-1.jpg", "k.frame-0.png"], asked("Same?"), "[k.frame-0.png][k.frame-1.jpg]Same?"),
        (["k.0.1.png", "k.0.0.png"], asked("Same?"), "[k.0.0.png][k.0.1.png]Same?"),
        (["k.b1.png", "k.a2.png"], asked("Same?"), "[k.b1.png][k.a2.png]Same?"),
        (["k.jpg", "k.png"], asked("Same?"), "[k.jpg][k.png]Same?"),
        (["k.m4v", "k.m2v"], asked("Same?"), "[v:k.m4v][v:k.m2v]Same?"),
        (["k.0.png"], asked("<image> and <image>?", images=["k.0.png", "k.0.png"]), "[k.0.png]and [k.0.png]?"),
        (
            ["k.0.png", "k.1.png"],
            asked("<image>, <image>, <image>?", images=["k.1.png", "k.0.png", "k.1.png"]),
            "[k.1.png], [k.0.png], [k.1.png]?",
        ),
        (["k.0.png", "k.1.png"], asked("?", images=[{"path": "k.1.png"}, {"path": "k.0.png"}]), "[k.1.png][k.0.png]?"),
        (
            ["k.png", "k.mask.png"],
            asked("?", images=["k.png"]),
            "[k.png]?",
        ),  # as the error of one without names advises
        (["k.0.png", "k.1.png"], asked("Same?", image="000123"), "[k.0.png][k.1.png]Same?"),
    ],
)
def test_a_video_of_a_tar_is_the_members_that_are_called_so(tar, names, entry, expected):
    assert written(tar(*names, **entry)) == [expected]


def test_pictures_of_a_tar_are_not_taken_for_those_of_another_video(tar):
    with pytest.raises(SampleError, match=r"names the video .*orig\.mp4.* and 2 pictures do; list them under 'video'"):
        tar("k.0.png", "k.1.png", **asked("What?", video="orig.mp4"))
    with pytest.raises(SampleError, match=r"'start' .* part of the video"):
        tar("k.mp4", **asked("What?", video="k.mp4", start=1.5))


@pytest.mark.parametrize(
    ("names", "media", "message"),
    [
        (["k.0.png", "k.1.png"], {"images": ["0.png"]}, r"k\.1\.png lies beside it and is not named .*'0\.png'"),
        (
            ["k.0.png", "k.1.png"],
            {"image": "its/source.jpg"},
            r"names 1 .*'its/source\.jpg'.*, and beside it lie 2 .*k\.0\.png",
        ),
        (["k.0.png", "k.1.png"], {"images": ["a.png", "b.png", "a.png"]}, "names 3 .*, and beside it lie 2"),
        (["k.0.mp4"], {"videos": ["k.0.mp4", "k.1.mp4"]}, "names 2 .*, and beside it lie 1"),
        (
            ["k.png", "k.mask.png"],
            {},
            r"k\.mask\.png holds another picture beside .*name those that the sample is about",
        ),
    ],
)
def test_members_that_the_names_of_an_entry_do_not_account_for_are_named(tar, names, media, message):
    with pytest.raises(SampleError, match=message):
        tar(*names, **asked("Same?", **media))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (asked("What is <region> doing?", annotation=[{"0": {}}]), "<region> stands for what 'annotation' holds"),
        (asked("When?", meta={"token": {"<s0>": 1.5}}) | {"answer": "At <s0>."}, "<s0> stands for what 'meta' holds"),
    ],
)
def test_signs_whose_values_stand_elsewhere_are_named(read, entry, message):
    with pytest.raises(SampleError, match=message):
        read(entry | {"video": "1.mp4"})


@pytest.mark.parametrize("sign", [",", ", ", ";", "|", "\n"])
def test_a_text_may_list_several_files(read, sign):
    assert written(read(asked("<image>or <image>?", images=sign.join(AB)))) == ["[a.png]or [b.png]?"]
    assert written(read(asked("Same?", videos=sign.join(["1.mp4", "2.webm"])))) == ["[v:1.mp4][v:2.webm]Same?"]
    assert written(read(asked("Same?", video=sign.join(AB)))) == ["[v:of frames]Same?"]


def test_a_printed_list_of_files_is_one_and_other_texts_name_one_file(read):
    for text in ('["a.png", "b.png"]', "['a.png' 'b.png']"):
        assert written(read(asked("<image>or <image>?", image_path=text))) == ["[a.png]or [b.png]?"]
        timed = asked("?", frames=text, timestamps="[0.0, 2.5]", fps="3")
        (video,) = read(timed).images
        assert ([frame.name for frame in video.paths], video.times) == (AB, (0.0, 2.5))
    for name in ("Smith, J.png", "[1].png", "a b.png", "x;y/a.png", "a, b.mp4"):
        sample = read(asked("?", **({"video": name} if "mp4" in name else {"image": name})))
        assert [medium.name for medium in sample.images] == [name]


def test_questions_and_answers_of_a_video_are_a_conversation(read):
    """VideoChat2's and TimeChat's form."""
    rows = [
        {"i": "Look.", "q": "What moves?", "a": "A dog."},
        {"q": "Where?", "a": "Left."},
        {"i": "Say more.", "q": "", "a": "No."},
    ]
    sample = read({"video": "1.mp4", "QA": rows})
    assert written(sample) == ["[v:1.mp4]Look.\nWhat moves?", "Where?", "Say more."]
    assert [turn.answer for turn in sample.turns] == ["A dog.", "Left.", "No."]
    assert written(read(asked("What?", video="1.mp4", QA=rows))) == [
        "[v:1.mp4]What?"
    ]  # beside another form it is not read
    with pytest.raises(SampleError, match="says that a part of the video is meant"):
        read({"video": "1.mp4", "start": 1.5, "end": 3, "QA": rows})


def test_options_in_columns_of_answers_are_asked(read):
    """NExT-QA's columns, whose answer is a number counted from 0; two answers beside one in words are no options."""
    options = {"a0": "run", "a1": "jump", "a2": "sit"}
    (turn,) = read(asked("What does it do?", video="1.mp4", **options) | {"answer": 2}).turns
    assert turn.question.startswith("What does it do?\nA. run\nB. jump\nC. sit\n")
    assert turn.answer == "C"
    (turn,) = read(asked("What does it do?", video="1.mp4", **options) | {"answer": "jump"}).turns
    assert (turn.question, turn.answer) == ("What does it do?", "jump")


def test_numbers_of_videos_in_a_table_are_files(tmp_path):
    (tmp_path / "a.csv").write_text("video,question,answer\n4010069381,What?,A.\n")
    assert written(CsvDataset(tmp_path / "a.csv")[0]) == ["[v:4010069381]What?"]


def test_a_description_of_data_sets_is_told_from_data(tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps({"ds": {"root": "img", "annotation": "x.jsonl", "length": 3}}))
    with pytest.raises(
        DataError, match=r"says where data sets lie and holds none .*name a file of theirs \(x\.jsonl\)"
    ):
        LlavaDataset(tmp_path / "meta.json")
