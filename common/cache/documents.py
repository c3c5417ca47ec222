"""JSON documents that carry their format version and their own checksum.

``plan.json``, the sidecars and ``manifest.json`` are such documents: an object with ``format_version`` and
``checksum``, the fingerprint of everything else in it. A flipped bit anywhere in one is therefore noticed
by whoever reads it, before any other file says so.
"""

from __future__ import annotations

import contextlib
import unicodedata
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from vlm_distill_cache.common.cache.schema import FORMAT_VERSION
from vlm_distill_cache.common.errors import CacheFormatError, NewerFormatError
from vlm_distill_cache.common.files.atomic import (
    MAX_JSON_BYTES,
    TEMPORARY_PREFIX,
    parse_json,
    read_bounded,
    write_bytes_atomic,
)
from vlm_distill_cache.common.files.signed import checked_body, document_bytes
from vlm_distill_cache.common.printing import one_line


def write_document(path: Path, body: Mapping[str, Any], *, create_only: bool = False) -> None:
    """Write a document atomically.

    Raises:
        FileExistsError: If ``create_only`` and another document is there; the same one is success.
    """
    write_bytes_atomic(path, document_bytes(body), create_only=create_only)


def read_document(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a document, check version and checksum, and return its body.

    Raises:
        FileNotFoundError: If it is not there.
        CacheFormatError: If it is no document or damaged.
        NewerFormatError: If it is from a newer format version.
    """
    return parse_document(read_bounded(path, max_bytes=max_bytes), str(path))


def parse_document(data: bytes, where: str) -> dict[str, Any]:
    """Check version and checksum of a document in memory, and return its body."""
    parsed = parse_json(data, where)
    try:
        return checked_body(check_version(parsed, where), where)
    except NewerFormatError as newer:
        error: CacheFormatError = newer
        # One flipped bit makes a 1 a 3: the checksum still is that of the version it was written in.
        for version in range(1, FORMAT_VERSION + 1):
            with contextlib.suppress(CacheFormatError):
                checked_body({**parsed, "format_version": version}, where)
                error = CacheFormatError(f"{where}: damaged: format_version was changed after it was written")
        raise error from None


def check_version(data: Any, where: str) -> dict[str, Any]:
    """Return a JSON object of a format version this code reads; asked before anything else."""
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise CacheFormatError(f"{where}: no format_version; not a file of a teacher cache, or damaged")
    if version > FORMAT_VERSION:
        raise NewerFormatError(
            f"{where}: from a newer version: format version {version}, but this code reads up to {FORMAT_VERSION}; "
            "update this software"
        )
    return data


def safe_path(name: Any, where: str) -> str:
    """Return a relative POSIX path that cannot leave the cache.

    Raises:
        CacheFormatError: For absolute paths, ``..``, backslashes, colons, empty parts, characters that do not print
            or that are another one in disguise, and names of temporaries.
    """
    # Printable: no NUL, no control or direction marks. NFKC: no character that another file system takes for "." or "/".
    if isinstance(name, str) and 0 < len(name) < 1024 and name.isprintable() and not set(name) & {"\\", ":"}:
        parts = PurePosixPath(name).parts
        plain = "/".join(parts) == name == unicodedata.normalize("NFKC", name) and not name.startswith("/")
        # A trailing dot or space is cut off by Windows; ".." ends in one too. Temporaries are removed by `seal`.
        if plain and not any(part.endswith((".", " ")) or part.startswith(TEMPORARY_PREFIX) for part in parts):
            return name
    raise CacheFormatError(f"{where}: the path {name!r} could leave the cache folder and is refused")


def describe_differences(before: Any, now: Any, *, there: str, here: str) -> list[str]:
    """List where two JSON values differ, a line each: the dotted key, and what ``there`` and ``here`` have."""
    old, new = _flatten(before), _flatten(now)
    return [
        f"  {one_line(key)}: {there} has {old.get(key, 'nothing')!r}, {here} has {new.get(key, 'nothing')!r}"
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
