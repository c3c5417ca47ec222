"""What readers of open questions share: rows, answers in all their forms, pictures, splits, and the benchmark they make."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.benchmarks.documents import KEY, ODD_VALUES, Document, readable
from vlm_distill_cache.data.benchmarks.items import Benchmark, OpenItem
from vlm_distill_cache.data.benchmarks.pictures import Pictures
from vlm_distill_cache.data.images.recognise import base64_picture
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.pictures import says_none
from vlm_distill_cache.data.sources.printed import printed

TEN = 10  # people who answered each question of the VQA challenge, and of those that took its form
IN_A_WORD = "Answer the question using a single word or phrase."
SECRET = "its answers are kept secret: nothing is scored, and submission/ holds what the authors' server takes, if its ids are told"
NO_ANSWERS = (
    "its files hold no answers, so that nothing is scored; splits for training and validation are published with theirs"
)
_KEPT_SECRET = re.compile(r"(?<![a-z])(test|challenge|submission)")
_CANONICAL = re.compile(r"0|[1-9]\d{0,17}")
_SPLIT = re.compile(
    r"(?<![a-z])(train|validation|val|testdev|test-dev|test_dev|test|dev|challenge|submission)(20\d\d)?(?![a-z])"
)
_SHORT = {"validation": "val", "test-dev": "testdev", "test_dev": "testdev"}


@dataclass(frozen=True)
class Entries:
    """The entries of a document, the list under ``data`` where it has one, with the keys of the first, empty or not."""

    document: Document
    rows: Sequence[Mapping[str, Any]]
    keys: frozenset[str]

    @property
    def first(self) -> Mapping[str, Any]:
        """The first entry, or none."""
        return next(readable(self.rows), {})

    def has(self, *keys: str) -> bool:
        """Whether the first entry has all of these keys, even without values."""
        return self.keys.issuperset(keys)

    def has_any(self, *keys: str) -> bool:
        """Whether the first entry has one of these keys."""
        return not self.keys.isdisjoint(keys)

    def each(self, left_out: dict[str, str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
        """The place of each row and the row; what cannot be read is said in ``left_out``."""
        for index in range(len(self.rows)):
            try:
                row = self.rows[index]
            except SampleError as error:
                left_out[f"row {index + 1}"] = str(error)
            else:
                yield index, row


def entries_of(document: Document, under: str = "data") -> Entries:
    """The entries under a key of the JSON, or else the document's rows."""
    rows = document.rows
    if isinstance(document.top, dict) and isinstance(found := document.top.get(under), list):
        rows = [entry if isinstance(entry, dict) else {} for entry in found]
    return Entries(document, rows, frozenset(next(readable(rows), ())))


def top_text(document: Document, *path: str) -> str:
    """A text in the head of a JSON; empty if there is none."""
    value = document.top
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""


def split_of(document: Document, *said: str) -> str:
    """Which split a document is, by what it says, or else by the names of its file and folders: ``val2014``, ``testdev``."""
    path = PurePosixPath(document.shown.lower())
    for name in (*said, path.stem, *(folder.name for folder in path.parents)):
        if found := _SPLIT.search(name.lower()):
            return _SHORT.get(found[1], found[1]) + (found[2] or "")
    return ""


def answers_of(value: Any, *, listed: bool = False) -> tuple[str, ...]:
    """Right answers, however they are listed: texts, objects with ``answer``, an object of lists; blank ones are secret.

    Args:
        listed: A text may be a list that a table of texts holds (``['a', 'b']``).

    Raises:
        SampleError: Such a list cannot be read.
    """
    if isinstance(value, str):
        found = printed(value, where="its answer") if listed else None
        value = [value] if found is None else found
    if isinstance(value, Mapping):
        value = value.get("answer", ())
        value = [value] if isinstance(value, str) else value
    if says_none(value):
        return ()
    if not isinstance(value, Sequence):
        value = [value]
    texts = [entry.get("answer") if isinstance(entry, Mapping) else entry for entry in value]
    answers = tuple(str(text) for text in texts if text is not None)
    return answers if any(answer.strip() for answer in answers) else ()


def is_table_of_texts(document: Document) -> bool:
    """Whether all values are texts, lists among them."""
    return document.path.suffix.lower() in (".csv", ".tsv")


@dataclass(frozen=True)
class Found:
    """Items as they are read, those that cannot be asked, and what a reader of scores must know.

    ``people`` is how many were asked for the answer to each question: ten where VQA accuracy counts them, else 1.
    """

    pictures: Pictures
    people: int = 1
    items: list[OpenItem] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def add(self, item_id: Any, question: Any, said: Any, find: Any, *, listed: bool = False, **more: Any) -> None:
        """Keep an item, or say why it cannot be asked.

        Args:
            item_id: The published id, which ``extra["question_id"]`` keeps if it is a number; a number is added to one that
                another item has.
            question: Left out where there is none.
            said: All answers that are right, as `answers_of` reads them; none: kept secret.
            find: Gives the picture, or raises `SampleError`.
            listed: As for `answers_of`.
            **more: Further fields of the item.
        """
        name, number = str(item_id), 2
        while name in self._seen:
            name, number = f"{item_id}.{number}", number + 1
        self._seen.add(name)
        if not isinstance(question, str) or not question.strip():
            self.left_out[name] = f"it has no question: {question!r}"[:200]
            return
        try:
            answers = answers_of(said, listed=listed)
            image = find()
        except (SampleError, *ODD_VALUES) as error:
            self.left_out[name] = str(error)
            return
        if len(answers) == 1 < self.people:
            why = f"it has one answer, and is scored by those of {self.people} people: {answers[0]!r}"
            self.left_out[name] = why[:200]
            return
        extra = dict(more.pop("extra", {}))
        if isinstance(item_id, int):
            extra["question_id"] = item_id
        asked = question.strip()
        self.items.append(
            OpenItem(item_id=name, image=image, question=asked, answers=tuple(answers), extra=extra, **more)
        )

    def benchmark(
        self, *, documents: Iterable[Document], notes: Iterable[str] = (), name: str, **more: Any
    ) -> Benchmark:
        """The benchmark of these items."""
        said = list(notes)
        if self.items and not any(item.answers for item in self.items):
            said.append(SECRET if _KEPT_SECRET.search(name) else NO_ANSWERS)
        if few := sum(0 < len(item.answers) < self.people for item in self.items):
            said.append(
                f"{few} of {len(self.items)} questions have fewer than {self.people} answers; VQA accuracy leaves one out at a "
                "time, so that fewer than four that agree are not worth 100"
            )
        files = [document.shown for document in documents]
        return Benchmark(name=name, items=self.items, left_out=self.left_out, notes=said, files=files, **more)


def picture_in(
    entries: Entries,
    index: int,
    pictures: Pictures,
    *,
    column: str = "image",
    named: Iterable[str] = (),
    hints: Iterable[str] = (),
) -> ImageSource:
    """The picture of an entry: in the row, or the file that the row or one of ``named`` calls it.

    Raises:
        SampleError: It is not there; says what was looked for.
    """
    document = entries.document
    value = entries.rows[index].get(column)
    if isinstance(value, Mapping) and says_none(value.get("bytes")) and isinstance(value.get("path"), str):
        value = value["path"]
    place = None
    if isinstance(value, list | tuple) and len(value):  # a list of one picture, as VLMEvalKit's tables may have it
        if len(value) > 1:
            raise SampleError(
                f"row {index + 1} of {document.shown} has {len(value)} pictures under {column!r}; expected one"
            )
        value, place = value[0], 0
    if not says_none(value):
        if not isinstance(value, str) or base64_picture(value) is not None:
            return document.picture(index, column, place)
        if value in document.by_index:  # the row that has it
            return document.picture(index, column)
        return pictures.find(value, near=document.path.parent, hints=hints)
    names = [name for name in (str(entries.rows[index].get("image_path") or ""), *named) if name]
    for name in names[:-1]:
        try:
            return pictures.find(name, near=document.path.parent, hints=hints)
        except SampleError:
            continue
    if not names:
        raise SampleError(f"row {index + 1} of {document.shown} has no picture: {column!r} is empty")
    return pictures.find(names[-1], near=document.path.parent, hints=hints)


def number_of(value: Any) -> int | None:
    """COCO's number of a picture, written as a number or as its digits."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else None


def named(benchmark: str, split: str) -> str:
    """``vqav2-val2014``; the benchmark alone where no split is told."""
    return f"{benchmark}-{split}" if split else benchmark


def row_id(row: Mapping[str, Any], *keys: str, default: Any) -> Any:
    """The first of these keys that has a value; the key of the object that the entry stood in; else the default.

    A published id that is a number is one, also where its table has texts; `int` for no other, so that no place in a table
    (VLMEvalKit's ``index``) is sent to a server as an id.
    """
    key = next((key for key in (*keys, KEY) if not says_none(row.get(key))), None)
    value = default if key is None else row[key]
    if key in (None, "index"):
        return str(value)
    return int(value) if isinstance(value, str) and _CANONICAL.fullmatch(value) else value
