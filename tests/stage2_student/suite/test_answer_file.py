"""Answers for outside scorers: LLaVA's answers file for every benchmark, and what each one's own evaluation reads."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yes_no_files as files

from vlm_distill_cache.data.benchmarks.items import Benchmark, OpenItem
from vlm_distill_cache.data.benchmarks.search import find_benchmarks
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.stage2_student.suite.answer_file import answer_lines, submissions
from vlm_distill_cache.stage2_student.suite.metrics.table import METRICS
from vlm_distill_cache.stage2_student.suite.requests import Generate, Request, Result, Weigh


def answered(benchmark: Benchmark) -> tuple[list[tuple[Request, ...]], list[list[Result]]]:
    """Every item, answered with its place and a tab and a line that files must not break at."""
    requests = [METRICS[benchmark.metric].requests(item, benchmark.instruction) for item in benchmark.items]
    results: list[list[Result]] = [
        [f"Yes,\t{place}\n" if isinstance(request, Generate) else [[0.0, 1.0], [0.0, 1.0]] for request in asked]
        for place, asked in enumerate(requests)
    ]
    return requests, results


def read(folder: Path) -> tuple[Benchmark, list[tuple[Request, ...]], list[list[Result]]]:
    (benchmark,) = find_benchmarks(folder).benchmarks.values()
    return benchmark, *answered(benchmark)


def test_an_answers_file_has_the_published_ids_and_the_prompt_that_was_asked(tmp_path: Path):
    files.write_questions(tmp_path)
    benchmark, requests, results = read(tmp_path)
    lines = list(answer_lines(benchmark, requests, results, "m"))
    rows = [json.loads(line) for line in lines]
    assert [set(row) for row in rows] == [{"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}] * 2
    assert [row["question_id"] for row in rows] == ["scene/1.png"] * 2
    assert [row["prompt"] for row in rows] == ["What is it?\nSay it.", "What is it?\nSay more."]
    assert [row["text"] for row in rows] == ["Yes,\t0\n", "Yes,\t1\n"]
    assert len({row["answer_id"] for row in rows}) == 2
    assert lines == list(answer_lines(benchmark, requests, results, "m"))
    assert submissions(benchmark, requests, results) == {}


def test_popes_own_files_have_a_line_a_question_in_its_order(tmp_path: Path):
    files.write_pope(tmp_path, "github")
    benchmark, requests, results = read(tmp_path)
    (line, *_) = answer_lines(benchmark, requests, results, "m")
    assert json.loads(line)["question_id"] == 1
    assert json.loads(line)["prompt"].endswith("?\nAnswer the question using a single word or phrase.")
    written = submissions(benchmark, requests, results)
    assert set(written) == {f"answers_{split}.json" for split in files.POPE}
    for split, rows in files.POPE.items():
        told = [json.loads(line) for line in written[f"answers_{split}.json"].splitlines()]
        assert [row["question"] for row in told] == [text for _, _, text, _ in rows]


def test_mmes_results_have_four_cells_and_two_lines_a_picture(tmp_path: Path):
    files.write_mme(tmp_path, "folders")
    benchmark, requests, results = read(tmp_path)
    ids = {json.loads(line)["question_id"] for line in answer_lines(benchmark, requests, results, "m")}
    assert ids == {f"{task}/{rows[0][0]}" for task, rows in files.MME.items()}
    written = submissions(benchmark, requests, results)
    assert set(written) == {f"{task}.txt" for task in files.MME}
    for task, rows in files.MME.items():
        cells = [line.split("\t") for line in written[f"{task}.txt"].splitlines()]
        assert [row[:3] for row in cells] == [[name, text, files.yes(right)] for name, _, text, right in rows]
        assert all(row[3].startswith("Yes, ") for row in cells)


def test_hallusionbench_gets_its_rows_back_with_predictions_and_nlvr_a_csv(tmp_path: Path):
    files.write_hallusion(tmp_path / "a", "github")
    (text,) = submissions(*read(tmp_path / "a")).values()
    rows = json.loads(text)
    published = json.loads((tmp_path / "a/HallusionBench.json").read_text())
    assert [{key: row[key] for key in published[0]} for row in rows] == published
    assert rows[1]["model_prediction"] == "Yes,\t1\n"
    files.write_nlvr(tmp_path / "b")
    (text,) = submissions(*read(tmp_path / "b")).values()
    assert text.splitlines()[:2] == ["dev-5-0-0.png,True", "dev-5-0-1.png,True"]
    files.write_nlvr2(tmp_path / "c", "github")
    (text,) = submissions(*read(tmp_path / "c")).values()
    assert text.splitlines()[0] == "dev-7-0-1,True"


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("vqav2", [{"question_id": 42, "answer": "red"}]),
        ("vizwiz", [{"image": "VizWiz_test_7.jpg", "answer": "red"}]),
        ("gqa", [{"questionId": "VizWiz_test_7.jpg", "prediction": "red"}]),
        ("docvqa", [{"questionId": 42, "answer": "red"}]),
    ],
)
def test_servers_get_their_list_of_ids_and_answers(layout: str, expected: list[dict[str, object]]):
    item = OpenItem(item_id="VizWiz_test_7.jpg", image=None, question="Which?", extra={"question_id": 42})
    benchmark = Benchmark(name="b", layout=layout, title="B", items=[item], metric="any")
    written = submissions(benchmark, [[Generate(image=None, question="Which?")]], [["red"]])
    assert json.loads(written["submission.json"]) == expected
    untold = replace(
        benchmark, items=[replace(item, item_id="7", extra={})]
    )  # the place in a table, which no server knows
    assert bool(submissions(untold, [[Generate(image=None, question="Which?")]], [["red"]])) == (layout == "gqa")


def test_an_item_asked_in_several_ways_has_one_line_of_the_question_as_published():
    item = OpenItem(item_id="7", image=None, question="Which?")
    benchmark = Benchmark(name="b", layout="mmbench", title="B", items=[item], metric="any")
    asked = [
        [Weigh(image=None, question="Which?", answers=("A", "B")), *(Generate(image=None, question=q) for q in "12")]
    ]
    (line,) = answer_lines(benchmark, asked, [[[[0.0, 1.0]] * 2, "A", "B"]], "m")
    assert (json.loads(line)["prompt"], json.loads(line)["text"]) == ("1", "A")


def test_the_prompt_of_scienceqa_has_the_mark_of_its_picture(tmp_path: Path):
    item = OpenItem(item_id="7", image=None, question="Which?")
    asked = [[Generate(image=image, question="Which?")] for image in (ImageFile(tmp_path / "1.png"), None)]
    prompts = {
        layout: [
            json.loads(line)["prompt"]
            for line in answer_lines(
                Benchmark(name="b", layout=layout, title="B", items=[item, item], metric="any"),
                asked,
                [["A"], ["A"]],
                "m",
            )
        ]
        for layout in ("scienceqa", "gqa")
    }
    assert prompts == {"scienceqa": ["<image>\nWhich?", "Which?"], "gqa": ["Which?", "Which?"]}


def test_ids_of_a_table_without_types_are_numbers_where_its_scorers_have_numbers():
    item = OpenItem(item_id="7", image=None, question="Which?", extra={"question_id": "7"})
    asked: list[list[Request]] = [[Generate(image=None, question="Which?")]]
    ids = []
    for layout in ("mmbench", "gqa"):
        benchmark = Benchmark(name="b", layout=layout, title="B", items=[item], metric="any")
        ids += [json.loads(line)["question_id"] for line in answer_lines(benchmark, asked, [["B"]], "m")]
    assert ids == [7, "7"]
