"""A JSON list of entries, as LLaVA publishes its data: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

Entries may have any of the forms of `data.sources.conversations`. They are found one after another, once, and their ids and
places kept of a large file (`kept.files`); one is parsed when its sample is asked for. A file in UTF-16, or with a byte order
mark, is held in memory as a whole. An odd entry is that sample's error, found when it is asked for and recorded by the
caller; only a file that is no such list fails as a whole.
"""

import json
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, brief_keys, is_entry
from vlm_distill_cache.data.sources.entries import id_and_content
from vlm_distill_cache.data.sources.json_text import held_text, open_text, parse_bytes, parse_line, scan_list
from vlm_distill_cache.data.sources.kept.entries import pack_entries
from vlm_distill_cache.data.sources.kept.files import FileDataset
from vlm_distill_cache.data.sources.kept.store import Kept
from vlm_distill_cache.data.sources.pictures import brief, image_folder

_WHITE = b" \t\n\r"


class LlavaDataset(FileDataset):
    """A JSON list; relative image paths start from ``images``, or from the file's own folder."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        root = image_folder(images, path)
        self._path, self._held = path, held_text(path)
        super().__init__(path, image_root=root, kind="list", find=_find, in_parts=self._held is None)
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``; `DataError` if the file was changed meanwhile."""
        begins, ends = self._entries.offset(index), self._entries.offset(index + 1)
        # Opened per sample: a shared handle would share its position between forked workers.
        with open_text(self._path, self._held) as file:
            file.seek(begins)
            text = file.read(ends - begins).rstrip(_WHITE).removesuffix(b",")
        entry = parse_line(text, where=f"{self._path} has changed: sample {self.sample_ids[index]!r}")
        if not isinstance(entry, dict):
            raise SampleError(f"entry {index} must be an object, got {brief(entry)}")
        return entry


def _find(path: Path) -> Kept:
    """Look at all entries."""
    offsets = array("q")
    has_text = False

    def look(entries: Iterator[Any]) -> Iterator[tuple[object, object]]:
        nonlocal has_text
        for entry in entries:
            has_text = has_text or (isinstance(entry, dict) and is_entry(entry))
            yield id_and_content(entry)

    held = held_text(path)
    try:
        with open_text(path, held) as file:
            ids, odd = resolve_ids(look(scan_list(file, offsets)), where=str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError):
        has_text = False
    if not has_text:
        _refuse(path)
    return pack_entries(ids, odd, offsets=offsets, notes={})


def _refuse(path: Path) -> NoReturn:
    """Say what is wrong with a file that is no list of entries, as a whole."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    entries = parse_bytes(data, where=str(path))
    if isinstance(entries, dict) and is_entry(entries):
        raise DataError(f"{path}: one entry over several lines; put it on one line: jq -c . OLD > NEW")
    if isinstance(entries, dict) and (named := _named_files(entries)):
        raise DataError(
            f"{path} says where data sets lie and holds none (InternVL's and LLaMA-Factory's do so): name a file of theirs "
            f"({named[0]}) with its pictures' folder as images, or list several in a mixture (.yaml)"
        )
    if isinstance(entries, dict):
        lists = [
            key for key, value in entries.items() if isinstance(value, list) and isinstance((value or [0])[0], dict)
        ]
        raise DataError(
            f"{path}: expected a list of samples, got an object with {brief_keys(entries)}"
            + (
                f"; if {lists[0]!r} holds them, put that alone into a file: jq '.[{json.dumps(lists[0])}]' OLD > NEW"
                if lists
                else ""
            )
        )
    if not isinstance(entries, list) or not entries:
        what = "an empty one" if entries == [] else brief(entries)
        raise DataError(f"{path}: expected a list of samples, got {what}")
    if not any(isinstance(entry, dict) and is_entry(entry) for entry in entries):
        first = entries[0]
        raise DataError(
            f"{path}: no entry has {FORMS}; the first has "
            f"{brief_keys(first) if isinstance(first, dict) else brief(first)}"
        )
    raise DataError(f"{path} was changed while it was read, or its entries are nested too deeply; open it again")


def _named_files(described: Mapping[str, Any]) -> list[str]:
    """The files that a description of data sets names, where it is nothing else."""
    named = [each.get("annotation", each.get("file_name")) for each in described.values() if isinstance(each, Mapping)]
    return list(named) if len(named) == len(described) and all(isinstance(name, str) for name in named) else []
