"""Text of unknown origin on its way to a terminal.

A sample id, a reason or a teacher's name in a cache that came from elsewhere may hold escape sequences that
move the cursor, rename the window or hide what was printed before. Nothing of that kind reaches a terminal.
"""

from __future__ import annotations

import re

MAX_SHOWN = 300  # characters of one name or reason
SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a name that is not UTF-8
CONTROL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)  # moves the cursor or turns text round


def one_line(text: object, *, limit: int = MAX_SHOWN) -> str:
    r"""Return a text in which everything that does not print is spelt out, ``\x1b``, on one line, cut at ``limit``."""
    shown = printable(str(text), keep="")
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def printable(text: str, *, keep: str = "\n") -> str:
    """Spell out control, format and bidirectional characters, lone surrogates and unassigned code points.

    ``keep``: characters that may stay as they are.
    """
    return "".join(c if c in keep or c.isprintable() else repr(c)[1:-1] for c in text)
