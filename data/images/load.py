"""Where images come from: files, bytes in a table, ranges of a tar. `common.pixels` decodes them."""

import stat
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, Protocol

import PIL.Image

from vlm_distill_cache.common.errors import SampleError, TransferError
from vlm_distill_cache.common.files.hashing import checksum
from vlm_distill_cache.common.pixels import decode_image, reason_of


class Opened(Protocol):
    """A file that can be read: a path, or what lies elsewhere and is fetched."""

    def open(self, mode: Literal["rb"], /) -> BinaryIO:
        """Open it to read bytes."""
        ...


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
        """Decode the file to RGB; `SampleError` if it is missing, empty, damaged, too large or not an image."""
        return decode_image(self._read(), name=self.name)

    def digest(self) -> str:
        """Hash of the file's bytes; `SampleError` if it cannot be read."""
        return checksum(self._read())

    def _read(self) -> bytes:
        try:
            kind = self.path.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # a pipe or a device could be read for ever
                raise SampleError(f"image {self.name} is not a regular file")
            return self.path.read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            hint = f"; {self.hint}" if self.hint else ""
            raise SampleError(f"image {self.name} cannot be read: {reason_of(error)}{hint}") from error


@dataclass(frozen=True)
class ImageBytes:
    """An encoded image held in memory (a column of a table)."""

    data: bytes
    name: str

    def load(self) -> PIL.Image.Image:
        """Decode the bytes to RGB; `SampleError` if they are no image."""
        return decode_image(self.data, name=self.name)

    def digest(self) -> str:
        """Hash of the bytes."""
        return checksum(self.data)


@dataclass(frozen=True)
class FileSlice:
    """An encoded image that is a range of bytes of a file (a member of a tar)."""

    path: Opened
    offset: int
    size: int
    name: str

    def load(self) -> PIL.Image.Image:
        """Read the range and decode it to RGB; `SampleError` if it is no image."""
        return decode_image(self.read(), name=self.name)

    def digest(self) -> str:
        """Hash of the range; `SampleError` if it cannot be read."""
        return checksum(self.read())

    def read(self, *, most: int | None = None) -> bytes:
        """Return the ``size`` bytes, or the first of them; `SampleError` if the file cannot be read or ends too early."""
        size = self.size if most is None else min(self.size, most)
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(size)
        except TransferError:  # no sample is to blame
            raise
        except OSError as error:
            raise SampleError(f"{self.name} cannot be read: {reason_of(error)}") from error
        if len(data) != size:
            raise SampleError(f"{self.name} is cut off: expected {size} bytes, got {len(data)}")
        return data
