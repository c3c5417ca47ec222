"""Yes-or-no benchmarks say the same in each published form; what cannot be asked is told, and never read as something else."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yes_no_files as files
from yes_no_files import HALLUSION, MME, NLVR, NLVR2, POPE, seen

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.items import Benchmark, OpenItem, YesNoItem
from vlm_distill_cache.data.benchmarks.layouts import Found
from vlm_distill_cache.data.benchmarks.search import find_benchmarks


def only(folder: Path) -> Benchmark:
    found = find_benchmarks(folder)
    assert len(found.benchmarks) == 1, found
    (benchmark,) = found.benchmarks.values()
    assert not benchmark.left_out
    return benchmark


def items_of(benchmark: Benchmark) -> list[YesNoItem]:
    items = [item for item in benchmark.items if isinstance(item, YesNoItem)]
    assert len(items) == len(benchmark.items) == len({item.item_id for item in items})
    return items


@pytest.mark.parametrize("form", ["github", "hub", "hub-splits", "tsv"])
def test_pope_is_the_same_in_each_form(tmp_path: Path, form: str):
    files.write_pope(tmp_path, form)
    benchmark = only(tmp_path)
    items = items_of(benchmark)
    asked = {(split, item.question, item.right, seen(item.image)) for item in items for split in item.kind.split(",")}
    assert asked == {(split, text, right, shown) for split, rows in POPE.items() for _, shown, text, right in rows}
    assert len(items) == (5 if form == "tsv" else 6)
    assert (benchmark.name, benchmark.metric) == ("pope", "pope")
    if form != "tsv":
        pictured = {(item.extra["picture"].removesuffix(".jpg"), seen(item.image)) for item in items}
        assert pictured == {("COCO_val2014_000000000010", 10), ("COCO_val2014_000000000020", 20)}


def test_editions_of_pope_are_benchmarks_of_their_own_and_a_missing_picture_or_label_is_told(tmp_path: Path):
    files.write_pope(tmp_path, "github")
    rows = [
        {"question_id": 1, "image": "none.jpg", "text": "Is there a bus in the image?", "label": "yes"},
        {
            "question_id": 2,
            "image": "COCO_val2014_000000000010.jpg",
            "text": "Is there a car in the image?",
            "label": "no",
        },
    ]
    files.lines(tmp_path / "coco/aokvqa_pope_seem_random.json", rows)
    files.lines(tmp_path / "odd/gqa_pope_random.json", [rows[1]] * 40 + [{**rows[1], "label": "maybe"}])
    found = find_benchmarks(tmp_path).benchmarks
    assert {name: len(benchmark.items) for name, benchmark in found.items()} == {
        "pope-coco": 6,
        "pope-aokvqa-seem": 1,
        "pope-gqa": 40,
    }
    (why,) = found["pope-aokvqa-seem"].left_out.values()
    assert "no picture 'none.jpg'" in why
    (why,) = found["pope-gqa"].left_out.values()
    assert "row 41: 'label' must be yes or no, got 'maybe'" in why


def test_a_row_that_cannot_be_read_is_left_out_alone(tmp_path: Path):
    files.write_pope(tmp_path, "tsv")
    text = (tmp_path / "POPE.tsv").read_text()
    header, rest = text.split("\n", 1)
    (tmp_path / "POPE.tsv").write_text(f"{header}\na\tb\n{rest}")
    (benchmark,) = find_benchmarks(tmp_path).benchmarks.values()
    assert len(items_of(benchmark)) == 5
    assert {seen(item.image) for item in items_of(benchmark)} == {10, 20}
    (why,) = benchmark.left_out.values()
    assert "POPE.tsv: row 1 cannot be read: the row has 2 cells, its header 5" in why


@pytest.mark.parametrize("form", ["folders", "eval-tool", "hub", "tsv"])
def test_mme_is_the_same_in_each_form(tmp_path: Path, form: str):
    files.write_mme(tmp_path, form)
    found = find_benchmarks(tmp_path)
    benchmark = found.benchmarks["mme"]
    items = items_of(benchmark)
    asked = {(item.kind, item.question, item.right, seen(item.image)) for item in items}
    assert asked == {(task, text, right, number) for task, rows in MME.items() for _, number, text, right in rows}
    assert len({item.group for item in items}) == 3
    assert not benchmark.left_out
    assert any("not there: OCR, " in note for note in benchmark.notes)
    templates = {name: why for name, why in found.unread.items() if "Your_Results" in name}
    assert bool(templates) == (form == "folders")
    assert all("asks again what" in why for why in templates.values())
    assert any("LaVIN" in name for name in found.unread) == (form in ("folders", "eval-tool"))  # a model's answers


def test_several_forms_of_mme_are_benchmarks_of_their_own(tmp_path: Path):
    files.write_mme(tmp_path, "folders")
    files.write_mme(tmp_path / "hub", "hub")
    assert set(find_benchmarks(tmp_path).benchmarks) == {"mme-benchmark-release-version", "mme-test"}


def test_a_picture_of_mme_is_never_that_of_another_task(tmp_path: Path):
    files.write_mme(tmp_path, "folders")
    (tmp_path / "MME_Benchmark_release_version/code_reasoning/0001.png").unlink()
    (tmp_path / "MME_Benchmark_release_version/existence/000000000139.txt").write_text(
        "Is it?\tYes\nIs it so?\tPerhaps\nIs\n"
    )
    benchmark = find_benchmarks(tmp_path).benchmarks["mme"]
    assert [item.kind for item in benchmark.items] == ["artwork", "artwork", "existence"]
    assert any("1 of 2 pictures have other than two questions" in note for note in benchmark.notes)
    why = "\n".join(benchmark.left_out.values())
    assert "no picture 'code_reasoning/0001'" in why
    assert "line 2: 'answer' must be yes or no, got 'Perhaps'" in why
    assert "line 3: expected a question, a tab, and Yes or No, got 'Is'" in why


@pytest.mark.parametrize("form", ["github", "hub", "tsv"])
def test_hallusionbench_is_the_same_in_each_form(tmp_path: Path, form: str):
    files.write_hallusion(tmp_path, form)
    items = items_of(only(tmp_path))
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    asked = {(*(item.extra[key] for key in keys), item.question, item.right, seen(item.image)) for item in items}
    expected = {(*row[:2], *row[3:]) for row in HALLUSION if row[8] or form != "tsv"}
    assert asked == expected
    assert {item.kind for item in items} == {"VD", "VS"}


def test_a_figure_of_hallusionbench_is_never_that_of_another_folder(tmp_path: Path):
    files.write_hallusion(tmp_path, "github")
    (tmp_path / "hallusion_bench/VD/ocr/0_1.png").unlink()
    benchmark = find_benchmarks(tmp_path).benchmarks["hallusionbench"]
    (why,) = benchmark.left_out.values()
    assert "in a folder VD/ocr" in why
    assert [item.item_id for item in benchmark.items].count("VD_ocr_0_1_0") == 0


@pytest.mark.parametrize(("name", "split"), [("dev/dev.json", "dev-"), ("test/mine.jsonl", "dev-"), ("mine.json", "")])
def test_all_six_pictures_of_nlvr_are_asked_about(tmp_path: Path, name: str, split: str):
    files.write_nlvr(tmp_path, name, split)
    benchmark = only(tmp_path)
    items = items_of(benchmark)
    assert benchmark.name == ("nlvr-dev" if split else "nlvr-mine")
    assert [seen(item.image) for item in items] == [60 * place + 10 * order for place in range(2) for order in range(6)]
    assert [item.right for item in items] == [right for *_, right in NLVR for _ in range(6)]
    assert {item.group for item in items} == {"5"}
    assert NLVR[0][2] in items[0].question


@pytest.mark.parametrize("form", ["github", "blip", "lxmert", "hub", "hub-sentence"])
def test_the_two_pictures_of_nlvr2_are_joined_in_their_order(tmp_path: Path, form: str):
    files.write_nlvr2(tmp_path, form)
    benchmark = only(tmp_path)
    shown = []
    for item in items_of(benchmark):
        assert item.image is not None
        width = item.image.load().width
        shown.append((seen(item.image), seen(item.image, (width - 1, 0)), item.right))
        assert item.image.load().getpixel((width // 2, 0)) == (255, 255, 255)
    assert shown == [(*numbers, right) for _, _, right, numbers in NLVR2]
    groups = ["", "", ""] if form == "blip" else ["dev-7-1", "dev-7-1", "dev-8-0"]
    assert [item.group for item in benchmark.items] == groups
    assert any("side by side" in note for note in benchmark.notes)
    assert any("no consistency" in note for note in benchmark.notes) == (form == "blip")


def test_question_files_are_asked_as_they_stand_and_answers_files_are_no_questions(tmp_path: Path):
    files.write_questions(tmp_path)
    found = find_benchmarks(tmp_path)
    benchmark = found.benchmarks["llava-mine"]
    assert all(isinstance(item, OpenItem) and seen(item.image) == 10 for item in benchmark.items)
    assert [item.item_id for item in benchmark.items] == ["scene/1.png", "scene/1.png#2"]
    assert {item.extra["question_id"] for item in benchmark.items} == {"scene/1.png"}
    assert "no picture 'gone/2.png'" in benchmark.left_out["7"]
    assert "a model's answers, not questions" in found.unread["answers.jsonl"]
    files.lines(tmp_path / "plain.jsonl", [{"question_id": 1, "text": "Why?", "category": "a"}])
    files.lines(tmp_path / "null.jsonl", [{"question_id": 1, "text": "Why?", "category": "a", "image": None}])
    found = find_benchmarks(tmp_path)
    assert "no 'image'" in found.unread["plain.jsonl"]
    (item,) = found.benchmarks["llava-null"].items
    assert isinstance(item, OpenItem)
    assert (item.image, item.question, item.kind) == (None, "Why?", "a")


def test_texts_with_yes_and_no_that_are_not_about_pictures_are_not_mmes(tmp_path: Path):
    (tmp_path / "labels.txt").write_text("a.png\tYes\nb.png\tNo\n")
    files.put(tmp_path / "a.png", 10)
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    assert "no known layout" in found.unread["labels.txt"]
    (tmp_path / "a.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")  # MME's form with tasks of one's own
    (tmp_path / "labels.txt").unlink()
    (benchmark,) = find_benchmarks(tmp_path).benchmarks.values()
    assert [(item.kind, seen(item.image)) for item in items_of(benchmark)] == [(tmp_path.name, 10)] * 2
    assert any("none of MME's: acc and acc+ are no score of MME" in note for note in benchmark.notes)


def _rows(folder: Path, text: str) -> Found:
    (folder / "rows.json").write_text(text)
    return find_benchmarks(folder)


@pytest.mark.parametrize(
    "row",
    [
        {"image": "a.png", "question": "Is it red?", "answer": "yes", "category": "colours"},
        {"image": "a.png", "text": "A cat.", "label": "cat"},
        {"image": "a.png", "sentence": "A cat.", "label": "entailment", "identifier": "5-0"},
        {"question_id": 1, "text": "Is it red?"},
        {"image": "a.png", "text": "I love it.", "label": "1"},
        {"image": "a.png", "text": "I love it.", "label": "yes"},
        {"image": "a.png", "text": "Do you like it?", "label": "yes"},
        {"question_id": 1, "image": "a.png", "text": "Can do!", "label": "yes"},
        {"question_id": 1, "image": "a.png", "text": "Do the best.", "label": "yes"},
        {"image": "a.png", "text": "Is it red?", "label": "1"},
        {"question_id": 1, "image": "a.png", "text": "Yes", "label": "yes"},
        {"image": "a.png", "question": "Is it red?", "answer": "yes", "image_source": "a camera"},
        {"image": "a.png", "question": "Is it red?", "answer": "yes", "category": "scene"},
        {"left_image": "a.png", "right_image": "a.png", "question": "Are they the same?", "answer": "yes"},
    ],
)
def test_rows_that_only_resemble_a_layout_are_not_read_as_it(tmp_path: Path, row: dict[str, object]):
    names = _rows(tmp_path, json.dumps([row] * 3)).benchmarks
    assert not [name for name in names if name.startswith(("pope", "mme", "hallusion", "nlvr", "llava"))]


def test_questions_of_pope_need_no_mark_and_those_that_ask_other_things_are_told_as_such(tmp_path: Path):
    files.put(tmp_path / "a.png", 10)
    asked = {
        "<image>\nIs there a dog": False,
        "In this image, is there a dog": False,
        "In this image, is the dog red": True,
        "Tell whether a dog is shown. Answer yes or no.": True,
    }
    for place, (text, is_other) in enumerate(asked.items()):
        files.lines(tmp_path / f"{place}.jsonl", [{"question_id": 1, "image": "a.png", "text": text, "label": "no"}])
        (benchmark,) = (
            each for each in find_benchmarks(tmp_path).benchmarks.values() if f"{place}.jsonl" in each.files
        )
        assert benchmark.layout == "pope"
        assert any("told by its keys alone" in note for note in benchmark.notes) == is_other
    for name, question in (("own", "Is it red?"), ("mme", "Is it red? Please answer yes or no.")):
        rows = [{"image": "a.png", "question": question, "answer": "no", "category": "scene"}] * 2
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    for name, benchmark in find_benchmarks(tmp_path).benchmarks.items():
        if benchmark.layout == "mme":
            assert any("told by its keys alone" in note for note in benchmark.notes) == ("own" in name)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda folder: files.write_pope(folder, "hub"), "data/test-00000-of-00001-ab12.parquet"),
        (lambda folder: files.write_nlvr2(folder, "hub"), "data/balanced_dev-00000-of-00001.parquet"),
    ],
)
def test_saved_datasets_are_read_as_their_parquet_files(tmp_path: Path, write: Callable[[Path], None], name: str):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "files")
    expected = only(tmp_path / "files")
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "files" / name), cache_dir=str(tmp_path / "cache"))
    pictured = [column for column in loaded.column_names if "image" in column and column != "image_source"]
    for column in pictured:
        loaded = loaded.cast_column(column, datasets.Image())
    loaded.save_to_disk(tmp_path / "saved/dev")
    items = items_of(only(tmp_path / "saved"))
    assert [(item.item_id, item.question, item.right, seen(item.image)) for item in items] == [
        (item.item_id, item.question, item.right, seen(item.image)) for item in items_of(expected)
    ]


def test_a_damaged_picture_of_two_is_named(tmp_path: Path):
    files.write_nlvr2(tmp_path, "github")
    (tmp_path / "images/dev/dev-7-0-img1.png").write_bytes(b"nothing")
    item = items_of(only(tmp_path))[0]
    assert item.image is not None
    with pytest.raises(SampleError, match="dev-7-0-img1"):
        item.image.load()


BOX = {"identifier": "5-0", "sentence": "It is red.", "label": "true"}


@pytest.mark.parametrize(
    ("layout", "row", "bad"),
    [
        ("pope", {"image": "a.png", "text": "Is there a dog?", "label": "yes"}, {"label": None}),
        ("pope", {"image": "a.png", "question": "Is it?", "answer": "yes", "category": "random"}, {"category": "all"}),
        (
            "mme",
            {"image": "a.png", "question": "Is it red?", "answer": "yes", "category": "count"},
            {"image": "b.png", "answer": "unsure"},
        ),
        (
            "mme",
            {"image": "a.png", "question": "Is it red?", "answer": "yes", "category": "count"},
            {"category": "frogs"},
        ),
        ("nlvr", BOX, {"identifier": "5-1", "label": "unsure"}),
        ("nlvr", BOX, {"identifier": "five"}),
        ("nlvr2", BOX | {"identifier": "dev-7-0-0"}, {"identifier": "dev-7-0-1", "label": ""}),
    ],
)
def test_a_bad_row_among_the_first_is_left_out_alone(
    tmp_path: Path, layout: str, row: dict[str, str], bad: dict[str, str | None]
):
    for name in ("a.png", "b.png", *(f"dev-5-{scene}-{order}.png" for scene in (0, 1) for order in range(6))):
        files.put(tmp_path / name, 10)
    for name in ("dev-7-0-img0.jpg", "dev-7-0-img1.jpg"):
        files.put(tmp_path / name, 20)
    same = {"identifier": row["identifier"][:-1] + "9"} if "identifier" in row else {}
    files.lines(tmp_path / "dev.jsonl", [row, {**row, **bad}, {**row, **same}])
    (benchmark,) = find_benchmarks(tmp_path).benchmarks.values()
    assert benchmark.layout == layout
    assert len(benchmark.items) == {"nlvr": 6, "nlvr2": 2}.get(layout, 2)
    key = "category" if "category" in bad else "identifier" if bad.get("identifier") == "five" else list(bad)[-1]
    assert any(f"row 2: {key!r} must be" in why for why in benchmark.left_out.values())


def test_a_picture_of_coco_is_found_by_its_number_whatever_release_it_is_of_and_a_file_of_one_line_is_read(
    tmp_path: Path,
):
    files.put(tmp_path / "val2017/000000000010.jpg", 10)
    files.put(tmp_path / "train2014/COCO_train2014_000000000020.jpg", 20)
    told: tuple[tuple[str, str | int], ...] = (
        ("image", "COCO_val2014_000000000010.jpg"),
        ("image", "000000000020.jpg"),
        ("image", 20),
        ("image_source", "COCO_val2014_000000000010"),
    )
    for place, (key, value) in enumerate(told):
        row = {"question": "Is it red?", "answer": "no", "image_source": "COCO_val2014_000000000010", key: value}
        files.lines(tmp_path / f"{place}/pope_random.json", [row])
    found = find_benchmarks(tmp_path).benchmarks.values()
    assert sorted(seen(item.image) or 0 for benchmark in found for item in items_of(benchmark)) == [10, 10, 20, 20]


def test_figures_of_hallusionbench_go_by_their_numbers_and_results_are_no_questions(tmp_path: Path):
    files.write_hallusion(tmp_path, "github")
    rows = json.loads((tmp_path / "HallusionBench.json").read_text())
    (tmp_path / "HallusionBench_result_sample.json").write_text(
        json.dumps([{**row, "model_prediction": "Yes"} for row in rows])
    )
    expected = [(item.item_id, seen(item.image)) for item in items_of(only(tmp_path))]
    assert "a model's answers" in find_benchmarks(tmp_path).unread["HallusionBench_result_sample.json"]
    (tmp_path / "HallusionBench.json").write_text(json.dumps([{**row, "filename": None} for row in rows]))
    assert [(item.item_id, seen(item.image)) for item in items_of(only(tmp_path))] == expected


@pytest.mark.parametrize(
    ("name", "is_told"),
    [("images/first.png", True), ("VD_ocr_0_1.png", True), ("images/0_1.png", False), ("VS/ocr/0_1.png", False)],
)
def test_a_figure_of_hallusionbench_that_its_row_names_in_words_is_that_one(tmp_path: Path, name: str, is_told: bool):
    numbers = {"category": "VD", "subcategory": "ocr", "set_id": 0, "figure_id": 1, "question_id": 0}
    row = {**numbers, "visual_input": "1", "question": "Is it red?", "gt_answer": 1, "filename": name}
    (tmp_path / "HallusionBench.json").write_text(json.dumps([row]))
    files.put(tmp_path / name, 10)
    (benchmark,) = find_benchmarks(tmp_path).benchmarks.values()
    assert [seen(item.image) for item in items_of(benchmark)] == [10] * is_told
    assert all("may be another one" in why for why in benchmark.left_out.values())
    assert len(benchmark.left_out) == (not is_told)


def test_a_folder_beside_those_of_mmes_tasks_is_left_out(tmp_path: Path):
    for task in ("count", "Count2"):
        files.put(tmp_path / f"{task}/a.png", 10)
        (tmp_path / f"{task}/a.txt").write_text("Is it red?\tYes\nIs it blue?\tNo\n")
    (benchmark,) = find_benchmarks(tmp_path).benchmarks.values()
    assert [item.kind for item in benchmark.items] == ["count"] * 2
    assert list(benchmark.left_out.values()) == ["'Count2' is none of MME's 14 tasks"] * 2


def test_what_is_told_of_mme_and_nlvr_says_how_to_go_on(tmp_path: Path):
    files.put(tmp_path / "mme/count/1.png", 10)
    (tmp_path / "mme/count/1.txt").write_text("Is it red? Yes\nIs it blue? No\n")
    files.lines(tmp_path / "nlvr/mine.json", [BOX])
    for split in ("dev", "train"):
        files.put(tmp_path / f"nlvr/{split}/{split}-5-0-0.png", 20)
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    assert "no tab between the question and Yes or No" in found.unread["mme/count/1.txt"]
    assert "with 'dev-' and 'train-' before their numbers: call it" in found.unread["nlvr/mine.json"]


def test_questions_of_one_stored_picture_are_a_pair_of_mme(tmp_path: Path):
    rows = [
        {"question": f"Is it {place}?", "answer": "No", "category": "count", "image": 10 + 10 * (place // 2)}
        for place in range(4)
    ]
    files.parquet(tmp_path / "test.parquet", rows)
    items = items_of(only(tmp_path))
    assert [seen(item.image) for item in items] == [10, 10, 20, 20]
    assert [item.group == items[0].group for item in items] == [True, True, False, False]


def test_llava_bench_of_the_hub_is_a_question_file(tmp_path: Path):
    row = {"question_id": "3", "image": 10, "caption": "A thing.", "gpt_answer": "So.", "category": "conv"}
    files.parquet(tmp_path / "data/train-00000-of-00001.parquet", [{**row, "question": "Why is it red?"}])
    benchmark = only(tmp_path)
    (item,) = benchmark.items
    assert isinstance(item, OpenItem)
    assert (benchmark.name, item.item_id, item.question, seen(item.image)) == (
        "llava-data-train",
        "3",
        "Why is it red?",
        10,
    )
