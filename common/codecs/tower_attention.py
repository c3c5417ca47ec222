"""How much attention each visual token receives inside the teacher's vision tower: what its sinks are found from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.codecs.description import Codec, check_flag, out_of_range
from vlm_distill_cache.common.codecs.quantise import FloatArray
from vlm_distill_cache.common.codecs.row_attention import MOST_MASS, check_attention
from vlm_distill_cache.common.errors import CacheFormatError


@dataclass(frozen=True, kw_only=True)
class TowerAttentionCodec(Codec):
    """How a record stores the attention received in the last tower layer that the projector reads, per visual token.

    Mean over heads and query rows of the tower; a token that is made of several of its places has their sum. Round trip:
    float16 (relative 2^-11, absolute 2^-25), or bit for bit with ``exact``.
    """

    exact: bool = False

    signal: ClassVar[str] = "tower_attention"

    def __post_init__(self) -> None:
        check_flag("exact", self.exact)

    def fields(self) -> tuple[Field, ...]:
        """One array: a value per visual token."""
        return (Field(name=self.signal, dtype="f4" if self.exact else "f2", axis="visual"),)

    def encode(self, received: npt.ArrayLike) -> Record:
        """Pack attention that is received, float ``[N]``; N is 0 without an image.

        Raises:
            SampleError: If a value is negative or not finite.
        """
        values = np.asarray(received, np.float32)
        if values.ndim != 1:
            raise ValueError(f"encode: expected attention [N], got {[*values.shape]}")
        check_attention(values, "tower attention")
        return {self.signal: values.astype(np.float32 if self.exact else np.float16, order="C")}

    def decode(self, record: Record) -> FloatArray:
        """Unpack the attention, float32 ``[N]``."""
        values = record[self.signal]
        if values.ndim != 1:
            raise CacheFormatError(
                f"tower attention of a record: expected (N,), got {values.shape}; the cache is damaged: run `cachectl verify`"
            )
        self.refuse_impossible(record)
        return values.astype(np.float32)

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield values that are no probability mass."""
        yield from out_of_range(self.signal, record[self.signal], 0, MOST_MASS, said="0 to 1")
