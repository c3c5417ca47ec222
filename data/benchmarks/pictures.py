"""Pictures that annotations name: found below the folder, wherever its owner unpacked them.

Annotations write ``000000391895.jpg``, ``val2014/COCO_val2014_000000391895.jpg`` or ``pos/7.png``, and owners unpack archives
under any folder. A picture is taken from its benchmark's own folder, from folders that no other benchmark has its annotations
in, or from ``--images``; a name that several different files have is not guessed.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.benchmarks.documents import holds_annotations
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import ImageSource

_NUMBER = re.compile(r"[\d_-]{1,5}")  # 0001.png is another picture in each folder, and 5/image.png in each number
_COCO = re.compile(r"(?:coco_\w+_)?(\d{12})", re.IGNORECASE)
_COCO_SPLITS = ("val2014", "train2014", "test2015", "test2014")
_COCO_FOLDER = re.compile(r"(ms)?coco[\w-]*|(train|val|test)(20\d\d)?")
_ANY_FOLDER = frozenset("images image img imgs pictures data".split())  # noqa: SIM905
# Folders of a benchmark that are not called after it.
_PARTS = re.compile(
    r"(data|dataset|annotations?|anns?|jsons?|questions?|labels?|splits?|test|val|validation|train)[\d._-]*"
)
# A folder before the last part of a path, in the text of annotations.
_NAMED = re.compile(rb'([^"\\/\t\r\n,]+)(?:\\?/|\\+)[^"\\/,\t\r\n]+(?=["\r\n,\t])')
_TEXTS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".txt")
ENDINGS = frozenset(".jpg .jpeg .png .webp .bmp .gif .tif .tiff".split())  # noqa: SIM905


class Pictures:
    """The picture files below some folders, looked up by what annotations call them."""

    def __init__(self, roots: Sequence[Path]) -> None:
        """Look below ``roots``: the folder of benchmarks and ``--images``; each is walked once, when it is needed.

        Raises:
            DataError: One of them is no folder.
        """
        for root in roots:
            if not root.is_dir():
                raise DataError(f"image folder {root} does not exist; give the folder that holds the pictures")
        self._roots = list(roots)
        self._own: dict[tuple[Path, Path | None], bool] = {}
        self._named: dict[Path, frozenset[str]] = {}

    @cached_property
    def _walked(self) -> tuple[Mapping[str, Sequence[Path]], frozenset[Path]]:
        """Picture files by their last part in lower case, and by that without its ending; folders with annotations.

        SEED-Bench's pictures have no ending.
        """
        found: dict[str, list[Path]] = defaultdict(list)
        annotated: set[Path] = set()
        seen: set[str] = set()  # links may lead back
        for root in self._roots:
            for folder, folders, files in os.walk(root, followlinks=True):
                real = os.path.realpath(folder)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                if holds_annotations(Path(folder), files):
                    annotated.add(Path(folder).absolute())
                for file in sorted(files):
                    path = Path(folder, file)
                    if path.suffix.lower() in ENDINGS:
                        found[file.lower()].append(path)
                        found[path.stem.lower()].append(path)
                    elif "." not in file:
                        found[file.lower()].append(path)
        return found, frozenset(annotated)

    def find(self, name: str, *, near: Path | None = None, hints: Iterable[str] = ()) -> ImageSource:
        """The picture that annotations call ``name``: a path, a file's name, or one without its ending.

        A path as it is written is looked for first: below ``near``, the folders above it, and ``--images``. Then the file's
        name is; where annotations tell pictures apart by their folders (``pos/7.png``, ``neg/7.png``), in such a folder only.
        COCO's number is one picture in all of its releases.

        Args:
            near: Folder of the annotations; of files of one name, those that share the longest way down with it are meant.
            hints: Parts of paths (``val2014``) that decide between files of one name.

        Raises:
            SampleError: It is not there, or several files of that name are not the same picture.
        """
        path = PurePosixPath(name.replace("\\", "/").strip())
        if not path.name or path.is_absolute() or ".." in path.parts:
            path = PurePosixPath(*[part for part in path.parts if part not in ("/", "..")])
        above = [each for each in near.parents if each.is_relative_to(self._roots[0])] if near else []
        for root in (*([near] if near else []), *above, *self._roots):
            if path.name and _is_file(root / path) and (root == near or self._is_own((root / path).parent, near)):
                return ImageFile(root / path, shown=name)
        hints = [hint.lower() for hint in hints]
        chosen = self._called(path, near, hints)
        number, folder = _COCO.fullmatch(path.stem), _telling(path.parts)
        if not chosen and number and (not folder or _COCO_FOLDER.fullmatch(folder)):
            others = (f"{prefix}{number[1]}" for prefix in ("", *(f"coco_{split}_" for split in _COCO_SPLITS)))
            chosen = next(filter(None, (self._called(PurePosixPath(other), near, hints) for other in others)), [])
        if len(chosen) == 1:
            return ImageFile(chosen[0], shown=name)
        if chosen:
            raise SampleError(
                f"{len(chosen)} different pictures are called {name!r}: {chosen[0]}, {chosen[1]}; give the folder of the right "
                "ones with --images, or keep each benchmark in a folder of its own"
            )
        found = self._walked[0].get(path.name.lower(), ())
        if found and not any(self._is_own(file.parent, near) for file in found):
            raise SampleError(
                f"no picture {name!r} in the benchmark's own folder ({found[0]} may be of another one, whose annotations are "
                "there); put the pictures beside the annotations, or name their folder with --images"
            )
        elsewhere = f" ({found[0]} is in a folder of another name)" if found else ""
        raise SampleError(
            f"no picture {name!r} below {self._shown}{elsewhere}; put the pictures there, or name their folder with --images"
        )

    def numbered(self, number: int, *, near: Path | None = None, hints: Iterable[str] = ()) -> ImageSource:
        """The picture with COCO's number: ``COCO_val2014_000000391895`` or ``000000391895``; 391895.jpg is Visual Genome's.

        Raises:
            SampleError: As for `find`.
        """
        try:
            return self.find(f"{number:012d}", near=near, hints=hints)
        except SampleError as error:
            raise SampleError(f"no picture of the number {number}: {error}") from error

    def _called(self, path: PurePosixPath, near: Path | None, hints: Sequence[str]) -> Sequence[Path]:
        """The files that a path may mean by its last part, one of each picture."""
        coco, folder = _COCO.fullmatch(path.stem), _telling(path.parts)
        found: Sequence[Path] = [
            file
            for file in self._walked[0].get(path.name.lower(), ())
            if self._is_own(file.parent, near)
            or (coco and _COCO_FOLDER.fullmatch(file.parent.name.lower()))
            or (folder and _telling(file.parts) == folder and near and _is_below(file, self._home(near.absolute())))
        ]
        there = [file for file in found if _telling(file.parts) == folder]
        if folder and not there:
            coco_elsewhere = coco and not _COCO_FOLDER.fullmatch(folder)
            if _NUMBER.fullmatch(path.stem) or _NUMBER.fullmatch(folder) or coco_elsewhere:
                return []
            named = self._folders_named(near) if near else {folder}
            found = [file for file in found if folder in named and _telling(file.parts) not in named]
        found = there if folder and there else found
        longest: Sequence[Path] = []
        for parts in range(len(path.parts), 0, -1):  # the longest end of the path that any file has
            longest = longest or [file for file in found if _ends_alike(file, path, parts)]
        hinted = [file for file in longest if any(hint in str(file).lower() for hint in hints)]
        return _distinct(_nearest(hinted or longest, near))

    def _folders_named(self, near: Path) -> frozenset[str]:
        """By which folders the texts of annotations tell pictures apart, in lower case; other tables are not searched."""
        if near not in self._named:
            found: set[bytes] = set()
            for file in near.iterdir():
                if file.suffix.lower() in _TEXTS and file.is_file():
                    found.update(_NAMED.findall(file.read_bytes()))
            self._named[near] = frozenset(name.decode(errors="replace").lower() for name in found)
        return self._named[near]

    def _is_own(self, folder: Path, near: Path | None) -> bool:
        """Whether a folder is of the benchmark whose annotations are ``near``, or of no other one."""
        if (folder, near) not in self._own:
            self._own[folder, near] = near is None or self._looks_own(folder, near)
        return self._own[folder, near]

    def _looks_own(self, folder: Path, near: Path) -> bool:
        if any(folder.resolve().is_relative_to(root.resolve()) for root in self._roots[1:]):
            return True
        near, folder = near.absolute(), folder.absolute()
        home = self._home(near)
        common = Path(os.path.commonpath([home, folder]))
        between = [each for each in (folder, *folder.parents) if each != common and each.is_relative_to(common)]
        if any(self._homes.get(each, {home}) != {home} and not near.is_relative_to(each) for each in between):
            return False
        if common == home:
            return True
        return common not in self._walked[1] and not (between and self._is_called_after_another(between[-1], home))

    def _is_called_after_another(self, folder: Path, home: Path) -> bool:
        """Whether it is called after another benchmark's folder beside it: ``mme_images`` beside ``mme``."""
        others = {word for each in self._homes if each.parent == folder.parent for word in _words(each.name)}
        own = {word for part in home.relative_to(folder.parent).parts for word in _words(part)}
        return bool(_words(folder.name) & others - own)

    @cached_property
    def _homes(self) -> Mapping[Path, set[Path]]:
        """Whose folders those are that hold annotations, and the ones above them: the folders of benchmarks."""
        tops = {root.absolute() for root in self._roots}
        found: dict[Path, set[Path]] = defaultdict(set)
        for folder in self._walked[1]:
            home = self._home(folder)
            for each in {folder, folder.parent, home} - tops:
                found[each].add(home)
        return found

    def _home(self, folder: Path) -> Path:
        """The benchmark's folder of one that holds annotations."""
        top = self._roots[0].absolute()
        while folder != top and folder.is_relative_to(top) and _PARTS.fullmatch(folder.name.lower()):
            folder = folder.parent
        return folder

    @property
    def _shown(self) -> str:
        return " and ".join(map(str, self._roots))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a null byte
        return False


def _telling(parts: Sequence[str]) -> str:
    """The folder that a path tells its picture by, in lower case: the last that is not called ``images`` or so."""
    return next((part.lower() for part in parts[-2::-1] if part.lower() not in _ANY_FOLDER), "")


def _is_below(file: Path, folder: Path) -> bool:
    return file.absolute().is_relative_to(folder)


def _words(name: str) -> set[str]:
    return {word for word in re.split(r"[^a-z0-9]+", name.lower()) if word and word not in _ANY_FOLDER}


def _ends_alike(file: Path, path: PurePosixPath, parts: int) -> bool:
    """Whether the last folders of two paths are the same, in any case; ``parts`` counts the file."""
    return [part.lower() for part in file.parts[-parts:-1]] == [part.lower() for part in path.parts[-parts:-1]]


def _nearest(files: Sequence[Path], near: Path | None) -> Sequence[Path]:
    """Those that lie closest to a folder, as the folder of one benchmark among several."""
    if near is None or len(files) < 2:
        return files
    shared = [len(os.path.commonpath([near.absolute(), file.absolute()])) for file in files]
    return [file for file, length in zip(files, shared, strict=True) if length == max(shared)]


def _distinct(files: Sequence[Path]) -> list[Path]:
    """One of each picture: links and copies of the same bytes are one."""
    kept: list[Path] = []
    for file in dict.fromkeys(files):
        if not any(file.samefile(other) or _same_bytes(file, other) for other in kept):
            kept.append(file)
    return kept


def _same_bytes(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and one.read_bytes() == other.read_bytes()
