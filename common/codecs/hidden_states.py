"""Hidden states of chosen layers, as float16: what losses on features, and pruned students, learn from.

Heavy (2 bytes times width, layers and rows: 8 KB a row and layer at width 4096) and off by default.

Dims: R supervised rows or visual tokens, S layers, D width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vlm_distill_cache.common.cache.schema import MAX_TRAILING_ELEMENTS, Field, Record
from vlm_distill_cache.common.codecs.description import Codec, check_flag, check_whole_number, out_of_range
from vlm_distill_cache.common.codecs.quantise import FloatArray
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError

MOST_STATE = 1e9
"""No hidden state is beyond: known models' largest are below 1e6, and the sum of squares of larger ones overflows."""


@dataclass(frozen=True, kw_only=True)
class HiddenCodec(Codec):
    """How a record stores the hidden states of supervised rows.

    Round trip: float16 (relative 2^-11 of numbers from 6e-5), or bit for bit of float32 with ``exact``.

    Attributes:
        layers: Hidden states, counted as in ``common.attention.hidden``: 0 is the first layer's input.
        width: D of the teacher's language model.
    """

    layers: tuple[int, ...]
    width: int
    exact: bool = False

    signal: ClassVar[str] = "hidden"
    of_image: ClassVar[bool] = False
    axis: ClassVar[str] = "row"

    def __post_init__(self) -> None:
        check_whole_number("width", self.width, 1, MAX_TRAILING_ELEMENTS)
        check_flag("exact", self.exact)
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise ConfigError(f"hidden_layers: expected distinct layers, got {self.layers}")
        for layer in self.layers:
            check_whole_number("hidden_layers", layer, 0, MAX_TRAILING_ELEMENTS)

    def fields(self) -> tuple[Field, ...]:
        """One array: layers by width of each row."""
        dtype = "f4" if self.exact else "f2"
        return (Field(name=self.signal, dtype=dtype, axis=self.axis, trailing=(len(self.layers), self.width)),)

    def encode(self, states: npt.ArrayLike) -> Record:
        """Pack hidden states, float ``[R, S, D]``, as f2 or f4.

        Raises:
            SampleError: If a value is not finite, or too large for float16.
        """
        values = np.asarray(states, np.float32)
        if values.ndim != 3 or values.shape[1:] != (len(self.layers), self.width):
            raise ValueError(
                f"encode: expected hidden states [R, {len(self.layers)}, {self.width}], got {[*values.shape]}"
            )
        with np.errstate(over="ignore"):
            kept = values.astype(np.float32 if self.exact else np.float16, order="C")
        if not np.isfinite(kept).all():
            largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
            raise SampleError(
                f"{self.signal}: not finite as {kept.dtype} (largest finite value {largest:.4g}); set "
                "hidden_dtype=f4, and dtype=bfloat16 or float32 if the teacher runs in float16"
            )
        return {self.signal: kept}

    def decode(self, record: Record) -> FloatArray:
        """Unpack hidden states, float32 ``[R, S, D]``."""
        values = record[self.signal]
        if values.ndim != 3 or values.shape[1:] != (len(self.layers), self.width):
            raise CacheFormatError(
                f"{self.signal} of a record: expected (R, {len(self.layers)}, {self.width}), got {values.shape}; "
                "the cache is damaged: run `cachectl verify`"
            )
        self.refuse_impossible(record)
        return values.astype(np.float32, order="C")

    def ranges(self, record: Record) -> Iterator[str]:
        """Yield states that are not finite, or so large that their squares are not."""
        yield from out_of_range(self.signal, record[self.signal].astype(np.float32), -MOST_STATE, MOST_STATE)


@dataclass(frozen=True, kw_only=True)
class VisualHiddenCodec(HiddenCodec):
    """The same at visual tokens; stored once per image and prefix, like all that visual rows see."""

    signal: ClassVar[str] = "visual_hidden"
    of_image: ClassVar[bool] = True
    axis: ClassVar[str] = "visual"


@dataclass(frozen=True, kw_only=True)
class ProjectorOutputCodec(VisualHiddenCodec):
    """What the language model reads at visual tokens: the projector's output, as hidden state 0.

    In the families' own scale, behind any newline token, reordering or scaling of theirs.
    """

    layers: tuple[int, ...] = (0,)

    signal: ClassVar[str] = "projector_output"
