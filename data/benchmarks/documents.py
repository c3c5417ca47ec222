"""Files of a folder as rows: JSON, JSON lines, CSV or TSV, parquet, `datasets` folders, MME's texts of a question a line.

A layout asks a document for its columns, and for the JSON as it stands; pictures that a table stores stay in it until they
are asked about.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import PIL.Image

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.data.sources.csv_rows import CsvRows
from vlm_distill_cache.data.sources.hf import ArrowTable, is_saved_dataset
from vlm_distill_cache.data.sources.json_text import decode, parse
from vlm_distill_cache.data.sources.parquet import LocalParquet, ParquetTable
from vlm_distill_cache.data.sources.parquet_rows import StoredPicture
from vlm_distill_cache.data.sources.pictures import open_picture, says_none
from vlm_distill_cache.data.sources.table import by_name

OWN_STAMP = "distill-suite.json"  # of a folder of results, which are no benchmarks
KEY = "__key__"  # of rows that were a dict by id: the id
# What an entry raises that has the keys of a layout, and other things under them: a number for a text, a text for a list.
ODD_VALUES = (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError)
_PROBED = 32  # rows whose keys are the columns
# Parts of one table: as `datasets` writes them, with a hash before 2023; and in the hub's branch refs/convert/parquet.
_PART = re.compile(
    r"(?P<name>.+)-(?P<at>\d{4,5})-of-(?P<of>\d{4,5})(?P<hash>-[0-9a-f]{16})?(?=\.parquet$)|(?P<bare>\d{4})(?=\.parquet$)"
)
_DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")  # of `datasets`
_YES_OR_NO = re.compile(
    r"(?:\t\s*|[?.] +)(?:yes|no)\s*(?:\t|$)", re.IGNORECASE | re.MULTILINE
)  # blanks: refused in words
_LONE = re.compile(r"\\(?:u[dD][89abAB]\w\w\\u[dD][c-fC-F]\w\w|(u[dD][89a-fA-F]\w\w)|.)")  # group 1, among all escapes
_LONGEST_LINE = 4096
LONGEST_INDEX = 64
ENDINGS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_PACKED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")  # said, as nothing in them is read


@dataclass(frozen=True, eq=False)
class Document:
    """A file, or the files of a table, of a folder of benchmarks.

    Attributes:
        path: The file; of a table of several the first one, of a `datasets` folder the folder.
        shown: What errors call it: the path relative to the folder that was searched.
        top: The JSON as it stands; None of what is no JSON.
        rows: Its entries in order, read when they are asked for: a list of objects, the values of an object of objects
            (their key under `KEY`), one object with texts and no lists of objects, lines, rows of a table. Empty for other
            JSON.
        split: Of a table, where its folder or file names one.
        missing: Which numbered parts of a table are not there, in words.

    Rows of texts have ``file`` and ``line``, and of lines of two to four cells ``image`` (a name, or the file's without its
    ending), ``question``, ``answer`` and ``prediction``; of others their ``text``.
    """

    path: Path
    shown: str
    rows: Sequence[Mapping[str, Any]]
    top: Any = None
    split: str | None = None
    missing: str = ""

    @cached_property
    def files(self) -> Sequence[Path]:
        """The files that it was opened from: all parts of a table."""
        if isinstance(self.rows, _TableRows) and self.rows.files:
            return self.rows.files
        return [self.path]

    @cached_property
    def columns(self) -> frozenset[str]:
        """Keys of the first rows, without those that hold nothing in any of them."""
        found: set[str] = set()
        for row in islice(readable(self.rows), _PROBED):
            found |= {str(key) for key, value in row.items() if value is not None}
        return frozenset(found)

    def has(self, *names: str) -> bool:
        """Whether the first rows have all of these keys."""
        return self.columns.issuperset(names)

    @cached_property
    def by_index(self) -> Mapping[str, int]:
        """The place of each row by its ``index``, of CSV and TSV tables; empty for others."""
        if self.path.suffix.lower() not in (".csv", ".tsv") or not self.has("index"):
            return {}
        found = {}
        for place in range(len(self.rows)):
            with suppress(SampleError):
                found[str(self.rows[place].get("index")).removesuffix(".0")] = place  # pandas wrote a float
        return found

    def named(self, row: Mapping[str, Any], column: str) -> Any:
        """A row's value, by its name where a table of `datasets` has names for numbers; `SampleError` if it has none for it."""
        value = row.get(column)
        try:
            return by_name(value, getattr(getattr(self.rows, "table", None), "features", {}).get(column))
        except ValueError as error:
            raise SampleError(f"{column!r} holds {str(value)[:60]}, which has no name: {error}") from error

    def picture(self, index: int, column: str, place: int | None = None) -> ImageSource:
        """A picture that stands in a row itself (bytes, base64, a table's); read again when it is asked about.

        Args:
            index: Of the row.
            column: Its key.
            place: In a list of pictures; None: the value is the picture.
        """
        return RowPicture(self, index, column, place)


def writable(name: object) -> str:
    """A name as JSON can hold it: bytes that are no UTF-8 are spelt out."""
    return str(name).encode(errors="backslashreplace").decode()


def readable(rows: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """The rows in order, without those that cannot be read."""
    for index in range(len(rows)):
        with suppress(SampleError):
            yield rows[index]


@dataclass(frozen=True, eq=False)
class RowPicture:
    """A picture in a row, which is not held."""

    document: Document
    index: int
    column: str
    place: int | None = None

    @property
    def name(self) -> str:
        """What errors call it."""
        return f"{self.column!r} of row {self.index + 1} of {self.document.shown}"

    def load(self) -> PIL.Image.Image:
        """Read the row and decode the picture to RGB; `SampleError` if that cannot be done."""
        value = self.document.rows[self.index].get(self.column)
        if (
            isinstance(value, str) and len(value) <= LONGEST_INDEX
        ):  # VLMEvalKit's tables name the row that has the picture
            row = self.document.by_index.get(value.strip(), self.index)
            value = self.document.rows[row].get(self.column)
        if self.place is not None and isinstance(value, Sequence) and not isinstance(value, str | bytes):
            value = value[self.place] if self.place < len(value) else None
        if says_none(value):
            raise SampleError(f"{self.name} is empty")
        if isinstance(value, StoredPicture):
            return replace(value, name=self.name).load()
        return open_picture(value, self.document.path.parent, where=f"image {self.name}").load()


class _TableRows(Sequence[Mapping[str, Any]]):
    """The rows of a table of parquet or Arrow files."""

    def __init__(self, table: Any, files: Sequence[Path] = ()) -> None:
        self.table, self.files = table, files

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        try:
            return self.table.row(index)
        except (ValueError, TypeError, OverflowError) as error:
            raise SampleError(f"row {index + 1} cannot be read: {error}") from error


class _CsvTable:
    def __init__(self, path: Path) -> None:
        self._rows = CsvRows(path)
        for _ in self._rows.scan(None):
            pass
        self.row = self._rows.read

    def __len__(self) -> int:
        return len(self._rows)


def open_document(paths: Sequence[Path], shown: str) -> Document:
    """Open one file of a known ending, the parquet files of one table, or a folder of ``save_to_disk``.

    Raises:
        DataError: It cannot be read, or is of another kind.
    """
    path = paths[0]
    ending = path.suffix.lower()
    if ending in _PACKED:
        raise DataError(f"{shown} is packed; unpack it, unless that was done (unzip, tar -xf, gunzip)")
    try:
        if path.is_dir():
            return Document(path, shown, _TableRows(_arrow(path), sorted(path.glob("*.arrow"))))
        if ending == ".parquet":
            table = ParquetTable([LocalParquet(each) for each in paths])
            return Document(path, shown, _TableRows(table, paths), missing=_missing(paths))
        if ending in (".csv", ".tsv"):
            return Document(path, shown, _TableRows(_CsvTable(path)))
        if ending == ".txt":
            return Document(path, shown, [row for each in paths for row in _text_rows(each, shown)])
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}") from error
    text = _LONE.sub(_spelt_out, decode(data, where=shown).removeprefix("\ufeff"))
    if ending != ".json" or _is_lines(text):
        return Document(path, shown, _lines(text, shown))
    top = parse(text, where=shown)
    return Document(path, shown, _rows_of(top), top=top)


def _spelt_out(escape: re.Match[str]) -> str:
    """Half a character (a lone surrogate), which no file can hold, as the text that it is written as."""
    return f"\\\\{escape[1]}" if escape[1] else escape[0]


def _is_lines(text: str) -> bool:
    """Whether what is called JSON has an object a line."""
    first, _, rest = text.lstrip().partition("\n")
    return first.rstrip().startswith("{") and first.rstrip().endswith("}") and rest.lstrip().startswith("{")


def _lines(text: str, shown: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = parse(line, where=f"{shown}, line {number}")
            if not isinstance(row, dict):
                raise DataError(f"{shown}, line {number}: expected an object, got {type(row).__name__}")
            rows.append(row)
    return rows


def _text_rows(path: Path, shown: str) -> Iterator[Mapping[str, Any]]:
    text = decode(path.read_bytes(), where=f"{shown} (in {path.name})").removeprefix("\ufeff")
    for number, line in enumerate(text.splitlines(), 1):
        cells = [cell.strip() for cell in line.split("\t")]
        names = ("question", "answer") if len(cells) == 2 else ("image", "question", "answer", "prediction")
        row = dict(zip(names, cells, strict=False)) if 2 <= len(cells) <= 4 else {"text": line}
        if line.strip():
            yield {"file": path.name, "line": number, "image": path.stem, **row}


def _asks_yes_or_no(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return bool(_YES_OR_NO.search(file.read(_LONGEST_LINE).decode("utf-8", errors="replace")))
    except OSError:
        return False


def _rows_of(top: Any) -> Sequence[Mapping[str, Any]]:
    if isinstance(top, list):
        return objects(top)
    # Beside a list of objects, objects describe what it is about: ``info``, ``license``, ``questions``.
    if isinstance(top, dict) and not any(
        isinstance(value, list) and any(isinstance(each, dict) for each in value) for value in top.values()
    ):
        rows = objects([{KEY: key, **row} if isinstance(row, dict) else row for key, row in top.items()])
        if rows:
            return rows
    return [top] if _is_row(top) else ()


def _is_row(top: Any) -> bool:
    """Whether JSON is one row: a file of lines that has one."""
    if not isinstance(top, dict) or not any(isinstance(value, str) for value in top.values()):
        return False
    return not any(isinstance(value, list) and value and isinstance(value[0], dict) for value in top.values())


def objects(entries: Sequence[Any]) -> Sequence[Mapping[str, Any]]:
    """Entries as rows, if most are objects: others are rows that cannot be read, so that they are left out with a reason."""
    count = sum(isinstance(entry, dict) for entry in entries)
    if count == len(entries):
        return entries
    return _Objects(entries) if 4 * count >= 3 * len(entries) else ()


class _Objects(Sequence[Mapping[str, Any]]):
    """Entries of which some are no objects."""

    def __init__(self, entries: Sequence[Any]) -> None:
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: Any) -> Any:
        found = self._entries[index]
        if not isinstance(index, slice) and not isinstance(found, dict):
            raise SampleError(
                f"entry {index + 1} is {one_line(json.dumps(found), limit=60)}; an object of names is expected"
            )
        return found


def _arrow(path: Path) -> ArrowTable:
    try:
        import datasets  # an extra, slow to import
    except ImportError as error:
        raise DataError(
            f"{path} is a folder of datasets, which needs an extra: pip install 'vlm-distill-cache[hf]'"
        ) from error
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"{path} holds several splits, each of which is a folder of its own")
    return ArrowTable(loaded)


def without_part(name: str) -> str:
    """What the file of a table is called without the number of its part, and without its ending."""
    found = _PART.match(name)
    return (found["name"] or "") if found else name.rpartition(".")[0] or name


def _tables(paths: Sequence[Path]) -> Iterator[Sequence[Path]]:
    """Parts of one table together; files that are the same part twice are tables of their own."""
    tables: dict[tuple[str, ...], list[Path]] = {}
    for path in paths:
        found = _PART.match(path.name)
        key = (found["name"] or "", found["of"] or "", str(bool(found["hash"]))) if found else (path.name,)
        tables.setdefault(key, []).append(path)
    for parts in tables.values():
        alone = len({_number(path) for path in parts}) < len(parts)
        yield from [[path] for path in parts] if alone else [parts]


def _number(path: Path) -> int | None:
    found = _PART.match(path.name)
    return int(found["at"] or found["bare"]) if found else None


def _missing(parts: Sequence[Path]) -> str:
    """Which parts of a table are not there, in words."""
    there = {number for path in parts if (number := _number(path)) is not None}
    told = _PART.match(parts[0].name)
    count = int(told["of"]) if told and told["of"] else max(there, default=-1) + 1
    gone = sorted({*range(count)} - there)
    return f"{len(gone)} of the table's {count} parts are missing (number {gone[0]:05d} first)" if gone else ""


def documents_in(folder: Path) -> Iterator[Sequence[Path]]:
    """What may hold a benchmark below a folder, in order of names: files, and ``save_to_disk`` folders.

    Parquet files that are numbered parts of one table come together, and the texts of a folder if one of them has a question
    with yes or no a line. Links that lead back up are followed once, and what `distill suite` wrote is passed over.

    Raises:
        DataError: A folder cannot be listed.
    """
    yield from _documents_in(folder, frozenset())


def _documents_in(folder: Path, above: frozenset[Path]) -> Iterator[Sequence[Path]]:
    real = folder.resolve()
    if real in above or (folder / OWN_STAMP).is_file():
        return
    if is_saved_dataset(folder) and not (folder / "dataset_dict.json").exists():
        yield [folder]
        return
    try:
        inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror or error}") from error
    tables: list[Path] = []
    for path in inside:
        if path.is_dir():
            yield from _documents_in(path, above | {real})
        elif path.suffix.lower() == ".parquet":
            tables.append(path)
        elif path.suffix.lower() in (*ENDINGS, *_PACKED) and path.name not in _DESCRIPTIONS:
            yield [path]
    yield from _tables(tables)
    texts = [path for path in inside if path.suffix.lower() == ".txt" and path.is_file()]
    if any(map(_asks_yes_or_no, texts)):
        yield texts
