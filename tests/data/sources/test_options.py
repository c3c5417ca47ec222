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
def test_options_under_any_key_reach_the_prompt(options):
    for answer in ("B", "(B)", "b", "B. dog"):
        assert said({**options, "answer": answer}) == (CAT_OR_DOG, "B")
    # Columns a and b may be anything, and candidates what a model wrote: there only a letter tells that they are options.
    asked = "Who?" if {"a", "candidates"} & options.keys() else "Who?\nA. cat\nB. dog"
    assert said({**options, "answer": "dog"}) == (asked, "dog")
    if "option0" in options:
        assert said({**options, "answer": 1}) == said({**options, "answer": "1"}) == (CAT_OR_DOG, "B")
    elif "answer_choices" not in options:  # nothing says what numbers are counted from
        with pytest.raises(SampleError, match="'1' chooses none of the 2 options"):
            said({**options, "answer": 1})


@pytest.mark.parametrize(
    ("entry", "question", "answer"),
    [
        # What the question holds already stays as it is, and so does an answer in words.
        ({"question": "A. cat or B. dog?", "choices": ["cat", "dog"], "answer": "B"}, "A. cat or B. dog?", "B"),
        ({"question": "(A) cat (B) dog?", "A": "cat", "B": "dog", "answer": "dog"}, "(A) cat (B) dog?", "dog"),
        ({"question": "A cat or a dog?", "choices": ["cat", "dog"], "answer": "dog"}, "A cat or a dog?", "dog"),
        ({"choices": ["cat", "dog"], "answer": "dog"}, "Who?\nA. cat\nB. dog", "dog"),
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
        ({"choices": ["9", "7"], "answer": 7}, "Who?\nA. 9\nB. 7", "7"),
        ({"choices": "cat,dog", "answer": "dog"}, "Who?\nA. cat\nB. dog", "dog"),  # IconQA
        ({"options": "a. cat\nb. dog", "answer": "b"}, CAT_OR_DOG, "B"),
        ({"options": "A) cat | B) dog", "answer": "B"}, CAT_OR_DOG, "B"),
        ({"options": "- cat\n- dog", "answer": "B"}, CAT_OR_DOG, "B"),
        ({"options": ["1: 2", "2: 3"], "answer": "A"}, f"Who?\nA. 1: 2\nB. 2: 3\n{INSTRUCTION}", "A"),
        ({"A": "B", "B": "A", "answer": "A"}, f"Who?\nA. B\nB. A\n{INSTRUCTION}", "A"),
        ({"A": 3, "B": 4, "answer": "A"}, f"Who?\nA. 3\nB. 4\n{INSTRUCTION}", "A"),
        ({"A": "cat", "B": "dog", "hint": "Look.", "answer": "B"}, f"Look.\n{CAT_OR_DOG}", "B"),
        ({"A": "cat", "B": "dog", "hint": "nan", "answer": "B"}, CAT_OR_DOG, "B"),
        (
            {"choices": [2 * word for word in "uvwxyz"], "answer": "F"},
            "Who?\n" + "\n".join(f"{a}. {2 * b}" for a, b in zip("ABCDEF", "uvwxyz", strict=True)) + f"\n{INSTRUCTION}",
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
        *[
            ({"choices": ["cat", "dog", "cow"], "answer": place}, "chooses none of the 3 .* for certain")
            for place in (1, 2, 3)
        ],
        ({"choices": ["cat", "dog"], "answer": "It barks."}, "'It barks.' chooses none of the 2 options"),
        ({"choices": ["1", "2", "3"], "answer": "1"}, "'1' chooses none .* for certain"),
        ({"choices": [1.0, 2.0, 3.0], "answer": 1}, "'1' chooses none .* for certain"),
        ({"choices": ["B", "A"], "answer": "A"}, "'A' chooses none .* for certain"),
        ({"choices": ["B", "C", "D"], "answer": "A"}, "'A' chooses none .* for certain"),
        (
            {"question": "A. cat or B. dog?", "choices": ["cat", "dog"], "answer": 1},
            "the question calls them by letters",
        ),
        ({"options": ["B. cat", "A. dog"], "answer": "B"}, "out of order: they are labelled B, A"),
        ({"options": ["(2) cat", "(1) dog"], "answer": "2"}, "out of order: they are labelled 2, 1"),
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
        ({"choices": ["cat"], "answer": "cat"}, "'cat' chooses among options that cannot be told"),
        ({"choices": "x, y", "answer": "A"}, "'A' chooses none of the 2 options"),
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
    for options in ({"options": ["cat", "dog"]}, {"A": "cat", "B": "dog"}, {"options": "['cat' 'dog']"}):
        (turn,) = read_conversation({form: [asked, answered], **options}).turns
        assert (turn.question.removeprefix("<image>\n"), turn.answer) == (CAT_OR_DOG, "B")
        opened = {keys[0]: keys[3], keys[1]: "Hello."}
        (turn,) = read_conversation({form: [opened, asked, answered], **options}).turns
        assert turn.question.endswith(CAT_OR_DOG)
        (turn, _) = read_conversation({form: [asked, answered] * 2, **options}).turns
        assert turn.question.endswith("Who?")
        listed = {**asked, keys[1]: "Who?\nA. Cat\nB. Dog"}
        (turn, _) = read_conversation({form: [listed, answered] * 2, **options}).turns
        assert (turn.question, turn.answer) == ("Who?\nA. Cat\nB. Dog", "B")


OF_THREE = {"options": ["cat", "dog", "bird"]}
LISTS = [
    "What?\n{}",
    "{}\nWhat is it?",
    "Is it a cat, a dog or a bird?\n{}",
]
WAYS = [
    "1. {}\n2. {}\n3. {}",
    "(1) {} (2) {} (3) {}",
    "1) {}\n2) {}\n3) {}",
    "Option 1: {}\nOption 2: {}\nOption 3: {}",
    "(a) {} (b) {} (c) {}",
    "a) {} b) {} c) {}",
    "A．{}\nB．{}\nC．{}",
    "**A.** {}\n**B.** {}\n**C.** {}",
    "A - {}\nB - {}\nC - {}",
    "<A> {} <B> {} <C> {}",
    "Choices: {}, {}, {}",
    "| A | {} |\n| B | {} |\n| C | {} |",
    "{} (A), {} (B), {} (C)",
    "1 {} 2 {} 3 {}",
    "{} {} {}",
]


@pytest.mark.parametrize("way", WAYS)
def test_a_question_that_lists_its_options_in_any_way_is_left_as_it_is(way):
    for around in LISTS:
        for places in ((0, 1, 2), (2, 0, 1)):  # in an order of its own, too
            question = around.format(way.format(*(OF_THREE["options"][place] for place in places)))
            for answer in ("1", "3", "b", "B", "dog") if "A" not in way else ("B", "dog"):
                assert said({**OF_THREE, "question": question, "answer": answer}) == (question, answer)
                talk = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                (turn,) = read_conversation({**OF_THREE, "conversations": talk}).turns
                assert (turn.question, turn.answer) == (question, answer)


@pytest.mark.parametrize(
    ("beside", "answers"),
    [
        ({"multiple_choices": ["1", "3", "4"]}, ["2"]),  # Visual7W's wrong ones
        ({"multiple_choices": ["B", "C", "D"]}, ["A"]),
        ({"answer_choices": ["B", "C", "D"]}, ["A", "E"]),
        ({"options": "resize"}, ["A", "3", "yes"]),
        ({"candidates": "5"}, ["B", "3"]),
        ({"answer_choices": "open-ended"}, ["C", "1"]),
        ({"choices": "square,circle"}, ["y", "3", "a star"]),
        ({"a": 3, "b": 4}, ["1", "A", "3"]),
        ({"A": 3, "B": 2}, ["2", "dog"]),
        ({"a": "cat", "b": "dog", "relation": "left"}, ["cat", "left"]),
        ({"candidates": ["A dog runs.", "A cat"]}, ["A dog runs."]),
        ({"question": "Which is red, A or B?", "choices": ["A", "B"]}, ["A", "B"]),
    ],
)
def test_what_is_no_list_of_options_changes_no_question(beside, answers):
    for answer in answers:
        entry = {"question": "Who?", **beside, "answer": answer}
        assert said(entry) == (entry["question"], answer)


@pytest.mark.parametrize(
    "beside",
    [
        {"candidates": ["A dog runs.", "A cat sits."]},
        {"options": ["greedy"]},
        {"choices": ["x"]},
        {"candidates": [0.1, 0.9]},
        {"A": "A dog.", "B": "A cat.", "winner": "A"},
        {"A": 10, "B": "60", "L": "5"},
        {"A": "10", "C": "60"},
        {"options": ["4", "3", "2", "1"]},
        {"options": {"temperature": 0.2}},
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "yes"}}]},
        {"options": {"crop": True}, "candidates": [{"bbox": [0, 1]}]},
        {"candidates": [[0, 0, 1, 1]]},
        {"options": ["b.png", "c.png"]},
        {"options": [["cat", "dog"], None]},
        {"options": "resize", "answer_choices": b"x"},
    ],
)
def test_words_in_a_conversation_are_left_as_they_are(beside):
    letters = {"options": ["greedy"]}, {"options": {"temperature": 0.2}}, {"options": ["b.png", "c.png"]}
    for answer in ("A dog runs.", "2", "yes", *("A" if beside in letters else ())):
        talk = [{"role": "user", "content": "Is A left of B?"}, {"role": "assistant", "content": answer}]
        (turn,) = read_conversation({"messages": talk, **beside}).turns
        assert (turn.question, turn.answer) == ("Is A left of B?", answer)


@pytest.mark.parametrize("options", [["in", "on"], ["he", "she"], ["12", "1"]])
def test_options_that_are_parts_of_a_questions_words_reach_the_prompt(options):
    question = "What is the cat in picture 123 sitting on in the image?"
    asked = said({"question": question, "options": options, "answer": options[1]})
    assert asked == (f"{question}\nA. {options[0]}\nB. {options[1]}", options[1])


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
