"""Scenes of coloured shapes: what is in a picture, and how it is drawn.

A scene is 2-4 objects with distinct (colour, shape) in distinct cells of a 6 x 6 grid over a 72 x 72
picture, so one cell is one 12-pixel patch of the built-in vision tower. Positions jitter, colours
jitter, grey clutter lies under the objects and noise over everything: the labels are simple, the
pixels are not. Every draw comes from a generator keyed by (split, seed, index, purpose), so picture
i never depends on how many pictures there are or on any other random state.

Drawing takes about 0.4 ms, so pictures are drawn when asked for and never stored.
"""

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 72  # pixels, height and width
GRID = 6  # cells a side
CELL = IMAGE_SIZE // GRID  # pixels a cell
COLORS = ("red", "green", "blue", "yellow", "purple", "teal")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
SPLITS = {"train": 1, "validation": 2, "test": 3}  # a key of the generator: splits never share a stream

_RGB = {
    "red": (214, 45, 40),
    "green": (60, 165, 60),
    "blue": (50, 85, 215),
    "yellow": (225, 205, 45),
    "purple": (150, 55, 185),
    "teal": (45, 175, 175),
}
_RADIUS = {"small": (2.8, 3.5), "large": (4.5, 5.5)}  # half side in pixels, uniform between
_WINDOW = 8  # pixels drawn on each side of an object's centre
_COUNTS = (2, 3, 3, 4, 4)  # objects in a scene, drawn uniformly from here


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object: its names, its cell (0-based), and its exact place in pixels."""

    shape: str
    color: str
    size: str
    row: int
    column: int
    x: float  # centre, pixels from the left edge
    y: float  # centre, pixels from the top edge
    radius: float  # half side, pixels

    @property
    def noun(self) -> str:
        """Colour and shape, which name an object uniquely within its scene."""
        return f"{self.color} {self.shape}"

    @property
    def cell_name(self) -> str:
        """Column and row as text, 1-based: ``c2 r4``."""
        return f"c{self.column + 1} r{self.row + 1}"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The scene graph that every caption, question and answer is true of."""

    objects: tuple[SceneObject, ...]

    @property
    def nouns(self) -> frozenset[str]:
        """The (colour, shape) names that occur."""
        return frozenset(thing.noun for thing in self.objects)


def scene_generator(split: str, seed: int, index: int, purpose: int) -> np.random.Generator:
    """Return the random generator of one picture and one purpose (0 scene, 1 pixels, 2.. text)."""
    return np.random.Generator(np.random.PCG64([SPLITS[split], seed, index, purpose]))


def sample_scene(generator: np.random.Generator) -> Scene:
    """Draw a scene: distinct (colour, shape) pairs in distinct cells, objects in random order."""
    count = _COUNTS[int(generator.integers(len(_COUNTS)))]
    names = generator.choice(len(COLORS) * len(SHAPES), size=count, replace=False)
    cells = generator.choice(GRID * GRID, size=count, replace=False)
    objects = [
        place_object(COLORS[name // len(SHAPES)], SHAPES[name % len(SHAPES)], cell, generator)
        for name, cell in zip(names.tolist(), cells.tolist(), strict=True)
    ]
    return Scene(objects=tuple(objects))


def place_object(color: str, shape: str, cell: int, generator: np.random.Generator, *, size: str = "") -> SceneObject:
    """Put an object into a cell, 0 to 35 row by row, at a place of its own; a size that is not given is drawn."""
    size = size or SIZES[int(generator.integers(len(SIZES)))]
    low, high = _RADIUS[size]
    jitter = 1.0 if size == "large" else 2.0  # pixels; a large object fills its cell already
    dx, dy, radius = generator.random(3)
    row, column = divmod(cell, GRID)
    return SceneObject(
        shape=shape,
        color=color,
        size=size,
        row=row,
        column=column,
        x=(column + 0.5) * CELL + jitter * (2 * dx - 1),
        y=(row + 0.5) * CELL + jitter * (2 * dy - 1),
        radius=low + (high - low) * radius,
    )


def draw_scene(scene: Scene, generator: np.random.Generator) -> np.ndarray:
    """Draw a scene over grey clutter, with noise.

    Returns:
        RGB picture, uint8 ``[72, 72, 3]``.
    """
    canvas = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    canvas[:] = generator.uniform(60, 200)
    for _ in range(int(generator.integers(4, 10))):  # grey bars and blocks, never coloured
        # One number at a time is faster than an array of two.
        left, top = int(generator.integers(IMAGE_SIZE - 3)), int(generator.integers(IMAGE_SIZE - 3))
        width, height = int(generator.integers(2, 9)), int(generator.integers(2, 9))
        canvas[top : top + height, left : left + width] = generator.uniform(30, 225)
    for thing in scene.objects:
        _draw_object(canvas, thing, generator)
    canvas += generator.standard_normal(canvas.shape, np.float32) * np.float32(generator.uniform(4, 14))
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _draw_object(canvas: np.ndarray, thing: SceneObject, generator: np.random.Generator) -> None:
    """Blend one object into the canvas with a one-pixel soft edge."""
    left, top = max(0, int(thing.x) - _WINDOW), max(0, int(thing.y) - _WINDOW)
    window = canvas[top : int(thing.y) + _WINDOW, left : int(thing.x) + _WINDOW]
    x = np.arange(left, left + window.shape[1], dtype=np.float32)[None, :] + np.float32(0.5 - thing.x)
    y = np.arange(top, top + window.shape[0], dtype=np.float32)[:, None] + np.float32(0.5 - thing.y)
    cover = np.clip(0.5 - _signed_distance(thing.shape, x, y, thing.radius), 0, 1)[..., None]
    color = np.asarray(_RGB[thing.color], np.float32) + generator.uniform(-22, 22, 3).astype(np.float32)
    window *= 1 - cover
    window += cover * color


def _signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the distance to the outline in pixels, negative inside, float ``[h, w]``."""
    distance: np.ndarray
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    elif shape == "triangle":  # apex up; the two sides rise at 2:1
        distance = np.maximum(y - 0.85 * radius, (2 * np.abs(x) - y - 1.05 * radius) / 5**0.5)
    else:  # cross
        arm = 0.32 * radius
        wide = np.maximum(np.abs(x) - radius, np.abs(y) - arm)
        tall = np.maximum(np.abs(y) - radius, np.abs(x) - arm)
        distance = np.minimum(wide, tall)
    return distance
