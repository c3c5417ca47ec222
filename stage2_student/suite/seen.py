"""Which pictures were shown, so that answers about others of the same name are not taken for answers about these.

Files whose size and times are as they were are the same; others are read, and their pixels compared, so that a copied
folder is not asked again.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import STORED
from vlm_distill_cache.data.benchmarks.documents import RowPicture
from vlm_distill_cache.data.benchmarks.items import CaptionItem, Item
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import ImageSource


class Watched:
    """A picture that remembers what it showed.

    Attributes:
        state: Of its files before they were read.
        shown: Hash of its pixels; empty as long as it was not read.
    """

    def __init__(self, source: ImageSource) -> None:
        self.name = source.name
        self.state = _state(source)
        self.shown = ""
        self._source = source

    def load(self) -> PIL.Image.Image:
        """The picture; raises what its source does."""
        image = self._source.load()
        self.shown = self.shown or _pixels(image)
        return image


def pictures_of(item: Item) -> tuple[ImageSource, ...]:
    """The pictures of an item, in order."""
    if isinstance(item, CaptionItem):
        return item.images
    image = getattr(item, "image", None)
    return () if image is None else (image,)


def watched(items: Sequence[Item]) -> list[Item]:
    """The same items with pictures that are `Watched`; one that several items share stays one."""
    known: dict[int, Watched] = {}

    def watch(source: ImageSource) -> ImageSource:
        return known.setdefault(id(source), Watched(source))

    found: list[Item] = []
    for item in items:
        pictures = tuple(map(watch, pictures_of(item)))
        if isinstance(item, CaptionItem):
            found.append(replace(item, images=pictures))
        else:
            found.append(replace(cast("Any", item), image=pictures[0]) if pictures else item)
    return found


def seen(item: Item) -> list[list[str]]:
    """What is kept of each picture of a watched item."""
    return [[picture.state, picture.shown] for picture in cast("tuple[Watched, ...]", pictures_of(item))]


def seen_again(kept: Any, item: Item) -> list[list[str]] | None:
    """What is to be kept of each picture now; None where another one would be shown, or could be where none was."""
    pictures = pictures_of(item)
    if not isinstance(kept, list) or len(kept) != len(pictures):
        return None
    found = []
    for entry, source in zip(kept, pictures, strict=True):
        state = _state(source)
        if not isinstance(entry, list) or len(entry) != 2:
            return None
        if entry[0] != state:
            try:
                if not entry[1] or _pixels(source.load()) != entry[1]:
                    return None
            except (SampleError, OSError, ValueError, ArithmeticError, IndexError):
                return None
        found.append([state, entry[1]])
    return found


def _pixels(image: PIL.Image.Image) -> str:
    head = f"{image.mode} {image.size} {image.info.get(STORED, 1)} "
    return hashlib.sha256(head.encode() + image.tobytes()).hexdigest()[:16]


def _state(source: Any) -> str:
    """Sizes and times of the files that hold a picture; the time of change (ctime) tells also what a copy keeps."""
    found = []
    for path in _files(source):
        try:
            stat = path.stat()
            found.append(f"{stat.st_size}.{stat.st_mtime_ns}.{stat.st_ctime_ns}")
        except (OSError, ValueError):
            found.append("none")
    return "+".join(found)


def _files(source: Any) -> Iterator[Path]:
    if isinstance(source, ImageFile):
        yield source.path
    elif isinstance(source, RowPicture):
        yield from source.document.files
    else:  # made of others
        for part in vars(source).values():
            if hasattr(part, "load"):
                yield from _files(part)
