"""A picture that an entry names, in whatever way, is read or is that sample's error; never is the sample text alone."""

import base64
import io
import json
import time
from contextlib import suppress
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.recognise import (
    base64_picture,
    is_picture,
    may_name_file,
    names_picture,
    names_sound,
    names_video,
    picture_extensions,
)
from vlm_distill_cache.data.sources.messages import MessagesDataset

TURN = {"question": "What?", "answer": "A circle."}


def encoded(fmt="PNG", size=(5, 7)):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size).save(buffer, fmt)
    return buffer.getvalue()


PNG = encoded()
BASE64 = base64.b64encode(PNG).decode()


@pytest.fixture
def sample(tmp_path):
    """Read one entry, which lies beside ``img/a.png`` (5 x 7) and ``img/b.png`` (6 x 6)."""
    folder = tmp_path / "img"
    folder.mkdir()
    (folder / "a.png").write_bytes(PNG)
    (folder / "my (small) a.png").write_bytes(PNG)
    (folder / "b.png").write_bytes(encoded(size=(6, 6)))

    def read(entry):
        path = tmp_path / "data.jsonl"
        path.write_text(json.dumps(entry))
        return MessagesDataset(path)[0]

    return read


@pytest.mark.parametrize(
    "value",
    [
        "img/a.png",
        ["img/a.png"],
        "img\\a.png",
        {"path": "img/a.png"},
        {"bytes": None, "path": "img/a.png"},
        {"bytes": BASE64, "path": None},
        {"file_name": "img/a.png", "width": 5},
        {"url": "img/a.png"},
        {"type": "base64", "media_type": "image/png", "data": BASE64},
        BASE64,
        BASE64.rstrip("="),
        BASE64.replace("+", "-").replace("/", "_"),
        "\n".join(BASE64[start : start + 76] for start in range(0, len(BASE64), 76)),
        f"data:image/png;base64,{BASE64}",
    ],
)
@pytest.mark.parametrize(
    "key", ["image", "images", "image_path", "img", "Image", "imagePath", "picture", "photo", "image_1"]
)
def test_every_key_and_form_of_a_picture_is_read(sample, key, value):
    assert [image.load().size for image in sample(TURN | {key: value}).images] == [(5, 7)]


@pytest.mark.parametrize("key", ["file_name", "filename", "path", "rgb_image", "anything"])
def test_a_picture_under_any_other_key_is_known_by_its_name(sample, key):
    assert [image.load().size for image in sample(TURN | {key: "img/a.png"}).images] == [(5, 7)]


def test_paths_start_from_the_data_wherever_the_command_runs(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sample(TURN | {"image": "img/a.png"})  # writes the file
    for value in ("img/a.png", "img\\a.png"):
        Path("data.jsonl").write_text(json.dumps(TURN | {"image": value}))
        assert MessagesDataset(Path("data.jsonl"))[0].images[0].load().size == (5, 7)


def test_a_file_address_is_read_and_nothing_is_downloaded(sample, tmp_path):
    assert sample(TURN | {"image": f"file://{tmp_path}/img/a.png"}).images[0].load().size == (5, 7)
    for value in ("https://example.org/a.png", {"url": "https://example.org/a.png"}):
        with pytest.raises(SampleError, match="nothing is downloaded"):
            sample(TURN | {"image": value})


@pytest.mark.parametrize(
    "others",
    [
        {"image": "img/a.png", "image_id": 3, "image_width": 5, "thumbnail": "img/b.png"},
        {"image": "img/a.png", "images": ["img/a.png"], "image_path": "gone.png"},
        {"image_path": "img/a.png", "file_name": "a.png", "image_url": "https://example.org/a.png"},
        {"file_name": "img/a.png", "coco_url": "https://example.org/other.jpg"},
        {"image": None, "images": [], "image_path": "img/a.png"},
    ],
)
def test_other_names_of_the_same_picture_and_what_describes_it_do_not_count(sample, others):
    assert [image.load().size for image in sample(TURN | others).images] == [(5, 7)]


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"image_path": "img/a.png", "img": "img/b.png"}, "'image_path' and 'img' name different pictures"),
        ({"before": "img/a.png", "after": "img/b.png"}, "'after' and 'before' name different pictures"),
        ({"image_id": 17}, "'image_id' names a picture .*but none could be read"),
        ({"n_images": 1}, "'n_images' names a picture"),
        ({"meta": {"image": {"a": 1}}}, r"'meta\.image' names a picture"),
        ({"meta": [{"x": "img/a.png"}]}, r"'meta\[0\]\.x' names a picture"),
        ({"media": {"type": "image"}}, r"'media\.type' names a picture"),
        ({"pixel_values": [[0.5]]}, "'pixel_values' names a picture"),
        ({"image": 5}, "must be given by its path, as bytes or as base64, got int"),
        ({"image": [None]}, "got NoneType"),
        ({"image": float("nan")}, "got float 'nan'"),
        ({"image": "../a.png"}, "leaves the image folder"),
        ({"image": "data:image/png,abc"}, "is no base64 picture"),
        ({"image": "x" * 5000}, r"'xxx.* \(5000 characters\) is neither a path nor base64"),
        ({"video_id": 7}, "'video_id' names a video .*but none could be read"),
        ({"video": "https://example.org/a.mp4"}, "video 'https://.* nothing is downloaded"),
        ({"video": 5}, "a video must be given by its path"),
        ({"video": "a.mp4", "video_file": "b.mp4"}, "'video' and 'video_file' name different videos"),
        ({"video": "a.mp4", "video_start": 2.5}, "'video_start' .*a part of the video is meant"),
        ({"video": "a.mp4", "start": 0.0, "end": 7.5}, "'end' .*a part of the video is meant"),
        ({"video": "a.mp4", "start_time": "00:01:30"}, "'start_time' .*a part of the video is meant"),
        ({"video": {"path": "a.mp4", "start": 3}}, "'start' .*a part of the video is meant"),
        ({"question": "<video>\nWhat?"}, "its text speaks of a video, but the entry names no video"),
        ({"question": '<video src="a.mp4" controls>\nWhat?'}, "a page's video, which is not read"),
        (
            {"question": "<image_1> and <image_2>?", "image": "img/a.png"},
            "speaks of 2 images, but the entry names 1 image",
        ),
    ],
)
def test_a_picture_or_video_that_is_not_read_is_an_error(sample, others, message):
    with pytest.raises(SampleError, match=message):
        [image.load() for image in sample(TURN | others).images]


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"image": None},
        {"image": "", "images": [], "image_path": {}},
        {"image": False, "has_image": False, "num_images": 0, "image_count": "0"},
        {"image": {"bytes": None, "path": None}, "video": None},
        {
            "source": "https://wafa.ps",
            "note": "Save the file as photo.jpg",
            "x": "data:text/plain;base64,aGVsbG8gd29ybGQ=",
        },
        {"no_image": True, "requires_image": "no", "is_image": 0, "image_width": 0, "image_tokens": 0},
        {"rejected": "use <img>", "chosen": "a.png"},
        {"source": "ShareGPT", "category": "imagination", "url": "https://example.org/page"},
        {"answer": "Write <img>a.png</img> or ![a](b.png) into picture.png."},
        {"question": "What does `<img>a.png</img>` do?\n```html\n<video>\n![x](y.png)\n```"},
    ],
)
def test_text_alone_stays_text_where_the_data_say_so(sample, others):
    read = sample(TURN | others)
    assert read.images == ()
    assert read.turns[0].question == others.get("question", TURN["question"])


@pytest.mark.parametrize(
    "marker",
    [
        "<image>", "<IMAGE>", "<image><image>", "<ImageHere>", "<Img><ImageHere></Img>", "<image1>", "<image 1>", "<image_1>",
        "<|image_1|>", "<|image|>", "<image_placeholder>", "<start_of_image>", "<|vision_start|><|image_pad|><|vision_end|>",
        "<|begin_of_image|><|image|><|end_of_image|>", "<im_start><image><im_end>", "<image_start><image><image_end>",
        "<|image_start|><|image|><|image_end|>", "<fake_token_around_image><image><fake_token_around_image>",
        "[IMG][IMG_BREAK][IMG_END]", "<image #1>", "(<image>./</image>)", "<|media_pad|>",
        "[IMG]", "<img>", "<image/>", "<picture>", "<image_soft_token>",
    ],
)  # fmt: skip
def test_every_familys_marker_stands_for_the_picture_and_is_taken_out(sample, marker):
    for question in (f"{marker}\nWhat?", f"What?\n{marker}"):
        read = sample({"question": question, "answer": "A circle.", "image": "img/a.png"})
        assert (read.turns[0].question, len(read.images)) == ("What?", 1)
        with pytest.raises(SampleError, match="the entry names no image"):
            sample({"question": question, "answer": "A circle."})
    later = {"messages": [*chat("Hi"), *chat(f"{marker} What?")], "image": "img/a.png"}
    if marker == "<image><image>":
        with pytest.raises(SampleError, match="its text speaks of 2 images, but the entry names 1 image"):
            sample(later)
        return
    read = sample(later)
    assert [(turn.question, turn.places) for turn in read.turns] == [("Hi", ()), ("What?", (0,))]


def chat(question):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "A circle."}]


@pytest.mark.parametrize(
    "question",
    [
        "Why does x[img] fail?",
        "Is a<image_count right, or b>image?",
        "What does <img> lack in this page?",
        "What is wrong with <img src='a.png'> and <imgs>?",
        "Is `<image1>` or `[IMG]` a marker?",
        "What is left of the <images> tag, and of <picture >?",
        "Is it List<Image> here, and where is <Image />?",
        "$a<img_1>b$ and a[image] and <photo>1</photo>",
    ],
)
def test_texts_about_code_keep_what_looks_like_a_marker(sample, question):
    read = sample({"question": f"<image>\n{question}", "answer": "A circle.", "image": "img/a.png"})
    assert (read.turns[0].question, len(read.images)) == (question, 1)


@pytest.mark.parametrize(
    "question",
    [
        "<img>img/a.png</img>\nWhat?",
        "Picture 1: <img>img/a.png</img>\nWhat?",
        "<image>img/a.png</image>\nWhat?",
        "![](img/a.png)\nWhat?",
        "![a [small] circle](<img/a.png>)\nWhat?",
        "![](img/a.png =100x20)\nWhat?",
        "![](img/my (small) a.png 'A circle')\nWhat?",
        '<img class="x" src="img/a.png"/>\nWhat?',
        "[img]img/a.png[/img]\nWhat?",
        '![a circle](img/a.png "title") What?',
        f"![](data:image/png;base64,{BASE64}) What?",
    ],
)
def test_a_picture_that_the_question_names_is_read(sample, question):
    same = "img/my (small) a.png" if "small) a" in question else "img/a.png"
    for entry in (TURN | {"question": question}, TURN | {"question": question, "image": same}):
        if "base64" in question and "image" in entry:
            with pytest.raises(SampleError, match="its text names an image and the entry 1 more"):
                sample(entry)
            continue
        read = sample(entry)
        assert [image.load().size for image in read.images] == [(5, 7)]
        assert read.turns[0].question == "What?"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "img/a.png"},
        {"type": "image", "path": "img/a.png"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{BASE64}"}},
        {"type": "image_url", "image_url": "img/a.png"},
        {"type": "input_image", "image_url": f"data:image/png;base64,{BASE64}"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": BASE64}},
        {"type": "image", "base64": BASE64},
        {"type": "Image", "image": ["img/a.png"]},
        {"image": "img/a.png"},
    ],
)
def test_parts_of_every_interface_are_read(sample, part):
    content = [part, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A circle."}]
    read = sample({"messages": messages})
    assert [image.load().size for image in read.images] == [(5, 7)]
    assert read.turns[0].question == "What?"


def test_of_a_part_neither_text_nor_picture_is_lost(sample):
    both = {"type": "image", "image": "img/a.png", "text": "What?"}
    read = sample({"messages": [{"role": "user", "content": [both]}, {"role": "assistant", "content": ["A circle."]}]})
    assert (read.turns[0].question, len(read.images)) == ("What?", 1)
    part = {"type": "image", "image": ["img/a.png", "img/b.png"]}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]
    assert len(sample({"messages": messages, "image": "img/a.png"}).images) == 2
    part = {"type": "text", "text": "q", "image": "img/b.png"}
    messages = [{"role": "user", "content": [part]}, {"role": "assistant", "content": "A."}]
    with pytest.raises(SampleError, match="its text names an image and the entry 1 more, for which there is no marker"):
        sample({"messages": messages, "image": "img/a.png"})


@pytest.mark.parametrize(
    "text",
    [
        "![" * 20_000,
        "[" * 40_000,
        "<img src=" * 10_000,
        "![a" + "[b" * 20_000,
        "<img>" + "a" * 40_000,
        " " * 20_000 + "!",
    ],
)
def test_no_text_takes_long_to_look_through(sample, text):
    """Of 40 KB; where a rule goes back over a text from each of its signs, seconds."""
    for entry in ({"question": text, "answer": "x"}, TURN | {"x": text}):
        started = time.process_time()
        with suppress(SampleError):
            sample(entry)
        assert time.process_time() - started < 1


def test_a_picture_beside_a_messages_text_is_read(sample):
    messages = [{"role": "user", "content": "What?", "images": ["img/a.png"]}, {"role": "assistant", "content": "A."}]
    assert sample({"messages": messages}).images[0].load().size == (5, 7)
    with pytest.raises(SampleError, match="message 2 holds an image; it must be in a question"):
        sample({"messages": [messages[0], messages[1] | {"image": "img/b.png"}], "image": None})


B64 = base64.b64encode(encoded(size=(6, 6))).decode()


@pytest.mark.parametrize(
    "first", [{"image": "img/a.png"}, {"images": ["img/a.png"]}, {"image": BASE64}, {"img": "img/a.png"}]
)
@pytest.mark.parametrize(
    "key",
    [
        "reference_image", "depth_image", "edited_image", "image_after", "targetImage", "mask", "depth_map_image", "sketch",
        "second_photo", "screenshot", "style_image_path", "image_mask", "frame", "original_image",
    ],
)  # fmt: skip
def test_another_picture_beside_the_first_is_not_lost(sample, first, key):
    for value in ("img/b.png", ["img/b.png"], B64, {"bytes": B64, "path": None}, f"data:image/png;base64,{B64}"):
        with pytest.raises(SampleError, match=rf"'{key}' holds another picture .* beside .*list under 'images'"):
            sample(TURN | first | {key: value})
    for value in (None, "", [], "none", 3, "https://example.org/b.png", next(iter(first.values()))):
        assert [image.load().size for image in sample(TURN | first | {key: value}).images] == [(5, 7)]


def test_stored_pictures_are_other_ones_under_any_key_and_files_where_the_key_says_so(sample):
    for key in ("anything", "img"):
        with pytest.raises(SampleError, match="holds another picture"):
            sample(TURN | {"image": BASE64, key: B64})
        assert len(sample(TURN | {"image": BASE64, key: f"data:image/png;base64,{BASE64}"}).images) == 1
    with pytest.raises(SampleError, match="'img' holds another picture"):
        sample(TURN | {"image": "img/a.png", "img": "img/b.png"})


@pytest.mark.parametrize(
    "others",
    [
        {"source": "coco/17.png", "before": "img/b.png"},
        {"image_name": "b.png", "image_id": "17.png", "imgname": "b.png", "image_hash": "b.png", "image_key": "b.png"},
        {"image_path": "img/b.png", "image_file": "b.png", "file_name": "b.png", "image_url": "b.png"},
        {"thumbnail": B64, "image_thumb": B64, "preview_image": "img/b.png"},
        {"image_bytes": B64, "image_base64": B64},
        {"decoded_image": B64, "resized_image": B64},
        {"flickr_url": "https://example.org/b.png", "depth_image": "https://example.org/b.png"},
        {
            "full_image": "./img/a.png",
            "big_image": "a.png",
            "raw_image": "data/img/a.png",
            "windows_image": "img\\a.png",
        },
        {"image_correspondence_ratings": [3], "image_count": 1, "n_images": 1, "mask": [[0, 1]], "depth": 3},
    ],
)
def test_other_names_and_sizes_of_the_picture_are_no_further_ones(sample, others):
    assert [image.load().size for image in sample(TURN | {"image": "img/a.png"} | others).images] == [(5, 7)]


def test_a_caption_describes_a_picture_and_a_question_may_stand_alone(tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    entries = [
        {"caption": "x", "image": "a.png"},
        {"caption": "lost"},
        {"caption": "lost", "image": None},
        {"caption": "x", "question": "What?", "answer": "A circle."},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, entries)))
    dataset = MessagesDataset(path)
    assert [len(dataset[index].images) for index in (0, 3)] == [1, 0]
    for index in (1, 2):
        with pytest.raises(SampleError, match="would be the caption of a picture, and it has none"):
            dataset[index]
    path.write_text("\n".join(map(json.dumps, entries[1:3])))  # nor is it text where no sample has a picture
    for index in (0, 1):
        with pytest.raises(SampleError, match="would be the caption"):
            MessagesDataset(path)[index]


def test_what_pillow_opens_is_a_picture_by_its_first_bytes():
    for fmt in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "ICO", "JPEG2000"):
        assert is_picture(encoded(fmt, (16, 16))), fmt
    for data in (
        b"",
        b"P",
        b"P2P is a text",
        b"BMW is a brand of cars",
        b"#define X 3",
        b"P2 is a place",
        b"{}",
        b"plain text",
        b"\n\x05",
        bytes(16),
    ):
        assert not is_picture(data), data


def test_base64_is_a_picture_only_if_it_holds_one():
    assert base64_picture(BASE64) == base64_picture(f"data:image/png;base64,{BASE64}") == PNG
    for text in ("a" * 400, base64.b64encode(b"plain text " * 20).decode(), "data:text/plain,hello", "", "data:"):
        assert base64_picture(text) is None, text


def test_names_of_pictures():
    assert {"png", "jpg", "jfif", "jpe", "ppm", "tif", "webp", "heic", "tga"} <= picture_extensions()
    assert not {"pdf", "mpg", "mp4", "txt", "json"} & picture_extensions()
    for name in ("a.png", "a/b.c.JPEG", "https://example.org/a.webp?size=3", "C:\\a b\\c.gif"):
        assert names_picture(name), name
    for name in ("png", "a.txt", "", "a.png is a file", "one\ntwo.png", "x" * 5000 + ".png"):
        assert not names_picture(name), name


LETTERS = [
    "data:",
    "image/png",
    "video/mp4",
    "audio/wav",
    ";base64",
    ",",
    "QUJD",
    ".png",
    ".mp4",
    ".wav",
    "a",
    " ",
    "://",
    "/",
]


@given(st.lists(st.sampled_from(LETTERS), max_size=6).map("".join))
@example("image/png;base64,QUJD")
@example(" data:video/mp4,x")
@example(base64.b64encode(encoded()).decode())
def test_a_text_that_may_not_name_a_file_names_none(text):
    named = names_picture(text) or names_video(text) or names_sound(text)
    assert may_name_file(text) or not named
