"""A list of messages is that list however a table writes it, and a text is a text; what a question is about stands with it."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from published_forms import KIND, PUBLISHED, A, Q
from test_forms import WORDS, said, writings

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sources.conversations import is_entry, read_conversation
from vlm_distill_cache.data.sources.csv_rows import CsvDataset

MESSAGES = ("messages", "conversations", "conversation", "texts", "prompt", "completion", "chosen", "history")


def written(entry, write):
    """An entry with its lists of messages as texts."""
    return {
        key: write(value) if key in MESSAGES and isinstance(value, list | dict) else value
        for key, value in entry.items()
    }


@settings(max_examples=30, deadline=None)
@given(system=st.just("") | WORDS, pairs=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=3))
@pytest.mark.slow
def test_one_conversation_as_texts_in_every_form(system, pairs):
    for entry in writings(system, pairs):
        for write in (json.dumps, repr, lambda value: f"\n {json.dumps(value, indent=1)} "):
            texts = written(entry, write)
            assert said(texts) == said(entry), texts
            assert is_entry(texts)


def without_picture(entry):
    return {key: value for key, value in entry.items() if key not in ("image", "images", "file_name")}


# Those that mean something without their picture.
TEXTS = [
    name
    for name, (_, entry) in PUBLISHED.items()
    if "text" not in entry and not any(sign in json.dumps(without_picture(entry)) for sign in ("<image>", '"image"'))
]


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("name", TEXTS)
def test_a_published_form_in_the_cells_of_a_table(tmp_path, name, write):
    conversation, entry = PUBLISHED[name]
    cells = without_picture(entry)
    with (tmp_path / "a.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(cells)
        rows.writerow([write(value) if isinstance(value, list | dict) else value for value in cells.values()])
    sample = CsvDataset(tmp_path / "a.csv")[0]
    assert (sample.system, tuple((turn.question, turn.answer) for turn in sample.turns)) == conversation


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "get_weather", "arguments": {}}',
        '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]',
        '[{"question": "who?", "answer": "me"}]',
        '{"from": "A", "to": "B"}',
        '[{"role": "admin", "rights": []}]',
        "[1, 2]",
        "[red or blue]",
        "{x}",
        "[]",
        '"role"',
    ],
)
def test_other_json_in_a_text_stays_a_text(text):
    for asks, tells in (("prompt", "completion"), ("question", "answer"), ("query", "response"), ("prompt", "chosen")):
        assert said({asks: text, tells: text}) == ("", ((text, text),))
    message = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    assert said({"messages": message}) == ("", ((text, text),))


def test_a_list_of_messages_that_cannot_be_read_is_not_learnt_as_it_stands():
    for broken in (
        '[{"role": "user", "content": "q"',
        "[{'role': 'user', 'content': 'q'}\n ...\n {'role': 'user', 'content': 'a'}]",
    ):
        for entry in ({"prompt": broken, "completion": A}, {"prompt": Q, "completion": broken}):
            with pytest.raises(SampleError, match="begins as a list of messages does"):
                read_conversation(entry)


def test_parts_may_be_a_text_and_an_empty_history_is_none():
    parts = json.dumps([{"type": "image"}, {"type": "text", "text": Q}])
    found = read_conversation({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": A}]})
    assert (found.turns[0].question, found.expected) == (Q, 1)
    for history in ("[]", " [ ] ", "", None):
        assert said({"query": Q, "response": A, "history": history, "system": KIND[0]}) == KIND


ASKS = [
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "completion"),
    ("problem", "solution"),
    ("instruction", "output"),
]


@pytest.mark.parametrize("key", ["context", "contexts", "passage", "paragraph", "article"])
@pytest.mark.parametrize(("asks", "tells"), ASKS)
def test_what_a_question_is_about_stands_behind_it(asks, tells, key):
    entry = {asks: Q, tells: A}
    assert said(entry | {key: "It is red."})[1] == ((f"{Q}\nIt is red.", A),)
    assert said(entry | {key: ["It is red.", "It is square."]})[1] == ((f"{Q}\nIt is red.\nIt is square.", A),)
    for nothing in (None, "", " ", []):
        assert said(entry | {key: nothing})[1] == ((Q, A),)
    if asks != "instruction":
        assert said({asks: f"It is red. {Q}", tells: A, key: "It is red."})[1] == ((f"It is red. {Q}", A),)
        assert said(entry | {key: 17})[1] == ((Q, A),)  # a passage's number


def test_a_hint_stands_in_front_unless_the_question_has_it():
    for asks, tells in ASKS:
        assert said({asks: Q, tells: A, "hint": "Look left."})[1] == ((f"Look left.\n{Q}", A),)
        assert said({asks: f"Context: Look left.\n{Q}", tells: A, "hint": "Look left."})[1] == (
            (f"Context: Look left.\n{Q}", A),
        )


def test_answers_as_squad_writes_them():
    entry = {"id": "1", "title": "t", "question": Q, "context": "It is red."}
    for answers in ({"text": [A], "answer_start": [5]}, {"text": ["x", A, A], "answer_start": [1, 2, 3]}, {"text": A}):
        for value in (answers, json.dumps(answers), repr(answers)):
            assert said(entry | {"answers": value}) == ("", ((f"{Q}\nIt is red.", A),))
    with pytest.raises(SampleError, match="'answers' must be a list that is not empty"):
        read_conversation(entry | {"answers": {"text": [], "answer_start": []}})
