"""Two pictures that are compared: what is only in one, what changed, where there is more.

Every pair has a twin: one picture and the question are the same, the other picture and the answer are not. So neither
picture alone tells the answer, nor does the question; in half of the pairs the first picture is the one that stays. Which
of the two twins a picture belongs to shows nowhere: both are drawn by the same law.

In pairs for training no shape lies in its `held_out_quadrant`; in held-out pairs each lies there and nowhere else. So a
held-out question is about a combination of object and place that no training pair has shown.

Source:
    Balanced pairs: VQA v2 (arXiv:1612.00837), section 3. What differs: here the second picture is drawn, and the balance
    is exact.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.shapes.scene import (
    COLORS,
    GRID,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    draw_scene,
    place_object,
    scene_generator,
)
from vlm_distill_cache.data.shapes.text import PLURALS, count_question

COMPARISONS = ("difference", "color", "size", "more", "count")
MOST_ALIKE = 3  # objects of a shape that is counted
_PURPOSES = 100  # the first of the purposes of generators here: ten for each kind, trained and held out
_TEXT = 9

Scenes = tuple[Scene, Scene]


def quadrant(row: int, column: int) -> int:
    """Which quarter of the picture a cell is in: 0 and 1 above, 2 and 3 below."""
    return 2 * (row >= GRID // 2) + (column >= GRID // 2)


def held_out_quadrant(shape: str) -> int:
    """The quarter in which a shape never lies in training pairs, and always in held-out ones."""
    return len(SHAPES) - 1 - SHAPES.index(shape)


@dataclass(frozen=True, kw_only=True)
class Twins:
    """A pair and its twin.

    Attributes:
        kept: The picture that both share.
        others: The other one, of each twin.
        side: Where the shared picture stands: 0 is the first, 1 the second.
        question: Asked about both.
        answers: Of each twin; they differ.
    """

    kept: Scene
    others: Scenes
    side: int
    question: str
    answers: tuple[str, str]

    def scenes(self, twin: int) -> Scenes:
        """First and second picture of a twin, 0 or 1."""
        return (self.kept, self.others[twin]) if self.side == 0 else (self.others[twin], self.kept)


# What can be said of two pictures ----------------------------------------------------------------


def difference(scenes: Scenes, first: int) -> tuple[str, str] | None:
    """What is in one picture (0 or 1) and not in the other, if that is one object."""
    only = sorted(scenes[first].nouns - scenes[1 - first].nouns)
    return (f"what is in image {first + 1} but not in image {2 - first}", only[0]) if len(only) == 1 else None


def changed_color(scenes: Scenes) -> tuple[str, str]:
    """Which shape has another colour in the second picture; each picture has a shape once, and both the same shapes."""
    before = {thing.shape: thing.color for thing in scenes[0].objects}
    (shape,) = [thing.shape for thing in scenes[1].objects if before[thing.shape] != thing.color]
    return "what changed color from image 1 to image 2", shape


def changed_size(scenes: Scenes) -> tuple[str, str]:
    """Which object has another size in the second picture; both have the same objects."""
    before = {thing.noun: thing.size for thing in scenes[0].objects}
    (noun,) = [thing.noun for thing in scenes[1].objects if before[thing.noun] != thing.size]
    return "what changed size from image 1 to image 2", noun


def more(scenes: Scenes, shape: str) -> tuple[str, str]:
    """Which picture has more objects of a shape."""
    first, second = (_count(scene, shape) for scene in scenes)
    answer = "no image" if first == second else f"image {1 if first > second else 2}"
    return f"which image has more {PLURALS[shape]}", answer


def count(scenes: Scenes, shape: str) -> tuple[str, str]:
    """How many objects of a shape both pictures have in all."""
    total = sum(_count(scene, shape) for scene in scenes)
    return f"how many {PLURALS[shape]} are there in image 1 and image 2 together", str(total)


def _count(scene: Scene, shape: str) -> int:
    return sum(thing.shape == shape for thing in scene.objects)


# Twins: one rule a kind --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawing:
    """Draws objects where the pairs of training, or held-out ones, may have them."""

    generator: np.random.Generator
    held_out: bool

    def number(self, low: int, high: int) -> int:
        """A whole number from ``low`` to ``high``, both among them."""
        return int(self.generator.integers(low, high + 1))

    def order(self, length: int) -> list[int]:
        """The numbers below ``length`` in random order."""
        return [int(place) for place in self.generator.permutation(length)]

    def names(self, count: int, *, shapes: tuple[str, ...] = SHAPES) -> list[tuple[str, str]]:
        """Different (colour, shape)."""
        every = [(color, shape) for color in COLORS for shape in shapes]
        return [every[place] for place in self.order(len(every))[:count]]

    def scene(self, names: list[tuple[str, str]]) -> Scene:
        """Objects of these names in cells of their own, in random order."""
        free = self.order(GRID * GRID)
        objects = []
        for color, shape in (names[place] for place in self.order(len(names))):
            cell = next(
                cell for cell in free if (quadrant(*divmod(cell, GRID)) == held_out_quadrant(shape)) == self.held_out
            )
            free.remove(cell)
            objects.append(place_object(color, shape, cell, self.generator))
        return Scene(objects=tuple(objects))

    def counted(self, shape: str, wanted: int) -> Scene:
        """A scene with so many objects of a shape, and 2 to 4 in all."""
        others = tuple(other for other in SHAPES if other != shape)
        rest = self.number(max(0, 2 - wanted), 4 - wanted)
        return self.scene(self.names(wanted, shapes=(shape,)) + self.names(rest, shapes=others))


def _asked(kept: Scene, others: Scenes, side: int, ask: Callable[[Scenes], tuple[str, str] | None]) -> Twins:
    asked = [ask((kept, other) if side == 0 else (other, kept)) for other in others]
    (question, first), (_, second) = [found for found in asked if found is not None]
    return Twins(kept=kept, others=others, side=side, question=question, answers=(first, second))


def _difference_twins(draw: _Drawing) -> Twins:
    present = draw.number(2, 4)
    names = draw.names(present + 2)
    shared, absent = names[:present], names[present:]
    left_out = draw.order(present)[:2]
    scenes = [
        draw.scene([name for place, name in enumerate(shared) if place != out] + [new])
        for out, new in zip(left_out, absent, strict=True)
    ]
    side, first = draw.number(0, 1), draw.number(0, 1)
    return _asked(draw.scene(shared), (scenes[0], scenes[1]), side, lambda scenes: difference(scenes, first))


def _color_twins(draw: _Drawing) -> Twins:
    shapes = [SHAPES[place] for place in draw.order(len(SHAPES))[: draw.number(2, 4)]]
    kept = draw.scene([(COLORS[draw.number(0, len(COLORS) - 1)], shape) for shape in shapes])

    def recolored(thing: SceneObject) -> SceneObject:
        step = draw.number(1, len(COLORS) - 1)
        return replace(thing, color=COLORS[(COLORS.index(thing.color) + step) % len(COLORS)])

    return _asked(kept, _each_changed(kept, recolored, draw), draw.number(0, 1), changed_color)


def _size_twins(draw: _Drawing) -> Twins:
    kept = draw.scene(draw.names(draw.number(2, 4)))

    def resized(thing: SceneObject) -> SceneObject:
        size = SIZES[1 - SIZES.index(thing.size)]
        return place_object(thing.color, thing.shape, GRID * thing.row + thing.column, draw.generator, size=size)

    return _asked(kept, _each_changed(kept, resized, draw), draw.number(0, 1), changed_size)


def _each_changed(kept: Scene, change: Callable[[SceneObject], SceneObject], draw: _Drawing) -> Scenes:
    """Two scenes, each with another object changed, all others where they were."""
    chosen = draw.order(len(kept.objects))[:2]
    first, second = (
        Scene(
            objects=tuple(change(thing) if place == one else thing for place, thing in enumerate(kept.objects)),
        )
        for one in chosen
    )
    return first, second


def _counted_twins(draw: _Drawing, ask: Callable[[Scenes, str], tuple[str, str]]) -> Twins:
    """Two numbers of a shape in the other picture that give different answers."""
    shape, side = SHAPES[draw.number(0, len(SHAPES) - 1)], draw.number(0, 1)
    kept = draw.counted(shape, draw.number(0, MOST_ALIKE))
    by_answer: dict[str, list[Scene]] = {}
    for wanted in draw.order(MOST_ALIKE + 1):
        other = draw.counted(shape, wanted)
        by_answer.setdefault(ask((kept, other) if side == 0 else (other, kept), shape)[1], []).append(other)
    answers = list(by_answer)
    chosen = [answers[place] for place in draw.order(len(answers))[:2]]
    others = (by_answer[chosen[0]][0], by_answer[chosen[1]][0])
    return _asked(kept, others, side, lambda scenes: ask(scenes, shape))


_RULES: dict[str, Callable[[_Drawing], Twins]] = {
    "difference": _difference_twins,
    "color": _color_twins,
    "size": _size_twins,
    "more": lambda draw: _counted_twins(draw, more),
    "count": lambda draw: _counted_twins(draw, count),
}


# Pictures and turns ------------------------------------------------------------------------------


@lru_cache(maxsize=64)  # as of scenes
def twins_of(split: str, seed: int, number: int, kind: str, *, held_out: bool) -> Twins:
    """Draw the twins of a kind's ``number``-th pair, from `COMPARISONS`."""
    generator = scene_generator(split, seed, number, _purpose(kind, held_out=held_out))
    return _RULES[kind](_Drawing(generator, held_out))


@dataclass(frozen=True, kw_only=True)
class PairImage:
    """A picture of a pair, drawn when it is loaded.

    Attributes:
        role: 0 is the picture that the twins share, 1 and 2 are the other one of each.
    """

    split: str
    seed: int
    number: int
    kind: str
    held_out: bool
    role: int

    @property
    def name(self) -> str:
        """What errors and logs call this picture."""
        held_out = "-held-out" if self.held_out else ""
        return f"shapes-{self.split}-s{self.seed}-{self.kind}{held_out}-{self.number:06d}-{'abc'[self.role]}"

    def scene(self) -> Scene:
        """What is in the picture."""
        twins = twins_of(self.split, self.seed, self.number, self.kind, held_out=self.held_out)
        return (twins.kept, *twins.others)[self.role]

    def load(self) -> Image.Image:
        """Draw the picture as an RGB image of 72 x 72 pixels."""
        purpose = _purpose(self.kind, held_out=self.held_out) + 1 + self.role
        pixels = scene_generator(self.split, self.seed, self.number, purpose)
        return Image.fromarray(draw_scene(self.scene(), pixels))


def pair_images(
    split: str, seed: int, number: int, kind: str, twin: int, *, held_out: bool
) -> tuple[PairImage, PairImage]:
    """First and second picture of a twin, 0 or 1."""
    twins = twins_of(split, seed, number, kind, held_out=held_out)
    kept, other = (
        PairImage(split=split, seed=seed, number=number, kind=kind, held_out=held_out, role=role)
        for role in (0, 1 + twin)
    )
    return (kept, other) if twins.side == 0 else (other, kept)


def pair_turns(split: str, seed: int, number: int, kind: str, twin: int, *, held_out: bool) -> list[Turn]:
    """What is asked about a pair: first what its twin is asked too, then what else both pictures answer."""
    twins = twins_of(split, seed, number, kind, held_out=held_out)
    scenes = twins.scenes(twin)
    generator = scene_generator(split, seed, number, _purpose(kind, held_out=held_out) + _TEXT)
    asked = [(twins.question, twins.answers[twin])]
    if kind in ("difference", "color"):
        asked += [found for first in (0, 1) if (found := difference(scenes, first)) is not None]
    if kind in ("difference", "more", "count"):
        shapes = [SHAPES[place] for place in generator.permutation(len(SHAPES))]
        asked += [more(scenes, shapes[0]), count(scenes, shapes[1])]
    return [Turn(question=question, answer=answer) for question, answer in dict.fromkeys(asked)]


def first_picture_turn(split: str, seed: int, number: int, kind: str, twin: int, *, held_out: bool) -> Turn:
    """A question about the first picture alone, for a conversation that shows the second one later."""
    scene = twins_of(split, seed, number, kind, held_out=held_out).scenes(twin)[0]
    generator = scene_generator(split, seed, number, _purpose(kind, held_out=held_out) + _TEXT)
    question, answer = count_question(scene, generator)
    return Turn(question=question, answer=answer)


def _purpose(kind: str, *, held_out: bool) -> int:
    return _PURPOSES + 10 * (2 * COMPARISONS.index(kind) + held_out)
