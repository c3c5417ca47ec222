"""Folders of `datasets`: every column layout gives samples, and pictures are decoded by us."""

import builtins
import io

import numpy as np
import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources.hf import HuggingFaceDataset, is_saved_dataset

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


def pictures(count):
    return [PIL.Image.new("RGB", (4, 4 + i), (i, i, i)) for i in range(count)]


def save(tmp_path, columns, features=None):
    path = tmp_path / "saved"
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(path))
    return path


MESSAGES = [[{"role": "user", "content": "What?"}, {"role": "assistant", "content": f"A{i}"}] for i in range(2)]
CONVERSATIONS = [[{"from": "human", "value": "What?"}, {"from": "gpt", "value": f"A{i}"}] for i in range(2)]


@pytest.mark.parametrize(
    ("columns", "question"),
    [
        ({"messages": MESSAGES}, "What?"),
        ({"conversations": CONVERSATIONS}, "What?"),
        ({"question": ["What?"] * 2, "answer": ["A0", "A1"]}, "What?"),
        ({"caption": ["A0", "A1"]}, ""),
    ],
)
def test_text_columns(tmp_path, columns, question):
    dataset = HuggingFaceDataset(save(tmp_path, columns))
    assert [dataset[i].turns for i in range(2)] == [(Turn(question=question, answer=f"A{i}"),) for i in range(2)]
    assert list(dataset.sample_ids) == ["row-00000000", "row-00000001"]
    assert dataset[0].images == ()
    assert len(dataset) == 2


def test_image_column_and_ids(tmp_path):
    columns = {"id": [11, 12], "image": pictures(2), "caption": ["a", "b"]}
    features = datasets.Features(
        {"id": datasets.Value("int64"), "image": datasets.Image(), "caption": datasets.Value("string")}
    )
    dataset = HuggingFaceDataset(save(tmp_path, columns, features))
    assert list(dataset.sample_ids) == ["11", "12"]
    assert [dataset[i].images[0].load().size for i in range(2)] == [(4, 4), (4, 5)]


def test_list_of_images_column(tmp_path):
    columns = {"images": [[image] for image in pictures(2)], "caption": ["a", "b"]}
    features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")})
    dataset = HuggingFaceDataset(save(tmp_path, columns, features))
    assert [dataset[i].images[0].load().size for i in range(2)] == [(4, 4), (4, 5)]


def test_image_paths_and_content_parts(tmp_path):
    pictures(1)[0].save(tmp_path / "a.png")
    columns = {"image": ["a.png", "gone.png"], "caption": ["a", "b"]}
    dataset = HuggingFaceDataset(save(tmp_path, columns), images=tmp_path)
    assert dataset[0].images[0].load().size == (4, 4)
    with pytest.raises(SampleError, match=r"gone\.png cannot be read"):
        dataset[1].images[0].load()


def test_parts_with_unused_keys_set_to_none_are_read(tmp_path):
    """Arrow gives every part all keys, those it does not have as None."""
    pictures(1)[0].save(tmp_path / "a.png")
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    answer = [{"type": "text", "text": "A"}]
    columns = {"messages": [[{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]]}
    dataset = HuggingFaceDataset(save(tmp_path, columns | {"image": ["a.png"]}), images=tmp_path)
    assert dataset[0].turns == (Turn(question="What?", answer="A"),)


def test_a_row_that_asks_about_an_image_it_has_not_is_refused(tmp_path):
    conversation = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A"}]
    dataset = HuggingFaceDataset(save(tmp_path, {"conversations": [conversation]}))
    with pytest.raises(SampleError, match="names no image"):
        dataset[0]


def test_exif_orientation_is_applied(tmp_path):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    PIL.Image.fromarray(np.zeros((4, 9, 3), dtype=np.uint8)).save(buffer, "JPEG", exif=exif)
    columns = {"image": [{"bytes": buffer.getvalue(), "path": None}], "caption": ["a"]}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    dataset = HuggingFaceDataset(save(tmp_path, columns, features))
    assert dataset[0].images[0].load().size == (4, 9)


def test_splits_are_taken_by_name(tmp_path):
    parts = {name: datasets.Dataset.from_dict({"caption": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert is_saved_dataset(tmp_path / "d")
    assert HuggingFaceDataset(tmp_path / "d", split="test")[0].turns[0].answer == "test"
    with pytest.raises(DataError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        HuggingFaceDataset(tmp_path / "d", split="validation")


def test_unknown_columns_odd_rows_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"none of the columns .* it has \['text'\]"):
        HuggingFaceDataset(save(tmp_path, {"text": ["a"]}))
    with pytest.raises(DataError, match="cannot be read as a folder"):
        HuggingFaceDataset(tmp_path / "gone")
    (tmp_path / "b").mkdir()
    dataset = HuggingFaceDataset(save(tmp_path / "b", {"caption": [" ", "b"]}))
    with pytest.raises(SampleError, match=r"sample 'row-00000000': .*is empty"):
        dataset[0]
    assert len(dataset.fingerprint()) == 32


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    path = save(tmp_path, {"caption": ["a"]})
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match=r"pip install 'vlm-distill-cache\[hf\]'"):
        HuggingFaceDataset(path)
