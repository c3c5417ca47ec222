"""Where videos come from: files, bytes in a table, ranges of a tar, frames that are picture files.

Nothing is opened before `frames()`, and all are picklable. GIF, WebP and PNG are decoded by Pillow, all else by PyAV, which
is an extra: ``pip install 'vlm-distill-cache[video]'``.
"""

import io
import math
import os
import re
import stat
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import IO

from vlm_distill_cache.common.errors import SampleError, TransferError
from vlm_distill_cache.common.files.hashing import checksum, file_checksum, fingerprint, stream_checksum
from vlm_distill_cache.common.pixels import reason_of
from vlm_distill_cache.data.images.animations import begins_as_animation, read_animation
from vlm_distill_cache.data.images.containers import read_container
from vlm_distill_cache.data.images.frame_limits import check_held, same_size
from vlm_distill_cache.data.images.load import ImageFile, Opened
from vlm_distill_cache.data.images.recognise import extension_of, is_picture, names_video, picture_extensions
from vlm_distill_cache.data.images.sampling import choose_frames
from vlm_distill_cache.data.sample import DigestedImage, Frame, FrameSampling, ImageSource

HEAD_BYTES = 512  # what `is_video` wants to see of a file; less tells fewer formats
_NUMBER = re.compile(r"(\d+)")
_MARKS = (  # of MPEG elementary and program streams, Flash, ASF
    b"\x00\x00\x01\xba", b"\x00\x00\x01\xb3", b"FLV\x01", b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", b"\x1a\x45\xdf\xa3",
)  # fmt: skip
_BOXES = frozenset({b"moov", b"mdat", b"wide", b"pnot"})  # with which QuickTime files without a `ftyp` begin
_PACKETS = ((0, 188), (4, 192))  # where transport streams begin, and how long their packets are
_NO_VIDEO_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"mif1", b"avif", b"jxl ", b"M4A ", b"M4B ", b"crx ")


def is_video(name_or_head: str | bytes) -> bool:
    """Whether a text names a video file (or is a ``data:video/`` address), or bytes begin as one.

    An animated picture (GIF, WebP, PNG) is a picture here; where data say that it is a video, the sources read it as one.

    Args:
        name_or_head: A name or address; or the first `HEAD_BYTES` bytes of a file, or more.
    """
    if isinstance(name_or_head, str):
        return names_video(name_or_head)
    head = bytes(name_or_head[:HEAD_BYTES])
    if head[4:8] == b"ftyp":
        return head[8:12] not in _NO_VIDEO_BRANDS
    if head[4:8] in _BOXES or head.startswith(_MARKS) or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return True
    if head.startswith(b"OggS"):
        return b"\x80theora" in head[:64] or b"OVP80" in head[:64]
    # Transport streams: packets of 188 bytes, or of 192 with a time in front, each with the same first byte.
    return any(
        len(head) > start + 2 * size and head[start : start + 3 * size : size] == b"GGG" for start, size in _PACKETS
    )


@dataclass(frozen=True)
class VideoFile:
    """A video file.

    Attributes:
        path: Where it is.
        hint: Says in errors where relative paths start from.
        shown: What errors call it; default: the path. As of `ImageFile`.
    """

    path: Path
    hint: str = ""
    shown: str = ""

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.shown or str(self.path)

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the frames that are read; `SampleError` if the file is missing, damaged, too long or no video."""
        hint = f"; {self.hint}" if self.hint else ""
        try:
            kind = self.path.stat().st_mode
            if stat.S_ISDIR(kind):
                raise SampleError(
                    f"video {self.name} is a folder; a folder of frames must be named as frames, not as a file"
                )
            if not stat.S_ISREG(kind):  # a pipe or a device could be read for ever
                raise SampleError(f"video {self.name} is not a regular file")
            file = self.path.open("rb")
        except (OSError, ValueError) as error:
            if isinstance(error, SampleError):
                raise
            raise SampleError(f"video {self.name} cannot be read: {reason_of(error)}{hint}") from error
        with file:
            return _read(file, self.name, sampling)

    def digest_of(self, sampling: FrameSampling) -> str | None:
        """Hash of the file's bytes, which is the same for any sampling; None: it is no regular file."""
        return file_checksum(self.path) if self.path.is_file() else None


@dataclass(frozen=True)
class VideoBytes:
    """An encoded video held in memory (a column of a table)."""

    data: bytes
    name: str

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the frames that are read; `SampleError` if the bytes are no video, damaged or too long."""
        return _read(io.BytesIO(self.data), self.name, sampling)

    def digest_of(self, sampling: FrameSampling) -> str:
        """Hash of the bytes, which is the same for any sampling."""
        return checksum(self.data)


@dataclass(frozen=True)
class VideoSlice:
    """An encoded video that is a range of bytes of a file (a member of a tar); read in pieces, never whole."""

    path: Opened
    offset: int
    size: int
    name: str

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the frames that are read; `SampleError` if the range is no video, damaged, too long or not there."""
        try:
            file = self.path.open("rb")
        except TransferError:  # no sample is to blame
            raise
        except OSError as error:
            raise SampleError(f"video {self.name} cannot be read: {reason_of(error)}") from error
        with file:
            there = os.fstat(file.fileno()).st_size - self.offset
            if there < self.size:
                raise SampleError(f"video {self.name} is cut off: expected {self.size} bytes, got {max(there, 0)}")
            return _read(io.BufferedReader(_Window(file, self.offset, self.size)), self.name, sampling)

    def digest_of(self, sampling: FrameSampling) -> str:
        """Hash of the range, which is the same for any sampling; OSError if it cannot be read."""
        with self.path.open("rb") as file, io.BufferedReader(_Window(file, self.offset, self.size)) as part:
            return stream_checksum(part)


@dataclass(frozen=True)
class FrameFolder:
    """A video that is picture files: those of a folder, or those that are listed.

    Attributes:
        paths: A folder, whose pictures are taken by their names, numbers in them compared as numbers (2 before 10); or
            pictures, files or other sources, in order.
        fps: Frames a second; None: one.
        times: Of each frame in seconds, rising, instead of `fps`; counted from the first.
        hint: Says in errors where relative paths start from.
        shown: What errors call it; default: the folder, or the first picture.
    """

    paths: Path | tuple[Path | ImageSource, ...]
    fps: float | None = None
    times: tuple[float, ...] | None = None
    hint: str = ""
    shown: str = ""

    @property
    def name(self) -> str:
        """What errors call it."""
        if self.shown or isinstance(self.paths, Path):
            return self.shown or str(self.paths)
        if not self.paths:
            return "of no frames"
        first = self.paths[0]
        return f"of frames from {first.name if isinstance(first, ImageSource) else first}"

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the pictures that are read; `SampleError` if there is none or one of them cannot be read."""
        sources = self._sources()
        if not sources:
            raise SampleError(
                f"video {self.name} has no frames: expected picture files, got none; leave the sample out"
            )
        times = self._times(len(sources))
        chosen = choose_frames(times, sampling)
        found: list[Frame] = []
        for number in chosen:
            source = sources[number]
            try:
                image = source.load()
            except SampleError as error:
                raise SampleError(f"video {self.name}, frame {number + 1}: {error}") from error
            check_held(len(chosen), *image.size, self.name)
            found.append(Frame(image=image, time=float(times[number])))
        return same_size(found, self.name)

    def digest_of(self, sampling: FrameSampling) -> str | None:
        """Hash of the frames that are read, and of their times; None: one of them cannot be told from others."""
        sources = self._sources()
        times = self._times(len(sources))
        chosen = choose_frames(times, sampling)
        found = [
            source.digest() if isinstance(source, DigestedImage) else None
            for source in map(sources.__getitem__, chosen)
        ]
        return None if None in found else fingerprint([found, [str(times[number]) for number in chosen]])

    def _sources(self) -> list[ImageSource]:
        if not isinstance(self.paths, Path):
            return [
                path if isinstance(path, ImageSource) else ImageFile(path, hint=self.hint, shown=self._shown(path))
                for path in self.paths
            ]
        try:
            names = [entry.name for entry in os.scandir(self.paths) if extension_of(entry.name) in picture_extensions()]
        except (OSError, ValueError) as error:
            hint = f"; {self.hint}" if self.hint else ""
            raise SampleError(f"video {self.name} cannot be read: {reason_of(error)}{hint}") from error
        visible = sorted((name for name in names if not name.startswith(".")), key=_natural)
        return [ImageFile(self.paths / name, shown=f"{self.name}/{name}") for name in visible]

    def _shown(self, path: Path) -> str:
        return path.name if self.shown else ""

    def _times(self, count: int) -> list[Fraction]:
        if self.times is None:
            if self.fps is not None and not 0 < self.fps < math.inf:
                raise SampleError(f"video {self.name}: expected frames a second above 0, got {self.fps}")
            fps = Fraction(1) if self.fps is None else Fraction(str(self.fps))
            return [number / fps for number in range(count)]
        if len(self.times) != count:
            raise SampleError(f"video {self.name} has {count} frames, but {len(self.times)} times; give one for each")
        if not all(map(math.isfinite, self.times)) or any(late <= early for early, late in pairwise(self.times)):
            raise SampleError(f"video {self.name}: times of its frames do not rise: {self.times[:5]}; sort the frames")
        exact = [Fraction(str(time)) for time in self.times]
        return [time - exact[0] for time in exact]


def _natural(name: str) -> tuple[list[tuple[int, str]], str]:
    """Compares numbers in names as numbers; equal ones (1 and 01) by their texts."""
    parts = _NUMBER.split(name)  # texts and numbers by turns
    return [(int(part), "") if place % 2 else (0, part) for place, part in enumerate(parts)], name


def _read(file: IO[bytes], name: str, sampling: FrameSampling) -> list[Frame]:
    """Decode an open, seekable file by what it begins with."""
    try:
        head = file.read(HEAD_BYTES)
        file.seek(0)
    except OSError as error:
        raise SampleError(f"video {name} cannot be read: {reason_of(error)}") from error
    if not head:
        raise SampleError(f"video {name} is empty (0 bytes)")
    if not begins_as_animation(head) and not is_video(head) and is_picture(head):
        raise SampleError(
            f"video {name} is a still picture: name it under 'image', or list the frames of a video under 'video'"
        )
    read = read_animation if begins_as_animation(head) else read_container
    return read(file, name, sampling)


class _Window(io.RawIOBase):
    """A range of an open file as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file, offset, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        """Read what is left, at most as much as fits."""
        self._file.seek(self._offset + self._at)
        data = self._file.read(max(min(len(buffer), self._size - self._at), 0))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move within the range."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def tell(self) -> int:
        """Where it stands in the range."""
        return self._at
