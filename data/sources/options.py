"""Questions with options: where an entry keeps them, which of them its answer chooses, and how they are asked.

Options stand in columns (``A`` to ``Z``, ``choice_a``, ``option1``) or in a list, an object by letter, or a text that holds
such a list, or one a line or between ``|``. An answer is a letter, a number counted from 0, or the option's text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.images.recognise import names_picture
from vlm_distill_cache.data.sources.inline_options import LETTERS, split_options
from vlm_distill_cache.data.sources.pictures import brief, normal_key, says_none
from vlm_distill_cache.data.sources.printed import printed

INSTRUCTION = "Answer with the option's letter from the given choices directly."  # LLaVA's, for letters as answers

_LISTS = ("choices", "options", "candidates")
_MORE_LISTS = frozenset(
    "choice option answer_choices answer_options multiple_choices multi_choice_options mc_options".split()  # noqa: SIM905
)
_SINGULAR = ("choice", "option")  # a text under these is the one that is right
_COLUMN = re.compile(r"(option|choice|opt)s?(?:_([a-z])|_?(\d{1,2}))|(a)_?(\d)")  # a0: NExT-QA's
_NUMBER = re.compile(r"\s*-?\d+\s*")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LABEL = r"(?:[(\[]{0}[)\]]|{0}\s?[.:)])\s*"  # (A), [A], A., A:, A)
_LABELLED = re.compile(_LABEL.format("([A-Za-z])") + r"(.+)", re.DOTALL)
_NUMBERED = re.compile(
    r"(?:[(\[](\d{1,2})[)\]]\s*|(\d{1,2})(?:[)]\s*|\.\s+|:\s+(?=\D)))(.+)", re.DOTALL
)  # (1), 1), 1. with a blank; 1: 2 is a ratio
_SIGNS, _SMALL = " ()[].:,", frozenset(LETTERS.lower())
_OR = re.compile(r"[\s,]*\b(?:or|and)\s+(?:(?:an?|the)\s+)?")  # between options that are mentioned, not listed
_PARTS = re.compile(r"[^\w ]|\b(?:or|and)\b|\A (?:[b-z]|\d{1,2}) \Z")
_NEAR = 24  # characters between two options of a list
_TEXT_KEYS, _LABEL_KEYS = ("text", "value", "content", "option", "choice"), ("label", "key", "id", "letter")


@dataclass(frozen=True)
class Options:
    """What may be answered.

    Attributes:
        texts: At least one, in order, without letters in front.
        where: The keys that they stand under, for errors.
        first: What the first of them is called where they stand under numbers; else 0.
        numbered: Whether they stand under numbers, so that a number as answer is one of these.
        lettered: Whether they stand under letters, so that a letter as answer is one of these.
        numbers: Whether some are numbers, so that a number may be the answer itself.
        commas: Whether nothing but commas parts them, which may be part of one: only its whole text tells which is meant.
    """

    texts: tuple[str, ...]
    where: str
    first: int = 0
    numbered: bool = False
    lettered: bool = False
    numbers: bool = False
    commas: bool = False


def options_of(entry: Mapping[str, Any]) -> Options | None:
    """The options that an entry has; None if there are none.

    Raises:
        SampleError: They cannot be understood: one of them is missing between others, or is no text.
    """
    for key in _keys(entry):
        if (found := _listed(entry[key], key)) is not None:
            return found
    for where, labelled in _columns(entry):
        texts, first = _in_order(labelled, where)
        if len(texts) > 1:
            return replace(_options(texts, where), first=first, numbered="A" not in labelled, lettered="A" in labelled)
    return None


def ask_options(question: str, options: Sequence[str]) -> str:
    """A question with its options below it, a letter in front of each."""
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))])


def lists_options(question: str, options: Sequence[str]) -> bool:
    """Whether a question holds all options, each behind its letter."""
    return all(
        re.search(rf"\b{letter}\b[\s.:)\]]{{0,3}}" + re.escape(text.strip()), question)
        for letter, text in zip(LETTERS, options, strict=False)
    )


def letter_place(answer: Any, options: Sequence[str]) -> int | None:
    """Which option a letter means, alone, in brackets, or in front of the option's text; None if it is no such letter."""
    text = answer.strip() if isinstance(answer, str) else ""
    found = _LETTER.fullmatch(text)
    if found is None and (behind := _LABELLED.fullmatch(text)):
        place = LETTERS.index((behind[1] or behind[2]).upper())
        return place if place < len(options) and plain_option(behind[3]) == plain_option(options[place]) else None
    if found is None or (place := LETTERS.index(found[1].upper())) >= len(options):
        return None
    return place


def number_place(answer: Any, options: Sequence[str], *, first: int = 0) -> int | None:
    """Which option a number means, counted from ``first``; None if it is no such number."""
    if isinstance(answer, str) and re.fullmatch(r"\s*\d{1,2}(\.0)?\s*", answer):
        answer = float(answer)
    if isinstance(answer, bool) or not isinstance(answer, int | float) or answer != answer // 1:
        return None
    place = int(answer) - first
    return place if 0 <= place < len(options) else None


def text_place(answer: Any, options: Sequence[str]) -> int | None:
    """Which option a text is; None if none or several of them."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    same = [place for place, text in enumerate(options) if plain_option(text) == plain_option(str(answer))]
    return same[0] if len(same) == 1 else None


def says_nothing(value: Any) -> bool:
    """Whether a cell is empty, or holds what pandas writes into one that is."""
    return says_none(value) or str(value).strip().lower() == "nan"


def plain_option(text: str) -> str:
    """What two writings of an option are compared by."""
    plain = " ".join(text.split()).rstrip(".").casefold()
    return plain.partition(".")[0] if re.fullmatch(r"-?\d+\.0+", plain) else plain  # 2.0 is 2


def with_options(entry: Mapping[str, Any], question: str, answer: Any, said: str) -> tuple[str, str]:
    """A question with the options that it is asked with, and its answer: a letter where it chooses by letter or number.

    A question that lists its options already stays as it is, and so does an answer in words. Nothing is added where the
    answer chooses none of the options for certain: a number does only by the numbers that the options are labelled with.

    Args:
        answer: As it stands in the entry.
        said: The same as a text.

    Raises:
        SampleError: The options cannot be understood, or which of them the answer means cannot be told.
    """
    lost = _are_lost(entry, question)
    by_letter = _LETTER.fullmatch(said.strip()) is not None
    try:
        options = options_of(entry)
    except SampleError:
        if lost or (by_letter and said.strip(_SIGNS).isupper()):
            raise
        return question, said
    if options is None or len(options.texts) < 2:
        if lost and (options is not None or by_letter or _NUMBER.fullmatch(said)):
            raise SampleError(
                f"the answer {said!r} chooses among options that cannot be told; write them into the question"
            )
        return question, said
    texts, worded = options.texts, text_place(said, options.texts)
    if _lists(question, texts, mentions=worded is not None):
        if worded is None and _NUMBER.fullmatch(said) and split_options(question):
            raise _unclear(said, options, "the question calls them by letters")
        return question, said
    place = None if split_options(question) else _place(answer, said, options)
    if place is not None:
        return f"{ask_options(question, texts)}\n{INSTRUCTION}", LETTERS[place]
    unclear = letter_place(said, texts) not in (None, worded) or _may_count(said, texts)
    if worded is not None and _may_be_others(entry, options):
        return question, said
    if worded is not None and not (lost and unclear) and not split_options(question):
        return ask_options(question, texts), said
    labelled = options.lettered or options.numbered
    letter = by_letter and said.strip(_SIGNS).isupper() and (labelled or options.commas)
    listed = labelled or (options.where.strip("'") in _LISTS and not options.commas)
    number = _NUMBER.fullmatch(said) and listed and not any(map(str.isdigit, "".join(texts)))
    if lost or (worded is None and (letter or number)):
        raise _unclear(said, options, "no letter or label of theirs, and not the text of one alone")
    return question, said


def _may_be_others(entry: Mapping[str, Any], options: Options) -> bool:
    """Whether what is called so may be no options, so that only a letter as answer tells that it is.

    Columns ``a`` and ``b``, ``a0`` and ``a1``, or of numbers, may be any two things, and candidates may be answers that a
    model wrote.
    """
    if options.where == "'candidates'" or options.where.startswith("a "):
        return True
    named = re.findall(r"'([A-Za-z])'", options.where) if options.where.startswith("[") else []
    return any(name.islower() or not isinstance(entry[name], str) for name in named)


def with_options_beside(entry: Mapping[str, Any], question: str, answer: str) -> tuple[str, str]:
    """The one question of a finished conversation and its answer, with the options that stand beside the messages.

    Only an answer that is a letter, to a question that lists no options, is asked with them; whatever is no list of texts
    is another thing's.

    Raises:
        SampleError: The options are texts, and cannot be understood.
    """
    if _LETTER.fullmatch(answer.strip()) is None or split_options(question):
        return question, answer
    lists = {*_keys(entry)}
    told = {key: value for key, value in entry.items() if key not in lists or _are_texts(value)}
    options = options_of({key: value for key, value in told.items() if key not in _SMALL})  # a and b may be anything
    if options is None or len(options.texts) < 2 or text_place(answer, options.texts) is not None:
        return question, answer
    if _lists(question, options.texts, mentions=True):
        return question, answer
    if (place := _place(answer, answer, options)) is None:
        return question, answer
    return f"{ask_options(question, options.texts)}\n{INSTRUCTION}", LETTERS[place]


def _are_texts(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values()) if all(re.fullmatch(r"[A-Z]", str(key)) for key in value) else None
    if isinstance(value, str):
        return True
    texts = isinstance(value, list | tuple) and all(isinstance(each, str) for each in value)
    return texts and not any(map(names_picture, value))


def _are_lost(entry: Mapping[str, Any], question: str) -> bool:
    """Whether an entry has options for certain, and its question does not say them all."""
    for key in _LISTS:
        options = entry.get(key)
        texts = list(options.values()) if isinstance(options, Mapping) else options
        if isinstance(texts, list | tuple) and any(str(text).strip() not in question for text in texts):
            return True
    letters = [key for key in LETTERS[:4] if isinstance(entry.get(key), str) and entry[key].strip() not in question]
    return len(letters) > 1


def _lists(question: str, options: Sequence[str], *, mentions: bool = False) -> bool:
    """Whether a question lists all options in any way and order; ``mentions``: or says them, as in ``a cat or a dog``."""
    plain = {plain_option(option) for option in options}
    any_of = "|".join(re.escape(option) for option in sorted(plain, key=len, reverse=True))
    text = "\n".join(" ".join(line.split()) for line in question.casefold().splitlines())
    said: set[str] = set()
    gaps: list[str] = []
    end = 0
    for found in re.finditer(rf"(?<![a-z0-9_])(?:{any_of})(?![a-z0-9_])", text):
        gap = text[end : found.start()]
        if not said or len(gap) > _NEAR or not (_PARTS.search(gap) or (gap == " " and len(plain) > 2)):
            said, gaps = set(), []
        else:
            gaps.append(gap)
        said.add(found[0])
        end = found.end()
        if plain <= said:
            if mentions or not any(map(_OR.fullmatch, gaps)):
                return True
            said = set()  # they may be listed behind it
    return False


def _place(answer: Any, said: str, options: Options) -> int | None:
    """The option that an answer chooses by its letter, or by the number that it is labelled with; None if it is unclear."""
    texts, worded = options.texts, text_place(said, options.texts)
    if options.commas:
        return None
    if (place := letter_place(said, texts)) is not None:
        letters = _LETTER.fullmatch(said.strip()) and any(re.fullmatch(r"[A-Za-z]", text) for text in texts)
        return place if options.lettered or not letters else None
    place = number_place(answer, texts, first=options.first) if options.numbered else None
    return place if worded in (None, place) else None


def _may_count(said: str, options: Sequence[str]) -> bool:
    """Whether a number may be the text of an option as well as its place, counted from 0 or from 1."""
    return any(number_place(said, options, first=first) not in (None, text_place(said, options)) for first in (0, 1))


def _unclear(said: str, options: Options, why: str) -> SampleError:
    return SampleError(
        f"the answer {said!r} chooses none of the {len(options.texts)} options in {options.where} for certain: {why}; write the "
        "letter of the right one as the answer, or the options into the question"
    )


def _keys(entry: Mapping[str, Any]) -> Iterator[str]:
    """Keys of lists of options, those that mean nothing else first."""
    yield from (key for key in _LISTS if not says_none(entry.get(key)))
    yield from (
        key
        for key, value in entry.items()
        if key not in _LISTS and normal_key(key) in (*_LISTS, *_MORE_LISTS) and not says_none(value)
    )


def _listed(value: Any, key: str) -> Options | None:
    """Options under one key; None if what stands there is no list of them."""
    commas = False
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")]
        found_in = _of_text(value, key)
        commas = found_in is None and len(parts) > 1 and all(parts) and normal_key(key) not in _SINGULAR
        value = parts if commas else found_in
    first: int | None = None
    lettered = False
    if isinstance(value, Mapping):
        value, first, lettered = _of_object(value, key)
    if not isinstance(value, str | int | float | list | tuple | None):
        raise SampleError(f"{key!r} holds what can be answered, but no texts: {brief(value)}")
    if not isinstance(value, list | tuple) or not value:
        return None
    if isinstance(value[0], Mapping):
        labels = [
            next((item[name] for name in _LABEL_KEYS if not says_none(item.get(name))), None)
            for item in value
            if isinstance(item, Mapping)
        ]
        value = [_of_item(item, place, key) for place, item in enumerate(value)]
        if None not in labels:
            first, lettered = _labelled(labels, key)
    texts = list(value)
    while texts and says_none(texts[-1]):
        texts.pop()
    if not texts:
        return None
    found = replace(_options(texts, repr(key)), commas=commas)
    if first is None:
        return found
    return replace(found, first=first, numbered=not lettered, lettered=lettered)


def _of_text(text: str, key: str) -> Any:
    """The options that a text holds: a list, each behind its letter, one a line, or between ``|``; None if it holds none."""
    if (found := printed(text, where=repr(key))) is not None or normal_key(key) in _SINGULAR:
        return found
    lower = text.lstrip().startswith("(a)")
    inline = split_options(re.sub(r"\([a-z]\)", lambda found: found[0].upper(), text) if lower else text)
    parts = [part.strip() for part in text.strip().split("|")]
    if inline is not None and not inline[0] and len(parts) != len(inline[1]):
        return [f"({letter}) {option}" for letter, option in zip(LETTERS, inline[1], strict=False)]
    for sign in ("\n", "|", ";"):
        parts = [part.strip() for part in text.strip().split(sign)]
        if len(parts) > 1 and all(parts):
            bullets = sign == "\n" and all(part.startswith(("- ", "* ", "• ")) for part in parts)
            return [part[2:].strip() for part in parts] if bullets else parts
    return None


def _of_object(value: Mapping[str, Any], key: str) -> tuple[list[Any], int | None, bool]:
    """Options by letter or number, or a list of texts beside one of labels; as what the first is counted; if by letter."""
    for name in _TEXT_KEYS:
        if isinstance(value.get(name), list | tuple):
            texts = list(value[name])
            labels = next((value[each] for each in _LABEL_KEYS if isinstance(value.get(each), list | tuple)), None)
            if labels is None:
                return texts, None, False
            if len(labels) != len(texts):
                raise SampleError(f"{key!r} holds {len(texts)} options and {len(labels)} labels; give each its label")
            return texts, *_labelled(labels, key)
    labelled = {str(label).strip(" ()."): text for label, text in value.items()}
    if all(re.fullmatch(r"[A-Za-z]|\d{1,2}", label) for label in labelled):
        texts, first = _in_order({label.upper(): text for label, text in labelled.items()}, repr(key))
        return texts, first, "A" in labelled
    raise SampleError(
        f"{key!r} holds what can be answered, but not by letter: it has {', '.join(map(str, value))[:60]!r}; give a list "
        "of texts"
    )


def _labelled(labels: Sequence[Any], key: str) -> tuple[int | None, bool]:
    """What the first option is counted as by labels beside the options (None: nobody answers these), and if they are letters.

    Raises:
        SampleError: They could be answered, and are not A, B, ..., 0, 1, ... or 1, 2, ... in order.
    """
    names = [str(label).strip(" ().").upper() for label in labels]
    if all(len(name) > 7 or re.fullmatch(r"\d{3,}", name) for name in names):  # of a data base
        return None, False
    if names == list(LETTERS[: len(names)]):
        return 0, True
    for first in (0, 1):
        if names == [str(first + place) for place in range(len(names))]:
            return first, False
    place, name = next(
        ((place, name) for place, name in enumerate(names) if name != LETTERS[place % 26]), (0, names[0])
    )
    raise SampleError(
        f"{key!r} holds options out of order: option {place + 1} is labelled {name!r}, expected A, B, ..., or 1, 2, ...; "
        "sort them, or call them so"
    )


def _of_item(item: Any, place: int, key: str) -> Any:
    if not isinstance(item, Mapping):
        return item
    text = next((item[name] for name in _TEXT_KEYS if not says_none(item.get(name))), None)
    if text is None:
        raise SampleError(f"{key!r} holds what can be answered, but option {place + 1} is no text: {brief(item)}")
    return text


def _columns(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Options that stand in columns of their own, by letter or number."""
    for letters, least, sure in ((LETTERS, "A", True), (LETTERS.lower(), "ab", False)):
        named = [letter for letter in letters if letter in entry]
        filled = [letter for letter in named if _is_filled(entry[letter])]
        texts = sure or all(isinstance(entry[letter], str) for letter in filled)  # a and b may be anything
        if len(filled) > 1 and texts and (sure or {*least} <= {*filled}) and least[0] in named:
            yield f"{filled}", {letter.upper(): entry[letter] for letter in named}
    columns: dict[str, dict[str, Any]] = {}
    for key, value in entry.items():
        if isinstance(key, str) and (found := _COLUMN.fullmatch(normal_key(key))):
            columns.setdefault(found[1] or found[4], {})[(found[2] or found[3] or found[5]).upper()] = value
    for name, labelled in columns.items():
        yield f"{name} {', '.join(sorted(labelled))}", labelled


def _is_filled(value: Any) -> bool:
    """Whether a cell holds something; pandas writes ``nan`` for what is missing, and some tables have that as a text."""
    return not says_nothing(value) and value is not False


def _in_order(labelled: Mapping[str, Any], where: str) -> tuple[list[Any], int]:
    """Options by letter or number, in order, without those at the end that are empty; and the first number, or 0.

    Raises:
        SampleError: One is missing between others.
    """
    numbers = sorted(int(label) for label in labelled if label.isdigit())
    first = numbers[0] if numbers and numbers[0] in (0, 1) else 0
    texts: list[Any] = []
    for label in LETTERS if not numbers else map(str, range(first, first + len(LETTERS))):
        value = labelled.get(label, labelled.get(label.zfill(2)))
        texts.append(value if _is_filled(value) else None)
    while texts and texts[-1] is None:
        texts.pop()
    if None in texts:
        raise SampleError(
            f"{where} hold what can be answered, but the {texts.index(None) + 1}. of {len(texts)} options is empty; fill it, "
            "or leave out the sample"
        )
    return texts, first


def _options(values: Sequence[Any], where: str) -> Options:
    texts: list[str] = []
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, str | int | float) or says_none(value):
            raise SampleError(
                f"{where} holds what can be answered, but option {place + 1} is no text: {brief(value)}; the options of a "
                "question are texts"
            )
        texts.append(str(value).strip())
        if names_picture(texts[-1]):
            raise SampleError(
                f"{where} holds pictures to choose from ({texts[-1][:60]!r}); only options that are texts are read"
            )
    if len(texts) > len(LETTERS):
        raise SampleError(f"{where} holds {len(texts)} options, more than there are letters ({len(LETTERS)})")
    plain = Options(tuple(texts), where, numbers=not all(isinstance(value, str) for value in values))
    in_order = [[*letters[: len(texts)]] for letters in (LETTERS, LETTERS.lower())]
    counts = [[*map(str, range(first, first + len(texts)))] for first in (0, 1)] if len(texts) > 1 else []
    for way, ordered in ((_LABELLED, in_order), (_NUMBERED, counts)):
        found = [each for text in texts if (each := way.fullmatch(text))]
        labels = [(each[1] or each[2]).lstrip("0") or "0" for each in found]
        if labels in ordered:  # "1. cat", "2. dog": so are they called by a number as answer
            numbered = way is _NUMBERED
            bare = tuple(each[3].strip() for each in found)
            return replace(
                plain, texts=bare, first=int(labels[0]) if numbered else 0, numbered=numbered, lettered=not numbered
            )
        if any(sorted(labels) == sorted(each) for each in ordered):
            raise SampleError(
                f"{where} holds options out of order: they are labelled {', '.join(labels)}; sort them by their labels, or take "
                "these away"
            )
    return plain
