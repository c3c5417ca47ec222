"""Every published form of an entry is read as the conversation that it means; nothing is lost in silence."""

import copy
import itertools
import json
import logging
import tarfile

import PIL.Image
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from published_forms import KIND, ONE, PUBLISHED, RATINGS, WORSE, A, B, Q, U, user

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import Turn, fingerprint_samples
from vlm_distill_cache.data.sources.conversations import are_columns, is_entry, read_conversation, unread_forms
from vlm_distill_cache.data.sources.hf import HuggingFaceDataset
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.messages import MessagesDataset
from vlm_distill_cache.data.sources.webdataset import WebDataset


def said(entry):
    found = read_conversation(entry)
    return found.system, tuple((turn.question, turn.answer) for turn in found.turns)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_form_is_the_conversation_that_it_means(tmp_path, name):
    (system, pairs), entry = PUBLISHED[name]
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    (tmp_path / "lines.jsonl").write_text(json.dumps(entry))
    kept = copy.deepcopy(entry)
    for dataset in (LlavaDataset(tmp_path / "list.json"), MessagesDataset(tmp_path / "lines.jsonl")):
        sample = dataset[0]
        assert sample.turns == tuple(Turn(question=question, answer=answer) for question, answer in pairs)
        assert sample.system == system
        assert [image.load().size for image in sample.images] == [(4, 4)]
        assert not sample.independent_turns
        assert dataset.image_keys() == ["a.png"] or isinstance(entry.get("images", [""])[0], dict)
    assert read_conversation(entry)
    assert entry == kept  # reading changes nothing
    assert are_columns(list(entry), pictures=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_row_of_a_table_and_the_json_of_a_tar_are_read_alike(tmp_path, name):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (system, pairs), entry = PUBLISHED[name]
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    datasets.Dataset.from_list([entry]).save_to_disk(str(tmp_path / "saved"))
    without = {key: value for key, value in entry.items() if key not in ("image", "images", "file_name")}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        (tmp_path / "k.json").write_text(json.dumps(without))
        tar.add(tmp_path / "k.json", "k.json")
        tar.add(tmp_path / "a.png", "k.png")
    table = HuggingFaceDataset(tmp_path / "saved", images=tmp_path)
    for dataset in (table, WebDataset(str(tmp_path / "a.tar"))):
        sample = dataset[0]
        assert tuple((turn.question, turn.answer) for turn in sample.turns) == pairs
        assert sample.system == system
        assert [image.load().size for image in sample.images] == [(4, 4)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_its_picture_a_form_that_speaks_of_one_is_refused(tmp_path, name):
    _, entry = PUBLISHED[name]
    entry = {key: value for key, value in entry.items() if key not in ("image", "images", "file_name")} | {"id": "x"}
    (tmp_path / "a.json").write_text(json.dumps([entry, {"caption": "fine"}]))
    dataset = LlavaDataset(tmp_path / "a.json")
    speaks = any(sign in json.dumps(entry) for sign in ("<image>", '"image"')) or "text" in entry
    try:
        sample = dataset[0]
    except SampleError:
        assert speaks
    else:
        assert not speaks
        assert sample.images == ()


def test_a_text_only_row_of_finevision_is_text():
    for rating in (None, 0, 5, [5]):
        entry = {"images": [], "texts": [{"user": Q, "assistant": "look at a.png"}], "image_correspondence_min": rating}
        assert said(entry) == ("", ((Q, "look at a.png"),))


@pytest.mark.parametrize(
    "entry",
    [
        {"images": [], "texts": [{"user": Q, "assistant": "a.png"}], **RATINGS},
        {"conversation": [{"human": Q, "assistant": "![](a.png)"}]},
        {"query": Q, "response": "![](a.png)", "history": [["so ?", "a.png"]]},
        {"prompt": [U], "completion": [{"role": "assistant", "content": "a.png"}]},
        {"messages": [U, {"role": "model", "content": "a.png"}]},
    ],
)
def test_what_answers_speak_of_is_no_picture_that_is_missing(tmp_path, entry):
    (tmp_path / "a.json").write_text(json.dumps([entry]))
    assert LlavaDataset(tmp_path / "a.json")[0].images == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"texts": {"user": [Q], "assistant": [A, A]}},
            "'texts' is a dict of lists of different lengths: .*'assistant': 2",
        ),
        ({"conversations": {"from": ["human"], "value": []}}, "lists of different lengths"),
        ({"texts": [{"user": Q, "assistant": None}]}, "'message 2' must be a text"),
        ({"texts": [{"user": Q}]}, "1 messages; expected pairs"),
        ({"conversations": "[{'from': 'human'"}, "'conversations' must be a list of messages, got str"),
        ({"query": Q, "response": ""}, r"expected 'messages'.*got \['query', 'response'\]"),
        ({"query": ["a"], "response": A}, "'query' must be a text"),
        ({"query": Q, "response": A, "history": "x"}, "'history' must be a list of pairs"),
        ({"query": Q, "response": A, "history": [["a"]]}, "'history' must hold pairs"),
        ({"query": Q, "response": A, "history": [["a", None]]}, "'message 2' must be a text"),
        ({"prompt": "draw a cat", "output": "cat.png"}, "'output' names a picture"),
        ({"prompt": Q, "completion": A, "label": False}, "'label' says that the answer is a bad one"),
        ({"messages": [U, B], "kto_tag": False}, "'kto_tag' says"),
        ({"prompt": "another", "chosen": [U, B]}, "'chosen' is a conversation of its own"),
        ({"prompt": [WORSE], "chosen": [U, B]}, "'chosen' is a conversation of its own"),
        ({"chosen": "a text", "rejected": "b"}, "expected 'messages'"),
        ({"prompt": "only asked"}, "expected 'messages'"),
        ({"texts": ["a", "b"]}, "expected 'messages'"),
        ({"messages": [user("<audio> what ?"), B], "audios": ["a.wav"]}, "<audio> stands for what 'audios' holds"),
        (
            {"messages": [user("where is <bbox> ?"), B], "objects": {"bbox": [[1, 2, 3, 4]]}},
            "<bbox> stands for what 'objects' holds",
        ),
        (
            {"conversations": [{"from": "human", "value": Q}, {"from": "function_call", "value": "{}"}]},
            "with tools are not read",
        ),
        ({"messages": [U, B, {"role": "tool", "content": "3"}]}, "message 3 is from 'tool': conversations with tools"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, U, B]},
            "message 2 is a system prompt",
        ),
        ({"messages": [{"role": "system", "content": "a"}, U, B], "system": "b"}, "two system prompts, 'a' and 'b'"),
        ({"system": "a", "system_prompt": "b", "messages": [U, B]}, "two system prompts"),
        ({"system": {"a": 1}, "messages": [U, B]}, "'system' must be a text"),
        ({"system": "see <image>", "messages": [U, B]}, "the system prompt speaks of an image"),
        ({"messages": [{"role": "system", "content": [{"type": "image"}]}, U, B]}, "message 1 holds an image"),
        ({"messages": [{"role": "assistant", "content": "<image>"}, U, B]}, "message 1 speaks of an image"),
        ({"messages": [{"role": "assistant", "content": [{"type": "image"}]}, U, B]}, "message 1 holds an image"),
        ({"messages": [B, B, U, B]}, "message 2 is the assistant's, expected the user's"),
        ({"messages": [B, U]}, "message 1 is the assistant's"),
    ],
)
def test_what_would_be_lost_or_means_nothing_is_refused(entry, message):
    with pytest.raises(SampleError, match=message):
        read_conversation(entry)


def test_a_system_prompt_may_stand_twice_and_an_empty_one_is_none():
    system = {"role": "developer", "content": [{"type": "text", "text": " answer directly . "}]}
    assert said({"messages": [system, U, B], "system": "answer directly .", "system_prompt": None}) == KIND
    assert said({"messages": [{"role": "system", "content": ""}, U, B], "system": " "}) == ONE
    assert said({"messages": [{"role": "system", "content": None}, U, B]}) == ONE


def test_a_text_is_a_caption_beside_a_picture_and_nowhere_else(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.jsonl").write_text(
        '{"file_name": "a.png", "text": "a"}\n{"text": "b"}\n{"image": null, "text": "c"}'
    )
    dataset = MessagesDataset(tmp_path / "a.jsonl")
    assert len(dataset[0].images) == 1
    for index in (1, 2):
        with pytest.raises(SampleError, match="would be the caption of a picture, and it has none"):
            dataset[index]
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    with pytest.raises(DataError, match="no line is an entry"):
        MessagesDataset(tmp_path / "b.jsonl")
    assert not are_columns(["text", "label"], pictures=False)
    assert are_columns(["text", "x"], pictures=True)
    assert are_columns(["text", "image"], pictures=False)
    assert not are_columns(["prompt", "image"], pictures=True)


def test_of_several_forms_the_first_is_read_and_the_others_are_named(tmp_path, caplog):
    entry = {"messages": [U, B], "question": "q", "answer": "a", "text": "t", "chosen": [U, B], "prompt": "p"}
    assert unread_forms(entry, "messages") == ["question", "prompt", "text"]
    assert unread_forms({"image": "a.png", "prompt": "draw a cat", "text": "a cat"}, "text") == ["prompt"]
    assert said({"caption": "c", "query": "q", "response": "r"})[1] == (("", "c"),)
    assert unread_forms({"instruction": "a", "input": "b", "output": "c"}, "instruction") == []
    assert all(unread_forms(entry, read_conversation(entry).form) == [] for _, entry in PUBLISHED.values())
    (tmp_path / "a.json").write_text(json.dumps([{"messages": 3}, entry]))
    caplog.set_level(logging.INFO)
    LlavaDataset(tmp_path / "a.json")
    assert "a.json: 'messages' is read, not 'question' or 'prompt' or 'text'" in caplog.text


def test_the_fingerprint_is_as_ever_without_a_system_prompt_and_another_with_one(tmp_path):
    def of(entry):
        (tmp_path / "a.json").write_text(json.dumps([{"id": "x", "image": None} | entry]))
        return fingerprint_samples(LlavaDataset(tmp_path / "a.json"))

    plain = of({"question": "What?", "answer": "A circle."})
    line = b'["x",0,false,["What?","A circle."]]\n'  # as it was hashed before there were system prompts
    assert plain == xxhash.xxh3_128(line).hexdigest()
    assert of({"query": "What?", "response": "A circle."}) == plain
    system = of({"query": "What?", "response": "A circle.", "system": "Be kind."})
    assert len({plain, system, of({"question": "What?", "answer": "A circle.", "system": "Be brief."})}) == 3


# The slow reference: one conversation written in every form that can hold it.
WORDS = st.text("ab .?\n", min_size=1, max_size=6).filter(str.strip)


def writings(system, pairs):
    """The entries that say one conversation."""
    for role, text, asker, model in (("role", "content", "user", "assistant"), ("from", "value", "human", "gpt")):
        flat = [{role: name, text: said} for pair in pairs for name, said in zip((asker, model), pair, strict=True)]
        front = [{role: "system", text: system}] if system else []
        for key in ("messages", "conversations", "conversation", "chosen"):
            yield {key: front + flat}
            yield {key: flat, "system": system}
            rows = front + flat
            if key != "chosen":
                yield {key: {role: [row[role] for row in rows], text: [row[text] for row in rows]}}
        yield {"prompt": front + flat[:-1], "completion": flat[-1:]}
        yield {"prompt": front + flat[:-1], "chosen": flat[-1], "rejected": flat[-1]}
    for asker, model in itertools.product(("user", "human", "question"), ("assistant", "gpt", "answer")):
        rounds = [{asker: question, model: answer, "source": "x"} for question, answer in pairs]
        for key in ("texts", "conversation", "conversations"):
            yield {key: rounds, "system_prompt": system}
            yield {key: {name: [row[name] for row in rounds] for name in rounds[0]}, "system": system}
    question, answer = pairs[-1]
    for asks, tells in itertools.product(
        ("question", "query", "prompt", "instruction", "problem", "input"),
        ("answer", "response", "completion", "output"),
    ):
        yield {asks: question, tells: answer, "history": [list(pair) for pair in pairs[:-1]], "system": system}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(system=st.just("") | WORDS, pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
def test_one_conversation_in_every_form(system, pairs):
    expected = system.strip(), tuple((question.strip(), answer.strip()) for question, answer in pairs)
    for entry in writings(system, pairs):
        assert said(entry) == expected, entry
        assert is_entry(entry), entry
