"""WebDataset tars of image + text, read in any order without unpacking.

The library streams tars front to back; a teacher cache needs sample number 31,415 again after a resume. So the
members' offsets are listed once (headers only: a 1 GB tar takes a fraction of a second) and each sample is two short
reads. The library still expands brace patterns, and its rule says what a sample is: the members whose names agree up
to the first dot of the base name.

Of a sample's members the last part of the extension says what they are, so that ``KEY.input.png`` with
``KEY.output.txt`` and ``KEY.png`` with ``KEY.png.json`` are samples. Whatever else lies in an archive is said: a
member that is no sample's, a sample without a text, or without a picture where others have one, is a sample that
cannot be used, with its reason.
"""

import logging
import posixpath
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.load import FileSlice, ImageBytes
from vlm_distill_cache.data.images.recognise import VIDEO_EXTENSIONS, extension_of, is_picture, picture_extensions
from vlm_distill_cache.data.images.video import FrameFolder, VideoSlice
from vlm_distill_cache.data.sample import ImageSource, Medium, number_names, refuse_repeats, usable_ids
from vlm_distill_cache.data.sources.conversations import has_text
from vlm_distill_cache.data.sources.entries import EntryDataset
from vlm_distill_cache.data.sources.json_text import decode, parse
from vlm_distill_cache.data.sources.patterns import find_files
from vlm_distill_cache.data.sources.pictures import brief, is_address, is_made, open_picture
from vlm_distill_cache.data.sources.videos import MOVING, Frames

logger = logging.getLogger(__name__)

_BLOCK = 512
_KEY = re.compile(r"((?:.*/|)[^./][^./]*)\.([^/]*)", re.DOTALL)  # `webdataset.tariterators.base_plus_ext`
# What systems leave, and WebDataset's own metadata, which it passes over where a name begins so.
_HIDDEN = re.compile(r"(.*/)?(\._[^/]*|\.DS_Store|Thumbs\.db|desktop\.ini)|__MACOSX/.*", re.DOTALL)
_METADATA = re.compile(r"__[^/]*__(/.*)?", re.DOTALL)
_LABELS = (b"V", b"D", b"M", b"N")  # of a volume, of a folder in an incremental archive
_TEXTS = {"json": "json", "txt": "txt", "text": "txt", "caption": "txt"}


@dataclass
class _Member:
    """Where the parts of one sample lie; ``others``: members of unknown kinds; ``problem``: why it cannot be used."""

    key: str
    texts: dict[str, FileSlice] = field(default_factory=dict)
    images: list[FileSlice] = field(default_factory=list)
    videos: list[FileSlice] = field(default_factory=list)
    others: list[FileSlice] = field(default_factory=list)
    problem: str = ""


class WebDataset(EntryDataset):
    """Samples of a tar, a folder of tars, a glob or a brace pattern; the id is the WebDataset key.

    ``paths`` are the tars where they are known already; ``pattern`` is what they are called then.
    """

    pictures_lie_beside = True

    def __init__(self, pattern: str, *, paths: Sequence[Path] = ()) -> None:
        self.name = Path(pattern).name
        self.image_root = Path(pattern).parent
        paths = paths or find_files(pattern, ".tar")
        members = [(number, member) for number, path in enumerate(paths) for member in _index_tar(path)]
        self._archives, self._members = [number for number, _ in members], [member for _, member in members]
        if not any(member.texts for member in self._members):
            raise DataError(
                f"{pattern}: no member KEY.json or KEY.txt in {len(paths)} tars; nothing to learn from"
                + next((f"; {member.problem}" for member in self._members if member.problem), "")
            )
        ids = refuse_repeats([member.key for member in self._members], where=pattern)
        self.sample_ids, self.odd_ids = usable_ids(ids)

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``."""
        member = self._members[index]
        if member.problem:
            raise SampleError(member.problem)
        if not member.texts:
            there = [part.name for part in (*member.images, *member.videos, *member.others)]
            raise SampleError(f"no member KEY.json or KEY.txt beside {', '.join(there[:3])}; nothing to learn from it")
        return _read_entry(member)

    def attached(self, index: int) -> Sequence[Medium]:
        """The pictures and videos among the sample's members; of unknown kinds, those that begin like a picture.

        Each kind by its numbers, where all have one (``KEY.0.jpg``), else as they lie in the archive.
        """
        member = self._members[index]
        found = member.images
        if not found and not member.videos:
            found = [part for part in member.others if is_picture(part.read(most=32))]
        return [*self._by_number(found, index), *map(_as_video, self._by_number(member.videos, index))]

    def _by_number(self, parts: Sequence[FileSlice], index: int) -> list[FileSlice]:
        inner = [self._inner(part, index).partition(".")[0] for part in parts]
        numbered = len(parts) > 1 and all(name.isdecimal() for name in inner)
        return (
            [parts[place] for place in sorted(range(len(parts)), key=lambda place: int(inner[place]))]
            if numbered
            else [*parts]
        )

    def arranged(self, index: int, pictures: Sequence[Medium], named: Sequence[Any]) -> Sequence[Medium]:
        """By the names that the entry gives, where each is one member's and none is left over.

        Raises:
            SampleError: A member beside others is called as something that is made of a picture.
        """
        names = [self._inner(part, index) for part in pictures]
        wanted = [value for value in named if isinstance(value, str)]
        found = [self._called(value, names, index) for value in wanted]
        if (
            wanted
            and all(len(places) == 1 for places in found)
            and {places[0] for places in found} == {*range(len(names))}
        ):
            return [pictures[places[0]] for places in found]
        made = [part.name for part, name in zip(pictures, names, strict=True) if is_made(name.partition(".")[0])]
        if made and len(pictures) > 1:
            raise SampleError(
                f"{made[0]} holds another picture beside {pictures[0].name}; name those that the sample is about under "
                "'images', in order, or remove it from the archive"
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
        wanted, key = name.replace("\\", "/").rpartition("/")[2], self._members[index].key.rpartition("/")[2]
        return [place for place, inner in enumerate(names) if wanted in (inner, f"{key}.{inner}")]

    def _inner(self, part: Medium, index: int) -> str:
        """A member's name behind its sample's key."""
        return (
            part.name.rpartition("/")[2]
            .rpartition(":")[2]
            .removeprefix(f"{self._members[index].key.rpartition('/')[2]}.")
        )

    def find(self, value: Any, index: int, kind: str = "image") -> ImageSource:
        """Only pictures that stand in the entry itself: a file that it names is not in the archive."""
        where = f"of {self.name}, sample {self.sample_ids[index]!r}"
        source = open_picture(value, self.image_root, where=where, kind=kind)
        if isinstance(source, ImageBytes):
            return source
        raise SampleError(
            f"it names the {kind} {brief(value)}, which does not lie beside it as {self._members[index].key}.EXTENSION"
        )

    def refuse_text_only(self, index: int, entry: Mapping[str, Any]) -> None:
        """Also refuse a sample with a member that is neither text nor a picture: what it shows would be lost."""
        for part in self._members[index].others:
            head = part.read(most=_BLOCK)
            if b"\0" in head or not head.isascii():
                raise SampleError(
                    f"{part.name} is no picture that can be read, and there is no other; expected one, or text alone"
                )
        super().refuse_text_only(index, entry)

    def image_keys(self) -> Sequence[str | None]:
        """None: only the pictures tell."""
        return [None] * len(self)

    def sources(self) -> NDArray[np.int64]:
        """By their archives."""
        return number_names(self._archives)


def _as_video(part: Medium) -> Medium:
    return VideoSlice(part.path, part.offset, part.size, part.name) if isinstance(part, FileSlice) else part


def _index_tar(path: Path) -> list[_Member]:
    """List an archive's samples, in the order of their first members."""
    try:
        with tarfile.open(path, "r:") as tar:
            infos, end = list(tar), tar.offset
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
        remedy = "it is compressed: unpack .tar.gz first" if _is_packed(path) else "copy or download it again"
        raise DataError(f"{path} cannot be read as an uncompressed tar: {error}; {remedy}") from error
    _refuse_cut(path, end)
    slices = _slices(path, infos)
    groups: dict[str, list[tuple[str, tarfile.TarInfo]]] = {}
    members: list[_Member] = []
    strays: list[_Member] = []
    passed: list[str] = []
    for info in infos:
        if info.isdir() or info.type in _LABELS or _HIDDEN.fullmatch(info.name):
            continue
        if _METADATA.fullmatch(info.name):
            passed.append(info.name)
        elif found := _KEY.fullmatch(info.name):
            groups.setdefault(found[1], []).append((found[2], info))
        else:
            strays.append(_stray(path.name, info.name))
    if passed:
        logger.warning(
            "%s: %d members are metadata to WebDataset and are not read, the first %s", path, len(passed), passed[0]
        )
    for key, parts in groups.items():
        members += _samples(key, parts, slices, path.name)
    return members + strays


def _is_packed(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    except OSError:
        return False


def _refuse_cut(path: Path, end: int) -> None:
    """Refuse an archive whose members end at byte ``end`` without the blocks of zeros that close one.

    `tarfile` takes a header that is cut off or damaged for the end, and so does one behind which another archive
    follows.
    """
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
        if block.strip(b"\0") or len(block) < _BLOCK:
            raise DataError(
                f"{path} is cut off or damaged at byte {end}: its end mark is missing; copy or download it again (one that "
                "a program wrote may not have been closed)"
            )
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise DataError(
                    f"{path} goes on behind its end mark at byte {end}: several archives in one file, or damage; keep them "
                    "as files of their own (tar --concatenate joins two)"
                )


def _slices(path: Path, infos: Sequence[tarfile.TarInfo]) -> dict[int, FileSlice | str]:
    """By a member's offset, where its bytes lie, links followed inside the archive; or why they cannot be read."""
    has_links = any(info.islnk() or info.issym() for info in infos)
    files = {posixpath.normpath(info.name): info for info in infos} if has_links else {}
    found: dict[int, FileSlice | str] = {}
    for info in infos:
        shown = f"{path.name}:{info.name}"
        target = _target_of(info, files) if has_links else info
        if target.isreg() and not target.issparse():
            found[info.offset] = FileSlice(path, target.offset_data, target.size, shown)
        elif target.islnk() or target.issym():
            found[info.offset] = f"{shown} is a link to {target.linkname[:100]!r}, which is not in the archive"
        else:
            found[info.offset] = f"{shown} is no ordinary file; expected pictures and texts"
    return found


def _target_of(info: tarfile.TarInfo, files: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """The file that a member stands for; a link, if it leads out of the archive or in a circle."""
    seen = {info.name}
    while info.islnk() or info.issym():
        folder = "" if info.islnk() else posixpath.dirname(info.name)
        name = posixpath.normpath(posixpath.join(folder, info.linkname))
        if name not in files or name in seen:
            break
        seen.add(name)
        info = files[name]
    return info


def _stray(archive: str, name: str) -> _Member:
    """What stands for a member that belongs to no sample."""
    shown = f"{archive}:{name}"
    reason = f"{shown} belongs to no sample: its name has no extension or begins with a dot; expected KEY.EXTENSION"
    return _Member(key=shown, problem=reason)


def _samples(
    key: str, parts: Sequence[tuple[str, tarfile.TarInfo]], slices: Mapping[int, FileSlice | str], archive: str
) -> list[_Member]:
    """The sample of a key; or the samples that its members may have been meant as, none of which can be used."""
    names = [info.name for _, info in parts]
    member = _Member(key=key)
    texts: dict[str, list[str]] = {}
    for extension, info in parts:
        part = slices[info.offset]
        kind = extension.lower().rsplit(".", 1)[-1]
        if isinstance(part, str):
            member.problem = member.problem or part
        elif kind in _TEXTS:
            texts.setdefault(_TEXTS[kind], []).append(extension)
            # A plain extension is the sample's own text where others stand beside it (KEY.json, KEY.meta.json).
            if _TEXTS[kind] not in member.texts or "." not in extension:
                member.texts[_TEXTS[kind]] = part
        elif kind in VIDEO_EXTENSIONS:
            member.videos.append(part)
        elif kind in picture_extensions():
            member.images.append(part)
        else:
            member.others.append(part)
    if len(set(names)) < len(names):
        member.problem = member.problem or f"{archive} holds {max(names, key=names.count)} twice"
    plain = {kind: sum("." not in extension for extension in found) for kind, found in texts.items()}
    unclear = [found for kind, found in texts.items() if plain[kind] > 1 or (len(found) > 1 and not plain[kind])]
    if not unclear or member.problem:
        return [member]
    if not all("." in extension for extension in unclear[0]):
        member.problem = (
            f"{archive} holds several texts of the key {key!r}: {', '.join(unclear[0][:3])}; keep one of them"
        )
        return [member]
    stems = {name: f"{key}.{extension.rpartition('.')[0]}" for (extension, _), name in zip(parts, names, strict=True)}
    reason = (
        f"{archive} holds {len(unclear[0])} texts of the key {key!r} ({', '.join(unclear[0][:3])}): WebDataset ends a key at "
        "the first dot of a name; rename the members so that only the extension follows a dot"
    )
    return [_Member(key=stem, problem=reason) for stem in dict.fromkeys(stems.values())]


def _read_entry(member: _Member) -> dict[str, Any]:
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
