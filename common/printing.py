"""Text of unknown origin on its way to a terminal, a report or a cache.

A sample id, a reason or a teacher's name that came from elsewhere may hold escape sequences that move the cursor,
rename the window or hide what was printed before, and may be as long as a picture. Nothing of that kind reaches a
terminal. Messages that are too long are cut in the middle: whose they are stands in front, and what to do at the end.
Nor do passwords, tokens and the signatures of addresses reach it, wherever a message got them from.
"""

from __future__ import annotations

import functools
import html
import os
import re
from pathlib import Path

MAX_SHOWN = 300  # characters of one name or reason
MAX_QUOTED = 80  # of what a reason quotes
_MAX_LINE = 2000  # of a line of a message
_MAX_READ = 20_000  # of a text that is looked through for what it quotes
_CUT = "..."
# What a message quotes: between quotation marks that are no apostrophes inside a word, nor an option's as in SET="...".
# None opens behind a backslash: each search ends at the next mark of its kind that may open one, so that all are linear.
_QUOTED = re.compile(r"""(?<![\w=\\])(?:'(?:[^'\\\n]|\\.)*+'|"(?:[^"\\\n]|\\.)*+"|`[^`\n]*+`)(?!\w)""")
_UNBROKEN = re.compile(r"\S+")
SURROGATE = re.compile("[\ud800-\udfff]")  # a byte of a name that is not UTF-8
# What moves the cursor or turns text round.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


_WORD = re.compile(r"(?<!\S)\S*(?::/|\?)\S*")  # one that may be, or be a part of, an address
# Before a host or bucket, whatever the scheme: NAME@ or KEY:SECRET@. A port is no password, and a secret may have slashes.
_USER = re.compile(r":(//+(?:[^/@:]*:(?!\d{1,5}(?:[/?#]|$))[^@]*|[^/@:]*)|/[^/@:]+:[^@]*)@(?:[^/@]*@)*")
_TOKEN_SETTINGS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME")
_SHORTEST_TOKEN = 8  # anything shorter is a word that texts are made of
_CLOSING = ".,;:!)]}"  # at the end of a query these belong to the sentence, and quotation marks that open before it
_TOKEN = re.compile(
    r"""\b(?:(hf_)[A-Za-z0-9]{20,}|(x-(?:amz|goog)-(?:signature|credential|security-token)=)['"]?[^\s'"<>&,;)]+)""",
    re.I,
)


def hide_secrets(text: str) -> str:
    """Leave out what lets its reader in: passwords and queries of addresses, which may be signatures, and tokens."""
    if ":/" in text:
        text = _WORD.sub(lambda found: _public(found[0]), text)
    for token in _own_tokens(*map(os.environ.get, _TOKEN_SETTINGS)):
        text = text.replace(token, "...")
    return _TOKEN.sub(r"\1\2...", text)


def holds_token(text: str) -> bool:
    """Whether a text holds a token of the hub: one that this machine has, or what looks drawn by lot: no word, no ``hf_xxx...``."""
    own = _own_tokens(*map(os.environ.get, _TOKEN_SETTINGS))
    return any(token in text for token in own) or any(_drawn(found[0]) for found in _TOKEN.finditer(text) if found[1])


def _drawn(token: str) -> bool:
    """Whether letters look drawn by lot: digits or both cases, and none six times running (one token in ten million)."""
    letters = token[len("hf_") :]
    mixed = any(map(str.isdigit, letters)) or len({*map(str.isupper, letters)}) > 1
    return mixed and re.search(r"(.)\1{5}", letters) is None


@functools.lru_cache(maxsize=1)
def _own_tokens(token: str | None, older: str | None, *places: str | None) -> tuple[str, ...]:
    """The tokens of the hub that this machine holds, where huggingface_hub finds them; not imported for that."""
    path, home, cache = places
    try:
        stored = Path(path or Path(home or Path(cache or "~/.cache") / "huggingface") / "token").expanduser()
        told = stored.read_text(encoding="utf-8")[:_MAX_LINE] if stored.is_file() else ""
    except (OSError, ValueError, RuntimeError):
        told = ""
    found = {given.strip() for given in (token, older, told) if given}
    return tuple(sorted((one for one in found if len(one) >= _SHORTEST_TOKEN), key=len, reverse=True))


def _public(word: str) -> str:
    """A word of a text that holds an address, as it may be shown; the address may be in two words."""
    users, at, rest = word.rpartition("@")  # up to the last one: no search ends in vain after reading on to the end
    word = _USER.sub(lambda found: "://" if found[1].startswith("//") else ":/", users + at) + rest
    address = word.find(":/")
    mark = word.find("?", address + 1)
    opened = set("'\"`") & set(word[:address]) if address >= 0 else "'\"`"  # before an address in two words, perhaps
    query = word[mark + 1 :].rstrip(_CLOSING + "".join(opened))
    if mark < 0 or not query or (address < 0 and "=" not in query):
        return word
    return f"{word[:mark]}?...{word[mark + 1 + len(query) :]}"


def one_line(text: object, *, limit: int = MAX_SHOWN) -> str:
    r"""Return a text in which everything that does not print is spelt out, ``\x1b``, on one line, cut at ``limit``."""
    shown = printable(hide_secrets(str(text))[: limit + 1], keep="")
    return shown if len(shown) <= limit else f"{shown[: limit - len(_CUT)]}{_CUT}"


def first_line(error: Exception) -> str:
    """What an error says first; its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def size_words(size: float) -> str:
    """Bytes as people read them: ``3.1 GB``."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"


def shorten_parts(text: str, *, limit: int = MAX_SHOWN) -> str:
    """Cut each long name, path or quotation inside a message to ``limit`` characters, so that its own words stay."""
    if len(text) <= limit:
        return text
    text = _cut(text, max(limit, _MAX_READ))
    for part in (_QUOTED, _UNBROKEN):
        text = part.sub(lambda found: _cut(found[0], limit), text)
    return text


def brief(text: str, *, limit: int = MAX_SHOWN) -> str:
    """A message on one line of at most ``limit`` characters; of what it quotes, and of itself, both ends stay."""
    text = hide_secrets(text)
    shown = shorten_parts(text, limit=MAX_QUOTED) if len(text) > limit else text
    return _cut(printable(_cut(shown, limit), keep=""), limit)


def message(text: str) -> str:
    """An error or a warning as it is shown: its lines stay, names inside are cut to `MAX_SHOWN` characters."""
    return "\n".join(_cut(printable(shorten_parts(line)), _MAX_LINE) for line in hide_secrets(text).split("\n"))


# What may begin a link, a picture, HTML, an entity, code, emphasis, a cell or a formula; inside a word "_" begins nothing.
_MARKUP = re.compile(r"[\\`*\[\]<>|&~$]|(?<![^\W_])_|_(?![^\W_])")


# What some readers make a link of though nothing marks it; no escape hinders all of them.
_LINKS_ITSELF = re.compile(r"[a-z][\w+.-]*://|www\.|(?:mailto|xmpp):|\w@[\w-]+\.|(?<!\w)@\w", re.I)


def markdown(text: object, *, limit: int = MAX_SHOWN) -> str:
    """Text of unknown origin inside a line or a cell of Markdown: it reads as it is, and means nothing.

    What would become a link by itself is code.
    """
    shown = one_line(text, limit=limit)
    return markdown_code(text, limit=limit) if _LINKS_ITSELF.search(shown) else _MARKUP.sub(r"\\\g<0>", shown)


def markdown_code(text: object, *, limit: int = MAX_SHOWN) -> str:
    """Text of unknown origin as code in a line or a cell of Markdown; backquotes become apostrophes."""
    return f"`{one_line(text, limit=limit).replace('`', chr(39)).replace('|', chr(92) + '|')}`"


def html_text(value: object) -> str:
    """Anything as text of an HTML page: it means nothing there, and holds no secret."""
    return html.escape(printable(hide_secrets(str(value))))


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
