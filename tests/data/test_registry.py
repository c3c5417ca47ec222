"""One string names any data, and what cannot be read is refused with the list of what can."""

import importlib
import json
import sys
from types import SimpleNamespace

import PIL.Image
import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import EvaluationSet
from vlm_distill_cache.data.sources.easy_vqa import EasyVqaDataset
from vlm_distill_cache.data.sources.grouping import ChosenSamples
from vlm_distill_cache.data.sources.hf import HuggingFaceDataset
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.messages import MessagesDataset
from vlm_distill_cache.data.sources.webdataset import WebDataset


def chat(*answers):
    messages = []
    for number, answer in enumerate(answers):
        messages += [{"from": "human", "value": f"q{number}?"}, {"from": "gpt", "value": answer}]
    return messages


@pytest.fixture
def llava(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    answers = [
        ("yes", "no"),
        ("three red circles",),
        ("one two three four five six",),
        ("12",),
        (" ",),
        ("No.",),
    ]
    entries = [{"id": f"s{i}", "image": "a.png", "conversations": chat(*turns)} for i, turns in enumerate(answers)]
    entries.append({"id": "text", "conversations": chat("yes")})
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    return path


def test_files_choose_their_reader(tmp_path, llava):
    (tmp_path / "m.jsonl").write_text('{"caption": "a"}')
    assert isinstance(open_dataset(str(llava)), LlavaDataset)
    assert isinstance(open_dataset(str(tmp_path / "m.jsonl")), MessagesDataset)


def test_folders_choose_their_reader(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    (tmp_path / "parent").mkdir()
    datasets.Dataset.from_dict({"caption": ["a"]}).save_to_disk(str(tmp_path / "parent" / "one"))
    assert isinstance(open_dataset(str(tmp_path / "parent" / "one")), HuggingFaceDataset)
    assert isinstance(open_dataset(str(tmp_path / "parent")), HuggingFaceDataset)
    datasets.Dataset.from_dict({"caption": ["a"]}).save_to_disk(str(tmp_path / "parent" / "two"))
    with pytest.raises(DataError, match=r"several data sets, name one: .*/one, .*/two"):
        open_dataset(str(tmp_path / "parent"))


def test_tars_choose_their_reader(tmp_path):
    import io
    import tarfile

    for shard in (0, 1):
        with tarfile.open(tmp_path / f"s{shard}.tar", "w") as tar:
            info = tarfile.TarInfo(f"k{shard}.txt")
            info.size = 1
            tar.addfile(info, io.BytesIO(b"a"))
    for spec, count in ((tmp_path, 2), (tmp_path / "s{0..1}.tar", 2), (tmp_path / "s1.tar", 1)):
        dataset = open_dataset(str(spec))
        assert isinstance(dataset, WebDataset)
        assert len(dataset) == count


def test_named_data_sets(monkeypatch):
    asked = []
    fake = SimpleNamespace(
        ShapesDataset=lambda *args: asked.append(args) or [],
        shapes_evaluation=lambda *args: asked.append(args) or EvaluationSet(),
    )
    importlib.import_module("vlm_distill_cache.data.shapes.kinds")  # which imports more of it than the fake has
    monkeypatch.setitem(sys.modules, "vlm_distill_cache.data.shapes.dataset", fake)
    open_dataset("shapes", split="validation")
    open_dataset("shapes:images=12,seed=3")
    open_evaluation("shapes:images=12,seed=3", limit=7)
    open_evaluation("shapes")
    assert asked == [("validation", 1500, 0), ("train", 12, 3), ("test", 7, 3), ("test", 300, 0)]
    with pytest.raises(DataError, match="shapes has no option image; it has images, seed"):
        open_dataset("shapes:image=3")
    with pytest.raises(DataError, match="option images must be a whole number"):
        open_dataset("shapes:images=-3")


def test_the_real_shapes_data_opens():
    pytest.importorskip("vlm_distill_cache.data.shapes.dataset")
    dataset = open_dataset("shapes:images=3,seed=1")
    assert len(dataset) == len(dataset.sample_ids) == 3
    assert dataset[0].independent_turns
    assert open_evaluation("shapes", limit=4).pairs


def test_easy_vqa_by_name():
    pytest.importorskip("easy_vqa")
    assert isinstance(open_dataset("easy-vqa", split="test"), EasyVqaDataset)
    assert len(open_evaluation("easy-vqa", limit=9).questions) == 9
    with pytest.raises(DataError, match="easy-vqa has no option seed; it has none"):
        open_dataset("easy-vqa:seed=1")


def test_limit_takes_the_first_samples(llava):
    whole = open_dataset(str(llava))
    first = open_dataset(str(llava), limit=2)
    assert isinstance(first, ChosenSamples)
    assert list(first.sample_ids) == ["s0", "s1"]
    assert (first[0], first[-1]) == (whole[0], whole[1])
    assert first.fingerprint() != whole.fingerprint()
    with pytest.raises(IndexError):
        first[2]
    assert len(open_dataset(str(llava), limit=99)) == len(whole)
    for opened in (open_dataset, open_evaluation):
        with pytest.raises(DataError, match="limit must be at least 1"):
            opened(str(llava), limit=0)


def test_fingerprint_of_the_first_samples_equals_that_of_a_file_of_them(llava, tmp_path):
    entries = json.loads(llava.read_text())[:2]
    (tmp_path / "two.json").write_text(json.dumps(entries))
    assert open_dataset(str(llava), limit=2).fingerprint() == open_dataset(str(tmp_path / "two.json")).fingerprint()


def test_a_path_takes_no_options(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "conversations": chat("x")}] * 2))
    with pytest.raises(DataError, match="has no option"):
        open_dataset(f"{path}:seed=3")


def test_user_files_are_evaluated_by_their_short_first_answers(llava):
    questions = open_evaluation(str(llava)).questions
    found = [(item.item_id, item.question, item.answer, item.kind) for item in questions]
    assert found == [
        ("s0-0", "q0?", "yes", "yes/no"),
        ("s1-0", "q0?", "three red circles", "other"),
        ("s3-0", "q0?", "12", "number"),
        ("s5-0", "q0?", "No.", "yes/no"),
    ]
    assert len(open_evaluation(str(llava), limit=2).questions) == 2


def test_data_without_short_answers_has_no_items_and_says_so(tmp_path, caplog):
    path = tmp_path / "m.jsonl"
    path.write_text('{"caption": "a"}')
    assert open_evaluation(str(path)) == EvaluationSet()
    assert "no question about an image with an answer of at most 5 words" in caplog.text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.json", "does not exist"),
        ("gone", "does not exist"),
        ("notes.txt", "is of an unknown kind"),
        ("empty", "holds no data set that can be read"),
    ],
)
def test_what_cannot_be_read_lists_what_can(tmp_path, name, message):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=rf"{message}.*easy-vqa, FILE\.json, FILE\.jsonl"):
        open_dataset(str(tmp_path / name))


ENTRY = {"id": "x", "question": "What?", "answer": "A circle."}


@pytest.mark.parametrize("name", ["data.json", "DATA.JSON", "data.jsonl", "data.ndjson"])
def test_json_is_read_as_what_it_holds_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    for content in (
        json.dumps([ENTRY]),
        json.dumps([ENTRY], indent=1),
        json.dumps(ENTRY) + "\n" + json.dumps(ENTRY | {"id": "y"}),
        "\n" + json.dumps(ENTRY),
        "\ufeff" + json.dumps(ENTRY),
        "\ufeff" + json.dumps([ENTRY]),
    ):
        path.write_text(content, encoding="utf-8")
        assert open_dataset(str(path))[0].turns[0].answer == "A circle."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(ENTRY, indent=1), "one entry over several lines"),
        (json.dumps(ENTRY, indent=1) * 2, "put each on a line of its own"),
        (json.dumps({"data": [ENTRY]}), "if 'data' holds them|no line is an entry"),
        ("", "the file is empty|holds no sample"),
        ("hello", "is not JSON"),
    ],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_json_of_other_kinds_is_refused_with_its_own_remedy(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        open_dataset(str(tmp_path / name))


def test_a_split_that_data_do_not_have_is_refused_where_it_was_asked_for(llava, tmp_path):
    table = tmp_path / "rows.csv"
    table.write_text("image,question,answer\na.png,What is it?,a cat\n")
    mixture = tmp_path / "mixed.yaml"
    mixture.write_text(f"- data: shapes:images=3\n- data: {llava}\n")
    folder = tmp_path / "folder"
    folder.mkdir()
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]}
    (folder / "train.jsonl").write_text(json.dumps(row))
    (folder / "README.md").write_text("")
    for spec in map(str, (llava, table, mixture, folder)):
        open_dataset(spec, strict=True)
        open_dataset(spec, split="test", limit=1)  # as caches that were built so are opened
        with pytest.raises(DataError, match="has no split 'test'"):
            open_dataset(spec, split="test", strict=True)
    (folder / "test.jsonl").write_text(json.dumps(row).replace("Hi", "Ho"))
    assert open_dataset(str(folder), split="test", strict=True)[0].turns[0].question == "Ho"
    assert len(open_dataset("shapes:images=3", split="test", strict=True)) == 3


def test_data_that_are_the_split_asked_for_are_read_whatever_the_training_data_are(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"question": ["q"], "answer": ["a"]})
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(str(tmp_path / "saved"))
    rows.save_to_disk(str(tmp_path / "alone"))
    (tmp_path / "pq").mkdir()
    for split in ("train", "validation"):
        rows.to_parquet(str(tmp_path / "pq" / f"{split}-0.parquet"))
    entry = json.dumps({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]})
    (tmp_path / "my_val.jsonl").write_text(entry)
    (tmp_path / "mix.yaml").write_text("- data: saved\n- data: pq\n  split: validation\n")
    for data in ("saved", "saved/validation", "pq", "pq:split=validation", "pq/validation-*.parquet", "my_val.jsonl",
                 "mix.yaml"):  # fmt: skip
        assert len(open_dataset(str(tmp_path / data), split="validation", strict=True)) in (1, 2)
    for data in ("alone", "saved/train", "pq:split=train", "pq/train-0.parquet"):
        with pytest.raises(DataError, match=r"has no split 'validation'|differ: leave out one"):
            open_dataset(str(tmp_path / data), split="validation", strict=True)
    for broken in (*(tmp_path / "saved" / "train").glob("*.arrow"), tmp_path / "pq" / "train-0.parquet"):
        broken.write_bytes(b"broken")  # it is not opened
    for data in ("saved", "pq"):
        assert len(open_dataset(str(tmp_path / data), split="validation", strict=True)) == 1
