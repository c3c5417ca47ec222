"""LLaVA JSON: the published form is read as LLaVA reads it, and one odd entry is one odd sample."""

import gzip
import json
import pickle

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import Turn, iterate_readable
from vlm_distill_cache.data.sources.conversations import read_conversation
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.markers import Shown
from vlm_distill_cache.data.sources.messages import MessagesDataset


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


PAIR = [human("What is it?"), gpt("A circle.")]


def write(tmp_path, entries, name="data.json"):
    path = tmp_path / name
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


def test_reads_multi_turn_text_only_and_integer_ids(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    path = write(
        tmp_path,
        [
            {"id": "x", "image": "a.png", "conversations": [*PAIR, human("Its colour?"), gpt("Red.")]},
            {"id": 7, "conversations": [human("Hi"), gpt("Hello")]},
        ],
    )
    dataset = LlavaDataset(path)
    assert (dataset.name, len(dataset), list(dataset.sample_ids)) == ("data.json", 2, ["x", "7"])
    sample = dataset[0]
    assert sample.turns == (
        Turn(question="What is it?", answer="A circle."),
        Turn(question="Its colour?", answer="Red."),
    )
    assert sample.images[0].load().size == (4, 4)
    assert not sample.independent_turns
    assert dataset[1].images == ()


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "<image> What?<image>", "What?"])
def test_image_marker_anywhere_in_the_first_question_is_taken_out(question):
    said = read_conversation({"conversations": [human(question), gpt("A")]})
    assert said.turns == (Turn(question="What?", answer="A"),)
    assert said.expected == ("<image>" in question)


def test_image_marker_in_a_later_turn_is_taken_out_and_known():
    said = read_conversation({"conversations": [*PAIR, human("<image> and this?"), gpt("B")]})
    assert (said.turns[1].question, said.asked[1]) == ("and this?", (Shown(), " and this?"))


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([human("Hi")], "1 messages; expected pairs"),
        ([gpt("Hi"), human("Hi")], "message 1 is the assistant's, expected the user's"),
        ([human("Hi"), gpt(" ")], "message 2, an answer, is empty"),
        ([human("Hi"), human("Hi")], "message 2 is the user's, expected the assistant's"),
        ([*PAIR, {"from": "system", "value": "Be kind"}], "message 3 is a system prompt; it must be the first"),
        (
            [human("Hi"), {"from": "observation", "value": "3"}, gpt("A")],
            "from 'observation': conversations with tools",
        ),
        ([{"from": ["human"], "value": "Hi"}], "only 'user' and 'assistant'"),
        ([{"from": "human"}], "'message 1' must be a text or a number"),
        (["Hi"], r"must hold 'role' and 'content' \(or 'from' and 'value'\)"),
        ([], "must be a list of messages"),
        (None, "must be a list of messages"),
    ],
)
def test_odd_conversations_are_that_samples_error(tmp_path, conversations, message):
    entries = [{"id": "odd", "conversations": conversations}, {"id": "good", "conversations": PAIR}]
    dataset = LlavaDataset(write(tmp_path, entries))
    with pytest.raises(SampleError, match=f"sample 'odd': .*{message}"):
        dataset[0]
    assert [sample.sample_id for sample in iterate_readable(dataset)] == ["good"]
    assert len(dataset.fingerprint()) == 32


def test_repeated_ids_are_numbered(tmp_path):
    entries = [{"id": name, "conversations": PAIR} for name in ("a", "b", "a", "a", "b", "c")]
    path = write(tmp_path, entries)
    assert list(LlavaDataset(path).sample_ids) == ["a", "b", "a#2", "a#3", "b#2", "c"]


def test_string_and_integer_of_one_id_are_the_same_id(tmp_path):
    entries = [{"id": 5, "conversations": PAIR}, {"id": "5", "conversations": PAIR}]
    assert list(LlavaDataset(write(tmp_path, entries)).sample_ids) == ["5", "5#2"]


def test_a_numbered_repeat_never_meets_an_id_of_that_name(tmp_path):
    entries = [{"id": name, "conversations": PAIR} for name in ("a", "a#2", "a", "a", "a#2")]
    assert list(LlavaDataset(write(tmp_path, entries)).sample_ids) == ["a", "a#2", "a#3", "a#4", "a#2#2"]


def test_missing_ids_follow_the_content_not_the_place(tmp_path):
    first = {"conversations": [human("a"), gpt("b")]}
    second = {"id": None, "conversations": [human("c"), gpt("d")]}
    forward = LlavaDataset(write(tmp_path, [first, second, {"id": "x", "conversations": PAIR}])).sample_ids
    backward = LlavaDataset(write(tmp_path, [second, first])).sample_ids
    assert set(backward) < set(forward)
    assert all(name.startswith("auto-") for name in backward)
    twice = LlavaDataset(write(tmp_path, [first, first])).sample_ids
    assert twice[1] == f"{twice[0]}#2"


def test_an_entry_is_called_by_the_first_id_that_it_has(tmp_path):
    ids = [{"id": "a", "sample_id": "b"}, {"sample_id": "b", "question_id": 7}, {"id": None, "question_id": 7}]
    entries = [one | {"conversations": PAIR} for one in ids]
    assert list(LlavaDataset(write(tmp_path, entries)).sample_ids) == ["a", "b", "7"]
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert list(MessagesDataset(lines).sample_ids) == ["a", "b", "7"]


@pytest.mark.parametrize("bad", [1.5, True, ["a"], {"a": 1}, "x" * 4097, "\ud83d"])
def test_an_id_that_cannot_be_used_is_that_samples_error(tmp_path, bad):
    dataset = LlavaDataset(write(tmp_path, [{"id": bad, "conversations": PAIR}, {"id": "good", "conversations": PAIR}]))
    assert dataset.sample_ids[0].startswith("auto-")
    with pytest.raises(SampleError, match=r"its id .*; use"):
        dataset[0]
    assert [sample.sample_id for sample in iterate_readable(dataset)] == ["good"]


def test_an_id_that_is_too_long_once_it_is_numbered_is_replaced(tmp_path):
    twice = [{"id": "x" * 4096, "conversations": PAIR}] * 2  # the second becomes x...x#2
    dataset = LlavaDataset(write(tmp_path, twice))
    assert dataset[0].sample_id == "x" * 4096
    with pytest.raises(SampleError, match="4098 bytes, more than 4096"):
        dataset[1]


def test_images_are_found_from_the_given_folder(tmp_path):
    folder = tmp_path / "coco" / "train"
    folder.mkdir(parents=True)
    PIL.Image.new("RGB", (3, 5)).save(folder / "a.png")
    path = write(tmp_path, [{"id": "x", "image": "train/a.png", "conversations": PAIR}])
    assert LlavaDataset(path, images=tmp_path / "coco")[0].images[0].load().size == (3, 5)
    with pytest.raises(SampleError, match=r"paths start from the folder of the data, or from images"):
        LlavaDataset(path)[0].images[0].load()
    with pytest.raises(DataError, match=r"image folder .* does not exist"):
        LlavaDataset(path, images=tmp_path / "gone")


def test_absolute_image_paths_are_used_as_they_are(tmp_path):
    PIL.Image.new("RGB", (3, 5)).save(tmp_path / "a.png")
    entries = [
        {"id": "there", "image": str(tmp_path / "a.png"), "conversations": PAIR},
        {"id": "gone", "image": str(tmp_path / "b.png"), "conversations": PAIR},
    ]
    dataset = LlavaDataset(write(tmp_path, entries))
    assert dataset[0].images[0].load().size == (3, 5)
    with pytest.raises(SampleError, match="by this absolute path"):
        dataset[1].images[0].load()


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("../secret.png", "leaves the image folder"),
        ("a/../../secret.png", "leaves the image folder"),
        ("http://example.org/a.png", "nothing is downloaded"),
        ({"width": 3}, "must be given by its path"),
        ([3], "must be given by its path"),
    ],
)
def test_image_entries_that_cannot_be_used(tmp_path, image, message):
    dataset = LlavaDataset(write(tmp_path, [{"id": "x", "image": image, "conversations": PAIR}]))
    with pytest.raises(SampleError, match=f"sample 'x': .*{message}"):
        dataset[0]


def test_fingerprint_follows_ids_and_text_not_images(tmp_path):
    def fingerprint(**changes):
        entry = {"id": "x", "image": "a.png", "conversations": PAIR} | changes
        return LlavaDataset(write(tmp_path, [entry])).fingerprint()

    assert fingerprint() == fingerprint(image="b.png")
    assert len({fingerprint(), fingerprint(id="y"), fingerprint(conversations=[human("a"), gpt("b")])}) == 3
    assert fingerprint() != fingerprint(image=None)


def test_survives_pickling(tmp_path):
    dataset = LlavaDataset(write(tmp_path, [{"id": "x", "conversations": PAIR}]))
    assert pickle.loads(pickle.dumps(dataset))[0] == dataset[0]  # noqa: S301 - our own bytes


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON: .*it ends in the middle"),
        ('{"id": 1}', "expected a list of samples"),
        ("[]", "expected a list of samples"),
        ("[1]", "no entry has 'messages'.*the first has int '1'"),
        ('[{"messages": []}]', r"no entry has 'messages'.*the first has \['messages'\]"),
        ('{"id": 1}\n{"id": 2}', "one value is expected, and more follow"),
        ("", "the file is empty"),
        ('[{"a": 1},]', r"remove the comma in front of this '\]'"),
        ('[{"a": 1,}]', r"remove the comma in front of this '\}'"),
        ("[{'a': 1}]", "double quotes"),
        ('[{"a": "C:\\data"}]', "a backslash in a text is written twice"),
        ('[{"a": "one\ntwo"}]', r"written \\n"),
        ('[{"a": "one', "ends in the middle"),
        ('[{"a": True}]', "JSON writes true, false and null"),
        ('[ // all\n{"a": 1}]', "JSON has no comments"),
        ('{"info": [], "my data": [{"a": 1}]}', r"if 'my data' holds them.*jq '\.\[\"my data\"\]' OLD"),
        ('{\n"caption": "x"\n}', "one entry over several lines"),
        ("<!DOCTYPE html>", "a page of HTML"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ('[{"a": ' + "9" * 5000 + "}]", "a number of thousands of digits"),
        ('{"info": 3, "data": [{"a": 1}]}', r"if 'data' holds them.*jq '\.\[\"data\"\]' OLD"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_files_that_are_not_llava_are_refused(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        LlavaDataset(path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_byte_order_marks_and_wide_encodings_are_read(tmp_path, encoding):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "é", "conversations": PAIR}], ensure_ascii=False), encoding=encoding)
    assert LlavaDataset(path)[0].sample_id == "é"


def test_a_byte_that_is_no_utf8_is_shown_with_its_line_and_what_to_type(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes('[\n{"id": "caf\xe9"}]'.encode("latin-1"))
    with pytest.raises(DataError, match=r"not UTF-8: byte 0xe9 in line 2; .*iconv -f latin1"):
        LlavaDataset(path)


def test_a_compressed_file_is_told_what_it_is(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes(gzip.compress(b"[]"))
    with pytest.raises(DataError, match="is compressed: unpack it first"):
        LlavaDataset(path)


def test_an_entry_that_is_no_object_is_that_samples_error(tmp_path):
    dataset = LlavaDataset(write(tmp_path, [None, {"id": "good", "conversations": PAIR}, 3]))
    for index in (0, 2):
        with pytest.raises(SampleError, match=f"entry {index} must be an object"):
            dataset[index]
    assert [sample.sample_id for sample in iterate_readable(dataset)] == ["good"]


def test_an_image_marker_without_an_image_is_that_samples_error(tmp_path):
    entries = [{"id": "lost", "conversations": [human("<image>\nWhat is it?"), gpt("A circle.")]}]
    with pytest.raises(SampleError, match="names no image"):
        LlavaDataset(write(tmp_path, entries))[0]
