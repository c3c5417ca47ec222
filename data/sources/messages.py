"""Messages JSONL, as OpenAI and Hugging Face write chats: one ``{"messages", "images"}`` a line.

``content`` is a text, or a list of parts ``{"type": "text", "text"}`` and ``{"type": "image"}``. An image
part may name its file itself (``"image"``, ``"path"`` or ``"url"``); otherwise ``images`` holds the paths.
Only ids and line offsets stay in memory; a line is parsed when its sample is asked for.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sample import ImageSource, Turn, resolve_ids
from vlm_distill_cache.data.sources.grouping import key_of_paths
from vlm_distill_cache.data.sources.llava import (
    EntryDataset,
    find_images,
    image_folder,
    pair_turns,
    parse_conversations,
)

_INLINE_KEYS = ("image", "path", "url")


class MessagesDataset(EntryDataset):
    """A messages JSONL file, whose lines may also hold LLaVA conversations; ``images`` as for `LlavaDataset`."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        self.name = path.name
        self._path = path
        self._images = image_folder(images, path)
        self._offsets: list[int] = []
        self.sample_ids: Sequence[str] = resolve_ids(self._scan(), where=str(path))
        if not self._offsets:
            raise DataError(f"{path} holds no sample; expected one JSON object a line")

    def read(self, index: int) -> tuple[Mapping[str, Any], tuple[Turn, ...], tuple[ImageSource, ...]]:
        """The entry at ``index``, its turns and its images; `DataError` if the file was changed meanwhile."""
        # Opened per sample: a shared handle would share its position between forked workers.
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            record = _parse_line(file.readline(), f"{self._path} has changed, sample {self.sample_ids[index]!r}")
        turns, inline = parse_record(record)
        return record, turns, find_images(_named_images(record, inline), self._images)

    def image_keys(self) -> list[str | None]:
        """Each sample's image path as the file writes it; None without one. Reads the file once."""
        keys = []
        with self._path.open("rb") as file:
            for offset in self._offsets:
                file.seek(offset)
                record = json.loads(file.readline())
                try:
                    _, inline = parse_record(record)
                except SampleError:
                    inline = []  # it will fail when it is asked for, wherever it stands
                keys.append(key_of_paths(_named_images(record, inline)))
        return keys

    def _scan(self) -> Iterator[tuple[object, object]]:
        """Note where each line begins and yield its id and, where there is none, its content."""
        try:
            with self._path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        record = _parse_line(line, f"{self._path}, line {number}")
                        self._offsets.append(offset)
                        yield record.get("id"), record
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read: {error}") from error


def _named_images(record: Mapping[str, Any], inline: list[str]) -> Any:
    """What a record says its images are: in its messages, or beside them."""
    return inline or record.get("images") or record.get("image")


def parse_record(record: Mapping[str, Any]) -> tuple[tuple[Turn, ...], list[str]]:
    """Turns of one record in any of the forms users have, and the images its messages name.

    The forms, by key: ``messages``, ``conversations`` (LLaVA), ``question`` and ``answer``, ``caption``.

    Raises:
        SampleError: None of them is there, or it cannot be understood.
    """
    if record.get("messages") is not None:
        return parse_messages(record["messages"])
    if record.get("conversations") is not None:
        return parse_conversations(record["conversations"]), []
    if isinstance(record.get("question"), str) and isinstance(record.get("answer"), str):
        return pair_turns([("user", record["question"]), ("assistant", record["answer"])]), []
    if isinstance(record.get("caption"), str):
        return pair_turns([("user", ""), ("assistant", record["caption"])]), []
    raise SampleError(
        f"expected 'messages', 'conversations', 'question' and 'answer' or 'caption', got {sorted(record)}"
    )


def parse_messages(messages: Any) -> tuple[tuple[Turn, ...], list[str]]:
    """Turns of a list of ``{"role", "content"}``, alternating from user to assistant, and the images its parts name."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise SampleError(f"'messages' must be a list of messages, got {type(messages).__name__}")
    plain: list[tuple[str, str]] = []
    named: list[str] = []
    for position, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ("user", "assistant"):
            raise SampleError(
                f"message {position} has role {role!r}; only 'user' and 'assistant' are supported (a system "
                "prompt belongs to the prompt template)"
            )
        text, images, count = _parse_content(message.get("content"), position)
        if count and position > 1:
            raise SampleError(f"message {position} holds an image; it must be in the first message")
        named += images
        plain.append((role, text))
    return pair_turns(plain), named


def _parse_content(content: Any, position: int) -> tuple[str, list[str], int]:
    """Text, named images and number of image parts of one message."""
    if isinstance(content, str):
        return content, [], 0
    if not isinstance(content, Sequence):
        raise SampleError(f"message {position} has content of type {type(content).__name__}, expected text or parts")
    texts, images, count = [], [], 0
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image":
            count += 1
            images += [part[key] for key in _INLINE_KEYS if isinstance(part.get(key), str)][:1]
        else:
            raise SampleError(f"message {position} holds a part of type {kind!r}; expected 'text' or 'image'")
    return "\n".join(texts), images, count


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError, or bytes that are not UTF-8
        raise DataError(f"{where} is not JSON: {error}; repair or remove the line") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, got {type(record).__name__}; repair or remove the line")
    return record
