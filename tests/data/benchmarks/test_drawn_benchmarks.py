"""The drawn benchmarks are read as published ones are, and say what is true of their pictures."""

import json

import numpy as np
import pytest

from vlm_distill_cache.common.files.signed import list_files
from vlm_distill_cache.data.benchmarks.drawn import _swapped_scenes, write_drawn
from vlm_distill_cache.data.benchmarks.search import LAYOUTS, find_benchmarks
from vlm_distill_cache.data.shapes.text import RELATIONS, relation_holds

ITEMS = 6
COUNTS = {
    "sugarcrepe": 7 * ITEMS,
    "winoground": ITEMS,
    "vqav2": 7 * ITEMS,
    "gqa": 6 * ITEMS,
    "mmbench": None,
    "pope": None,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("drawn")
    write_drawn(made, items=ITEMS)
    return made


def test_each_layout_reads_its_own_with_all_pictures(folder):
    found = find_benchmarks(folder)
    assert not found.unread
    assert {benchmark.layout for benchmark in found.benchmarks.values()} == COUNTS.keys()
    assert {layout.name for layout in LAYOUTS} >= COUNTS.keys()
    for benchmark in found.benchmarks.values():
        assert not benchmark.left_out
        assert benchmark.items
        if count := COUNTS[benchmark.layout]:
            assert len(benchmark.items) == count
        for item in benchmark.items:
            for picture in getattr(item, "images", None) or (item.image,):
                assert picture.load().size == (72, 72)


def test_the_same_bytes_are_written_each_time(folder, tmp_path):
    write_drawn(tmp_path, items=ITEMS)
    assert list_files(tmp_path) == list_files(folder)


def test_of_two_swapped_scenes_each_caption_fits_one():
    for scenes, captions in _swapped_scenes(20):
        words = [sorted(caption.split()) for caption in captions]
        assert words[0] == words[1]
        for scene, caption in [(scenes[i], captions[j]) for i in (0, 1) for j in (0, 1)]:
            relation = next(relation for relation in RELATIONS if f" {relation} " in caption)
            first, second = caption.removeprefix("a ").split(f" {relation} a ")
            named = {thing.noun: thing for thing in scene.objects}
            fits = relation_holds(named[first], relation, named[second])
            assert fits == (scenes.index(scene) == captions.index(caption))


def test_options_and_answers_are_of_their_questions(folder):
    """Against the scenes' own questions: the option that the letter names is the drawn answer."""
    asked = json.loads((folder / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json").read_text())["questions"]
    noted = json.loads((folder / "vqav2" / "v2_mscoco_val2014_annotations.json").read_text())["annotations"]
    assert len({entry["question_id"] for entry in asked}) == len(asked)
    truth = {}
    for question, annotation in zip(asked, noted, strict=True):
        assert question["question_id"] == annotation["question_id"]
        assert [answer["answer"] for answer in annotation["answers"]] == [annotation["multiple_choice_answer"]] * 10
        truth.setdefault(question["question"], set()).add(annotation["multiple_choice_answer"])
    header, *rows = (folder / "mmbench" / "mmbench_dev_en.tsv").read_text().splitlines()
    letters = []
    for row in rows:
        entry = dict(zip(header.split("\t"), row.split("\t"), strict=True))
        letters.append(entry["answer"])
        options = [entry[letter] for letter in "ABCD" if entry[letter]]
        assert len(set(options)) == len(options) >= 2
        assert entry[entry["answer"]] in truth[entry["question"]]
    assert len(set(letters)) >= 3  # no letter is always right
    lines = [json.loads(line) for line in (folder / "pope" / "coco_pope_adversarial.json").read_text().splitlines()]
    assert np.mean([line["label"] == "yes" for line in lines]) == 0.5
