"""Scores of `make experiment-photos`, item by item; twins, which stand next to each other, also give the right picture of two."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.photos.text import PAIR_KINDS, QUESTION_KINDS
from vlm_distill_cache.data.sample import CaptionPair, Dataset, EvaluationSet, ImageSource

BATCH = 32  # items
SIDE = 224  # pixels of the mean picture
ROUNDING = 1e-3  # nats of a caption
PICTURE = "picture: "  # in front of a kind of captions: which of two pictures is a caption's?
ORDER = ("swap_obj", "replace_rel")
GROUPS: dict[str, tuple[str, ...]] = {
    "captions": tuple(PAIR_KINDS),
    "order and relations": ORDER,
    "right picture of two": tuple(PICTURE + kind for kind in PAIR_KINDS),
    "questions": tuple(QUESTION_KINDS),
}


@dataclass(frozen=True)
class Scoring:
    """What is told of the answers to some data.

    Attributes:
        groups: Kinds by the score that is their unweighted mean.
        decided_by: The score that verdicts are about, named before anything was run.
        gate: Kinds of which a teacher must have enough right before students learn from it, and what they are called.
    """

    groups: Mapping[str, tuple[str, ...]]
    decided_by: str
    gate: tuple[str, tuple[str, ...]]


DRAWN = Scoring(GROUPS, "order and relations", ("order and relations", ORDER))
_SIGNS = {0.0: "0", 0.5: "=", 1.0: "1"}  # of an item: wrong, a tie, right
_VALUES = {sign: value for value, sign in _SIGNS.items()}

Answers = dict[str, str]  # by kind, a sign an item


def answer_items(model: Any, encoder: Any, items: EvaluationSet) -> Answers:
    """What a model has right.

    Args:
        model: A student, or a model of the library.
        encoder: The one that fits it.
        items: Twins, where pairs have one, next to each other and in front of those that have none.
    """
    import torch

    from vlm_distill_cache.stage2_student.scores.evaluate import score_questions, weigh_pairs

    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            weighed = weigh_pairs(model, encoder, items.pairs, batch_size=BATCH)["likelihood"]  # [I, 2], nats
            asked = score_questions(model, encoder, items.questions, batch_size=BATCH)
    finally:
        model.train(was_training)
    found: dict[str, list[str]] = defaultdict(list)
    right, wrong = weighed.T
    for pair, hit in zip(items.pairs, prefers(right, wrong).tolist(), strict=True):
        found[pair.kind].append(_SIGNS[hit])
    twins = [place for place in range(len(right)) if is_twin(items.pairs, place)]
    # A twin's wrong caption is the right one here.
    hits = prefers(right[twins], wrong[[place ^ 1 for place in twins]])
    for place, hit in zip(twins, hits.tolist(), strict=True):
        found[PICTURE + items.pairs[place].kind].append(_SIGNS[hit])
    for question, hit in zip(items.questions, asked.tolist(), strict=True):
        found[question.kind].append(_SIGNS[float(hit)])
    return {kind: "".join(signs) for kind, signs in found.items()}


def prefers(likelier: np.ndarray, than: np.ndarray) -> np.ndarray:
    """1.0 where a caption is likelier than another, float ``[I]``; 0.5 where they differ by less than `ROUNDING`.

    The same caption of the same picture gets other last digits in another batch: a blind model would win or lose by them.

    Args:
        likelier: Nats, float ``[I]``.
        than: Likewise.
    """
    from vlm_distill_cache.stage2_student.scores.metrics import preference

    return preference(np.where(np.abs(likelier - than) < ROUNDING, than, likelier), than)


def is_twin(pairs: Sequence[CaptionPair], place: int) -> bool:
    """Whether the neighbour of a pair has the same captions the other way round."""
    twin = pairs[place ^ 1] if place ^ 1 < len(pairs) else None
    return twin is not None and (twin.right, twin.wrong) == (pairs[place].wrong, pairs[place].right)


def scores_of(answers: Mapping[str, str], scoring: Scoring = DRAWN) -> dict[str, float]:
    """Percent by kind, and of each group the unweighted mean of those of its kinds that were asked."""
    kinds = {kind: 100 * statistics.mean(_VALUES[sign] for sign in signs) for kind, signs in answers.items()}
    groups = {name: statistics.mean(kinds[kind] for kind in of if kind in kinds) for name, of in scoring.groups.items()}
    return {name: round(value, 3) for name, value in (groups | kinds).items()}


def blinded(items: EvaluationSet, picture: ImageSource) -> EvaluationSet:
    """The same items with one picture for all of them."""
    return EvaluationSet(
        pairs=tuple(replace(pair, image=picture) for pair in items.pairs),
        questions=tuple(replace(question, image=picture) for question in items.questions),
    )


def mean_picture(dataset: Dataset, file: Path, pictures: int = 256) -> ImageSource:
    """The mean of the first pictures of a data set, 224 x 224 pixels, kept in a file."""
    if not file.is_file():
        from PIL import Image

        shown: Iterable[Any] = (dataset[number].images[0] for number in range(min(pictures, len(dataset))))
        arrays: Sequence[np.ndarray] = [np.asarray(image.load().resize((SIDE, SIDE)), np.float32) for image in shown]
        scratch = file.with_suffix(".part.png")
        Image.fromarray(np.mean(arrays, axis=0).round().astype(np.uint8)).save(scratch)
        scratch.rename(file)
    return ImageFile(file)
