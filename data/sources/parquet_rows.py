"""Rows of parquet files in any order, with little of them in memory.

A published set may have 300 GB in hundreds of files, all of whose rows are asked for more than once: for their
fingerprint, by the teacher, in every epoch. So what is kept are the footers (row counts, where columns lie) and a
bounded number of decoded row groups, the texts apart from the pictures: texts are read without the pictures beside
them, and a picture's bytes only when it is decoded. A row group too large to be held is read in blocks.

Nothing is shared with a forked process: each has files, blocks and lock of its own.
"""

import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol

import PIL.Image

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.common.files.hashing import checksum
from vlm_distill_cache.common.pixels import decode_image
from vlm_distill_cache.data.sources.rows import repeated_columns

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

KEPT_BYTES = 512 * 2**20  # of decoded blocks, in each process; the block read last is kept whatever its size
BLOCK_BYTES = 128 * 2**20  # a row group with more of one kind is read in blocks of about this size
OPEN_FILES = 8
CURSORS = 4  # row groups that are read in blocks at a time
FOOTER_THREADS = 8
TEXTS = ""  # the kind of all columns that are not pictures


class ParquetSource(Protocol):
    """A parquet file, here or elsewhere; picklable."""

    @property
    def shown(self) -> str:
        """What errors call it."""
        ...

    def stamp(self) -> list[Any]:
        """What tells it from others, and from itself when it was changed; JSON."""
        ...

    @property
    def remedy(self) -> str:
        """What to do if it cannot be read."""
        ...

    @property
    def remote(self) -> bool:
        """Whether reading it may fail although the file is sound: no sample is to blame then."""
        ...

    def open(
        self, metadata: "pq.FileMetaData | None", *, whole: bool, repeating: Sequence[str] = ()
    ) -> "pq.ParquetFile":
        """Open it, to read ``whole`` row groups or parts of them; with the footer read before, that is not read again.

        Args:
            repeating: Paths of what is to be read as `_repeating` says.
        """
        ...

    def errors(self) -> tuple[type[Exception], ...]:
        """What reading it may raise."""
        ...


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """A picture in a parquet file; its bytes are read when they are needed."""

    rows: "ParquetRows"
    row: int
    column: str
    place: int | None  # in a list of pictures
    name: str = "a stored picture"

    def load(self) -> PIL.Image.Image:
        """Read the bytes and decode them to RGB; `SampleError` if that cannot be done."""
        return decode_image(self.read(), name=self.name)

    def digest(self) -> str:
        """Hash of the bytes; `SampleError` if they cannot be read."""
        return checksum(self.read())

    def read(self) -> bytes:
        """The encoded picture."""
        value = self.rows.value(self.row, self.column)
        value = value if self.place is None else value[self.place]
        data = value["bytes"] if isinstance(value, Mapping) else value
        if not data:
            raise SampleError(f"image {self.name} is empty")
        return bytes(data)

    def __eq__(self, other: object) -> bool:
        """Whether both are one picture; a second copy of it under another key is."""
        return isinstance(other, StoredPicture) and (self._where == other._where or self.read() == other.read())

    __hash__ = None  # type: ignore[assignment]

    @property
    def _where(self) -> tuple[int, str, int | None]:
        return self.row, self.column, self.place

    def __str__(self) -> str:
        return self.name


@dataclass
class _Own:
    """What one process has open."""

    process: int = field(default_factory=os.getpid)
    lock: threading.RLock = field(default_factory=threading.RLock)
    files: "OrderedDict[int, pq.ParquetFile]" = field(default_factory=OrderedDict)
    blocks: "OrderedDict[tuple[int, str, int], pa.Table]" = field(default_factory=OrderedDict)
    size: int = 0  # of the blocks, bytes
    # Of a row group and a kind that are read in blocks: the next block, and the blocks.
    cursors: "OrderedDict[tuple[int, str], tuple[int, Iterator[pa.Table]]]" = field(default_factory=OrderedDict)


@dataclass(frozen=True)
class _Group:
    """A row group: its file, its number there, and how many of its rows make a block of each kind."""

    file: int
    number: int
    rows: int
    block_rows: Mapping[str, int]


class ParquetRows:
    """The rows of parquet files of one schema, one after another.

    Attributes:
        columns: Names of the columns.
        schema: Of the first file, pictures and types as stored there.
        counts: Rows of each file.
    """

    def __init__(
        self,
        sources: Sequence[ParquetSource],
        *,
        pictures: Callable[["pa.Schema"], Collection[str]],
        labels: Callable[["pa.Schema"], Mapping[str, Sequence[str]]],
    ) -> None:
        """Read the footers.

        Args:
            pictures: Says which columns hold pictures, whose bytes may be left unread.
            labels: Says which columns of numbers stand for names, and for which.

        Raises:
            DataError: A file cannot be read, has other columns or labels than the first, or none has a row.
        """
        self._sources = list(sources)
        self._metadata, schemas = _footers(self._sources)
        self.schema = schemas[0]
        _refuse_unlike(self._sources, schemas)
        _refuse_other_labels(self._sources, schemas, labels)
        self.columns: list[str] = list(self.schema.names)
        self._leaves = [_leaves_of(metadata, self.columns) for metadata in self._metadata]
        self._pictures = [
            {
                name: paths
                for name in self.columns
                if name in pictures(schema)
                and (paths := _paths_beside(schema.field(name).type, leaves[name])) is not None
            }
            for schema, leaves in zip(schemas, self._leaves, strict=True)
        ]
        self._whole: dict[tuple[int, str], bool] = {}  # by row group and column: whether all its pictures have bytes
        self._of_file = [list(self._groups_of(number)) for number in range(len(self._sources))]
        self._groups = [group for groups in self._of_file for group in groups]
        self.counts = [sum(group.rows for group in groups) for groups in self._of_file]
        self._ends = list(accumulate(group.rows for group in self._groups))
        if not self._ends or not self._ends[-1]:
            raise DataError(f"{self._sources[0].shown}: no row in {len(self._sources)} parquet files; nothing to learn")
        self._own = _Own()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_own"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state, _own=_Own())

    def row(self, index: int) -> dict[str, Any]:
        """The row at ``index``: Python values, and `StoredPicture` for each picture whose bytes were not read.

        Raises:
            SampleError: The row is damaged, or holds what Python cannot.
            DataError: The file cannot be had any more.
        """
        index, number, at = self._find(index)
        row: dict[str, Any] = self._slice(number, TEXTS, at)
        for column in self._pictures[self._groups[number].file]:
            row[column] = self._unread(index, number, column, row.get(column))
        return {column: row[column] for column in self.columns}

    def value(self, index: int, column: str) -> Any:
        """What a column of pictures holds in a row, bytes included; errors as of `row`."""
        _, number, at = self._find(index)
        return self._slice(number, column, at)[column]

    def column(self, name: str) -> list[Any]:
        """All values of a column of texts or numbers."""
        found: list[Any] = []
        for number, source in enumerate(self._sources):
            with self._held() as own, _reading(source, f"column {name!r}", fatal=True):
                for chunk in self._open(own, number).read(columns=[name]).column(0).chunks:
                    values = getattr(chunk, "dictionary", chunk).to_pylist()
                    places = chunk.indices.to_pylist() if hasattr(chunk, "indices") else range(len(values))
                    found += [None if place is None else values[place] for place in places]
        return found

    def describe(self) -> list[list[Any]]:
        """Of each file its name, rows, and a hash of what its footer says of them, JSON."""
        return [
            [
                PurePosixPath(source.shown).name,
                metadata.num_rows,
                checksum(json.dumps(metadata.to_dict(), default=str).encode()),
            ]
            for source, metadata in zip(self._sources, self._metadata, strict=True)
        ]

    def _groups_of(self, number: int) -> Iterator[_Group]:
        metadata, leaves, pictures = self._metadata[number], self._leaves[number], self._pictures[number]
        for place in range(metadata.num_row_groups):
            group = metadata.row_group(place)
            if not group.num_rows:
                continue
            sizes = {TEXTS: 0}
            for name, paths in leaves.items():
                for path, leaf in paths.items():
                    kind = name if name in pictures and path not in pictures[name] else TEXTS
                    sizes[kind] = sizes.get(kind, 0) + group.column(leaf).total_uncompressed_size
            rows = {
                kind: max(1, group.num_rows * BLOCK_BYTES // max(size, BLOCK_BYTES)) for kind, size in sizes.items()
            }
            yield _Group(number, place, group.num_rows, rows)

    def _find(self, index: int) -> tuple[int, int, int]:
        """A row's index from the front, its group, and its place there."""
        index = range(len(self))[index]
        number = bisect_right(self._ends, index)
        return index, number, index - (self._ends[number - 1] if number else 0)

    def _slice(self, number: int, kind: str, at: int) -> dict[str, Any]:
        size = self._groups[number].block_rows[kind]
        block = self._block(number, kind, at // size)
        try:
            row: dict[str, Any] = block.slice(at % size, 1).to_pylist()[0]
        except (ValueError, TypeError, OverflowError) as error:  # a time or number beyond Python's; text not UTF-8
            raise SampleError(f"the row cannot be read: {error}") from error
        return row

    def _unread(self, index: int, number: int, column: str, beside: Any) -> Any:
        """Stand-ins for the pictures of a row, where the footer says that each has bytes; ``beside``: their paths."""
        if not self._has_all_bytes(number, column):
            return self.value(index, column)
        if not self._pictures[self._groups[number].file][column]:  # bytes alone, and none of them missing
            return StoredPicture(self, index, column, None)
        if isinstance(beside, list):
            return [None if item is None else StoredPicture(self, index, column, i) for i, item in enumerate(beside)]
        return None if beside is None else StoredPicture(self, index, column, None)

    def _has_all_bytes(self, number: int, column: str) -> bool:
        """Whether a row group's footer says that every picture of a column has bytes: no more of them miss than pictures."""
        key = (number, column)
        if key not in self._whole:
            group = self._groups[number]
            paths = self._pictures[group.file][column]
            leaf = next(leaf for path, leaf in self._leaves[group.file][column].items() if path not in paths)
            statistics = self._metadata[group.file].row_group(group.number).column(leaf).statistics
            told = statistics is not None and statistics.has_null_count
            self._whole[key] = told and statistics.null_count == (self._missing(number, column) if paths else 0)
        return self._whole[key]

    def _missing(self, number: int, column: str) -> int:
        """How many values a row group's column lacks where a row has no picture, or an empty list of them."""
        import pyarrow.compute as pc

        group, missing = self._groups[number], 0
        for block in range(-(-group.rows // group.block_rows[TEXTS])):
            values = self._block(number, TEXTS, block).column(column)
            if _is_list(values.type):
                lengths = pc.list_value_length(values)
                missing += lengths.null_count + (pc.sum(pc.equal(lengths, 0)).as_py() or 0)
                values = pc.list_flatten(values)
            missing += values.null_count
        return missing

    def _block(self, number: int, kind: str, block: int) -> "pa.Table":
        key = (number, kind, block)
        with self._held() as own:
            if key in own.blocks:
                own.blocks.move_to_end(key)
                return own.blocks[key]
            group = self._groups[number]
            with _reading(self._sources[group.file], f"row group {group.number}"):
                table = self._load(own, number, kind, block)
            own.blocks[key] = table
            own.size += table.nbytes
            while own.size > KEPT_BYTES and len(own.blocks) > 1:
                own.size -= own.blocks.popitem(last=False)[1].nbytes
            return table

    def _load(self, own: _Own, number: int, kind: str, block: int) -> "pa.Table":
        group = self._groups[number]
        file, size = self._open(own, group.file), group.block_rows[kind]
        columns = [kind]
        if kind == TEXTS:
            pictures = self._pictures[group.file]
            columns = [path for name in self.columns for path in pictures.get(name, (name,))]
        if size >= group.rows:
            return file.read_row_group(group.number, columns=columns)
        following, blocks = own.cursors.pop((number, kind), (block + 1, None))
        if blocks is None or following > block:
            following, blocks = 0, _blocks(file, group.number, columns, size)
        for _ in range(following, block):
            next(blocks)
        table = next(blocks)
        own.cursors[number, kind] = block + 1, blocks
        while len(own.cursors) > CURSORS:
            own.cursors.popitem(last=False)
        return table

    def _open(self, own: _Own, number: int) -> "pq.ParquetFile":
        if number not in own.files:
            whole = all(rows >= group.rows for group in self._of_file[number] for rows in group.block_rows.values())
            own.files[number] = self._sources[number].open(
                self._metadata[number], whole=whole, repeating=_repeating(self._metadata[number])
            )
            while len(own.files) > OPEN_FILES:
                own.files.popitem(last=False)
        own.files.move_to_end(number)
        return own.files[number]

    @contextmanager
    def _held(self) -> Iterator[_Own]:
        """What this process has open, for one thread at a time."""
        if self._own.process != os.getpid():
            self._own = _Own()
        own = self._own
        with own.lock:
            yield own


def _footers(sources: Sequence[ParquetSource]) -> "tuple[list[pq.FileMetaData], list[pa.Schema]]":
    def footer(source: ParquetSource) -> "tuple[pq.FileMetaData, pa.Schema]":
        with _reading(source, "footer", fatal=True):
            file = source.open(None, whole=True)
            return file.metadata, file.schema_arrow

    if len(sources) == 1:
        found = [footer(sources[0])]
    else:
        with ThreadPoolExecutor(FOOTER_THREADS) as threads:
            found = list(threads.map(footer, sources))
    return [metadata for metadata, _ in found], [schema for _, schema in found]


@contextmanager
def _reading(source: ParquetSource, what: str, *, fatal: bool = False) -> Iterator[None]:
    """Say in one line what cannot be read: of the data as a whole if ``fatal``, else of the sample."""
    try:
        yield
    except (DataError, SampleError):
        raise
    except source.errors() as error:
        kind = DataError if fatal or source.remote or isinstance(error, FileNotFoundError) else SampleError
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        raise kind(f"{source.shown}, {what}, cannot be read as parquet: {said[:300]}; {source.remedy}") from error


def _refuse_unlike(sources: Sequence[ParquetSource], schemas: "Sequence[pa.Schema]") -> None:
    """Refuse files that do not have the columns of the first, or not of its types; null has any type."""
    first = schemas[0]
    for source, schema in zip(sources, schemas, strict=True):
        where = f"{source.shown} has other columns than {sources[0].shown}"
        remedy = (
            "files of several data sets are data of their own: name them one by one, or list them in a mixture (.yaml)"
        )
        if repeated := repeated_columns(schema.names, source.shown):
            raise DataError(f"{source.shown} has several columns called {repeated}; rename them")
        lacking, more = set(first.names) - set(schema.names), set(schema.names) - set(first.names)
        if lacking or more:
            parts = [
                f"{word} {', '.join(sorted(names)[:5])}" for word, names in (("lacks", lacking), ("has", more)) if names
            ]
            raise DataError(f"{where}: it {' and '.join(parts)}; {remedy}")
        for name in first.names:
            one, other = first.field(name).type, schema.field(name).type
            if not _alike(one, other):
                raise DataError(f"{where}: {name!r} is {other}, expected {one}; {remedy}")


def _refuse_other_labels(
    sources: Sequence[ParquetSource],
    schemas: "Sequence[pa.Schema]",
    labels: Callable[["pa.Schema"], Mapping[str, Sequence[str]]],
) -> None:
    """Refuse files in which the numbers of a column stand for other names than in the first: 0 would be read as its 0."""
    first = labels(schemas[0])
    for source, schema in zip(sources, schemas, strict=True):
        if schema.metadata == schemas[0].metadata:
            continue
        found = labels(schema)
        for name in sorted(first.keys() | found.keys()):
            one, other = (f"labels {list(held[name])[:8]}" if name in held else "no labels" for held in (first, found))
            if first.get(name) != found.get(name):
                raise DataError(
                    f"{source.shown} has {other} for column {name!r}, {sources[0].shown} has {one}: the same number means "
                    "two things; name the files one by one, or list them in a mixture (.yaml)"
                )


def _alike(one: "pa.DataType", other: "pa.DataType") -> bool:
    """Whether two columns hold the same, however wide; null is of any type, a field that is missing likewise."""
    import pyarrow.types as types

    if types.is_null(one) or types.is_null(other):
        return True
    if types.is_dictionary(one) or types.is_dictionary(other):
        plain = [kind.value_type if types.is_dictionary(kind) else kind for kind in (one, other)]
        return _alike(*plain)
    if _is_list(one) and _is_list(other):
        return _alike(one.value_type, other.value_type)
    if types.is_struct(one) and types.is_struct(other):
        fields = [{kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)} for kind in (one, other)]
        shared = fields[0].keys() & fields[1].keys()
        return len(shared) == min(map(len, fields)) and all(_alike(fields[0][name], fields[1][name]) for name in shared)
    return _sort_of(one) == _sort_of(other)


def _sort_of(kind: "pa.DataType") -> str:
    """What a column of single values holds, however wide."""
    import pyarrow.types as types

    for name in ("integer", "floating"):
        if getattr(types, f"is_{name}")(kind):
            return name
    return str(kind).replace("large_", "").removesuffix("_view")


def _is_list(kind: "pa.DataType") -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind))


def _repeating(metadata: "pq.FileMetaData") -> list[str]:
    """Paths of texts and bytes that the file may hold once for many rows, which then take many times their size.

    They are read as their different values and a number a row: a file of 2 kB may stand for gigabytes. What takes much
    space in the file is read in blocks instead.
    """
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    found: list[str] = []
    for number in range(metadata.num_columns):
        column = metadata.schema.column(number)
        if column.physical_type == "BYTE_ARRAY" and column.logical_type.type in ("STRING", "NONE", "JSON"):
            chunks = [group.column(number) for group in groups]
            small = [
                chunk
                for chunk in chunks
                if chunk.has_dictionary_page and chunk.total_uncompressed_size <= BLOCK_BYTES / 4
            ]
            if any(chunk.num_values * chunk.total_uncompressed_size > KEPT_BYTES for chunk in small):
                found.append(column.path)
    return found


def _leaves_of(metadata: "pq.FileMetaData", names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Of each column the paths of what is stored of it, each with its number."""
    found: dict[str, dict[str, int]] = {name: {} for name in names}
    for number in range(metadata.num_columns):
        path = metadata.schema.column(number).path
        parts = path.split(".")
        name = next((held for n in range(len(parts), 0, -1) if (held := ".".join(parts[:n])) in found), None)
        if name is not None:
            found[name][path] = number
    return found


def _paths_beside(kind: "pa.DataType", leaves: Mapping[str, int]) -> tuple[str, ...] | None:
    """What to read of a column of pictures in place of their bytes; None if its bytes cannot be left unread."""
    import pyarrow.types as types

    if types.is_binary(kind) or types.is_large_binary(kind):
        return ()
    item = kind.value_type if _is_list(kind) else kind
    if not types.is_struct(item) or item.get_field_index("bytes") < 0 or item.num_fields < 2:
        return None
    held = item.field("bytes").type
    data = [path for path in leaves if path.rpartition(".")[2] == "bytes"]
    if not (types.is_binary(held) or types.is_large_binary(held)) or len(data) != 1:
        return None
    return tuple(path for path in leaves if path != data[0])


def _blocks(file: "pq.ParquetFile", group: int, columns: list[str], size: int) -> "Iterator[pa.Table]":
    """A row group in tables of ``size`` rows, the last one with what is left."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    rows = 0
    for batch in file.iter_batches(size, row_groups=[group], columns=columns):
        waiting.append(batch)
        rows += len(batch)
        while rows >= size:
            table = pa.Table.from_batches(waiting)
            yield table.slice(0, size)
            waiting = table.slice(size).to_batches()
            rows -= size
    if rows:
        yield pa.Table.from_batches(waiting)
