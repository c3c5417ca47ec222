"""Where images come from: files, bytes in a table, ranges of a tar, arrays. `common.pixels` decodes them."""

import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import HASH_BYTES, MAX_PIXELS, decode_image, image_hash, reason_of, to_rgb

__all__ = [
    "HASH_BYTES",
    "MAX_PIXELS",
    "FileSlice",
    "ImageArray",
    "ImageBytes",
    "ImageFile",
    "decode_image",
    "image_hash",
    "to_rgb",
]


@dataclass(frozen=True)
class ImageFile:
    """An image file.

    Attributes:
        path: Where it is.
        hint: Says in errors where relative paths start from.
        shown: What errors call it; default: the path. They are kept in caches, which must not depend on where a
            machine keeps its images, so this is the path as the data write it.
    """

    path: Path
    hint: str = ""
    shown: str = ""

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.shown or str(self.path)

    def load(self) -> PIL.Image.Image:
        """Decode the file to RGB.

        Raises:
            SampleError: The file is missing, empty, damaged, too large or not an image.
        """
        try:
            kind = self.path.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe or a device could be read for ever
                raise SampleError(f"image {self.name} is not a regular file")
            data = self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            hint = f"; {self.hint}" if self.hint else ""
            raise SampleError(f"image {self.name} cannot be read: {reason_of(error)}{hint}") from error
        return decode_image(data, name=self.name)


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image held in memory (a column of a table)."""

    data: bytes
    name: str

    def load(self) -> PIL.Image.Image:
        """Decode the bytes to RGB.

        Raises:
            SampleError: The bytes are empty, damaged, too large or not an image.
        """
        return decode_image(self.data, name=self.name)


@dataclass(frozen=True)
class FileSlice:
    """An encoded image that is a range of bytes of a file (a member of a tar)."""

    path: Path
    offset: int
    size: int
    name: str

    def load(self) -> PIL.Image.Image:
        """Read the range and decode it to RGB.

        Raises:
            SampleError: The range cannot be read, or is not an image.
        """
        return decode_image(self.read(), name=self.name)

    def read(self) -> bytes:
        """Return the ``size`` bytes.

        Raises:
            SampleError: The file cannot be read or ends too early.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise SampleError(f"{self.name} cannot be read: {reason_of(error)}") from error
        if len(data) != self.size:
            raise SampleError(f"{self.name} is cut off: expected {self.size} bytes, got {len(data)}")
        return data


@dataclass(frozen=True, eq=False)
class ImageArray:
    """Pixels in memory, u1 ``[H, W, 3]``, already upright RGB."""

    array: np.ndarray
    name: str

    def load(self) -> PIL.Image.Image:
        """Wrap the pixels.

        Raises:
            SampleError: The array is not u1 ``[H, W, 3]``.
        """
        array = self.array
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
            raise SampleError(f"image {self.name}: expected u1 [H, W, 3], got {array.dtype} {list(array.shape)}")
        return PIL.Image.fromarray(array)
