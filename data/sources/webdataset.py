"""WebDataset tars of image + text, read in any order without unpacking.

The library streams tars front to back; a teacher cache needs sample number 31,415 again after a resume. So the
members' offsets are listed once (headers only; of large data the list is kept, `kept.tars`) and each sample is two short
reads. The library still expands brace patterns, and its rule says what a sample is: the members whose names agree up
to the first dot of the base name.

Of a sample's members the last part of the extension says what they are, so that ``KEY.input.png`` with
``KEY.output.txt`` and ``KEY.png`` with ``KEY.png.json`` are samples. Whatever else lies in an archive is said: a
member that is no sample's, a sample without a text, or without a picture where others have one, is a sample that
cannot be used, with its reason.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.load import FileSlice, ImageBytes
from vlm_distill_cache.data.images.recognise import extension_of, is_picture
from vlm_distill_cache.data.images.video import FrameFolder, VideoSlice
from vlm_distill_cache.data.sample import ImageSource, Medium, Same, Survey, refuse_repeats
from vlm_distill_cache.data.sources.conversations import Conversation, has_text
from vlm_distill_cache.data.sources.entries import EntryDataset
from vlm_distill_cache.data.sources.json_text import decode, parse
from vlm_distill_cache.data.sources.kept.headers import Archive
from vlm_distill_cache.data.sources.kept.ids import KeptIds
from vlm_distill_cache.data.sources.kept.surveys import kept_survey
from vlm_distill_cache.data.sources.kept.tars import OddIds, TarSample, TarSamples
from vlm_distill_cache.data.sources.patterns import find_files
from vlm_distill_cache.data.sources.pictures import brief, content_of, is_address, is_made, open_picture
from vlm_distill_cache.data.sources.videos import MOVING, Frames

_DIGITS = re.compile(r"[0-9]+")
_HEAD = 512  # bytes, by which what is no text is told


class WebDataset(EntryDataset):
    """Samples of a tar, a folder of tars, a glob or a brace pattern; the id is the WebDataset key.

    ``paths`` are the tars where they are known already; ``pattern`` is what they are called then. ``by_files``: the data are
    told from others by which samples their archives hold and where, and no text is read before its sample is asked for.
    """

    pictures_lie_beside = True

    def __init__(self, pattern: str, *, paths: Sequence[Archive] = (), by_files: bool = False) -> None:
        self.name = Path(pattern).name
        self.image_root = Path(pattern).parent
        paths = paths or find_files(pattern, ".tar")
        self._by_files = by_files
        self._samples = TarSamples(paths)
        if not self._samples.has_texts:
            raise DataError(
                f"{pattern}: no member KEY.json or KEY.txt in {len(paths)} tars; nothing to learn from"
                + (f"; {self._samples.first_problem}" if self._samples.first_problem else "")
            )
        if self._samples.may_repeat:
            refuse_repeats(list(self._samples.keys()), where=pattern)
        self.sample_ids, self.odd_ids = KeptIds(self._samples), OddIds(self._samples)

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``."""
        member = self._samples.sample(index)
        if member.problem:
            raise SampleError(member.problem)
        if not member.texts:
            there = [part.name for part in (*member.images, *member.videos, *member.others)]
            raise SampleError(f"no member KEY.json or KEY.txt beside {', '.join(there[:3])}; nothing to learn from it")
        return _read_entry(member)

    def attached(self, index: int) -> Sequence[Medium]:
        """The pictures and videos among the sample's members; of unknown kinds, those that begin like a picture.

        Each kind by its numbers, where names differ in nothing else (``KEY.0.jpg``, ``KEY.img2.jpg``), else as they lie in
        the archive.
        """
        member = self._samples.sample(index)
        found = member.images
        if not found and not member.videos:
            found = [part for part in member.others if is_picture(part.read(most=32))]
        return [*self._by_number(found, index), *map(_as_video, self._by_number(member.videos, index))]

    def _by_number(self, parts: Sequence[FileSlice], index: int) -> list[FileSlice]:
        names = [self._inner(part, index).rpartition(".")[0] for part in parts]
        numbers = [_number_of(name.partition(".")[0]) for name in names]
        if len({shape for shape, _ in numbers}) > 1 or len(set(numbers)) < len(numbers):
            numbers = [_number_of(name) for name in names]  # KEY.0.1.png
        if len(parts) < 2 or len({shape for shape, _ in numbers}) > 1:
            return [*parts]
        return [parts[place] for place in sorted(range(len(parts)), key=lambda place: numbers[place][1])]

    def arranged(self, index: int, pictures: Sequence[Medium], named: Sequence[Any]) -> Sequence[Medium]:
        """By the names that the entry gives, where each is one member's; one that is named twice is shown twice.

        Raises:
            SampleError: A member is not named, or none is and they are more or fewer than the names; or a member beside
                others is called as something that is made of a picture.
        """
        names = [self._inner(part, index) for part in pictures]
        wanted = [value for value in map(content_of, named) if isinstance(value, str)]
        found = [self._called(value, names, index) for value in wanted]
        are_members = bool(wanted) and all(len(places) == 1 for places in found)
        chosen = [places[0] for places in found] if are_members else [*range(len(names))]
        made = [place for place, name in enumerate(names) if is_made(name.partition(".")[0])]
        others = {*range(len(names))} - {*chosen} - {*made}
        if are_members and not others:
            return [pictures[place] for place in chosen]
        if made and len(pictures) > 1 and not are_members:
            raise SampleError(
                f"{pictures[made[0]].name} holds another picture beside {pictures[0].name}; name those that the sample is about "
                "under 'images', in order, or remove it from the archive"
            )
        if others and are_members:
            raise SampleError(
                f"{pictures[min(others)].name} lies beside it and is not named ({brief(wanted[0])} is); name all that the sample "
                "is about, in order, or remove it from the archive"
            )
        if any(map(extension_of, wanted)) and len(wanted) != len(pictures):
            raise SampleError(
                f"it names {len(wanted)} ({brief(wanted[0])}), and beside it lie {len(pictures)} ({pictures[0].name}, ...); name "
                "those in the archive that the sample is about, in order"
            )
        return pictures

    def moving(self, index: int, pictures: Sequence[Medium], named: Sequence[Any]) -> tuple[list[Medium], list[Medium]]:
        """A video is a member that it names (KEY.gif), or those of its frames.

        Raises:
            SampleError: It names another video, and members that may be its frames.
        """
        names = [self._inner(part, index) for part in pictures]
        videos: list[Medium] = []
        taken: set[int] = set()
        for value in named:
            frames = value.pictures if isinstance(value, Frames) else (value,)
            found = [self._called(frame, names, index) if isinstance(frame, str) else [] for frame in frames]
            if not all(len(places) == 1 for places in found):
                is_moving = (
                    len(pictures) == len(named) == 1
                    and {extension_of(str(value)), extension_of(f".{names[0]}")} <= MOVING
                )
                if not is_moving:
                    continue
                found = [[0]]
            parts = [pictures[places[0]] for places in found]
            taken |= {places[0] for places in found}
            if isinstance(value, Frames):
                images = tuple(part for part in parts if isinstance(part, ImageSource))
                videos.append(FrameFolder(images, fps=value.fps, times=value.times))
            else:
                videos.append(_as_video(parts[0]))
        if len(videos) < len(named) and len(pictures) > 1 and not all(map(is_address, named)):
            raise SampleError(
                f"it names the video {brief(named[0])}, which does not lie beside it, and {len(pictures)} pictures do; list them "
                "under 'video', in order, if they are its frames, or remove that key"
            )
        return [part for place, part in enumerate(pictures) if place not in taken], videos

    def _called(self, name: str, names: Sequence[str], index: int) -> list[int]:
        """Which of a sample's members are called by a name."""
        wanted, key = name.replace("\\", "/").rpartition("/")[2], self._samples.key(index).rpartition("/")[2]
        return [place for place, inner in enumerate(names) if wanted in (inner, f"{key}.{inner}")]

    def _inner(self, part: Medium, index: int) -> str:
        """A member's name behind its sample's key."""
        return (
            part.name.rpartition("/")[2]
            .rpartition(":")[2]
            .removeprefix(f"{self._samples.key(index).rpartition('/')[2]}.")
        )

    def find(self, value: Any, index: int, kind: str = "image") -> ImageSource:
        """Only pictures that stand in the entry itself: a file that it names is not in the archive."""
        where = f"of {self.name}, sample {self.sample_ids[index]!r}"
        source = open_picture(value, self.image_root, where=where, kind=kind)
        if isinstance(source, ImageBytes):
            return source
        raise SampleError(
            f"it names the {kind} {brief(value)}, which does not lie beside it as {self._samples.key(index)}.EXTENSION"
        )

    def refuse_text_only(self, index: int, entry: Mapping[str, Any], said: Conversation) -> None:
        """Also refuse a sample with a member that is neither text nor a picture: what it shows would be lost."""
        for part in self._samples.sample(index).others:
            head = part.read(most=_HEAD)
            if b"\0" in head or not head.isascii():
                raise SampleError(
                    f"{part.name} is no picture that can be read, and there is no other; expected one, or text alone"
                )
        super().refuse_text_only(index, entry, said)

    def image_keys(self) -> Sequence[str | None]:
        """None: only the pictures tell."""
        return Same(None, len(self))

    def made_of(self) -> Any:
        """The folder that names start from, and the archives."""
        return [str(self.image_root.absolute()), self._samples.of]

    def survey(self) -> Survey:
        """As of all data; of much of it what was found once is kept."""
        if self._by_files:
            return self._samples.survey()
        return kept_survey(self, self.made_of()) if self._samples.kept else super().survey()

    def sources(self) -> NDArray[np.int64]:
        """By their archives."""
        counts = self._samples.counts[self._samples.counts > 0]
        return np.repeat(np.arange(len(counts)), counts)


def _number_of(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with its numbers taken out, and these."""
    return _DIGITS.sub("#", name), tuple(map(int, _DIGITS.findall(name)))


def _as_video(part: Medium) -> Medium:
    return VideoSlice(part.path, part.offset, part.size, part.name) if isinstance(part, FileSlice) else part


def _read_entry(member: TarSample) -> dict[str, Any]:
    """What the texts of a sample say: the JSON, with the caption of the text beside it where it has none."""
    caption = {"caption": _decode(member.texts["txt"])} if "txt" in member.texts else None
    if "json" not in member.texts:
        return caption or {}
    part = member.texts["json"]
    try:
        record = parse(_decode(part), where=part.name)
    except DataError as error:
        raise SampleError(str(error)) from error
    if isinstance(record, list):  # some tars hold the bare conversation
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise SampleError(f"{part.name}: expected an object, got {type(record).__name__}")
    return record | caption if caption and not has_text(record) else record


def _decode(part: FileSlice) -> str:
    try:
        return decode(part.read(), where=part.name)
    except DataError as error:
        raise SampleError(str(error)) from error
