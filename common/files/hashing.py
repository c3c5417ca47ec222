"""Checksums of bytes and fingerprints of meaning.

Two questions, two answers. *Are these the same bytes?* xxh3_128, which runs at memory speed, and
sha256 beside it where somebody could profit from a collision. *Do these settings mean the same?* a
fingerprint: xxh3_128 of canonical JSON, which ignores key order and white space and nothing else.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, Any

import xxhash

_READ_BYTES = 1 << 20


def checksum(data: bytes | bytearray | memoryview) -> str:
    """Return the xxh3_128 of ``data`` as 32 hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def sha256_hex(data: bytes | bytearray | memoryview) -> str:
    """Return the sha256 of ``data`` as 64 hex digits."""
    import hashlib  # which brings openssl; command lines start without it

    return hashlib.sha256(data).hexdigest()


def file_checksum(path: Path) -> str:
    """Return the xxh3_128 of a file as 32 hex digits, in constant memory."""
    with path.open("rb") as file:
        return stream_checksum(file)


def stream_checksum(file: IO[bytes]) -> str:
    """Return the xxh3_128 of the rest of an open file as 32 hex digits, in constant memory."""
    fast = xxhash.xxh3_128()
    while block := file.read(_READ_BYTES):
        fast.update(block)
    return fast.hexdigest()


def file_digests(path: Path) -> tuple[str, str, int]:
    """Return ``(xxh3_128, sha256, bytes)`` of a file in one pass and constant memory."""
    with path.open("rb") as file:
        return stream_digests(file)


def stream_digests(file: IO[bytes]) -> tuple[str, str, int]:
    """Return ``(xxh3_128, sha256, bytes)`` of the rest of an open file in one pass and constant memory."""
    import hashlib

    fast, safe, size = xxhash.xxh3_128(), hashlib.sha256(), 0
    while block := file.read(_READ_BYTES):
        fast.update(block)
        safe.update(block)
        size += len(block)
    return fast.hexdigest(), safe.hexdigest(), size


def fingerprint(value: Any) -> str:
    """Hash what a JSON-like value means: equal values give equal hex, in any key order.

    Tuples count as lists. ``1`` and ``1.0`` differ, because they are different JSON.

    Raises:
        ValueError: If a number is not finite; NaN is unequal to itself and so has no meaning to hash.
        TypeError: If something in ``value`` is not JSON, or a key is not a string.
    """
    _check_json(value, "value")
    return fingerprint_parsed(value)


def fingerprint_parsed(value: Any) -> str:
    """``fingerprint`` of what ``json.loads`` returned, which needs no check of its keys: twice as fast.

    Raises:
        ValueError: If a number is not finite (``1e999`` is valid JSON).
        RecursionError: If it is nested too deeply.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return checksum(text.encode("ascii"))


def _check_json(value: Any, where: str) -> None:
    # json.dumps would turn the key 1 into "1", so that two different dicts got one fingerprint.
    if value is None or isinstance(value, str | bool | int):
        return
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"cannot fingerprint {where}: {value} is not a finite number")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"cannot fingerprint {where}: key {key!r} is not a string; convert it first")
            _check_json(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check_json(item, f"{where}[{i}]")
    else:
        raise TypeError(f"cannot fingerprint {where}: {type(value).__name__} is not JSON; convert it first")
