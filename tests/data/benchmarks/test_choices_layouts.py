"""Questions with options are read as published, whatever file they came in, and nothing of them is lost in silence."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from choices_files import (
    ai2d,
    mmbench_hub_rows,
    mmbench_rows,
    mmstar_rows,
    scienceqa,
    scienceqa_llava,
    scienceqa_problems,
    seedbench,
    stored,
    text_png,
    write_pictures,
    write_table,
)

from vlm_distill_cache.data.benchmarks.items import Benchmark, ChoiceItem
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.data.sources.inline_options import split_options


def read(folder: Path) -> Benchmark:
    found = find_benchmarks(folder)
    (benchmark,) = found.benchmarks.values()
    return benchmark


def items_of(benchmark: Benchmark) -> Sequence[ChoiceItem]:
    return cast("Sequence[ChoiceItem]", benchmark.items)


def told(item: ChoiceItem) -> tuple[Any, ...]:
    colour = item.image.load().getpixel((0, 0)) if item.image is not None else None
    return item.question, item.options, item.right, colour


RED, BLUE, GREEN, WHITE = (255, 0, 0), (0, 0, 255), (0, 128, 0), (255, 255, 255)


@pytest.mark.parametrize("form", ["tsv", "hub", "json"])
def test_mmbench_is_its_questions_with_their_rotations_behind_them(tmp_path: Path, form: str):
    if form == "hub":
        write_table(tmp_path / "MMBench" / "en" / "dev-00000-of-00001.parquet", mmbench_hub_rows())
    else:
        write_table(tmp_path / f"MMBench_DEV_EN.{form}", mmbench_rows())
    benchmark = read(tmp_path)
    assert (benchmark.layout, benchmark.metric) == ("mmbench", "circular")
    assert benchmark.name == ("mmbench-en-dev" if form == "hub" else "mmbench-dev-en")
    assert not benchmark.left_out
    items = items_of(benchmark)
    assert [item.item_id for item in items] == ["3", "1000003", "2000003", "8", "1000008"]
    assert [(item.group, item.extra["turn"], item.extra["turns"]) for item in items] == [
        *(("3", turn, 3) for turn in range(3)),
        *(("8", turn, 2) for turn in range(2)),
    ]
    assert told(items[0]) == ("Which colour is it?", ("red", "blue", "green"), 0, RED)
    assert told(items[2]) == ("Which colour is it?", ("green", "red", "blue"), 1, RED)
    assert told(items[4]) == ("Is it snow or sand?", ("sand", "snow"), 1, WHITE)
    assert [item.hint for item in items[2:4]] == ["", "It is cold."]
    assert [(item.kind, item.extra["kinds"]) for item in items[2:4]] == [
        ("perception", ["colour"]),
        ("reasoning", ["substance"]),
    ]
    assert [item.extra["question_id"] for item in items[:2]] == [3, 1_000_003]  # as outside scorers compare them
    assert benchmark.instruction == "Answer with the option's letter from the given choices directly."


def test_mmbench_without_answers_or_rotations_and_rows_that_share_no_picture_are_said(tmp_path: Path):
    rows = mmbench_rows(circular=False, answers=False)
    rows += [{**rows[0], "index": 11, "image": "12"}, {**rows[0], "index": 2_000_003, "A": "other", "image": "8"}]
    write_table(tmp_path / "MMBench_TEST_EN.tsv", rows)
    benchmark = read(tmp_path)
    assert benchmark.metric == "circular"
    assert [(item.item_id, item.group, item.right) for item in items_of(benchmark)] == [
        ("3", "", None),
        ("8", "", None),
        ("2000003", "", None),  # its options are others: no rotation
    ]
    assert "'12', the index of another row, and no row" in benchmark.left_out["11"]
    assert any("kept secret" in note for note in benchmark.notes)
    assert items_of(benchmark)[2].image.load().getpixel((0, 0)) == WHITE  # type: ignore[union-attr]


def test_a_question_that_lacks_a_rotation_is_left_out_whatever_is_missing(tmp_path: Path):
    for number, missing in enumerate(["no row", "an empty option", "a row twice", "no first row", "a bad answer"]):
        rows = [{**row, "image": text_png("red")} for row in mmbench_rows()]
        place = next(place for place, row in enumerate(rows) if row["index"] == (3 if number == 3 else 2_000_003))
        if number in (0, 3):
            del rows[place]
        else:
            rows[place] |= ({"B": ""}, {"index": 1_000_003}, {}, {"answer": "x"})[number - 1]
        if number == 2:
            rows[place] |= {key: rows[2][key] for key in "ABC"}
        write_table(tmp_path / str(number) / "MMBench_DEV_EN.tsv", rows)
        benchmark = read(tmp_path / str(number))
        assert [item.item_id for item in items_of(benchmark)] == ["8", "1000008"], missing
        said = "question 3 has 3 options, and so as many rotations; " + ("3 rows" if number == 2 else "2 rows")
        assert any(said in why for why in benchmark.left_out.values()), missing


def test_options_of_the_same_text_have_all_their_rotations(tmp_path: Path):
    row = {"question": "Which?", "image": text_png("red"), "category": "own", "l2-category": "own"}
    asked = {4: ["same", "same"], 6: ["x", "y", "x", "y"], 7: ["x", "same", "same"]}
    rows = [
        {
            "index": index + turn * 1_000_000,
            **row,
            **dict.fromkeys("ABCD", ""),
            **dict(zip("ABCD", [*texts[turn:], *texts[:turn]], strict=False)),
        }
        | {"answer": "ABCD"[-turn % len(texts)]}
        for index, texts in asked.items()
        for turn in range(len(texts))
    ]
    write_table(tmp_path / "MMBench_DEV_EN.tsv", rows)
    benchmark = read(tmp_path)
    assert not benchmark.left_out
    assert [(item.group, item.extra["turn"]) for item in items_of(benchmark)] == [
        (str(index), turn) for index, texts in asked.items() for turn in range(len(texts))
    ]


def test_options_between_commas_are_chosen_by_their_whole_text(tmp_path: Path):
    rows = [{"question": "Which?", "choices": "3,1,2", "answer": "1", "image": text_png("red")}]
    rows += [{**rows[0], "choices": "square,circle", "answer": answer} for answer in ("circle", "A", "0")]
    (tmp_path / "iconqa.json").write_text(json.dumps(rows))
    benchmark = read(tmp_path)
    assert [(item.options, item.right) for item in items_of(benchmark)] == [
        (("3", "1", "2"), 1),
        (("square", "circle"), 1),
    ]
    assert all(
        "is none of its 2 options (the answers of this file are texts)" in why for why in benchmark.left_out.values()
    )
    assert len(benchmark.left_out) == 2


def test_a_table_that_pandas_wrote_with_floats_keeps_rotations_and_shared_pictures(tmp_path: Path):
    rows = [{**row, "index": float(row["index"])} for row in mmbench_rows()]
    rows = [{key: value for key, value in row.items() if key not in ("hint", "source", "comment")} for row in rows]
    rows.append({**rows[0], "index": 9.0, "image": "8.0"})
    rows = [{**row, "image": f"{row['image']}.0" if row["image"].isdigit() else row["image"]} for row in rows]
    write_table(tmp_path / "MMBench_DEV_EN.tsv", rows)
    benchmark = read(tmp_path)
    assert (benchmark.layout, benchmark.metric) == ("mmbench", "circular")
    assert [item.extra["question_id"] for item in items_of(benchmark)] == [3, 1_000_003, 2_000_003, 8, 1_000_008]
    assert told(items_of(benchmark)[2])[3] == RED
    assert "question 9 has 3 options" in benchmark.left_out["9"]


def test_answers_hints_and_labels_are_read_under_all_their_names(tmp_path: Path):
    row = {"question": "Which?", "choices": {"text": ["cat", "dog"], "label": ["1", "2"]}, "answerKey": "2"}
    row |= {"hint": "Look.", "context": "It barks.", "image": text_png("red")}
    (tmp_path / "own.json").write_text(json.dumps([row, {**row, "answerKey": "1"}]))
    (tmp_path / "other.json").write_text(json.dumps([{**row, "answerKey": None}]))
    (tmp_path / "none.json").write_text(
        json.dumps([{"solved": "2", **row, "answerKey": "2"}]).replace("answerKey", "key")
    )
    found = find_benchmarks(tmp_path).benchmarks
    assert [(item.right, item.hint) for item in items_of(found["own"])] == [
        (place, "Look.\nIt barks.") for place in (1, 0)
    ]
    assert "its answers are kept secret" in str(found["other"].notes)
    assert "no answers: none of answer, answerKey, " in str(found["none"].notes)
    assert "(these have solved, question" in str(found["none"].notes)


@pytest.mark.parametrize("form", ["hub", "tsv"])
def test_mmstar_has_its_options_told_from_its_questions(tmp_path: Path, form: str):
    if form == "hub":
        write_table(tmp_path / "mmstar.parquet", mmstar_rows())
    else:
        write_table(tmp_path / "MMStar.tsv", mmstar_rows(inline=False))
    benchmark = read(tmp_path)
    assert (benchmark.name, benchmark.metric) == ("mmstar", "choices")
    one, other = items_of(benchmark)
    assert told(one) == ("What is left?", ("a cat, at rest", "a dog", "a cow", "a hen"), 1, RED)
    assert told(other) == ("What is x?", ("2.5", "3.5"), 0, BLUE)
    assert (one.kind, one.extra["kinds"]) == ("logical reasoning", ["order"])
    # Asked as it was published, where the options stand in the question.
    assert one.extra.get("asked") == (mmstar_rows()[0]["question"] if form == "hub" else None)


def test_seedbench_is_read_with_the_names_of_its_types_and_videos_by_a_frame(tmp_path: Path):
    seedbench(tmp_path / "seed")
    benchmark = read(tmp_path)
    assert (benchmark.layout, benchmark.name) == ("seedbench", "seed-bench")
    assert [told(item) for item in items_of(benchmark)] == [
        ("How many?", ("One", "Two", "Three", "Four"), place, colour) for place, colour in enumerate([RED, BLUE, GREEN])
    ]
    assert [(item.kind, item.extra["kinds"]) for item in items_of(benchmark)][1:] == [
        ("Instances Counting", ["image"]),
        ("Action Recognition", ["video"]),
    ]
    assert items_of(benchmark)[0].extra["question_id"] == "101"
    (why,) = benchmark.left_out.values()
    assert "it is about the video 'P02_cut.mp4'" in why
    assert "P02_cut.png" in why


def test_seedbench_of_the_hub_asks_about_one_picture_and_leaves_out_several(tmp_path: Path):
    row = {"answer": "B", "choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    row |= {"data_id": "454", "data_type": "image", "question": "How many?", "question_id": "7", "segment": None}
    rows = [
        {**row, "question_type_id": 5, "image": [stored("red")]},
        {**row, "question_type_id": 10, "image": [stored("red"), stored("blue")], "question_id": "8"},
    ]
    video = {**row, "question_type_id": 12, "data_type": "video", "question_id": "9"}
    rows.append({**video, "image": [stored(colour) for colour in ("red", "blue", "green", "white")]})
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    benchmark = read(tmp_path)
    assert [told(item)[2:] for item in items_of(benchmark)] == [(1, RED), (1, GREEN)]
    assert benchmark.notes == ["of each video whose frames stand in its row, the middle one is asked about"]
    assert items_of(benchmark)[0].kind == "type 5"
    (why,) = benchmark.left_out.values()
    assert "it is about 2 pictures" in why


@pytest.mark.parametrize("ids", [True, False])
def test_ai2d_asks_about_words_and_letters_with_the_picture_that_has_them(tmp_path: Path, ids: bool):
    ai2d(tmp_path / "ai2d", ids=ids)
    benchmark = read(tmp_path)
    assert benchmark.name == ("ai2d-test" if ids else "ai2d")
    assert [told(item) for item in items_of(benchmark)][-2:] == [
        ("What is 1?", ("ear", "nose", "toe"), 2, RED),
        ("Which is 1?", ("A", "B", "C"), 1, BLUE),
    ]
    assert len(benchmark.items) == (2 if ids else 4)
    assert any("ai2d_test_ids.csv" in note for note in benchmark.notes) is not ids
    (tmp_path / "ai2d" / "abc_images" / "1.png").unlink()
    (why,) = read(tmp_path).left_out.values()
    assert "no picture" in why
    assert "abc_images/1.png" in why


def test_scienceqa_is_one_benchmark_a_split_and_takes_no_picture_of_another_problem(tmp_path: Path):
    scienceqa(tmp_path / "scienceqa")
    found = find_benchmarks(tmp_path).benchmarks
    assert set(found) == {"scienceqa-test", "scienceqa-val"}
    test = found["scienceqa-test"]
    assert [told(item) for item in items_of(test)] == [
        ("Which is it?", ("ice", "sand", "fog"), 0, WHITE),
        ("Which is it?", ("ice", "sand", "fog"), 1, None),
    ]
    assert [[item.kind, *item.extra["kinds"]] for item in items_of(test)] == [
        ["NAT", "TXT", "IMG", "G7-12"],
        ["LAN", "NO", "G1-6"],
    ]
    assert [item.hint for item in items_of(test)] == ["Context: It is cold.", ""]
    (why,) = test.left_out.values()
    assert "no picture 'test/5/choice_0.png'" in why
    assert test.notes == ["1 questions of the split 'train' are not asked"]
    assert [item.right for item in items_of(found["scienceqa-val"])] == [2]
    assert not found["scienceqa-val"].left_out
    (tmp_path / "scienceqa" / "problems.json").unlink()
    assert "without problems.json" in next(iter(find_benchmarks(tmp_path).unread.values()))


def test_scienceqa_of_the_hub_and_of_llava_is_read_too(tmp_path: Path):
    rows = [{**row, "image": stored("blue") if row["image"] else None} for row in scienceqa_problems().values()]
    rows = [{key: value for key, value in row.items() if key != "split"} for row in rows]
    write_table(tmp_path / "hub" / "ScienceQA" / "data" / "test-00000-of-00001.parquet", rows)
    write_table(tmp_path / "llava" / "llava_test_CQM-A.json", scienceqa_llava())
    write_pictures(tmp_path / "llava", {"images/test/2/image.png": "white"})
    found = find_benchmarks(tmp_path)
    assert not found.unread
    hub, llava = found.benchmarks.values()
    assert [told(item)[2:] for item in items_of(hub)] == [(0, None), (0, BLUE), (1, None), (2, BLUE), (2, None)]
    assert [told(item)[1:] for item in items_of(llava)] == [(("ice", "sand"), 0, WHITE), (("ice", "sand"), 1, None)]
    assert [item.kind for item in items_of(llava)] == ["TXT", "NO"]
    assert "<image>" not in items_of(llava)[0].extra["asked"]


def test_ai2d_of_the_hub_counts_from_zero_whatever_its_options_are(tmp_path: Path):
    row = {"id": "4", "question": "How many?", "options": ["1", "2", "3"], "answer": "1", "image": stored("red")}
    write_table(tmp_path / "data" / "test-00000-of-00001.parquet", [row, {**row, "answer": "0"}])
    benchmark = read(tmp_path)
    assert (benchmark.name, benchmark.layout) == ("ai2d-test", "ai2d")
    assert [told(item)[1:] for item in items_of(benchmark)] == [(("1", "2", "3"), place, RED) for place in (1, 0)]


CATS = {"question": "Which?", "options": ["cat", "dog", "cow"], "image": "a.png"}


@pytest.mark.parametrize(
    ("rows", "right", "note"),
    [
        ([{**CATS, "id": 4, "answer": "2"}, {**CATS, "answer": "0"}], [2, 0], "counted from 0"),
        ([{**CATS, "answer": 3}, {**CATS, "answer": 1}], [2, 0], "counted from 1"),
        ([{**CATS, "answer": "C"}, {**CATS, "answer": "(a)"}], [2, 0], None),
        ([{**CATS, "answer": "cow"}, {**CATS, "answer": "Cat."}], [2, 0], None),
        ([{**CATS, "label": 2}, {**CATS, "label": -1}], [2, None], "counted from 0"),
        ([{**CATS, "options": "['1', '2', '3']", "answer": "1"}, {**CATS, "answer": "0"}], [1, 0], "counted from 0"),
        (
            [{"index": 1, "question": "Which?", "A": "cat", "B": "dog", "C": "", "answer": "B", "image": "a.png"}],
            [1],
            None,
        ),
        ([{"question": "Which?\nA. cat\nB. dog", "answer": "B", "image": "a.png"}], [1], None),
        ([{"question": "Who?", "choices": ["x", "y"], "correct_choice_idx": 1, "image_id": 42}], [1], "counted from 0"),
    ],
)
def test_answers_of_one_file_are_all_letters_or_numbers_or_texts(
    tmp_path: Path, rows: Any, right: Any, note: str | None
):
    write_pictures(tmp_path / "own" / "images", {"a.png": "red", "000000000042.jpg": "red"})
    (tmp_path / "own" / "test.json").write_text(json.dumps(rows))
    benchmark = read(tmp_path)
    assert (benchmark.name, benchmark.layout, benchmark.metric) == ("own-test", "options", "choices")
    assert [item.right for item in items_of(benchmark)] == right
    assert all(item.image.load().getpixel((0, 0)) == RED for item in items_of(benchmark))  # type: ignore[union-attr]
    assert (note is None and not benchmark.notes) or note in str(benchmark.notes)


def test_pictures_inside_a_listed_row_are_read_and_rows_without_any_are_said(tmp_path: Path):
    row = {"question": "Which?", "choices": ["cat", "dog"], "answer": "B"}
    rows = [{**row, "image": text_png("red")}, {**row, "image": [text_png("blue")]}]
    (tmp_path / "own.json").write_text(json.dumps({"info": {}, "data": rows}))
    (tmp_path / "texts.json").write_text(json.dumps([row]))
    own, texts = find_benchmarks(tmp_path).benchmarks.values()
    assert [told(item)[2:] for item in items_of(own)] == [(1, RED), (1, BLUE)]
    assert not own.notes
    assert [told(item)[2:] for item in items_of(texts)] == [(1, None)]
    assert any("as texts alone" in note for note in texts.notes)


def test_a_table_with_rotations_of_any_name_is_counted_in_a_circle(tmp_path: Path):
    row = {"question": "Which?", "category": "own", "image": text_png("red")}
    rows = [
        {"index": 5, "g_index": 5, **row, "A": "cat", "B": "dog", "answer": "A"},
        {"index": 9, "g_index": 5, **row, "A": "dog", "B": "cat", "answer": "B"},
        {"index": 6, "g_index": 6, **row, "A": "x", "B": "y", "answer": "B"},
    ]
    write_table(tmp_path / "CCBench.tsv", rows)
    benchmark = read(tmp_path)
    assert (benchmark.name, benchmark.metric) == ("ccbench", "circular")
    assert [(item.group, item.extra["turn"], item.extra["turns"]) for item in items_of(benchmark)] == [
        ("5", 0, 2),
        ("5", 1, 2),
    ]
    assert (
        "2 options, and so as many rotations; 1 rows" in benchmark.left_out["6"]
    )  # nothing tells whether all are right


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([{**CATS, "options": ["1", "2", "3"], "answer": "1"}], "its answers may be numbers or texts"),
        ([{**CATS, "options": [1.0, 2.0, 3.0], "answer": 1}], "its answers may be numbers or texts"),
        ([{**CATS, "options": ["B. cat", "A. dog"], "answer": "B"}], "options out of order: they are labelled B, A"),
        ([{**CATS, "answer": 1}, {**CATS, "answer": 2}], "may be counted from 0 or from 1; write letters"),
        ([{**CATS, "answer": "A"}, {**CATS, "answer": "hen"}], "'hen' is none of its 3 options"),
        ([{**CATS, "answer": "A"}, {**CATS, "answer": "A", "image": "b.png"}], r"no picture 'b.png' below"),
        (
            [{**CATS, "answer": "A"}, {**CATS, "answer": "A", "image": None, "image_id": 7}],
            "no picture of the number 7",
        ),
        ([{**CATS, "answer": "A"}, {**CATS, "answer": "A", "image_2": "b.png"}], "it is about 2 pictures"),
        (
            [{**CATS, "answer": "A"}, {**CATS, "answer": "A", "options": ["b.png", "a.png"]}],
            "holds pictures to choose from",
        ),
        ([{**CATS, "answer": "A"}, {"question": "Which?", "answer": "A", "image": "a.png"}], "it has no options"),
    ],
)
def test_what_cannot_be_asked_is_said(tmp_path: Path, rows: Any, why: str):
    write_pictures(tmp_path, {"a.png": "red"})
    (tmp_path / "test.json").write_text(json.dumps(rows))
    found = find_benchmarks(tmp_path)
    said = [*found.unread.values(), *(text for each in found.benchmarks.values() for text in each.left_out.values())]
    assert any(why in text for text in said), said
    assert len(said) == 1
    assert all(len(each.items) == 1 for each in found.benchmarks.values())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("Which?\nOptions: A: up, then left, B: down., C: A, D: B", ("Which?", ("up, then left", "down.", "A", "B"))),
        ("Which?\nA. U.S. plan\nB. J. B. Smith\nC. none", ("Which?", ("U.S. plan", "J. B. Smith", "none"))),
        ("Is A or B?\n(A) both (B) and (C)\n(B) none\n(C) one", ("Is A or B?", ("both (B) and (C)", "none", "one"))),
        ("Which?\nA. x\nB. y\n\nPlease answer with the letter.", ("Which?", ("x", "y"))),
        ("Which? A. cat B. dog C. cow", ("Which?", ("cat", "dog", "cow"))),
        ("Which?\nA. cat\nB. vitamin C. is good", None),  # two options, or three
        ("In figure A. Is it B?", None),
        ("Which? A: x, B: y, B: z", None),
        ("Which colour is it?", None),
    ],
)
def test_options_inside_a_question_are_told_apart_or_not_at_all(text: str, parts: Any):
    assert split_options(text) == parts
