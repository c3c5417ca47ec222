"""What a JSON document from elsewhere may hold, declared as data: rules that are put together, and one error.

A rule says in words what it expects, tells whether one value fits, and names what is inside the value with the rules of
those. So a document's whole schema is one expression, and the first value that breaks it is named by its dotted place.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.printing import MAX_QUOTED, one_line

AGAIN = "copy the cache again from where it came from, or build it again (`teacher-cache build`)"
ABSENT = object()
"""Stands for the value of a key that is missing."""
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxstring, _BRIEF.maxlong, _BRIEF.maxother = 3, MAX_QUOTED, MAX_QUOTED, MAX_QUOTED
_Parts = Iterator[tuple[str, Any, "Rule"]]


def _no_parts(value: Any) -> _Parts:
    yield from ()


@dataclass(frozen=True)
class Rule:
    """What one value may be.

    Attributes:
        expected: In words, behind "expected".
        fits: Whether a value is of the right kind and within its bounds, whatever is inside it.
        parts: Of a value that fits, what is inside: place (``.name`` or ``[3]``), value, rule.
    """

    expected: str
    fits: Callable[[Any], bool]
    parts: Callable[[Any], _Parts] = _no_parts


def misfit(rule: Rule, value: Any) -> tuple[str, Any, str] | None:
    """The first place inside a value that breaks a rule, what is there, and what was expected; None: all fits."""
    if not rule.fits(value):
        return "", value, rule.expected
    for place, inner, inner_rule in rule.parts(value):
        if inner_rule.parts is _no_parts and inner_rule.fits(inner):  # most values of a document of many shards
            continue
        found = misfit(inner_rule, inner)
        if found is not None:
            return place + found[0], found[1], found[2]
    return None


def check(value: Any, rule: Rule, where: str, *, remedy: str = AGAIN) -> Any:
    """Return a value that fits a rule.

    Args:
        where: The document, for the error.
        remedy: What to do about one that does not fit.

    Raises:
        CacheFormatError: With the document, the dotted place of the first misfit, its value cut at 80 characters, what was
            expected, and the remedy.
    """
    found = misfit(rule, value)
    if found is None:
        return value
    place, wrong, expected = found
    name = one_line(place.lstrip("."), limit=MAX_QUOTED)
    is_said = "is missing" if wrong is ABSENT else f"is {shown(wrong)}"
    raise CacheFormatError(f"{where}: {f'{name} ' if name else ''}{is_said}; expected {expected}; {remedy}")


def shown(value: Any) -> str:
    """A value of any size and kind as an error prints it, at most 80 characters."""
    return one_line(_BRIEF.repr(value), limit=MAX_QUOTED)


ANYTHING = Rule("a value", lambda value: True)
FLAG = Rule("true or false", lambda value: isinstance(value, bool))
OBJECT = Rule("an object", lambda value: isinstance(value, dict))


def whole(low: int, high: int) -> Rule:
    """A whole number in ``[low, high]``."""
    words = f"{low}" if low == high else f"a whole number from {low} to {high}"
    return Rule(words, lambda value: type(value) is int and low <= value <= high)


def number(low: float, high: float) -> Rule:
    """A finite number in ``[low, high]``."""
    return Rule(
        f"a number from {low:g} to {high:g}", lambda value: type(value) in (int, float) and low <= value <= high
    )


def text(most: int, *, least: int = 0, pattern: str = "", of: str = "") -> Rule:
    """A text of so many characters; ``of`` says in words what ``pattern`` matches."""
    form = re.compile(pattern, re.DOTALL)
    words = of or f"text of {f'{least} to ' if least else 'at most '}{most} characters"
    return Rule(
        words,
        lambda value: (
            isinstance(value, str) and least <= len(value) <= most and (not pattern or bool(form.fullmatch(value)))
        ),
    )


def one_of(*values: str) -> Rule:
    """One of a few texts."""
    return Rule(f"one of {', '.join(values)}", lambda value: isinstance(value, str) and value in values)


def either(*rules: Rule) -> Rule:
    """What fits any of several rules."""
    return Rule(
        " or ".join(rule.expected for rule in rules), lambda value: any(misfit(rule, value) is None for rule in rules)
    )


def maybe(rule: Rule) -> Rule:
    """Null, or what fits a rule; what is inside is named."""
    return Rule(
        f"{rule.expected} or null",
        lambda value: value is None or rule.fits(value),
        lambda value: _no_parts(value) if value is None else rule.parts(value),
    )


def items(rule: Rule, *, least: int = 0, most: int) -> Rule:
    """A list of so many values of one kind."""
    count = f"{least}" if least == most else f"{least} to {most}" if least else f"at most {most}"
    return Rule(
        f"a list of {count} values, each {rule.expected}",
        lambda value: isinstance(value, list) and least <= len(value) <= most,
        lambda value: ((f"[{number}]", item, rule) for number, item in enumerate(value)),
    )


def entries(rule: Rule, *, most: int) -> Rule:
    """An object of free keys and values of one kind."""
    return Rule(
        f"an object of at most {most} keys",
        lambda value: isinstance(value, dict) and len(value) <= most,
        lambda value: ((f".{name}", item, rule) for name, item in value.items()),
    )


def record(
    required: Mapping[str, Rule], optional: Mapping[str, Rule] = MappingProxyType({}), *, free: bool = False
) -> Rule:
    """An object of known keys; with ``free`` also of others, whose values may be anything."""
    known = {**required, **optional}
    alone = Rule(f"no key but {', '.join(known)}", lambda value: False)

    def parts(value: dict[str, Any]) -> _Parts:
        for name in required:
            yield f".{name}", value.get(name, ABSENT), required[name]
        for name, item in value.items():
            if name in optional:
                yield f".{name}", item, optional[name]
            elif name not in required and not free:
                yield f".{name}", item, alone

    return Rule("an object", OBJECT.fits, parts)


def also(rule: Rule, expected: str, fits: Callable[[Any], bool]) -> Rule:
    """What fits a rule and, as a whole, one more condition."""

    def parts(value: Any) -> _Parts:
        yield from rule.parts(value)
        yield "", value, Rule(expected, fits)

    return Rule(rule.expected, rule.fits, parts)
