"""The built-in data set: drawn scenes with captions, questions and hard negatives.

Nothing is stored: picture i of a split is a function of (split, seed, i) alone, drawn when it is
asked for (more than 1,000 samples/s on one core). Splits use different generator keys, so they are
disjoint. Each picture carries `TURNS` independent conversations: the trial found captions and
"where is the red circle" turns beside the questions to be what makes a small model learn to look.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.sample import CaptionPair, Dataset, EvaluationSet, Question, Sample, Turn
from vlm_distill_cache.data.shapes.scene import SPLITS, Scene, draw_scene, sample_scene, scene_generator
from vlm_distill_cache.data.shapes.text import (
    CAPTION_QUESTIONS,
    PAIR_KINDS,
    QUESTION_KINDS,
    list_caption,
    location_question,
    relation_caption,
)

MAX_IMAGES = 2_000_000
TURNS = 8  # independent conversations a picture
_SCENE, _PIXELS, _TEXT, _EVALUATION = 0, 1, 2, 3  # purposes of a picture's generators
_ASKED = ("attribute", "attribute", "relation", "relation", "side", "count", "size", "yes_no")
_SCENES_AHEAD = 50  # an evaluation looks at this many times the scenes it needs before it gives up


@dataclass(frozen=True, kw_only=True)
class SceneImage:
    """An image source that draws its picture when loaded."""

    split: str
    seed: int
    index: int

    @property
    def name(self) -> str:
        """What errors and logs call this picture; also its sample_id."""
        return f"shapes-{self.split}-s{self.seed}-{self.index:06d}"

    def scene(self) -> Scene:
        """Return the scene graph of this picture."""
        return _scene(self.split, self.seed, self.index)

    def array(self) -> np.ndarray:
        """Draw the picture: RGB, uint8 ``[72, 72, 3]``."""
        return draw_scene(self.scene(), scene_generator(self.split, self.seed, self.index, _PIXELS))

    def load(self) -> Image.Image:
        """Draw the picture as an RGB image of 72 x 72 pixels."""
        return Image.fromarray(self.array())


@lru_cache(maxsize=64)  # texts are written first, the picture is drawn a little later
def _scene(split: str, seed: int, index: int) -> Scene:
    return sample_scene(scene_generator(split, seed, index, _SCENE))


def scene_turns(scene: Scene, generator: np.random.Generator) -> tuple[Turn, ...]:
    """Write the `TURNS` conversations of one picture; the generator is consumed.

    Three captions (a list, two relations), one location, four questions of mixed kinds; no two alike.
    """
    turns: dict[tuple[str, str], Turn] = {}

    def keep(question: str, answer: str) -> None:
        turns.setdefault((question, answer), Turn(question=question, answer=answer))

    for caption in (list_caption, relation_caption, relation_caption):
        question = CAPTION_QUESTIONS[int(generator.integers(len(CAPTION_QUESTIONS)))]
        keep(question, caption(scene, generator))
    keep(*location_question(scene, generator))
    while len(turns) < TURNS:
        kind = _ASKED[int(generator.integers(len(_ASKED)))]
        asked = QUESTION_KINDS[kind](scene, generator)
        if asked is not None:
            keep(*asked)
    return tuple(turns.values())


class ShapesDataset(Dataset):
    """Training samples drawn on demand.

    Args:
        split: ``train``, ``validation`` or ``test``.
        images: Number of pictures, one sample each.
        seed: Other seeds give other pictures.

    Raises:
        DataError: If the split is unknown or a number is negative.
    """

    def __init__(self, split: str, images: int, seed: int = 0) -> None:
        check_numbers(split, images, seed)
        self.name = f"shapes:images={images},seed={seed}"
        self.split: str = split
        self.images, self.seed = images, seed
        # Picture i has the same id whatever the number of images.
        self.sample_ids = [SceneImage(split=split, seed=seed, index=index).name for index in range(images)]

    def scene(self, index: int) -> Scene:
        """Return the scene graph of picture ``index``."""
        return SceneImage(split=self.split, seed=self.seed, index=index).scene()

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.images:
            raise IndexError(f"sample {index} of {self.name} ({self.split}): it has {self.images} samples")
        image = SceneImage(split=self.split, seed=self.seed, index=index)
        turns = scene_turns(image.scene(), scene_generator(self.split, self.seed, index, _TEXT))
        return Sample(sample_id=image.name, images=(image,), turns=turns, independent_turns=True)


def shapes_evaluation(split: str, items: int, seed: int = 0) -> EvaluationSet:
    """Draw an evaluation: ``items`` caption pairs and ``items`` questions of every kind.

    A scene gives at most one of each.

    Returns:
        Pairs of the seven kinds of SugarCrepe and questions of the kinds in `QUESTION_KINDS`, by kind.

    Raises:
        DataError: If the split is unknown or a number is negative.
    """
    check_numbers(split, items, seed)
    pairs: dict[str, list[CaptionPair]] = {kind: [] for kind in PAIR_KINDS}
    questions: dict[str, list[Question]] = {kind: [] for kind in QUESTION_KINDS}
    found = 0
    for index in range(items * _SCENES_AHEAD):
        if found == items * (len(pairs) + len(questions)):
            break
        image = SceneImage(split=split, seed=seed, index=index)
        scene = image.scene()
        generator = scene_generator(split, seed, index, _EVALUATION)
        for kind, rule in PAIR_KINDS.items():
            text = rule(scene, generator)
            if text is not None and len(pairs[kind]) < items:
                found += 1
                item_id = f"{image.name}-{kind}"
                pairs[kind].append(CaptionPair(item_id=item_id, image=image, right=text[0], wrong=text[1], kind=kind))
        for kind, rule in QUESTION_KINDS.items():
            text = rule(scene, generator)
            if text is not None and len(questions[kind]) < items:
                found += 1
                item_id = f"{image.name}-{kind}"
                questions[kind].append(
                    Question(item_id=item_id, image=image, question=text[0], answer=text[1], kind=kind)
                )
    return EvaluationSet(
        pairs=tuple(pair for kept in pairs.values() for pair in kept),
        questions=tuple(question for kept in questions.values() for question in kept),
    )


def check_numbers(split: str, count: int, seed: int) -> None:
    """Refuse an unknown split, negative numbers, and more samples than whose ids fit into memory, as `DataError`."""
    if split not in SPLITS:
        raise DataError(f"shapes has no split {split!r}; choose one of {', '.join(SPLITS)}")
    if count < 0 or seed < 0:
        raise DataError(f"shapes: images and seed must not be negative, got images={count}, seed={seed}")
    if count > MAX_IMAGES:
        raise DataError(
            f"shapes: images={count}, expected at most {MAX_IMAGES}, whose ids fit into memory; ask for fewer"
        )
