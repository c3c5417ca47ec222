"""Lists of messages and rounds, in whatever way a file writes them: as dicts of lists, or as texts of JSON or Python."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeGuard

from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.sources.pictures import MODEL_NAMES, USER_NAMES, files_in, says_none
from vlm_distill_cache.data.sources.printed import printed

MAX_COLUMNS = 10_000
MESSAGE_KEYS = frozenset({"role", "from", "content", "value"})
# Whose a key of a round is.
ROUND = {
    "system": "system",
    **dict.fromkeys((*USER_NAMES, "question", "query"), "user"),
    **dict.fromkeys((*MODEL_NAMES, "answer", "response"), "assistant"),
}

_ALWAYS_LISTS = ("messages", "conversations", "history", "answers")
_ROUNDS = ("conversation", "texts")
# Mostly texts; a list only where it can be nothing but messages.
_TEXTS = "prompt completion chosen question query instruction input problem answer response output solution"
_MESSAGES = tuple(_TEXTS.split())
_FORMS = ("caption", "text")  # further ones, of `data.sources.conversations`
LISTS = (*_ALWAYS_LISTS, *_ROUNDS, "prompt", "completion", "chosen")
_MADE_LISTS = tuple(dict.fromkeys((*_ALWAYS_LISTS, *_ROUNDS, *_MESSAGES)))
_ALL_FORMS = (*_FORMS, *LISTS, *_MESSAGES)
_WHOSE, _SAID = r"""["'](?:role|from)["']\s*:""", r"""["'](?:content|value)["']\s*:"""
_BEGINS_AS_MESSAGES = re.compile(rf"\s*\[\s*\{{\s*(?:{_WHOSE}|{_SAID})")


def repeated_columns(names: Sequence[str], where: str) -> str:
    """The first names that stand more than once among a table's columns, in words; empty if none does.

    Raises:
        DataError: There are more than `MAX_COLUMNS`.
    """
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{where} has {len(names)} columns, expected at most {MAX_COLUMNS}; take out those that no form of entry has"
        )
    return ", ".join(sorted(name for name, count in Counter(names).items() if count > 1)[:3])


class Rows(dict[str, Any]):
    """An entry as `with_rows` makes it."""


def with_rows(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """An entry whose lists of messages and files are lists: `datasets` keeps some as dicts of lists, and tables as texts.

    A text is a list of messages where the whole of it is one, as JSON or as Python prints it. What is no such list, or
    has lists of different lengths, stays as it is. Of a list of a video's captions the one of the whole is its caption,
    and ``QA`` (VideoChat2, TimeChat) is a conversation.

    An entry that was made so stays as it is.

    Raises:
        SampleError: Answers are a list of texts that cannot be read.
    """
    if isinstance(entry, Rows):
        return entry
    texts = ((key, value) for key, value in entry.items() if isinstance(value, str))
    made: dict[str, Any] = {key: files for key, text in texts if (files := files_in(key, text)) is not None}
    for key in [key for key in _MADE_LISTS if key in entry]:
        value = entry[key]
        if isinstance(value, str) and (found := _listed(value, key)) is not None:
            made[key] = value = found
        if key in LISTS and is_dict_of_lists(value):
            with suppress(SampleError):
                made[key] = rows_of(value, key)
    if "QA" in entry and (rounds := _rounds_of(entry["QA"])) and all(says_none(entry.get(key)) for key in _ALL_FORMS):
        made["conversations"] = rounds
    if "caption" not in entry and (whole := _whole_caption(entry.get("captions"))) is not None:
        made["caption"] = whole
    return Rows({**entry, **made})


def _rounds_of(listed: Any) -> list[dict[str, Any]]:
    """The rounds of a list of ``{"i", "q", "a"}``, instruction, question and answer; empty if it is none."""
    if not is_list_of_rows(listed) or not all(isinstance(row, Mapping) and {"q", "a"} <= row.keys() for row in listed):
        return []
    texts = [[row.get(name) for name in ("i", "q")] for row in listed]
    asked = ["\n".join(text for text in said if isinstance(text, str) and text.strip()) for said in texts]
    return [{"human": question, "gpt": row["a"]} for question, row in zip(asked, listed, strict=True)]


def _whole_caption(captions: Any) -> Any:
    """Of a video's captions, ``{"idx", "content"}`` (ShareGPT4Video), the one of all of it, number -1; None without one."""
    if not is_list_of_rows(captions) or not all(isinstance(row, Mapping) for row in captions):
        return None
    return next((row.get("content") for row in captions if str(row.get("idx")).strip() == "-1"), None)


def is_dict_of_lists(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value holds one list for each key, or nothing."""
    if isinstance(value, str | list) or not isinstance(value, Mapping):
        return False
    filled = [item for item in value.values() if item is not None]
    return bool(filled) and all(isinstance(item, list | tuple) for item in filled)


def rows_of(value: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """The rows of a dict of lists; `SampleError` if these have different lengths."""
    filled = {name: items for name, items in value.items() if items is not None}
    lengths = {name: len(items) for name, items in filled.items()}
    if len(set(lengths.values())) > 1:
        raise SampleError(
            f"{where!r} is a dict of lists of different lengths: {lengths}; expected one item of each a row"
        )
    return [dict(zip(filled, row, strict=True)) for row in zip(*filled.values(), strict=True)]


def are_rows(value: Any) -> bool:
    """Whether a value is a list of messages or rounds, as far as its first one tells, also as a dict of lists."""
    if isinstance(value, Mapping):
        return {*ROUND, *MESSAGE_KEYS} & value.keys() != set() and is_dict_of_lists(value)
    return is_list_of_rows(value)


def is_list_of_rows(value: Any) -> bool:
    """Whether a value is a list that begins with an object."""
    return isinstance(value, list | tuple) and bool(value) and isinstance(value[0], Mapping)


def refuse_unread_rows(text: str, key: str) -> None:
    """Refuse a text that begins as a list of messages does and is none: it would be learnt as it stands.

    Raises:
        SampleError: Says so.
    """
    if (begins := _BEGINS_AS_MESSAGES.match(text)) and all(re.search(sign, text) for sign in (_WHOSE, _SAID)):
        raise SampleError(
            f"{key!r} begins as a list of messages does ({text[: begins.end()][:60]!r}), but is neither JSON nor a list as "
            "Python prints it; write it with json.dumps, or as a list"
        )


def parts_of(text: str) -> list[Any] | None:
    """The parts of a message whose content is a list of them, written as a text; None if the text is a plain one."""
    if "type" not in text or (found := printed(text)) is None or not is_list_of_rows(found):
        return None
    typed = all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in found)
    return list(found) if typed and any({"text", "image", "image_url"} & part.keys() for part in found) else None


def _listed(text: str, key: str) -> Any:
    """What a text in a list's place holds; None if it is a text."""
    mostly_text = key in _MESSAGES
    if mostly_text and not ("role" in text or "from" in text):
        return None
    found = printed(text, where=repr(key) if key == "answers" else "")
    if key in _ALWAYS_LISTS:
        return found
    rows = [found] if isinstance(found, Mapping) and mostly_text else found
    if not is_list_of_rows(rows):
        return rows if key in _ROUNDS and are_rows(rows) else None
    known = [
        row for row in rows if isinstance(row, Mapping) and (_is_message(row) or (not mostly_text and _is_round(row)))
    ]
    return rows if len(known) == len(rows) else None


def _is_message(row: Mapping[str, Any]) -> bool:
    return bool({"role", "from"} & row.keys()) and bool({"content", "value"} & row.keys())


def _is_round(row: Mapping[str, Any]) -> bool:
    return bool(ROUND.keys() & row.keys())
