"""Hugging Face's image folders: pictures, and a metadata file that says something about each.

``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet`` names pictures beside itself or below: ``file_name`` is one,
``file_names`` are several, ``NAME_file_name`` is the picture ``NAME``; videos likewise. What else it says is the entry;
``text`` is a caption where there is nothing else, as for `datasets`. A row that cannot be read is its sample's error.
"""

import posixpath
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.recognise import names_video
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, brief_keys, is_entry
from vlm_distill_cache.data.sources.csv_rows import CsvRows
from vlm_distill_cache.data.sources.entries import EntryDataset, id_and_content
from vlm_distill_cache.data.sources.json_text import decode, parse
from vlm_distill_cache.data.sources.parquet import LocalParquet, ParquetTable
from vlm_distill_cache.data.sources.pictures import brief, files_in

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_ONE, _SEVERAL = "file_name", "file_names"


class ImageFolderDataset(EntryDataset):
    """The entries of a folder's metadata files, whose paths start from the folder of their file.

    Args:
        folder: Where ``paths`` start.
        paths: Metadata files, relative to ``folder``.
        others: Pictures of other splits, relative to ``folder``; rows about them are left out.
    """

    def __init__(self, folder: Path, paths: Sequence[str], *, name: str, others: Collection[str] = ()) -> None:
        self.name = name
        self.image_root = folder
        pictures: set[str] = set()
        videos: set[str] = set()
        self._entries: list[Any] = []
        for path in paths:
            for row in _read_rows(folder / path):
                entry, named = _entry(row, posixpath.dirname(path))
                moving = {key for key, values in named.items() if any(map(names_video, values))}
                pictures |= named.keys()
                videos |= moving
                if not any(value in others for values in named.values() for value in values):
                    self._entries.append(entry)
        self.picture_keys, self.video_keys = frozenset(pictures - videos), frozenset(videos)
        where = str(folder / paths[0])
        if not self._entries:
            raise DataError(f"{where} holds no row of this split; nothing to learn from")
        if not pictures:
            raise DataError(f"{where}: no row has {_ONE!r} or {_SEVERAL!r}, which name its pictures")
        first = self._entries[0]
        if not any(isinstance(entry, dict) and is_entry(entry) for entry in self._entries):
            said = brief_keys(first) if isinstance(first, dict) else brief(first)
            raise DataError(f"{where}: no row has {FORMS}, or 'text' for a caption; the first has {said}")
        self.sample_ids, self.odd_ids = resolve_ids(map(id_and_content, self._entries), where=where)
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``."""
        entry = self._entries[index]
        if isinstance(entry, _Reason):
            raise SampleError(entry)
        if not isinstance(entry, dict):
            raise SampleError(f"a row must be an object, got {brief(entry)}")
        return entry


class _Reason(str):
    """Why a row cannot be read, in its place."""

    __slots__ = ()


def _read_rows(path: Path) -> list[Any]:
    """All rows of a metadata file."""
    if path.suffix == ".csv":
        rows = CsvRows(path)
        list(rows.scan(None))
        return [_or_reason(rows.read, index) for index in range(len(rows))]
    if path.suffix == ".parquet":
        table = ParquetTable([LocalParquet(path)])
        return [table.row(index) for index in range(len(table))]
    try:
        text = decode(path.read_bytes(), where=str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    lines = enumerate(text.removeprefix("\ufeff").split("\n"), start=1)
    return [_or_reason(parse, line, where=f"{path.name}, line {number},") for number, line in lines if line.strip()]


def _or_reason(read: Callable[..., Any], *given: object, **named: object) -> Any:
    """A row, or why it cannot be read."""
    try:
        return read(*given, **named)
    except (SampleError, DataError) as error:
        return _Reason(error)


def _entry(row: Any, folder: str) -> tuple[Any, dict[str, list[str]]]:
    """An entry with its pictures under keys of pictures, and their paths by key."""
    if not isinstance(row, dict):
        return row, {}
    entry: dict[str, Any] = {}
    named: dict[str, list[str]] = {}
    for key, value in row.items():
        stem, one, _ = key.rpartition(_ONE)
        if not (one and key in (_ONE, _SEVERAL)) and not key.endswith((f"_{_ONE}", f"_{_SEVERAL}")):
            entry.setdefault(key, value)
            continue
        several = key.endswith(_SEVERAL)
        if several and isinstance(value, str):
            value = files_in(_SEVERAL, value) or [value]
        values = value if several and isinstance(value, list) else [value]
        moves = any(isinstance(item, str) and names_video(item) for item in values)
        name = stem.removesuffix("_") or f"{'video' if moves else 'image'}{'s' if several else ''}"
        paths = [_joined(folder, item) if isinstance(item, str) and item.strip() else item for item in values]
        entry[name] = paths if several else paths[0]
        named[name] = [path for path in paths if isinstance(path, str) and path.strip()]
    # Without a picture it stays what it is, and is refused.
    if isinstance(entry.get("text"), str) and not is_entry(entry) and any(named.values()):
        entry["caption"] = entry.pop("text")
    return entry, named


def _joined(folder: str, path: str) -> str:
    path = path.replace("\\", "/")
    return path if not folder or path.startswith("/") else posixpath.join(folder, path)
