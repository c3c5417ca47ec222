"""Folders of `datasets`: every column layout gives samples, and pictures are decoded by us."""

import builtins
import io

import numpy as np
import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.video import VideoBytes
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources.hf import HuggingFaceDataset, is_saved_dataset

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")


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
    parts = {name: datasets.Dataset.from_dict({"question": ["q"], "answer": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert is_saved_dataset(tmp_path / "d")
    assert HuggingFaceDataset(tmp_path / "d", split="test")[0].turns[0].answer == "test"
    with pytest.raises(DataError, match=r"no split 'extra'; it has test, train: name one, DATA=.*/train"):
        HuggingFaceDataset(tmp_path / "d", split="extra")
    # A held-out split that is not there: the training data, as of a file, which has no splits at all.
    assert HuggingFaceDataset(tmp_path / "d", split="validation")[0].turns[0].answer == "train"


@pytest.mark.parametrize(
    ("splits", "asked", "read"),
    [
        ("train validation", "test", "validation"),
        ("train val", "test", "val"),
        ("train val", "validation", "val"),
        ("train dev-small test_easy test_hard", "test", "test_easy"),
        ("train eval", "test", "eval"),
        ("train test", "validation", "train"),
        ("train extra", "test", "train"),
        ("train validation", "train", "train"),
    ],
)
def test_a_held_out_split_of_another_name_comes_before_the_training_data(tmp_path, caplog, splits, asked, read):
    caplog.set_level("INFO")
    parts = {name: datasets.Dataset.from_dict({"question": ["q"], "answer": [name]}) for name in splits.split()}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    assert open_dataset(str(tmp_path / "d"), split=asked)[0].turns[0].answer == read
    assert f"split {read!r} is read" in caplog.text
    assert ("instead of" in caplog.text) is (asked != read)
    if asked != read:  # named with the data, it is meant
        with pytest.raises(DataError, match=f"has no split '{asked}'; it has .*: name one, DATA=.*/d/train"):
            open_dataset(f"{tmp_path / 'd'}:split={asked}")


def test_a_held_out_split_is_not_named_to_learn_from(tmp_path):
    parts = {
        name: datasets.Dataset.from_dict({"question": ["q"], "answer": [name]})
        for name in ("test", "validation", "more")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=r"no split 'train'; it has more, test, validation: name one, DATA=.*/d/more"):
        open_dataset(str(tmp_path / "d"))
    del parts["more"]
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "e"))
    with pytest.raises(
        DataError, match=r"all are held out; to learn from one all the same, name it, DATA=.*/e/validat"
    ):
        open_dataset(str(tmp_path / "e"))
    assert open_dataset(f"{tmp_path / 'e'}:split=validation")[0].turns[0].answer == "validation"
    with pytest.raises(DataError, match="is one data set, without a split 'test'; leave out split="):
        open_dataset(f"{tmp_path / 'e' / 'validation'}:split=test")


def test_unknown_columns_odd_rows_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"expected columns .* it has \['text'\]"):
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


TEXT = {"question": ["What?"] * 2, "answer": ["A0", "A1"]}
TEXT_TYPES = {key: datasets.Value("string") for key in TEXT}


@pytest.mark.parametrize("key", ["image", "img", "jpg", "anything"])
@pytest.mark.parametrize("several", [False, True])
def test_a_column_of_pictures_is_known_by_its_type_whatever_its_name(tmp_path, key, several):
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    features = datasets.Features({**TEXT_TYPES, key: feature})
    values = [[picture] for picture in pictures(2)] if several else pictures(2)
    dataset = HuggingFaceDataset(save(tmp_path, {**TEXT, key: values}, features))
    assert [dataset[index].images[0].load().size for index in range(2)] == [(4, 4), (4, 5)]


def test_a_row_says_by_null_or_an_empty_list_that_it_has_no_picture(tmp_path):
    features = datasets.Features({**TEXT_TYPES, "images": datasets.List(datasets.Image())})
    dataset = HuggingFaceDataset(save(tmp_path, {**TEXT, "images": [pictures(1), []]}, features))
    assert [len(dataset[index].images) for index in range(2)] == [1, 0]
    features = datasets.Features({**TEXT_TYPES, "pic": datasets.Image()})
    dataset = HuggingFaceDataset(save(tmp_path / "two", {**TEXT, "pic": [*pictures(1), None]}, features))
    assert [len(dataset[index].images) for index in range(2)] == [1, 0]


def test_pictures_that_are_damaged_or_given_as_plain_bytes_are_not_overlooked(tmp_path):
    damaged = pyarrow.table({"question": ["What?"], "answer": ["A"], "x": [{"bytes": b"junk", "path": None}]})
    features = datasets.Features({**TEXT_TYPES, "x": datasets.Image()})
    path = tmp_path / "saved"
    datasets.Dataset(damaged.replace_schema_metadata(None).cast(features.arrow_schema)).save_to_disk(str(path))
    with pytest.raises(SampleError, match="cannot be decoded"):
        HuggingFaceDataset(path)[0].images[0].load()
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "PNG")
    plain = HuggingFaceDataset(save(tmp_path / "plain", {**TEXT, "content": [buffer.getvalue()] * 2}))
    assert plain[0].images[0].load().size == (4, 4)


def test_labels_are_read_by_their_names(tmp_path):
    label = datasets.ClassLabel(names=["no", "yes"])
    columns = {"question": ["What?"] * 2, "answer": [1, 0], "answers": [[1, 1, 0], [0]]}
    features = {"question": datasets.Value("string"), "answer": label, "answers": datasets.List(label)}
    for left_out in ("answers", "answer"):
        kept = {key: feature for key, feature in features.items() if key != left_out}
        saved = save(tmp_path / left_out, {key: columns[key] for key in kept}, datasets.Features(kept))
        assert [HuggingFaceDataset(saved)[index].turns[0].answer for index in range(2)] == ["yes", "no"]


def test_a_folder_without_rows_is_refused_and_an_empty_split_is_no_matter_to_another(tmp_path):
    full = datasets.Dataset.from_dict(TEXT)
    none = datasets.Dataset.from_dict({"question": [], "answer": []})
    none.save_to_disk(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"cannot be read as a folder .*nothing to learn"):
        HuggingFaceDataset(tmp_path / "none")
    datasets.DatasetDict({"train": full, "test": none}).save_to_disk(str(tmp_path / "both"))
    assert len(HuggingFaceDataset(tmp_path / "both")) == 2
    with pytest.raises(DataError, match="cannot be read as a folder"):
        HuggingFaceDataset(tmp_path / "both", split="test")


def test_another_librarys_dataset_info_is_no_saved_data_set(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    assert not is_saved_dataset(tmp_path)


def test_a_column_of_videos_is_read_and_one_of_other_media_refused_row_by_row(tmp_path):
    features = datasets.Features({**TEXT_TYPES, "clip": datasets.Value("binary")})
    path = save(tmp_path, {**TEXT, "clip": [b"frames", None]}, features)
    dataset = HuggingFaceDataset(path)
    dataset.video_keys = frozenset({"clip"})  # the library's own type of a video needs torchcodec to be written
    assert [type(video) for video in dataset[0].images] == [VideoBytes]
    assert dataset[1].images == ()
    dataset.video_keys, dataset._unread = frozenset(), {"clip": "Pdf"}
    with pytest.raises(SampleError, match="column 'clip' holds a Pdf"):
        dataset[0]


@pytest.mark.parametrize("several", [False, True])
def test_a_folder_is_never_written_to(tmp_path, several):
    feature = datasets.List(datasets.Image()) if several else datasets.Image()
    features = datasets.Features({**TEXT_TYPES, "image": feature})
    path = save(tmp_path, {**TEXT, "image": [[p] for p in pictures(2)] if several else pictures(2)}, features)

    def state():
        return sorted((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in [path, *path.rglob("*")])

    before = state()
    for file in (path, *path.rglob("*")):
        file.chmod(0o555 if file.is_dir() else 0o444)
    dataset = HuggingFaceDataset(path)
    assert [len(dataset[index].images) for index in range(2)] == [1, 1]
    assert len(dataset.fingerprint()) == 32
    path.chmod(0o755)
    assert state() == before


def test_an_odd_id_is_that_rows_error(tmp_path):
    dataset = HuggingFaceDataset(save(tmp_path, {**TEXT, "id": [1.5, None]}))
    with pytest.raises(SampleError, match="its id is of type float"):
        dataset[0]
    assert dataset[1].turns[0].answer == "A1"
