"""The drawn data set: determinism, disjoint splits, and texts that are true, or false, of the scene graph."""

import itertools
import pickle
import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.shapes.dataset import TURNS, SceneImage, ShapesDataset, scene_turns, shapes_evaluation
from vlm_distill_cache.data.shapes.scene import (
    CELL,
    COLORS,
    IMAGE_SIZE,
    SHAPES,
    SPLITS,
    draw_scene,
    sample_scene,
    scene_generator,
)
from vlm_distill_cache.data.shapes.text import PAIR_KINDS, QUESTION_KINDS

SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}


@pytest.fixture(scope="module")
def evaluation():
    return shapes_evaluation("test", 400, seed=5)


# A slow, literal reading of the texts, written against the scene graph alone -----------------------


def find(scene, words):
    """Objects a phrase such as 'large red circle', 'circle' or 'red object' can mean."""
    words = [word for word in words.split() if word not in ("a", "the", "object", "objects")]
    return [o for o in scene.objects if all(w in (o.color, o.shape, o.size) for w in words)]


def related(a, relation, b):
    return {
        "left of": a.column < b.column,
        "right of": a.column > b.column,
        "above": a.row < b.row,
        "below": a.row > b.row,
    }[relation]


def caption_is_true(scene, caption):
    match = re.fullmatch(r"(.+) (left of|right of|above|below) (.+)", caption)
    if match:
        first, relation, second = match.groups()
        return any(related(a, relation, b) for a in find(scene, first) for b in find(scene, second))
    return all(find(scene, part) for part in caption.split(" and "))


def answer(scene, question):
    """The answer to a question, None if the question is ambiguous."""
    if match := re.fullmatch(r"where is (.+)", question):
        found = {f"c{o.column + 1} r{o.row + 1}" for o in find(scene, match[1])}
    elif match := re.fullmatch(r"what (color|shape) is the object (left of|right of|above|below) (.+)", question):
        (anchor,) = find(scene, match[3])
        others = [o for o in scene.objects if related(o, match[2], anchor)]
        found = {getattr(o, match[1]) for o in others} if len(others) == 1 else set()
    elif match := re.fullmatch(r"what (color|shape|size) is (.+)", question):
        things = find(scene, match[2])
        found = {getattr(o, match[1]) for o in things} if len(things) == 1 else set()
    elif match := re.fullmatch(r"how many (.+) are there", question):
        found = {str(len(find(scene, SINGULAR.get(match[1], match[1]))))}
    elif match := re.fullmatch(r"is there (a .+)", question):
        found = {"yes" if find(scene, match[1]) else "no"}
    elif match := re.fullmatch(r"is (.+) (left or right of|above or below) (.+)", question):
        (a,), (b,) = find(scene, match[1]), find(scene, match[3])
        names = ("left of", "right of") if "left" in match[2] else ("above", "below")
        found = {name.split()[0] for name in names if related(a, name, b)}
    else:
        first, relation, second = re.fullmatch(
            r"is (the .+) (left of|right of|above|below) (the .+)", question
        ).groups()
        (a,), (b,) = find(scene, first), find(scene, second)
        found = {"yes" if related(a, relation, b) else "no"}
    return found.pop() if len(found) == 1 else None


# Pictures -------------------------------------------------------------------------------------------


def test_pictures_are_pinned():
    # A change here changes every cache and every reported number: bump nothing silently.
    image = SceneImage(split="train", seed=0, index=0)
    assert image.scene() == sample_scene(scene_generator("train", 0, 0, 0))
    assert image.array().shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
    assert image.array().dtype == np.uint8
    assert [o.noun + " " + o.cell_name for o in image.scene().objects] == [
        "purple square c3 r2",
        "teal triangle c4 r6",
        "blue cross c4 r5",
    ]
    assert int(image.array().astype(np.int64).sum()) == pytest.approx(1311653, rel=1e-3)


def test_a_picture_depends_on_split_seed_and_index_only():
    few, many = ShapesDataset("train", 3, seed=4), ShapesDataset("train", 50, seed=4)
    np.random.default_rng(0).random(10)
    many[40].images[0].load()
    for index in range(3):
        assert few[index] == many[index]
        assert np.array_equal(np.asarray(few[index].images[0].load()), np.asarray(many[index].images[0].load()))
    assert few.sample_ids == many.sample_ids[:3]


def test_splits_and_seeds_share_no_picture():
    seen = Counter(
        SceneImage(split=split, seed=seed, index=index).array().tobytes()
        for split in SPLITS
        for seed in (0, 1)
        for index in range(60)
    )
    assert max(seen.values()) == 1


def test_objects_have_distinct_cells_and_names_and_lie_inside_their_cell():
    for index in range(300):
        scene = sample_scene(scene_generator("validation", 1, index, 0))
        assert 2 <= len(scene.objects) <= 4
        assert len(scene.nouns) == len(scene.objects)
        assert len({(o.row, o.column) for o in scene.objects}) == len(scene.objects)
        for thing in scene.objects:
            assert int(thing.x // CELL) == thing.column
            assert int(thing.y // CELL) == thing.row


def test_an_object_changes_the_pixels_of_its_cell_and_its_neighbours_only():
    scene = sample_scene(scene_generator("train", 0, 7, 0))
    alone = draw_scene(scene, scene_generator("train", 0, 7, 1)).astype(int)
    saturation = alone.max(-1) - alone.min(-1)
    for thing in scene.objects:
        x, y = int(thing.x), int(thing.y)
        assert saturation[y - 1 : y + 2, x - 1 : x + 2].mean() > 60  # clutter and background are grey
    mask = np.ones_like(saturation, bool)
    for thing in scene.objects:
        mask[max(0, int(thing.y) - 8) : int(thing.y) + 8, max(0, int(thing.x) - 8) : int(thing.x) + 8] = False
    assert np.median(saturation[mask]) < 60


# Texts ----------------------------------------------------------------------------------------------


def test_every_training_turn_is_true_of_the_scene_graph():
    dataset = ShapesDataset("train", 150, seed=2)
    for index in range(len(dataset)):
        sample = dataset[index]
        scene = sample.images[0].scene()
        assert len(sample.turns) == len(set(sample.turns)) == TURNS
        assert sample.independent_turns
        for turn in sample.turns:
            if turn.question in ("", "describe the image"):
                assert caption_is_true(scene, turn.answer), (sample.sample_id, turn)
            else:
                assert answer(scene, turn.question) == turn.answer, (sample.sample_id, turn)


def test_the_right_caption_is_true_and_the_wrong_one_false(evaluation):
    for pair in evaluation.pairs:
        scene = pair.image.scene()
        assert caption_is_true(scene, pair.right), pair
        assert not caption_is_true(scene, pair.wrong), pair


def test_every_answer_follows_from_the_scene_graph(evaluation):
    for question in evaluation.questions:
        assert answer(question.image.scene(), question.question) == question.answer, question


def test_every_kind_has_the_number_of_items_asked_for(evaluation):
    assert Counter(pair.kind for pair in evaluation.pairs) == dict.fromkeys(PAIR_KINDS, 400)
    assert Counter(question.kind for question in evaluation.questions) == dict.fromkeys(QUESTION_KINDS, 400)
    ids = [item.item_id for item in (*evaluation.pairs, *evaluation.questions)]
    assert len(ids) == len(set(ids))


def test_right_and_wrong_captions_have_the_same_length(evaluation):
    for pair in evaluation.pairs:
        if pair.kind != "replace_rel":
            assert len(pair.right.split()) == len(pair.wrong.split()), pair


def test_replaced_relations_have_the_same_distribution_of_lengths(evaluation):
    # "left of" is a word longer than "above"; 400 pairs: one standard error of a share is 2.5 points.
    pairs = [pair for pair in evaluation.pairs if pair.kind == "replace_rel"]
    shares = [np.mean([len(getattr(p, side).split()) == 8 for p in pairs]) for side in ("right", "wrong")]
    assert abs(shares[0] - shares[1]) < 0.1


def test_swaps_keep_the_words_and_replacements_change_one(evaluation):
    for pair in evaluation.pairs:
        right, wrong = Counter(pair.right.split()), Counter(pair.wrong.split())
        if pair.kind.startswith("swap"):
            assert right == wrong
        elif pair.kind in ("replace_att", "replace_obj", "add_att"):
            assert sum((right - wrong).values()) == sum((wrong - right).values()) == 1


def test_a_text_prior_fitted_on_the_training_captions_scores_near_chance(evaluation):
    """Trigram counts of 1,500 pictures' captions, add-one: what a model learns that never looks."""
    trigrams, bigrams = Counter(), Counter()
    for index in range(1500):
        generator = scene_generator("train", 0, index, 2)
        for turn in scene_turns(sample_scene(scene_generator("train", 0, index, 0)), generator):
            if turn.question in ("", "describe the image"):
                words = ["<s>", "<s>", *turn.answer.split(), "</s>"]
                bigrams.update(itertools.pairwise(words))
                trigrams.update(zip(words, words[1:], words[2:], strict=False))

    def log_prob(caption):
        words = ["<s>", "<s>", *caption.split(), "</s>"]
        return sum(
            np.log((trigrams[a, b, c] + 1) / (bigrams[a, b] + 40))
            for a, b, c in zip(words, words[1:], words[2:], strict=False)
        )

    hits = defaultdict(list)
    for pair in evaluation.pairs:
        gap = log_prob(pair.right) - log_prob(pair.wrong)
        hits[pair.kind].append(0.5 if gap == 0 else float(gap > 0))
    for kind, values in hits.items():
        # 400 items: one standard error is 2.5 points.
        assert abs(np.mean(values) - 0.5) < 0.08, (kind, np.mean(values))


def test_no_question_kind_can_be_answered_by_its_most_frequent_answer(evaluation):
    answers = defaultdict(Counter)
    for question in evaluation.questions:
        # "how many objects" and "what color ..." have different answers: the prior knows the first words.
        answers[question.kind, " ".join(question.question.split()[:3])][question.answer] += 1
    for kind in QUESTION_KINDS:
        best = sum(max(c.values()) for (k, _), c in answers.items() if k == kind)
        total = sum(c.total() for (k, _), c in answers.items() if k == kind)
        assert best / total < 0.68, (kind, best / total)


# The data set ---------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_texts_and_survives_pickling():
    dataset = ShapesDataset("train", 20, seed=0)
    assert dataset.fingerprint() == pickle.loads(pickle.dumps(dataset)).fingerprint()  # noqa: S301 our own bytes
    others = [ShapesDataset("train", 20, seed=1), ShapesDataset("train", 21), ShapesDataset("test", 20)]
    assert len({dataset.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_every_color_and_shape_occurs():
    nouns = {o.noun for i in range(400) for o in sample_scene(scene_generator("train", 0, i, 0)).objects}
    assert len(nouns) == len(COLORS) * len(SHAPES)


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(DataError, match=r"no split 'dev'; choose one of train, validation, test"):
        ShapesDataset("dev", 3)
    with pytest.raises(DataError, match="must not be negative"):
        shapes_evaluation("test", -1)
    with pytest.raises(IndexError, match="it has 3 samples"):
        ShapesDataset("train", 3)[3]
