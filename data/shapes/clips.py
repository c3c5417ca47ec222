"""Short clips: one object moves and then stands, another stands and then moves the opposite way.

Every clip is also run backwards: the frames are the same, and each question (`MOTIONS`) has another answer. So no frame,
nor all of them in any order, tells an answer: their order does. The paths are one or two cells long, so that a frame with
its number, even the first or the last one, leaves most answers open too.

In clips for training no object has a colour and shape that are held out along the axis on which the clip moves
(`is_held_out`); in held-out clips all have. So a held-out question is about a combination of object and motion that no
training clip has shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from vlm_distill_cache.data.sample import Frame, FrameSampling, Turn
from vlm_distill_cache.data.shapes.scene import (
    CELL,
    COLORS,
    GRID,
    SHAPES,
    Scene,
    SceneObject,
    draw_scene,
    place_object,
    scene_generator,
)

MOTIONS = ("way", "mover", "first", "stop")
WAYS = (
    ("from left to right", "from right to left"),
    ("from above to below", "from below to above"),
)  # of each axis: rising columns or rows, and falling ones
LEAST_FRAMES, MOST_FRAMES = 6, 12
FRAME_RATE = 1.0  # frames a second: what `FrameSampling` takes unless told otherwise
_PURPOSES = 300  # the first of the purposes of generators here: ten for clips of training, ten for held-out ones


def is_held_out(color: str, shape: str, axis: int) -> bool:
    """Whether a colour and shape never move along an axis (0: columns, 1: rows) in training."""
    return (COLORS.index(color) + SHAPES.index(shape) + 2 * axis) % 4 == 3


@dataclass(frozen=True, kw_only=True)
class Move:
    """How one object moves: evenly, and then not at all.

    Attributes:
        cells: How far, in cells; negative to the left or up.
        begin: The last frame in which it is where it began.
        end: The first frame in which it has arrived.
    """

    cells: int
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Clip:
    """What happens in a clip that runs forwards.

    Attributes:
        objects: Where they are in the first frame; the first two move, in this order.
        moves: Of these two.
        axis: Along which they move: 0 columns, 1 rows.
        frames: Number of frames.
        asked: Which of the two is asked for its way, and whether it stops.
    """

    objects: tuple[SceneObject, ...]
    moves: tuple[Move, Move]
    axis: int
    frames: int
    asked: tuple[int, int]

    def scene(self, frame: int) -> Scene:
        """What a frame shows, counted from 0."""
        moved = []
        for thing, move in zip(self.objects[:2], self.moves, strict=True):
            share = min(1.0, max(0.0, (frame - move.begin) / (move.end - move.begin)))
            along = CELL * move.cells * share  # pixels
            x, y = (thing.x + along, thing.y) if self.axis == 0 else (thing.x, thing.y + along)
            moved.append(replace(thing, x=x, y=y, column=int(x // CELL), row=int(y // CELL)))
        return Scene(objects=(*moved, *self.objects[2:]))

    def turns(self, *, backwards: bool) -> dict[str, Turn]:
        """A question and its answer of each kind; the questions are the same backwards."""

        def way(mover: int) -> str:
            return WAYS[self.axis][(self.moves[mover].cells < 0) != backwards]

        def turn(question: str, answer: str) -> Turn:
            return Turn(question=question, answer=answer)

        nouns = [thing.noun for thing in self.objects[:2]]
        for_way, for_stop = self.asked
        forwards = WAYS[self.axis][self.moves[for_way].cells < 0]
        first = 1 if backwards else 0
        return {
            "way": turn(f"which way does the {nouns[for_way]} move", way(for_way)),
            "mover": turn(f"what moves {forwards}", nouns[for_way if way(for_way) == forwards else 1 - for_way]),
            "first": turn("what moves first", nouns[first]),
            "stop": turn(f"does the {nouns[for_stop]} stop", "yes" if for_stop == first else "no"),
        }


@lru_cache(maxsize=64)
def clip_of(split: str, seed: int, number: int, *, held_out: bool) -> Clip:
    """Draw what happens in the ``number``-th clip."""
    generator = scene_generator(split, seed, number, _purpose(held_out=held_out))

    def among(low: int, high: int) -> int:
        return int(generator.integers(low, high + 1))

    axis, frames = among(0, 1), among(LEAST_FRAMES, MOST_FRAMES)
    names = [(color, shape) for color in COLORS for shape in SHAPES if is_held_out(color, shape, axis) == held_out]
    chosen = [names[int(place)] for place in generator.permutation(len(names))[: among(2, 4)]]
    middle = among((frames - 1) // 2, frames // 2)
    lanes = generator.permutation(GRID)[:2]
    rising = among(0, 1)  # which of the two
    moves, cells = [], []
    taken: set[int] = set()
    for mover, (begin, end) in enumerate(((0, middle), (middle, frames - 1))):
        length = among(1, 2)
        start = among(0, GRID - 1 - length) + (0 if mover == rising else length)
        moves.append(Move(cells=length if mover == rising else -length, begin=begin, end=end))
        path = range(min(start, start + moves[-1].cells), max(start, start + moves[-1].cells) + 1)
        lane = int(lanes[mover])
        cells.append(_cell(start, lane, axis))
        taken.update(_cell(place, lane, axis) for place in path)
    free = [int(cell) for cell in generator.permutation(GRID * GRID) if int(cell) not in taken]
    cells += free[: len(chosen) - 2]
    objects = [place_object(color, shape, cell, generator) for (color, shape), cell in zip(chosen, cells, strict=True)]
    asked = (among(0, 1), among(0, 1))
    return Clip(objects=tuple(objects), moves=(moves[0], moves[1]), axis=axis, frames=frames, asked=asked)


def _cell(along: int, lane: int, axis: int) -> int:
    return lane * GRID + along if axis == 0 else along * GRID + lane


@dataclass(frozen=True, kw_only=True)
class DrawnClip:
    """A video source that draws its frames when they are read; forwards and backwards have the same frames."""

    split: str
    seed: int
    number: int
    held_out: bool
    backwards: bool

    @property
    def name(self) -> str:
        """What errors and logs call this clip."""
        how = ("-held-out" if self.held_out else "") + ("-backwards" if self.backwards else "")
        return f"shapes-{self.split}-s{self.seed}-clip{how}-{self.number:06d}"

    def clip(self) -> Clip:
        """What happens in it, forwards."""
        return clip_of(self.split, self.seed, self.number, held_out=self.held_out)

    def scenes(self) -> list[Scene]:
        """What each of its frames shows, in order."""
        clip = self.clip()
        found = [clip.scene(frame) for frame in range(clip.frames)]
        return found[::-1] if self.backwards else found

    def frames(self, sampling: FrameSampling) -> Sequence[Frame]:
        """Draw the sampled frames, RGB of 72 x 72 pixels; times count from the first frame at `FRAME_RATE`."""
        scenes = self.scenes()
        times = [frame / FRAME_RATE for frame in range(len(scenes))]
        return [Frame(image=self._draw(scenes[frame]), time=times[frame]) for frame in sampled(times, sampling)]

    def _draw(self, scene: Scene) -> Image.Image:
        """All frames lie over the same clutter and noise, as what a camera at rest sees."""
        pixels = scene_generator(self.split, self.seed, self.number, _purpose(held_out=self.held_out) + 1)
        return Image.fromarray(draw_scene(scene, pixels))


def _purpose(*, held_out: bool) -> int:
    return _PURPOSES + 10 * held_out


def sampled(times: Sequence[float], sampling: FrameSampling) -> list[int]:
    """Which frames are read.

    Frame k is the first whose time is at least ``k / fps``. Where these would be more than ``most``, so many instead: of
    as many equal parts of the clip's time, from the first frame to the last, each one's middle, and the frame that is
    shown then.

    Args:
        times: Of all frames, seconds, rising.
        sampling: As a cache's plan records it.
    """
    places = np.asarray(times)
    wanted = np.arange(int(np.floor(places[-1] * sampling.fps + 1e-9)) + 1) / sampling.fps
    chosen = np.unique(np.searchsorted(places, wanted - 1e-9))
    if len(chosen) > sampling.most:
        middles = (np.arange(sampling.most) + 0.5) * places[-1] / sampling.most
        chosen = np.searchsorted(places, middles + 1e-9, side="right") - 1
    return [int(place) for place in chosen]
