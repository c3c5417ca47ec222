"""Drawn pairs and clips: answers that are true, that no single picture or frame tells, and combinations that training lacks."""

import itertools
import pickle
import re
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.builtin import MODEL_MAX_LENGTH, load_tokenizer
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import Frame, FrameSampling, ImageSource, VideoSource
from vlm_distill_cache.data.shapes.clips import LEAST_FRAMES, MOST_FRAMES, MOTIONS, DrawnClip, is_held_out, sampled
from vlm_distill_cache.data.shapes.kinds import HELD_OUT, KINDS, ShapesOfKinds
from vlm_distill_cache.data.shapes.pairs import COMPARISONS, held_out_quadrant
from vlm_distill_cache.data.shapes.scene import COLORS, GRID, SHAPES

ITEMS = 16
SINGULAR = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}


@pytest.fixture(scope="module")
def evaluation():
    return open_evaluation("shapes:seed=5,kinds=comparison+motion", "test", ITEMS)


def of_kind(evaluation, kind):
    return [item for item in evaluation.questions if item.kind.removesuffix(HELD_OUT) == kind]


def arrays(medium):
    """All that a picture or clip shows, as bytes a picture."""
    if isinstance(medium, VideoSource):
        return [np.asarray(frame.image).tobytes() for frame in medium.frames(FrameSampling())]
    return [np.asarray(medium.load()).tobytes()]


# A slow, literal reading of the questions, written against scene graphs alone ----------------------


def compare(first, second, question):
    scenes = {"1": first, "2": second}
    if match := re.fullmatch(r"what is in image (\d) but not in image (\d)", question):
        here, there = (Counter(o.noun for o in scenes[number].objects) for number in match.groups())
        found = list(here - there)
    elif "changed color" in question:
        found = [a.shape for a in first.objects for b in second.objects if a.shape == b.shape and a.color != b.color]
    elif "changed size" in question:
        found = [a.noun for a in first.objects for b in second.objects if a.noun == b.noun and a.size != b.size]
    else:
        shape = SINGULAR[re.search("circles|squares|triangles|crosses", question)[0]]
        counts = [len([o for o in scene.objects if o.shape == shape]) for scene in (first, second)]
        if question.startswith("how many"):
            found = [str(counts[0] + counts[1])]
        else:
            found = ["no image" if counts[0] == counts[1] else f"image {1 + (counts[1] > counts[0])}"]
    assert len(found) == 1, (question, found)
    return found[0]


def watch(scenes, question):
    """From where everything is in each frame; `scenes` in the order of showing."""
    tracks = {
        o.noun: [(s.x, s.y) for scene in scenes for s in scene.objects if s.noun == o.noun] for o in scenes[0].objects
    }
    moves = {
        noun: [i for i, (a, b) in enumerate(itertools.pairwise(track)) if a != b]
        for noun, track in tracks.items()
        if len(set(track)) > 1
    }
    assert len(moves) == 2

    def way(noun):
        (x0, y0), (x1, y1) = tracks[noun][0], tracks[noun][-1]
        if x0 != x1:
            assert y0 == y1
            return "from left to right" if x1 > x0 else "from right to left"
        return "from above to below" if y1 > y0 else "from below to above"

    if match := re.fullmatch(r"which way does the (.+) move", question):
        return way(match[1])
    if match := re.fullmatch(r"what moves (from .+)", question):
        (mover,) = [noun for noun in moves if way(noun) == match[1]]
        return mover
    if question == "what moves first":
        return min(moves, key=lambda noun: moves[noun][0])
    noun = re.fullmatch(r"does the (.+) stop", question)[1]
    return "yes" if moves[noun][-1] < len(scenes) - 2 else "no"


def answer(media, question):
    if isinstance(media[0], DrawnClip):
        return watch(media[0].scenes(), question)
    return compare(*(image.scene() for image in media), question)


def test_every_answer_follows_from_what_is_shown(evaluation):
    for item in evaluation.questions:
        assert answer((item.image, *item.further), item.question) == item.answer, item
    for kind in ("comparison", "motion"):
        dataset = ShapesOfKinds("validation", 60, 1, (kind,))
        for sample in map(dataset.__getitem__, range(len(dataset))):
            turns = sample.turns
            if any(turn.places for turn in turns[1:]):  # the first question is about the picture in front of it
                assert turns[0].places == turns[1].places == (0,)
                turns = turns[1:]
            for turn in turns:
                said = turn.question.removeprefix("image 1: , image 2: , ")
                assert answer(sample.images, said) == turn.answer, (sample.sample_id, turn)


# What one picture, or one frame, tells ---------------------------------------------------------------


@pytest.mark.parametrize("kind", COMPARISONS)
def test_the_same_question_and_one_picture_occur_with_different_answers(evaluation, kind):
    shared = Counter()
    for first, second in pairs_of(evaluation, kind):
        assert first.question == second.question
        assert first.answer != second.answer
        same = [arrays(a) == arrays(b) for a, b in zip(media(first), media(second), strict=True)]
        assert sum(same) == 1
        shared[same.index(True)] += 1
    assert min(shared[0], shared[1]) >= ITEMS // 4  # either picture may be the one that tells nothing


def pairs_of(evaluation, kind):
    items = of_kind(evaluation, kind)
    return zip(items[::2], items[1::2], strict=True)


def media(item):
    return (item.image, *item.further)


@pytest.mark.parametrize("kind", MOTIONS)
def test_the_same_question_and_frames_occur_with_different_answers(evaluation, kind):
    for number, (first, second) in enumerate(pairs_of(evaluation, kind)):
        assert first.question == second.question
        assert first.answer != second.answer
        if number % 6:  # the clips are those of all kinds
            continue
        assert arrays(first.image) == arrays(second.image)[::-1]
        assert LEAST_FRAMES <= len(set(arrays(first.image))) <= MOST_FRAMES


def test_no_frame_tells_most_answers_by_its_number():
    """The best guess from where the named object, or both movers, are in one frame, with all frames' numbers known."""
    seen = defaultdict(Counter)
    for number, backwards in itertools.product(range(200), (False, True)):
        clip = DrawnClip(split="train", seed=0, number=number, held_out=False, backwards=backwards)
        drawn, scenes = clip.clip(), clip.scenes()
        turns = drawn.turns(backwards=backwards)
        for place, name in ((0, "start"), (len(scenes) // 2, "middle"), (-1, "end")):
            where = {o.noun: (o.row, o.column)[1 - drawn.axis] for o in scenes[place].objects}
            movers = [where[o.noun] for o in drawn.objects[:2]]
            for kind, mover in (("way", drawn.asked[0]), ("stop", drawn.asked[1])):
                seen[kind, name, movers[mover]][turns[kind].answer.split()[-1] in ("right", "below", "yes")] += 1
            first_named = turns["first"].answer == min(o.noun for o in drawn.objects[:2])
            seen["first", name, tuple(movers[:: 1 if drawn.objects[0].noun < drawn.objects[1].noun else -1])][
                first_named
            ] += 1
    for kind, name in itertools.product(("way", "stop", "first"), ("start", "middle", "end")):
        chosen = [counts for (a, b, _), counts in seen.items() if (a, b) == (kind, name)]
        best = sum(max(counts.values()) for counts in chosen) / sum(counts.total() for counts in chosen)
        assert best < 0.75, (kind, name, best)


def test_no_kind_of_question_has_an_answer_that_is_mostly_right(evaluation):
    for kind in (*COMPARISONS, *MOTIONS):
        answers = Counter(item.answer for item in of_kind(evaluation, kind))
        assert max(answers.values()) / answers.total() <= 0.55, (kind, answers)


# Held-out combinations -------------------------------------------------------------------------------


def combinations(sample_media):
    """Of object and place, or of object and axis of motion; and whether each is held out."""
    if isinstance(sample_media[0], DrawnClip):
        axis = sample_media[0].clip().axis
        return {(o.noun, axis): is_held_out(o.color, o.shape, axis) for o in sample_media[0].clip().objects}
    found = {}
    for thing in (o for image in sample_media for o in image.scene().objects):
        place = 2 * (thing.y >= 36) + (thing.x >= 36)
        found[thing.shape, place] = place == held_out_quadrant(thing.shape)
    return found


@pytest.mark.parametrize("kind", ["comparison", "motion"])
def test_training_shows_no_combination_that_held_out_items_ask_about(evaluation, kind):
    dataset = ShapesOfKinds("train", 300, 0, (kind,))
    trained = {c for i in range(0, len(dataset), 2) for c in combinations(dataset[i].images)}
    asked, known = set(), set()
    for item in evaluation.questions:
        if (len(item.further) == 1) == (kind == "comparison"):
            (asked if item.kind.endswith(HELD_OUT) else known).update(combinations(media(item)))
    assert not trained & asked
    assert known <= trained
    # Everything that is combined is known by itself, on either side.
    for part in (0, 1):
        assert {c[part] for c in asked} <= {c[part] for c in trained}
    assert len(asked) >= (len(SHAPES) if kind == "comparison" else 10)  # of 16, of 48: a quarter is held out
    assert sum(is_held_out(*of) for of in itertools.product(COLORS, SHAPES, (0, 1))) == 12


def test_items_of_every_kind_come_by_name(evaluation):
    kinds = [kind + suffix for suffix in ("", HELD_OUT) for kind in (*COMPARISONS, *MOTIONS)]
    assert Counter(item.kind for item in evaluation.questions) == dict.fromkeys(kinds, ITEMS)
    assert len({item.item_id for item in evaluation.questions}) == len(evaluation.questions)
    assert not evaluation.pairs
    mixed = open_evaluation("shapes:kinds=mixed", "test", 3)
    assert {item.kind for item in mixed.questions} > set(kinds)
    assert mixed.pairs == open_evaluation("shapes", "test", 3).pairs


# Clips are videos ------------------------------------------------------------------------------------


def choose_slowly(times, fps, most):
    """One frame after the other, as the contract of `FrameSampling` says it."""
    chosen, k = [], 0
    while k / fps <= times[-1]:
        place = next(i for i, time in enumerate(times) if time >= k / fps)
        chosen += [place] if place not in chosen else []
        k += 1
    if len(chosen) <= most:
        return chosen
    middles = [(part + 0.5) * times[-1] / most for part in range(most)]
    return [max(i for i, time in enumerate(times) if time <= middle) for middle in middles]


def test_frames_are_sampled_by_their_times():
    times = [float(second) for second in range(9)]
    for fps, most in itertools.product((0.25, 0.5, 1.0, 0.8, 3.0), (1, 2, 4, 5, 9, 32)):
        chosen = sampled(times, FrameSampling(fps=fps, most=most))
        assert chosen == choose_slowly(times, fps, most), (fps, most)
        assert chosen == sorted(set(chosen))
    clip = ShapesOfKinds("train", 1, 0, ("motion",))[0].images[0]
    frames = clip.frames(FrameSampling(fps=0.5))
    assert [frame.time for frame in frames] == [2.0 * k for k in range(len(frames))]
    assert all(isinstance(frame, Frame) and frame.image.mode == "RGB" for frame in frames)
    assert [f.image for f in frames] == [f.image for f in clip.frames(FrameSampling())[::2]]


def test_pictures_are_pictures_and_clips_are_videos():
    sample = ShapesOfKinds("train", 1, 0, ("comparison",))[0]
    assert all(isinstance(image, ImageSource) and not isinstance(image, VideoSource) for image in sample.images)
    sample = ShapesOfKinds("train", 1, 0, ("motion",))[0]
    assert sample.videos == (0,)
    assert not isinstance(sample.images[0], ImageSource)


# The data set ----------------------------------------------------------------------------------------


def test_a_mixed_data_set_has_every_form_of_a_sample():
    dataset = open_dataset("shapes:images=24,kinds=mixed")
    samples = [dataset[index] for index in range(24)]
    assert [len(sample.images) for sample in samples] == [1, 2, 1, 0] * 6
    assert [len(sample.videos) for sample in samples] == [0, 0, 1, 0] * 6
    assert {sample.independent_turns for sample in samples} == {True, False}
    assert {len(sample.turns) for sample in samples} >= {1, 4, 8}
    shown = {
        tuple(turn.places for turn in sample.turns if turn.places) for sample in samples if len(sample.images) == 2
    }
    assert shown == {(), ((9, 20),), ((0,), (0,))}  # in front; inside one question; one with each of two questions
    assert any(turn.places for sample in samples[2::4] for turn in sample.turns)
    for sample in samples:
        assert sum(len(turn.places) for turn in sample.placed()) == len(sample.images)


def test_a_sample_depends_on_its_number_within_its_kind_only():
    mixed, alone = ShapesOfKinds("train", 24, 4, KINDS), ShapesOfKinds("train", 6, 4, ("motion",))
    assert [mixed[index] for index in range(2, 24, 4)] == [alone[index] for index in range(6)]
    plain = open_dataset("shapes:images=6,seed=4")
    assert [mixed[index] for index in range(0, 24, 4)] == [plain[index] for index in range(6)]
    copy = pickle.loads(pickle.dumps(mixed))  # noqa: S301 our own bytes
    assert copy.fingerprint() == mixed.fingerprint()
    assert arrays(copy[1].images[0]) == arrays(mixed[1].images[0])
    others = [
        ShapesOfKinds("test", 24, 4, KINDS),
        ShapesOfKinds("train", 24, 5, KINDS),
        ShapesOfKinds("train", 24, 4, KINDS[1:]),
    ]
    assert len({mixed.fingerprint(), *(other.fingerprint() for other in others)}) == 4
    assert len(set(mixed.sample_ids)) == 24


def test_splits_and_seeds_share_no_picture():
    seen = Counter()
    for split, seed in itertools.product(("train", "validation", "test"), (0, 1)):
        dataset = ShapesOfKinds(split, 6, seed, ("comparison", "motion"))
        every = {image for index in range(6) for medium in dataset[index].images for image in arrays(medium)}
        seen.update(every)
    assert max(seen.values()) == 1


def test_the_plain_data_set_is_what_it_was():
    assert open_dataset("shapes:images=20").fingerprint() == "e289dd415779693c270f8b54b3f7a02b"


def test_the_built_in_tokenizer_has_the_answers_and_tells_the_questions_apart():
    """Some words of questions ("moves", "changed") are unknown to it; no two questions become one by that."""
    tokenizer, dataset = load_tokenizer(), ShapesOfKinds("train", 300, 0, KINDS[1:])
    turns = [turn for index in range(300) for turn in dataset[index].turns]
    for text in {turn.answer for turn in turns}:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"], text
    questions = {turn.question for turn in turns}
    assert len({tuple(tokenizer(text)["input_ids"]) for text in questions}) == len(questions)


def test_mixed_samples_fit_the_built_in_models():
    from vlm_distill_cache.stage1_teacher.demo.teacher import build_demo_encoder

    encoder = replace(build_demo_encoder(), max_length=2048, most_pictures=None, sampling=FrameSampling())
    dataset = ShapesOfKinds("train", 16, 0, KINDS)
    counts = set()
    for sample in map(dataset.__getitem__, range(16)):
        encoded = encoder(sample)
        assert encoded.position_ids.max() < MODEL_MAX_LENGTH
        counts.add(encoded.visual_mask.sum() // GRID**2)
    assert counts >= {0, 1, 2}
    assert max(counts) > LEAST_FRAMES


def test_wrong_kinds_are_refused_by_name():
    for kinds in ("movement", "motion+motion", "motion+", "mixed+motion"):
        with pytest.raises(
            DataError, match=r"option kinds is .*, expected one or more of scene, comparison, motion, text"
        ):
            open_dataset(f"shapes:kinds={kinds}")
    with pytest.raises(DataError, match="option kinds has no value"):
        open_dataset("shapes:kinds=")
    with pytest.raises(DataError, match="easy-vqa has no option kinds"):
        open_dataset("easy-vqa:kinds=motion")
    with pytest.raises(DataError, match="no split 'dev'"):
        open_evaluation("shapes:kinds=motion", "dev")
