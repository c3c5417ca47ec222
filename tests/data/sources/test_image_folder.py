"""Image folders: each picture with what its metadata file says, whatever the file's form and place."""

import csv
import json

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.registry import open_dataset

pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def draw(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (4 + number, 4)).save(folder / name)


def write(folder, form, rows):
    if form == "jsonl":
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    elif form == "csv":
        with (folder / "metadata.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def said(dataset):
    return [(s.turns[0].question, s.turns[0].answer, s.images[0].load().size) for s in dataset]


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_metadata_of_any_form(tmp_path, form):
    draw(tmp_path, "a.png", "sub/b.png")
    rows = [
        {"file_name": "a.png", "question": "What?", "answer": "A"},
        {"file_name": "sub/b.png", "question": "Who?", "answer": "B"},
    ]
    write(tmp_path, form, rows)
    assert said(open_dataset(str(tmp_path))) == [("What?", "A", (4, 4)), ("Who?", "B", (5, 4))]


def test_text_is_a_caption(tmp_path):
    draw(tmp_path, "a.png")
    write(tmp_path, "jsonl", [{"file_name": "a.png", "text": "A bird."}])
    assert said(open_dataset(str(tmp_path))) == [("", "A bird.", (4, 4))]


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_splits_by_folder(tmp_path, form):
    for number, split in enumerate(("train", "test")):
        draw(tmp_path / split, *[f"{i}.png" for i in range(number + 1)])
        write(tmp_path / split, form, [{"file_name": "0.png", "text": split}])
    assert [a for _, a, _ in said(open_dataset(str(tmp_path)))] == ["train"]
    assert [a for _, a, _ in said(open_dataset(str(tmp_path), split="test"))] == ["test"]
    assert [a for _, a, _ in said(open_dataset(f"{tmp_path}:split=test"))] == ["test"]


def test_one_metadata_file_for_all_splits(tmp_path):
    draw(tmp_path, "train/a.png", "test/b.png")
    write(tmp_path, "jsonl", [{"file_name": f"{s}.png", "text": s} for s in ("train/a", "test/b")])
    assert [a for _, a, _ in said(open_dataset(str(tmp_path)))] == ["train/a"]
    assert [a for _, a, _ in said(open_dataset(str(tmp_path), split="test"))] == ["test/b"]


def test_other_names_of_picture_columns(tmp_path):
    draw(tmp_path, "a.png", "b.png")
    write(tmp_path, "jsonl", [{"scan_file_name": "b.png", "text": "x"}])
    assert said(open_dataset(str(tmp_path))) == [("", "x", (5, 4))]
    write(tmp_path, "jsonl", [{"file_names": ["a.png"], "text": "x"}])
    assert said(open_dataset(str(tmp_path))) == [("", "x", (4, 4))]


def test_folders_that_say_nothing_about_their_pictures_are_refused(tmp_path):
    draw(tmp_path, "cat/a.png", "dog/b.png")
    with pytest.raises(DataError, match=r"2 pictures and no text.*metadata\.jsonl.*\(cat, dog\) are classes, not text"):
        open_dataset(str(tmp_path))
    write(tmp_path, "jsonl", [{"file_name": "cat/a.png", "label": 3}])
    with pytest.raises(DataError, match=r"no row has .*'text' for a caption; the first has \['image', 'label'\]"):
        open_dataset(str(tmp_path))
    write(tmp_path, "jsonl", [{"picture": "cat/a.png", "text": "x"}])
    with pytest.raises(DataError, match="no row has 'file_name'"):
        open_dataset(str(tmp_path))


def test_a_json_file_beside_pictures_is_to_be_named(tmp_path):
    draw(tmp_path, "images/a.png")
    (tmp_path / "llava.json").write_text("[]")
    with pytest.raises(DataError, match=r"is a folder; name the file in it that is meant: .*llava\.json"):
        open_dataset(str(tmp_path))
