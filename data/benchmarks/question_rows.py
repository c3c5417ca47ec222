"""What readers of yes-or-no benchmarks share: what a row says, its picture, items and refusals, files that belong together."""

import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.benchmarks.documents import ODD_VALUES, Document, readable
from vlm_distill_cache.data.benchmarks.items import Benchmark, Item
from vlm_distill_cache.data.benchmarks.layouts import Layout
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.images.recognise import base64_picture
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.pictures import says_none

Row = Mapping[str, Any]

SHORT_ANSWER = "Answer the question using a single word or phrase."
YES_OR_NO = "Please answer yes or no."
YES_NO = frozenset(("yes", "no"))
TRUE_FALSE = frozenset(("true", "false"))
_SAID = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}
_PROBED = 32
_SCALARS = (str, int, float, bool)
_LONGEST = 4096  # characters of a published field that is kept
_LONGEST_NAME = 512


def probe(document: Document) -> list[Row]:
    """The first rows, by which a document is told."""
    return list(islice(readable(document.rows), _PROBED))


def verdict(value: Any) -> bool | None:
    """What an annotation says: yes or no, true or false, 1 or 0, in any case; None: something else."""
    return _SAID.get(_word(value))


def most(rows: Sequence[Row], is_so: Callable[[Row], bool]) -> bool:
    """Whether something is so of more than half of some rows: the others are left out one by one, and said."""
    return 2 * sum(map(is_so, rows)) > len(rows)


def says_yes_or_no(rows: Sequence[Row], key: str, words: Container[str] = _SAID) -> bool:
    """Whether most rows say yes or no under a key, in some of the words (small letters) that mean it."""
    return most(rows, lambda row: _word(row.get(key)) in words)


def _word(value: Any) -> str:
    return str(value).strip().rstrip(".").lower()


def right_of(row: Row, key: str) -> bool:
    """Whether yes is right; `SampleError` where a row says something else."""
    right = verdict(row.get(key))
    if right is None:
        raise SampleError(f"{key!r} must be yes or no, got {str(row.get(key))[:60]!r}")
    return right


def text_of(row: Row, *keys: str) -> str:
    """The text under the first of some keys that has one; `SampleError` where none has."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise SampleError(f"{' or '.join(map(repr, keys))} must be a text; the row has {', '.join(map(str, row))[:120]}")


def file_named(document: Document, value: Any) -> str | None:
    """The picture's file that a cell names; None: the cell holds the picture, or the row that does."""
    if isinstance(value, Mapping) and says_none(value.get("bytes")) and isinstance(value.get("path"), str):
        value = value["path"]
    if not isinstance(value, str) or len(value) > _LONGEST_NAME or value.startswith("data:"):
        return None
    return None if value.strip() in document.by_index or base64_picture(value) is not None else value


def picture_of(document: Document, index: int, row: Row, pictures: Pictures, columns: Sequence[str]) -> ImageSource:
    """The picture of a row, under the first of some keys that has one: it stands there, or the row names its file.

    Raises:
        SampleError: There is none, or its file is not found.
    """
    for column in columns:
        value = row.get(column)
        if not says_none(value):
            if isinstance(value, int) and not isinstance(value, bool):
                return pictures.numbered(value, near=document.path.parent)
            name = file_named(document, value)
            return document.picture(index, column) if name is None else pictures.find(name, near=document.path.parent)
    raise SampleError(f"it has no picture under {' or '.join(map(repr, columns))}")


def scalars(row: Row, *without: str) -> dict[str, Any]:
    """What a row says in texts and numbers, for metrics and the files that outside scorers read."""
    return {
        key: value
        for key, value in row.items()
        if key not in without and (value is None or (isinstance(value, _SCALARS) and len(str(value)) <= _LONGEST))
    }


@dataclass
class Gathered:
    """The items of one benchmark, and why others cannot be asked; a second item of an id is numbered.

    ``times`` is how often each id was there.
    """

    items: list[Item] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def take(self, item_id: str, where: str, make: Callable[[str], Item]) -> None:
        """Make an item, or keep why it cannot be made."""
        self.times[item_id] += 1
        free = item_id if self.times[item_id] == 1 else f"{item_id}#{self.times[item_id]}"
        try:
            self.items.append(make(free))
        except (SampleError, *ODD_VALUES) as error:
            self.left_out[free] = f"{where}: {error}"

    def rows(self, document: Document) -> Iterator[tuple[int, Row, str]]:
        """Each row of a document, its place, and what errors call it; one that cannot be read is left out."""
        for index in range(len(document.rows)):
            where = f"{document.shown}, row {index + 1}"
            try:
                row = document.rows[index]
            except SampleError as error:  # says which row
                self.left_out[where] = f"{document.shown}: {error}"
                continue
            if "line" in row and "file" in row:
                where = f"{PurePosixPath(document.shown).parent / row['file']}, line {row['line']}"
            yield index, row, where

    def benchmark(
        self, name: str, layout: Layout, metric: str, documents: Sequence[Document], **more: Any
    ) -> Benchmark:
        """All of it; `DataError` where the documents have no row."""
        if not self.items and not self.left_out:
            raise DataError(f"{documents[0].shown} holds no question")
        files = [document.shown for document in documents]
        return Benchmark(
            name=name,
            layout=layout.name,
            title=layout.title,
            items=self.items,
            metric=metric,
            left_out=self.left_out,
            files=files,
            **more,
        )


def plain_path(document: Document) -> str:
    """Where a document lies, in small letters, without the ending and the number of a table's part."""
    path = PurePosixPath(document.shown.lower())
    return re.sub(r"-\d{4,5}-of-\d{4,5}.*$", "", str(path if document.path.is_dir() else path.with_suffix("")))


def editions(
    name: str, documents: Sequence[Document], subset: Callable[[Document], str], *, drop: re.Pattern[str] | None = None
) -> Iterator[tuple[str, list[Document]]]:
    """Which documents are one benchmark, and what each benchmark is called.

    Documents whose paths differ in the name of their subset alone belong together; two of the same subset never do: they are
    two forms, or two editions, of the data.

    Args:
        subset: Which subset a document is; empty: it tells none, or has all.
        drop: What names a subset in a path.
    """
    groups: dict[tuple[str, int], list[Document]] = defaultdict(list)
    taken: dict[tuple[str, str], int] = defaultdict(int)
    for document in documents:
        key = plain_path(document)
        key = drop.sub("", key) if drop else key
        number = taken[key, subset(document)]
        taken[key, subset(document)] += 1
        groups[key, number].append(document)
    for (key, _), group in groups.items():
        label = edition(key, name)
        yield (name if len(groups) == 1 or not label else f"{name}-{label}"), group


def edition(path: str, name: str) -> str:
    """What tells a file from others of one benchmark: the words of its name without the benchmark's, else its folder's."""
    for part in (PurePosixPath(path).name, PurePosixPath(path).parent.name):
        words = [word for word in re.split(r"[^a-z0-9]+", part.lower()) if word and word not in name.split("-")]
        if words:
            return "-".join(words)
    return ""


def id_of(row: Row, otherwise: Any) -> Any:
    """The published id of a question, with its type."""
    return next((row[key] for key in ("question_id", "id", "index") if not says_none(row.get(key))), otherwise)
