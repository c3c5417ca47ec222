"""Pixels kept as the bytes that an image processor made numbers of: a quarter of the memory, and the very same numbers.

Whatever a processor scales, cuts and pads, it ends with steps that look at one pixel at a time and make a number of a byte,
another one for each colour: 256 numbers a colour, its table (`pixel_tables`), say them all. Nobody has to believe that of a
processor: each array is tried (`as_bytes`), and one that is not bit for bit made of a table's numbers stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BYTES = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True, kw_only=True, eq=False)
class BytePixels:
    """An array of float32 pixels as bytes, and what number each byte is.

    Attributes:
        data: uint8 ``[parts, 3, pixels]``: tiles, frames or patches, their colours, the pixels of each.
        table: float32 ``[3, 256]``.
        shape: Of the array of numbers, whose elements lie in the order of ``data``.
    """

    data: np.ndarray
    table: np.ndarray
    shape: tuple[int, ...]

    def write_to(self, numbers: np.ndarray) -> None:
        """Write the numbers into a contiguous float32 array of their shape."""
        view = numbers.reshape(self.data.shape)
        for colour, row in enumerate(self.table):
            np.take(row, self.data[:, colour], out=view[:, colour], mode="clip")  # else it is copied once more

    def numbers(self) -> np.ndarray:
        """The array of numbers, float32 of ``shape``."""
        made = np.empty(self.shape, dtype=np.float32)
        self.write_to(made)
        return made


Held = np.ndarray | BytePixels


class ImageInputs(Mapping[str, np.ndarray]):
    """Arrays by a model's argument name, of which pixels may be held as bytes: numbers are made when they are asked for."""

    def __init__(self, held: Mapping[str, Held]) -> None:
        """Hold arrays as they are given."""
        self._held = dict(held)

    @property
    def held(self) -> Mapping[str, Held]:
        """The arrays as they are held."""
        return self._held

    def __getitem__(self, name: str) -> np.ndarray:
        found = self.held[name]
        return found.numbers() if isinstance(found, BytePixels) else found

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def held_of(inputs: Mapping[str, np.ndarray]) -> Mapping[str, Held]:
    """Arrays as they are held, by name."""
    return inputs.held if isinstance(inputs, ImageInputs) else inputs


def joined(arrays: Sequence[Held]) -> np.ndarray:
    """Arrays joined along their first axis, as numbers; they are equal in all others."""
    if not any(isinstance(array, BytePixels) for array in arrays):
        return np.concatenate([np.asarray(array) for array in arrays])
    made = np.empty((sum(array.shape[0] for array in arrays), *arrays[0].shape[1:]), dtype=np.float32)
    at = 0
    for array in arrays:
        part = made[at : at + array.shape[0]]
        if isinstance(array, BytePixels):
            array.write_to(part)
        else:
            part[...] = array
        at += len(part)
    return made


def joined_as_held(arrays: Sequence[Held]) -> Held:
    """As `joined`; as bytes, where all arrays are bytes of one table."""
    first = arrays[0]
    if len(arrays) == 1:
        return first
    if isinstance(first, BytePixels):
        parts = [
            array for array in arrays if isinstance(array, BytePixels) and np.array_equal(array.table, first.table)
        ]
        if len(parts) == len(arrays):
            shape = (sum(array.shape[0] for array in arrays), *first.shape[1:])
            return BytePixels(data=np.concatenate([part.data for part in parts]), table=first.table, shape=shape)
    return joined(arrays)


def pixel_tables(encoder: Any) -> tuple[np.ndarray, ...]:
    """The tables of an image encoder's processors, of pictures and of frames, float32 ``[3, 256]`` each."""
    frames = getattr(encoder, "frames", None)
    of_frames = getattr(frames, "processor", None) or getattr(getattr(frames, "images", None), "processor", None)
    found = [_table_of(processor) for processor in (encoder.processor, of_frames) if processor is not None]
    return tuple({table.tobytes(): table for table in found if table is not None}.values())


def _table_of(processor: Any) -> np.ndarray | None:
    numbers: Any = np.broadcast_to(_BYTES, (3, 1, 256))
    try:
        if processor.do_rescale:
            numbers = processor.rescale(numbers, processor.rescale_factor)
        if processor.do_normalize:
            numbers = processor.normalize(numbers, processor.image_mean, processor.image_std)
        return np.ascontiguousarray(numbers, dtype=np.float32).reshape(3, 256)
    except (AttributeError, TypeError, ValueError, LookupError, ArithmeticError, RuntimeError):  # it has other steps
        return None


def as_bytes(numbers: np.ndarray, tables: Sequence[np.ndarray]) -> BytePixels | None:
    """An array as bytes of the first table that gives exactly its numbers; None: none does.

    Args:
        numbers: Pixels ``[..., 3, H, W]``, or patches ``[n, 3 * pixels]`` of one colour after the other.
        tables: float32 ``[3, 256]`` each.
    """
    shape = numbers.shape
    if numbers.dtype != np.float32 or not numbers.size:
        return None
    if len(shape) >= 3 and shape[-3] == 3:
        view = numbers.reshape(-1, 3, shape[-2] * shape[-1])
    elif len(shape) == 2 and shape[1] % 3 == 0:
        view = numbers.reshape(shape[0], 3, shape[1] // 3)
    else:
        return None
    for table in tables:
        first, last = table[:, :1], table[:, 255:]
        with np.errstate(all="ignore"):  # numbers of another table
            data = ((view - first) * (255 / (last - first)) + np.float32(0.5)).astype(np.uint8)
        made = BytePixels(data=data, table=table, shape=shape)
        if np.array_equal(made.numbers().reshape(view.shape).view(np.uint32), view.view(np.uint32)):
            return made
    return None
