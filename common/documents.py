"""JSON documents that carry their format version and their own checksum.

``plan.json``, the sidecars and ``manifest.json`` are such documents: an object with ``format_version`` and
``checksum``, the fingerprint of everything else in it. A flipped bit anywhere in one is therefore noticed
by whoever reads it, before any other file says so.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from common.atomic import json_bytes, read_json, write_bytes_atomic
from common.errors import CacheFormatError
from common.hashing import fingerprint
from common.schema import FORMAT_VERSION

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def document_bytes(body: Mapping[str, Any]) -> bytes:
    """Return the file of a document: its body plus the checksum, as canonical JSON."""
    return json_bytes({**body, "checksum": fingerprint(dict(body))})


def write_document(path: Path, body: Mapping[str, Any], *, create_only: bool = False) -> None:
    """Write a document atomically.

    Raises:
        FileExistsError: If ``create_only`` and another document is there; the same one is success.
    """
    write_bytes_atomic(path, document_bytes(body), create_only=create_only)


def read_document(path: Path) -> dict[str, Any]:
    """Read a document, check version and checksum, and return its body.

    Raises:
        FileNotFoundError: If it is not there.
        CacheFormatError: If it is no document, damaged, or from a newer format version.
    """
    body = dict(check_version(read_json(path), str(path)))
    stated = body.pop("checksum", None)
    found = fingerprint(body)
    if stated != found:
        raise CacheFormatError(f"{path}: damaged, or edited by hand: states checksum {stated}, has {found}")
    return body


def check_version(data: Any, where: str) -> dict[str, Any]:
    """Return a JSON object of a format version this code reads; asked before anything else.

    Raises:
        CacheFormatError: If it is none, or from a newer version.
    """
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CacheFormatError(f"{where}: no format_version; not a file of a teacher cache, or damaged")
    if version > FORMAT_VERSION:
        raise CacheFormatError(
            f"{where}: format version {version}, but this code reads up to {FORMAT_VERSION}; update the code"
        )
    return data


def check_object(data: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    """Return a JSON object with exactly these keys and kinds of value.

    Raises:
        CacheFormatError: Naming the key, the kind expected and the value found.
    """
    if not isinstance(data, dict) or data.keys() != kinds.keys():
        found = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
        raise CacheFormatError(f"{where}: expected an object with {sorted(kinds)}, found {found}")
    for key, kind in kinds.items():
        if not isinstance(data[key], kind) or (kind is int and isinstance(data[key], bool)):
            raise CacheFormatError(f"{where}: {key} is {data[key]!r}; expected {kind.__name__}")
    return data


def check_int(value: Any, name: str, low: int, high: int, where: str) -> None:
    """Refuse a value that is not a whole number in ``[low, high]``.

    Raises:
        CacheFormatError: Naming it, its range and what was found.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise CacheFormatError(f"{where}: {name} is {value!r}; expected a whole number from {low} to {high}")


def safe_path(name: Any, where: str) -> str:
    """Return a relative POSIX path that cannot leave the cache.

    Raises:
        CacheFormatError: For absolute paths, ``..``, backslashes, empty parts and control characters.
    """
    if isinstance(name, str) and 0 < len(name) < 1024 and name.isprintable() and "\\" not in name:
        parts = PurePosixPath(name).parts
        if "/".join(parts) == name and not name.startswith("/") and ".." not in parts and ":" not in parts[0]:
            return name
    raise CacheFormatError(f"{where}: the path {name!r} could leave the cache folder and is refused")


def describe_differences(before: Any, now: Any, *, there: str, here: str) -> list[str]:
    """List where two JSON values differ, a line each: the dotted key and both values.

    Args:
        before: The stored value.
        now: The value of this run.
        there: What holds the stored one, for the text.
        here: What holds the other.
    """
    old, new = _flatten(before), _flatten(now)
    return [
        f"  {key}: {there} has {old.get(key, 'nothing')!r}, {here} has {new.get(key, 'nothing')!r}"
        for key in sorted(old.keys() | new.keys())
        if (key in old) != (key in new) or old.get(key) != new.get(key)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: value}
