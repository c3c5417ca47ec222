"""Where a teacher looked while it said each word: maps of a record as text, or as a picture over its image.

Each map has a scale of its own, from nothing to its largest cell: it shows where a word looked. How much of
the attention lay on the image at all is the number beside it. Of a sample with several pictures a word has one scale for
all of them, by attention per area, so that its maps show which picture it looked at, too.

Dims: A supervised rows, G layer groups, C grid cells (row-major from the top left), W words, V views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_distill_cache.common.attention.tiles import tiles_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.tools.views import Shot, bands, chosen, chosen_words, join_views, lay_out

if TYPE_CHECKING:
    from PIL.Image import Image


BLOCKS, ASCII = "\u00b7\u2591\u2592\u2593\u2588", ".-+*#"
_EDGES = (0.08, 0.25, 0.5, 0.8)  # of the largest cell: where a darker shade begins
_LINE_WIDTH = 100  # characters
_MIN_WIDTH = 14  # characters of a map, for the word above it
_MAX_TEXT_COLUMNS = 16  # of a grid drawn two characters a cell, which makes cells square

_TILE, _FRAME = 200, 100  # pixels, the longer side of a map in the picture, and of a frame in its strip
_TEXT_FRAMES, _PICTURE_FRAMES = 8, 16  # drawn of a sample's frames
_LABEL, _GAP = 36, 8  # pixels
_COLUMNS = 5
_HEAT = np.array([[0, 0, 60], [110, 20, 120], [225, 70, 60], [255, 180, 40], [255, 255, 190]], np.float64)


@dataclass(frozen=True, kw_only=True)
class WordMap:
    """Where one word of the answer looked.

    Attributes:
        cells: float64 ``[rows, cols]``, absolute mass, mean over the word's tokens and all layer groups; of the first view.
        image_mass: Their sum, and that of ``further``: the share of attention on the image, in [0, 1].
        further: The same of each further view of a sample with several pictures, in order.
    """

    word: str
    cells: np.ndarray
    image_mass: float
    further: tuple[np.ndarray, ...] = ()

    @property
    def views(self) -> tuple[np.ndarray, ...]:
        """The cells of all views, float64 ``[rows, cols]`` each."""
        return (self.cells, *self.further)

    @property
    def largest(self) -> tuple[float, ...]:
        """Of each view the mass of a cell as dense as the densest of all views: what is drawn darkest."""
        if not self.further:
            return (float(self.cells.max()),)
        densest = max(float(cells.max()) * cells.size for cells in self.views)
        return tuple(densest / cells.size for cells in self.views)


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
    cells = codec.decode(record).cells.astype(np.float64).mean(axis=1)  # [A, K]
    grids = codec.cells_of(tiles_of(record) if codec.several else ())
    maps = []
    for word, its_rows in words:
        mean = cells[list(its_rows)].mean(axis=0)
        views = split_views(mean, [(grid.rows, grid.cols) for grid in grids])
        maps.append(WordMap(word=word, cells=views[0], image_mass=float(mean.sum()), further=tuple(views[1:])))
    return maps


def split_views(cells: np.ndarray, grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """Cut the cells of all views, ``[K]``, into ``[rows, cols]`` of each."""
    ends = np.cumsum([rows * cols for rows, cols in grids])[:-1]
    return [part.reshape(grid) for part, grid in zip(np.split(cells, ends), grids, strict=True)]


def draw_text(maps: Sequence[WordMap], *, shades: str = BLOCKS, shots: Sequence[Shot] = ()) -> list[str]:
    """Draw maps side by side in characters: below the name of each picture its maps, below each word its film strip.

    Args:
        shades: Five, from nothing to most: ``BLOCKS``, or ``ASCII`` for terminals that know no other.
        shots: The views, of a sample with several; at most eight pictures and eight frames of it are drawn.
    """
    if not maps:
        return []
    if len(shots) < 2:
        return _side_by_side([(one.word, one.cells, one.image_mass, one.largest[0]) for one in maps], shades)
    drawn = chosen(shots, frames=_TEXT_FRAMES)
    lines: list[str] = []

    def entry(title: str, one: WordMap, view: int) -> tuple[str, np.ndarray, float, float]:
        return title, one.views[view], float(one.views[view].sum()), one.largest[view]

    videos = list(dict.fromkeys(shot.video for shot in shots if shot.video >= 0))
    for band in bands(shots, drawn):
        if shots[band[0]].video < 0:
            lines += [f"[{shots[band[0]].label}]", ""]
            lines += [*_side_by_side([entry(one.word, one, band[0]) for one in maps], shades), ""]
            continue
        for one in maps:
            lines += [f"[video {videos.index(shots[band[0]].video) + 1}] {one.word}", ""]
            lines += [*_side_by_side([entry(shots[view].label, one, view) for view in band], shades), ""]
    left_out = chosen_words(shots, drawn)
    return [*lines, left_out] if left_out else lines[:-1]


def _side_by_side(entries: Sequence[tuple[str, np.ndarray, float, float]], shades: str) -> list[str]:
    """Draw maps of one shape: the title of each, its cells, its mass, and the cell that is drawn darkest."""
    rows, cols = entries[0][1].shape
    across = 2 if cols <= _MAX_TEXT_COLUMNS else 1
    cell_width = max(cols * across, _MIN_WIDTH)
    each_line = max(1, (_LINE_WIDTH + 2) // (cell_width + 2))
    lines: list[str] = []
    for start in range(0, len(entries), each_line):
        group = entries[start : start + each_line]
        titles = [f"{title[: cell_width - 5]:<{cell_width - 5}}{mass:>5.0%}" for title, _, mass, _ in group]
        lines.append("  ".join(titles).rstrip())
        shaded = [_shade(cells, shades, across, largest) for _, cells, _, largest in group]
        lines += ["  ".join(f"{s[row]:<{cell_width}}" for s in shaded).rstrip() for row in range(rows)]
        lines.append("")
    return lines[:-1]


def _shade(cells: np.ndarray, shades: str, across: int, largest: float) -> list[str]:
    levels = np.digitize(cells / largest if largest > 0 else cells, _EDGES)  # 0 to 4
    marks = [shades[0].ljust(across), *(shade * across for shade in shades[1:])]
    return ["".join(marks[level] for level in row) for row in levels]


def open_images(paths: Sequence[Path], record: Record) -> dict[int, Image]:
    """Open pictures that a record was made from; of several, in any order, and not all need be given.

    Returns:
        By the number of the picture in the sample, from 0.

    Raises:
        SampleError: If a file cannot be read as an image.
        CacheMismatchError: If its pixels are not those the teacher saw.
    """
    from vlm_distill_cache.common.pixels import decode_image, image_hash  # needs pillow

    hashes, found = _hashes(record), dict[int, Any]()
    for path in paths:
        try:
            image = decode_image(path.read_bytes(), name=str(path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}; give the sample's image file") from error
        if len(hashes) == 1 or image_hash(image).hex() not in hashes:
            check_pictures([image], record, name=str(path), some=True)
        found |= {number: image for number, one in enumerate(hashes) if one == image_hash(image).hex()}
    return found


def check_pictures(images: Sequence[Image], record: Record, *, name: str, some: bool = False) -> None:
    """Refuse pictures that are not the ones that a record was made from, in order.

    Args:
        images: Those of the sample, frames of videos among them; there may be more, behind the last that the teacher saw.
        some: They are any of the sample's pictures.

    Raises:
        CacheMismatchError: Naming the first that is another one.
    """
    from vlm_distill_cache.common.pixels import image_hash  # needs pillow

    expected, found = _hashes(record), [image_hash(image).hex() for image in images]
    several = len(expected) > 1
    if several and not some and len(found) < len(expected):
        raise CacheMismatchError(
            f"{name}: it has {len(found)} pictures and frames, the teacher saw {len(expected)}; give the data that the cache "
            "was built from"
        )
    for number, one in enumerate(found if some else found[: len(expected)]):
        if (one not in expected) if some else (one != expected[number]):
            its = f"picture {number + 1} has" if several and not some else "its pixels have"
            wanted = (
                f"the sample's {len(expected)} pictures have others" if several and some
                else f"the sample's image has {expected[number]}"
            )  # fmt: skip
            raise CacheMismatchError(
                f"{name}: {its} hash {one}, {wanted}; give the image that the "
                "teacher saw, not a resized, cropped or re-compressed one"
            )


def _hashes(record: Record) -> list[str]:
    """The hash of each picture of a record of either format version, 32 hexadecimal digits."""
    return [row.tobytes().hex() for row in np.asarray(record["image_hash"]).astype(np.uint8)]


def draw_picture(maps: Sequence[WordMap], *, title: str, image: Image | None, shots: Sequence[Shot] = ()) -> Image:
    """Draw a contact sheet: the image if there is one, and a heat map for each word, over it.

    Of several pictures each is a row, with the words' maps of it along the row; frames are a strip, with their seconds
    below. At most eight pictures and sixteen frames are drawn, evenly spaced; the title says how many of how many.

    Args:
        image: The sample's; without it the maps stand alone.
        shots: The views, of a sample with several, with their images if there are any.
    """
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    shots = shots if len(shots) > 1 else [Shot(image=image)]
    drawn = chosen(shots, frames=_PICTURE_FRAMES)
    several = len(shots) > 1
    grids = [maps[0].views[view].shape for view in drawn]
    placed = lay_out(
        [shots[view] for view in drawn],
        [shots[view].sides or (cols, rows) for view, (rows, cols) in zip(drawn, grids, strict=True)],
        still=_TILE, frame=_FRAME,
    )  # fmt: skip
    small = [
        None if (one := shots[view].image) is None else one.resize(place.size, PIL.Image.Resampling.LANCZOS)
        for view, place in zip(drawn, placed, strict=True)
    ]
    tiles: list[tuple[str, Any]] = []
    if any(one is not None for one in small):
        tiles.append(("the pictures" if several else "the image", join_views(small, placed)))
    for word in maps:
        heats = [
            _heat_map(word.views[view], place.size, under, word.largest[view])
            for view, place, under in zip(drawn, placed, small, strict=True)
        ]
        shares = [f"{word.views[view].sum():.0%}" for view in drawn] if several else [""]
        tiles.append((f"{word.word}   {word.image_mass:.0%}", join_views(heats, placed, beside=shares)))

    font, small_font = ImageFont.load_default(size=18), ImageFont.load_default(size=15)
    width, height = max(_TILE, *(tile.width for _, tile in tiles)), max(tile.height for _, tile in tiles)
    step = (width + _GAP, height + _LABEL + _GAP)
    columns = max(1, min(_COLUMNS, len(tiles), _COLUMNS * (_TILE + _GAP) // step[0]))
    lines = -(-len(tiles) // columns)
    sheet = PIL.Image.new("RGB", (columns * step[0] + _GAP, lines * step[1] + _LABEL + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    said = f"({left_out}) {title}" if (left_out := chosen_words(shots, drawn)) else title
    pen.text((_GAP, _GAP), _cut(pen, said, font, sheet.width - 2 * _GAP), fill="black", font=font)
    for place, (label, tile) in enumerate(tiles):
        left = _GAP + place % columns * step[0]
        top = _LABEL + place // columns * step[1]
        pen.text((left, top + 10), _cut(pen, label, small_font, width), fill="black", font=small_font)
        sheet.paste(tile, (left, top + _LABEL))
    return sheet


def _heat_map(cells: np.ndarray, size: tuple[int, int], image: Image | None, largest: float) -> Image:
    import PIL.Image

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
