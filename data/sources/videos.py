"""Which videos an entry names: files, bytes, folders of frames, and lists of frames."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.load import ImageBytes, ImageFile
from vlm_distill_cache.data.images.recognise import extension_of, names_video
from vlm_distill_cache.data.images.video import FrameFolder, VideoBytes, VideoFile
from vlm_distill_cache.data.sample import ImageSource, VideoSource
from vlm_distill_cache.data.sources.pictures import (
    TEXT_KEYS,
    VIDEO_KEYS,
    brief,
    distinct,
    is_address,
    looks_like_picture,
    normal_key,
    says_none,
)
from vlm_distill_cache.data.sources.printed import printed

# Read where there is nothing else to see: beside a picture they may say where it was taken from.
_FURTHER = re.compile(r"video_?(?:\d{1,3}|files|urls|bytes|data|filenames?|names?)")
_FURTHER_NUMBER = re.compile(r"\d+$")
MOVING = frozenset({"gif", "apng"})  # pictures that are videos where data say so
_FRAME_KEYS = frozenset({"frames", "video_frames"})  # lists of frames, if they hold more than one
_PLAIN = ("image", "images")
_RATES = ("sample_fps", "fps")  # of a list of frames, frames a second; `video_fps` is that of the video they are from
_TIMES = ("timestamps", "frame_timestamps", "frame_times", "times")  # of each frame of a list, seconds
# Says that a part of a video is meant, where there is a time, or the number of a frame, above 0: `start_time`, `video_end`
# (Qwen), `clip_start`, `endFrame`, `t_start`.
_UNIT = r"(?:times?|timestamps?|ts|secs?|seconds?|s|ms|frames?|frame_idx|frame_index|pts)"
_EDGE = re.compile(
    rf"(?:(?:video|clip|segment|trim|cut|t|{_UNIT})_)?(?:starts?|ends?|starting|ending|begin)(?:_{_UNIT})?"
)
# The same, where there are two of them, or an object with both (InternVL, VTimeLLM).
_SPAN = re.compile(
    r"(?:video_)?(?:clip|segment|split|trim|interval)|(?:video_)?(?:time|clip|frames?)_(?:range|span|interval|window)"
)
_ABOUT = frozenset({"meta", "metadata", "info", "video_meta", "video_metadata", "video_info"})
_CLOCK = re.compile(r"(?:(?:(\d+):)?(\d{1,2}):)?(\d+(?:[.,]\d*)?|[.]\d+)\s*s?")
_BYTES = re.compile(r"\s*data:video/[^,]*;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Frames:
    """A video that is a list of pictures.

    Attributes:
        pictures: Each as `open_picture` takes it.
        fps: Frames a second; None: nothing is said.
        times: Of each in seconds; None: nothing is said.
    """

    pictures: tuple[Any, ...]
    fps: float | None = None
    times: tuple[float, ...] | None = None


def keys_of_videos(entry: Mapping[str, Any], video_keys: Collection[str] = ()) -> list[str]:
    """The keys of an entry under which videos stand; ``video_keys``: further ones that are known to hold one."""
    pictured = any(normal_key(key) in _PLAIN and not says_none(value) for key, value in entry.items())
    found = []
    for key, value in entry.items():
        name = normal_key(key)
        are_frames = not pictured and name in _FRAME_KEYS and _are_frames(value) and len(value) > 1
        if not says_none(value) and (name in VIDEO_KEYS or key in video_keys or are_frames):
            found.append(key)
    return found


def named_videos(entry: Mapping[str, Any], keys: Collection[str]) -> list[Any]:
    """What an entry gives as its videos, each as it stands there or as `Frames`; for `open_video`.

    The same video under two keys counts once, and an address is passed over where a file is named. A list of pictures
    is one video, a list of anything else one each.

    Args:
        keys: Where they stand.

    Raises:
        SampleError: Keys name different videos, or a part of one is meant.
    """
    found = {key: videos_in(entry[key], entry) for key in keys}
    found = {key: values for key, values in found.items() if not all(map(is_address, values))} or found
    return _one_list(found, entry)


def guessed_videos(entry: Mapping[str, Any]) -> list[Any]:
    """Videos under keys of any other name, where an entry gives nothing else to see; as `named_videos`."""
    further = [key for key, value in entry.items() if _FURTHER.fullmatch(normal_key(key)) and not says_none(value)]
    files = [
        key
        for key, value in entry.items()
        if isinstance(value, str) and names_video(value) and normal_key(key) not in TEXT_KEYS
    ]
    further = [key for key in further if not isinstance(entry[key], str) or names_video(entry[key])]
    numbered = [key for key in further if normal_key(key)[-1].isdigit()]
    numbered.sort(key=lambda key: int(_FURTHER_NUMBER.findall(normal_key(key))[0]))
    if len(numbered) > 1:
        return [value for key in numbered for value in videos_in(entry[key], entry)]
    return named_videos(entry, dict.fromkeys((*further, *files)))


def _one_list(found: Mapping[str, list[Any]], entry: Mapping[str, Any]) -> list[Any]:
    different = distinct(found)
    if len(different) > 1:
        raise SampleError(
            f"{' and '.join(map(repr, sorted(different)))} name different videos, whose order cannot be told; put those that "
            "the sample is about under 'videos'"
        )
    if found:
        refuse_cuts(entry)
    return [value for values in different.values() for value in values]


def part_videos(part: Mapping[str, Any], value: Any) -> list[Any]:
    """The videos that a part of a message gives.

    Raises:
        SampleError: It is a part of a video.
    """
    refuse_cuts(part)
    return videos_in(value, part)


def videos_in(value: Any, beside: Mapping[str, Any]) -> list[Any]:
    """The videos that a value holds; ``beside`` says how many frames a second a list of frames has, or their times."""
    if _are_frames(value):
        return [_frames(value, beside)]
    if isinstance(value, list | tuple):
        return [
            _frames(item, _of_one(beside, place, len(value))) if isinstance(item, list | tuple) else item
            for place, item in enumerate(value)
        ]
    return [value]


def _of_one(beside: Mapping[str, Any], place: int, count: int) -> Mapping[str, Any]:
    """What is said of frames, of one of several videos: where there is a list of it, what stands at its place."""
    said = {key: beside.get(key) for key in (*_RATES, *_TIMES)}
    return {key: one[place] if isinstance(one, list) and len(one) == count else one for key, one in said.items()}


def _frames(pictures: Sequence[Any], beside: Mapping[str, Any]) -> Frames:
    fps = next((rate for key in _RATES if (rate := _rate(beside.get(key))) is not None), None)
    lists = (_times_in(beside.get(key), len(pictures)) for key in _TIMES)
    return Frames(tuple(pictures), fps, next((times for times in lists if times is not None), None))


def open_video(value: Any, find: Callable[[Any, str], ImageSource]) -> VideoSource:
    """Where a video that an entry gives is to be read: a file, bytes, or a folder or list of frames.

    Args:
        find: Where a file that the entry gives is to be read, as `open_picture` says, and what errors call it.

    Raises:
        SampleError: It is none of them, or would have to be downloaded.
    """
    if isinstance(value, Frames):
        return FrameFolder(
            tuple(find(picture, "image") for picture in value.pictures), fps=value.fps, times=value.times
        )
    while isinstance(value, Mapping):
        refuse_cuts(value)
        inner = next((value[key] for key in _KEYS if not says_none(value.get(key))), None)
        if inner is None:
            break
        value = inner
    if isinstance(value, str) and (encoded := _BYTES.match(value)):
        value = f"data:image/png;base64,{value[encoded.end() :]}"  # decoded alike
    source = find(bytes(value) if isinstance(value, bytes | bytearray) else value, "video")
    if isinstance(source, ImageFile):
        is_folder = not names_video(source.path.name) and source.path.is_dir()
        kind = FrameFolder if is_folder else VideoFile
        return kind(source.path, hint=source.hint, shown=source.shown)
    if isinstance(source, ImageBytes):
        return VideoBytes(source.data, source.name)
    raise SampleError(f"video {brief(value)} is a picture; name the file of a video")


_KEYS = ("bytes", "path", "file_name", "filename", "video", "video_url", "url", "source", "base64", "data")


def _are_frames(value: Any) -> bool:
    """Whether a value is a list of pictures; moving ones are videos of their own."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(
        looks_like_picture(item) and not (isinstance(item, str) and extension_of(item) in MOVING) for item in value
    )


def refuse_cuts(entry: Mapping[str, Any]) -> None:
    """Refuse what says beside a video that a part of it is meant.

    Raises:
        SampleError: Says which key.
    """
    further = (value for key, value in entry.items() if normal_key(key) in _ABOUT and isinstance(value, Mapping))
    for beside in (entry, *further):
        for key, value in beside.items():
            name = normal_key(key)
            if (_EDGE.fullmatch(name) and _is_late(value)) or (_SPAN.fullmatch(name) and _is_span(value)):
                raise SampleError(
                    f"{key!r} ({brief(value)}) says that a part of the video is meant, which is not read: cut the video, "
                    f"then remove {key!r}"
                )


def _is_late(value: Any) -> bool:
    """Whether a value is a time above 0, or a list of such."""
    if isinstance(value, list | tuple):
        return any(map(_is_late, value))
    return (_seconds(value) or 0) > 0


def _is_span(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_EDGE.fullmatch(normal_key(key)) and _is_late(inner) for key, inner in value.items())
    return isinstance(value, list | tuple) and len(value) == 2 and any(map(_is_late, value))


def _times_in(value: Any, count: int) -> tuple[float, ...] | None:
    """Seconds of each of so many frames; None: it does not say them."""
    value = printed(value) if isinstance(value, str) else value
    if not isinstance(value, list | tuple) or len(value) != count:
        return None
    times = [_seconds(item) for item in value]
    return None if None in times else tuple(time for time in times if time is not None)


def _seconds(value: Any) -> float | None:
    """A time as a number, a text of one, or by the clock (``01:02.5``); None: it is none."""
    if isinstance(value, str):
        found = _CLOCK.fullmatch(value.strip())
        if found is None:
            return None
        hours, minutes, seconds = (float((part or "0").replace(",", ".")) for part in found.groups())
        return hours * 3600 + minutes * 60 + seconds
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number else None


def _rate(value: Any) -> float | None:
    """Frames a second; None: it says none."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 1:
        value = value[0]
    rate = _seconds(value)
    return float(rate) if rate is not None and rate > 0 else None
