"""Caches whose documents say what nobody can mean: each leaf of each document changed, and all signed anew.

`hostile_documents` gives changes to a sound cache; each writes one changed document and signs the whole consistently, as an
author who knows this code would. Nothing may then fail but with one of our own errors.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import FileEntry
from vlm_distill_cache.common.files.hashing import fingerprint_parsed

PLAN, SIDECAR = "plan.json", "shards/00000.json"
SIGNED = (PLAN, SIDECAR, MANIFEST)
SIDE = (
    "projector.json",
    "vision_tower.json",
    "processor/preprocessor_config.json",
    "processor/tokenizer_config.json",
    "processor/tokenizer.json",
)
HEADERS = ("projector.safetensors", "vision_tower.safetensors")
SHOWN = 6  # entries of one container that are changed, the first ones
_RAW = {"@nan@": b"NaN", "@inf@": b"1e999", "@digits@": b"9" * 5000, "@nested@": b"[" * 3000 + b"]" * 3000}


@dataclass(frozen=True)
class Change:
    """One changed document; ``write`` puts it into a copy of the cache and signs that."""

    name: str
    document: str
    data: bytes

    def write(self, cache: Path) -> None:
        """Write the document, and everything that vouches for it."""
        (cache / self.document).write_bytes(self.data)
        if self.document != MANIFEST:
            sign(cache, self.document)


def hostile_documents(cache: Path, seed: int = 0, documents: tuple[str, ...] = ()) -> Iterator[Change]:
    """Every change of every document of a sound cache, in an order that the seed decides."""
    changes = [change for name in documents or (*SIGNED, *SIDE, *HEADERS) for change in _changes(cache, name)]
    random.Random(seed).shuffle(changes)
    yield from changes


def sign(cache: Path, document: str) -> None:
    """Make the manifest vouch for a changed document."""
    body = json.loads((cache / MANIFEST).read_bytes())
    entry = FileEntry.of(cache / document).to_dict()
    if document == SIDECAR:
        body["shards"][0]["sidecar"] = entry
        told = _parsed(cache / document)
        for name, value in {"samples": told.get("sample_ids"), "failed": told.get("failed")}.items():
            if isinstance(value, list):
                body["shards"][0][name] = len(value)
        for name in ("rows", "pictures"):
            if isinstance(told.get(name), int):
                body["shards"][0][name] = told[name]
        counts = ("samples", "rows", "failed", "bytes", "pictures", "unknown_rows")
        rows = body["shards"]
        body["totals"] = {name: sum(row[name] for row in rows) for name in counts if all(name in row for row in rows)}
    else:
        body["files"][document] = entry
    if document == PLAN:
        told = {name: value for name, value in _parsed(cache / document).items() if name != "checksum"}
        body["plan_hash"] = _fingerprint(told)
    (cache / MANIFEST).write_bytes(_signed(body))


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _changes(cache: Path, name: str) -> Iterator[Change]:
    data = (cache / name).read_bytes()
    if name in HEADERS:
        length = int.from_bytes(data[:8], "little")
        for size in (0, length - 1, length + 1, 1 << 40, (1 << 64) - 1):
            yield Change(f"{name}: header of {size} bytes", name, size.to_bytes(8, "little") + data[8:])
        yield Change(f"{name}: cut", name, data[:-4])
        pack = _header_packer(data[8 + length :])
        body = json.loads(data[8 : 8 + length])
    else:
        body = json.loads(data)
        body.pop("checksum", None) if name in SIGNED else None
        pack = _signed if name in SIGNED else _raw
        yield Change(f"{name}: empty", name, b"")
        yield Change(f"{name}: a list", name, b"[]\n")
        yield Change(f"{name}: nested", name, b"[" * 200_000 + b"]" * 200_000)
    for place, changed in _mutations(body, most=SHOWN if name in HEADERS or name.endswith("tokenizer.json") else 40):
        yield Change(f"{name}: {place}", name, pack(changed))


def _mutations(body: Any, *, most: int) -> Iterator[tuple[str, Any]]:
    for path in _places(body, most):
        value = _at(body, path)
        shown = ".".join(map(str, path)) or "all of it"
        for words, new in _others(value):
            yield f"{shown} {words}", _with(body, path, new)
        if isinstance(value, dict):
            yield f"{shown} with another key", _with(body, path, {**value, "\x1b[2J other": 1})
            for key in list(value)[:SHOWN]:
                yield f"{shown} without {key}", _with(body, path, {k: v for k, v in value.items() if k != key})


def _others(value: Any) -> Iterator[tuple[str, Any]]:
    nested: Any = value
    for _ in range(40):
        nested = [nested]
    values = {
        "null": None, "true": True, "zero": 0, "negative": -1, "of 10^7": 10**7, "of 10^30": 10**30, "1e308": 1e308,
        "NaN as text": "NaN", "no text": "", "long text": "A" * 100_000, "escapes": "\x1b]0;owned\x07\u202e", "a path": "../../etc",
        "no list": [], "no object": {}, "in a list": [value], "in an object": {"a": value}, "nested": nested,
        "NaN": "@nan@", "infinite": "@inf@", "5,000 digits": "@digits@", "deep": "@nested@", "half": 0.5,
        "twice as long": value + value if isinstance(value, str | list) else [value, value],
    }  # fmt: skip
    if isinstance(value, int | float) and not isinstance(value, bool):
        values |= {"seven times and one": 7 * value + 1, "255": 255, "65,536": 65_536, "one less": value - 1}
    for words, new in values.items():
        if (type(new), new) != (type(value), value):
            yield words, new


def _places(body: Any, most: int, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(body, dict | list):
        for key in list(body)[:most] if isinstance(body, dict) else range(min(len(body), SHOWN)):
            yield from _places(body[key], most, (*path, key))


def _at(body: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        body = body[key]
    return body


def _with(body: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = dict(body) if isinstance(body, dict) else list(body)
    copy[path[0]] = _with(body[path[0]], path[1:], new)
    return copy


def _fingerprint(body: Any) -> str:
    try:
        return fingerprint_parsed(body)
    except (ValueError, RecursionError):
        return "0" * 32


def _signed(body: Any) -> bytes:
    body = {name: value for name, value in body.items() if name != "checksum"}
    return _raw({**body, "checksum": _fingerprint(body)})


def _raw(body: Any) -> bytes:
    data = json.dumps(body, sort_keys=True).encode()
    for mark, raw in _RAW.items():
        data = data.replace(f'"{mark}"'.encode(), raw)
    return data


def _header_packer(values: bytes) -> Callable[[Any], bytes]:
    def pack(body: Any) -> bytes:
        header = _raw(body)
        return len(header).to_bytes(8, "little") + header + values

    return pack
