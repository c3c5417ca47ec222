"""Where a teacher looked while it said each word: maps of a record as text, or as a picture over its image.

Each map has a scale of its own, from nothing to its largest cell: it shows where a word looked. How much of
the attention lay on the image at all is the number beside it.

Dims: A supervised rows, G layer groups, C grid cells (row-major from the top left), W words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image


BLOCKS, ASCII = "\u00b7\u2591\u2592\u2593\u2588", ".-+*#"
_EDGES = (0.08, 0.25, 0.5, 0.8)  # of the largest cell: where a darker shade begins
_LINE_WIDTH = 100  # characters
_MIN_WIDTH = 14  # characters of a map, for the word above it
_MAX_TEXT_COLUMNS = 16  # of a grid drawn two characters a cell, which makes cells square

_TILE = 200  # pixels, the longer side of a map in the picture
_LABEL, _GAP = 36, 8  # pixels
_COLUMNS = 5
_HEAT = np.array([[0, 0, 60], [110, 20, 120], [225, 70, 60], [255, 180, 40], [255, 255, 190]], np.float64)


@dataclass(frozen=True, kw_only=True)
class WordMap:
    """Where one word of the answer looked.

    Attributes:
        cells: float64 ``[rows, cols]``, absolute mass, mean over the word's tokens and all layer groups.
        image_mass: Their sum: the share of attention on the image, in [0, 1].
    """

    word: str
    cells: np.ndarray
    image_mass: float


def word_maps(record: Record, plan: Plan, words: Sequence[tuple[str, Sequence[int]]]) -> list[WordMap]:
    """Average a record's answer attention over the rows of each word.

    Args:
        record: With the fields of ``answer_attention``.
        words: Text and supervised rows of each word.

    Returns:
        A map a word; none if the cache has no answer attention or the sample no image.

    Raises:
        CacheFormatError: If the plan does not describe the codec, or the arrays are not its.
    """
    settings = plan.signals.get(RowAttentionCodec.signal)
    if settings is None or not len(record["tiles"]):
        return []
    codec = RowAttentionCodec.from_dict(settings)
    cells = codec.decode(record).cells.astype(np.float64).mean(axis=1)  # [A, C]
    maps = []
    for word, its_rows in words:
        mean = cells[list(its_rows)].mean(axis=0).reshape(codec.grid)
        maps.append(WordMap(word=word, cells=mean, image_mass=float(mean.sum())))
    return maps


def draw_text(maps: Sequence[WordMap], *, shades: str = BLOCKS) -> list[str]:
    """Draw maps side by side in characters.

    Args:
        shades: Five, from nothing to most: ``BLOCKS``, or ``ASCII`` for terminals that know no other.
    """
    if not maps:
        return []
    rows, cols = maps[0].cells.shape
    across = 2 if cols <= _MAX_TEXT_COLUMNS else 1
    cell_width = max(cols * across, _MIN_WIDTH)
    each_line = max(1, (_LINE_WIDTH + 2) // (cell_width + 2))
    lines: list[str] = []
    for start in range(0, len(maps), each_line):
        group = maps[start : start + each_line]
        titles = [f"{m.word[: cell_width - 5]:<{cell_width - 5}}{m.image_mass:>5.0%}" for m in group]
        lines.append("  ".join(titles).rstrip())
        shaded = [_shade(m.cells, shades, across) for m in group]
        lines += ["  ".join(f"{s[row]:<{cell_width}}" for s in shaded).rstrip() for row in range(rows)]
        lines.append("")
    return lines[:-1]


def _shade(cells: np.ndarray, shades: str, across: int) -> list[str]:
    largest = cells.max()
    levels = np.digitize(cells / largest if largest > 0 else cells, _EDGES)  # 0 to 4
    marks = [shades[0].ljust(across), *(shade * across for shade in shades[1:])]
    return ["".join(marks[level] for level in row) for row in levels]


def open_image(path: Path, record: Record) -> Image:
    """Open the picture that a record was made from.

    Raises:
        SampleError: If it cannot be read as an image.
        CacheMismatchError: If its pixels are not those the teacher saw.
    """
    from vlm_distill_cache.common.pixels import decode_image  # needs pillow

    try:
        image = decode_image(path.read_bytes(), name=str(path))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the sample's image file") from error
    check_image(image, record, name=str(path))
    return image


def check_image(image: Image, record: Record, *, name: str) -> None:
    """Refuse a picture that is not the one that a record was made from; raises CacheMismatchError."""
    from vlm_distill_cache.common.pixels import image_hash  # needs pillow

    found, expected = image_hash(image).hex(), record["image_hash"].tobytes().hex()
    if found != expected:
        raise CacheMismatchError(
            f"{name}: its pixels have hash {found}, the sample's image has {expected}; give the image that the "
            "teacher saw, not a resized, cropped or re-compressed one"
        )


def draw_picture(maps: Sequence[WordMap], *, title: str, image: Image | None) -> Image:
    """Draw a contact sheet: the image if there is one, and a heat map for each word, over it.

    Args:
        image: The sample's; without it the maps stand alone.
    """
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    grid_rows, grid_cols = maps[0].cells.shape
    sides = image.size if image is not None else (grid_cols, grid_rows)
    scale = _TILE / max(sides)
    size = (max(1, round(sides[0] * scale)), max(1, round(sides[1] * scale)))
    small = image.resize(size, PIL.Image.Resampling.LANCZOS) if image is not None else None
    tiles: list[tuple[str, Any]] = [] if small is None else [("the image", small)]
    tiles += [(f"{m.word}   {m.image_mass:.0%}", _heat_map(m.cells, size, small)) for m in maps]

    font, small_font = ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    step = (_TILE + _GAP, size[1] + _LABEL + _GAP)
    columns = min(_COLUMNS, len(tiles))
    lines = -(-len(tiles) // columns)
    sheet = PIL.Image.new("RGB", (columns * step[0] + _GAP, lines * step[1] + _LABEL + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((_GAP, _GAP), _cut(pen, title, font, sheet.width - 2 * _GAP), fill="black", font=font)
    for place, (label, tile) in enumerate(tiles):
        left = _GAP + place % columns * step[0]
        top = _LABEL + place // columns * step[1]
        pen.text((left, top + 10), _cut(pen, label, small_font, _TILE), fill="black", font=small_font)
        sheet.paste(tile, (left, top + _LABEL))
    return sheet


def _heat_map(cells: np.ndarray, size: tuple[int, int], image: Image | None) -> Image:
    import PIL.Image

    largest = cells.max()
    relative = (cells / largest if largest > 0 else cells).astype(np.float32)
    smooth = PIL.Image.Resampling.NEAREST if image is None else PIL.Image.Resampling.BICUBIC
    return paint_heat(np.asarray(PIL.Image.fromarray(relative).resize(size, smooth)), image)


def paint_heat(heat: np.ndarray, image: Image | None) -> Image:
    """Paint a heat map, over a picture if there is one.

    Args:
        heat: Float ``[H, W]``, 0 for nothing to 1 for most; cut off beyond.
        image: RGB, W by H pixels. It becomes grey, so that no colour is the picture's own.

    Returns:
        RGB, W by H pixels.
    """
    import PIL.Image

    heat = np.clip(heat, 0, 1)
    place = heat * (len(_HEAT) - 1)
    low = np.minimum(place.astype(np.int64), len(_HEAT) - 2)
    share = (place - low)[..., None]
    colours = _HEAT[low] * (1 - share) + _HEAT[low + 1] * share  # [H, W, 3]
    if image is not None:
        grey = np.asarray(image.convert("L"), np.float64)[..., None]
        cover = 0.1 + 0.5 * heat[..., None]
        colours = grey * (1 - cover) + colours * cover
    return PIL.Image.fromarray(np.rint(colours).astype(np.uint8))


def _cut(pen: Any, text: str, font: Any, width: float) -> str:
    if pen.textlength(text, font=font) <= width:
        return text
    while text and pen.textlength(f"{text}...", font=font) > width:
        text = text[:-1]
    return f"{text}..."
