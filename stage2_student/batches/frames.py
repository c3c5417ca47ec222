"""Which of the teacher's pictures a student's pictures are, where the two read other frames of a video, or fewer pictures.

A model that reads frames at times t_1 < t_2 < ... stands for the whole video: each frame for the time around it, up to the
midpoints between it and its neighbours. So a student's frame shows as much of each of the teacher's frames as their times
share, fractions included, and what looks at it meets what the teacher looked at as boxes do: by shared volume.

Dims: P pictures of the teacher's, Q of the student's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.errors import CacheMismatchError

Times = Sequence[tuple[int, float]]
"""Of each picture, or empty: the medium of a sample that it is a frame of (-1: a still picture), and its second."""


@dataclass(frozen=True)
class Medium:
    """A still picture, or the frames of one video, among one side's pictures.

    Attributes:
        first: Its first picture.
        end: The one behind its last.
        times: Seconds of its frames; none of a still picture.
    """

    first: int
    end: int
    times: tuple[float, ...] = ()


def media_of(pictures: int, times: Times) -> tuple[Medium, ...]:
    """What so many pictures are, in order."""
    if not len(times):
        return tuple(Medium(place, place + 1) for place in range(pictures))
    found: list[Medium] = []
    numbers = [int(number) for number, _ in times]
    seconds = np.array([second for _, second in times], dtype=np.float32).tolist()  # as a cache keeps them
    for place, number in enumerate(numbers):
        if number >= 0 and place and numbers[place - 1] == number:
            last = found[-1]
            found[-1] = Medium(last.first, place + 1, (*last.times, seconds[place]))
        else:
            found.append(Medium(place, place + 1, (seconds[place],) if number >= 0 else ()))
    return tuple(found)


def hashes_of(record: Record) -> tuple[bytes, ...]:
    """The hash of each picture of a record, 16 bytes; none of a text."""
    hashes = np.asarray(record["image_hash"]).astype(np.uint8).reshape(-1, 16)
    return tuple(row.tobytes() for row in hashes if len(hashes) > 1 or row.any())


def times_of(record: Record) -> list[tuple[int, float]]:
    """`Times` of a record of either format version."""
    return [(int(number), float(second)) for number, second in np.asarray(record.get("frame_times", ())).reshape(-1, 2)]


def pair_media(
    teacher: tuple[Medium, ...], student: tuple[Medium, ...], *, where: str, fewer: bool
) -> list[tuple[Medium, Medium]]:
    """Each of the student's pictures and videos with the teacher's.

    Args:
        fewer: Whether the student may leave out the last ones (`SampleEncoder.pictures_beyond`).

    Raises:
        CacheMismatchError: If they are not the same ones.
    """
    if len(student) > len(teacher) or (len(student) < len(teacher) and not fewer):
        raise CacheMismatchError(
            f"{where}: the teacher saw {len(teacher)} pictures and videos, the data now has {len(student)}: the sample "
            "changed. Restore it, or build the cache again"
        )
    pairs = list(zip(teacher, student, strict=False))
    for number, (theirs, ours) in enumerate(pairs, start=1):
        if bool(theirs.times) != bool(ours.times):
            words = [("a video" if medium.times else "a picture") for medium in (theirs, ours)]
            raise CacheMismatchError(
                f"{where}: what it shows as number {number} was {words[0]} when the teacher saw it and is {words[1]} now: "
                "the sample changed. Restore it, or build the cache again"
            )
    return pairs


def shared_pictures(pairs: Sequence[tuple[Medium, Medium]]) -> list[tuple[int, int, int]]:
    """Pictures that both sides read: the number of the medium from 1 on, the teacher's picture, the student's.

    Of a video those are frames of the same second; a student that reads others has only these compared.
    """
    found = []
    for number, (theirs, ours) in enumerate(pairs, start=1):
        if not theirs.times:
            found.append((number, theirs.first, ours.first))
            continue
        at = {second: place for place, second in enumerate(theirs.times)}
        found += [
            (number, theirs.first + at[second], ours.first + place)
            for place, second in enumerate(ours.times)
            if second in at
        ]
    return found


def frame_bounds(teacher: Sequence[float], student: Sequence[float]) -> NDArray[np.float64]:
    """Where a student's frames begin and end among the teacher's, float64 ``[Q + 1]``, from 0 to P, rising.

    Each side's frames share out the time from the first second that either reads to the last, at the midpoints between
    their own; 1.5 is the middle of the teacher's second frame.

    Args:
        teacher: Seconds of the teacher's frames, rising, at least one.
        student: Of the student's.
    """
    count = len(teacher)
    if tuple(teacher) == tuple(student):
        return np.arange(count + 1, dtype=np.float64)
    sides = [np.asarray(side, dtype=np.float64) for side in (teacher, student)]
    low, high = min(side[0] for side in sides), max(side[-1] for side in sides)
    theirs, ours = (np.concatenate([[low], (side[1:] + side[:-1]) / 2, [high]]) for side in sides)
    if low == high:
        return np.array([0.0, float(count)])
    found: NDArray[np.float64] = np.interp(ours, theirs, np.arange(count + 1, dtype=np.float64))
    found[0], found[-1] = 0.0, float(count)
    return found


def on_teachers_pictures(
    tiles: tuple[Tile, ...], pairs: Sequence[tuple[Medium, Medium]], *, pictures: int
) -> tuple[Tile, ...]:
    """A student's tiles with spans on the teacher's pictures.

    Args:
        pairs: From `pair_media`; all of the student's media.
        pictures: The student's, Q.
    """
    if all(theirs == ours for theirs, ours in pairs):
        return tiles
    bounds = np.zeros(pictures + 1)
    for theirs, ours in pairs:
        inner = frame_bounds(theirs.times, ours.times) if theirs.times else np.array([0.0, 1.0])
        bounds[ours.first : ours.end] = theirs.first + inner[:-1]
        bounds[ours.end] = theirs.first + inner[-1]
    return tuple(
        replace(tile, span=(float(bounds[int(tile.span[0])]), float(bounds[int(tile.span[1])]))) for tile in tiles
    )
