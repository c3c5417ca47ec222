"""Video files (mp4, webm, mkv, mov, avi, ...) by PyAV: their times, and the frames that are read.

A file is first read without decoding, which gives each frame's time; what is then decoded goes from the key frame in front
of a wanted frame to that frame. Where packets do not tell the frames (no time stamps, hidden frames, broken marks
of key frames) all is decoded: the same frames come out, later.
"""

import io
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import IO, Any

import numpy as np
import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import reason_of
from vlm_distill_cache.data.images.colours import frame_to_rgb
from vlm_distill_cache.data.images.frame_limits import check_held, check_size, same_size
from vlm_distill_cache.data.images.sampling import choose_frames
from vlm_distill_cache.data.images.truncation import stated_size
from vlm_distill_cache.data.sample import Frame, FrameSampling

MAX_HOURS = 6
MAX_FRAMES = 3_000_000  # 6 hours of 120 a second and some
MAX_DECODED = 500_000_000_000  # pixels: minutes of decoding
_WIDEST = 8  # times as wide or as high as stored: beyond it is no shape of pixels, but damage
_UNTIMED_RATE = Fraction(25)
# Demuxers that read one file; others follow addresses and paths in what they read (playlists, scripts, patterns).
_FORMATS = "mov matroska webm avi flv mpeg mpegts mpegvideo ogg asf h264 hevc m4v ivf obu mxf rm dv"
_OPTIONS = {"format_whitelist": ",".join(_FORMATS.split()), "protocol_whitelist": "none"}
# Without time stamps of what is shown: of some only those of a constant rate, in the order of decoding.
_UNSTAMPED = frozenset("avi h264 hevc m4v mpegvideo obu rm".split())  # noqa: SIM905
_SEEKS_BY_SHOWN = "matroska"  # its index has time stamps of showing, that of others those of decoding
_TURNS = {  # by which way the display matrix sends the axes of the stored frame
    (0, 1, -1, 0): PIL.Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): PIL.Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): PIL.Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): PIL.Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): PIL.Image.Transpose.TRANSVERSE,
}
# What PyAV raises on damaged files beside its own errors; none of it may end a run.
_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    AttributeError,
    NotImplementedError,
)


class _UntoldError(Exception):
    """Packets do not tell the frames: all have to be decoded."""


def read_container(file: IO[bytes], name: str, sampling: FrameSampling) -> list[Frame]:
    """Decode the frames of a video file that are read, upright, with square pixels.

    Args:
        file: Seekable; at its beginning.
        name: What errors call it.
        sampling: Which frames.

    Raises:
        SampleError: It is no video, damaged, cut off, too long or too large, or PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise SampleError(f"video {name} needs PyAV ({error}); run `pip install 'vlm-distill-cache[video]'`") from error
    try:
        _check_whole(file, name)
        try:
            with _open(file, name) as (container, stream):
                return _read_wanted(container, stream, name, sampling)
        except _UntoldError:
            return _read_all(file, name, sampling)
    except SampleError:
        raise
    except av.FFmpegError as error:
        unknown = isinstance(error, av.error.InvalidDataError)
        why = "no video of a known format, or a damaged one" if unknown else error.strerror or str(error)
        raise SampleError(f"video {name} cannot be decoded: {why}") from error
    except _ERRORS as error:
        raise SampleError(f"video {name} cannot be decoded: {reason_of(error)}") from error


def _check_whole(file: IO[bytes], name: str) -> None:
    stated, there = stated_size(file), file.seek(0, io.SEEK_END)
    if stated > there:
        raise SampleError(f"video {name} is cut off: expected {stated} bytes, got {there}; fetch it again")


@contextmanager
def _open(file: IO[bytes], name: str) -> Iterator[tuple[Any, Any]]:
    """An open container and its video, decoded by one thread; refuses what is too long or too large."""
    import av

    file.seek(0)
    # Not `options`: with them, PyAV 15 crashes where streams are found late (MPEG program streams).
    with av.open(file, container_options=_OPTIONS, metadata_errors="replace") as container:
        videos = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not videos:
            raise SampleError(f"video {name} has no pictures ({_kinds(container)}); leave the sample out")
        stream = videos[0]
        if stream.codec_context is None:
            raise SampleError(f"video {name} is of a codec that PyAV does not know; convert it to mp4 (H.264)")
        stream.codec_context.thread_count = 1
        check_size(stream.codec_context.width, stream.codec_context.height, name)
        if container.duration is not None:
            _check_length(Fraction(container.duration, av.time_base), name)
        yield container, stream


def _kinds(container: Any) -> str:
    return (
        ", ".join(sorted({str(stream.type) for stream in container.streams})) + " alone"
        if container.streams
        else "nothing"
    )


def _check_length(seconds: Fraction, name: str) -> None:
    if seconds > MAX_HOURS * 3600:
        raise SampleError(
            f"video {name} is {float(seconds) / 3600:.1f} hours long, more than the {MAX_HOURS} allowed; cut it into parts"
        )


@dataclass(frozen=True)
class _Packets:
    """What packets tell of a video's frames, in units of the stream.

    Attributes:
        shown: Time stamp of each frame, rising.
        keys: Of the key frames, rising.
        seeks: Where to seek to for each of `keys`.
    """

    shown: Sequence[int]
    keys: Sequence[int]
    seeks: Sequence[int]

    def key_of(self, stamp: int) -> int:
        """Number of the key frame from which a frame can be decoded."""
        return max(bisect_right(self.keys, stamp) - 1, 0)

    def to_decode(self, wanted: Sequence[int]) -> int:
        """How many frames are decoded for those that are wanted, rising."""
        count, behind = 1, 0
        for stamp in wanted:
            end = bisect_right(self.shown, stamp)
            count += end - max(bisect_left(self.shown, self.keys[self.key_of(stamp)]), behind)
            behind = end
        return count


def _read_wanted(container: Any, stream: Any, name: str, sampling: FrameSampling) -> list[Frame]:
    """Decode what is needed for the frames that are read.

    Raises:
        _UntoldError: The packets' times are not the frames'.
    """
    packets = _read_packets(container, stream, name)
    first, unit = packets.shown[0], stream.time_base
    _check_length((packets.shown[-1] - first) * unit, name)
    times = [(stamp - first) * unit for stamp in packets.shown]
    wanted = [packets.shown[number] for number in choose_frames(times, sampling)]
    _check_work(packets.to_decode(wanted), stream, name)
    check_held(len(wanted), stream.codec_context.width, stream.codec_context.height, name)
    found = _decode_at(container, stream, [first, *wanted], packets)  # the first: frames begin where packets do
    frames = [
        Frame(image=_upright(frame, stream, name), time=float((stamp - first) * unit))
        for stamp, frame in found
        if stamp != first or wanted[0] == first
    ]
    return same_size(frames, name)


def _read_packets(container: Any, stream: Any, name: str) -> _Packets:
    """Read a file's packets, without decoding them.

    Raises:
        _UntoldError: They do not tell when their frames are shown.
    """
    found: list[Any] = []
    for packet in container.demux(stream):
        if packet.size == 0:
            continue
        if packet.is_corrupt:
            raise SampleError(f"video {name} is damaged or cut off at frame {len(found) + 1}; fetch it again")
        if packet.is_discard:
            continue
        found.append((packet.pts, packet.dts, packet.is_keyframe))
        if len(found) > MAX_FRAMES:
            raise SampleError(f"video {name} has more than {MAX_FRAMES} frames; cut it into parts")
    if not found:
        raise SampleError(f"video {name} has no frames; leave the sample out")
    shown = sorted({stamp for stamp, _, _ in found if stamp is not None})
    if container.format.name in _UNSTAMPED or len(shown) != len(found) or not any(is_key for _, _, is_key in found):
        raise _UntoldError
    by_shown = container.format.name.startswith(_SEEKS_BY_SHOWN)
    keys = sorted((stamp, stamp if by_shown or to is None else to) for stamp, to, is_key in found if is_key)
    return _Packets(shown, [stamp for stamp, _ in keys], [to for _, to in keys])


def _check_work(frames: int, stream: Any, name: str) -> None:
    pixels = stream.codec_context.width * stream.codec_context.height
    if frames * pixels > MAX_DECODED:
        raise SampleError(
            f"video {name}: {frames} frames of {pixels} pixels would have to be decoded, more than {MAX_DECODED} pixels "
            "in all; scale it down, or cut it into parts"
        )


def _decode_at(container: Any, stream: Any, wanted: Sequence[int], packets: _Packets) -> Iterator[tuple[int, Any]]:
    """Each of these time stamps, rising, and the frame that has it; equal ones once.

    Raises:
        _UntoldError: There is no such frame.
    """
    reached: int | None = None  # the last frame decoded
    frames: Iterator[Any] = iter(())
    for stamp in dict.fromkeys(wanted):
        key = packets.key_of(stamp)
        if reached is None or packets.keys[key] > reached:
            container.seek(packets.seeks[key], stream=stream, backward=True)
            frames, reached = container.decode(stream), None
        for frame in frames:
            if frame.pts is None or (reached is not None and frame.pts <= reached):
                raise _UntoldError
            reached = frame.pts
            if reached >= stamp:
                break
        if reached != stamp:
            raise _UntoldError
        yield stamp, frame


def _read_all(file: IO[bytes], name: str, sampling: FrameSampling) -> list[Frame]:
    """Decode the whole video, once for its times and once for its pictures."""
    times: list[Fraction] = []
    with _open(file, name) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate or _UNTIMED_RATE
        unstamped = container.format.name in _UNSTAMPED
        first: Fraction | None = None
        for frame in container.decode(stream):
            time = None if frame.pts is None or unstamped else frame.pts * frame.time_base
            first = time if first is None else first
            since = None if time is None or first is None else time - first
            # Without a time, or with one that does not rise, a frame follows the one in front of it.
            follows = times[-1] + 1 / rate if times else Fraction(0)
            times.append(since if times and since is not None and since > times[-1] else follows)
            _check_work(len(times), stream, name)
    if not times:
        raise SampleError(f"video {name} has no frames; leave the sample out")
    _check_length(times[-1], name)
    wanted = dict.fromkeys(choose_frames(times, sampling))
    found = []
    with _open(file, name) as (container, stream):
        check_held(len(wanted), stream.codec_context.width, stream.codec_context.height, name)
        for number, frame in enumerate(container.decode(stream)):
            if number in wanted:
                found.append(Frame(image=_upright(frame, stream, name), time=float(times[number])))
            if number == max(wanted):
                break
    return same_size(found, name)


def _upright(frame: Any, stream: Any, name: str) -> PIL.Image.Image:
    """The picture of a decoded frame, as a player shows it: square pixels, turned as the file says."""
    if frame.is_corrupt:
        raise SampleError(
            f"video {name} is damaged or cut off (frame at {float(frame.time or 0):.2f} s); fetch it again"
        )
    check_size(frame.width, frame.height, name)
    picture = frame_to_rgb(frame)
    shape = float(stream.sample_aspect_ratio or 1)
    if shape != 1 and 1 / _WIDEST <= shape <= _WIDEST:
        width, height = (round(picture.width * max(shape, 1)), round(picture.height * max(1 / shape, 1)))
        check_size(width, height, name)
        picture = picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
    turn = _TURNS.get(_axes(frame))
    return picture if turn is None else picture.transpose(turn)


def _axes(frame: Any) -> tuple[int, int, int, int]:
    """Where the file's display matrix sends the axes, to the nearest quarter turn: (1, 0, 0, 1) as they are."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = (int(value) for value in np.frombuffer(matrix, np.int32)[:5])
    kept = (a, 0, 0, d) if abs(a) + abs(d) >= abs(b) + abs(c) else (0, b, c, 0)
    across, down, left, up = ((value > 0) - (value < 0) for value in kept)
    return across, down, left, up
