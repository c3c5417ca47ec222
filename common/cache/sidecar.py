"""Sidecars: what one finished shard holds, ``shards/00000.json`` (`layout.shard_stem`).

A shard exists if and only if its sidecar does; it is written last. So the work left is the plan minus the
sidecars, whoever asks and however many processes share it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.cache.document_rules import SIDECAR
from vlm_distill_cache.common.cache.documents import parse_document, safe_path, write_document
from vlm_distill_cache.common.cache.layout import shard_folders, shard_stem
from vlm_distill_cache.common.cache.plan import Plan, planned_shards
from vlm_distill_cache.common.cache.schema import ONE_PICTURE
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import read_bounded
from vlm_distill_cache.common.files.hashing import checksum, file_digests, sha256_hex, stream_digests
from vlm_distill_cache.common.files.rules import check, record, whole


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size and digests of one file: xxh3_128 for speed, sha256 against tampering."""

    size: int
    xxh3_128: str
    sha256: str

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON stored in sidecars and the manifest."""
        return {"bytes": self.size, "xxh3_128": self.xxh3_128, "sha256": self.sha256}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> FileEntry:
        """Read what ``to_dict`` wrote, which fits ``document_rules.FILE_ENTRY``."""
        return cls(size=data["bytes"], xxh3_128=data["xxh3_128"], sha256=data["sha256"])

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Read a file and describe it."""
        fast, safe, size = file_digests(path)
        return cls(size=size, xxh3_128=fast, sha256=safe)

    @classmethod
    def of_stream(cls, file: IO[bytes]) -> FileEntry:
        """Describe a file that is open and at its beginning, where it is left."""
        fast, safe, size = stream_digests(file)
        file.seek(0)
        return cls(size=size, xxh3_128=fast, sha256=safe)

    @classmethod
    def of_bytes(cls, data: bytes | bytearray) -> FileEntry:
        """Describe bytes in memory."""
        return cls(size=len(data), xxh3_128=checksum(data), sha256=sha256_hex(data))


@dataclass(frozen=True, kw_only=True)
class UnknownWords:
    """Supervised rows of a shard whose target is the tokenizer's unknown token: words that it does not know.

    Attributes:
        rows: How many.
        token: Its id, by which records can be counted again; None: the tokenizer has none, or it also ends answers.
    """

    rows: int
    token: int | None = None

    def plus(self, labels: NDArray[np.uint32]) -> UnknownWords:
        """Count the rows of one more record, by its labels u4 ``[A]``; those of a token that is not known are none."""
        return self if self.token is None else replace(self, rows=self.rows + int((labels == self.token).sum()))

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON stored in sidecars."""
        return {"rows": self.rows, "token": self.token}


@dataclass(frozen=True, kw_only=True)
class ShardSidecar:
    """What a finished shard holds. ``shards/00000.json``, written last.

    Attributes:
        sample_ids: Of the records, in the order they are stored.
        rows: Supervised rows of all records.
        field_bytes: Decoded bytes by field; the same in both stores.
        failed: ``(sample_id, reason)`` of each sample that could not be read.
        pictures: Records of samples with a picture; None: written before this was counted.
        unknown: Rows that teach an unknown word; None: not counted.
        divided: Batches for which memory did not suffice, and that ran in parts: the last bits of their records may not be
            those of a build with more memory.
    """

    index: int
    sample_ids: tuple[str, ...]
    rows: int
    field_bytes: dict[str, int]
    files: dict[str, FileEntry]
    failed: tuple[tuple[str, str], ...] = ()
    pictures: int | None = None
    unknown: UnknownWords | None = None
    divided: int = 0
    format_version: int = ONE_PICTURE

    @property
    def stored_bytes(self) -> int:
        """Bytes of the shard's files."""
        return sum(entry.size for entry in self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of the sidecar."""
        counted: dict[str, Any] = {} if self.pictures is None else {"pictures": self.pictures}
        if self.unknown is not None:
            counted["unknown"] = self.unknown.to_dict()
        if self.divided:
            counted["divided_batches"] = self.divided
        return {
            "format_version": self.format_version,
            "index": self.index,
            "samples": len(self.sample_ids),
            "sample_ids": list(self.sample_ids),
            "rows": self.rows,
            "field_bytes": self.field_bytes,
            "files": {name: entry.to_dict() for name, entry in self.files.items()},
            "failed": [{"sample_id": name, "reason": reason} for name, reason in self.failed],
            **counted,
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> ShardSidecar:
        """Read what ``to_dict`` wrote; paths that leave the cache are refused."""
        values = check(data, SIDECAR, where)
        ids = values["sample_ids"]
        unknown = UnknownWords(**values["unknown"]) if "unknown" in values else None
        counts = {
            "samples": (values["samples"], len(ids), len(ids)),
            "pictures": (values.get("pictures", 0), 0, len(ids)),
            "unknown.rows": (0 if unknown is None else unknown.rows, 0, values["rows"]),
        }
        for name, (found, least, most) in counts.items():
            check({name: found}, record({name: whole(least, most)}), where)
        return cls(
            index=values["index"],
            sample_ids=tuple(ids),
            rows=values["rows"],
            field_bytes=values["field_bytes"],
            files=read_files(values["files"], where),
            failed=tuple((f["sample_id"], f["reason"]) for f in values["failed"]),
            pictures=values.get("pictures"),
            unknown=unknown,
            divided=values.get("divided_batches", 0),
            format_version=values["format_version"],
        )


def shard_path(cache_dir: Path, index: int, suffix: str) -> Path:
    """Return where a file of shard ``index`` lies, as the plan in the folder says."""
    return cache_dir / f"{shard_stem(index, planned_shards(cache_dir))}{suffix}"


def sidecar_path(cache_dir: Path, index: int) -> Path:
    """Return where the sidecar of shard ``index`` lies, as the plan in the folder says."""
    return shard_path(cache_dir, index, "json")


def sidecar_name(index: int, shard_count: int) -> str:
    """Return the path of a sidecar relative to its cache of so many shards."""
    return f"{shard_stem(index, shard_count)}json"


def write_sidecar(cache_dir: Path, sidecar: ShardSidecar) -> None:
    """Write a shard's sidecar, atomically and create-only: from now on the shard exists.

    Raises:
        CacheMismatchError: If another process wrote a different sidecar for this shard.
    """
    path = sidecar_path(cache_dir, sidecar.index)
    try:
        write_document(path, sidecar.to_dict(), create_only=True)
    except FileExistsError as error:
        raise CacheMismatchError(
            f"{path}: another process finished shard {sidecar.index} with other content; run one process a "
            "shard, and delete the shard and its sidecar if you cannot tell which one is right"
        ) from error


def read_sidecar(cache_dir: Path, index: int) -> ShardSidecar:
    """Read the sidecar of shard ``index``.

    Raises:
        FileNotFoundError: If the shard is not there.
        CacheFormatError: If the sidecar is damaged or not this shard's.
    """
    return read_sidecar_file(cache_dir, index)[0]


def read_sidecar_file(cache_dir: Path, index: int) -> tuple[ShardSidecar, bytes]:
    """Read the sidecar of shard ``index``, and give the bytes of its file too; raises as `read_sidecar`."""
    path = sidecar_path(cache_dir, index)
    data = read_bounded(path)
    return parse_sidecar(data, index, str(path)), data


def parse_sidecar(data: bytes, index: int, where: str) -> ShardSidecar:
    """Read the sidecar of shard ``index`` from its file's bytes."""
    sidecar = ShardSidecar.from_dict(parse_document(data, where), where)
    if sidecar.index != index:
        raise CacheFormatError(f"{where}: says it is shard {sidecar.index}; the file was renamed or damaged")
    return sidecar


def missing_shards(cache_dir: Path, plan: Plan) -> list[int]:
    """Return the shards without a sidecar: the work that is left."""
    count, there = plan.shard_count, set()
    for folder in shard_folders(cache_dir, count):
        within = folder.relative_to(cache_dir).as_posix()
        with (
            contextlib.suppress(FileNotFoundError, NotADirectoryError),
            os.scandir(folder) as entries,  # of many shards, far less than to ask for each
        ):
            there |= {f"{within}/{entry.name}" for entry in entries if entry.name.endswith(".json") and entry.is_file()}
    return [index for index in range(count) if sidecar_name(index, count) not in there]


def read_files(data: Mapping[str, Any], where: str) -> dict[str, FileEntry]:
    """Read a table of files whose paths stay inside the cache."""
    return {safe_path(name, where): FileEntry.from_dict(entry) for name, entry in data.items()}


def check_sidecar(sidecar: ShardSidecar, plan: Plan, where: str) -> None:
    """Refuse a sidecar whose format version, counts, fields or files do not fit the plan."""
    if sidecar.format_version != plan.format_version:
        raise CacheFormatError(
            f"{where}: is of format version {sidecar.format_version}; the plan is of {plan.format_version}"
        )
    expected = len(plan.shard_range(sidecar.index))
    found = len(sidecar.sample_ids) + len(sidecar.failed)
    if found != expected:
        raise CacheFormatError(
            f"{where}: {len(sidecar.sample_ids)} samples and {len(sidecar.failed)} failed; the plan has {expected}"
        )
    names = {f.name for f in plan.all_fields}
    if sidecar.field_bytes.keys() != names:
        raise CacheFormatError(f"{where}: fields {sorted(sidecar.field_bytes)}; the plan has {sorted(names)}")
    stem = shard_stem(sidecar.index, plan.shard_count)
    for name in sidecar.files:
        if not name.startswith(stem):
            raise CacheFormatError(f"{where}: lists {name}, which is not a file of shard {sidecar.index}")
