"""JSON as people have it: with byte order marks, in UTF-16, broken in one of the usual ways, each with its remedy."""

import codecs
import json
import re
from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from vlm_distill_cache.common.errors import DataError

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OTHERS = {  # by how a file begins: what it is, and what to do
    b"\x1f\x8b": "is compressed: unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it first (zstd -d)",
    b"BZh": "is compressed: unpack it first (bunzip2)",
    b"\xfd7zXZ": "is compressed: unpack it first (unxz)",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is a parquet file: give its name the ending .parquet",
    b"version https://git-lfs": "is a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"<": "is a page of HTML or XML, not JSON: download the file itself",
}
_PYTHON = ("True", "False", "None")
_WHITE = re.compile(r"[ \t\n\r]*")
_READ = 1 << 20  # bytes at a time


def is_plain(head: bytes) -> bool:
    """Whether a file that begins so is UTF-8 without a byte order mark, so that its lines can be found as bytes."""
    return not head.startswith(_MARKS) and _encoding_of(head) == "utf-8"


def held_text(path: Path) -> bytes | None:
    """All of a file as UTF-8, if it is written otherwise or has a byte order mark; None: it can be read in parts.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            if is_plain(file.read(4)):
                return None
            file.seek(0)
            return decode(file.read(), where=str(path)).encode()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def open_text(path: Path, held: bytes | None) -> BinaryIO:
    """A file as UTF-8; ``held``: what `held_text` found of it."""
    return path.open("rb") if held is None else BytesIO(held)


def decode(data: bytes, *, where: str, encoding: str = "") -> str:
    """Decode the bytes of a JSON file: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Args:
        encoding: What they are written in, if that is known.

    Raises:
        DataError: They are none of these; says which byte, in which line, and what to do.
    """
    if other := next((what for mark, what in _OTHERS.items() if data.startswith(mark)), None):
        raise DataError(f"{where} {other}")
    encoding = encoding or _encoding_of(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        lines = data[: error.start].count(b"\n")
        at = f" in line {lines + 1}" if b"\n" in data.rstrip() else ""
        raise DataError(
            f"{where} is not {encoding.upper()}: byte 0x{data[error.start]:02x}{at}; convert it from the encoding that it is "
            "in (latin1, gb18030, ...): iconv -f latin1 -t utf-8 OLD > NEW"
        ) from error


def _encoding_of(data: bytes) -> str:
    """What JSON is written in, by its NUL bytes; nothing but NULs is what a crash leaves, and no encoding."""
    return json.detect_encoding(data) if data[:4].strip(b"\0") else "utf-8"


def parse(text: str, *, where: str) -> Any:
    """Parse JSON.

    Raises:
        DataError: Says what is wrong, where, and what to do about that kind of fault.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}; {_remedy(error, text)}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nested a thousand deep
        kind = "is nested too deeply" if isinstance(error, RecursionError) else "holds a number of thousands of digits"
        raise DataError(f"{where} cannot be read as JSON: it {kind}") from error


def parse_bytes(data: bytes, *, where: str) -> Any:
    """Decode and parse; `DataError` as either of them raises."""
    return parse(decode(data, where=where), where=where)


def parse_line(data: bytes, *, where: str) -> Any:
    """Parse a line of a file that is UTF-8; `DataError` as for a whole one."""
    return parse(decode(data, where=where, encoding="utf-8"), where=where)


def scan_list(file: BinaryIO, offsets: "array[int]") -> Iterator[Any]:
    """Yield the values of a JSON list one after another, of which only some text is held; white space may follow it.

    Args:
        file: UTF-8 without a byte order mark.
        offsets: To which is added where each value begins, before it is yielded, and at last where the list's bracket stands.

    Raises:
        ValueError: The file holds anything else, or is broken somewhere: parsed as a whole, it tells what and where.
        RecursionError: A value is nested too deeply.
    """
    window = _Window(file)
    window.take("[")
    closed = window.following() == "]"
    while not closed:
        window.following()
        offsets.append(window.offset)
        yield window.value()
        closed = window.following() == "]"
        if not closed:
            window.take(",")
    offsets.append(window.offset)
    window.take("]")
    if window.following():
        raise ValueError("more follows")


class _Window:
    """Some text of a file.

    Attributes:
        offset: Where in the file the text begins that is not taken yet, bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.offset = 0
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at = "", 0

    def following(self) -> str:
        """Pass over white space; the character behind it, which is not taken; "" at the end of the file."""
        while True:
            self._pass_to(self._behind_white(self._at))
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def take(self, character: str) -> None:
        """Take white space and this character."""
        if self.following() != character:
            raise ValueError(f"no {character!r}")
        self._pass_to(self._at + 1)

    def value(self) -> Any:
        """Take a value of a list, of which all is seen only where what may stand behind it is: 1 may go on as 1e5."""
        while True:
            try:
                found, end = self._parse(self._text, self._at)
            except json.JSONDecodeError:
                if not self._read_on():
                    raise
                continue
            behind = self._behind_white(end)
            if self._text[behind : behind + 1] in (",", "]"):
                self._pass_to(end)
                return found
            if not self._read_on():
                raise ValueError("it ends in the middle")

    def _behind_white(self, at: int) -> int:
        found = _WHITE.match(self._text, at)
        return at if found is None else found.end()

    def _pass_to(self, at: int) -> None:
        passed = at - self._at
        self.offset += passed if self._text.isascii() else len(self._text[self._at : at].encode())
        self._at = at

    def _read_on(self) -> bool:
        """Read as much again as is not taken yet, or more; returns whether there was any."""
        rest = self._text[self._at :]
        data = self._file.read(max(_READ, len(rest)))
        self._text, self._at = rest + self._decoder.decode(data, final=not data), 0
        return bool(data)


def _remedy(error: json.JSONDecodeError, text: str) -> str:
    before, here = text[: error.pos].rstrip(), text[error.pos : error.pos + 1]
    if not text.strip():
        return "the file is empty"
    if here == "\0":
        return "NUL bytes stand there, as a crash or a full disk leaves them: copy or download it again"
    if error.msg == "Extra data":
        return (
            "one value is expected, and more follow: one JSON object a line is read too, so put each on a line of its own "
            "(jq -c . OLD > NEW), or all into one list (jq -s . OLD > NEW)"
        )
    if text.startswith(_PYTHON, error.pos):
        return "JSON writes true, false and null; if Python printed it, write it with json.dump"
    if text.startswith(("//", "/*", "#"), error.pos):
        return "JSON has no comments: take them out"
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "it ends in the middle: copy or download it again"
    if before.endswith(",") and here in "]}":
        return f"remove the comma in front of this {here!r}"
    if here == "'":
        return "JSON writes texts in double quotes; if Python printed it, write it with json.dump"
    if error.msg.startswith("Invalid \\escape"):
        return "a backslash in a text is written twice, or as / in a path"
    if error.msg.startswith("Invalid control character"):
        return "line feeds and tabs in a text are written \\n and \\t"
    return "repair it there"
