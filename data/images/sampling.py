"""Which frames of a video are read: a function of their times and of `FrameSampling`."""

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

from vlm_distill_cache.data.sample import FrameSampling


def choose_frames(times: Sequence[Fraction], sampling: FrameSampling) -> list[int]:
    """Choose the frames that are read.

    For k = 0, 1, 2, ... that is the first frame whose time is at least ``k / fps``; of a video with fewer frames a second
    these are all. Where they are more than ``most``, the time from the first frame to the last is cut into ``most`` equal
    parts instead, and of the middle of each part it is the first frame at that time or behind it. Each frame is
    chosen once, so that both give fewer where frames are far apart.

    Args:
        times: Seconds since the first frame, rising from 0, at least one; exact, as is all that is compared here: with
            floats, the frame at 0.3 s would miss ``3 / 10``.
        sampling: Its ``fps`` is taken as the decimal number that it is written as.

    Returns:
        Numbers of frames, rising.
    """
    fps = Fraction(str(sampling.fps))
    chosen: list[int] = []
    mark = 0
    while (place := bisect_left(times, mark / fps, lo=chosen[-1] if chosen else 0)) < len(times):
        if len(chosen) == sampling.most:
            return _uniform(times, sampling.most)
        chosen.append(place)
        mark = int(times[place] * fps) + 1  # all marks up to its time have this frame
    return chosen


def _uniform(times: Sequence[Fraction], count: int) -> list[int]:
    part = times[-1] / count
    return sorted({bisect_left(times, (number + Fraction(1, 2)) * part) for number in range(count)})
