"""LLaVA's JSON: a list of ``{"id", "image", "conversations": [{"from", "value"}, ...]}``.

The whole file is parsed at once, as LLaVA's own loader does (665k samples: about 1 GB of JSON). An odd
conversation is that sample's error, found when it is asked for and recorded by the caller; only a
file that is not such a list, or whose ids are no ids, fails as a whole.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sample import Dataset, ImageSource, Sample, Turn, resolve_ids
from vlm_distill_cache.data.sources.grouping import key_of_paths

IMAGE_MARKER = "<image>"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class EntryDataset(Dataset):
    """Samples made of entries in the forms that users have; a reader only says where the parts of an entry lie."""

    @abstractmethod
    def read(self, index: int) -> tuple[Mapping[str, Any], tuple[Turn, ...], tuple[ImageSource, ...]]:
        """The entry at ``index``, its turns and its images; `SampleError` if it cannot be understood."""

    def __getitem__(self, index: int) -> Sample:
        sample_id = self.sample_ids[index]
        try:
            entry, turns, images = self.read(index)
            _refuse_lost_image(entry, images)
        except SampleError as error:
            raise SampleError(f"sample {sample_id!r}: {error}") from error
        return Sample(sample_id=sample_id, images=images, turns=turns)


class LlavaDataset(EntryDataset):
    """A LLaVA JSON file; relative image paths start from ``images``, or from the file's own folder."""

    def __init__(self, path: Path, *, images: Path | None = None) -> None:
        self.name = path.name
        self._images = image_folder(images, path)
        self._entries = _read_entries(path)
        self.sample_ids: Sequence[str] = resolve_ids(
            ((entry.get("id"), entry) for entry in self._entries), where=str(path)
        )

    def read(self, index: int) -> tuple[Mapping[str, Any], tuple[Turn, ...], tuple[ImageSource, ...]]:
        """The entry at ``index``, its turns and its images."""
        entry = self._entries[index]
        images = find_images(entry.get("image"), self._images)
        return entry, parse_conversations(entry.get("conversations")), images

    def image_keys(self) -> list[str | None]:
        """Each sample's image path as the file writes it; None without one."""
        return [key_of_paths(entry.get("image")) for entry in self._entries]


def _refuse_lost_image(record: Mapping[str, Any], images: Sequence[ImageSource]) -> None:
    """Refuse an entry, in any form, that asks about an image it does not have: it would be cached as text alone."""
    first = (record.get("messages") or record.get("conversations") or [{}])[0]
    content = first.get("content", first.get("value", record.get("question")))
    parts = content if isinstance(content, list) else [{"text": content}]
    if not images and any(part.get("type") == "image" or IMAGE_MARKER in (part.get("text") or "") for part in parts):
        raise SampleError(f"the first question has {IMAGE_MARKER}, but the entry names no image")


def parse_conversations(conversations: Any) -> tuple[Turn, ...]:
    """Turns of a LLaVA conversation: a list of ``{"from": "human"|"gpt", "value": str}``, beginning with a human."""
    if not isinstance(conversations, list) or not conversations:
        raise SampleError(f"'conversations' must be a list of messages, got {_brief(conversations)}")
    messages = []
    for message in conversations:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise SampleError(f"a message must hold 'from' and a text 'value', got {_brief(message)}")
        role = message.get("from")
        if not isinstance(role, str) or role not in _ROLES:
            raise SampleError(
                f"message from {role!r}; only 'human' and 'gpt' are supported (a system prompt belongs to "
                "the prompt template)"
            )
        messages.append((_ROLES[role], message["value"]))
    return pair_turns(messages)


def pair_turns(messages: Sequence[tuple[str, str]]) -> tuple[Turn, ...]:
    """Pair alternating messages to turns and take the image marker out of the first question.

    As LLaVA does, the marker may stand anywhere in the first question: the prompt template puts the
    image in front. A marker in a later turn is left for the encoder to refuse.

    Args:
        messages: ``(role, text)`` with role ``user`` or ``assistant``.

    Raises:
        SampleError: The roles do not alternate from user to assistant, or an answer is empty.
    """
    for position, (role, text) in enumerate(messages):
        expected = "assistant" if position % 2 else "user"
        if role != expected:
            raise SampleError(f"message {position + 1} is the {role}'s, expected the {expected}'s")
        if position % 2 and not text.strip():
            raise SampleError(f"message {position + 1}, an answer, is empty")
    if not messages or len(messages) % 2:
        raise SampleError(f"{len(messages)} messages; expected pairs of question and answer")
    questions = [text.strip() for _, text in messages[0::2]]
    questions[0] = questions[0].replace(IMAGE_MARKER, "").strip()
    answers = [text.strip() for _, text in messages[1::2]]
    return tuple(Turn(question=question, answer=answer) for question, answer in zip(questions, answers, strict=True))


def find_images(value: Any, root: Path) -> tuple[ImageSource, ...]:
    """Image files that a path or a list of paths below ``root``, or absolute ones, name; none for a text-only entry."""
    if value is None or value == "" or value == []:
        return ()
    return tuple(_image_file(item, root) for item in (value if isinstance(value, list) else [value]))


def _image_file(value: Any, root: Path) -> ImageFile:
    if not isinstance(value, str) or not value:
        raise SampleError(f"an image must be given by its path, got {_brief(value)}")
    if "://" in value or value.startswith("data:"):
        raise SampleError(f"image {value[:60]!r} is not a file; nothing is downloaded, so store it beside the data")
    path = Path(value)
    if path.is_absolute():
        return ImageFile(path, hint="the data names it by this absolute path")
    if ".." in path.parts:
        raise SampleError(f"image path {value!r} leaves the image folder; use a path below it or an absolute one")
    # Reasons of failure are kept in the cache: they name no folder of this machine.
    hint = "image paths are relative to the data file; set images to another folder"
    return ImageFile(root / path, hint=hint, shown=value)


def image_folder(images: Path | None, path: Path) -> Path:
    """The folder relative image paths start from; `DataError` if ``images`` is given but is no folder."""
    if images is not None and not images.is_dir():
        raise DataError(
            f"image folder {images} does not exist; set images to the folder the paths in {path} start from"
        )
    return path.parent if images is None else images


def _read_entries(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        remedy = "one JSON object a line belongs in a file ending in .jsonl"
        raise DataError(f"{path} cannot be read as JSON: {error}; {remedy}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: expected a list of samples, got {_brief(entries)}")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(f"{path}: entry {position} must be an object, got {_brief(entry)}")
    if not any("conversations" in entry for entry in entries):
        raise DataError(
            f"{path}: no entry has 'conversations', so this is not LLaVA's format; it has "
            f"{sorted(entries[0])}; 'messages' belong in a file ending in .jsonl"
        )
    return entries


def _brief(value: Any) -> str:
    return f"{type(value).__name__} {str(value)[:60]!r}"
