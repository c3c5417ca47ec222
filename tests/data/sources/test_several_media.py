"""Several pictures and videos: each stands where its data say, in every form, or is that sample's error with both counts."""

import base64
import io
import json
import tarfile
from pathlib import Path

import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.video import FrameFolder, VideoBytes, VideoFile, VideoSlice
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import VideoSource
from vlm_distill_cache.data.sources.csv_rows import CsvDataset
from vlm_distill_cache.data.sources.folders import DataFiles
from vlm_distill_cache.data.sources.hub_data import _wanted
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.messages import MessagesDataset
from vlm_distill_cache.data.sources.webdataset import WebDataset


def png(size):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


PNGS = [png((4, 4 + number)) for number in range(3)]
B64 = [base64.b64encode(data).decode() for data in PNGS]


def written(sample):
    """The questions with what they show in brackets: the slow reference of places."""
    names = iter(sample.images)
    in_front = not any(turn.places for turn in sample.turns)
    found = []
    for number, turn in enumerate(sample.turns):
        places = (0,) * len(sample.images) if in_front and not number else turn.places
        text = ""
        for place, sign in enumerate([*turn.question, ""]):
            text += "".join(f"[{shown(next(names))}]" for _ in range(places.count(place))) + sign
        found.append(text)
    assert next(names, None) is None
    return found


def shown(medium):
    return f"v:{medium.name.split(' from ')[0]}" if isinstance(medium, VideoSource) else medium.name


def user(*content):
    return {
        "role": "user",
        "content": content[0] if isinstance(content[0], str) and len(content) == 1 else list(content),
    }


def model(text="A."):
    return {"role": "assistant", "content": text}


def talk(*questions, roles=("from", "value", "human", "gpt")):
    role, said, asks, answers = roles
    return [each for q in questions for each in ({role: asks, said: q}, {role: answers, said: "A."})]


def image(name=None, key="image"):
    return {"type": "image"} | ({key: name} if name else {})


TEXT = {"type": "text", "text": "Same?"}
AB, ABC = ["a.png", "b.png"], ["a.png", "b.png", "c.png"]

# As they are published, or as the tools' own documentation shows them.
FORMS = {
    "llava-next-interleave": (
        {"id": "1", "image": AB, "conversations": talk("Left: <image>\nRight: <image>\nSame?", "Why?"), "metadata": {}},
        ["Left: [a.png]\nRight: [b.png]\nSame?", "Why?"],
    ),
    "llava, in front": ({"image": AB, "conversations": talk("<image>\n<image>\nSame?")}, ["[a.png][b.png]Same?"]),
    "llava, a later turn": (
        {"image": ABC, "conversations": talk("<image><image>Same?", "And <image>?")},
        ["[a.png][b.png]Same?", "And [c.png]?"],
    ),
    "no marker": ({"image": AB, "conversations": talk("Same?", "Why?")}, ["[a.png][b.png]Same?", "Why?"]),
    "llava-video-178k": (
        {"id": "x", "video": "c/1.mp4", "data_source": "y", "conversations": talk("<image>\nWhat?")},
        ["[v:c/1.mp4]What?"],
    ),
    "sharegpt4video": (
        {"id": "x", "video": "1.mp4", "conversations": talk("What happens?\n<video>", "Then?")},
        ["[v:1.mp4]What happens?", "Then?"],
    ),
    "sharegpt4video, captions": (
        {
            "video_id": "x",
            "video_path": "panda/1.mp4",
            "timestamp": ["00:00", "00:02"],
            "keyframe": [0, 48],
            "captions": [{"idx": "1", "content": "A dog."}, {"idx": "-1", "content": "A dog runs."}],
            "zip_folder": "panda_videos_1.zip",
        },
        ["[v:panda/1.mp4]"],
    ),
    "ms-swift": (
        {"messages": talk("<image><image>Same?", roles=("role", "content", "user", "assistant")), "images": AB},
        ["[a.png][b.png]Same?"],
    ),
    "ms-swift, both kinds": (
        {
            "messages": [{"role": "system", "content": "Hi."}, user("<image>in <video>? <image>"), model()],
            "images": AB,
            "videos": ["1.mp4"],
        },
        ["[a.png]in [v:1.mp4]? [b.png]"],
    ),
    "ms-swift, a marker for all": (
        {"messages": [user("<image>Same?"), model(), user("Why?"), model()], "images": AB},
        ["[a.png][b.png]Same?", "Why?"],
    ),
    "ms-swift, query": (
        {"query": "<image>Why?", "response": "A.", "history": [["<image>Same?", "No."]], "images": AB},
        ["[a.png]Same?", "[b.png]Why?"],
    ),
    "ms-swift, parts": (
        {"messages": [user({"type": "video", "video": "1.mp4"}, {"type": "text", "text": "What?"}), model()]},
        ["[v:1.mp4]What?"],
    ),
    "trl": ({"messages": [user(image(), image(), TEXT), model()], "images": AB}, ["[a.png][b.png]Same?"]),
    "trl, in between": (
        {"prompt": [user({"type": "text", "text": "Is"}, image(), TEXT, image())], "completion": [model()], "images": AB},
        ["Is[a.png]Same?[b.png]"],
    ),
    "openai": (
        {
            "messages": [
                user(image("a.png", "image_url") | {"type": "image_url"}, TEXT),
                model(),
                user({"type": "text", "text": "And?"}, {"type": "image_url", "image_url": {"url": "b.png"}}),
                model(),
            ]
        },
        ["[a.png]Same?", "And?[b.png]"],
    ),
    "qwen, frames": (
        {"messages": [user({"type": "video", "video": AB, "fps": 2}, TEXT), model()]},
        ["[v:of frames]Same?"],
    ),
    "a picture beside a message's text": (
        {"messages": [user("Hi"), model(), {**user("So <image>?"), "images": ["a.png"]}, model()]},
        ["Hi", "So [a.png]?"],
    ),
    "the_cauldron": (
        {"images": AB, "texts": [{"user": "Same?", "assistant": "A."}, {"user": "Why?", "assistant": "B."}]},
        ["[a.png][b.png]Same?", "Why?"],
    ),
    "llama-factory": (
        {"instruction": "<video>What?", "input": "", "output": "A.", "videos": ["1.mp4"]},
        ["[v:1.mp4]What?"],
    ),
    "m3it": ({"instruction": "Look.", "inputs": "Same?", "outputs": "A.", "images": AB}, ["[a.png][b.png]Look.\nSame?"]),
    "internvl": (
        {"id": 0, "image": AB, "conversations": talk("Image-1: <image>\nImage-2: <image>\nSame?")},
        ["Image-1: [a.png]\nImage-2: [b.png]\nSame?"],
    ),
    "mantis": (
        {
            "id": "x",
            "images": [{"bytes": None, "path": name} for name in AB],
            "conversation": talk("(image 1: <Image><image></Image>) (image 2: <Image><image></Image>) Same?",
                                 roles=("role", "content", "user", "assistant")),
        },
        ["(image 1: [a.png]) (image 2: [b.png]) Same?"],
    ),
    "mmdu": (
        {"id": "1", "image": ABC, "conversations": talk("<ImageHere><ImageHere>Same?", "<ImageHere>And it?")},
        ["[a.png][b.png]Same?", "[c.png]And it?"],
    ),
    "phi": (
        {"image": AB, "question": "Is <|image_2|> or <|image_1|> it? See <|image_2|>.", "answer": "A."},
        ["Is [b.png] or [a.png] it? See [b.png]."],
    ),
    "mmmu": (
        {"question": "<image 1> Which?", "options": "['<image 2>', '<image 3>']", "answer": "A"}
        | {f"image_{number}": name for number, name in enumerate([*ABC, None], start=1)},
        [
            "[a.png]Which?\nA. [b.png]\nB. [c.png]\n"
            "Answer with the option's letter from the given choices directly."
        ],
    ),
    "mmmu, a number is left out": (
        {"question": "<image 1> and <image 3>?", "answer": "A.", "image_1": "a.png", "image_2": None, "image_3": "b.png"},
        ["[a.png]and [b.png]?"],
    ),
    "numbers from 0": ({"images": AB, "question": "<image0> or <image1>?", "answer": "A."}, ["[a.png]or [b.png]?"]),
    "qwen-vl": (
        {"conversations": talk("Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nSame?", "And ![](c.png)?")},
        ["Picture 1: [a.png]\nPicture 2: [b.png]\nSame?", "And [c.png]?"],
    ),
    "qwen2-vl": (
        {"images": AB, "conversations": talk("<|vision_start|><|image_pad|><|vision_end|>vs <image>?")},
        ["[a.png]vs [b.png]?"],
    ),
    "minicpm-v": (
        {
            "image": {"<image_00>": "a.png", "<image_01>": "b.png"},
            "conversations": talk("<image_01>or <image_00>?", roles=("role", "content", "user", "assistant")),
        },
        ["[b.png]or [a.png]?"],
    ),
    "pixtral": ({"images": AB, "conversations": talk("[IMG][IMG]Same?")}, ["[a.png][b.png]Same?"]),
    "ms-swift, preferences": (
        {"messages": talk("<image>, <image>?", roles=("role", "content", "user", "assistant")), "images": AB}
        | {"rejected_response": "B.", "rejected_images": ["c.png"]},
        ["[a.png], [b.png]?"],
    ),
    "idefics": (
        {"images": AB, "conversations": talk(
            "<fake_token_around_image><image><fake_token_around_image><image><fake_token_around_image>Same?")},
        ["[a.png][b.png]Same?"],
    ),
    "named in both places": (
        {"messages": [user(image("a.png"), image("b.png"), TEXT), model()], "images": AB},
        ["[a.png][b.png]Same?"],
    ),
    "named in both places, as a struct": (
        {"messages": [user("Is", image("a.png"), "?"), model()], "images": [{"bytes": None, "path": "a.png"}]},
        ["[a.png]Is\n?"],
    ),
    "parts with an index": (
        {"messages": [user({"type": "image", "index": 1}, TEXT, {"type": "image", "index": 0}), model()], "images": AB},
        ["[b.png]Same?[a.png]"],
    ),
    "one of them is named again": (
        {"messages": [user(image("a.png"), image("b.png"), TEXT), model()], "image": "a.png"},
        ["[a.png][b.png]Same?"],
    ),
    "twice": ({"image": ["a.png", "a.png"], "question": "Is <image> <image>?", "answer": "A."}, ["Is [a.png] [a.png]?"]),
    "a caption": ({"image": AB, "caption": "Two."}, ["[a.png][b.png]"]),
    "several videos": (
        {"videos": ["1.mp4", "2.webm"], "question": "<video> or <video>?", "answer": "A."},
        ["[v:1.mp4]or [v:2.webm]?"],
    ),
    "a moving picture": ({"video": "1.gif", "question": "What?", "answer": "A."}, ["[v:1.gif]What?"]),
    "frames": ({"frames": AB, "question": "What?", "answer": "A."}, ["[v:of frames]What?"]),
    "videos of frames": (
        {"videos": [AB, ABC], "question": "<video> or <video>?", "answer": "A."},
        ["[v:of frames]or [v:of frames]?"],
    ),
    "a video under any key": ({"source": "c/1.webm", "question": "What?", "answer": "A."}, ["[v:c/1.webm]What?"]),
    "one picture in a later turn": ({"image": "a.png", "conversations": talk("Hi", "So <image>?")}, ["Hi", "So [a.png]?"]),
    "one picture, shown twice by its number": (
        {"image": "a.png", "conversations": talk("Is <image1>?", "Is <image1>?")},
        ["Is [a.png]?", "Is [a.png]?"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_what_a_published_form_shows_stands_where_it_says(tmp_path, read, name):
    entry, questions = FORMS[name]
    sample = read(entry)
    assert written(sample) == questions
    assert [turn.question for turn in sample.turns] == [  # and nothing is left of the markers
        "".join(part.partition("]")[2] if number else part for number, part in enumerate(question.split("[")))
        for question in questions
    ]
    sample.placed()
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    again = LlavaDataset(tmp_path / "list.json")
    assert (again[0].turns, again[0].images) == (sample.turns, sample.images)
    assert len(again.fingerprint()) == 32


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": ABC, "conversations": talk("<image><image>")}, "speaks of 2 images, but the entry names 3 images"),
        ({"image": AB, "conversations": talk("<image>Same?")}, "speaks of an image, but the entry names 2 images"),
        ({"image": AB, "conversations": talk("<image><image><image>")}, "of 3 images, but the entry names 2 images"),
        ({"image": "a.png", "conversations": talk("<image>", "<image>")}, "of 2 images, but the entry names 1 image"),
        ({"images": AB, "messages": [user("Is <image>?"), model()]}, "an image, but the entry names 2 images"),
        ({"images": AB, "messages": [user("Hi"), model(), user("<image>?"), model()]}, "an image, but .* 2 images"),
        (
            {"videos": ["1.mp4", "2.mp4"], "query": "<video>is <video><video>", "response": "A."},
            "3 videos, .* 2 videos",
        ),
        ({"image": "a.png", "question": "<video>?", "answer": "A."}, "speaks of a video, but the entry names no video"),
        (
            {"video": "1.mp4", "image": "a.png", "question": "<image><image>?", "answer": "A."},
            "of 2 images, .* 1 image",
        ),
        (
            {"image": AB, "question": "<image1> or <image3>?", "answer": "A."},
            "images 1, 3, but .* 2 images, counted from",
        ),
        ({"image": AB, "question": "<image1> or <image>?", "answer": "A."}, "some of its markers have a number"),
        ({"image": AB, "question": "<image1>?", "answer": "A."}, "an image, but the entry names 2 images"),
        (
            {"image": AB, "conversations": [*talk("Same?")[:1], {"from": "gpt", "value": "<image>"}]},
            "answer of turn 1 has",
        ),
        ({"messages": [user("Hi"), {"role": "assistant", "content": [image("a.png")]}]}, "message 2 holds an image"),
        ({"messages": [user("Hi"), model() | {"video": "1.mp4"}]}, "message 2 holds a video; it must be in a question"),
        ({"messages": [user({"type": "audio", "audio": "a.wav"}), model()]}, "part of type 'audio'; expected 'text'"),
        ({"messages": [{**user("<image><image>"), "images": ABC}, model()]}, "2 markers of images and 3 images beside"),
        ({"messages": [user(image("a.png"), TEXT), model()], "images": AB}, "names an image and the entry 1 more"),
        ({"messages": [user(image("a.png"), TEXT), model()], "image": B64[0]}, "names an image and the entry 1 more"),
        ({"messages": [user(image(), image(), TEXT), model()], "image": "a.png"}, "of 2 images, but .* 1 image"),
        ({"images": AB, "audio": "a.wav", "question": "Same?", "answer": "A."}, "'audio' names a sound"),
        ({"tools": ["x"], "images": AB, "question": "Same?", "answer": "A."}, "'tools' is not read"),
        ({"video": ["1.mp4", "https://example.org/2.mp4"], "question": "?", "answer": "A."}, "nothing is downloaded"),
        ({"video": "../1.mp4", "question": "?", "answer": "A."}, "video path '../1.mp4' leaves"),
        ({"video_id": "v_x", "question": "?", "answer": "A."}, "'video_id' names a video .*none could be read"),
    ],
)
def test_markers_and_media_that_do_not_agree_and_what_is_not_read_are_named(read, entry, message):
    with pytest.raises(SampleError, match=message):
        read(entry)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.lists(st.sampled_from(["a ", "b\n", " ", "é", None]), max_size=6).filter(
            lambda pieces: "".join(filter(None, pieces)).strip()
        ),
        min_size=1,
        max_size=3,
    ).filter(lambda questions: sum(pieces.count(None) for pieces in questions) > 1)
)
def test_markers_and_parts_say_the_same_and_places_are_those_of_the_markers(read, questions):
    """Cut out by hand, each marker stands behind the text in front of it."""
    count = sum(pieces.count(None) for pieces in questions)
    names = [f"{number}.png" for number in range(count)]
    left = iter(names)
    expected = []
    for pieces in questions:
        text = "".join(f"[{next(left)}]" if piece is None else piece for piece in pieces)
        expected.append(without_outer_blanks(text))
    marked = ["".join("<image>" if piece is None else piece for piece in pieces) for pieces in questions]
    assert written(read({"image": names, "conversations": talk(*marked)})) == expected
    left = iter(names)
    parts = [
        [image(next(left)) if piece is None else {"type": "text", "text": piece} for piece in joined(pieces)]
        for pieces in questions
    ]
    messages = [each for content in parts for each in (user(*content), model())]
    assert written(read({"messages": messages})) == expected


def joined(pieces):
    """Pieces with texts beside each other as one, as parts of a message are separated by what they show."""
    found = []
    for piece in pieces:
        if piece is not None and found and found[-1] is not None:
            found[-1] += piece
        else:
            found.append(piece)
    return found


def without_outer_blanks(text):
    """Without blanks in front of the first word, between pictures too, and behind the last word."""
    lead = ""
    while text.lstrip().startswith("["):
        name, _, text = text.lstrip().partition("]")
        lead += f"{name}]"
    text = lead + text.lstrip()
    return text if text.endswith("]") else text.rstrip()


@pytest.mark.parametrize("marker", ["", "<image>\n", "<image>\n<image>\n"])
def test_a_sample_of_one_picture_or_text_is_as_it_was(read, marker):
    """The picture in front and no places, so that fingerprints and caches of such data stay."""
    sample = read({"image": "a.png", "question": f"{marker}What ?", "answer": "A."})
    assert [(turn.question, turn.places) for turn in sample.turns] == [("What ?", ())]
    assert [picture.name for picture in sample.images] == ["a.png"]


def test_frames_keep_their_order_rate_and_folder(tmp_path, read):
    (tmp_path / "clip").mkdir()
    video = read({"messages": [user({"type": "video", "video": ABC, "fps": 2.0}, TEXT), model()]}).images[0]
    assert isinstance(video, FrameFolder)
    assert ([frame.name for frame in video.paths], video.fps, video.times) == (ABC, 2.0, None)
    timed = read({"frames": ABC, "timestamps": [0, 1.5, 2], "question": "?", "answer": "A."}).images[0]
    assert (timed.fps, timed.times) == (None, (0, 1.5, 2))
    with pytest.raises(SampleError, match=r"'frames' holds another picture .* beside 'image'"):
        read({"image": "a.png", "frames": ABC, "question": "?", "answer": "A."})
    for name in ("clip", "clip/"):
        folder = read({"video": name, "question": "?", "answer": "A."}).images[0]
        assert isinstance(folder, FrameFolder)
        assert folder.paths == tmp_path / "clip"
    assert isinstance(read({"video": "gone", "question": "?", "answer": "A."}).images[0], VideoFile)
    stored = f"data:video/mp4;base64,{base64.b64encode(b'film').decode()}"
    assert read({"video": stored, "question": "?", "answer": "A."}).images[0].data == b"film"


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return WebDataset(str(path))


def test_members_of_a_tar_are_shown_by_number_or_name(tmp_path):
    def entry(question, **more):
        return json.dumps({"question": question, "answer": "A."} | more).encode()

    pictures = [(f"k.{number}.png", PNGS[0]) for number in (10, 2, 0)]
    dataset = tar_of(
        tmp_path / "a.tar",
        [
            *pictures,
            ("k.json", entry("Is <image> <image> or <image>?")),
            *[(name.replace("k", "l"), data) for name, data in pictures],
            ("l.json", entry("Same?", images=["2.png", "10.png", "l.0.png"])),
            ("m.png", PNGS[0]),
            ("m.mp4", b"film"),
            ("m.json", entry("Is <image> in <video>?")),
            ("n.mp4", b"film"),
            ("n.txt", b"A film."),
            ("o.png", PNGS[0]),
            ("o.mask.png", PNGS[0]),
            ("o.json", entry("What?")),
            *[(name.replace("k", "p"), data) for name, data in pictures],
            ("p.json", entry("<image>, <image>?")),
        ],
    )
    places = dict(zip(dataset.sample_ids, range(6), strict=True))
    sizes = {key: written(dataset[places[key]]) for key in "klmn"}
    assert sizes == {
        "k": ["Is [a.tar:k.0.png] [a.tar:k.2.png] or [a.tar:k.10.png]?"],
        "l": ["[a.tar:l.2.png][a.tar:l.10.png][a.tar:l.0.png]Same?"],
        "m": ["Is [a.tar:m.png] in [v:a.tar:m.mp4]?"],
        "n": ["[v:a.tar:n.mp4]"],
    }
    video = dataset[places["n"]].images[0]
    assert isinstance(video, VideoSlice)
    with video.path.open("rb") as file:
        file.seek(video.offset)
        assert file.read(video.size) == b"film"
    with pytest.raises(SampleError, match=r"o\.mask\.png holds another picture beside"):
        dataset[places["o"]]
    with pytest.raises(SampleError, match="speaks of 2 images, but the entry names 3 images"):
        dataset[places["p"]]


def test_cells_columns_and_metadata_hold_several(tmp_path):
    (tmp_path / "a.csv").write_text(
        'images,videos,question,answer\n"[""a.png"", ""b.png""]",,<image> or <image>?,A.\n,1.mp4,<video>What?,A.\n'
    )
    cells = CsvDataset(tmp_path / "a.csv")
    assert [written(cells[index]) for index in range(2)] == [["[a.png]or [b.png]?"], ["[v:1.mp4]What?"]]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    stored = [{"bytes": data, "path": None} for data in PNGS]
    pq.write_table(
        pa.table({"images": [stored, PNGS[:0]], "question": ["<image>, <image>, <image>?", "Hi"], "answer": ["A.", "B."],
                  "video": [None, {"bytes": b"film", "path": "1.mp4"}]}),
        tmp_path / "a.parquet",
    )  # fmt: skip
    table = open_dataset(str(tmp_path / "a.parquet"))
    assert [picture.load().size for picture in table[0].images] == [(4, 4), (4, 5), (4, 6)]
    assert [turn.places for turn in table[0].turns] == [(0, 2, 4)]
    assert [type(video) for video in table[1].images] == [VideoBytes]


def test_names_of_several_tell_which_samples_show_the_same(tmp_path, read):
    entries = [
        {"image": AB},
        {"image": AB},
        {"image": AB[::-1]},
        {"image": "a.png"},
        {"video": "1.mp4"},
        {"image": None},
    ]
    lines = [json.dumps(entry | {"question": "Same?", "answer": "A."}) for entry in entries]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    keys = MessagesDataset(tmp_path / "d.jsonl").image_keys()
    assert (keys[0] == keys[1], len(set(keys)), keys[3:]) == (True, 5, ["a.png", "1.mp4", None])


def test_a_question_of_an_evaluation_shows_what_its_own_turn_does(tmp_path):
    lines = [
        {"image": ABC, "conversations": talk("<image>or <image>?", "And <image>?")},
        {"image": "a.png", "conversations": talk("Hi", "So <image>?")},
    ]
    (tmp_path / "e.json").write_text(json.dumps(lines))
    (item,) = open_evaluation(str(tmp_path / "e.json")).questions
    assert [medium.name for medium in (item.image, *item.further)] == AB
    assert (item.question, item.places) == ("or ?", (0, 3))


def test_pictures_and_videos_of_a_folder_with_metadata(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(PNGS[0])
    rows = [
        {"file_names": AB, "question": "<image>or <image>?", "answer": "A."},
        {"file_name": "1.mp4", "question": "What?", "answer": "A."},
    ]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pytest.importorskip("datasets")
    dataset = open_dataset(str(folder))
    assert [written(dataset[index]) for index in range(2)] == [["[a.png]or [b.png]?"], ["[v:1.mp4]What?"]]
    assert isinstance(dataset[1].images[0].path, Path)


def test_videos_that_texts_may_name_are_downloaded_with_them():
    files = DataFiles(kind="json", config="", split=None, paths=("a.json",), others=frozenset())
    assert _wanted(files, ["a.json", "v/1.mp4", "b.png", "x.bin"]) == ["a.json", "v/1.mp4", "b.png"]
