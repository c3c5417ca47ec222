"""The data set ``photo-scenes``: photographs of two or three things, with captions, questions and twins for scoring.

Nothing is stored: picture i of a split is a function of (split, seed, i), put together when it is asked for, from cut-outs
that a package of the system brings (`stamps.check_installed`).
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.photos.scene import (
    GROUNDS,
    SPLITS,
    PhotoScene,
    draw_scene,
    photo_generator,
    sample_scene,
)
from vlm_distill_cache.data.photos.stamps import check_installed
from vlm_distill_cache.data.photos.text import PAIR_KINDS, QUESTION_KINDS, Rule, Twins, list_caption, relation_caption
from vlm_distill_cache.data.sample import CaptionPair, Dataset, EvaluationSet, Question, Sample, Turn

NAME = "photo-scenes"
IMAGES = 4000  # where no number is given
ITEMS = 100  # of each kind, where no limit is given
MAX_IMAGES = 2_000_000
TURNS = 6  # independent conversations a picture
CAPTION_QUESTIONS = ("", "describe the image")
_SCENE, _GROUND, _TEXT, _EVALUATION = 0, 1, 2, 3  # purposes of a picture's generators
_ASKED = ("relation", "relation", "yes_no", "yes_no", "size", "count")
_SCENES_AHEAD = 50  # an evaluation looks at this many times the scenes it needs before it gives up


@dataclass(frozen=True, kw_only=True)
class PhotoImage:
    """An image source that puts its picture together when it is loaded.

    Attributes:
        number: Of the picture; twins have the same, and so the same ground.
        scene: What is in it.
        part: Behind the name of a picture that is scored.
    """

    split: str
    seed: int
    number: int
    ground: str
    scene: PhotoScene
    part: str = ""

    @property
    def name(self) -> str:
        """What errors and logs call this picture; of training pictures also the sample's id."""
        return picture_name(self.split, self.seed, self.number, self.ground) + self.part

    def load(self) -> Image.Image:
        """Put it together: RGB, 224 x 224 pixels."""
        generator = photo_generator(self.split, self.seed, self.number, _GROUND)
        return draw_scene(self.scene, generator, ground=self.ground)


def picture_name(split: str, seed: int, number: int, ground: str) -> str:
    """The id of a picture; grounds that are not the default are in it."""
    return f"{NAME}-{split}-s{seed}-{'' if ground == GROUNDS[0] else f'{ground}-'}{number:06d}"


def is_held_out(split: str) -> bool:
    """Whether pictures show pairs of things that training pictures never do."""
    return split != "train"


def scene_turns(scene: PhotoScene, generator: np.random.Generator, *, held_out: bool) -> tuple[Turn, ...]:
    """Write the `TURNS` conversations of one picture: three captions, a place, two questions of mixed kinds; no two alike."""
    turns: dict[tuple[str, str], Turn] = {}

    def keep(question: str, answer: str) -> None:
        turns.setdefault((question, answer), Turn(question=question, answer=answer))

    for caption in (list_caption, relation_caption, relation_caption):
        question = CAPTION_QUESTIONS[int(generator.integers(len(CAPTION_QUESTIONS)))]
        keep(question, caption(scene, generator))
    asked = ["where"]
    while len(turns) < TURNS:
        kind = asked.pop() if asked else _ASKED[int(generator.integers(len(_ASKED)))]
        found = QUESTION_KINDS[kind](scene, generator, held_out)
        if found is not None:
            keep(found.question, found.first)
    return tuple(turns.values())


class PhotoScenes(Dataset):
    """Samples put together on demand.

    Args:
        split: ``train``, ``validation`` or ``test``; the last two show pairs of things that ``train`` never does.
        images: Number of pictures, one sample each.
        seed: Other seeds give other pictures.
        ground: ``smooth`` or ``natural``.

    Raises:
        DataError: If an option is none, or the package with the photographs is not installed.
    """

    def __init__(self, split: str, images: int = IMAGES, seed: int = 0, ground: str = GROUNDS[0]) -> None:
        check_options(split, images, seed, ground)
        check_installed()
        self.name = f"{NAME}:images={images},seed={seed}" + ("" if ground == GROUNDS[0] else f",ground={ground}")
        self.split: str = split
        self.images, self.seed, self.ground = images, seed, ground
        self.sample_ids = [picture_name(split, seed, number, ground) for number in range(images)]

    def scene(self, index: int) -> PhotoScene:
        """The scene of picture ``index``."""
        return _scene(self.split, self.seed, index)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.images:
            raise IndexError(f"sample {index} of {self.name} ({self.split}): it has {self.images} samples")
        scene = self.scene(index)
        image = PhotoImage(split=self.split, seed=self.seed, number=index, ground=self.ground, scene=scene)
        generator = photo_generator(self.split, self.seed, index, _TEXT)
        turns = scene_turns(scene, generator, held_out=is_held_out(self.split))
        return Sample(sample_id=image.name, images=(image,), turns=turns, independent_turns=True)


def _scene(split: str, seed: int, number: int) -> PhotoScene:
    return sample_scene(photo_generator(split, seed, number, _SCENE), held_out=is_held_out(split))


def photo_evaluation(split: str, items: int = ITEMS, seed: int = 0, ground: str = GROUNDS[0]) -> EvaluationSet:
    """Draw an evaluation: ``items`` caption pairs and ``items`` questions of every kind, twins next to each other.

    Item ``...-0`` has what is right of a scene, ``...-1`` what is right of its twin: the same two captions the other way
    round, or the same question with another answer. A scene gives at most one twin of each kind; of an odd number of items
    the last one has none.

    Returns:
        Pairs of the seven kinds of SugarCrepe and questions of the kinds in `text.QUESTION_KINDS`, by kind.

    Raises:
        DataError: If an option is none, or the package with the photographs is not installed.
    """
    check_options(split, items, seed, ground)
    check_installed()
    rules: dict[str, Rule] = {**PAIR_KINDS, **QUESTION_KINDS}
    found: dict[str, list[tuple[PhotoImage, PhotoImage, Twins]]] = {kind: [] for kind in rules}
    wanted = -(-items // 2)
    for number in range(wanted * _SCENES_AHEAD):
        missing = [kind for kind, kept in found.items() if len(kept) < wanted]
        if not missing:
            break
        scene = _scene(split, seed, number)
        generator = photo_generator(split, seed, number, _EVALUATION)
        for kind in rules:  # all of them: what a kind draws must not depend on how many there are of another
            twins = rules[kind](scene, generator, is_held_out(split))
            if twins is not None and kind in missing:
                first, second = (
                    PhotoImage(split=split, seed=seed, number=number, ground=ground, scene=one, part=f"-{kind}-{twin}")
                    for twin, one in enumerate((scene, twins.scene))
                )
                found[kind].append((first, second, twins))
    pairs: list[CaptionPair] = []
    questions: list[Question] = []
    for kind in rules:
        for position in range(items if found[kind] else 0):
            if position // 2 >= len(found[kind]):
                break
            *images, twins = found[kind][position // 2]
            image = images[position % 2]
            right, wrong = (twins.first, twins.second) if position % 2 == 0 else (twins.second, twins.first)
            if kind in PAIR_KINDS:
                pairs.append(CaptionPair(item_id=image.name, image=image, right=right, wrong=wrong, kind=kind))
            else:
                questions.append(
                    Question(item_id=image.name, image=image, question=twins.question, answer=right, kind=kind)
                )
    return EvaluationSet(pairs=tuple(pairs), questions=tuple(questions))


def check_options(split: str, count: int, seed: int, ground: str) -> None:
    """Refuse an unknown split or ground, negative numbers, and more samples than whose ids fit into memory.

    Raises:
        DataError: Says what there is.
    """
    if split not in SPLITS:
        raise DataError(f"{NAME} has no split {split!r}; choose one of {', '.join(SPLITS)}")
    if ground not in GROUNDS:
        raise DataError(f"{NAME}: option ground is {ground!r}; choose {' or '.join(GROUNDS)}")
    if count < 0 or seed < 0:
        raise DataError(f"{NAME}: images and seed must not be negative, got images={count}, seed={seed}")
    if count > MAX_IMAGES:
        raise DataError(
            f"{NAME}: images={count}, expected at most {MAX_IMAGES}, whose ids fit into memory; ask for fewer"
        )
