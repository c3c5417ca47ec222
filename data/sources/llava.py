"""A JSON list of entries, as LLaVA publishes its data: ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

Entries may have any of the forms of `data.sources.conversations`. The whole file is parsed at once, as LLaVA's own
loader does (665k samples: about 1 GB of JSON). An odd entry is that sample's error, found when it is asked for and
recorded by the caller; only a file that is no such list fails as a whole.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, brief_keys, is_entry
from vlm_distill_cache.data.sources.entries import EntryDataset, id_and_content
from vlm_distill_cache.data.sources.json_text import parse_bytes
from vlm_distill_cache.data.sources.pictures import brief, image_folder


class LlavaDataset(EntryDataset):
    """A JSON list; relative image paths start from ``images``, or from the file's own folder."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        self.name = path.name
        self.image_root = image_folder(images, path)
        self._entries = _read_entries(path)
        self.sample_ids, self.odd_ids = resolve_ids(map(id_and_content, self._entries), where=str(path))
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``."""
        entry = self._entries[index]
        if not isinstance(entry, dict):
            raise SampleError(f"entry {index} must be an object, got {brief(entry)}")
        return entry


def _read_entries(path: Path) -> list[Any]:
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
    return entries


def _named_files(described: Mapping[str, Any]) -> list[str]:
    """The files that a description of data sets names, where it is nothing else."""
    named = [each.get("annotation", each.get("file_name")) for each in described.values() if isinstance(each, Mapping)]
    return list(named) if len(named) == len(described) and all(isinstance(name, str) for name in named) else []
