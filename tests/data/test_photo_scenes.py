"""`photo-scenes`: texts that are true of one picture of two, held-out pairs of things, and nothing that a text alone tells."""

import itertools
import pickle
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.photos import dataset, stamps
from vlm_distill_cache.data.photos.scene import (
    GRID,
    GROUNDS,
    IMAGE_SIZE,
    SIZES,
    PhotoScene,
    natural_ground,
    photo_generator,
)
from vlm_distill_cache.data.photos.stamps import CUT_OUTS, GROUP_OF, GROUPS, MEMBERS, NOUNS
from vlm_distill_cache.data.photos.text import PAIR_KINDS, QUESTION_KINDS, RELATIONS
from vlm_distill_cache.data.registry import open_dataset, open_evaluation

ITEMS = 60
NAMED = re.compile(r"an? (?:(small|large) )?(\w+)")


@pytest.fixture
def drawn():
    """The test draws: it is skipped without the photographs."""
    try:
        stamps.check_installed()
    except DataError as error:
        pytest.skip(str(error).partition(";")[0])


@pytest.fixture
def missing(monkeypatch, tmp_path):
    """No photographs are installed."""
    monkeypatch.setattr(stamps, "STAMPS", tmp_path)


@pytest.fixture(autouse=True)
def installed(request, monkeypatch):
    """Texts and scenes need no photograph."""
    if not {"drawn", "missing"} & set(request.fixturenames):
        monkeypatch.setattr(dataset, "check_installed", lambda: None)


@pytest.fixture
def evaluation():
    return open_evaluation("photo-scenes:seed=3", "test", ITEMS)


# A slow, literal reading of texts, written against scenes alone --------------------------------------


def things_of(scene, noun, size=None):
    return [thing for thing in scene.things if thing.noun == noun and size in (None, thing.size)]


def related(scene, first, relation, second):
    (one,), (other,) = things_of(scene, first), things_of(scene, second)
    across, down = one.cell % 3 - other.cell % 3, one.cell // 3 - other.cell // 3
    return {"left of": across < 0, "right of": across > 0, "above": down < 0, "below": down > 0}[relation]


def is_true(scene, caption):
    found = NAMED.findall(caption)
    if not all(things_of(scene, noun, size or None) for size, noun in found):
        return False
    relation = next((relation for relation in RELATIONS if f" {relation} " in caption), None)
    return relation is None or related(scene, found[0][1], relation, found[1][1])


def answer_to(scene, question):
    if match := re.fullmatch(r"where is the (\w+)", question):
        row, column = divmod(things_of(scene, match[1])[0].cell, 3)
        return ["top", "middle", "bottom"][row] + " " + ["left", "center", "right"][column]
    if match := re.fullmatch(r"what is (.+) the (\w+)", question):
        if match[1] == "size":
            raise AssertionError
        (found,) = [t.noun for t in scene.things if t.noun != match[2] and related(scene, t.noun, match[1], match[2])]
        return found
    if match := re.fullmatch(r"how many (?:(small|large) )?things are there", question):
        return str(sum(match[1] in (None, thing.size) for thing in scene.things))
    if match := re.fullmatch(r"what size is the (\w+)", question):
        return things_of(scene, match[1])[0].size
    if match := re.fullmatch(r"is there an? (\w+)", question):
        return "yes" if things_of(scene, match[1]) else "no"
    first, relation, second = re.fullmatch(r"is the (\w+) (.+) the (\w+)", question).groups()
    return "yes" if related(scene, first, relation, second) else "no"


def twins(items):
    """Items and their twins, as they stand next to each other."""
    return list(zip(items[0::2], items[1::2], strict=True))


# What is there ---------------------------------------------------------------------------------------


def test_66_nouns_in_groups_of_six_without_a_cut_out_twice():
    assert len(NOUNS) == len(set(NOUNS)) == 66
    assert [len(members) for members in MEMBERS] == [6] * GROUPS
    assert all(GROUP_OF[noun] == group for group, members in enumerate(MEMBERS) for noun in members)
    stems = [stem for stems in CUT_OUTS.values() for stem in stems]
    assert len(stems) == len(set(stems))


def test_pairs_of_things_that_are_scored_are_in_no_training_picture():
    def pairs(scene):
        return {frozenset(pair) for pair in itertools.combinations(scene.nouns, 2)}

    trained = open_dataset("photo-scenes:images=1200,seed=3")
    seen = set().union(*(pairs(trained.scene(index)) for index in range(len(trained))))
    found = open_evaluation("photo-scenes:seed=3", "test", ITEMS)
    scored = set().union(*(pairs(item.image.scene) for item in (*found.pairs, *found.questions)))
    assert not seen & scored
    assert len(seen) > 1000  # of 1980 of different groups
    assert len(scored) > 100
    nouns = {noun for index in range(len(trained)) for noun in trained.scene(index).nouns}
    assert nouns == set(NOUNS)


def test_wrong_texts_name_no_pair_that_training_knows(evaluation):
    for pair in evaluation.pairs:
        for caption in (pair.right, pair.wrong):
            assert len({GROUP_OF[noun] for _, noun in NAMED.findall(caption)}) == 1
    for question in evaluation.questions:
        named = {word for word in f"{question.question} {question.answer}".split() if word in NOUNS}
        assert len({GROUP_OF[noun] for noun in named}) <= 1


def test_splits_and_seeds_share_no_scene():
    def scenes(split, seed):
        data = open_dataset(f"photo-scenes:images=40,seed={seed}", split=split)
        return {repr(data.scene(index)) for index in range(40)}

    found = [scenes(split, seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    assert len(set().union(*found)) == 6 * 40


def test_samples_do_not_depend_on_how_many_there_are():
    few, many = open_dataset("photo-scenes:images=5"), open_dataset("photo-scenes:images=50")
    assert [few[index] for index in range(5)] == [many[index] for index in range(5)]
    assert pickle.loads(pickle.dumps(few))[3] == few[3]  # noqa: S301 - our own bytes


# Truth -----------------------------------------------------------------------------------------------


def test_training_texts_are_true():
    data = open_dataset("photo-scenes:images=150,seed=4")
    for index in range(150):
        sample, scene = data[index], data.scene(index)
        assert len(sample.turns) == len(set(sample.turns)) == dataset.TURNS
        for turn in sample.turns:
            if turn.question in dataset.CAPTION_QUESTIONS:
                assert is_true(scene, turn.answer), turn
            else:
                assert answer_to(scene, turn.question) == turn.answer, turn


def test_a_caption_is_true_of_its_picture_and_the_other_one_is_not(evaluation):
    assert Counter(pair.kind for pair in evaluation.pairs) == dict.fromkeys(PAIR_KINDS, ITEMS)
    for pair in evaluation.pairs:
        assert is_true(pair.image.scene, pair.right), pair
        assert not is_true(pair.image.scene, pair.wrong), pair


def test_answers_are_true(evaluation):
    assert Counter(item.kind for item in evaluation.questions) == dict.fromkeys(QUESTION_KINDS, ITEMS)
    for item in evaluation.questions:
        assert answer_to(item.image.scene, item.question) == item.answer, item


# Nothing but the picture tells -----------------------------------------------------------------------


def test_every_caption_is_right_of_one_twin_and_wrong_of_the_other(evaluation):
    for first, second in twins(evaluation.pairs):
        assert (first.right, first.wrong) == (second.wrong, second.right)
        assert first.image.number == second.image.number
        assert first.kind == second.kind


def test_every_question_has_two_answers(evaluation):
    for first, second in twins(evaluation.questions):
        assert first.question == second.question
        assert first.answer != second.answer


def test_words_and_lengths_are_as_frequent_in_right_captions_as_in_wrong_ones(evaluation):
    words = [Counter(word for text in texts for word in text.split()) for texts in (
        [pair.right for pair in evaluation.pairs], [pair.wrong for pair in evaluation.pairs]
    )]  # fmt: skip
    assert words[0] == words[1]


@pytest.mark.parametrize("longest", [1, 2, 3])
def test_a_scorer_of_n_grams_has_half_of_the_captions_right(evaluation, longest):
    """Trained on the captions of training, and on right against wrong ones of other held-out items."""
    told: Counter[str] = Counter()

    def grams(text):
        words = ["<", *text.split(), ">"]
        return [" ".join(words[i : i + n]) for n in range(1, longest + 1) for i in range(len(words) - n + 1)]

    for sample in map(open_dataset("photo-scenes:images=150").__getitem__, range(150)):
        for turn in sample.turns:
            told.update(grams(turn.answer) if not turn.question else [])
    for pair in open_evaluation("photo-scenes:seed=8", "test", ITEMS).pairs:
        told.update(dict.fromkeys(grams(pair.right), 3))
        told.subtract(dict.fromkeys(grams(pair.wrong), 3))

    def score(text):
        return sum(np.log(max(told[gram], 0) + 0.1) for gram in grams(text))

    hits = [np.sign(score(pair.right) - score(pair.wrong)) / 2 + 0.5 for pair in evaluation.pairs]
    assert np.mean(hits) == 0.5


def test_an_answer_that_a_question_names_alone_is_right_for_half_of_the_items_at_most(evaluation):
    answers: dict[tuple[str, str], Counter[str]] = {}
    for item in evaluation.questions:
        answers.setdefault((item.kind, item.question), Counter())[item.answer] += 1
    right = sum(max(found.values()) for found in answers.values())
    assert right <= len(evaluation.questions) * 0.6  # the best answer to each question, chosen after the fact


def test_yes_and_no_are_as_frequent_in_training():
    data = open_dataset("photo-scenes:images=600")
    turns = [turn for index in range(600) for turn in data[index].turns if turn.answer in ("yes", "no")]
    share = np.mean([turn.answer == "yes" for turn in turns])
    assert abs(share - 0.5) < 3 * 0.5 / len(turns) ** 0.5
    for start in ("is there", "is the "):
        found = [turn.answer == "yes" for turn in turns if turn.question.startswith(start)]
        assert abs(np.mean(found) - 0.5) < 3 * 0.5 / len(found) ** 0.5


# Pictures --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("drawn")
def test_twins_differ_only_where_their_things_do():
    evaluation = open_evaluation("photo-scenes", "validation", 6)
    for first, second in twins(evaluation.pairs):
        one, other = (np.asarray(item.image.load(), np.int16) for item in (first, second))
        assert one.shape == (IMAGE_SIZE, IMAGE_SIZE, 3)
        changed = (one != other).any(axis=-1)
        assert 0.005 < changed.mean() < 0.35, first
    assert all(np.array_equal(item.image.load(), item.image.load()) for item in evaluation.pairs[:2])


@pytest.mark.usefixtures("drawn")
def test_a_thing_is_in_its_cell_and_a_large_one_is_larger():
    data = open_dataset("photo-scenes:images=16")
    areas = {size: [] for size in SIZES}
    for index in range(16):
        image = data[index].images[0]
        for thing in image.scene.things:
            alone, empty = (replace(image, scene=PhotoScene(things=things)) for things in ((thing,), ()))
            shown = (np.asarray(alone.load(), np.int16) != np.asarray(empty.load(), np.int16)).any(axis=-1)
            rows, columns = np.nonzero(shown)
            middle = [(one.min() + one.max()) / 2 * GRID / IMAGE_SIZE for one in (rows, columns)]
            assert abs(middle[0] - thing.row - 0.5) < 0.5
            assert abs(middle[1] - thing.column - 0.5) < 0.5
            areas[thing.size].append(np.ptp(rows) * np.ptp(columns))
    assert max(areas["small"]) < min(areas["large"])


@pytest.mark.usefixtures("drawn")
def test_grounds_differ_and_so_do_their_ids():
    smooth, natural = (open_dataset(f"photo-scenes:images=2,ground={ground}") for ground in GROUNDS)
    assert smooth[1].turns == natural[1].turns
    assert smooth.sample_ids[1] != natural.sample_ids[1]
    assert not np.array_equal(smooth[1].images[0].load(), natural[1].images[0].load())


def test_a_natural_ground_has_the_spectrum_of_photographs():
    """Its power falls with the frequency about as 1 / f^2."""
    grey = np.mean([
        np.abs(np.fft.fft2(np.asarray(natural_ground(photo_generator("test", 0, number, 1)), float).mean(-1))) ** 2
        for number in range(6)
    ], axis=0)  # fmt: skip
    power = [grey[0, 2:4].mean(), grey[0, 8:16].mean(), grey[0, 32:56].mean()]
    assert power[0] > 4 * power[1] > 16 * power[2]


# Mistakes --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("missing")
def test_without_the_package_the_error_says_how_to_install_it():
    for ask in (open_dataset, open_evaluation):
        with pytest.raises(DataError, match=r"the first of them .*\.png.*sudo apt-get install tuxpaint-stamps-default"):
            ask("photo-scenes")


@pytest.mark.usefixtures("missing")
def test_a_photograph_that_went_meanwhile_is_named():
    with pytest.raises(DataError, match=r"owl\.png cannot be read .*install --reinstall"):
        stamps.cut_out.__wrapped__("animals/birds/owl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ground=grass", "option ground is 'grass'; choose smooth or natural"),
        ("kinds=motion", "photo-scenes has no option kinds; it has images, seed, ground"),
        ("images=9000000", "expected at most 2000000"),
        ("seed=x", "option seed must be a whole number"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        open_dataset(f"photo-scenes:{options}")


def test_an_unknown_split_is_refused():
    with pytest.raises(DataError, match="photo-scenes has no split 'dev'; choose one of train, validation, test"):
        open_dataset("photo-scenes", split="dev")
