"""Where rows of a teacher look on the image, pooled to a grid over it: answer rows, or all text rows.

A row costs `groups * rows * cols` bytes plus two per group. Cells are coded by
their logarithm relative to the largest cell of the row and group: 8 bits over 12 nats, so a cell is
within 2.4 % or below e^-12 of the largest. The mass on the image is kept in 16 bits, and decoded cells
are rescaled to it; what is off the image is one minus that.

Pooling moves mass by area, so it conserves a row's mass on the image whether or not the grids divide. Where
they do not (24 x 24 tokens on 7 x 7 cells), a token's mass is taken as spread evenly over its box.

**Several pictures** (format version 2): a row has such a grid on each view, that is on each picture or on the frames that a
model's tokens show together, each with its own largest cell and its own mass. Frames may have a smaller grid: 32 frames on
4 x 4 cells cost 32 * (16 + 2) = 576 bytes a row and group. Views without mass are kept as zeros.

Dims: A rows, G layer groups, C = rows * cols cells, row-major from the top left; V views, of which some are frames; K cells
of all views, in reading order.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Generic, NamedTuple

import numpy as np

from vlm_distill_cache.common.attention.tiles import Tile, grid_tile, tiles_of, views_of
from vlm_distill_cache.common.cache.schema import MAX_TRAILING_ELEMENTS, Field, Record
from vlm_distill_cache.common.codecs.description import Codec, check_flag, check_whole_number, out_of_range
from vlm_distill_cache.common.codecs.quantise import LOG_LEVELS, ArrayT, decode_log8, encode_log8
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError

RANGE_NATS = 12.0
"""Cells below e^-12 of the row's largest are stored as that, never as zero."""
MOST_MASS = 1 + 2e-3
"""A mass of one with the rounding of float16, twice over."""


@dataclass(frozen=True)
class AttentionRows(Generic[ArrayT]):
    """Attention of some rows on the image, as arrays (decoded) or tensors (`common.codecs.live.RowAttention`).

    Attributes:
        cells: float32 `[A, G, C]`, absolute probability mass on each grid cell; zero without an image. Of a codec for
            several pictures `[A, G, K]`, the cells of all views one behind the other; none without a picture.
        image_mass: float32 `[A, G]`, the sum over cells; one minus it is the mass off the pictures.
    """

    cells: ArrayT
    image_mass: ArrayT

    def __len__(self) -> int:
        """Number of rows, A."""
        return len(self.cells)  # type: ignore[arg-type]


class _Kind(NamedTuple):
    """The arrays of one kind of views.

    Attributes:
        cells, mass: Names of the fields.
        axis: What their first axis counts.
        frames: Whether it is that of frames which have a grid of their own.
    """

    cells: str
    mass: str
    axis: str
    grid: tuple[int, int]
    frames: bool = False

    @property
    def size(self) -> int:
        """Cells of the grid."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, kw_only=True)
class RowAttentionCodec(Codec):
    """How a record stores the attention of supervised rows.

    Round trip: with `exact`, bit for bit. Otherwise the image mass is float16 (relative 2^-11, absolute
    2^-25), so that the mass off the image is within 2^-12; zero cells stay zero; others are within a factor
    `exp(2 * half step)`, half a step being
    0.0236 nats, of what they were relative to the image mass, or off by less than e^-12 of the row's largest
    cell, a bound that grows by C * e^-12 through the rescaling. A row is either zero or sums to its mass. With
    `several` this holds for each view by itself.

    Attributes:
        grid: Rows and columns of the grid over the whole original image.
        several: Whether a row has a grid for each view of a sample: format version 2.
        frame_grid: With `several`: rows and columns of the grid over frames of videos; None: as `grid`.
    """

    grid: tuple[int, int]
    groups: int
    exact: bool = False
    several: bool = False
    frame_grid: tuple[int, int] | None = None

    signal: ClassVar[str] = "answer_attention"
    older: ClassVar[Mapping[str, Any]] = MappingProxyType({"several": False, "frame_grid": None})
    axis: ClassVar[str] = "row"
    view_axis: ClassVar[str] = "look"
    frame_axis: ClassVar[str] = "frame_look"
    mass_field: ClassVar[str] = "answer_image_mass"
    frame_field: ClassVar[str] = "answer_frames"
    frame_mass_field: ClassVar[str] = "answer_frames_mass"

    def __post_init__(self) -> None:
        check_flag("exact", self.exact)
        check_flag("several", self.several)
        _check_grid("grid", self.grid)
        check_whole_number("groups", self.groups, 1, MAX_TRAILING_ELEMENTS)
        if self.frame_grid is not None:
            _check_grid("frame_grid", self.frame_grid)
            if not self.several:
                raise ConfigError(
                    "frame_grid: only a codec for several pictures has a grid for frames; set several too"
                )

    @property
    def cells(self) -> int:
        """Number of grid cells, C."""
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan; of one picture as plans had it before there were several."""
        stored = super().to_dict()
        if not self.several:
            del stored["several"], stored["frame_grid"]
        return stored

    def fields(self) -> tuple[Field, ...]:
        """Arrays of a record: cells and image mass of each row, or of each row and view."""
        code, real = ("f4", "f4") if self.exact else ("u1", "f2")
        return tuple(
            field
            for kind in self._kinds
            for field in (
                Field(name=kind.cells, dtype=code, axis=kind.axis, trailing=(self.groups, kind.size)),
                Field(name=kind.mass, dtype=real, axis=kind.axis, trailing=(self.groups,)),
            )
        )

    def cells_of(self, tiles: tuple[Tile, ...]) -> tuple[Tile, ...]:
        """The grid of cells of each view of a teacher's tiles, in order; of a codec for one picture its one grid."""
        if not self.several:
            return (grid_tile(*self.grid),)
        return tuple(grid_tile(*self._grid_on(view.is_frame), view) for view in views_of(tiles))

    def encode(self, attention: AttentionRows[Any], *, tiles: tuple[Tile, ...] | None = None) -> Record:
        """Pack rows into the plain arrays of a record.

        Args:
            attention: cells `[A, G, C]` and image mass `[A, G]` of this codec's groups and grid; with `several`,
                cells `[A, G, K]` of one sample.
            tiles: Of the teacher's tokens of that sample; with `several` only.

        Returns:
            The signal's cells u1 or f4 `[A, G, C]`, and `mass_field` f2 or f4 `[A, G]`; with `several` a row for each
            of the A rows and each view, rows outermost.

        Raises:
            SampleError: If a cell is negative or not finite.
        """
        if self.several and tiles is None:
            raise ValueError("encode: a codec for several pictures needs the sample's tiles")
        cells, mass = np.asarray(attention.cells, np.float32), np.asarray(attention.image_mass, np.float32)
        grids = self.cells_of(tiles or ())
        expected = (len(cells), self.groups, sum(grid.token_count for grid in grids))
        if cells.shape != expected or mass.shape != expected[:2]:
            raise ValueError(
                f"encode: expected cells {[*expected]} and image mass {[*expected[:2]]}, got "
                f"{[*cells.shape]} and {[*mass.shape]}"
            )
        check_attention(cells, self._words)
        record: Record = {}
        for kind in self._kinds:
            views = _split(cells, grids, chosen=[self._is_of(kind, grid) for grid in grids])
            of_kind = _joined(views, cells.shape[:2], kind.size)  # [A * views, G, C]
            # A picture alone has the mass that it was given; sums of the same numbers may differ in their last bit.
            masses = mass if len(grids) == len(views) == 1 else of_kind.sum(axis=2)
            record |= self._pack(kind, of_kind, masses)
        return record

    def _pack(self, kind: _Kind, cells: np.ndarray, mass: np.ndarray) -> Record:
        if self.exact:
            return {kind.cells: cells.copy(), kind.mass: mass.copy()}
        largest = cells.max(axis=2, keepdims=True)  # [A, G, 1]
        relative = np.divide(cells, largest, out=np.zeros_like(cells), where=largest > 0)
        return {kind.cells: encode_log8(relative, RANGE_NATS), kind.mass: mass.astype(np.float16)}

    def decode(self, record: Record) -> AttentionRows[np.ndarray]:
        """Unpack the rows of a record; the inverse of `encode` within the class's bound.

        Args:
            record: With `several`, the fields of format version 2 that say which views there are, and ``labels``, too.
        """
        for kind in self._kinds:
            codes, mass = record[kind.cells], record[kind.mass]
            expected = (len(codes), self.groups, kind.size)
            if codes.shape != expected or mass.shape != expected[:2]:
                raise CacheFormatError(
                    f"{self._words} of a record: expected cells {expected} and masses {expected[:2]}, got "
                    f"{codes.shape} and {mass.shape}; the cache is damaged: run `cachectl verify`"
                )
        self.refuse_impossible(record)
        if not self.several:
            return AttentionRows(*self._unpack(self._kinds[0], record))
        grids = self.cells_of(tiles_of(record))
        rows = self._row_count(record, grids)
        cells: list[np.ndarray | None] = [None] * len(grids)  # of each view, [A, G, C]
        image_mass = np.zeros((rows, self.groups), np.float32)
        for kind in self._kinds:
            values, mass = self._unpack(kind, record)
            own = [place for place, grid in enumerate(grids) if self._is_of(kind, grid)]
            values = values.reshape(rows, len(own), self.groups, kind.size)
            for number, place in enumerate(own):
                cells[place] = values[:, number]
            image_mass += mass.reshape(rows, len(own), self.groups).sum(axis=1)
        found = [np.zeros((rows, self.groups, 0), np.float32), *(part for part in cells if part is not None)]
        return AttentionRows(np.concatenate(found, axis=2), image_mass)

    def _unpack(self, kind: _Kind, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Cells, float32 `[A, G, C]`, and masses `[A, G]` of one kind of views."""
        codes, mass = record[kind.cells], record[kind.mass]
        if self.exact:
            return codes.copy(), mass.copy()
        relative = decode_log8(codes, RANGE_NATS)  # [A, G, C]
        total = relative.sum(axis=2)
        image_mass = mass.astype(np.float32)
        scale = np.divide(image_mass, total, out=np.zeros_like(total), where=total > 0)
        image_mass = np.where(total > 0, image_mass, np.float32(0))
        return relative * scale[..., None], image_mass

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield masses that are none, and rows that do not sum to their mass."""
        for kind in self._kinds:
            for name in (kind.mass, *((kind.cells,) if self.exact else ())):
                yield from out_of_range(name, record[name], 0, MOST_MASS, said="0 to 1")
            cells, mass = record[kind.cells], record[kind.mass]  # [A, G, C], [A, G]
            if self.exact and (np.abs(cells.sum(axis=2, dtype=np.float64) - mass) > MOST_MASS - 1).any():
                yield f"{kind.mass} is not the sum of the cells of {kind.cells}"
            # Eight bits are scaled to the mass when they are decoded.
            if not self.exact and ((mass > 0) & ~cells.any(axis=2)).any():
                yield f"{kind.mass} is above 0 where all cells of {kind.cells} are 0"

    def damage(self, record: Record) -> Iterator[str]:
        """Yield what `ranges` does, rows that are not scaled to their largest cell, and attention to no image."""
        yield from super().damage(record)
        for kind in self._kinds:
            cells = record[kind.cells]
            if not cells.size:
                continue
            if not len(record["tiles"]) and (record[kind.mass].any() or cells.any()):
                yield f"{kind.cells} lies on an image, of which the record has no tiles"
            if not self.exact and not np.isin(cells.max(axis=2), (0, LOG_LEVELS + 1)).all():
                yield f"{kind.cells} has a row whose largest code is neither 0 nor {LOG_LEVELS + 1}"
        if not self.several:
            return
        try:
            grids = self.cells_of(tiles_of(record))
            rows = self._row_count(record, grids)
        except CacheFormatError as error:
            yield str(error)
            return
        if not grids:
            return
        masses = np.zeros((rows, self.groups))
        for kind in self._kinds:
            views = sum(self._is_of(kind, grid) for grid in grids)
            masses += record[kind.mass].astype(np.float64).reshape(rows, views, self.groups).sum(axis=1)
        yield from out_of_range(f"{self._words}, the mass on all pictures", masses, 0, MOST_MASS, said="0 to 1")

    def _row_count(self, record: Record, grids: Sequence[Tile]) -> int:
        """How many rows a record has of these views; refuses arrays that fit no number."""
        found = {len(record["labels"])} if self.axis == "row" and "labels" in record else set()
        for kind in self._kinds:
            views, length = sum(self._is_of(kind, grid) for grid in grids), len(record[kind.cells])
            if length % views if views else length:
                raise self._other_rows(kind, length, views, "rows")
            if views:
                found.add(length // views)
        if len(found) > 1:
            kind = self._kinds[0]
            raise self._other_rows(kind, len(record[kind.cells]), len(grids), f"one of {sorted(found)} rows")
        return found.pop() if found else 0

    def _other_rows(self, kind: _Kind, length: int, views: int, rows: str) -> CacheFormatError:
        return CacheFormatError(
            f"{self._words} of a record: {kind.cells} has {length} entries; expected {rows} times the record's {views} "
            "pictures of that kind; the cache is damaged: run `cachectl verify --deep`"
        )

    @property
    def _kinds(self) -> tuple[_Kind, ...]:
        """The kinds of views that have arrays of their own."""
        axis = self.view_axis if self.several else self.axis
        kinds = [_Kind(self.signal, self.mass_field, axis, self.grid)]
        if self.frame_grid is not None:
            kinds.append(_Kind(self.frame_field, self.frame_mass_field, self.frame_axis, self.frame_grid, frames=True))
        return tuple(kinds)

    def _grid_on(self, is_frame: bool) -> tuple[int, int]:
        return self.frame_grid if is_frame and self.frame_grid is not None else self.grid

    def _is_of(self, kind: _Kind, grid: Tile) -> bool:
        """Whether a view, by its grid, is of some kind."""
        return kind.frames == (grid.is_frame and self.frame_grid is not None)

    @property
    def _words(self) -> str:
        return self.signal.replace("_", " ")


def _check_grid(name: str, grid: object) -> None:
    if not isinstance(grid, tuple) or len(grid) != 2:
        raise ConfigError(f"{name}: expected (rows, cols), got {grid!r}")
    check_whole_number(f"{name} rows", grid[0], 1, MAX_TRAILING_ELEMENTS)
    check_whole_number(f"{name} cols", grid[1], 1, MAX_TRAILING_ELEMENTS)


def _split(cells: np.ndarray, grids: Sequence[Tile], *, chosen: Sequence[bool]) -> list[np.ndarray]:
    """The cells `[A, G, C]` of the chosen views."""
    ends = np.cumsum([grid.token_count for grid in grids], dtype=np.int64)
    return [
        cells[:, :, end - grid.token_count : end]
        for grid, end, wanted in zip(grids, ends, chosen, strict=True)
        if wanted
    ]


def _joined(views: Sequence[np.ndarray], rows: tuple[int, ...], size: int) -> np.ndarray:
    """Views `[A, G, C]` as one array `[A * V, G, C]`, rows outermost."""
    if len(views) == 1:
        return views[0]
    if not views:
        return np.zeros((0, rows[1], size), np.float32)
    return np.stack(views, axis=1).reshape(-1, rows[1], size)


@dataclass(frozen=True, kw_only=True)
class TextAttentionCodec(RowAttentionCodec):
    """The same for every text row behind the visual tokens, of questions and answers; same bounds.

    Pooled and 8 bit like answer rows, not `N * G * 2` bytes a row: 146 instead of 1,152 bytes at 576 tokens and a
    12 x 12 grid, and students compare on a grid of at most that size anyway, to which nested grids pool
    exactly. `exact` keeps float32 cells, on the teacher's own grid if `grid` is that.
    """

    signal: ClassVar[str] = "text_attention"
    axis: ClassVar[str] = "text"
    view_axis: ClassVar[str] = "text_look"
    frame_axis: ClassVar[str] = "text_frame_look"
    mass_field: ClassVar[str] = "text_image_mass"
    frame_field: ClassVar[str] = "text_frames"
    frame_mass_field: ClassVar[str] = "text_frames_mass"


def check_attention(values: np.ndarray, what: str) -> None:
    """Refuse attention that is no probability mass.

    Raises:
        SampleError: If a value is negative, NaN or infinite.
    """
    finite = np.isfinite(values)
    lowest = values.min(initial=0.0, where=finite)
    if lowest < 0 or not finite.all():
        raise SampleError(
            f"{what}: expected finite masses of at least 0, got {np.count_nonzero(~finite)} that are not "
            f"finite and a minimum of {lowest}; if the teacher runs in float16, try bfloat16 or float32"
        )
