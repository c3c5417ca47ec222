"""Animated pictures (GIF, WebP, PNG) as videos, by Pillow: each frame decoded as a picture is."""

from fractions import Fraction
from typing import IO

import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import DECODE_ERRORS, reason_of, upright_rgb
from vlm_distill_cache.data.images.frame_limits import check_held, check_size
from vlm_distill_cache.data.images.sampling import choose_frames
from vlm_distill_cache.data.sample import Frame, FrameSampling

MAX_FRAMES = 20_000
MAX_DRAWN = 5_000_000_000  # pixels of all frames together: about a minute of decoding
_UNTIMED = Fraction(1, 10)  # s, as browsers show a frame without a duration
_FORMATS = ("GIF", "WEBP", "PNG")
_FINEST = 65535  # the largest denominator of a PNG's durations


def begins_as_animation(head: bytes) -> bool:
    """Whether a file that begins so is of a format that may hold an animation, or one picture."""
    return head.startswith((b"GIF8", b"\x89PNG\r\n\x1a\n")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def read_animation(file: IO[bytes], name: str, sampling: FrameSampling) -> list[Frame]:
    """Decode the frames of an animation that are read; one picture is an animation of one frame.

    Args:
        file: At its beginning.
        name: What errors call it.
        sampling: Which frames.

    Raises:
        SampleError: It is damaged or too large.
    """
    try:
        with PIL.Image.open(file, formats=_FORMATS) as image:
            return _read(image, name, sampling)
    except SampleError:
        raise
    except DECODE_ERRORS as error:
        raise SampleError(f"video {name} cannot be decoded: {reason_of(error)}") from error


def _read(image: PIL.Image.Image, name: str, sampling: FrameSampling) -> list[Frame]:
    width, height = image.size
    check_size(width, height, name)
    # Of a PNG, a picture in front may be for viewers that know no animations.
    first = int(bool(getattr(image, "default_image", False)) and getattr(image, "n_frames", 1) > 1)
    times = _times(image, name, first)
    chosen = choose_frames(times, sampling)
    check_held(len(chosen), width, height, name)
    frames = []
    for number in chosen:
        image.seek(first + number)
        frames.append(Frame(image=upright_rgb(image), time=float(times[number])))
    return frames


def _times(image: PIL.Image.Image, name: str, first: int) -> list[Fraction]:
    """Seconds of each frame since the first, which needs all of them decoded."""
    times: list[Fraction] = []
    now = Fraction(0)
    most = min(MAX_FRAMES, MAX_DRAWN // (image.size[0] * image.size[1]))
    while True:
        try:
            image.seek(first + len(times))
        except EOFError:
            return times
        if len(times) >= max(most, 1):
            raise SampleError(
                f"video {name} is an animation of more than {most} frames of {image.size[0]} x {image.size[1]} pixels; "
                "make it shorter or smaller, or a video file (mp4, webm)"
            )
        image.load()  # WebP tells durations only then
        times.append(now)
        milliseconds = Fraction(image.info.get("duration", 0)).limit_denominator(_FINEST)
        now += milliseconds / 1000 if milliseconds > 0 else _UNTIMED
