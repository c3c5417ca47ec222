"""What is said about a picture: turns from any form of entry, and the pictures that the texts themselves name.

`_FORMS` lists the forms by key, and whose they are. A list holds messages, ``{"role", "content"}`` or ``{"from",
"value"}``, or rounds, ``{"user", "assistant"}``; a message's content is a text or a list of parts. A picture may be a
part, stand beside the message's text, or in the first question itself: as a marker of any family, as
``<img>FILE</img>`` (Qwen-VL) or as a Markdown picture. A system prompt is the first message, or stands under a key of
its own.

What is answered worse (``rejected``, ``rejected_response``) is not learnt. A leading message of the model's, which
answers nothing, is passed over, as LLaVA does.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.recognise import names_picture
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources.markers import IMAGE_MARKER, take_markers
from vlm_distill_cache.data.sources.options import says_nothing, with_options, with_options_beside
from vlm_distill_cache.data.sources.pictures import (
    MODEL_NAMES,
    SYSTEM_KEYS,
    USER_NAMES,
    brief,
    named_pictures,
    normal_key,
    says_none,
    speak_of_pictures,
)
from vlm_distill_cache.data.sources.rows import (
    LISTS,
    MESSAGE_KEYS,
    ROUND,
    are_rows,
    is_dict_of_lists,
    is_list_of_rows,
    parts_of,
    refuse_unread_rows,
    rows_of,
    with_rows,
)
from vlm_distill_cache.data.sources.unlearnt import flags_of, refuse_bad_answer, refuse_unlearnt

FORMS = "'messages', 'conversations', 'question' and 'answer', 'caption' or another form that docs/families.md lists"

_LIST, _ASKS, _TELLS = "a list of messages or rounds", "a question, answered under another key", "a description"
# In this order; the first that an entry has is read. Where a question is answered, its own keys first.
_FORMS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "messages": (_LIST, ()),  # OpenAI, TRL, ms-swift
    "conversations": (_LIST, ()),  # LLaVA, ShareGPT
    "question": (_ASKS, ("answer", "multiple_choice_answer", "answers")),  # VQAv2 and its like
    "caption": (_TELLS, ()),
    "conversation": (_LIST, ()),  # ms-swift
    "texts": (_LIST, ()),  # the_cauldron, FineVision
    "query": (_ASKS, ("response",)),  # ms-swift
    "prompt": (_ASKS, ("completion", "chosen")),  # TRL: texts, or lists of messages
    "instruction": (_ASKS, ("output", "chosen")),  # Alpaca, LLaMA-Factory
    "problem": (_ASKS, ("solution",)),
    "input": (_ASKS, ("output",)),
    "chosen": (_LIST, ()),  # TRL's preferences with the prompt inside
    "text": (_TELLS, ()),  # Hugging Face's imagefolder; only beside a picture
}
_ANSWERS = tuple(dict.fromkeys(name for _, names in _FORMS.values() for name in names))
_PLAIN = ("messages", "conversations", "question", "caption")  # taken for what they are, right or wrong
# A question's further text: what it asks about stands behind it, as in Dolly; a hint in front, as for ScienceQA.
PASSAGES = ("context", "contexts", "passage", "passages", "paragraph", "paragraphs", "article")
_JOINED = {"instruction": ("input", *PASSAGES)}
_HINT = "hint"

_ROLES = {
    **dict.fromkeys(USER_NAMES, "user"),
    **dict.fromkeys(MODEL_NAMES, "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOLS = ("tool", "tool_call", "tool_calls", "tool_response", "function", "function_call", "observation", "ipython")
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image", "image_url", "input_image", "image_path", "image_file", "img", "picture")
# ms-swift's and LLaMA-Factory's signs for what stands under a key.
_STAND_FOR = {"<bbox>": ("objects",), "<ref-object>": ("objects",), "<audio>": ("audio", "audios")}
_PART_KEYS = (*_PICTURES, "path", "url", "source", "base64", "data")


@dataclass
class Conversation:
    """Turns, and what they say about pictures.

    Attributes:
        form: The key that they stand under.
        turns: At least one.
        system: The system prompt; empty if there is none.
        pictures: Those that the messages give, for `data.sources.pictures.open_picture`.
        expected: How many pictures the first question speaks of; those that it names without a number count as one.
    """

    form: str = ""
    turns: tuple[Turn, ...] = ()
    system: str = ""
    pictures: list[Any] = field(default_factory=list)
    expected: int = 0

    @property
    def describes(self) -> bool:
        """Whether it is a description of a picture, without a question."""
        return _FORMS[self.form][0] == _TELLS


def forms_in(entry: Mapping[str, Any]) -> list[str]:
    """The forms that an entry has, right or wrong, by their keys; the first is the one that is read.

    Where a text is null or empty there is no form, and a new kind of key is one only where all of it is there: a
    ``prompt`` without an answer is some other data's, and so is a list of ``texts`` that are no rounds.
    """
    return [key for key, (kind, _) in _FORMS.items() if not says_none(entry.get(key)) and _is_form(entry, key, kind)]


def unread_forms(entry: Mapping[str, Any], form: str) -> list[str]:
    """What an entry says, or asks, under the key of another form than the one that is read."""
    parts = {form, "chosen", _answer_key(entry, form), *_joined_keys(form)}
    forms = forms_in(entry)
    asked = [key for key, (kind, _) in _FORMS.items() if kind == _ASKS and not says_none(entry.get(key))]
    return [key for key in _FORMS if key in (*forms, *asked) and key not in parts]


def has_text(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has a form whose keys mean nothing else in any data, so that no text beside it is needed."""
    return any(key in _PLAIN for key in forms_in(entry))


def is_entry(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has one of the forms; a ``text`` only beside something that is called a picture."""
    entry = with_rows(entry)
    forms = forms_in(entry)
    return forms not in ([], ["text"]) or (
        bool(forms) and speak_of_pictures(key for key in entry if not says_none(entry[key]))
    )


def are_columns(columns: Sequence[str], *, pictures: bool) -> bool:
    """Whether a table's columns can hold one of the forms.

    Args:
        pictures: Whether one of them is known to hold pictures, whatever it is called.
    """
    named = dict.fromkeys(columns, "x")
    lists = any(kind == _LIST and key in named for key, (kind, _) in _FORMS.items())
    return lists or "question" in named or is_entry(named) or ("text" in named and pictures)


def _is_form(entry: Mapping[str, Any], key: str, kind: str) -> bool:
    if key == "question":
        return any(name in entry for name in _ANSWERS)
    if kind == _ASKS:
        return any(not says_none(entry.get(name)) for name in _ANSWERS)
    return kind == _TELLS or key in _PLAIN or are_rows(entry[key])


def read_conversation(entry: Mapping[str, Any]) -> Conversation:
    """Read what an entry says, whichever form it has.

    Raises:
        SampleError: It has none of the forms, or cannot be understood.
    """
    entry = with_rows(entry)
    if not says_none(entry.get("tools")):
        raise SampleError("'tools' is not read, and would be lost")
    found = Conversation(form=_form_of(entry))
    kind = _FORMS[found.form][0]
    refuse_bad_answer(entry, _answer_key(entry, found.form))
    if kind != _ASKS and not says_none(entry.get("history")):
        raise SampleError(f"'history' beside {found.form!r} is not read, and would be lost")
    for key in (found.form, _answer_key(entry, found.form), "history"):
        if key in LISTS and is_dict_of_lists(entry.get(key)):
            rows_of(entry[key], key)  # their lengths differ
    if kind == _TELLS:
        plain = [(1, "user", ""), (2, "assistant", as_text(entry[found.form], found.form))]
    else:
        messages = _listed_messages(entry, found.form) if kind == _LIST else _asked_messages(entry, found.form)
        plain = _read_messages(messages, found)
        if kind == _LIST:
            plain = _with_options_beside(entry, plain)
    for key, value in entry.items():
        if normal_key(key) in SYSTEM_KEYS and not says_none(value):
            _take_system(as_text(value, key), found)
    _pair_turns(plain, found)
    for sign, keys in _STAND_FOR.items():
        for key in keys:
            if not says_none(entry.get(key)) and any(sign in text for _, _, text in plain):
                raise SampleError(f"{sign} stands for what {key!r} holds, which is not read, and would be lost")
    return found


def _form_of(entry: Mapping[str, Any]) -> str:
    """The form that is read; a question without an answer is never passed over for one further down."""
    forms = forms_in(entry) or [key for key in ("caption",) if entry.get(key) is not None]  # an empty one is named so
    asked = not says_none(entry.get("question")) and "question" not in forms
    if forms and (not asked or forms[0] in ("messages", "conversations")):
        return forms[0]
    for key in ("messages", "conversations"):
        if key in entry and "question" not in entry and "caption" not in entry:
            raise SampleError(f"{key!r} must be a list of messages, got {brief(entry[key])}")
    raise SampleError(f"expected {FORMS}, got {brief_keys(entry)}")


def _listed_messages(entry: Mapping[str, Any], form: str) -> list[Any]:
    """The messages of a list, and the better answer beside one that ends with a question."""
    if not isinstance(entry[form], list | tuple) or not entry[form]:
        raise SampleError(f"{form!r} must be a list of messages, got {brief(entry[form])}")
    messages = _opened(entry[form])
    chosen = entry.get("chosen")
    if form != "chosen" and isinstance(chosen, Mapping | list | tuple) and _role(messages[-1]) == "user":
        messages += _opened([chosen] if isinstance(chosen, Mapping) else chosen)
    return messages


def _asked_messages(entry: Mapping[str, Any], form: str) -> list[Any]:
    """A question with its answer as messages, behind those of its history."""
    name = _answer_key(entry, form)
    question, answer = entry[form], entry[name]
    asked = _opened(question) if is_list_of_rows(question) else [{"role": "user", "content": question}]
    if not is_list_of_rows(question):
        if not isinstance(question, str) or answer is None:
            odd = answer if isinstance(question, str) else question
            raise SampleError(f"{form!r} must be a text and {name!r} not null, got {brief(odd)}")
        refuse_unread_rows(question, form)
        asked[0]["content"] = question = _with_further(entry, form)
    history = _opened(_history(entry["history"])) if not says_none(entry.get("history")) else []
    answered = [answer] if isinstance(answer, Mapping) and _role(answer) else answer
    if name == "answers" or not is_list_of_rows(answered):
        text = _most_said(answer) if name == "answers" else as_text(answer, name)
        refuse_unread_rows(text, name)
        if form not in _PLAIN and names_picture(text):
            raise SampleError(f"{name!r} names a picture ({text[:60]!r}); expected the words that are to be learnt")
        if isinstance(question, str):
            number = answer if isinstance(answer, int | float) else text
            asked[0]["content"], text = with_options(entry, question, number, text)
        return [*history, *asked, {"role": "assistant", "content": text}]
    if isinstance(question, str):
        asked[0]["content"] = question = with_options(entry, question, "", "")[0]
    answered = _opened(answered)
    if _role(answered[0]) == "assistant":
        return [*history, *asked, *answered]
    # The prompt is in there once more.
    first = next((str(message.get("content")) for message in answered if _role(message) == "user"), "")
    repeats = answered[: len(asked)] == asked if is_list_of_rows(question) else question.strip() in first
    if history or not repeats:
        raise SampleError(f"{name!r} is a conversation of its own, which does not begin with {form!r}")
    return answered


def _joined_keys(form: str) -> tuple[str, ...]:
    """Where the further text of a question stands."""
    return _JOINED.get(form, PASSAGES) if _FORMS[form][0] == _ASKS else ()


def _with_further(entry: Mapping[str, Any], form: str) -> str:
    """A question with the text that it asks about and its hint, unless it holds these already."""
    question: str = entry[form]
    for key in (*_joined_keys(form), _HINT):
        value = entry.get(key)
        is_input = form == "instruction" and key in ("input", "context")
        if says_none(value) or (isinstance(value, int | float) and not is_input):  # a passage's number
            continue
        if key == _HINT and says_nothing(value):
            continue
        texts = value if isinstance(value, list | tuple) else [value]
        text = "\n".join(as_text(item, key) for item in texts)
        if is_input or text.strip() not in entry[form]:
            question = f"{text}\n{question}" if key == _HINT else f"{question}\n{text}"
    return question


def _history(history: Any) -> list[Any]:
    """Earlier turns: pairs of texts, messages or rounds."""
    if not isinstance(history, list | tuple):
        raise SampleError(f"'history' must be a list of pairs of question and answer, got {brief(history)}")
    rows = []
    for row in history:
        if isinstance(row, list | tuple) and len(row) == 2:
            rows.append({"user": row[0], "assistant": row[1]})
        elif isinstance(row, Mapping):
            rows.append(dict(row))
        else:
            raise SampleError(f"'history' must hold pairs of question and answer, got {brief(row)}")
    return rows


def _opened(rows: Iterable[Any]) -> list[Any]:
    """Messages, each round opened to its own."""
    messages: list[Any] = []
    for row in rows:
        said = [key for key in ROUND if key in row] if isinstance(row, Mapping) and _role(row) is None else []
        if not said or not MESSAGE_KEYS.isdisjoint(key for key in row if row[key] is not None):
            messages.append(row)
            continue
        beside = {key: value for key, value in row.items() if key not in said and key != "source"}
        for role in ("system", "user", "assistant"):
            texts = [row[key] for key in said if ROUND[key] == role]
            text = next((text for text in texts if text is not None), None)
            if texts and not (role == "system" and says_none(text)):
                more = beside if role == "user" else dict(flags_of(beside)) if role == "assistant" else {}
                messages.append({"role": role, "content": text} | more)
    return messages


def _role(message: Any) -> str | None:
    """Whose a message is, as we call it; None if it does not say, or says something else."""
    if not isinstance(message, Mapping):
        return None
    role = message.get("role") if message.get("role") is not None else message.get("from")
    return _ROLES.get(role.lower()) if isinstance(role, str) else None


def brief_keys(entry: Mapping[str, Any]) -> str:
    """The keys of an entry, for errors."""
    keys = sorted(map(str, entry))
    return str(keys if len(keys) <= 12 else [*keys[:12], "..."])


def _answer_key(entry: Mapping[str, Any], form: str) -> str:
    """Where the answer to a question stands: the first key that is filled, its own before others; else one that is there."""
    kind, own = _FORMS[form]
    names = dict.fromkeys((*own, *_ANSWERS)) if kind == _ASKS else {}
    filled = (name for name in names if not says_none(entry.get(name)))
    return next(filled, next((name for name in names if name in entry), ""))


def _most_said(answers: Any) -> str:
    """Of several people's answers what most of them said, the first of equals."""
    answers = [answers] if isinstance(answers, Mapping) and isinstance(answers.get("text"), str) else answers
    if not isinstance(answers, list | tuple) or not answers:
        raise SampleError(f"'answers' must be a list that is not empty, got {brief(answers)}")
    given = [item.get("answer", item.get("text")) if isinstance(item, Mapping) else item for item in answers]
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


def _read_messages(messages: Sequence[Any], found: Conversation) -> list[tuple[int, str, str]]:
    """The texts of messages, ``(position, role, text)``; their pictures and the system prompt go to ``found``."""
    plain: list[tuple[int, str, str]] = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise SampleError(
                f"message {position} must hold 'role' and 'content' (or 'from' and 'value'), got {brief(message)}"
            )
        role = _known_role(message, position)
        # What the model says first answers nothing, and is passed over.
        answers = role == "assistant" and any(earlier == "user" for _, earlier, _ in plain)
        refuse_unlearnt(message, position, answers=answers)
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if role == "system" and content is None:
            content = ""
        text, pictures, count = _read_content(content, position)
        if len(message) > 2:
            pictures += named_pictures({key: message[key] for key in message if key not in MESSAGE_KEYS})
        if role == "system" and position > 1:
            raise SampleError(f"message {position} is a system prompt; it must be the first message")
        if (count or pictures) and (role != "user" or any(earlier == "user" for _, earlier, _ in plain)):
            raise SampleError(f"message {position} holds an image; it must be in the first question")
        found.pictures += pictures
        found.expected = max(found.expected, count)
        if role == "system":
            _take_system(text, found)
        else:
            plain.append((position, role, text))
    return plain


def _with_options_beside(entry: Mapping[str, Any], plain: Sequence[tuple[int, str, str]]) -> list[tuple[int, str, str]]:
    """Messages whose one question is asked with the options that stand beside them in the entry."""
    *before, (first, asks, question), (second, answers, answer) = plain if len(plain) > 1 else [(1, "", "")] * 2
    if (asks, answers) != ("user", "assistant") or [role for _, role, _ in before] not in ([], ["assistant"]):
        return list(plain)
    asked, said = with_options_beside(entry, question, answer)
    return [*before, (first, asks, asked), (second, answers, said)]


def _known_role(message: Mapping[str, Any], position: int) -> str:
    if (known := _role(message)) is not None:
        return known
    role = message.get("role") if message.get("role") is not None else message.get("from")
    shown = repr(role[:60]) if isinstance(role, str) else brief(role)
    if isinstance(role, str) and role.lower() in _TOOLS:
        raise SampleError(f"message {position} is from {shown}: conversations with tools are not read")
    raise SampleError(
        f"message {position} is from {shown}; only 'user' and 'assistant' ('human' and 'gpt') and, in front, 'system' are "
        "supported"
    )


def _take_system(text: str, found: Conversation) -> None:
    """Note a system prompt; an entry may give it twice, not two of them."""
    text = text.strip()
    if found.system and text and text != found.system:
        raise SampleError(f"it has two system prompts, {found.system[:60]!r} and {text[:60]!r}; keep one of them")
    if take_markers(text)[2]:
        raise SampleError("the system prompt speaks of an image; it must be in the first question")
    found.system = text or found.system


def _read_content(content: Any, position: int) -> tuple[str, list[Any], int]:
    """Text, given pictures and number of picture parts of one message."""
    if is_dict_of_lists(content):
        content = rows_of(content, f"message {position}")
    if isinstance(content, str):
        content = parts_of(content) or content
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


def _pair_turns(messages: Sequence[tuple[int, str, str]], found: Conversation) -> None:
    """Pair alternating messages to turns and take what stands for the picture out of the first question.

    As LLaVA does, the marker may stand anywhere in the first question, and more than once: the prompt template puts
    the image in front; and a leading message of the model's is passed over. The plain marker in a later turn is left
    for the encoder to refuse.

    Args:
        messages: ``(position, role, text)`` with role ``user`` or ``assistant``.
        found: Completed.

    Raises:
        SampleError: The roles do not alternate from user to assistant, an answer is empty, or a picture or video is
            asked about where none can be read.
    """
    if len(messages) > 2 and messages[0][1] == "assistant":
        if take_markers(messages[0][2])[2]:
            raise SampleError(f"message {messages[0][0]} speaks of an image; it must be in the first question")
        messages = messages[1:]
    for place, (position, role, text) in enumerate(messages):
        expected = "assistant" if place % 2 else "user"
        if role != expected:
            raise SampleError(f"message {position} is the {role}'s, expected the {expected}'s")
        if place % 2 and not text.strip():
            raise SampleError(f"message {position}, an answer, is empty")
    if not messages or len(messages) % 2:
        raise SampleError(f"{len(messages)} messages; expected pairs of question and answer")
    questions = [text.strip() for _, _, text in messages[0::2]]
    answers = [text.strip() for _, _, text in messages[1::2]]
    questions[0], files, count = take_markers(questions[0])
    found.pictures += files
    found.expected = max(found.expected, count)
    for (position, _, _), question in zip(messages[2::2], questions[1:], strict=True):
        plain = question.replace(IMAGE_MARKER, "").strip()
        if take_markers(plain)[0] != plain:
            raise SampleError(f"message {position} speaks of an image; it must be in the first question")
    found.turns = tuple(
        Turn(question=question, answer=answer) for question, answer in zip(questions, answers, strict=True)
    )
