"""Conversations about one image come beside each other, and nothing else about the data set changes."""

import json
import random

import numpy as np
import pytest

from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import fingerprint_samples
from vlm_distill_cache.data.sources.grouping import ChosenSamples, GroupedByImage, JoinedSamples, group_by_image
from vlm_distill_cache.data.sources.kept import surveys
from vlm_distill_cache.data.sources.llava import LlavaDataset
from vlm_distill_cache.data.sources.messages import MessagesDataset
from vlm_distill_cache.stage1_teacher.planning.same_texts import _Unread

IMAGES = ["b.png", "a.png", None, "b.png", "c.png", "a.png", None, "b.png"]
ORDER = [0, 3, 7, 1, 5, 2, 4, 6]  # by the first appearance of the image; those without one stay single


def llava_file(folder, images=IMAGES):
    entries = []
    for index, image in enumerate(images):
        marker = "<image>\n" if image else ""
        turns = [{"from": "human", "value": f"{marker}question {index} ?"}, {"from": "gpt", "value": "yes"}]
        entries.append({"id": f"s{index}", "conversations": turns} | ({"image": image} if image else {}))
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def messages_file(folder, images=IMAGES):
    """The image is named in all three places that the format allows."""
    lines = []
    for index, image in enumerate(images):
        part = {"type": "image"} | ({"path": image} if index % 3 == 0 else {})
        content = [{"type": "text", "text": f"question {index} ?"}, *([part] if image else [])]
        line = {"id": f"s{index}", "messages": [{"role": "user", "content": content},
                                                {"role": "assistant", "content": "yes"}]}  # fmt: skip
        if image and index % 3 == 1:
            line["images"] = [image]
        elif image and index % 3 == 2:
            line["image"] = image
        lines.append(json.dumps(line))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(params=["llava", "messages"])
def dataset(request, tmp_path):
    if request.param == "llava":
        return LlavaDataset(llava_file(tmp_path))
    return MessagesDataset(messages_file(tmp_path))


def test_samples_follow_the_first_appearance_of_their_image(dataset):
    grouped = group_by_image(dataset)
    assert grouped.sample_ids == [f"s{index}" for index in ORDER]
    assert [grouped[place].sample_id for place in range(len(grouped))] == list(grouped.sample_ids)
    names = [sample.images[0].name if sample.images else None for sample in (grouped[i] for i in range(8))]
    assert [names[i] == names[i + 1] for i in range(3)] == [True, True, False]


def test_name_and_fingerprint_stay_the_data_sets_own(dataset):
    grouped = group_by_image(dataset)
    assert isinstance(grouped, GroupedByImage)
    assert (grouped.name, grouped.fingerprint()) == (dataset.name, dataset.fingerprint())
    assert fingerprint_samples(grouped) != dataset.fingerprint()  # which is of an order, and so is kept


def test_keys_are_known_without_opening_an_image(dataset):
    assert list(dataset.image_keys()) == IMAGES  # no such files exist


def test_samples_that_are_together_already_are_not_wrapped(tmp_path):
    path = llava_file(tmp_path, ["a.png", "a.png", None, "b.png", "b.png"])
    dataset = LlavaDataset(path)
    assert group_by_image(dataset) is dataset


def test_data_sets_that_cannot_name_their_images_keep_their_order():
    dataset = open_dataset("shapes:images=5,seed=1")
    assert dataset.image_keys() == [None] * 5
    assert group_by_image(dataset) is dataset


def test_a_limit_takes_the_first_samples_before_they_are_ordered(dataset):
    grouped = group_by_image(ChosenSamples(dataset, range(4), name="first"))
    assert grouped.sample_ids == ["s0", "s3", "s1", "s2"]


def test_entries_that_cannot_be_understood_stay_where_they_are(tmp_path):
    path = messages_file(tmp_path, ["a.png", "b.png", "a.png"])
    lines = path.read_text().splitlines()
    lines[1] = json.dumps({"id": "odd", "messages": [{"role": "system", "content": 3}], "images": {"b": 1}})
    path.write_text("\n".join(lines))
    assert group_by_image(MessagesDataset(path)).sample_ids == ["s0", "s2", "odd"]


def test_the_described_order_changes_with_the_images_names(tmp_path):
    first = group_by_image(LlavaDataset(llava_file(tmp_path)))
    again = group_by_image(LlavaDataset(llava_file(tmp_path)))
    renamed = group_by_image(LlavaDataset(llava_file(tmp_path, ["a.png", *IMAGES[1:]])))
    assert first.describe() == again.describe()
    assert first.describe()["fingerprint"] != renamed.describe()["fingerprint"]
    assert first.fingerprint() == renamed.fingerprint()


def test_grouping_is_stable_for_any_scatter(tmp_path):
    images = [f"{index // 4}.png" for index in range(40)]
    random.Random(0).shuffle(images)
    grouped = group_by_image(LlavaDataset(llava_file(tmp_path, images)))
    places = [int(sample_id[1:]) for sample_id in grouped.sample_ids]
    expected = sorted(range(40), key=lambda index: (images.index(images[index]), index))
    assert places == expected


def test_text_columns_of_a_saved_folder_name_their_images(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = {
        "question": ["q ?"] * 3,
        "answer": ["yes"] * 3,
        "image": ["a.png", "b.png", "a.png"],
        "id": ["x", "y", "z"],
    }
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "saved"))
    assert group_by_image(open_dataset(str(tmp_path / "saved"))).sample_ids == ["x", "z", "y"]


def test_samples_chosen_or_joined_otherwise_are_made_of_something_else(tmp_path, monkeypatch):
    """And are told apart where what was found out about them is kept."""
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    monkeypatch.setattr(surveys, "SHARED_FROM", 0)
    monkeypatch.setattr(surveys.os, "sched_getaffinity", lambda _: {0})
    lines = messages_file(tmp_path)
    lines.write_text(lines.read_text().replace("question", "asked"))
    one, other = LlavaDataset(llava_file(tmp_path)), MessagesDataset(lines)
    count = len(one) + len(other)
    made = [
        ChosenSamples(one, [0, 1], name="a"),
        ChosenSamples(one, [1, 0], name="b"),
        ChosenSamples(other, range(2), name="c"),
        JoinedSamples([one, other], name="d"),
        JoinedSamples([one, other], name="e", names=["x", "y"]),
        JoinedSamples([one, other], name="f", names=["x", "z"]),
        JoinedSamples([one, other], name="g", order=np.arange(count).reshape(2, -1).T.ravel()),
        JoinedSamples([other, one], name="h"),
    ]
    expected = [fingerprint_samples(data) for data in made]
    assert [data.fingerprint() for data in made] == expected
    assert [data.fingerprint() for data in made] == expected  # kept by now
    assert len({*expected}) == len(made)
    unread = _Unread(one, [0, 1], name="a")
    assert unread.made_of() == made[0].made_of()
    unread.failed = frozenset({"s0"})
    assert unread.made_of() is None
    assert unread.fingerprint() == fingerprint_samples(unread) != expected[0]
