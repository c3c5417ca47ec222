"""Where videos come from: files, bytes in a table, ranges of a tar, frames that are picture files.

Names alone: decoding is to come.
"""

from dataclasses import dataclass
from pathlib import Path

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.recognise import names_video
from vlm_distill_cache.data.sample import Frame, FrameSampling, ImageSource


def is_video(name_or_head: str | bytes) -> bool:
    """Whether a text names a video file, or bytes begin as one."""
    return names_video(name_or_head) if isinstance(name_or_head, str) else name_or_head[4:8] == b"ftyp"


@dataclass(frozen=True)
class VideoFile:
    """A video file; attributes as of `ImageFile`."""

    path: Path
    hint: str = ""
    shown: str = ""

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.shown or str(self.path)

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the frames that are read; `SampleError` if that cannot be done."""
        raise SampleError(f"video {self.name} cannot be decoded")


@dataclass(frozen=True)
class VideoBytes:
    """An encoded video held in memory (a column of a table)."""

    data: bytes
    name: str

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the frames that are read; `SampleError` if that cannot be done."""
        raise SampleError(f"video {self.name} cannot be decoded")


@dataclass(frozen=True)
class VideoSlice:
    """An encoded video that is a range of bytes of a file (a member of a tar)."""

    path: Path
    offset: int
    size: int
    name: str

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the frames that are read; `SampleError` if that cannot be done."""
        raise SampleError(f"video {self.name} cannot be decoded")


@dataclass(frozen=True)
class FrameFolder:
    """A video that is picture files: those of a folder, or those that are listed, at `fps` or at `times`, seconds."""

    paths: Path | tuple[Path | ImageSource, ...]
    fps: float | None = None
    times: tuple[float, ...] | None = None
    hint: str = ""
    shown: str = ""

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.shown or "of frames"

    def frames(self, sampling: FrameSampling) -> list[Frame]:
        """Decode the pictures that are read; `SampleError` if that cannot be done."""
        raise SampleError(f"video {self.name} cannot be decoded")
