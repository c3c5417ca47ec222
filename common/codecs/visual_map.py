"""How visual tokens attend to visual tokens: a vector per layer group, or the whole causal map.

`visual_columns` keeps the mean over the visual query rows that carry image (tokens mostly in padding do not
count) per visual key: 2 bytes a token and group, exact enough for the cosine of unfiltered column means.
`visual_map` keeps the lower triangle. Its preset `exact8` codes values by their logarithm in 8 bits over 16
nats below one, zero apart: within 3.2 %. The sink filter of the released loss is then recomputed from coarse
values near its threshold, so that gradients are close, not equal; `f4` keeps them exactly at four times the
size.

Dims: G layer groups, N visual tokens, P = N (N + 1) / 2 pairs (query, key <= query), row-major.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

from common.codecs.description import check_flag, check_whole_number, codec_from_settings, codec_to_dict
from common.codecs.quantise import decode_log8, encode_log8
from common.codecs.row_attention import check_attention
from common.errors import CacheFormatError, ConfigError, SampleError
from common.schema import Field, Record

MapPreset = Literal["exact8", "f4"]

MAP_RANGE_NATS = 16.0
"""Attention below e^-16 (1e-7) is stored as that, never as zero: the filter asks for non-zero values."""


@dataclass(frozen=True, kw_only=True)
class VisualColumnsCodec:
    """How a record stores the mean over visual query rows that carry image, per visual key.

    Round trip: float16 (relative 2^-11, absolute 2^-25), or bit for bit with `exact`.

    Attributes:
        groups: Layer groups, at least 1.
        exact: Store float32 instead of float16.
    """

    groups: int
    exact: bool = False

    signal: ClassVar[str] = "visual_columns"

    def __post_init__(self) -> None:
        check_whole_number("groups", self.groups, 1)
        check_flag("exact", self.exact)

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        return codec_to_dict(self, self.signal)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild the codec from `to_dict`; refuses anything else with a CacheFormatError."""
        return codec_from_settings(cls, cls.signal, stored)

    def fields(self) -> tuple[Field, ...]:
        """One array: a value per visual token and group."""
        dtype = "f4" if self.exact else "f2"
        return (Field(name="visual_columns", dtype=dtype, axis="visual", trailing=(self.groups,)),)

    def encode(self, columns: Tensor) -> Record:
        """Pack column means.

        Args:
            columns: float `[G, N]`, mass, any device; N is 0 without an image.

        Returns:
            `visual_columns` f2 or f4 `[N, G]`.

        Raises:
            ValueError: If the shape is not the codec's.
            SampleError: If a value is negative or not finite.
        """
        if columns.ndim != 2 or columns.shape[0] != self.groups:
            raise ValueError(f"encode: expected columns [{self.groups}, N], got {[*columns.shape]}")
        values = columns.detach().float().cpu().numpy()
        check_attention(values, "visual columns")
        return {"visual_columns": values.T.astype(np.float32 if self.exact else np.float16, order="C")}

    def decode(self, record: Record) -> Tensor:
        """Unpack column means, float32 `[G, N]`.

        Raises:
            CacheFormatError: If the array is not of the codec's shape.
        """
        values = record["visual_columns"]
        if values.ndim != 2 or values.shape[1] != self.groups:
            raise CacheFormatError(
                f"visual columns of a record: expected (N, {self.groups}), got {values.shape}; "
                "the cache is damaged: run `cachectl verify`"
            )
        return torch.from_numpy(values.T.astype(np.float32, order="C"))


@dataclass(frozen=True, kw_only=True)
class VisualMapCodec:
    """How a record stores causal visual-by-visual maps.

    Round trip of `exact8`: zero stays zero; a value of at least e^-16 is within a factor `exp(half step)`,
    half a step being 0.0315 nats; a smaller one becomes e^-16. `f4`: bit for bit.

    Attributes:
        groups: Layer groups, at least 1.
        preset: `exact8` (one byte a pair) or `f4` (four).
    """

    groups: int
    preset: MapPreset = "exact8"

    signal: ClassVar[str] = "visual_map"

    def __post_init__(self) -> None:
        check_whole_number("groups", self.groups, 1)
        if self.preset not in get_args(MapPreset):
            raise ConfigError(f"preset: expected one of {list(get_args(MapPreset))}, got {self.preset!r}")

    def to_dict(self) -> dict[str, Any]:
        """The exact JSON stored in a cache's plan."""
        return codec_to_dict(self, self.signal)

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Rebuild the codec from `to_dict`; refuses anything else with a CacheFormatError."""
        return codec_from_settings(cls, cls.signal, stored)

    def fields(self) -> tuple[Field, ...]:
        """One array: a value per pair of visual tokens and group."""
        dtype = "f4" if self.preset == "f4" else "u1"
        return (Field(name="visual_map", dtype=dtype, axis="pair", trailing=(self.groups,)),)

    def encode(self, maps: Tensor) -> Record:
        """Pack the lower triangles.

        Args:
            maps: float `[G, N, N]`, query rows by key columns, mass in [0, 1], zero above the
                diagonal, any device; N is 0 without an image.

        Returns:
            `visual_map` u1 or f4 `[P, G]`.

        Raises:
            ValueError: If the shape is not the codec's.
            SampleError: If a value is negative, above 1 or not finite, or a query sees a later key.
        """
        if maps.ndim != 3 or maps.shape[0] != self.groups or maps.shape[1] != maps.shape[2]:
            raise ValueError(f"encode: expected maps [{self.groups}, N, N], got {[*maps.shape]}")
        values = maps.detach().float().cpu().numpy()
        check_attention(values, "visual map")
        largest = float(values.max(initial=0.0))
        if largest > 1 + 1e-3:
            raise SampleError(f"visual map: expected probability mass of at most 1, got {largest}")
        if np.triu(values, 1).any():
            raise SampleError(
                "visual map: expected zeros above the diagonal, but a visual token attends to a later one; "
                "this codec keeps causal maps only: use visual_columns for bidirectional visual tokens"
            )
        rows, columns = np.tril_indices(values.shape[1])
        pairs = np.ascontiguousarray(values[:, rows, columns].T)  # [P, G]
        if self.preset == "f4":
            return {"visual_map": pairs}
        return {"visual_map": encode_log8(np.minimum(pairs, np.float32(1)), MAP_RANGE_NATS)}

    def decode(self, record: Record) -> Tensor:
        """Unpack maps, float32 `[G, N, N]`, zero above the diagonal.

        Raises:
            CacheFormatError: If the array is not of the codec's shape, or its length no triangle.
        """
        codes = record["visual_map"]
        tokens = (math.isqrt(8 * len(codes) + 1) - 1) // 2
        if codes.ndim != 2 or codes.shape[1] != self.groups or tokens * (tokens + 1) // 2 != len(codes):
            raise CacheFormatError(
                f"visual map of a record: expected (N(N+1)/2, {self.groups}), got {codes.shape}; "
                "the cache is damaged: run `cachectl verify`"
            )
        pairs = codes if self.preset == "f4" else decode_log8(codes, MAP_RANGE_NATS)
        maps = np.zeros((self.groups, tokens, tokens), np.float32)
        rows, columns = np.tril_indices(tokens)
        maps[:, rows, columns] = pairs.T
        return torch.from_numpy(maps)
