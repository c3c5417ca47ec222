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
_COLUMN = re.compile(r"(option|choice|opt)s?(?:_([a-z])|_?(\d{1,2}))")
_NUMBER = re.compile(r"\s*-?\d+\s*")
_LETTER = re.compile(r"[(\[]?([A-Za-z])[)\]]?[.:,]?")
_LABEL = r"(?:[(\[]{0}[)\]]|{0}\s?[.:)])\s*"  # (A), [A], A., A:, A)
_LABELLED = re.compile(_LABEL.format("([A-Z])") + r"(.+)", re.DOTALL)
_NUMBERED = re.compile(
    r"(?:[(\[](\d{1,2})[)\]]\s*|(\d{1,2})(?:[)]\s*|[.:]\s+))(.+)", re.DOTALL
)  # (1), 1), 1. with a blank
_TEXT_KEYS, _LABEL_KEYS = ("text", "value", "content", "option", "choice"), ("label", "key", "id", "letter")


@dataclass(frozen=True)
class Options:
    """What may be answered.

    Attributes:
        texts: At least one, in order, without letters in front.
        where: The keys that they stand under, for errors.
        sure: Whether such keys mean nothing but options; else an answer that chooses by letter or number tells.
        first: What the first of them is called where they stand under numbers; else 0.
        lettered: Whether they stand under letters, so that a letter as answer is one of these.
        numbers: Whether some are numbers, so that a number may be the answer itself.
    """

    texts: tuple[str, ...]
    where: str
    sure: bool
    first: int = 0
    lettered: bool = False
    numbers: bool = False


def options_of(entry: Mapping[str, Any]) -> Options | None:
    """The options that an entry has; None if there are none.

    Raises:
        SampleError: They cannot be understood: one of them is missing between others, or is no text.
    """
    for key in _keys(entry):
        if (found := _listed(entry[key], key)) is not None:
            return found
    for where, labelled, sure in _columns(entry):
        texts, first = _in_order(labelled, where)
        if len(texts) > 1:
            found = _options(texts, where, sure=sure and sum(isinstance(text, str) for text in texts) > 1)
            return replace(found, first=first, lettered="A" in labelled)
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
        place = LETTERS.index(behind[1] or behind[2])
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
    return " ".join(text.split()).rstrip(".").casefold()


def with_options(entry: Mapping[str, Any], question: str, answer: Any, said: str) -> tuple[str, str]:
    """A question with the options that it is asked with, and its answer: a letter where it chooses by letter or number.

    A question that holds its options already stays as it is, and so does an answer in words.

    Args:
        answer: As it stands in the entry.
        said: The same as a text.

    Raises:
        SampleError: The options cannot be understood, or which of them the answer means cannot be told.
    """
    try:
        options = options_of(entry)
    except SampleError:
        if _has_sure_options(entry) or _NUMBER.fullmatch(said) or _LETTER.fullmatch(said.strip()):
            raise
        return question, said
    if options is None:
        return question, said
    texts = options.texts
    inline = split_options(question)
    listed = inline is not None and [*map(plain_option, inline[1])] == [*map(plain_option, texts)]
    inside = listed or all(text in question for text in texts)
    if inside and text_place(said, texts) is not None:
        return question, said
    place = _chosen(answer, said, options)
    if place is None:
        asked = options.sure or text_place(said, texts) is not None
        return (ask_options(question, texts) if asked and not inside else question), said
    if listed or (inside and lists_options(question, texts)):
        return question, said if letter_place(said, texts) is not None else LETTERS[place]
    return f"{ask_options(question, texts)}\n{INSTRUCTION}", LETTERS[place]


def _has_sure_options(entry: Mapping[str, Any]) -> bool:
    listed = any(not says_none(entry.get(key)) and not isinstance(entry[key], str) for key in _LISTS)
    return listed or sum(isinstance(entry.get(letter), str) for letter in LETTERS[:4]) > 1


def _chosen(answer: Any, said: str, options: Options) -> int | None:
    """The option that an answer chooses by letter or number; None if it is given in words."""
    texts = options.texts
    if not isinstance(answer, str) and not options.numbers:  # a number among texts counts them
        place = number_place(answer, texts, first=options.first)
    else:
        meant = text_place(said, texts)
        place = letter_place(said, texts)
        if place is not None and options.lettered:
            return place
        place = number_place(said, texts, first=options.first) if place is None else place
        if meant is not None and place not in (None, meant):
            raise SampleError(
                f"the answer {said!r} is option {LETTERS[place or 0]} by its letter or number (counted from {options.first}), and "
                f"option {LETTERS[meant]} by its text ({options.where}); write the letter of the right one as the answer, and "
                "options that are no letters or numbers"
            )
        if meant is not None:
            return place
    is_letter = len(said.strip(" ()[].:,")) == 1 and said.strip(" ()[].:,").isupper()
    if place is None and (is_letter or (options.sure and _NUMBER.fullmatch(said))):
        raise SampleError(
            f"the answer {said!r} chooses none of the {len(texts)} options in {options.where} (numbers are counted from "
            f"{options.first})"
        )
    return place


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
    sure = key in _LISTS and not isinstance(value, str)
    if isinstance(value, str):
        value = _of_text(value, key)
    first, lettered = 0, False
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
    found = _options(texts, repr(key), sure=sure)
    return replace(found, first=first or found.first, lettered=lettered or found.lettered)


def _of_text(text: str, key: str) -> Any:
    """The options that a text holds: a list, each behind its letter, one a line, or between ``|``; None if it holds none."""
    if (found := printed(text, where=repr(key))) is not None or normal_key(key) in ("choice", "option"):
        return found
    lower = text.lstrip().startswith("(a)")
    inline = split_options(re.sub(r"\([a-z]\)", lambda found: found[0].upper(), text) if lower else text)
    if inline is not None and not inline[0]:
        return [f"({letter}) {option}" for letter, option in zip(LETTERS, inline[1], strict=False)]
    for sign in ("\n", "|", ";"):
        parts = [part.strip() for part in text.strip().split(sign)]
        if len(parts) > 1 and all(parts):
            return parts
    if says_nothing(text) or text.strip().lower() in ("n/a", "none", "null", "-"):
        return None
    raise SampleError(
        f"{key!r} holds what can be answered, but {text[:60]!r} is no list; give a list of texts, each option behind its "
        "letter (A. cat B. dog), one a line, or with | between them"
    )


def _of_object(value: Mapping[str, Any], key: str) -> tuple[list[Any], int, bool]:
    """Options by letter or number, or a list of texts beside one of labels; as what the first is counted; if by letter."""
    for name in _TEXT_KEYS:
        if isinstance(value.get(name), list | tuple):
            texts = list(value[name])
            labels = next((value[each] for each in _LABEL_KEYS if isinstance(value.get(each), list | tuple)), None)
            if labels is None:
                return texts, 0, False
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


def _labelled(labels: Sequence[Any], key: str) -> tuple[int, bool]:
    """What the first option is counted as by labels that stand beside the options, and whether these are letters.

    Raises:
        SampleError: They could be answered, and are not A, B, ..., 0, 1, ... or 1, 2, ... in order.
    """
    names = [str(label).strip(" ().").upper() for label in labels]
    if all(len(name) > 7 or re.fullmatch(r"\d{3,}", name) for name in names):  # of a data base
        return 0, False
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


def _columns(entry: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Options that stand in columns of their own, by letter or number; and whether such keys mean nothing else."""
    for letters, least, sure in ((LETTERS, "A", True), (LETTERS.lower(), "ab", False)):
        named = [letter for letter in letters if letter in entry]
        filled = [letter for letter in named if _is_filled(entry[letter])]
        texts = sure or all(isinstance(entry[letter], str) for letter in filled)  # a and b may be anything
        if len(filled) > 1 and texts and (sure or {*least} <= {*filled}) and least[0] in named:
            yield f"{filled}", {letter.upper(): entry[letter] for letter in named}, sure
    columns: dict[str, dict[str, Any]] = {}
    for key, value in entry.items():
        if isinstance(key, str) and (found := _COLUMN.fullmatch(normal_key(key))):
            columns.setdefault(found[1], {})[(found[2] or found[3]).upper()] = value
    for name, labelled in columns.items():
        yield f"{name} {', '.join(sorted(labelled))}", labelled, False


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


def _options(values: Sequence[Any], where: str, *, sure: bool) -> Options:
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
    numbers = not all(isinstance(value, str) for value in values)
    labelled = [_LABELLED.fullmatch(text) for text in texts]
    if all(found and (found[1] or found[2]) == letter for found, letter in zip(labelled, LETTERS, strict=False)):
        return Options(
            tuple(found[3].strip() for found in labelled if found), where, sure, lettered=True, numbers=numbers
        )
    counted = [_NUMBERED.fullmatch(text) for text in texts]
    for first in (0, 1) if len(texts) > 1 else ():  # "1. cat", "2. dog": so are they called by a number as answer
        if all(found and int(found[1] or found[2]) == first + place for place, found in enumerate(counted)):
            return Options(
                tuple(found[3].strip() for found in counted if found), where, sure, first=first, numbers=numbers
            )
    return Options(tuple(texts), where, sure, numbers=numbers)
