"""Pictures that annotations name: found below the folder, wherever its owner unpacked them.

Annotations write ``000000391895.jpg``, ``val2014/COCO_val2014_000000391895.jpg`` or the number 391895, and owners unpack
archives under any folder. A name that several different files have is not guessed, and a name that another picture has in
each benchmark (``139.jpg``) is looked for in its benchmark's own folder.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import ImageSource

_SHORT_NUMBER = re.compile(r"[\d_-]{1,5}")  # 0001.png is another picture in each folder, but for folders of these names
_COCO = re.compile(r"(?:coco_\w+_)?(\d{12})", re.IGNORECASE)
_COCO_SPLITS = ("val2014", "train2014", "test2015", "test2014")
# Names that many benchmarks have: numbers (Visual Genome's, or COCO's without zeros), image_3, test-17, a.
_COMMON = re.compile(r"((image|img|picture|pic|photo|sample|train|val|test)[_-]?)?[\d_-]{1,7}|\w{1,2}", re.IGNORECASE)
_ANY_FOLDER = frozenset("images image img imgs pictures data".split())  # noqa: SIM905
# Folders of a benchmark that are not called after it; and those of pictures that several benchmarks share.
_PARTS = re.compile(
    r"(data|dataset|annotations?|anns?|jsons?|questions?|labels?|splits?|test|val|validation|train)[\d._-]*"
)
_SHARED = re.compile(
    r"(images?|imgs?|pictures?|pics?|photos?|data|(ms)?coco|vg|visual_?genome|gqa|flickr|train|val|test)[\d_k-]*\w{0,8}"
)
_ANNOTATIONS = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
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
        self._annotated: set[Path] = set()  # folders with annotations, known once the roots were walked
        self._own: dict[tuple[Path, Path | None], bool] = {}

    @cached_property
    def _by_name(self) -> Mapping[str, Sequence[Path]]:
        """All picture files by their last part in lower case, and by that without its ending; SEED-Bench's have none."""
        found: dict[str, list[Path]] = defaultdict(list)
        seen: set[str] = set()  # links may lead back
        for root in self._roots:
            for folder, folders, files in os.walk(root, followlinks=True):
                real = os.path.realpath(folder)
                if real in seen:
                    folders.clear()
                    continue
                seen.add(real)
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                if any(file.lower().endswith(_ANNOTATIONS) for file in files):
                    self._annotated.add(Path(folder).absolute())
                for file in sorted(files):
                    path = Path(folder, file)
                    if path.suffix.lower() in ENDINGS:
                        found[file.lower()].append(path)
                        found[path.stem.lower()].append(path)
                    elif "." not in file:
                        found[file.lower()].append(path)
        return found

    def find(self, name: str, *, near: Path | None = None, hints: Iterable[str] = ()) -> ImageSource:
        """The picture that annotations call ``name``: a path, a file's name, or one without its ending.

        Args:
            near: Folder of the annotations, where a path is looked for first; of files of one name, those that share the
                longest way down with it are meant.
            hints: Parts of paths (``val2014``) that decide between files of one name.

        Raises:
            SampleError: It is not there, or several files of that name are not the same picture.
        """
        path = PurePosixPath(name.replace("\\", "/").strip())
        if not path.name or path.is_absolute() or ".." in path.parts:
            path = PurePosixPath(*[part for part in path.parts if part not in ("/", "..")])
        for root in (*([near] if near else []), *self._roots):
            if path.name and _is_file(root / path):
                return ImageFile(root / path, shown=name)
        found: Sequence[Path] = self._by_name.get(path.name.lower(), ())
        longest: list[Path] = []
        telling = [place for place, part in enumerate(path.parts[-2::-1], 1) if part.lower() not in _ANY_FOLDER]
        if _COMMON.fullmatch(path.stem):
            told = [file for file in found if telling and _ends_alike(file, path, telling[0] + 1)]
            own = told or [file for file in found if self._is_own(file.parent, near)]
            if found and not own:
                raise SampleError(
                    f"no picture {name!r} in the benchmark's own folder ({found[0]} may be of another one: many have such a "
                    "name); put the pictures beside the annotations, or name their folder with --images"
                )
            found = own
        fewest = telling[0] if telling and _SHORT_NUMBER.fullmatch(path.stem) else 0
        for parts in range(len(path.parts), fewest, -1):  # the longest end of the path that any file has
            longest = [file for file in found if _ends_alike(file, path, parts)]
            if longest:
                break
        hinted = [file for file in longest if any(hint.lower() in str(file).lower() for hint in hints)]
        chosen = _distinct(_nearest(hinted or longest, near))
        if len(chosen) == 1:
            return ImageFile(chosen[0], shown=name)
        if not chosen and (number := _COCO.fullmatch(path.stem)):
            for prefix in (
                "",
                *(f"coco_{split}_" for split in _COCO_SPLITS),
            ):  # a number is one picture in all releases
                if f"{prefix}{number[1]}" in self._by_name:
                    return self.find(f"{prefix}{number[1]}", near=near, hints=hints)
        if not chosen:
            elsewhere = f" ({found[0]} is in a folder of another name)" if found else ""
            raise SampleError(
                f"no picture {name!r} below {self._shown}{elsewhere}; put the pictures there, or name their folder with "
                "--images"
            )
        raise SampleError(
            f"{len(chosen)} different pictures are called {name!r}: {chosen[0]}, {chosen[1]}; give the folder of the right ones "
            "with --images, or keep each benchmark in a folder of its own"
        )

    def numbered(self, number: int, *, near: Path | None = None, hints: Iterable[str] = ()) -> ImageSource:
        """The picture with COCO's number: ``COCO_val2014_000000391895``, ``000000391895`` or ``391895``.

        Raises:
            SampleError: As for `find`.
        """
        hints = list(hints)
        long = f"{number:012d}"
        names = [f"coco_{hint}_{long}" for hint in hints] + [long, str(number)]
        names += [f"coco_{split}_{long}" for split in _COCO_SPLITS]
        for name in names:
            if name in self._by_name:
                return self.find(name, near=near, hints=hints)
        raise SampleError(
            f"no picture of the number {number} ({long}.jpg) below {self._shown}; put the pictures there, or name their folder "
            "with --images"
        )

    def _is_own(self, folder: Path, near: Path | None) -> bool:
        """Whether a folder is of the benchmark whose annotations are ``near``, or of shared pictures."""
        if (folder, near) not in self._own:
            self._own[folder, near] = near is None or self._looks_own(folder, near)
        return self._own[folder, near]

    def _looks_own(self, folder: Path, near: Path) -> bool:
        if any(folder.resolve().is_relative_to(root.resolve()) for root in self._roots[1:]):
            return True
        top, near, folder = self._roots[0].absolute(), near.absolute(), folder.absolute()
        home = near
        while home != top and _PARTS.fullmatch(home.name.lower()):
            home = home.parent
        common = Path(os.path.commonpath([home, folder]))
        between = [each for each in (folder, *folder.parents) if each != common and each.is_relative_to(common)]
        strange = [each for each in between if not _SHARED.fullmatch(each.name.lower())]
        if common != home:
            return not strange
        return not any(each in self._annotated and not near.is_relative_to(each) for each in strange)

    @property
    def _shown(self) -> str:
        return " and ".join(map(str, self._roots))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a null byte
        return False


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
