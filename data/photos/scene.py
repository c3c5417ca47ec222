"""Scenes of photographs: what is in a picture, and how it is put together.

A scene is 2 or 3 things with distinct nouns in distinct cells of a 3 x 3 grid over a picture of 224 x 224 pixels. Places
jitter, sizes are drawn from two ranges that do not meet, things are mirrored at random, and the ground is a smooth field of
colours, or one with the spectrum of a photograph. As in `data.shapes.scene`, every draw comes from a generator of
(split, seed, number, purpose).

Nouns are in groups of six (`stamps.GROUPS`). In training pictures all nouns are of different groups; in pictures of the
splits ``validation`` and ``test`` all are of one: not one pair of things that is scored was ever seen together, though each
thing was.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from vlm_distill_cache.data.photos.stamps import CUT_OUTS, GROUP_OF, GROUPS, MEMBERS, NOUNS, cut_out

IMAGE_SIZE = 224  # pixels, height and width
GRID = 3  # cells a side
SIZES = ("small", "large")
GROUNDS = ("smooth", "natural")
SPLITS = {"train": 1, "validation": 2, "test": 3}  # a key of the generator: splits never share a stream

_CELL = IMAGE_SIZE / GRID
_SPAN = {"small": (38.0, 46.0), "large": (68.0, 80.0)}  # square root of a cut-out's area in pixels, uniform between
_LONGEST = 1.3  # times that, at most: long things are smaller
_COUNTS = (2, 3, 3)  # things in a scene, drawn uniformly from here
_OCTAVES = tuple(2**octave for octave in range(1, 8))  # cells a side of a natural ground's fields
_KEY = 23  # in front of all generators' keys, so that no stream is that of another data set


@dataclass(frozen=True, kw_only=True)
class Thing:
    """A thing: its noun and size, its cell (0 to 8, row by row), and how it is drawn there.

    Attributes:
        form: Which of the noun's cut-outs, in [0, 1).
        span: Where in its size's range, in [0, 1).
        shift: From the middle of its cell, as a share of what its size leaves, each in [-1, 1).
        mirrored: Left and right are exchanged.
    """

    noun: str
    size: str
    cell: int
    form: float
    span: float
    shift: tuple[float, float]
    mirrored: bool

    @property
    def row(self) -> int:
        """0 is the upper one."""
        return self.cell // GRID

    @property
    def column(self) -> int:
        """0 is the left one."""
        return self.cell % GRID


@dataclass(frozen=True, kw_only=True)
class PhotoScene:
    """What every caption, question and answer about a picture is true of; things overlap in the order given."""

    things: tuple[Thing, ...]

    @property
    def nouns(self) -> tuple[str, ...]:
        """Those that occur, each once."""
        return tuple(thing.noun for thing in self.things)

    @property
    def free_cells(self) -> list[int]:
        """Cells without a thing."""
        return sorted(set(range(GRID * GRID)) - {thing.cell for thing in self.things})

    def changed(self, place: int, **changes: object) -> "PhotoScene":
        """The same with one thing changed."""
        things = list(self.things)
        things[place] = replace(things[place], **changes)  # type: ignore[arg-type]
        return PhotoScene(things=tuple(things))


def photo_generator(split: str, seed: int, number: int, purpose: int) -> np.random.Generator:
    """The random generator of one picture and one purpose."""
    return np.random.Generator(np.random.PCG64([_KEY, SPLITS[split], seed, number, purpose]))


def company(nouns: Sequence[str]) -> list[str]:
    """Nouns that may stand beside others: of their group where these are of one, else of a group that none of them is of.

    A single noun says nothing of its picture's sort: give two.
    """
    groups = {GROUP_OF[noun] for noun in nouns}
    if len(groups) == 1:
        return [noun for noun in MEMBERS[groups.pop()] if noun not in nouns]
    return [noun for noun in NOUNS if GROUP_OF[noun] not in groups]


def in_place_of(scene: PhotoScene, place: int, *, held_out: bool) -> list[str]:
    """Nouns that could stand in place of one: absent, and in the same company as it is."""
    if held_out:
        return company(scene.nouns)
    others = {GROUP_OF[noun] for position, noun in enumerate(scene.nouns) if position != place}
    return [noun for noun in NOUNS if GROUP_OF[noun] not in others and noun != scene.things[place].noun]


def sample_scene(generator: np.random.Generator, *, held_out: bool) -> PhotoScene:
    """Draw a scene: nouns of one group (``held_out``), or each of another one."""
    count = _COUNTS[int(generator.integers(len(_COUNTS)))]
    if held_out:
        members = MEMBERS[int(generator.integers(GROUPS))]
        nouns = [members[place] for place in generator.permutation(len(members))[:count]]
    else:
        groups = generator.permutation(GROUPS)[:count].tolist()
        nouns = [MEMBERS[group][int(generator.integers(len(MEMBERS[group])))] for group in groups]
    cells = generator.permutation(GRID * GRID)[:count].tolist()
    things = []
    for noun, cell in zip(nouns, cells, strict=True):
        form, span, *shift = generator.random(4).tolist()
        size, mirrored = SIZES[int(generator.integers(len(SIZES)))], bool(generator.integers(2))
        things.append(
            Thing(
                noun=noun, size=size, cell=cell, form=form, span=span, mirrored=mirrored,
                shift=(2 * shift[0] - 1, 2 * shift[1] - 1),
            )
        )  # fmt: skip
    return PhotoScene(things=tuple(things))


def draw_scene(scene: PhotoScene, generator: np.random.Generator, *, ground: str = "smooth") -> Image.Image:
    """Put the cut-outs on a ground.

    Args:
        generator: Of the ground; two scenes with equal ones differ in their things alone.
        ground: One of `GROUNDS`.

    Returns:
        RGB, `IMAGE_SIZE` pixels a side.

    Raises:
        DataError: If a cut-out cannot be read.
    """
    canvas = (natural_ground if ground == "natural" else smooth_ground)(generator)
    for thing in scene.things:
        stems = CUT_OUTS[thing.noun]
        low, high = _SPAN[thing.size]
        picture = _sized(stems[int(thing.form * len(stems))], round(low + (high - low) * thing.span), thing.mirrored)
        width, height = picture.size
        x, y = (
            (cell + 0.5) * _CELL + shift * max(4.0, (_CELL - side) / 2)
            for cell, shift, side in zip((thing.column, thing.row), thing.shift, (width, height), strict=True)
        )
        left = min(max(round(x - width / 2), 0), IMAGE_SIZE - width)
        top = min(max(round(y - height / 2), 0), IMAGE_SIZE - height)
        canvas.paste(picture, (left, top), picture)
    return canvas


@lru_cache(maxsize=2048)  # 86 cut-outs in 22 sizes, two ways round
def _sized(stem: str, span: int, mirrored: bool) -> Image.Image:
    """A cut-out at a size in pixels, the square root of its area."""
    picture = cut_out(stem)
    width, height = picture.size
    scale = min(span / (width * height) ** 0.5, _LONGEST * span / max(width, height))
    found = picture.resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BILINEAR, reducing_gap=2.0
    )
    return found.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else found


def smooth_ground(generator: np.random.Generator) -> Image.Image:
    """A field of colours that change slowly, RGB."""
    colours = generator.uniform(70, 190, 3) + generator.uniform(-25, 25, (3, 3, 3))
    return _field(np.clip(colours, 0, 255))


def natural_ground(generator: np.random.Generator) -> Image.Image:
    """Fields of all sizes, each half as strong as one of twice its size: a photograph's spectrum, RGB."""
    total = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    for octave, cells in enumerate(_OCTAVES):
        grey, colour = generator.normal(size=(cells, cells, 1)), generator.normal(size=(cells, cells, 3))
        field = 128 + 40 * np.clip(0.8 * grey + 0.4 * colour, -3, 3)
        total += (np.asarray(_field(field), np.float32) - 128) * np.float32(0.5**octave)
    middle = generator.uniform(80, 180, 3).astype(np.float32)
    return Image.fromarray(np.clip(middle + total, 0, 255).astype(np.uint8))


def _field(values: np.ndarray) -> Image.Image:
    """Values ``[n, n, 3]`` from 0 to 255, as a smooth picture."""
    small = Image.fromarray(values.astype(np.uint8))
    return small.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
