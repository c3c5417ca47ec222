"""Where rows of a teacher look on the image, pooled to a grid over it: answer rows, or all text rows.

A row costs `groups * rows * cols` bytes plus two per group. Cells are coded by
their logarithm relative to the largest cell of the row and group: 8 bits over 12 nats, so a cell is
within 2.4 % or below e^-12 of the largest. The mass on the image is kept in 16 bits, and decoded cells
are rescaled to it; what is off the image is one minus that.

Pooling moves mass by area, so it conserves a row's mass on the image whether or not the grids divide. Where
they do not (24 x 24 tokens on 7 x 7 cells), a token's mass is taken as spread evenly over its box.

Dims: A rows, G layer groups, C = rows * cols cells, row-major from the top left.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic

import numpy as np

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
        cells: float32 `[A, G, C]`, absolute probability mass on each grid cell; zero without an image.
        image_mass: float32 `[A, G]`, the sum over cells; one minus it is the mass off the image.
    """

    cells: ArrayT
    image_mass: ArrayT

    def __len__(self) -> int:
        """Number of rows, A."""
        return len(self.cells)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RowAttentionCodec(Codec):
    """How a record stores the attention of supervised rows.

    Round trip: with `exact`, bit for bit. Otherwise the image mass is float16 (relative 2^-11, absolute
    2^-25), so that the mass off the image is within 2^-12; zero cells stay zero; others are within a factor
    `exp(2 * half step)`, half a step being
    0.0236 nats, of what they were relative to the image mass, or off by less than e^-12 of the row's largest
    cell, a bound that grows by C * e^-12 through the rescaling. A row is either zero or sums to its mass.

    Attributes:
        grid: Rows and columns of the grid over the whole original image.
    """

    grid: tuple[int, int]
    groups: int
    exact: bool = False

    signal: ClassVar[str] = "answer_attention"
    axis: ClassVar[str] = "row"
    mass_field: ClassVar[str] = "answer_image_mass"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise ConfigError(f"grid: expected (rows, cols), got {self.grid!r}")
        check_whole_number("grid rows", self.grid[0], 1, MAX_TRAILING_ELEMENTS)
        check_whole_number("grid cols", self.grid[1], 1, MAX_TRAILING_ELEMENTS)
        check_whole_number("groups", self.groups, 1, MAX_TRAILING_ELEMENTS)
        check_flag("exact", self.exact)

    @property
    def cells(self) -> int:
        """Number of grid cells, C."""
        return self.grid[0] * self.grid[1]

    def fields(self) -> tuple[Field, ...]:
        """Arrays of a record: cells and image mass of each row."""
        code, real = ("f4", "f4") if self.exact else ("u1", "f2")
        return (
            Field(name=self.signal, dtype=code, axis=self.axis, trailing=(self.groups, self.cells)),
            Field(name=self.mass_field, dtype=real, axis=self.axis, trailing=(self.groups,)),
        )

    def encode(self, attention: AttentionRows[Any]) -> Record:
        """Pack rows into the plain arrays of a record.

        Args:
            attention: cells `[A, G, C]` and image mass `[A, G]` of this codec's groups and grid.

        Returns:
            The signal's cells u1 or f4 `[A, G, C]`, and `mass_field` f2 or f4 `[A, G]`.

        Raises:
            SampleError: If a cell is negative or not finite.
        """
        cells, mass = np.asarray(attention.cells, np.float32), np.asarray(attention.image_mass, np.float32)
        expected = (len(cells), self.groups, self.cells)
        if cells.shape != expected or mass.shape != expected[:2]:
            raise ValueError(
                f"encode: expected cells {[*expected]} and image mass {[*expected[:2]]}, got "
                f"{[*cells.shape]} and {[*mass.shape]}"
            )
        check_attention(cells, self._words)
        if self.exact:
            return {self.signal: cells.copy(), self.mass_field: mass.copy()}
        largest = cells.max(axis=2, keepdims=True)  # [A, G, 1]
        relative = np.divide(cells, largest, out=np.zeros_like(cells), where=largest > 0)
        return {
            self.signal: encode_log8(relative, RANGE_NATS),
            self.mass_field: mass.astype(np.float16),
        }

    def decode(self, record: Record) -> AttentionRows[np.ndarray]:
        """Unpack the rows of a record; the inverse of `encode` within the class's bound."""
        codes, mass = record[self.signal], record[self.mass_field]
        expected = (len(codes), self.groups, self.cells)
        if codes.shape != expected or mass.shape != expected[:2]:
            raise CacheFormatError(
                f"{self._words} of a record: expected cells {expected} and masses {expected[:2]}, got "
                f"{codes.shape} and {mass.shape}; the cache is damaged: run `cachectl verify`"
            )
        self.refuse_impossible(record)
        if self.exact:
            return AttentionRows(codes.copy(), mass.copy())
        relative = decode_log8(codes, RANGE_NATS)  # [A, G, C]
        total = relative.sum(axis=2)
        image_mass = mass.astype(np.float32)
        scale = np.divide(image_mass, total, out=np.zeros_like(total), where=total > 0)
        image_mass = np.where(total > 0, image_mass, np.float32(0))
        return AttentionRows(relative * scale[..., None], image_mass)

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield masses that are none, and rows that do not sum to their mass."""
        for name in (self.mass_field, *((self.signal,) if self.exact else ())):
            yield from out_of_range(name, record[name], 0, MOST_MASS, said="0 to 1")
        cells, mass = record[self.signal], record[self.mass_field]  # [A, G, C], [A, G]
        if self.exact and (np.abs(cells.sum(axis=2, dtype=np.float64) - mass) > MOST_MASS - 1).any():
            yield f"{self.mass_field} is not the sum of the cells of {self.signal}"
        # Eight bits are scaled to the mass when they are decoded.
        if not self.exact and ((mass > 0) & ~cells.any(axis=2)).any():
            yield f"{self.mass_field} is above 0 where all cells of {self.signal} are 0"

    def damage(self, record: Record) -> Iterator[str]:
        """Yield what `ranges` does, rows that are not scaled to their largest cell, and attention to no image."""
        yield from super().damage(record)
        cells = record[self.signal]
        if not cells.size:
            return
        if not len(record["tiles"]) and (record[self.mass_field].any() or cells.any()):
            yield f"{self.signal} lies on an image, of which the record has no tiles"
        if not self.exact and not np.isin(cells.max(axis=2), (0, LOG_LEVELS + 1)).all():
            yield f"{self.signal} has a row whose largest code is neither 0 nor {LOG_LEVELS + 1}"

    @property
    def _words(self) -> str:
        return self.signal.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class TextAttentionCodec(RowAttentionCodec):
    """The same for every text row behind the visual tokens, of questions and answers; same bounds.

    Pooled and 8 bit like answer rows, not `N * G * 2` bytes a row: 146 instead of 1,152 bytes at 576 tokens and a
    12 x 12 grid, and students compare on a grid of at most that size anyway, to which nested grids pool
    exactly. `exact` keeps float32 cells, on the teacher's own grid if `grid` is that.
    """

    signal: ClassVar[str] = "text_attention"
    axis: ClassVar[str] = "text"
    mass_field: ClassVar[str] = "text_image_mass"


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
