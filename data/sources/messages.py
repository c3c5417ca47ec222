"""One JSON entry a line, in any of the forms of `data.sources.conversations`; mostly OpenAI's and TRL's ``messages``.

Only ids and line offsets stay in memory; a line is parsed when its sample is asked for. A file in UTF-16, or with a
byte order mark, is held in memory as a whole.
"""

from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import resolve_ids
from vlm_distill_cache.data.sources.conversations import FORMS, brief_keys, is_entry
from vlm_distill_cache.data.sources.entries import EntryDataset, id_and_content
from vlm_distill_cache.data.sources.json_text import decode, is_plain, parse_line
from vlm_distill_cache.data.sources.pictures import brief, image_folder


class MessagesDataset(EntryDataset):
    """A JSON lines file; ``images`` as for `LlavaDataset`. A line that is no JSON object is its sample's error."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        self.name = path.name
        self.image_root = image_folder(images, path)
        self._path = path
        self._held: bytes | None = None  # all of the file, as UTF-8
        self._offsets: list[int] = []
        self._broken: dict[int, str] = {}  # by position: what is wrong with the line
        self._has_text = False
        self.sample_ids, self.odd_ids = resolve_ids(self._scan(), where=str(path))
        if not self._offsets:
            raise DataError(f"{path} holds no sample; expected one JSON object a line")
        if not self._has_text:
            first = self._broken.get(0) or f"the first has {brief_keys(self.read(0))}"
            raise DataError(f"{path}: no line is an entry with {FORMS}; {first}")
        self.tell_unread()

    def read(self, index: int) -> Mapping[str, Any]:
        """The entry at ``index``; `DataError` if the file was changed meanwhile."""
        if index in self._broken:
            raise SampleError(self._broken[index])
        # Opened per sample: a shared handle would share its position between forked workers.
        with self._open() as file:
            file.seek(self._offsets[index])
            entry = parse_line(file.readline(), where=f"{self._path} has changed: sample {self.sample_ids[index]!r}")
        if not isinstance(entry, dict):
            raise DataError(f"{self._path} has changed: sample {self.sample_ids[index]!r} is no object any more")
        return entry

    def _open(self) -> BinaryIO:
        return self._path.open("rb") if self._held is None else BytesIO(self._held)

    def _scan(self) -> Iterator[tuple[object, object]]:
        """Note where each line begins and yield its id and, where there is none, its content."""
        try:
            with self._path.open("rb") as file:
                if not is_plain(file.read(4)):
                    file.seek(0)
                    self._held = decode(file.read(), where=str(self._path)).encode()
            with self._open() as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._offsets.append(offset)
                        yield id_and_content(self._parse(line, number))
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {error.strerror or error}") from error

    def _parse(self, line: bytes, number: int) -> Any:
        """An entry; of a line that is none, a text that makes its id."""
        try:
            entry = parse_line(line, where=f"{self._path.name}, line {number},")
            if isinstance(entry, dict):
                self._has_text = self._has_text or is_entry(entry)
                return entry
            problem = f"{self._path.name}, line {number}, must be an object, got {brief(entry)}"
        except DataError as error:
            problem = str(error)
        self._broken[len(self._offsets) - 1] = problem
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
