"""Drawn data of several kinds: pictures, pairs that are compared, clips, texts; ``shapes:kinds=comparison+motion``.

Opt-in: without ``kinds`` the data set is that of `data.shapes.dataset`, byte for byte. Samples take the kinds in turn, and
a sample's number within its kind decides all of it, so that more samples, or other kinds beside it, change none.

| kind | a sample shows | and asks |
|---|---|---|
| ``scene`` | a picture | the conversations of ``shapes`` |
| ``comparison`` | two pictures | 1 to 5 questions, each about both (`data.shapes.pairs`) |
| ``motion`` | a clip of 6 to 12 frames, one a second | 4 questions about what moves (`data.shapes.clips`) |
| ``text`` | nothing | which object is on the other side of another |

Two neighbours of a kind are twins: the same question with one picture in common, or with the same frames in the other
direction, and another answer. The splits ``validation`` and ``test`` also hold combinations that ``train`` lacks.

Every fourth pair of twins is a conversation whose pictures stand inside a question, and every fourth one whose second
picture comes with the second question; its first question is about the first picture alone. The other pairs, and most
clips, have independent questions behind what they show.
"""

from collections.abc import Sequence
from dataclasses import replace

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.sample import Dataset, EvaluationSet, Question, Sample, Turn
from vlm_distill_cache.data.shapes.clips import MOTIONS, DrawnClip
from vlm_distill_cache.data.shapes.dataset import ShapesDataset, check_numbers, shapes_evaluation
from vlm_distill_cache.data.shapes.pairs import COMPARISONS, first_picture_turn, pair_images, pair_turns
from vlm_distill_cache.data.shapes.scene import sample_scene, scene_generator
from vlm_distill_cache.data.shapes.text import RELATIONS, relation_holds

KINDS = ("scene", "comparison", "motion", "text")
MIXED = "mixed"  # all of them
HELD_OUT = "_held_out"  # behind the kind of an item that asks about a combination which training lacks
TEXT_PURPOSE = 400  # of the generators of texts
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


def parse_kinds(text: str) -> tuple[str, ...]:
    """Read ``comparison+motion``, or ``mixed`` for all kinds.

    Raises:
        DataError: A kind is unknown or named twice.
    """
    names = KINDS if text == MIXED else tuple(text.split("+"))
    if not set(names) <= set(KINDS) or len(set(names)) < len(names):
        raise DataError(
            f"shapes: option kinds is {text!r}, expected one or more of {', '.join(KINDS)}, joined by +, each once, or {MIXED}"
        )
    return names


class ShapesOfKinds(Dataset):
    """Samples of several kinds, drawn on demand.

    Args:
        split: ``train``, ``validation`` or ``test``.
        images: Number of samples.
        seed: Other seeds give other samples.
        kinds: Some of `KINDS`.

    Raises:
        DataError: If the split is unknown or a number is negative.
    """

    def __init__(self, split: str, images: int, seed: int, kinds: tuple[str, ...]) -> None:
        check_numbers(split, images, seed)
        self.name = f"shapes:images={images},seed={seed},kinds={'+'.join(kinds)}"
        self.split: str = split
        self.images, self.seed, self.kinds = images, seed, kinds
        self._scenes = ShapesDataset(split, -(-images // len(kinds)), seed)
        self.sample_ids = [self._id(*self._kind_of(index)) for index in range(images)]

    def _kind_of(self, index: int) -> tuple[str, int]:
        """Kind of a sample, and its number within that kind."""
        return self.kinds[index % len(self.kinds)], index // len(self.kinds)

    def _id(self, kind: str, number: int) -> str:
        if kind == "scene":
            return self._scenes.sample_ids[number]
        return f"shapes-{self.split}-s{self.seed}-{kind}-{number:06d}"

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.images:
            raise IndexError(f"sample {index} of {self.name} ({self.split}): it has {self.images} samples")
        kind, number = self._kind_of(index)
        if kind == "scene":
            return self._scenes[number]
        if kind == "text":
            return text_sample(self._id(kind, number), self.split, self.seed, number)
        make = comparison_sample if kind == "comparison" else motion_sample
        held_out = self.split != "train" and number // 8 % 2 == 1
        sample = make(self.split, self.seed, number // 2, number % 2, held_out=held_out)
        return replace(sample, sample_id=self._id(kind, number))


def comparison_sample(split: str, seed: int, number: int, twin: int, *, held_out: bool) -> Sample:
    """A twin, 0 or 1, of the ``number``-th pair; its kind is one of `COMPARISONS`, in turn."""
    of = (split, seed, number, COMPARISONS[number % len(COMPARISONS)], twin)
    images = pair_images(*of, held_out=held_out)
    turns = pair_turns(*of, held_out=held_out)
    sample_id = f"{images[0].name}-{twin}"
    layout = number % 4
    if layout == 1:
        named = ("image 1: ", ", image 2: ", ", ")
        places = (len(named[0]), len(named[0] + named[1]))
        turns[0] = replace(turns[0], question="".join(named) + turns[0].question, places=places)
    elif layout == 2:
        begin = first_picture_turn(*of, held_out=held_out)
        turns = [replace(begin, places=(0,)), replace(turns[0], places=(0,)), *turns[1:]]
    return Sample(sample_id=sample_id, images=images, turns=tuple(turns), independent_turns=layout in (0, 3))


def motion_sample(split: str, seed: int, number: int, twin: int, *, held_out: bool) -> Sample:
    """The ``number``-th clip, forwards (twin 0) or backwards (1)."""
    clip = DrawnClip(split=split, seed=seed, number=number, held_out=held_out, backwards=bool(twin))
    turns = list(clip.clip().turns(backwards=clip.backwards).values())
    layout = number % 4
    if layout == 1:  # one conversation, and the clip behind its first question
        turns[0] = replace(turns[0], places=(len(turns[0].question),))
    return Sample(sample_id=clip.name, images=(clip,), turns=tuple(turns), independent_turns=layout != 1)


def text_sample(sample_id: str, split: str, seed: int, number: int) -> Sample:
    """A question that a text answers: the same relation from the other side."""
    generator = scene_generator(split, seed, number, TEXT_PURPOSE)
    first, second = sample_scene(generator).objects[:2]
    relation = next(relation for relation in RELATIONS if relation_holds(first, relation, second))
    facts = f"the {first.noun} is {relation} the {second.noun}."
    if number % 2:
        turn = Turn(question=f"{facts} what is {_OPPOSITE[relation]} the {first.noun}", answer=second.noun)
    else:
        turn = Turn(question=f"{facts} what is {relation} the {second.noun}", answer=first.noun)
    return Sample(sample_id=sample_id, images=(), turns=(turn,))


def evaluation_of_kinds(split: str, items: int, seed: int, kinds: Sequence[str]) -> EvaluationSet:
    """Draw an evaluation: ``items`` of every kind of question, and as many about combinations that training lacks.

    Twins follow each other: whoever looks at one picture, or at single frames, has at most half of them right by more
    than chance. Of ``scene`` the items of ``shapes``, of ``text`` none.

    Returns:
        Questions by kind; `HELD_OUT` ends the kinds of held-out combinations.

    Raises:
        DataError: If the split is unknown or a number is negative.
    """
    check_numbers(split, items, seed)
    found = shapes_evaluation(split, items, seed) if "scene" in kinds else EvaluationSet()
    questions = list(found.questions)
    for held_out in (False, True):
        suffix = HELD_OUT if held_out else ""
        if "comparison" in kinds:
            for place, kind in enumerate(COMPARISONS):
                for item in range(items):
                    of = (split, seed, place + item // 2 * len(COMPARISONS), kind, item % 2)
                    images = pair_images(*of, held_out=held_out)
                    turn = pair_turns(*of, held_out=held_out)[0]
                    questions.append(
                        Question(
                            item_id=f"{images[0].name}-{images[1].name}", image=images[0], further=images[1:],
                            question=turn.question, answer=turn.answer, kind=kind + suffix,
                        )
                    )  # fmt: skip
        if "motion" in kinds:
            for kind in MOTIONS:
                for item in range(items):
                    clip = DrawnClip(
                        split=split, seed=seed, number=item // 2, held_out=held_out, backwards=bool(item % 2)
                    )
                    turn = clip.clip().turns(backwards=clip.backwards)[kind]
                    questions.append(
                        Question(
                            item_id=f"{clip.name}-{kind}", image=clip, question=turn.question, answer=turn.answer,
                            kind=kind + suffix,
                        )
                    )  # fmt: skip
    return replace(found, questions=tuple(questions))
