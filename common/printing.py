"""Text of unknown origin on its way to a terminal, a report or a cache.

A sample id, a reason or a teacher's name that came from elsewhere may hold escape sequences that move the cursor,
rename the window or hide what was printed before, and may be as long as a picture. Nothing of that kind reaches a
terminal. Messages that are too long are cut in the middle: whose they are stands in front, and what to do at the end.
"""

from __future__ import annotations

import re

MAX_SHOWN = 300  # characters of one name or reason
MAX_QUOTED = 80  # of what a reason quotes
_MAX_LINE = 2000  # of a line of a message
_CUT = "..."
# What a message quotes: between quotation marks that are no apostrophes inside a word, nor an option's as in SET="...".
_QUOTED = re.compile(r"""(?<![\w=])(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*"|`[^`\n]*`)(?!\w)""")
_UNBROKEN = re.compile(r"\S+")
SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a name that is not UTF-8
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)  # moves the cursor or turns text round


def one_line(text: object, *, limit: int = MAX_SHOWN) -> str:
    r"""Return a text in which everything that does not print is spelt out, ``\x1b``, on one line, cut at ``limit``."""
    shown = printable(str(text)[: limit + 1], keep="")
    return shown if len(shown) <= limit else f"{shown[: limit - len(_CUT)]}{_CUT}"


def shorten_parts(text: str, *, limit: int = MAX_SHOWN) -> str:
    """Cut each long name, path or quotation inside a message to ``limit`` characters, so that its own words stay."""
    for part in (_QUOTED, _UNBROKEN):
        text = part.sub(lambda found: _cut(found[0], limit), text)
    return text


def brief(text: str, *, limit: int = MAX_SHOWN) -> str:
    """A message on one line of at most ``limit`` characters; of what it quotes, and of itself, both ends stay."""
    shown = shorten_parts(text, limit=MAX_QUOTED) if len(text) > limit else text
    return _cut(printable(_cut(shown, limit), keep=""), limit)


def message(text: str) -> str:
    """An error or a warning as it is shown: its lines stay, names inside are cut to `MAX_SHOWN` characters."""
    return "\n".join(_cut(printable(shorten_parts(line)), _MAX_LINE) for line in text.split("\n"))


def printable(text: str, *, keep: str = "\n") -> str:
    """Spell out control, format and bidirectional characters, lone surrogates and unassigned code points.

    ``keep``: characters that may stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else repr(c)[1:-1] for c in text)


def _cut(text: str, limit: int) -> str:
    """Leave out the middle of a text that is too long."""
    if len(text) <= limit:
        return text
    kept = max(0, limit - len(_CUT))
    return f"{text[: kept - kept // 2]}{_CUT}{text[len(text) - kept // 2 :]}"
