"""Benchmarks of short answers are read from the files that their authors publish, and from those of the hub."""

import base64
import json
from pathlib import Path
from typing import cast

import answers_files as files
import pytest

from vlm_distill_cache.data.benchmarks import short_answers
from vlm_distill_cache.data.benchmarks.items import Benchmark, OpenItem
from vlm_distill_cache.data.benchmarks.search import find_benchmarks


def read(folder: Path) -> dict[str, Benchmark]:
    found = find_benchmarks(folder)
    assert not found.unread
    return dict(found.benchmarks)


class _Breaks:
    """In place of a pattern: stops a reader at a file of that name."""

    def sub(self, new: str, text: str) -> str:
        if text == "breaks":
            raise TypeError("of another kind")
        return text


def items(benchmark: Benchmark) -> list[OpenItem]:
    assert not benchmark.left_out
    return cast("list[OpenItem]", list(benchmark.items))


def shade(item: OpenItem) -> int:
    assert item.image is not None
    return cast("tuple[int, ...]", item.image.load().getpixel((0, 0)))[0]


def test_vqav2_joins_questions_with_their_answers_and_pictures(tmp_path: Path):
    files.write_vqav2(tmp_path / "a")
    files.write_vqav2(tmp_path / "b", "test-dev2015", annotated=False)
    found = read(tmp_path)
    assert set(found) == {"vqav2-val2014", "vqav2-testdev2015"}
    one, two, three = items(found["vqav2-val2014"])
    assert (one.item_id, one.question, one.answers) == ("42000", "What colour is the roof?", tuple(files.TEN))
    assert [item.kind for item in (one, two, three)] == ["other", "yes/no", "number"]
    assert one.extra["subsets"] == ["what colour is the"]
    assert [shade(item) for item in (one, two, three)] == [42, 42, 73]
    secret = found["vqav2-testdev2015"]
    assert [item.answers for item in items(secret)] == [(), (), ()]
    assert "kept secret" in secret.notes[0]
    assert secret.instruction == "Answer the question using a single word or phrase."


def test_okvqa_is_told_from_vqav2_and_a_picture_belongs_to_the_nearest(tmp_path: Path):
    files.write_vqav2(tmp_path / "vqav2")
    files.write_okvqa(tmp_path / "okvqa")
    found = read(tmp_path)
    assert set(found) == {"vqav2-val2014", "okvqa-val2014"}
    one, two = items(found["okvqa-val2014"])
    assert one.answers == ("mason",) * 6 + ("builder",) * 4
    assert [item.extra["subsets"] for item in (one, two)] == [["Crafts"], ["Weather"]]
    assert [shade(one), shade(two)] == [142, 173]


def test_answers_without_questions_and_answers_that_contradict_are_said(tmp_path: Path):
    files.write_vqav2(tmp_path)
    (tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json").rename(tmp_path / "questions.txt")
    found = find_benchmarks(tmp_path)
    (why,) = found.unread.values()
    assert "question_id and image_id" in why
    (tmp_path / "questions.txt").rename(tmp_path / "questions.json")
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    (tmp_path / "again.json").write_text(annotations.read_text())  # a copy is no contradiction
    assert set(read(tmp_path)) == {"vqav2-val2014"}
    (tmp_path / "again.json").write_text(annotations.read_text().replace("maroon", "crimson"))
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    assert any("again.json" in why and "differently" in why for why in found.unread.values())


def test_tables_of_the_hub_hold_their_pictures(tmp_path: Path):
    vqa = {"question_type": "is the", "multiple_choice_answer": "yes", "answers": files.ten(), "image_id": 7}
    vqa |= {"answer_type": "yes/no", "question_id": 7000, "question": "Is the door open?", "image": files.picture(1)}
    hidden = {**vqa, "question_type": None, "multiple_choice_answer": None, "answers": None, "answer_type": None}
    ok = {"question_id": "a1", "image": files.picture(2), "question": "Which trade?", "answers": files.TEN}
    ok |= {"question_type": "nine", "answer_type": "other"}
    text = [{**row, "image": files.picture(3)} for row in files.textvqa_rows()]
    blank = [{**row, "image": files.picture(3)} for row in files.textvqa_rows(secret=True)]
    blind = {"question_id": "VizWiz_val_00000000.jpg", "image": files.picture(4), "question": "What is it?"}
    blind |= {"answers": ["unanswerable"] * 10, "category": "unanswerable"}
    wiz = {"id": 0, "image": files.picture(5), "filename": "VizWiz_train_00000001.jpg", "question": "What is it?"}
    wiz |= {"answers": files.TEN, "answers_original": files.ten(), "answer_type": "other", "answerable": 1}
    doc = [{**row, "image": files.picture(6)} for row in files.docvqa_rows()]
    info = {"questionId": "9", "question": "How many?", "answers": ["12"], "answer_type": ["non-extractive"]}
    info |= {"image": files.picture(7), "image_url": "", "operation/reasoning": ["counting"], "data_split": "val"}
    chart = [
        {"image": files.picture(8), "query": "Which?", "label": ["[Wheat, Rye]"], "human_or_machine": n} for n in (0, 1)
    ]
    typed = [
        {"type": f"{kind}_test", "question": "Which?", "answer": "Rye", "image": files.picture(9)}
        for kind in ("human", "augmented")
    ]
    tables = {
        "vqa/data/validation": [vqa],
        "vqa/data/testdev": [hidden],
        "ok/val2014": [ok],
        "text/validation": text,
        "text/test": blank,
        "blind/val": [blind],
        "wiz/train": [wiz],
        "doc/validation": doc,
        "info/validation": [info],
        "chart/test": chart,
        "typed/test": typed,
    }
    for name, rows in tables.items():
        files.table(tmp_path / f"{name}-00000-of-00001.parquet", rows)
    found = read(tmp_path)
    assert {name: (benchmark.metric, len(benchmark.items)) for name, benchmark in found.items()} == {
        "vqav2-val": ("vqa_accuracy", 1),
        "vqav2-testdev": ("vqa_accuracy", 1),
        "okvqa-val2014": ("vqa_accuracy", 1),
        "textvqa-val": ("textvqa_accuracy", 2),
        "textvqa-test": ("textvqa_accuracy", 2),
        "vizwiz-val": ("vizwiz_accuracy", 1),
        "vizwiz-train": ("vizwiz_accuracy", 1),
        "docvqa-val": ("anls", 2),
        "infographicvqa-val": ("anls", 1),
        "chartqa-test": ("relaxed_accuracy", 2),
        "chartqa-test.2": ("relaxed_accuracy", 2),
    }
    first = {name: items(benchmark)[0] for name, benchmark in found.items()}
    shades = {name.partition("-")[0]: shade(item) for name, item in sorted(first.items())}
    assert shades == {"vqav2": 1, "okvqa": 2, "textvqa": 3, "vizwiz": 4, "docvqa": 6, "infographicvqa": 7, "chartqa": 9}
    assert first["vqav2-val"].answers == first["okvqa-val2014"].answers == tuple(files.TEN)
    assert first["okvqa-val2014"].extra["subsets"] == ["Science and Technology"]
    assert first["vqav2-testdev"].answers == first["textvqa-test"].answers == ()
    assert first["vizwiz-val"].extra == {"answerable": 0}
    assert first["vizwiz-train"].extra == {"answerable": 1}
    assert first["chartqa-test"].answers == ("[Wheat, Rye]",)
    assert [item.kind for item in items(found["chartqa-test"])] == ["human", "augmented"]
    assert [item.kind for item in items(found["chartqa-test.2"])] == ["human", "augmented"]


def test_gqa_reads_questions_by_id_choices_and_tables_of_pictures(tmp_path: Path):
    files.write_gqa(tmp_path / "authors")
    rows = [{"id": item_id, **files.gqa_question(item_id)} for item_id in ("101", "104")]
    rows = [{**row, "entailed": str(row["entailed"])} for row in rows]
    files.table(tmp_path / "hub" / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    pd = pytest.importorskip("pandas")
    (tmp_path / "csv").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "csv" / "testdev.csv", index=False)
    images = [{"id": name, "image": files.picture(shade)} for name, shade in (("n77", 200), ("2388", 201))]
    files.table(tmp_path / "hub" / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", images)
    authors, hub = read(tmp_path / "authors")["gqa-val-all"], read(tmp_path / "hub")["gqa-testdev"]
    written = find_benchmarks(tmp_path / "csv", images=[tmp_path / "authors"]).benchmarks["gqa-testdev"]
    assert [item.extra for item in items(written)] == [item.extra for item in items(hub)]
    assert [shade(item) for item in items(authors)] == [1, 1, 1, 2]
    assert [shade(item) for item in items(hub)] == [200, 201]
    first = items(authors)[0]
    assert (first.item_id, first.question, first.answers) == ("101", "Is the gate wooden?", ("yes",))
    assert first.extra["subsets"] == ["binary", "verify", "attribute"]
    assert first.extra["valid"] == ["yes", "no", "wood", "tree"]
    assert items(hub)[0].extra["entailed"] == ["101", "102", "103"]
    assert any("1 of 5 questions" in note for note in authors.notes)  # 999


def test_the_authors_json_of_text_blind_documents_and_charts(tmp_path: Path):
    for name in ("textvqa", "vizwiz", "docvqa", "chartqa"):
        getattr(files, f"write_{name}")(tmp_path / name)
    found = read(tmp_path)
    assert set(found) == {"textvqa-val", "vizwiz-val", "vizwiz-test", "docvqa-val", "chartqa-test"}
    assert [(item.item_id, shade(item)) for item in items(found["textvqa-val"])] == [("34600", 1), ("34601", 2)]
    assert items(found["textvqa-val"])[1].answers == ("baker's",) * 4 + ("baker",) * 6
    wiz = items(found["vizwiz-val"])
    assert [(item.kind, item.extra["answerable"]) for item in wiz] == [("unanswerable", 0), ("other", 1), ("other", 1)]
    assert wiz[0].item_id == "VizWiz_val_00000000.jpg"
    assert wiz[0].answers == ("unanswerable",) * 8 + ("tin",) * 2
    assert items(found["vizwiz-test"])[0].answers == ()
    documents = items(found["docvqa-val"])
    assert documents[0].answers == ("M. Adler", "Adler")
    assert documents[0].extra["subsets"] == ["handwritten", "form"]
    assert [shade(item) for item in documents] == [1, 2]
    charts = items(found["chartqa-test"])
    assert sorted((item.item_id, item.kind, item.answers, shade(item)) for item in charts) == [
        ("augmented-0", "augmented", ("Wheat",), 1),
        ("augmented-1", "augmented", ("Wheat",), 2),
        ("human-0", "human", ("50",), 1),
        ("human-1", "human", ("50",), 2),
    ]


def test_other_charts_with_the_same_keys_are_no_chartqa(tmp_path: Path):
    for folder in ("PlotQA", "figureqa", "own"):
        files.write_chartqa(tmp_path / folder)
    row = {"question": "Which crop?", "answer": "Wheat", "type": "human", "image": "human0.png"}
    files.write(tmp_path / "answers.json", [row])
    files.write(tmp_path / "chart.json", [row])
    found = find_benchmarks(tmp_path)
    charts = [benchmark for benchmark in found.benchmarks.values() if benchmark.layout == "chartqa"]
    assert sorted(name for benchmark in charts for name in benchmark.files) == [
        "chart.json",
        "own/test/test_augmented.json",
        "own/test/test_human.json",
    ]


@pytest.mark.parametrize("kind", ["abstract_v002", "abstract", ""])
def test_abstract_scenes_are_found_by_their_numbers(tmp_path: Path, kind: str):
    files.write_vqav2(tmp_path, "val2015")
    for file in tmp_path.glob("*.json"):
        file.write_text(file.read_text().replace('"mscoco"', f'"{kind}"'))
    for file in tmp_path.rglob("COCO_*"):
        file.rename(tmp_path / file.name.replace("COCO_", "abstract_v002_"))
    assert [shade(item) for item in items(read(tmp_path)["vqav2-abstract-val2015"])] == [42, 42, 73]


def test_evalkits_tables_list_answers_in_a_text_and_share_pictures(tmp_path: Path):
    rows = [
        {"index": 0, "image": files.picture(5), "question": "When is it open?", "answer": ["9 am"] * 10},
        {"index": 1, "image": 0, "question": "Whose shop is it?", "answer": ["baker's"] * 4 + ["baker"] * 6},
    ]
    files.tsv(tmp_path / "TextVQA_VAL.tsv", rows)
    chart = {
        "index": 0,
        "image": files.picture(5),
        "question": "Years?",
        "answer": "[2015, 2016]",
        "split": "test_human",
    }
    files.tsv(tmp_path / "ChartQA_TEST.tsv", [chart])
    found = read(tmp_path)
    assert [shade(item) for item in items(found["textvqa-val"])] == [5, 5]
    assert items(found["textvqa-val"])[1].answers == ("baker's",) * 4 + ("baker",) * 6
    (only,) = items(found["chartqa-test"])
    assert (only.answers, only.kind) == (("[2015, 2016]",), "human")


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "textvqa", "vizwiz", "gqa", "docvqa", "chartqa"])
def test_an_item_without_its_picture_or_question_is_left_out_with_the_reason(tmp_path: Path, name: str):
    getattr(files, f"write_{name}")(tmp_path)
    pictures = sorted(
        path for path in tmp_path.rglob("*") if path.suffix in (".jpg", ".png") and "test_" not in path.name
    )
    pictures[0].unlink()
    found = find_benchmarks(tmp_path)
    left = {item: why for benchmark in found.benchmarks.values() for item, why in benchmark.left_out.items()}
    assert left
    assert all("no picture" in why and "--images" in why for why in left.values())
    assert all(benchmark.items for benchmark in found.benchmarks.values())


def test_answers_of_one_person_are_not_counted_as_those_of_ten(tmp_path: Path):
    rows = files.textvqa_rows()
    rows[0]["answers"], rows[1]["answers"] = ["nine"], ["nine"] * 3
    files.write(tmp_path / "val.json", {"data": rows})
    for name in ("00aa11", "00bb22"):
        files.put(tmp_path / f"{name}.jpg", 1)
    (found,) = find_benchmarks(tmp_path).benchmarks.values()
    assert [item.item_id for item in found.items] == ["34601"]
    assert "one answer" in found.left_out["34600"]
    assert any("1 of 1 questions have fewer than 10 answers" in note for note in found.notes)


def test_entries_that_hold_other_things_are_said_and_nothing_breaks_off(tmp_path: Path):
    files.write_docvqa(tmp_path)
    files.write(
        tmp_path / "gqa.json", {"1": {"imageId": 5, "question": "Q?", "answer": None, "types": "a", "entailed": 5}}
    )
    files.write(tmp_path / "text.json", {"data": [7, {"question": "Q?"}]})
    (tmp_path / "empty.csv").write_text("")
    found = find_benchmarks(tmp_path)
    assert set(found.benchmarks) == {"docvqa-val", "gqa"}
    assert found.benchmarks["gqa"].left_out == {"1": "gqa.json: 'entailed' must be a list, got '5'"}
    assert set(found.unread) == {"text.json", "empty.csv"}


def test_other_tasks_about_the_same_pictures_are_not_taken_for_questions(tmp_path: Path):
    text = {key: value for key, value in files.textvqa_rows()[0].items() if key != "answers"}
    scene = {"question_id": 1, "image_id": "a", "question": "Q?", "set_name": "test", "answers": ["x", "y"]}
    wiz = {"image": "VizWiz_val_00000000.jpg", "question": "What is it?"}
    row = {"image": "a.png", "question": "Q?", "answer": "x"}
    strangers = {
        "captions of text": {**text, "caption_str": ["A sign."], "reference_strs": ["A sign."]},
        "captions of text, secret": {**text, "caption_str": None, "reference_strs": []},
        "text in scenes": scene,
        "captions of the blind": {**wiz, "question_id": "VizWiz_val_00000000.jpg", "caption": ["A tin."]},
        "why answers differ": {**wiz, "answers": files.TEN, "ans_dis_labels": [0] * 9},
        "where the answer is": {**wiz, "answers": files.TEN, "answer_grounding": [{"x": 1, "y": 1}]},
        "entailment": {"image": "a.png", "query": "A man rides", "label": "entailment"},
        "kinds of questions": {**row, "type": "human action"},
        "school subjects": {**row, "split": "humanities"},
        "numbered kinds": {**row, "type": 0},
        "whole documents": {"questionId": "1", "question": "Q?", "answers": ["x"], "docId": "1", "data_split": "val"},
    }
    for name, entry in strangers.items():
        files.write(tmp_path / name / "val.json", [entry])
        files.write(tmp_path / name / "listed.json", {"data": [entry], "dataset_split": "val"})
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    assert len(found.unread) == 2 * len(strangers)


def test_files_of_the_challenge_fit_together_whatever_their_folder_is_called(tmp_path: Path):
    folder = tmp_path / "VQAv2 and OK-VQA"
    files.write_vqav2(folder)
    annotations = folder / "v2_mscoco_val2014_annotations.json"
    told = json.loads(annotations.read_text())
    for entry in told["annotations"]:
        entry |= {"image_id": f"{entry['image_id']:012d}", "question_id": str(entry["question_id"])}
    del told["annotations"][0]["answers"]
    files.write(annotations, told)
    found = read(tmp_path)
    assert [(item.kind, bool(item.answers)) for item in items(found["vqav2-val2014"])] == [
        ("other", False),
        ("yes/no", True),
        ("number", True),
    ]
    assert sum(item.has_answer for item in found["vqav2-val2014"].items) == 2
    annotations.unlink()
    notes = " ".join(read(tmp_path)["vqav2-val2014"].notes)
    assert "no annotations found: looked for" in notes
    assert "secret" not in notes


def test_an_odd_value_leaves_out_its_question_of_gqa_alone(tmp_path: Path):
    files.write_gqa(tmp_path)
    expected = {item.item_id for item in items(read(tmp_path)["gqa-val-all"])}
    (path,) = tmp_path.rglob("val_all_questions.json")
    files.write(path, {**json.loads(path.read_text()), "9": {**files.gqa_question("101"), "entailed": 5}})
    (path,) = tmp_path.rglob("*choices.json")
    files.write(path, {**json.loads(path.read_text()), "101": {"valid": "red", "plausible": []}})
    benchmark = find_benchmarks(tmp_path).benchmarks["gqa-val-all"]
    assert {item.item_id for item in benchmark.items} == expected - {"101"}
    assert "'valid' must be a list, got 'red'" in benchmark.left_out["101"]
    assert "'entailed' must be a list, got '5'" in benchmark.left_out["9"]


def test_multiple_choice_of_vqa_v1_is_refused_and_its_open_questions_are_read(tmp_path: Path):
    files.write_vqav2(tmp_path)
    path = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    told = json.loads(path.read_text())
    for question in told["questions"]:
        question["multiple_choices"] = ["yes", "no", *map(str, range(16))]
    files.write(tmp_path / "MultipleChoice_mscoco_val2014_questions.json", told)
    found = find_benchmarks(tmp_path)
    assert [len(items(benchmark)) for benchmark in found.benchmarks.values()] == [3]
    path.unlink()
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    (why,) = found.unread.values()
    assert "multiple choice among 18 answers, which is not scored; give the questions for open answers" in why


def test_a_file_that_cannot_be_read_takes_no_other_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files.write_gqa(tmp_path / "ok")
    monkeypatch.setattr(short_answers, "_PARTS", _Breaks())
    for name in ("bad", "worse"):
        files.write(tmp_path / name / "breaks.json", {"9": files.gqa_question("101")})
        found = find_benchmarks(tmp_path)
        assert [len(benchmark.items) for benchmark in found.benchmarks.values()] == [4]
        assert all("its entries hold other things" in why for why in found.unread.values())
    assert set(found.unread) == {"bad/breaks.json", "worse/breaks.json"}


def test_answers_that_pandas_wrote_are_several_and_a_cut_list_is_left_out(tmp_path: Path):
    pd, np = pytest.importorskip("pandas"), pytest.importorskip("numpy")
    rows = [{**row, "answers": np.array(row["answers"], dtype=object)} for row in files.docvqa_rows()]
    (tmp_path / "tables").mkdir()
    pd.DataFrame(rows).to_csv(tmp_path / "tables" / "val.csv", index=False)
    files.write_docvqa(tmp_path / "json")
    (tmp_path / "json" / "val_v1.0_withQT.json").unlink()
    (found,) = read(tmp_path).values()
    assert [item.answers for item in items(found)] == [("M. Adler", "Adler"), ("41.50",)]
    assert [item.extra["question_id"] for item in items(found)] == [500, 501]
    assert items(found)[0].extra["subsets"] == ["handwritten", "form"]
    written = tmp_path / "tables" / "val.csv"
    written.write_text(written.read_text().replace("'M. Adler' 'Adler'", "'M. Adler' ... 'Adler'"))
    (found,) = read(tmp_path).values()
    assert [item.answers for item in found.items] == [("41.50",)]
    assert "holds a list that is neither JSON" in found.left_out["row 1"]


def test_evalkits_tables_name_their_pictures_or_list_one(tmp_path: Path):
    inside = base64.b64encode(files.picture(8)).decode()
    local = {"index": 7, "question": "Q?", "answer": ["x"] * 10}
    listed = {"index": 7, "question": "Q?", "image": [inside], "answer": ["x"] * 10}
    for name in ("ChartQA_TEST", "DocVQA_VAL", "VizWiz", "GQA_TestDev_Balanced", "TextVQA_VAL"):
        files.put(tmp_path / "images" / name / "7.jpg", 7)
        files.tsv(tmp_path / "local" / f"{name}.tsv", [{**local, "image_path": f"/elsewhere/images/{name}/7.jpg"}])
        files.tsv(tmp_path / "listed" / f"{name}.tsv", [listed, {**listed, "index": 8, "image": [inside, inside]}])
    found = read(tmp_path)
    assert len(found) == 10
    for benchmark in found.values():
        assert shade(cast("OpenItem", benchmark.items[0])) == (7 if "local" in benchmark.files[0] else 8)
        assert len(benchmark.items) == 1
        assert ["2 pictures" in why for why in benchmark.left_out.values()] == [True] * ("listed" in benchmark.files[0])
        assert "question_id" not in benchmark.items[0].extra  # its index is no published id
