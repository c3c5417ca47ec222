"""JSON as people have it: with byte order marks, in UTF-16, broken in one of the usual ways, each with its remedy."""

import codecs
import json
from typing import Any

from vlm_distill_cache.common.errors import DataError

_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_OTHERS = {  # by how a file begins: what it is, and what to do
    b"\x1f\x8b": "is compressed: unpack it first (gunzip)",
    b"\x28\xb5\x2f\xfd": "is compressed: unpack it first (zstd -d)",
    b"PK\x03\x04": "is a zip archive: unpack it first",
    b"PAR1": "is a parquet file: give its name the ending .parquet",
    b"version https://git-lfs": "is a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"<": "is a page of HTML or XML, not JSON: download the file itself",
}
_PYTHON = ("True", "False", "None")


def is_plain(head: bytes) -> bool:
    """Whether a file that begins so is UTF-8 without a byte order mark, so that its lines can be found as bytes."""
    return not head.startswith(_MARKS) and json.detect_encoding(head) == "utf-8"


def decode(data: bytes, *, where: str) -> str:
    """Decode the bytes of a JSON file: UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises:
        DataError: They are none of these; says which byte, in which line, and what to do.
    """
    if other := next((what for mark, what in _OTHERS.items() if data.startswith(mark)), None):
        raise DataError(f"{where} {other}")
    encoding = json.detect_encoding(data)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        lines = data[: error.start].count(b"\n")
        at = f" in line {lines + 1}" if b"\n" in data.rstrip() else ""
        raise DataError(
            f"{where} is not {encoding.upper()}: byte 0x{data[error.start]:02x}{at}; convert it from the encoding that it is "
            "in (latin1, gb18030, ...): iconv -f latin1 -t utf-8 OLD > NEW"
        ) from error


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


def _remedy(error: json.JSONDecodeError, text: str) -> str:
    before, here = text[: error.pos].rstrip(), text[error.pos : error.pos + 1]
    if not text.strip():
        return "the file is empty"
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
