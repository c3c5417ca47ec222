"""What readers of caption benchmarks share: a row's picture and sentences, files that are one benchmark, items and refusals."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import PIL.Image

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import STORED
from vlm_distill_cache.data.benchmarks.documents import KEY, ODD_VALUES, Document, objects, readable
from vlm_distill_cache.data.benchmarks.items import Benchmark, CaptionItem
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.benchmarks.question_rows import file_named
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.pictures import says_none
from vlm_distill_cache.data.sources.printed import printed

Row = Mapping[str, Any]
# Where a row holds or names the one picture that it is about, in order.
_PICTURES = (
    "image images image_options img filename file_name image_file image_file_name image_filename image_path image_paths "
    "image_name 0.webp jpg png"
)
PICTURES = tuple(_PICTURES.split())
COCO_PICTURES = (*PICTURES, "image_id")  # of benchmarks whose numbers are COCO's
_IDS = ("id", KEY, "key", "index", "idx", "question_id")
_PROBED = 32  # rows that tell what a document is


def probe(document: Document) -> Iterator[Row]:
    """The first rows that can be read, by which a document is told."""
    return islice(readable(document.rows), _PROBED)


def names_picture(document: Document) -> bool:
    """Whether its rows hold or name a picture."""
    return not document.columns.isdisjoint(PICTURES)


def has_coco_picture(document: Document) -> bool:
    """Whether its rows hold or name a picture, or have COCO's number of one."""
    return names_picture(document) or (
        document.has("image_id") and all(str(row.get("image_id")).isdecimal() for row in probe(document))
    )


def listed(value: Any) -> Any:
    """The texts that a cell of CSV writes out as a list, ``['red', 'open']``; other values as they stand."""
    found = printed(value) if isinstance(value, str) else None
    return found if isinstance(found, list) and all(isinstance(each, str) for each in found) else value


def names_in(row: Row) -> list[str]:
    """What a row says in at most three words that are no caption, whatever its columns are called."""
    return [
        value
        for key, value in row.items()
        if isinstance(value, str) and key not in PICTURES and "caption" not in key and 0 < len(value.split()) <= 3
    ]


def by_subset(document: Document, told: Callable[[str], str]) -> Document:
    """The rows of a file that holds all subsets by name, ``{"swap_obj": {"0": {...}}}``; other documents as they are."""
    parts = document.top if isinstance(document.top, dict) else {}
    if not parts or not all(told(name) and isinstance(part, dict | list) and part for name, part in parts.items()):
        return document
    entries = [
        (name, key, entry)
        for name, part in parts.items()
        for key, entry in (part.items() if isinstance(part, dict) else enumerate(part))
    ]
    rows = [
        {KEY: str(key), **entry, "subset": name} if isinstance(entry, dict) else entry for name, key, entry in entries
    ]
    found = objects(rows)
    return Document(document.path, document.shown, found) if found else document


def sentence(row: Row, *keys: str) -> str:
    """The text under the first of some keys that has one; a list of a single text is that text.

    Raises:
        SampleError: There is none.
    """
    for key in keys:
        value = listed(row.get(key))
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and value.strip():
            return value.strip()
    found = {key: row.get(key) for key in keys if key in row}
    raise SampleError(f"{' or '.join(map(repr, keys))} must be a sentence, got {str(found)[:80]}")


def sentences(row: Row, key: str) -> tuple[str, ...]:
    """All texts under a key: one, or a list.

    Raises:
        SampleError: There is none, or something else among them.
    """
    value = listed(row.get(key))
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not found or not all(isinstance(x, str) and x.strip() for x in found):
        raise SampleError(f"{key!r} must be sentences, got {str(value)[:80]}")
    return tuple(text.strip() for text in found)


def picture_of(
    document: Document, index: int, row: Row, pictures: Pictures, columns: Sequence[str] = PICTURES
) -> ImageSource:
    """The one picture of a row: it stands there, or is a file that the row names.

    Args:
        columns: Where it may be, in order.

    Raises:
        SampleError: There is none, there are several, or the file is not found.
    """
    for column in columns:
        value, place = row.get(column), None
        if says_none(value):
            continue
        if isinstance(value, list | tuple):
            if len(value) != 1:
                raise SampleError(f"{column!r} holds {len(value)} pictures, where one is asked about")
            value, place = value[0], 0
        if isinstance(value, int) or (column == "image_id" and str(value).isdecimal()):
            if "image_id" in columns:
                return pictures.numbered(int(str(value)), near=document.path.parent)
            value = str(value)
        name = file_named(document, value)
        if name is None:
            return document.picture(index, column, place)
        return pictures.find(name, near=document.path.parent)
    raise SampleError(f"it has no picture under {', '.join(map(repr, columns))}; its keys are {', '.join(sorted(row))}")


# From a picture as it is seen back to how it lies in its file, by EXIF's number.
_BACK = dict(enumerate((0, 3, 1, 5, 2, 6, 4), 2))


@dataclass(frozen=True)
class Crop:
    """A part of a picture, in the file's own pixels, as ARO cuts it; one that has the part's size already is the part.

    What reaches out of the picture is black there.

    Attributes:
        source: The whole picture.
        box: Left, top, width and height, pixels; width and height positive.
    """

    source: ImageSource
    box: tuple[float, float, float, float]

    @property
    def name(self) -> str:
        """What errors call it."""
        return self.source.name

    def load(self) -> PIL.Image.Image:
        """Decode and cut; `SampleError` where the part and the picture have no pixel in common."""
        image = self.source.load()
        left, top, right, bottom = (
            round(value) for value in (*self.box[:2], self.box[0] + self.box[2], self.box[1] + self.box[3])
        )
        if image.size == (right - left, bottom - top):
            return image
        back = _BACK.get(image.info.get(STORED, 1))
        if back is not None:
            image = image.transpose(PIL.Image.Transpose(back))
        if max(left, 0) >= min(right, image.width) or max(top, 0) >= min(bottom, image.height):
            raise SampleError(
                f"image {self.name} has {image.width} x {image.height} pixels, but the part of it that is asked about is "
                f"{right - left} x {bottom - top} at {left}, {top}; put the picture there in its original size"
            )
        return image.crop((left, top, right, bottom))


def path_parts(document: Document) -> Iterator[str]:
    """The names of a document's file and folders as words joined by ``_``, the file first."""
    for part in reversed(PurePosixPath(document.shown.replace("\\", "/")).parts):
        stem = re.sub(r"\.(json|jsonl|ndjson|csv|tsv|parquet)$", "", part.lower())
        yield re.sub(r"[^a-z0-9]+", "_", stem).strip("_")


def kind_in_path(document: Document, told: Callable[[str], str]) -> str:
    """The subset that a file or one of its folders is named after; ``told`` gives it for a name, or nothing."""
    return next(filter(None, map(told, path_parts(document))), "")


Make = Callable[[Document, int, Row], CaptionItem | None]  # without id and kind; None: not asked, by its own rules


@dataclass
class Gathered:
    """Items of one benchmark, and those that cannot be asked."""

    items: list[CaptionItem] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    passed_over: int = 0  # rows that a benchmark does not ask by its own rules


def gather(documents: Sequence[Document], make: Make, kind_of: Callable[[Document, Row], str]) -> Gathered:
    """Make the items of all rows; one that cannot be made is left out under its id, with the reason."""
    found = Gathered()
    taken: set[str] = set()
    for document in documents:
        rows = document.rows
        for index in range(len(rows)):
            name = str(index)
            try:
                row = rows[index]
                own = next((str(row[key]) for key in _IDS if not says_none(row.get(key))), name)
                kind = kind_of(document, row)
                name = f"{kind}/{own}" if kind else own
                item = make(document, index, row)
            except (SampleError, *ODD_VALUES) as error:
                found.left_out[_unused(name, taken)] = f"{document.shown}, row {index + 1}: {error}"
                continue
            if item is None:
                found.passed_over += 1
                continue
            if same := _right_and_wrong_alike(item):
                found.left_out[_unused(name, taken)] = (
                    f"{document.shown}, row {index + 1}: {same[:60]!r} is a right caption and a wrong one, so that none can win"
                )
                continue
            found.items.append(replace(item, item_id=_unused(name, taken), kind=kind))
    return found


def _right_and_wrong_alike(item: CaptionItem) -> str:
    """A caption that stands among the right and among the wrong ones of a picture; nothing if there is none."""
    for fits in item.fits:
        right = {caption for caption, fit in zip(item.captions, fits, strict=True) if fit}
        wrong = {caption for caption, fit in zip(item.captions, fits, strict=True) if not fit}
        if both := right & wrong:
            return min(both)
    return ""


def _unused(name: str, taken: set[str]) -> str:
    free, number = name, 2
    while free in taken:
        free, number = f"{name}#{number}", number + 1
    taken.add(free)
    return free


def benchmarks_of(
    name: str, documents: Sequence[Document], subset: Callable[[Document], str]
) -> Iterator[tuple[str, list[Document]]]:
    """Which files are subsets of one benchmark, and what it is called.

    Those of one folder are, and those of further folders that hold other subsets. Files of the same subset are several
    benchmarks (two editions of the data, two forms of it), which are never mixed.
    """
    parts: dict[tuple[str, int], list[tuple[str, Document]]] = defaultdict(list)  # by folder and edition in it
    for document in documents:
        folder, kind = str(PurePosixPath(document.shown).parent), subset(document)
        edition = 0
        while any(kind == other or "" in (kind, other) for other, _ in parts[folder, edition]):
            edition += 1
        parts[folder, edition].append((kind, document))
    merged: list[tuple[set[str], list[Document]]] = []
    for members in parts.values():
        kinds = {kind for kind, _ in members}
        home = next((held for held in merged if held[0].isdisjoint(kinds) and "" not in kinds | held[0]), None)
        if home is None:
            merged.append((kinds, [document for _, document in members]))
        else:
            home[0].update(kinds)
            home[1].extend(document for _, document in members)
    for _, group in merged:
        yield (name if len(merged) == 1 else _after(name, group)), group


def _after(name: str, documents: Sequence[Document]) -> str:
    """A name that tells an edition from others: by its folder, or its file if it is a single one."""
    path = PurePosixPath(documents[0].shown)
    own = path.stem if len(documents) == 1 and len(path.parts) == 1 else path.parent.name
    return f"{name}-{re.sub(r'[^A-Za-z0-9_.]+', '-', own).strip('-') or 'other'}"


def benchmark(
    name: str,
    *,
    layout: str,
    title: str,
    metric: str,
    found: Gathered,
    documents: Sequence[Document],
    notes: Sequence[str] = (),
) -> Benchmark:
    """The benchmark of some documents."""
    return Benchmark(
        name=name,
        layout=layout,
        title=title,
        items=found.items,
        metric=metric,
        left_out=found.left_out,
        notes=tuple(notes),
        files=[document.shown for document in documents],
    )
