"""How much attention each visual token receives from the visual tokens: one vector per layer group.

The mean over the visual query rows that carry image (tokens mostly in padding do not count) per visual key: 2 bytes
a token and group, exact enough for the cosine of unfiltered column means.

Dims: G layer groups, N visual tokens.
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
from vlm_distill_cache.common.codecs.row_attention import check_attention
from vlm_distill_cache.common.errors import CacheFormatError


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
