"""One JSON entry a line, in any of the forms of `data.sources.conversations`; mostly OpenAI's and TRL's ``messages``.

A line is parsed when its sample is asked for. Ids and where lines begin are found once and kept of a large file
(`kept.files`), and take 28 bytes and the id's own of a small one. A file in UTF-16, or with a byte order mark, is held in
memory as a whole.
"""

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, brief_keys, is_entry
from vlm_distill_cache.data.sources.entries import id_and_content
from vlm_distill_cache.data.sources.json_text import decode, held_text, is_plain, open_text, parse_line
from vlm_distill_cache.data.sources.kept.entries import pack_entries
from vlm_distill_cache.data.sources.kept.files import FileDataset
from vlm_distill_cache.data.sources.kept.store import Kept
from vlm_distill_cache.data.sources.pictures import brief, image_folder


class MessagesDataset(FileDataset):
    """A JSON lines file; ``images`` as for `LlavaDataset`. A line that is no JSON object is its sample's error."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        root = image_folder(images, path)
        self._path, self._held = path, held_text(path)
        super().__init__(path, image_root=root, kind="lines", find=_find, in_parts=self._held is None)
        if not len(self):
            raise DataError(f"{path} holds no sample; expected one JSON object a line")
        self._broken = {int(place): reason for place, reason in self._entries.notes["broken"].items()}
        if not self._entries.notes["has_text"]:
            first = self._broken.get(0) or f"the first has {brief_keys(self.read(0))}"
            raise DataError(f"{path}: no line is an entry with {FORMS}; {first}")
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``; `DataError` if the file was changed meanwhile."""
        if index in self._broken:
            raise SampleError(self._broken[index])
        # Opened per sample: a shared handle would share its position between forked workers.
        with open_text(self._path, self._held) as file:
            file.seek(self._entries.offset(index))
            entry = parse_line(file.readline(), where=f"{self._path} has changed: sample {self.sample_ids[index]!r}")
        if not isinstance(entry, dict):
            raise DataError(f"{self._path} has changed: sample {self.sample_ids[index]!r} is no object any more")
        return entry


def _find(path: Path) -> Kept:
    """Look at all lines."""
    lines = _Lines(path)
    ids, odd = resolve_ids(lines.entries(), where=str(path))
    broken = {str(place): reason for place, reason in lines.broken.items()}
    return pack_entries(ids, odd, offsets=lines.offsets, notes={"broken": broken, "has_text": lines.has_text})


class _Lines:
    """A look at all lines of a file.

    Attributes:
        offsets: Where each entry begins.
        broken: What is wrong with lines that are none, by position.
        has_text: Whether any is an entry of a known form.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.offsets = array("q")
        self.broken: dict[int, str] = {}
        self.has_text = False

    def entries(self) -> Iterator[tuple[object, object]]:
        """Note where each line begins and yield its id and, where there is none, its content."""
        held = held_text(self._path)
        try:
            with open_text(self._path, held) as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self.offsets.append(offset)
                        yield id_and_content(self._parse(line, number))
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {error.strerror or error}") from error

    def _parse(self, line: bytes, number: int) -> Any:
        """An entry; of a line that is none, a text that makes its id."""
        try:
            entry = parse_line(line, where=f"{self._path.name}, line {number},")
            if isinstance(entry, dict):
                self.has_text = self.has_text or is_entry(entry)
                return entry
            problem = f"{self._path.name}, line {number}, must be an object, got {brief(entry)}"
        except DataError as error:
            problem = str(error)
        self.broken[len(self.offsets) - 1] = problem
        return line.decode(errors="backslashreplace")


def holds_lines(path: Path) -> bool:
    """Whether a file holds one JSON object a line: as its content says, where its name says otherwise.

    A file called ``.jsonl`` does unless it begins with a list or with an object over several lines; another one does
    if its first line is a whole object that is an entry.
    """
    try:
        with path.open("rb") as file:
            plain = is_plain(file.read(4))
            file.seek(0)
            while plain and (head := file.read(1 << 10)):
                if head.lstrip().startswith(b"["):  # all of a list may stand in one line
                    return False
                if head.strip():
                    break
            file.seek(0)
            lines = file if plain else iter(decode(file.read(), where=str(path)).encode().splitlines())
            first = next((line.strip() for line in lines if line.strip()), b"")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if path.suffix.lower() != ".json":
        return not first.startswith(b"[") and first != b"{"
    try:
        entry = parse_line(first, where=str(path)) if first.startswith(b"{") else None
    except DataError:
        return False
    return isinstance(entry, dict) and is_entry(entry)
