"""Files of benchmarks as rows, whatever they are written in; pictures wherever their owner unpacked them."""

import base64
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.benchmarks.documents import KEY, documents_in, open_document, without_part
from vlm_distill_cache.data.benchmarks.items import Benchmark, OpenItem, item_digest, missing_kinds
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.search import find_benchmarks


def png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (6, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


RED, BLUE = png((255, 0, 0)), png((0, 0, 255))
ROWS = [{"id": 1, "text": 'ä, \t"b"\nc', "image": RED}, {"id": 2, "text": "d", "image": BLUE}]


def write(folder: Path, form: str) -> Path:
    text = [{**row, "image": base64.b64encode(row["image"]).decode()} for row in ROWS]
    path = folder / f"rows.{form.partition('-')[0]}"
    if form == "json-list":
        path.write_text("\ufeff" + json.dumps(text, ensure_ascii=False), encoding="utf-8")
    elif form == "json-dict":
        path.write_text(json.dumps({str(row["id"]): row for row in text}))
    elif form in ("json-lines", "jsonl"):
        path.write_text("".join(json.dumps(row) + "\r\n" for row in text) + "\n")
    elif form == "tsv":
        quoted = ["\t".join(['"' + str(row[key]).replace('"', '""') + '"' for key in row]) for row in text]
        path.write_text("\n".join(["id\ttext\timage", *quoted]) + "\n")
    elif form == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        for number, row in enumerate(ROWS):  # a table of two parts
            part = [{**row, "image": {"bytes": row["image"], "path": "a.png"}}]
            pq.write_table(pa.Table.from_pylist(part), folder / f"test-{number:05d}-of-00002.parquet")
        return folder
    elif form == "saved":
        datasets = pytest.importorskip("datasets")
        features = datasets.Features(
            {"id": datasets.Value("int64"), "text": datasets.Value("string"), "image": datasets.Image()}
        )
        rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in ROWS]
        datasets.DatasetDict({"test": datasets.Dataset.from_list(rows, features=features)}).save_to_disk(folder / "d")
    return path


@pytest.mark.parametrize("form", ["json-list", "json-dict", "json-lines", "jsonl", "tsv", "parquet", "saved"])
def test_rows_and_pictures_are_the_same_whatever_they_are_written_in(tmp_path: Path, form: str):
    write(tmp_path, form)
    (found,) = documents_in(tmp_path)
    document = open_document(found, "rows")
    assert len(document.rows) == 2
    assert document.has("id", "text", "image")
    assert (KEY in document.columns) == (form == "json-dict")
    assert [(int(row["id"]), row["text"]) for row in document.rows] == [(row["id"], row["text"]) for row in ROWS]
    for index, colour in enumerate([(255, 0, 0), (0, 0, 255)]):
        assert document.picture(index, "image").load().getpixel((0, 0)) == colour


@pytest.mark.parametrize(
    ("name", "hints", "colour"),
    [
        ("val2014/COCO_val2014_000000000007.jpg.png", (), RED),
        ("COCO_val2014_000000000007.jpg", (), RED),  # without its ending
        ("a/same.png", (), BLUE),  # the longest end of the path decides
        ("elsewhere/b/same.png", (), RED),
        ("..\\b\\same.png", (), RED),
        ("same.png", ("/a/",), BLUE),
        ("copy.png", (), RED),  # the same bytes twice
    ],
)
def test_pictures_are_found_wherever_they_lie(tmp_path: Path, name: str, hints: tuple[str, ...], colour: bytes):
    for place, data in {
        "x/val2014/COCO_val2014_000000000007.jpg.png": RED,
        "a/same.png": BLUE,
        "b/SAME.png": RED,
        "c/copy.png": RED,
        "d/copy.png": RED,
    }.items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_bytes(data)
    (tmp_path / "loop").symlink_to(tmp_path)
    pictures = Pictures([tmp_path])
    assert pictures.find(name, hints=hints).load().tobytes() == PIL.Image.open(io.BytesIO(colour)).tobytes()


def test_a_picture_that_is_not_there_or_could_be_two_is_refused(tmp_path: Path):
    for place, data in {"a/same.png": BLUE, "b/same.png": RED, "COCO_val2014_000000000007.png": RED}.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_bytes(data)
    pictures = Pictures([tmp_path])
    with pytest.raises(SampleError, match=r"2 different pictures are called 'same\.png'"):
        pictures.find("same.png")
    with pytest.raises(SampleError, match=r"no picture 'gone\.png' below"):
        pictures.find("gone.png")
    with pytest.raises(SampleError, match="no picture of the number 8"):
        pictures.numbered(8)
    assert pictures.numbered(7).load().size == (6, 4)
    with pytest.raises(DataError, match="does not exist"):
        Pictures([tmp_path / "none"])


def test_a_short_number_is_not_looked_for_in_folders_of_other_names(tmp_path: Path):
    (tmp_path / "three").mkdir()
    (tmp_path / "three/0001.png").write_bytes(RED)
    pictures = Pictures([tmp_path])
    assert pictures.find("any/three/0001.png").load().size == (6, 4)
    assert pictures.find("0001.png").load().size == (6, 4)
    assert pictures.find("images/0001.png").load().size == (6, 4)
    for name in ("four/0001.png", "four/images/0001.png"):  # each folder has its own
        with pytest.raises(SampleError, match=rf"no picture '{name}' .*in a folder of another name"):
            pictures.find(name)


def test_a_row_that_names_another_has_its_picture_and_texts_of_a_folder_are_one_document(tmp_path: Path):
    red = base64.b64encode(RED).decode()
    (tmp_path / "rows.tsv").write_text(f"index\timage\n7\t{red}\n8\t7\n9\tgone\n")
    document = open_document([tmp_path / "rows.tsv"], "rows.tsv")
    assert document.picture(1, "image").load().getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(SampleError, match="gone"):
        document.picture(2, "image").load()
    (tmp_path / "task").mkdir()
    (tmp_path / "task/readme.txt").write_text("nothing")
    (tmp_path / "task/b.txt").write_text("\ufeffIs it red?\tYes\r\n\r\nIs it blue?\tno\r\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("a\tb")
    texts = [paths for paths in documents_in(tmp_path) if paths[0].suffix == ".txt"]
    assert [[path.name for path in paths] for paths in texts] == [["b.txt", "readme.txt"]]
    assert list(open_document(texts[0], "task").rows) == [
        {"file": "b.txt", "line": 1, "image": "b", "question": "Is it red?", "answer": "Yes"},
        {"file": "b.txt", "line": 3, "image": "b", "question": "Is it blue?", "answer": "no"},
        {"file": "readme.txt", "line": 1, "image": "readme", "text": "nothing"},
    ]


def test_a_file_of_no_known_layout_is_said_and_damaged_ones_stop_nobody(tmp_path: Path):
    (tmp_path / "odd.json").write_text('[{"colour": 1, "size": 2}]')
    (tmp_path / "cut.json").write_text('[{"colour": 1, ')
    (tmp_path / "number.json").write_text("7")
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("nothing")
    found = find_benchmarks(tmp_path)
    assert not found.benchmarks
    assert set(found.unread) == {"odd.json", "cut.json", "number.json", "empty.parquet"}
    assert "colour, size" in found.unread["odd.json"]
    with pytest.raises(DataError, match="is no folder"):
        find_benchmarks(tmp_path / "gone")


def test_a_picture_of_a_name_that_others_have_is_the_one_in_the_benchmarks_own_folder(tmp_path: Path):
    for benchmark, data in (("a", RED), ("b", BLUE)):
        (tmp_path / benchmark / "images" / "deep").mkdir(parents=True)
        (tmp_path / benchmark / "images" / "deep" / "7.png").write_bytes(data)
    pictures = Pictures([tmp_path])
    for benchmark, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        (tmp_path / benchmark / "annotations").mkdir()
        found = pictures.find("7.png", near=tmp_path / benchmark / "annotations")
        assert found.load().getpixel((0, 0)) == colour
    with pytest.raises(SampleError, match="2 different pictures"):
        pictures.find("7.png", near=tmp_path)


def test_a_fingerprint_moves_with_what_is_asked_and_what_is_right_and_not_with_pictures():
    digests: list[str] = []

    def of(**more: object) -> str:
        item = OpenItem(item_id="1", image=None, question=str(more.get("question", "q")), answers=("a",))
        item = replace(item, extra={"n": more.get("n", 1)}, answers=tuple(more.get("answers", ("a",))))  # type: ignore[arg-type]
        instruction = str(more.get("instruction", ""))
        digests.append(item_digest(item))
        return Benchmark(name="x", layout="y", title="z", items=[item], metric="m", instruction=instruction).fingerprint

    others = [of(question="p"), of(n=2), of(answers=("b",)), of(instruction="Say it.")]
    assert of() == of()
    assert len({of(), *others}) == 5
    assert len(set(digests)) == 4  # an item has no instruction


def test_an_entry_that_cannot_be_is_left_out_alone_and_names_can_be_written(tmp_path: Path):
    entry = {"filename": "a.png", "caption": "one", "negative_caption": "two"}
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    found = {str(number): entry for number in range(3)} | {"5": None, "6": {**entry, "filename": True}}
    (tmp_path / "replace_att.json").write_text(json.dumps(found))
    odd = {"question": "Which?", "options": ["red", "blue"], "category": "c" * 300}
    rows = [
        {"id": name, **odd, "answer": answer} for name, answer in (("\ud800", "A"), ("\\ud800 \U0001f600", 10**400))
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / os.fsdecode(b"\xff.json")).write_text("[]")
    read = find_benchmarks(tmp_path)
    captions, options = read.benchmarks["sugarcrepe"], read.benchmarks["q"]
    assert [item.item_id for item in captions.items] == [f"replace_att/{number}" for number in range(3)]
    assert "row 4: entry 4 is null; an object" in " ".join(captions.left_out.values())
    assert len(captions.left_out) == 2
    assert "6 of its 7 subsets are not in the score, as they are not there: add_att, add_obj, " in captions.notes[0]
    assert [item.item_id for item in options.items] == [r"\ud800"]
    assert len(options.items[0].kind) == 200
    assert list(options.left_out) == ["\\ud800 \U0001f600"]
    assert set(read.unread) == {r"\udcff.json"}
    assert missing_kinds("splits", "ab", "ab") == missing_kinds("splits", "ab", "") == []
    json.dumps([{**options.left_out}, dict(read.unread)], ensure_ascii=False).encode()


def test_thousands_of_other_files_are_not_read_to_the_end_and_packed_ones_are_said(tmp_path: Path):
    (tmp_path / "annotations").mkdir()
    for number in range(60):
        (tmp_path / "annotations" / f"{number:02d}.json").write_text('{"bars": [1]}')
    (tmp_path / "other.json").write_text('{"x": 1}')
    questions = [{"question": "Which?", "options": ["red", "blue"], "answer": "A"}] * 2
    (tmp_path / "annotations" / "zz.json").write_text(json.dumps(questions))
    (tmp_path / "annotations" / "zy.json").write_text('[{"question": "Which?"')
    (tmp_path / "images.zip").write_bytes(b"PK")
    found = find_benchmarks(tmp_path)
    unread = found.unread
    assert found.benchmarks["zz"].files == ["annotations/zz.json"]
    assert set(unread) == {"annotations/*.json", "annotations/zy.json", "other.json", "images.zip"}
    assert "unpack it" in unread["images.zip"]
    assert "50 files" in unread["annotations/*.json"]
    assert re.search("10 more were not opened, .*: no known layout; it has bars", unread["annotations/*.json"])


def test_numbered_parts_are_one_table_and_missing_ones_are_said(tmp_path: Path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    hashes = [f"-{number:016x}" for number in range(3)]
    tables = {
        "hashed": [f"val-{number:05d}-of-00003{hashes[number]}.parquet" for number in range(3)],
        "bare": [f"{number:04d}.parquet" for number in range(2)],
        "gap": ["val-00000-of-00003.parquet", "val-00002-of-00003.parquet"],
    }
    for folder, names in tables.items():
        (tmp_path / folder).mkdir()
        for name in names:
            pq.write_table(pa.Table.from_pylist([{"x": 1}]), tmp_path / folder / name)
    read = {paths[0].parent.name: open_document(paths, "t") for paths in documents_in(tmp_path)}
    assert {name: len(document.rows) for name, document in read.items()} == {"hashed": 3, "bare": 2, "gap": 2}
    assert [read[name].missing for name in ("hashed", "bare")] == ["", ""]
    assert read["gap"].missing == "1 of the table's 3 parts are missing (number 00001 first)"
    twice = tmp_path / "hashed" / f"val-00001-of-00003{hashes[0]}.parquet"  # another download of the same table
    pq.write_table(pa.Table.from_pylist([{"x": 1}]), twice)
    pq.write_table(pa.Table.from_pylist([{"x": 1}]), tmp_path / "hashed" / "val-00001-of-00003.parquet")
    assert sorted(len(paths) for paths in documents_in(tmp_path / "hashed")) == [1] * 5
    assert [without_part(names[0]) for names in tables.values()] == ["val", "", "val"]
    assert [without_part(name) for name in ("a-1.tsv", "plain")] == ["a-1", "plain"]
