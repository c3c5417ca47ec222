"""Messages JSONL: strings, parts and placeholders give the same sample."""

import json
import pickle

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import Turn, iterate_readable
from vlm_distill_cache.data.sources.conversations import read_conversation
from vlm_distill_cache.data.sources.messages import MessagesDataset

EXPECTED = (Turn(question="What?", answer="A circle."),)


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def text(value):
    return {"type": "text", "text": value}


def write(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("content", "images"),
    [
        ("<image>What?", ["a.png"]),
        ([{"type": "image"}, text("What?")], ["a.png"]),
        ([text("What?"), {"type": "image", "image": "a.png"}], None),
        ([{"type": "image", "path": "a.png"}, text("What?")], []),
        ([{"type": "image", "url": "a.png"}, text("What?")], []),
    ],
)
def test_all_ways_to_write_an_image_give_one_sample(tmp_path, content, images):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    record = {"id": "x", "messages": [user(content), assistant([text("A circle.")])], "images": images}
    sample = MessagesDataset(write(tmp_path, record))[0]
    assert sample.turns == EXPECTED
    assert [image.load().size for image in sample.images] == [(4, 4)]


def test_text_only_and_lines_of_other_forms(tmp_path):
    path = write(
        tmp_path,
        {"messages": [user("Wörter?"), assistant("é")]},
        {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A circle."}]},
        {"question": "What?", "answer": "A circle."},
        {"caption": "A circle.", "image": "a.png"},
    )
    dataset = MessagesDataset(path)
    assert dataset[0].turns == (Turn(question="Wörter?", answer="é"),)
    assert dataset[0].images == ()
    assert dataset[1].turns == dataset[2].turns == EXPECTED
    assert dataset[3].turns == (Turn(question="", answer="A circle."),)
    assert len(dataset[3].images) == 1
    assert len(set(dataset.sample_ids)) == 4


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [user("a"), {"role": "system", "content": "Be kind"}, assistant("b")],
            "message 2 is a system prompt; it must",
        ),
        (["a"], "message 1 must hold 'role' and 'content'"),
        ([user(None), assistant("b")], "'message 1' must be a text or a number, got NoneType"),
        ([user([{"type": "audio"}]), assistant("b")], "a part of type 'audio'"),
        ([user([3]), assistant("b")], "a list of parts, got a list of other things"),
        ([user([{"type": None}]), assistant("b")], "a part of type NoneType"),
        (
            [user("a"), assistant("b"), user([{"type": "image"}]), assistant("c")],
            "its text speaks of an image, but the entry names no image",
        ),
        ([user("a")], "expected pairs"),
        ([], "must be a list"),
        ("text", "must be a list"),
    ],
)
def test_odd_messages_are_that_samples_error(tmp_path, messages, message):
    path = write(tmp_path, {"id": "odd", "messages": messages}, {"id": "good", "question": "q", "answer": "A circle."})
    dataset = MessagesDataset(path)
    with pytest.raises(SampleError, match=f"sample 'odd': .*{message}"):
        dataset[0]
    assert dataset[1].sample_id == "good"


def test_record_without_any_known_key_lists_what_it_has():
    with pytest.raises(SampleError, match=r"got \['id', 'words'\]"):
        read_conversation({"id": 1, "words": "a"})


def test_blank_lines_and_unicode_do_not_shift_the_offsets(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"id": i, "question": "q", "answer": "é" * i + "x"}, ensure_ascii=False) for i in range(5)]
    path.write_text("\n\n".join(lines) + "\n  \n", encoding="utf-8", newline="\r\n")
    dataset = pickle.loads(pickle.dumps(MessagesDataset(path)))  # noqa: S301 - our own bytes
    assert [dataset[i].turns[0].answer for i in (4, 0, 2)] == ["ééééx", "x", "ééx"]
    assert len(dataset) == 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"caption"', "line 1, is not JSON.*ends in the middle"),
        (b'{"caption": "\xff"}', "line 1, is not UTF-8"),
        (b"[1]", "line 1, must be an object, got list"),
        (b'{"text": "a"}', r"no line is an entry with .*; the first has \['text'\]"),
        (b"\n", "holds no sample"),
    ],
)
def test_files_that_are_not_jsonl_are_refused(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        MessagesDataset(path)


def test_a_line_that_is_no_object_is_that_samples_error(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(
        b'{"question": "q", "answer": "a"}\n{"answer": \n[1]\n{"a": "\xff"}\n{"question": "q", "answer": "b"}\n{"an'
    )
    dataset = MessagesDataset(path)
    assert [sample.turns[0].answer for sample in iterate_readable(dataset)] == ["a", "b"]
    for index, message in [
        (1, "line 2, is not JSON"),
        (2, "line 3, must be"),
        (3, "line 4, is not UTF-8"),
        (5, "line 6"),
    ]:
        with pytest.raises(SampleError, match=message):
            dataset[index]
    assert len(set(dataset.sample_ids)) == len(dataset) == 6


@pytest.mark.parametrize("nuls", [1, 2, 3, 4, 5, 4096])
@pytest.mark.parametrize("more", [b"", b'{"question": "q", "answer": "lost"}'])
def test_nul_bytes_as_a_crash_leaves_them_are_called_so(tmp_path, nuls, more):
    good = b'{"question": "q", "answer": "a"}'
    for lines in ([good, b"\0" * nuls + more, good], [good, good, more + b"\0" * nuls]):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"\n".join(lines))
        dataset = MessagesDataset(path)
        assert [sample.turns[0].answer for sample in iterate_readable(dataset)] == ["a", "a"]
        (index,) = (index for index in (1, 2) if b"\0" in lines[index])
        with pytest.raises(SampleError, match=f"line {index + 1}, is not JSON: .*NUL bytes stand there"):
            dataset[index]
    if nuls >= 4:
        path.write_bytes(b"\0" * nuls + b"\n" + good)
        with pytest.raises(SampleError, match=r"line 1, is not JSON: .*NUL bytes stand there"):
            MessagesDataset(path)[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_byte_order_marks_and_wide_encodings_are_read(tmp_path, encoding):
    path = tmp_path / "data.jsonl"
    path.write_text(
        '{"question": "q", "answer": "é"}\n\n{"question": "q", "answer": "ü"}\n', encoding=encoding, newline="\r\n"
    )
    dataset = pickle.loads(pickle.dumps(MessagesDataset(path)))  # noqa: S301 - our own bytes
    assert [dataset[index].turns[0].answer for index in (1, 0)] == ["ü", "é"]


def test_missing_file_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        MessagesDataset(tmp_path / "gone.jsonl")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [user("<image>What?"), assistant("A")]},
        {"messages": [user([text("What?"), {"type": "image"}]), assistant("A")]},
        {"messages": [user([text("<image>What?")]), assistant("A")], "images": []},
        {"conversations": [{"from": "human", "value": "What?<image>"}, {"from": "gpt", "value": "A"}]},
        {"question": "<image>What?", "answer": "A"},
    ],
)
def test_a_line_that_asks_about_an_image_it_has_not_is_refused(tmp_path, record):
    with pytest.raises(SampleError, match="names no image"):
        MessagesDataset(write(tmp_path, record))[0]
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    sample = MessagesDataset(write(tmp_path, record | {"images": ["a.png"]}))[0]
    assert sample.turns[0].question == "What?"


def test_a_file_that_was_changed_meanwhile_is_the_data_sets_error(tmp_path):
    path = write(tmp_path, *({"id": str(i), "messages": [user("What?"), assistant("A circle.")]} for i in range(3)))
    data = MessagesDataset(path)
    path.write_text('{"id": "x"}\n' * 40)
    with pytest.raises(DataError, match=r"data\.jsonl has changed: sample '1'"):
        data[1]
