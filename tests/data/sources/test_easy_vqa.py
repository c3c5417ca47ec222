"""easy-VQA: pictures become packed samples, and the three splits share no picture."""

import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.sources import easy_vqa
from vlm_distill_cache.data.sources.easy_vqa import EasyVqaDataset, easy_vqa_evaluation

package = pytest.importorskip("easy_vqa")


def test_splits_share_no_picture_and_lose_none():
    ids = {split: set(EasyVqaDataset(split).sample_ids) for split in easy_vqa.SPLITS}
    assert len(ids["train"] | ids["validation"] | ids["test"]) == sum(len(part) for part in ids.values()) == 5000
    assert {split: len(part) for split, part in ids.items()} == {
        "train": 3600,
        "validation": 400,
        "test": 1000,
    }


def test_samples_hold_the_packages_own_questions():
    dataset = EasyVqaDataset("train")
    texts, answers, images = package.get_train_questions()
    sample = dataset[dataset.sample_ids.index("train-123")]
    expected = [(text, answer) for text, answer, image in zip(texts, answers, images, strict=True) if image == 123]
    assert [(turn.question, turn.answer) for turn in sample.turns] == expected
    assert sample.independent_turns
    assert sample.images[0].load().size == (64, 64)
    assert sample.images[0].name.endswith("123.png")


def test_fingerprint_is_stable_and_differs_by_split():
    assert EasyVqaDataset("test").fingerprint() == EasyVqaDataset("test").fingerprint()
    assert EasyVqaDataset("test").fingerprint() != EasyVqaDataset("validation").fingerprint()


def test_evaluation_holds_every_question_with_its_kind():
    texts, answers, _ = package.get_test_questions()
    questions = easy_vqa_evaluation("test").questions
    assert sorted((item.question, item.answer) for item in questions) == sorted(zip(texts, answers, strict=True))
    assert len({item.item_id for item in questions}) == len(questions)
    for item in questions:
        expected = "yes/no" if item.answer in ("yes", "no") else item.kind
        assert item.kind == expected
    assert {item.answer for item in questions if item.kind == "shape"} == {"circle", "rectangle", "triangle"}
    assert {item.kind for item in questions} == {"yes/no", "shape", "colour"}


def test_a_limit_spreads_over_all_pictures():
    questions = easy_vqa_evaluation("test", limit=50).questions
    assert len(questions) == len({item.item_id for item in questions}) == 50
    assert len({item.image.name for item in questions}) == 50


def test_unknown_split_and_missing_package_are_refused(monkeypatch):
    with pytest.raises(DataError, match="no split 'dev'"):
        EasyVqaDataset("dev")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(easy_vqa, "import_module", missing)
    with pytest.raises(DataError, match=r"pip install 'vlm-distill-cache\[easy-vqa\]'"):
        EasyVqaDataset("train")
