"""What a sample shows, laid out to be drawn: each picture in a row of its own, the frames of a video as a film strip.

A view is a picture, or the frames that a model's visual tokens show together, of which the first is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from vlm_distill_cache.common.attention.tiles import tiles_of, views_of
from vlm_distill_cache.common.cache.schema import Record

if TYPE_CHECKING:
    from collections.abc import Mapping

    from PIL.Image import Image

MOST_STILLS = 8
_ACROSS = 8  # frames of a line of a film strip
_LABEL, _GAP, _LABEL_WIDTH = 18, 4, 92  # pixels


@dataclass(frozen=True, kw_only=True)
class Shot:
    """One view of a sample.

    Attributes:
        label: ``picture 2``, or the seconds of its frames; empty where there is no other view.
        first: The first picture that it shows, from 0, of all pictures and frames of the sample.
        video: Of frames, which of the sample's pictures and videos they are of, from 0; -1 of a picture.
        image: RGB, if it is at hand.
    """

    label: str = ""
    first: int = 0
    video: int = -1
    image: Image | None = None

    @property
    def sides(self) -> tuple[int, int] | None:
        """Width and height of the image in pixels."""
        return None if self.image is None else self.image.size


def shots_of(record: Record, images: Mapping[int, Image] | None = None) -> list[Shot]:
    """The views of a record of either format version, in the order in which its visual tokens show them.

    Args:
        images: By the number of the picture in the sample, from 0.

    Raises:
        CacheFormatError: If its tiles are damaged.
    """
    images, times = (
        images or {},
        np.asarray(record.get("frame_times", np.zeros((0, 2)))).astype(np.float64),
    )  # [P or 0, 2]
    if not len(times) and not len(record.get("tile_pictures", ())):  # one picture, or none
        return [Shot(image=images.get(0))] * (len(record["tiles"]) > 0)
    shots: list[Shot] = []
    for view in views_of(tiles_of(record)):
        first, end = (int(bound) for bound in view.span)
        if view.is_frame:
            shot = Shot(label=seconds_words(times[first:end, 1].tolist()), video=int(times[first, 0]))
        else:
            shot = Shot(label=f"picture {1 + sum(one.video < 0 for one in shots)}")
        shots.append(replace(shot, first=first, image=images.get(first)))
    return shots if len(shots) != 1 else [replace(shots[0], label="")]


def seconds_words(times: Sequence[float]) -> str:
    """When frames that are shown together were taken: ``0.5 s``, ``0.5-1.0 s``."""
    said = [f"{time:.1f}" if np.isfinite(time) else "?" for time in times]
    return f"{'-'.join(dict.fromkeys((said[0], said[-1])))} s"


def media_words(record: Record) -> str:
    """How many pictures a record has, and how many frames of each video."""
    shown = len(record["image_hash"]) if np.any(record["image_hash"]) else 0
    videos = np.asarray(record.get("frame_times", np.zeros((0, 2))))[:, 0].astype(np.int64)
    stills = shown - int((videos >= 0).sum())
    said = [f"{stills} picture{'s' * (stills != 1)}"] if stills or not shown else []
    for video in np.unique(videos[videos >= 0]).tolist():
        frames = np.asarray(record["frame_times"])[videos == video, 1].tolist()
        said.append(f"a video of {len(frames)} frames ({seconds_words([frames[0], frames[-1]])})")
    return ", ".join(said)


def chosen(shots: Sequence[Shot], *, frames: int, stills: int = MOST_STILLS) -> list[int]:
    """Which views are drawn, in order: at most so many pictures and so many frames, each evenly spaced."""
    kept: set[int] = set()
    for of_video, most in ((False, stills), (True, frames)):
        places = [place for place, shot in enumerate(shots) if (shot.video >= 0) == of_video]
        spaced = np.linspace(0, len(places) - 1, min(most, len(places))).round().astype(int).tolist()
        kept |= {places[place] for place in spaced}
    return sorted(kept)


def chosen_words(shots: Sequence[Shot], drawn: Sequence[int]) -> str:
    """How many views are drawn, where not all are; else nothing."""
    said = []
    for of_video, name in ((False, "pictures"), (True, "frames")):
        of, shown = (sum((shot.video >= 0) == of_video for shot in some) for some in (shots, [shots[i] for i in drawn]))
        said += [f"{shown} of {of} {name}"] if shown < of else []
    return f"{' and '.join(said)} drawn" if said else ""


def bands(shots: Sequence[Shot], drawn: Sequence[int]) -> list[list[int]]:
    """The drawn views in rows: one a picture, the frames of a video together."""
    found: list[list[int]] = []
    for video, group in groupby(drawn, key=lambda view: shots[view].video):
        views = list(group)
        found += [[view] for view in views] if video < 0 else [views]
    return found


@dataclass(frozen=True)
class Place:
    """Where one view lies on a sheet of all, in pixels, and what is written below it."""

    left: int
    top: int
    size: tuple[int, int]
    label: str


def lay_out(shots: Sequence[Shot], sides: Sequence[tuple[int, int]], *, still: int, frame: int) -> list[Place]:
    """Stack pictures and film strips.

    Args:
        sides: Width and height of each view, in any unit.
        still: Pixels of the longer side of a picture.
        frame: The same of a frame in a strip.
    """
    places: list[Place] = []
    top = 0
    for band in bands(shots, range(len(shots))):
        for start in range(0, len(band), _ACROSS):
            left, height = 0, 0
            for view in band[start : start + _ACROSS]:
                scale = (still if shots[view].video < 0 else frame) / max(sides[view])
                size = (max(1, round(sides[view][0] * scale)), max(1, round(sides[view][1] * scale)))
                places.append(Place(left, top, size, shots[view].label))
                left, height = left + max(size[0], _LABEL_WIDTH) + _GAP, max(height, size[1])
            top += height + _LABEL + _GAP
    return places


def join_views(
    parts: Sequence[Image | None], places: Sequence[Place], *, beside: Sequence[str] = (), clear: bool = False
) -> Image:
    """One picture of all views; a single one is itself.

    Args:
        parts: Of each view a picture of its place's size; None leaves it grey.
        beside: What else stands below each.
        clear: Without labels, on nothing (RGBA): to be laid over another one.
    """
    import PIL.Image
    from PIL import ImageDraw, ImageFont

    first = parts[0]
    if len(places) == 1 and first is not None:
        return first
    width = max(place.left + place.size[0] for place in places)
    height = max(place.top + place.size[1] + _LABEL for place in places)
    sheet: Image = PIL.Image.new("RGBA" if clear else "RGB", (width, height), (0, 0, 0, 0) if clear else "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    for number, (part, place) in enumerate(zip(parts, places, strict=True)):
        if part is not None:
            sheet.paste(part, (place.left, place.top))
        elif not clear:
            box = (place.left, place.top, place.left + place.size[0] - 1, place.top + place.size[1] - 1)
            pen.rectangle(box, fill="lightgrey")
        if not clear:
            more = f"  {beside[number]}" if beside else ""
            pen.text((place.left, place.top + place.size[1] + 2), f"{place.label}{more}", fill="black", font=font)
    return sheet
