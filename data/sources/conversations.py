"""What is said about a picture: turns from any form of entry, and the pictures that the texts themselves name.

`_FORMS` lists the forms by key, and whose they are. A list holds messages, ``{"role", "content"}`` or ``{"from",
"value"}``, or rounds, ``{"user", "assistant"}``; a message's content is a text or a list of parts. A picture or video
may be a part, stand beside the message's text, or in any question itself: as a marker of any family, as
``<img>FILE</img>`` (Qwen-VL) or as a Markdown picture. A system prompt is the first message, or stands under a key of
its own.

What is answered worse (``rejected``, ``rejected_response``) is not learnt. A leading message of the model's, which
answers nothing, is passed over, as LLaVA does.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.recognise import names_picture
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources.markers import (
    Kind,
    Piece,
    Shown,
    numbers_in,
    read_markers,
    take_markers,
    without_markers,
)
from vlm_distill_cache.data.sources.options import says_nothing, with_options, with_options_beside
from vlm_distill_cache.data.sources.pictures import (
    MAPPING,
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
from vlm_distill_cache.data.sources.unlearnt import (
    flags_of,
    refuse_bad_answer,
    refuse_stand_ins,
    refuse_unlearnt,
)
from vlm_distill_cache.data.sources.videos import keys_of_videos, named_videos, part_videos

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
    "instruction": (_ASKS, ("output", "outputs", "chosen")),  # Alpaca, LLaMA-Factory; M3IT
    "problem": (_ASKS, ("solution",)),
    "input": (_ASKS, ("output",)),
    "chosen": (_LIST, ()),  # TRL's preferences with the prompt inside
    "text": (_TELLS, ()),  # Hugging Face's imagefolder; only beside a picture
}
_ANSWERS = tuple(dict.fromkeys(name for _, names in _FORMS.values() for name in names))
_PLAIN = ("messages", "conversations", "question", "caption")  # taken for what they are, right or wrong
# A question's further text: what it asks about stands behind it, as in Dolly; a hint in front, as for ScienceQA.
PASSAGES = ("context", "contexts", "passage", "passages", "paragraph", "paragraphs", "article")
_JOINED = {"instruction": ("input", "inputs", *PASSAGES)}
_HINT = "hint"

_ROLES = {
    **dict.fromkeys(USER_NAMES, "user"),
    **dict.fromkeys(MODEL_NAMES, "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TOOLS = ("tool", "tool_call", "tool_calls", "tool_response", "function", "function_call", "observation", "ipython")
_TEXTS = ("text", "input_text", "output_text")
_PICTURES = ("image", "image_url", "input_image", "image_path", "image_file", "img", "picture")
_VIDEOS = ("video", "video_url", "input_video", "video_path", "video_file")
_PLACES = ("path", "url", "source", "base64", "data")


@dataclass
class Conversation:
    """Turns, and what they say about pictures and videos.

    Attributes:
        form: The key that they stand under.
        turns: At least one, without what their questions show.
        asked: Each question as texts and what it shows between them.
        system: The system prompt; empty if there is none.
        speaks: The first question speaks of a picture without a marker.
    """

    form: str = ""
    turns: tuple[Turn, ...] = ()
    asked: tuple[tuple[Piece, ...], ...] = ()
    system: str = ""
    speaks: bool = False

    @property
    def expected(self) -> int:
        """How many pictures and videos the questions speak of; those that are marked without a number count as one."""
        shown = [piece for pieces in self.asked for piece in pieces if isinstance(piece, Shown)]
        numbers = {number for pieces in self.asked for number in numbers_in(pieces)}
        return max(len(numbers), int(bool(shown) or self.speaks))

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
        plain = [_Message(1, "user", ""), _Message(2, "assistant", as_text(entry[found.form], found.form))]
    else:
        messages = _listed_messages(entry, found.form) if kind == _LIST else _asked_messages(entry, found.form)
        plain = _read_messages(messages, found)
        if kind == _LIST:
            plain = _with_options_beside(entry, plain)
    for key, value in entry.items():
        if normal_key(key) in SYSTEM_KEYS and not says_none(value):
            _take_system(as_text(value, key), found)
    _pair_turns(plain, found)
    refuse_stand_ins(entry, [message.text for message in plain])
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
    if not isinstance(message, MAPPING):
        return None
    role = message.get("role")
    role = message.get("from") if role is None else role
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


@dataclass(frozen=True)
class _Message:
    """A message: its text, and what it shows.

    Attributes:
        parts: What is a part of its content, and at which character of the text.
        beside: What stands under other keys of it.
    """

    position: int
    role: str
    text: str
    parts: tuple[tuple[int, Shown], ...] = ()
    beside: tuple[Shown, ...] = ()


def _read_messages(messages: Sequence[Any], found: Conversation) -> list[_Message]:
    """Messages with what they show; the system prompt goes to ``found``."""
    plain: list[_Message] = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping):
            raise SampleError(
                f"message {position} must hold 'role' and 'content' (or 'from' and 'value'), got {brief(message)}"
            )
        role = _known_role(message, position)
        # What the model says first answers nothing, and is passed over.
        answers = role == "assistant" and any(earlier.role == "user" for earlier in plain)
        refuse_unlearnt(message, position, answers=answers)
        content = message.get("content") if message.get("content") is not None else message.get("value")
        if role == "system" and content is None:
            content = ""
        text, parts = _read_content(content, position)
        beside: tuple[Shown, ...] = ()
        if len(message) > 2:
            further = {key: message[key] for key in message if key not in MESSAGE_KEYS}
            keys = keys_of_videos(further)
            beside = tuple(Shown(value=value) for value in named_pictures(further, video_keys=keys))
            beside += tuple(Shown(kind="video", value=value) for value in named_videos(further, keys))
        if role == "system" and position > 1:
            raise SampleError(f"message {position} is a system prompt; it must be the first message")
        if (parts or beside) and role != "user":
            kind = (*(shown for _, shown in parts), *beside)[0].kind
            article = "an" if kind == "image" else "a"
            raise SampleError(f"message {position} holds {article} {kind}; it must be in a question")
        if role == "system":
            _take_system(text, found)
        else:
            plain.append(_Message(position, role, text, parts, beside))
    return plain


def _with_options_beside(entry: Mapping[str, Any], plain: Sequence[_Message]) -> list[_Message]:
    """Messages whose one question is asked with the options that stand beside them in the entry."""
    *before, asks, answers = plain if len(plain) > 1 else [_Message(1, "", "")] * 2
    if (asks.role, answers.role) != ("user", "assistant") or [each.role for each in before] not in ([], ["assistant"]):
        return list(plain)
    asked, said = with_options_beside(entry, asks.text, answers.text)
    at = max(0, asked.find(asks.text.strip())) - (len(asks.text) - len(asks.text.lstrip()))
    parts = tuple((min(max(0, offset + at), len(asked)), shown) for offset, shown in asks.parts)
    return [*before, replace(asks, text=asked, parts=parts), replace(answers, text=said)]


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
        raise SampleError("the system prompt speaks of an image; it must be in a question")
    found.system = text or found.system


def _read_content(content: Any, position: int) -> tuple[str, tuple[tuple[int, Shown], ...]]:
    """The text of one message, its text parts joined by line feeds, and where in it other parts stand."""
    if is_dict_of_lists(content):
        content = rows_of(content, f"message {position}")
    if isinstance(content, str):
        content = parts_of(content) or content
    if not isinstance(content, list | tuple):
        return as_text(content, f"message {position}"), ()
    texts: list[str] = []
    shown: list[tuple[int, Shown]] = []  # in front of which text
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise SampleError(f"message {position} must hold a text or a list of parts, got a list of other things")
        text, found = _read_part(part, position)
        # Beside a picture its own text stands behind it.
        shown += [(len(texts), one) for one in found]
        texts += [] if text is None else [text]
    starts = list(accumulate((len(text) + 1 for text in texts), initial=0))
    joined = "\n".join(texts)
    places: list[tuple[int, Shown]] = []
    for number, (behind, one) in enumerate(shown):
        first = not number or shown[number - 1][0] != behind
        is_joint = first and 0 < behind < len(texts)
        places.append((min(starts[behind], len(joined)), replace(one, alone="\n") if is_joint else one))
    return joined, tuple(places)


def _read_part(part: Mapping[str, Any], position: int) -> tuple[str | None, list[Shown]]:
    """The text of a part of a message, None without one, and the pictures or videos that it is."""
    kind = part.get("type")
    kind = kind.lower() if isinstance(kind, str) else kind
    moves = kind in _VIDEOS or (kind not in _PICTURES and any(not says_none(part.get(name)) for name in _VIDEOS))
    names = (*(_VIDEOS if moves else _PICTURES), *_PLACES)
    given = [part[name] for name in names if not says_none(part.get(name))]
    has_text = part.get("text") is not None
    if kind not in (*_TEXTS, *_PICTURES, *_VIDEOS) and not (kind is None and (given or has_text)):
        raise SampleError(
            f"message {position} holds a part of type {brief_kind(kind)}; expected 'text', 'image' or 'video'"
        )
    text = as_text(part.get("text"), f"message {position}, a text part") if has_text or kind in _TEXTS else None
    if not given and kind not in (*_PICTURES, *_VIDEOS):
        return text, []
    what: Kind = "video" if moves else "image"
    if moves:
        values = part_videos(part, given[0]) if given else []
    else:
        values = list(given[0]) if given and isinstance(given[0], list | tuple) else given[:1]
    if values:
        return text, [Shown(kind=what, value=value, is_part=True) for value in values]
    index = part.get("index")  # which of the entry's pictures, counted from 0
    number = index + 1 if isinstance(index, int) and not isinstance(index, bool) and index >= 0 else None
    return text, [Shown(kind=what, number=number, is_part=True)]


def brief_kind(kind: Any) -> str:
    """The type of a part, for errors."""
    return repr(kind[:60]) if isinstance(kind, str) else brief(kind)


def _pair_turns(messages: Sequence[_Message], found: Conversation) -> None:
    """Pair alternating messages to turns, and find what their questions show.

    As LLaVA does, a leading message of the model's is passed over.

    Args:
        messages: With role ``user`` or ``assistant``.
        found: Completed.

    Raises:
        SampleError: The roles do not alternate from user to assistant, or an answer is empty.
    """
    if len(messages) > 2 and messages[0].role == "assistant":
        if take_markers(messages[0].text)[2]:
            raise SampleError(f"message {messages[0].position} speaks of an image; it must be in a question")
        messages = messages[1:]
    for place, message in enumerate(messages):
        expected = "assistant" if place % 2 else "user"
        if message.role != expected:
            raise SampleError(f"message {message.position} is the {message.role}'s, expected the {expected}'s")
        if place % 2 and not message.text.strip():
            raise SampleError(f"message {message.position}, an answer, is empty")
    if not messages or len(messages) % 2:
        raise SampleError(f"{len(messages)} messages; expected pairs of question and answer")
    questions = []
    for number, message in enumerate(messages[0::2]):
        pieces, mentions = read_markers(message.text, message.parts)
        questions.append(_with_beside(message, pieces))
        found.speaks = found.speaks or (mentions and not number)
    found.asked = tuple(questions)
    found.turns = tuple(
        Turn(question=without_markers(pieces), answer=answer.text.strip())
        for pieces, answer in zip(questions, messages[1::2], strict=True)
    )


def _with_beside(message: _Message, pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """The pieces of a question with what stands beside its text: at its markers, or in front where it has none.

    Raises:
        SampleError: The markers are more or fewer.
    """
    for kind in ("image", "video"):
        beside = [one for one in message.beside if one.kind == kind]
        marks = [p for p in pieces if isinstance(p, Shown) and p.kind == kind and p.value is None]
        if not beside:
            continue
        if not marks:
            pieces = (*beside, *pieces)
        elif len(marks) == len(beside) and all(mark.number is None for mark in marks):
            left = iter(beside)
            pieces = tuple(
                replace(p, value=next(left).value) if isinstance(p, Shown) and p in marks else p for p in pieces
            )
        elif len(beside) == 1 and message.position <= 2:  # however often it is marked, the one picture is meant
            value = beside[0].value
            first = pieces.index(marks[0])
            pieces = tuple(
                replace(p, value=value) if place == first and isinstance(p, Shown) else p
                for place, p in enumerate(pieces)
                if place == first or p not in marks
            )
        else:
            raise SampleError(
                f"message {message.position} has {len(marks)} markers of {kind}s and {len(beside)} {kind}s beside its text; "
                "give one for each"
            )
    return pieces
