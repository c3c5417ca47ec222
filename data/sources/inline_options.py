"""Options in the text of a question, or in one of their own: told apart where each has its letter, in a published way."""

import re
import string
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet

LETTERS = string.ascii_uppercase

_WAYS = (r"\({0}\)\s*", r"{0}\.\s+", r"{0}\)\s*", r"{0}:\s*", r"{0}、\s*")  # (A), A., A), A:, A、
_HEADING = re.compile(r"\s*(?:options|choices|选项)\s*[:：]?\s*\Z", re.IGNORECASE)
_TRAILING = re.compile(r"\n+\s*(?:(?:please|answer|select|choose|respond|reply)\b|请)[^\n]*\Z", re.IGNORECASE)
_BETWEEN = " \t\n,;，；"
# What stands in front of an option's letter, strictest first: a line's end; also a comma or a heading; any blank.
_FRONTS = (r"(?:\A|\n)[ \t]*", r"(?:\A|[\n,;，；:：?？])[ \t]*", r"(?:\A|[\s,;，；:：?？.])")


def split_options(text: str) -> tuple[str, tuple[str, ...]] | None:
    """Take the options out of a question: ``What? Options: A: cat, B: dog`` is ``What?`` and ``cat``, ``dog``.

    Returns:
        What is in front of them, and the options in order, two or more; None where there are none, or where a letter that
        stands twice leaves open which one begins an option.
    """
    text = text.strip()
    if ends := _TRAILING.search(text):  # what to answer with
        text = text[: ends.start()]
    found = [[set(_split(text, front, way)) for front in _FRONTS] for way in _WAYS]
    told = {parts for fronts in found for parts in _strictest(fronts)}
    longest = max((len(options) for fronts in found for parts in fronts for _, options in parts), default=0)
    best = [parts for parts in told if len(parts[1]) == longest]
    return best[0] if len(best) == 1 and longest > 1 else None


_Parts = tuple[str, tuple[str, ...]]


def _strictest(fronts: Sequence[AbstractSet[_Parts]]) -> AbstractSet[_Parts]:
    """The longest of the first way that finds two options or more."""
    for parts in fronts:
        longest = max((len(options) for _, options in parts), default=0)
        if longest > 1:
            return {each for each in parts if len(each[1]) == longest}
    return set()


def _split(text: str, front: str, way: str) -> Iterator[_Parts]:
    """All ways to take a question apart at letters that are written in one way."""
    places: list[list[re.Match[str]]] = []
    for letter in LETTERS:
        here = list(re.finditer(rf"(?P<front>{front})(?:{way.format(letter)})", text))
        if not here:
            break
        places.append(here)
    for chain in _chains(places):
        ends = [*(each.start() for each in chain[1:]), len(text)]
        options = tuple(text[each.end() : end].strip(_BETWEEN) for each, end in zip(chain, ends, strict=True))
        if all(options):
            stem = text[: chain[0].start("front")] + chain[0]["front"]
            yield _HEADING.sub("", stem).rstrip(_BETWEEN), options


def _chains(places: Sequence[Sequence[re.Match[str]]]) -> Iterator[list[re.Match[str]]]:
    """The longest rows of letters in their order; several where a letter stands more than once."""
    chains: list[list[re.Match[str]]] = [[each] for each in places[0]] if places else []
    for following in places[1:]:
        longer = [[*chain, each] for chain in chains for each in following if each.start() >= chain[-1].end()]
        if not longer:
            break
        chains = longer[:64]
    yield from chains
