"""What is said about a picture: turns from any form of entry, and the pictures that the texts themselves name.

The forms, by key: ``messages`` (OpenAI, TRL) or ``conversations`` (LLaVA), a list of messages by user and assistant;
``question`` with ``answer`` or ``answers``; ``caption``. A message is ``{"role", "content"}`` or ``{"from", "value"}``;
its content is a text or a list of parts. A picture may be a part, stand beside the message's text, or in the first
question itself: as a marker of any family, as ``<img>FILE</img>`` (Qwen-VL) or as a Markdown picture.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources.markers import IMAGE_MARKER, take_markers
from vlm_distill_cache.data.sources.pictures import brief, named_pictures, says_none

FORMS = "'messages', 'conversations', 'question' and 'answer' (or 'answers'), or 'caption'"

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image", "image_url", "input_image", "image_path", "image_file", "img", "picture")
# What tells how to speak or to learn, and would be lost: nothing here reads it.
_CONTEXT = ("system", "system_prompt", "history", "tools")
_MARKED = ("tool_calls", "function_call", "reasoning_content", "reasoning")
_PART_KEYS = (*_PICTURES, "path", "url", "source", "base64", "data")
_MESSAGE_KEYS = frozenset({"role", "from", "content", "value"})


@dataclass
class Conversation:
    """Turns, and what they say about pictures.

    Attributes:
        turns: At least one.
        pictures: Those that the messages give, for `data.sources.pictures.open_picture`.
        expected: How many pictures the first question speaks of; those that it names without a number count as one.
    """

    turns: tuple[Turn, ...] = ()
    pictures: list[Any] = field(default_factory=list)
    expected: int = 0


def has_text(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has one of the forms, right or wrong; one whose texts are null or empty has none."""
    if any(not says_none(entry.get(key)) for key in ("messages", "conversations", "caption")):
        return True
    return not says_none(entry.get("question")) and any(key in entry for key in ("answer", "answers"))


def read_conversation(entry: Mapping[str, Any]) -> Conversation:
    """Read what an entry says, whichever form it has.

    Raises:
        SampleError: It has none of the forms, or cannot be understood.
    """
    for key in _CONTEXT:
        if not says_none(entry.get(key)):
            hint = " (a system prompt belongs to the prompt template)" if key.startswith("system") else ""
            raise SampleError(f"{key!r} is not read, and would be lost{hint}")
    for key in ("messages", "conversations"):
        if not says_none(entry.get(key)):
            return _read_messages(entry[key], key)
    if not says_none(question := entry.get("question")):
        answer = _answer_of(entry)
        if isinstance(question, str) and answer is not None:
            _refuse_lost_options(entry, question)
            return _pair_turns([("user", question), ("assistant", answer)], Conversation())
    elif entry.get("caption") is not None:
        return _pair_turns([("user", ""), ("assistant", as_text(entry["caption"], "caption"))], Conversation())
    if entry.get("question") is not None and "answer" in entry:
        raise SampleError(f"'question' must be a text and 'answer' not null, got {brief(entry['answer'])}")
    for key in ("messages", "conversations"):
        if key in entry and "question" not in entry and "caption" not in entry:
            raise SampleError(f"{key!r} must be a list of messages, got {brief(entry[key])}")
    raise SampleError(f"expected {FORMS}, got {brief_keys(entry)}")


def _refuse_lost_options(entry: Mapping[str, Any], question: str) -> None:
    """Refuse an answer that chooses among options which are not in the question: it would mean nothing."""
    for key in ("choices", "options", "candidates"):
        options = entry.get(key)
        texts = list(options.values()) if isinstance(options, Mapping) else options
        if isinstance(texts, list | tuple) and any(str(text).strip() not in question for text in texts):
            raise SampleError(
                f"{key!r} holds what can be answered, but the question does not say it; write it into the question"
            )
    letters = [key for key in "ABCD" if isinstance(entry.get(key), str) and entry[key].strip() not in question]
    if len(letters) > 1:
        raise SampleError(
            f"{letters} hold what can be answered, but the question does not say it; write it into the question"
        )


def brief_keys(entry: Mapping[str, Any]) -> str:
    """The keys of an entry, for errors."""
    keys = sorted(map(str, entry))
    return str(keys if len(keys) <= 12 else [*keys[:12], "..."])


def _answer_of(entry: Mapping[str, Any]) -> str | None:
    """The answer to a question: one, or what most of several people said, the first of equals."""
    for key in ("answer", "multiple_choice_answer"):  # the latter is VQAv2's own majority
        if entry.get(key) is not None and not (says_none(entry[key]) and "answers" in entry):
            return as_text(entry[key], key)
    answers = entry.get("answers")
    if answers is None:
        return None
    given = [item.get("answer") if isinstance(item, Mapping) else item for item in _sequence(answers, "answers")]
    texts = [text for answer in given if (text := as_text(answer, "answers").strip())]
    counted = Counter(text.casefold() for text in texts)
    return next((text for text in texts if text.casefold() == counted.most_common(1)[0][0]), "")


def as_text(value: Any, key: str) -> str:
    """A text, a number as JSON writes it, or a list with one of them.

    Raises:
        SampleError: It is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if isinstance(value, list | tuple) and len(value) == 1 and not isinstance(value[0], list | tuple):
        return as_text(value[0], key)
    if isinstance(value, list | tuple):
        several = "; people's answers to one question belong under 'answers', captions in entries of their own"
        raise SampleError(f"{key!r} is a list of {len(value)}, expected one text{several if len(value) > 1 else ''}")
    raise SampleError(f"{key!r} must be a text or a number, got {brief(value)}")


def _sequence(value: Any, key: str) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise SampleError(f"{key!r} must be a list that is not empty, got {brief(value)}")
    return value


def _read_messages(messages: Any, key: str) -> Conversation:
    if not isinstance(messages, list | tuple) or not messages:
        raise SampleError(f"{key!r} must be a list of messages, got {brief(messages)}")
    found = Conversation()
    plain: list[tuple[str, str]] = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise SampleError(
                f"message {position} must hold 'role' and 'content' (or 'from' and 'value'), got {brief(message)}"
            )
        role = message.get("role") if message.get("role") is not None else message.get("from")
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise SampleError(
                f"message {position} is from {brief(role) if not isinstance(role, str) else repr(role[:60])}; only "
                "'user' and 'assistant' ('human' and 'gpt') are supported (a system prompt belongs to the prompt template)"
            )
        lost = [name for name in _MARKED if not says_none(message.get(name))]
        lost += [name for name in ("loss", "train", "weight") if message.get(name) in (0, False) and name in message]
        if lost and message.get(lost[0]) is not None:
            raise SampleError(f"message {position} has {lost[0]!r}, which is not read, and would be lost")
        content = message.get("content") if message.get("content") is not None else message.get("value")
        text, pictures, count = _read_content(content, position)
        if len(message) > 2:
            pictures += named_pictures({key: message[key] for key in message if key not in _MESSAGE_KEYS})
        if position > 1 and (count or pictures):
            raise SampleError(f"message {position} holds an image; it must be in the first message")
        found.pictures += pictures
        found.expected = max(found.expected, count)
        plain.append((_ROLES[role.lower()], text))
    return _pair_turns(plain, found)


def _read_content(content: Any, position: int) -> tuple[str, list[Any], int]:
    """Text, given pictures and number of picture parts of one message."""
    if not isinstance(content, list | tuple):
        return as_text(content, f"message {position}"), [], 0
    texts, pictures, count = [], [], 0
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise SampleError(f"message {position} must hold a text or a list of parts, got a list of other things")
        kind = part.get("type")
        kind = kind.lower() if isinstance(kind, str) else kind
        given = [part[name] for name in _PART_KEYS if not says_none(part.get(name))]
        has_text = part.get("text") is not None
        if kind not in (*_TEXTS, *_PICTURES) and not (kind is None and (given or has_text)):
            raise SampleError(f"message {position} holds a part of type {brief_kind(kind)}; expected 'text' or 'image'")
        if has_text or kind in _TEXTS:
            texts.append(as_text(part.get("text"), f"message {position}, a text part"))
        if given or kind in _PICTURES:
            found = list(given[0]) if given and isinstance(given[0], list | tuple) else given[:1]
            count += max(1, len(found))
            pictures += found
    return "\n".join(texts), pictures, count


def brief_kind(kind: Any) -> str:
    """The type of a part, for errors."""
    return repr(kind[:60]) if isinstance(kind, str) else brief(kind)


def _pair_turns(messages: Sequence[tuple[str, str]], found: Conversation) -> Conversation:
    """Pair alternating messages to turns and take what stands for the picture out of the first question.

    As LLaVA does, the marker may stand anywhere in the first question, and more than once: the prompt template puts
    the image in front. The plain marker in a later turn is left for the encoder to refuse.

    Args:
        messages: ``(role, text)`` with role ``user`` or ``assistant``.
        found: Completed and returned.

    Raises:
        SampleError: The roles do not alternate from user to assistant, an answer is empty, or a picture or video is
            asked about where none can be read.
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
    answers = [text.strip() for _, text in messages[1::2]]
    questions[0], files, count = take_markers(questions[0])
    found.pictures += files
    found.expected = max(found.expected, count)
    for turn, question in enumerate(questions[1:], start=1):
        plain = question.replace(IMAGE_MARKER, "").strip()
        if take_markers(plain)[0] != plain:
            raise SampleError(f"message {2 * turn + 1} speaks of an image; it must be in the first message")
    found.turns = tuple(
        Turn(question=question, answer=answer) for question, answer in zip(questions, answers, strict=True)
    )
    return found
