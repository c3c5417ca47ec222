"""CSV and TSV files: a header, then an entry a row; cells may be long, quoted and of several lines.

Ids and where rows begin are found once and kept of a large file (`kept.files`). An empty cell says nothing. A cell that
holds a list or an object, as JSON or as pandas writes it, is that list or object where a key is known to hold such.
"""

import csv
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import ImageSource, resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, are_columns
from vlm_distill_cache.data.sources.entries import ID_KEYS
from vlm_distill_cache.data.sources.json_text import decode, is_plain
from vlm_distill_cache.data.sources.kept.entries import pack_entries
from vlm_distill_cache.data.sources.kept.files import FileDataset
from vlm_distill_cache.data.sources.kept.store import Kept
from vlm_distill_cache.data.sources.pictures import image_folder
from vlm_distill_cache.data.sources.printed import printed
from vlm_distill_cache.data.sources.rows import repeated_columns

SUFFIXES = (".csv", ".tsv")
_LONGEST_CELL = 2**31 - 1  # bytes; a picture in base64 is beyond the csv module's own limit
_FILE = re.compile(r"\.[A-Za-z]\w{2,4}$")
_IDS = (*ID_KEYS, "index")
_HELD = (
    "messages conversations conversation texts images image image_paths answers choices options file_names video videos "
    "video_paths"
)
_LISTS = frozenset(_HELD.split())
_MEANT = ("answers", "choices", "options")  # a text there that begins as a list of texts is one


class CsvDataset(FileDataset):
    """A CSV or TSV file; ``images`` as for JSON. A row of another length than the header is its sample's error."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        root = image_folder(images, path)
        self._rows = CsvRows(path)
        header = self._rows.header
        if not are_columns(header, pictures=False):
            raise DataError(f"{path}: its header has none of {FORMS}; it has {header[:12]}")
        super().__init__(path, image_root=root, kind="rows", find=_find, in_parts=self._rows.is_plain)
        if not len(self):
            raise DataError(f"{path} holds no row under its header; nothing to learn from")
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``."""
        return self._rows.read_at(self._entries.offset(index))

    def find(self, value: Any, index: int, kind: str = "image") -> ImageSource:
        """As of every entry; the id of another row stands for its picture, as in MMBench, where several rows share one."""
        is_number = kind == "image" and isinstance(value, str) and value.strip().isdigit()
        if is_number and not (self.image_root / value.strip()).exists():
            place = self._places.get(value.strip())
            shared = self.read(place).get("image") if place is not None else None
            if not isinstance(shared, str) or shared.strip().isdigit():
                raise SampleError(
                    f"its image is {value!r}, which is no picture and no row with one; give the picture itself"
                )
            value = shared
        return super().find(value, index, kind)

    @cached_property
    def _places(self) -> Mapping[str, int]:
        return {name: place for place, name in enumerate(self.sample_ids)}


def _find(path: Path) -> Kept:
    """Look at all rows."""
    rows = CsvRows(path)
    named = next((rows.header.index(name) for name in _IDS if name in rows.header), None)
    ids, odd = resolve_ids(rows.scan(named), where=str(path))
    return pack_entries(ids, odd, offsets=rows.offsets, notes={})


class CsvRows:
    """The rows of a file with a header, by their offsets.

    Attributes:
        header: Names of the columns.
        offsets: Where each row begins, once it is known (`scan`).
    """

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(_LONGEST_CELL)
        self._path = path
        self._held: bytes | None = None  # all of the file as UTF-8, if it is written otherwise
        self.offsets = array("q")
        try:
            with path.open("rb") as file:
                head = file.read(4)
                if head and not is_plain(head):
                    file.seek(0)
                    self._held = decode(file.read(), where=str(path)).removeprefix("\ufeff").encode()
            with self._open() as file:
                first = file.readline().decode(errors="replace")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
        tabs = path.suffix.lower() == ".tsv" or ("\t" in first and "," not in first)
        self._delimiter = "\t" if tabs else ";" if ";" in first and "," not in first else ","
        self.header: list[str] = []
        _, header, fault = next(self._parsed(0), (0, [], ""))
        if fault:
            raise DataError(f"{path}, its header: {fault}")
        self.header = [name.strip() for name in header]
        if repeated := repeated_columns([name for name in self.header if name], str(path)):
            raise DataError(f"{path}: its header has {repeated} twice; rename one")

    def scan(self, named: int | None) -> Iterator[tuple[object, object]]:
        """Note where each row begins, and yield its id (the cell at ``named``) and its content."""
        rows = self._parsed(0)
        begins = next(rows, (0, [], ""))[0]  # the header; an empty file has none
        for ends, cells, _ in rows:
            if cells:  # else an empty line
                self.offsets.append(begins)
                yield (cells[named] if named is not None and named < len(cells) else None), cells
            begins = ends

    @property
    def is_plain(self) -> bool:
        """Whether the file is read as it stands, not held in memory."""
        return self._held is None

    def __len__(self) -> int:
        return len(self.offsets)

    def read(self, index: int) -> dict[str, Any]:
        """The row at ``index`` by the header's names, empty cells as None."""
        return self.read_at(self.offsets[index])

    def read_at(self, offset: int) -> dict[str, Any]:
        """As `read`, of the row that begins there."""
        _, cells, fault = next(self._parsed(offset))
        if fault:
            raise SampleError(fault)
        if len(cells) != len(self.header):
            raise SampleError(
                f"the row has {len(cells)} cells, its header {len(self.header)}; quote cells that hold "
                f"{self._delimiter!r}, quotes or line ends"
            )
        return {name: _value(name, cell) for name, cell in zip(self.header, cells, strict=True) if name}

    def _parsed(self, offset: int) -> Iterator[tuple[int, Sequence[str], str]]:
        """Rows from a place on, each with where the next one begins and what is wrong with it, if anything.

        Raises:
            DataError: The file cannot be read, or a quote is opened in one line and not closed: where the rows after it
                begin cannot be told.
        """
        # Opened per call: a shared handle would share its position between forked workers.
        try:
            with self._open() as file:
                file.seek(offset)
                place = begins = offset
                row: list[str] = []  # its lines

                def lines() -> Iterator[str]:
                    nonlocal place
                    for line in file:
                        place += len(line)
                        row.append(line.decode())
                        yield row[-1]

                reader = csv.reader(lines(), delimiter=self._delimiter, strict=True)
                while True:
                    begins = place
                    row.clear()
                    fault = ""
                    try:
                        cells: Sequence[str] = next(reader)
                    except StopIteration:
                        return
                    except csv.Error as error:
                        more = "expected after" in str(error)  # behind a closing quote
                        if "end of data" in str(error) or (more and len(row) > 1):
                            self._refuse_open_quote(begins)
                        if not more:
                            raise
                        cells, fault = self._after_quotes(row[0])
                    if len(row) > 1 and self._are_rows(row):
                        self._refuse_open_quote(begins)
                    yield place, cells, fault
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self._path} is not UTF-8, near byte {place}; convert it from the encoding that it is in (latin1, gb18030, "
                "...): iconv -f latin1 -t utf-8 OLD > NEW"
            ) from error
        except csv.Error as error:
            raise DataError(
                f"{self._path} cannot be read as CSV near byte {place}: {error}; save it with quoted cells, "
                "or as JSON lines"
            ) from error

    def _after_quotes(self, line: str) -> tuple[Sequence[str], str]:
        """The cells of a line with more than a delimiter behind a closing quote, and what is wrong; blanks are not."""
        delimiter, fault = self._delimiter, ""
        try:
            next(csv.reader([re.sub(rf'" +(?=[{delimiter}\r\n]|$)', '"', line)], delimiter=delimiter, strict=True))
        except csv.Error as error:
            fault = f"{error} in its row: a cell that holds quotes is quoted, and each quote in it written twice"
        return next(csv.reader([line], delimiter=delimiter)), fault

    def _are_rows(self, lines: Sequence[str]) -> bool:
        """Whether each line looks like a row: then a quote in the first was taken to open a cell, which another closes.

        All have the delimiters of a row; commas, which sentences have, too, count where all name a file in one column.
        """
        count = len(self.header)
        cells = [line.rstrip("\r\n").split(self._delimiter) for line in lines]
        if count < 2 or any(len(line) != count for line in cells):
            return False
        return self._delimiter == "\t" or any(all(map(_FILE.search, column)) for column in zip(*cells, strict=True))

    def _refuse_open_quote(self, offset: int) -> NoReturn:
        with self._open() as file:
            line = file.read(offset).count(b"\n") + 1
        raise DataError(
            f"{self._path}, line {line}: a quote that opens a cell is not closed in that row, so that the rows after it "
            "cannot be told apart; write a quote within a cell twice and quote the cell. If quotes are plain characters in "
            f"this file, convert it: python -c \"import csv, pandas; pandas.read_csv('{self._path.name}', "
            f"sep={self._delimiter!r}, quoting=csv.QUOTE_NONE, dtype=str).to_csv('new{self._path.suffix}', "
            f'sep={self._delimiter!r}, index=False)"'
        )

    def _open(self) -> BinaryIO:
        return self._path.open("rb") if self._held is None else BytesIO(self._held)


def _value(name: str, cell: str) -> Any:
    if not cell.strip():
        return None
    found = printed(cell, where=repr(name) if name in _MEANT else "") if name in _LISTS else None
    return cell if found is None else found
