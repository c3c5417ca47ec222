"""Where rows of a teacher look on the image, pooled to a grid over it: answer rows, or all text rows.

A row costs `groups * rows * cols` bytes plus two per group. Cells are coded by
their logarithm relative to the largest cell of the row and group: 8 bits over 12 nats, so a cell is
within 2.4 % or below e^-12 of the largest. The mass on the image is kept in 16 bits, and decoded cells
are rescaled to it; what is off the image is one minus that.

Pooling moves mass by area, so it conserves a row's mass on the image whether or not the grids divide. Where
they do not (24 x 24 tokens on 7 x 7 cells), a token's mass is taken as spread evenly over its box.

Dims: A rows, G layer groups, C = rows * cols cells, row-major from the top left.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.description import (
    check_flag,
    check_whole_number,
    codec_from_settings,
    codec_to_dict,
)
from vlm_distill_cache.common.codecs.quantise import decode_log8, encode_log8
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError

RANGE_NATS = 12.0
"""Cells below e^-12 of the row's largest are stored as that, never as zero."""


@dataclass(frozen=True)
class RowAttention:
    """Attention of some rows on the image, live or from a cache: losses cannot tell which.

    Attributes:
        cells: float32 `[A, G, C]`, absolute probability mass on each grid cell; zero without an image.
        image_mass: float32 `[A, G]`, the sum over cells; one minus it is the mass off the image.
    """

    cells: Tensor
    image_mass: Tensor

    def __len__(self) -> int:
        """Number of rows, A."""
        return int(self.cells.shape[0])

    @classmethod
    def from_cells(cls, cells: Tensor) -> Self:
        """Live attention: the image mass is the sum over cells."""
        cells = cells.float()
        return cls(cells, cells.sum(dim=-1))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RowAttention":
        """The same rows on another device."""
        return RowAttention(
            self.cells.to(device, non_blocking=non_blocking),
            self.image_mass.to(device, non_blocking=non_blocking),
        )

    @staticmethod
    def cat(parts: "list[RowAttention]") -> "RowAttention":
        """Rows of all parts in order; torch refuses no parts, or unequal groups or cells."""
        return RowAttention(torch.cat([part.cells for part in parts]), torch.cat([part.image_mass for part in parts]))


@dataclass(frozen=True, kw_only=True)
class RowAttentionCodec:
    """How a record stores a `RowAttention` of supervised rows.

    Round trip: with `exact`, bit for bit. Otherwise the image mass is float16 (relative 2^-11, absolute
    2^-25), so that the mass off the image is within 2^-12; zero cells stay zero; others are within a factor
    `exp(2 * half step)`, half a step being
    0.0236 nats, of what they were relative to the image mass, or off by less than e^-12 of the row's largest
    cell, a bound that grows by C * e^-12 through the rescaling. A row is either zero or sums to its mass.

    Attributes:
        grid: Rows and columns of the grid over the whole original image.
        groups: Layer groups, at least 1.
        exact: Store float32 instead of 8-bit cells and float16 masses.
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
        check_whole_number("grid rows", self.grid[0], 1)
        check_whole_number("grid cols", self.grid[1], 1)
        check_whole_number("groups", self.groups, 1)
        check_flag("exact", self.exact)

    @property
    def cells(self) -> int:
        """Number of grid cells, C."""
        return self.grid[0] * self.grid[1]

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        return codec_to_dict(self, self.signal)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild the codec from `to_dict`; refuses anything else with a CacheFormatError."""
        return codec_from_settings(cls, cls.signal, stored)

    def fields(self) -> tuple[Field, ...]:
        """Arrays of a record: cells and image mass of each row."""
        code, real = ("f4", "f4") if self.exact else ("u1", "f2")
        return (
            Field(name=self.signal, dtype=code, axis=self.axis, trailing=(self.groups, self.cells)),
            Field(name=self.mass_field, dtype=real, axis=self.axis, trailing=(self.groups,)),
        )

    def encode(self, attention: RowAttention) -> Record:
        """Pack rows into the plain arrays of a record.

        Args:
            attention: cells `[A, G, C]` and image mass `[A, G]` of this codec's groups and grid, any device.

        Returns:
            The signal's cells u1 or f4 `[A, G, C]`, and `mass_field` f2 or f4 `[A, G]`.

        Raises:
            ValueError: If the shapes are not the codec's.
            SampleError: If a cell is negative or not finite.
        """
        expected = (len(attention), self.groups, self.cells)
        if attention.cells.shape != expected or attention.image_mass.shape != expected[:2]:
            raise ValueError(
                f"encode: expected cells {[*expected]} and image mass {[*expected[:2]]}, got "
                f"{[*attention.cells.shape]} and {[*attention.image_mass.shape]}"
            )
        cells = attention.cells.detach().float().cpu().numpy()
        mass = attention.image_mass.detach().float().cpu().numpy()
        check_attention(cells, self._words)
        if self.exact:
            return {self.signal: cells.copy(), self.mass_field: mass.copy()}
        largest = cells.max(axis=2, keepdims=True)  # [A, G, 1]
        relative = np.divide(cells, largest, out=np.zeros_like(cells), where=largest > 0)
        return {
            self.signal: encode_log8(relative, RANGE_NATS),
            self.mass_field: mass.astype(np.float16),
        }

    def decode(self, record: Record) -> RowAttention:
        """Unpack the rows of a record; the inverse of `encode` within the class's bound.

        Raises:
            CacheFormatError: If the arrays are not of the codec's shape.
        """
        codes, mass = record[self.signal], record[self.mass_field]
        expected = (len(codes), self.groups, self.cells)
        if codes.shape != expected or mass.shape != expected[:2]:
            raise CacheFormatError(
                f"{self._words} of a record: expected cells {expected} and masses {expected[:2]}, got "
                f"{codes.shape} and {mass.shape}; the cache is damaged: run `cachectl verify`"
            )
        if self.exact:
            return RowAttention(torch.from_numpy(codes.copy()), torch.from_numpy(mass.copy()))
        relative = decode_log8(codes, RANGE_NATS)  # [A, G, C]
        total = relative.sum(axis=2)
        image_mass = mass.astype(np.float32)
        scale = np.divide(image_mass, total, out=np.zeros_like(total), where=total > 0)
        image_mass = np.where(total > 0, image_mass, np.float32(0))
        return RowAttention(torch.from_numpy(relative * scale[..., None]), torch.from_numpy(image_mass))

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
    """Refuse attention that is no mass.

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
