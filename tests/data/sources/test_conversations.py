"""Answers as people write them are read, or are named as what they are."""

import pytest

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sources.conversations import has_text, read_conversation

U, A = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A circle."}


@pytest.mark.parametrize(
    ("entry", "answer"),
    [
        ({"answer": 3}, "3"),
        ({"answer": -2.5}, "-2.5"),
        ({"answer": ["red"]}, "red"),
        ({"answers": ["red", "blue", "blue", "red", "blue"]}, "blue"),
        ({"answers": ["red", "blue"]}, "red"),
        ({"answers": [3, 3, "three"]}, "3"),
        ({"answers": [{"answer": "no", "answer_id": 1}, {"answer": "yes"}, {"answer": "yes"}]}, "yes"),
        ({"answers": [{"answer": "no"}], "multiple_choice_answer": "yes"}, "yes"),
        ({"answers": ["no"], "answer": "yes"}, "yes"),
        ({"answers": ["no"], "answer": None}, "no"),
        ({"answers": ["no"], "answer": ""}, "no"),
        ({"answers": ["Yes", "yes", "no", "no", "YES"]}, "Yes"),
        ({"answers": ["", "", "a"]}, "a"),
        ({"choices": ["What", "?"], "answer": "?"}, "?"),
    ],
)
def test_numbers_and_peoples_answers_are_read(entry, answer):
    assert read_conversation({"question": "What?"} | entry).turns[0].answer == answer


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"question": "What?", "answer": ["a", "b"]}, "'answer' is a list of 2, .* belong under 'answers'"),
        ({"question": "What?", "answer": True}, "'answer' must be a text or a number, got bool"),
        ({"question": "What?", "answer": {"text": "a"}}, "'answer' must be a text or a number, got dict"),
        ({"question": "What?", "answer": float("nan")}, "'answer' must be a text or a number, got float"),
        ({"question": "What?", "answer": ""}, "an answer, is empty"),
        ({"question": "What?", "answers": []}, "'answers' must be a list that is not empty"),
        ({"question": "What?", "answers": "red"}, "'answers' must be a list"),
        ({"question": "What?", "answers": [None]}, "'answers' must be a text or a number, got NoneType"),
        ({"question": 3, "answer": "a"}, "'question' must be a text and 'answer' not null"),
        ({"question": "What?", "answer": None}, "'question' must be a text and 'answer' not null, got NoneType"),
        ({"question": "What?", "caption": "a dog"}, "expected 'messages'"),
        ({"question": {"a": 1}, "caption": "a dog"}, "expected 'messages'"),
        ({"question": "What?", "answer": "x", "tools": [{"name": "f"}]}, "'tools' is not read"),
        ({"messages": [U, A], "history": [["a", "b"]]}, "'history' beside 'messages' is not read"),
        ({"caption": "x", "history": [["a", "b"]]}, "'history' beside 'caption' is not read"),
        ({"messages": [U, A | {"loss": False}]}, "message 2 has 'loss', which is not read"),
        ({"messages": [U, A | {"weight": 0}]}, "message 2 has 'weight', which is not read"),
        ({"messages": [U, A | {"tool_calls": [{"name": "f"}]}]}, "message 2 has 'tool_calls', which is not read"),
        ({"caption": ["a", "b"]}, "'caption' is a list of 2, .*captions in entries of their own"),
        ({"conversations": None}, "'conversations' must be a list of messages, got NoneType"),
        ({"conversations": {"from": ["human"], "value": ["a"]}}, "1 messages; expected pairs"),
        ({"conversations": {"from": "human"}}, "'conversations' must be a list of messages, got dict"),
        ({f"key{number}": 0 for number in range(40)}, r"'\.\.\.'\]$"),
    ],
)
def test_what_cannot_be_read_is_named(entry, message):
    with pytest.raises(SampleError, match=message):
        read_conversation(entry)


def test_roles_and_keys_of_both_conventions_may_be_mixed():
    messages = [{"from": "Human", "value": "What?"}, {"role": "assistant", "content": 3, "from": None}]
    for key in ("messages", "conversations"):
        assert read_conversation({key: messages}).turns[0].answer == "3"


def test_what_is_empty_or_says_nothing_new_is_no_loss():
    assert read_conversation({"messages": [], "conversations": [U, A], "system": "", "tools": []}).turns
    assert read_conversation(
        {"messages": [U | {"name": "x"}, A | {"loss": True, "weight": 1, "tool_calls": None}]}
    ).turns


def test_an_entry_has_a_text_where_one_of_the_forms_is_filled():
    for entry in ({"messages": 3}, {"conversations": [1]}, {"caption": "a"}, {"question": "a", "answer": None}):
        assert has_text(entry), entry
    for entry in (
        {},
        {"messages": []},
        {"caption": None},
        {"caption": " "},
        {"question": "a"},
        {"question": "", "answer": "a"},
    ):
        assert not has_text(entry), entry
