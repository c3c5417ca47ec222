"""A bad answer, or one that is left out of the loss, is never learnt, however the data say so; and a class is no grade."""

import csv
import json

import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_forms import PUBLISHED, A, B, Q, U

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sources.conversations import read_conversation
from vlm_distill_cache.data.sources.csv_rows import CsvDataset
from vlm_distill_cache.data.sources.llava import LlavaDataset

# The slow references: every way of writing it that was thought of.
FALSE = [False, "false", "False", " FALSE ", '"false"', [False], ["false"]]
NO = [*FALSE, 0, 0.0, -1, "0", "0.0", "-1", "no", "No", "bad", "undesirable", "negative", "rejected", "f", "n"]
NOTHING = [None, "", " ", [], float("nan")]
GOOD = [*NOTHING, True, 1, 0.5, "true", "True", "1", "good", "desirable", "chosen", "yes", [True]]
CLASSES = [*GOOD, 0, 7, "0", "cat", "no", "bad", [0, 3], ["cat"]]


def fails(entry):
    try:
        read_conversation(entry)
    except SampleError as error:
        return "the answer is a bad one" in str(error)
    return False


@pytest.mark.parametrize("name", PUBLISHED)
def test_an_answer_that_is_called_false_is_not_learnt_in_any_form(name):
    _, entry = PUBLISHED[name]
    for value in FALSE:
        for key in ("label", "Label", "kto_tag", "ktoTag"):
            assert fails(entry | {key: value}), (key, value)
    for value in NO:
        assert fails(entry | {"kto_tag": value}), value
    for value in GOOD:
        assert not fails(entry | {"kto_tag": value, "label": value}), value
    if "completion" not in entry:
        for value in CLASSES:
            assert not fails(entry | {"label": value}), value


def test_beside_a_completion_a_label_is_a_grade():
    for entry in ({"prompt": Q, "completion": A}, {"prompt": [U], "completion": [B]}):
        for value in NO:
            assert fails(entry | {"label": value}), value
        for value in GOOD:
            assert not fails(entry | {"label": value}), value


@pytest.mark.parametrize("said", ["False", "0", "bad"])
def test_bad_answers_in_a_table(tmp_path, said):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completion", "label"], [Q, A, "True"], [Q, "bad", said]])
    dataset = CsvDataset(tmp_path / "a.csv")
    assert dataset[0].turns[0].answer == A
    with pytest.raises(SampleError, match="'label' says that the answer is a bad one"):
        dataset[1]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    from vlm_distill_cache.data.registry import open_dataset

    value = {"False": False, "0": 0}.get(said, said)
    pq.write_table(pa.table({"prompt": [Q], "completion": ["bad"], "label": [value]}), tmp_path / "a.parquet")
    with pytest.raises(SampleError, match="'label' says that the answer is a bad one"):
        open_dataset(str(tmp_path / "a.parquet"))[0]


LEARNT = ["loss", "train", "training", "weight", "loss_scale", "lossScale"]
LEFT_OUT = ["mask", "masked", "ignore"]


def conversations(first, second):
    """Two turns in each form that can say more of a message, with something beside their answers."""
    flat = [U, B | first, {"role": "user", "content": "where ?"}, {"role": "assistant", "content": "left"} | second]
    yield {"messages": flat}
    yield {"messages": [{"role": "assistant", "content": "hello"} | {"loss": False, "mask": True}, *flat]}
    yield {"conversations": [{"from": m["role"], "value": m["content"]} | {**m, "role": None} for m in flat]}
    yield {"prompt": flat[:3], "completion": flat[3:]}
    yield {"texts": [{"user": Q, "assistant": A} | first, {"user": "where ?", "assistant": "left"} | second]}


@given(
    key=st.sampled_from(LEARNT + LEFT_OUT),
    value=st.sampled_from([False, True, 0, 0.0, 1, 0.5, "false", "true", "0", "1", None, ""]),
    which=st.sampled_from([0, 1]),
)
def test_an_answer_that_is_left_out_of_the_loss_is_not_learnt(key, value, which):
    no, yes = value in (False, 0, "false", "0"), value in (True, 1, "true", "1")
    left_out = yes or value == 0.5 if key in LEFT_OUT else no
    for entry in conversations(*[{key: value} if place == which else {} for place in (0, 1)]):
        if not left_out:
            assert [turn.answer for turn in read_conversation(entry).turns] == [A, "left"]
            continue
        with pytest.raises(SampleError, match=rf"message \d has '{key}', which is not read, .* is not learnt"):
            read_conversation(entry)


@pytest.mark.parametrize("key", [*LEARNT, *LEFT_OUT])
def test_a_question_and_a_system_prompt_are_never_learnt_whatever_they_say(key):
    system = {"role": "system", "content": "be kind"}
    for value in (False, True, 0, 0.0, 1, "0", None):
        found = read_conversation({"messages": [system | {key: value}, U | {key: value}, B]})
        assert (found.system, found.turns[0].answer) == ("be kind", A)


def test_what_a_message_says_beside_its_text_is_not_lost():
    for key in ("thinking", "reasoning", "reasoning_content", "reasoningContent", "thoughts", "audio"):
        for entry in ({"messages": [U, B | {key: "hm"}]}, {"texts": [{"user": Q, "assistant": A, key: "hm"}]}):
            with pytest.raises(SampleError, match=f"message [12] has '{key}', which is not read"):
                read_conversation(entry)
        assert read_conversation({"messages": [U | {key: None}, B | {key: ""}]}).turns


@pytest.mark.parametrize(
    "key", ["system", "System", "system_prompt", "systemPrompt", "system_message", "system_instruction"]
)
def test_a_system_prompt_is_found_under_every_name(tmp_path, key):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for entry in (
        {"messages": [U, B]},
        {"question": Q, "answer": A},
        {"image": "a.png", "texts": [{"user": Q, "gpt": A}]},
    ):
        (tmp_path / "a.json").write_text(json.dumps([entry | {key: "look at a.png"}, entry | {key: ""}]))
        dataset = LlavaDataset(tmp_path / "a.json")
        assert [dataset[index].system for index in (0, 1)] == ["look at a.png", ""]
        assert len(dataset[0].images) == ("image" in entry)


@pytest.mark.parametrize("key", ["audio", "audios", "audio_path", "Audio", "wav", "sound", "clip"])
def test_a_sound_is_not_lost(tmp_path, key):
    for value in ("x.wav", ["x.mp3"], {"bytes": None, "path": "x.flac"}):
        (tmp_path / "a.json").write_text(
            json.dumps([{"messages": [U, B], key: value}, {"messages": [U, B], key: None}])
        )
        dataset = LlavaDataset(tmp_path / "a.json")
        with pytest.raises(SampleError, match=r"names a sound .*only pictures and videos are read"):
            dataset[0]
        assert dataset[1].turns
