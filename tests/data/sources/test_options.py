"""Options reach the prompt wherever an entry keeps them, and an answer that chooses one is its letter."""

import base64
import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sources.conversations import read_conversation
from vlm_distill_cache.data.sources.options import INSTRUCTION

CAT_OR_DOG = f"Who?\nA. cat\nB. dog\n{INSTRUCTION}"


def said(entry: dict[str, Any]) -> tuple[str, str]:
    (turn,) = read_conversation({"question": "Who?"} | entry).turns
    return turn.question, turn.answer


@pytest.mark.parametrize(
    "options",
    [
        {"A": "cat", "B": "dog", "C": None, "D": ""},
        {"A": "cat", "B": "dog", "C": "nan", "D": float("nan")},  # as pandas, and tables made with it, write it
        {"choices": ["cat", "dog"]},
        {"options": ("A. cat", "B. dog")},
        {"options": "['cat', 'dog']"},  # MMMU
        {"options": '["(A) cat", "(B) dog"]'},
        {"candidates": {"A": "cat", "B": "dog", "C": None}},
        {"choices": {"text": ["cat", "dog"], "label": ["A", "B"]}},
        {"choices": [{"label": "A", "text": "cat"}, {"label": "B", "text": "dog"}]},
        {"choice_a": "cat", "choice_b": "dog"},  # SEED-Bench
        {"optionA": "cat", "optionB": "dog"},
        {"option0": "cat", "option1": "dog"},
        {"a": "cat", "b": "dog"},
        {"options": "A. cat\nB. dog"},
        {"choices": "A: cat, B: dog"},
        {"options": "(a) cat (b) dog"},
        {"candidates": "cat|dog"},
        {"answer_choices": "cat\ndog"},
        {"answer_choices": ["cat", "dog"]},
    ],
)
@pytest.mark.parametrize("answer", ["B", "(B)", "b", "B. dog", 1, "1"])
def test_options_under_any_key_reach_the_prompt(options, answer):
    assert said({**options, "answer": answer}) == (CAT_OR_DOG, "B")


@pytest.mark.parametrize(
    ("entry", "question", "answer"),
    [
        # What the question holds already stays as it is, and so does an answer in words.
        ({"question": "A. cat or B. dog?", "choices": ["cat", "dog"], "answer": "B"}, "A. cat or B. dog?", "B"),
        ({"question": "A. cat or B. dog?", "choices": ["cat", "dog"], "answer": 1}, "A. cat or B. dog?", "B"),
        ({"question": "(A) cat (B) dog?", "A": "cat", "B": "dog", "answer": "dog"}, "(A) cat (B) dog?", "dog"),
        ({"question": "A cat or a dog?", "choices": ["cat", "dog"], "answer": "dog"}, "A cat or a dog?", "dog"),
        ({"choices": ["cat", "dog"], "answer": "dog"}, "Who?\nA. cat\nB. dog", "dog"),
        ({"choices": ["cat", "dog"], "answer": "It barks."}, "Who?\nA. cat\nB. dog", "It barks."),
        ({"option_1": "cat", "option_2": "dog", "answer": "It barks."}, "Who?", "It barks."),
        ({"options": [], "choices": "[]", "answer": "A"}, "Who?", "A"),
        ({"options": "N/A", "answer": "3"}, "Who?", "3"),
        ({"a": 3, "b": 4, "answer": "1"}, "Who?", "1"),
        # An answer that is one of them in words, and options as their labels count them.
        ({"choice_a": "cat", "choice_b": "dog", "answer": "Dog"}, "Who?\nA. cat\nB. dog", "Dog"),
        ({"choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answer": "1"}, CAT_OR_DOG, "A"),
        ({"choices": [{"id": 1, "text": "cat"}, {"id": 2, "text": "dog"}], "answer": 2}, CAT_OR_DOG, "B"),
        ({"choices": ["1. cat", "2. dog"], "answer": "1"}, CAT_OR_DOG, "A"),
        ({"options": "(1) cat\n(2) dog", "answer": 2}, CAT_OR_DOG, "B"),
        # Options that the question only mentions are no letters that can be answered.
        (
            {"question": "A cat or a dog?", "A": "cat", "B": "dog", "answer": "B"},
            f"A cat or a dog?\nA. cat\nB. dog\n{INSTRUCTION}",
            "B",
        ),
        ({"option1": "cat", "option2": "dog", "answer": 2}, CAT_OR_DOG, "B"),  # as they are called
        ({"choices": {"1": "cat", "2": "dog"}, "answer": "2"}, CAT_OR_DOG, "B"),
        ({"choices": ["1", "2"], "answer": 1}, f"Who?\nA. 1\nB. 2\n{INSTRUCTION}", "B"),
        ({"choices": ["0", "1"], "answer": "1"}, f"Who?\nA. 0\nB. 1\n{INSTRUCTION}", "B"),
        ({"A": "B", "B": "A", "answer": "A"}, f"Who?\nA. B\nB. A\n{INSTRUCTION}", "A"),
        ({"A": 3, "B": 4, "answer": "A"}, f"Who?\nA. 3\nB. 4\n{INSTRUCTION}", "A"),
        ({"A": "cat", "B": "dog", "hint": "Look.", "answer": "B"}, f"Look.\n{CAT_OR_DOG}", "B"),
        ({"A": "cat", "B": "dog", "hint": "nan", "answer": "B"}, CAT_OR_DOG, "B"),
        (
            {"choices": list("uvwxyz"), "answer": "F"},
            "Who?\n" + "\n".join(f"{a}. {b}" for a, b in zip("ABCDEF", "uvwxyz", strict=True)) + f"\n{INSTRUCTION}",
            "F",
        ),
    ],
)
def test_an_answer_is_a_letter_where_it_chooses_one(entry, question, answer):
    assert said(entry) == (question, answer)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"choices": ["cat", "dog"], "answer": 2}, "'2' chooses none of the 2 options in 'choices'"),
        ({"A": "cat", "B": "dog", "answer": "C"}, "'C' chooses none of the 2 options in"),
        ({"option1": "cat", "option2": "dog", "answer": "C"}, "'C' chooses none of the 2 options in option 1, 2"),
        (
            {"A": "cat", "B": None, "C": "dog", "answer": "C"},
            r"\['A', 'C'\] hold what can be answered, but the 2\. of 3",
        ),
        ({"choices": ["1", "2", "3"], "answer": "1"}, "option B by its letter or number .* option A by its text"),
        ({"choices": ["B", "A"], "answer": "A"}, "option A by its letter or number .* option B by its text"),
        ({"choices": ["a.png", "b.png"], "answer": "A"}, "'choices' holds pictures to choose from"),
        ({"choices": ["cat", ["dog"]], "answer": "A"}, "option 2 is no text: list"),
        ({"choices": b"\x89PNG", "answer": "A"}, "'choices' holds what can be answered, but no texts"),
        (
            {"options": {"temperature": 1, "top_p": 2}, "answer": "A"},
            "'options' holds what can be answered, but not by letter",
        ),
        ({"choices": {"text": ["x", "y"], "label": ["B", "A"]}, "answer": "A"}, "labelled 'B'"),
        ({"choices": {"text": ["x", "y"], "label": ["2", "3"]}, "answer": "2"}, "labelled '2'"),
        ({"choices": [{"id": "k1", "text": "x"}, {"id": "k2", "text": "y"}], "answer": "k2"}, "labelled 'K1'"),
        ({"choices": {"text": ["x", "y"], "label": ["A"]}, "answer": "A"}, "2 options and 1 labels"),
        ({"choices": "x, y", "answer": "A"}, "'x, y' is no list; give a list"),
        ({"choices": [{"label": "B", "text": "x"}, {"label": "A", "text": "y"}], "answer": "A"}, "labelled 'B'"),
        (
            {"choices": [str(number) for number in range(100, 127)], "answer": "A"},
            "27 options, more than there are letters",
        ),
    ],
)
def test_options_that_cannot_be_told_are_refused(entry, message):
    with pytest.raises(SampleError, match=message):
        said(entry)


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_options_beside_messages_reach_their_prompt(form):
    keys = ("from", "value", "human", "gpt") if form == "conversations" else ("role", "content", "user", "assistant")
    asked, answered = {keys[0]: keys[2], keys[1]: "<image>\nWho?"}, {keys[0]: keys[3], keys[1]: "B"}
    for options in ({"options": ["cat", "dog"]}, {"A": "cat", "B": "dog"}):
        (turn,) = read_conversation({form: [asked, answered], **options}).turns
        assert (turn.question.removeprefix("<image>\n"), turn.answer) == (CAT_OR_DOG, "B")
        with pytest.raises(SampleError, match="these have several turns; write the options into the question"):
            read_conversation({form: [asked, answered] * 2, **options})
        listed = {**asked, keys[1]: "Who?\nA. Cat\nB. Dog"}
        (turn, _) = read_conversation({form: [listed, answered] * 2, **options}).turns
        assert (turn.question, turn.answer) == ("Who?\nA. Cat\nB. Dog", "B")


def test_a_table_of_mmbench_is_trained_and_scored_with_its_options_and_pictures_of_other_rows(tmp_path: Path):
    def picture(colour: str) -> str:
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
        return base64.b64encode(buffer.getvalue()).decode()

    rows = [
        ("7", "Is the ball or the box red?", "", "ball", "box", "", "A", picture("red")),
        ("9", "What?", "Look left.", "cat", "dog", "cow", "C", picture("blue")),
        ("1000007", "Is the ball or the box red?", "", "box", "ball", "", "B", "7"),
        ("11", "What?", "", "cat", "dog", "", "B", "12"),  # of no row
    ]
    header = ["index", "question", "hint", "A", "B", "C", "answer", "image"]
    path = tmp_path / "any.tsv"
    path.write_text("\n".join("\t".join(row) for row in [header, *rows]) + "\n")
    data = open_dataset(str(path), split="train")
    assert [sample.turns[0].question for sample in (data[0], data[1])] == [
        f"Is the ball or the box red?\nA. ball\nB. box\n{INSTRUCTION}",
        f"Look left.\nWhat?\nA. cat\nB. dog\nC. cow\n{INSTRUCTION}",
    ]
    assert data[2].images[0].load().getpixel((0, 0)) == (255, 0, 0)
    items = open_evaluation(str(path), "test", None).questions
    assert [(item.question.count("\n"), item.answer) for item in items[:3]] == [(3, "A"), (5, "C"), (3, "B")]
    with pytest.raises(SampleError, match=r"'11'.*'12', which is no picture and no row"):
        data[3]
