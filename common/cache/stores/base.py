"""What a store is: a writer that publishes one shard whole, and a reader of its records by position.

Two stores, zarr and webdataset, hold the same fields with the same values. Both refuse a record that does
not have exactly the plan's fields, and both publish create-only: of two processes that write the same
shard by mistake, the second finds an identical shard and is content, or a different one and says so.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from vlm_distill_cache.common.cache.plan import SHARDS
from vlm_distill_cache.common.cache.schema import Field, Record, check_record
from vlm_distill_cache.common.cache.sidecar import sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import clean_stale, remove, try_lock

MAX_RECORD_BYTES = 1 << 30  # decoded bytes of one sample
MAX_FIELD_BYTES = 8 << 30  # decoded bytes of one field of one shard
MAX_SAMPLE_ID_BYTES = 4096

# What zarr, numcodecs, safetensors and tarfile raise on damaged bytes; all become CacheFormatError.
DAMAGE_ERRORS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    EOFError,
)


class ShardWriter(Protocol):
    """Writes one shard. Nothing is visible under its final name before ``close``."""

    @property
    def ledger(self) -> ShardLedger:
        """What was appended so far."""
        ...

    def append(self, sample_id: str, record: Record) -> None:
        """Add a record; refuses a repeated sample id and a record that does not fit the fields."""
        ...

    def close(self) -> list[str]:
        """Publish the shard atomically; returns its files relative to the cache, and keeps its lock.

        Raises:
            CacheMismatchError: If another process published the shard with other content.
        """
        ...

    def abort(self) -> None:
        """Drop what is not published, and the lock; may be called at any time, any number of times."""
        ...


class ShardReader(Protocol):
    """Reads the records of one shard. Safe to call from several threads."""

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Of the records, in stored order."""
        ...

    def __len__(self) -> int:
        """Return the number of records."""
        ...

    def read(self, position: int, names: Collection[str] | None = None) -> Record:
        """Return one record, or the named fields of it, as arrays the caller owns."""
        ...

    def check(self) -> None:
        """Check dtypes, shapes and offsets of all fields, without decoding values where possible."""
        ...

    def close(self) -> None:
        """Release files and memory; the reader is not used afterwards."""
        ...


@dataclass(kw_only=True)
class ShardLedger:
    """What a writer has accepted so far; both stores count alike.

    Attributes:
        sample_ids: In the order appended.
        rows: Supervised rows so far.
        field_bytes: Decoded bytes so far by field.
    """

    cache_dir: Path
    index: int
    fields: tuple[Field, ...]
    sample_ids: list[str] = field(default_factory=list)
    rows: int = 0
    field_bytes: dict[str, int] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.field_bytes = {f.name: 0 for f in self.fields}

    def accept(self, sample_id: str, record: Record) -> None:
        """Check a record and count it."""
        where = f"shard {self.index}, sample {sample_id!r}"
        if not isinstance(sample_id, str) or not 0 < len(sample_id.encode()) <= MAX_SAMPLE_ID_BYTES:
            raise CacheFormatError(f"{where}: a sample id is a text of 1 to {MAX_SAMPLE_ID_BYTES} bytes")
        if sample_id in self._seen:
            raise CacheFormatError(f"{where}: appended twice; sample ids must be unique in a data set")
        check_record(record, self.fields, where)
        size = sum(array.nbytes for array in record.values())
        if size > MAX_RECORD_BYTES:
            raise CacheFormatError(f"{where}: {size} bytes, above the {MAX_RECORD_BYTES} of a record")
        self._seen.add(sample_id)
        self.sample_ids.append(sample_id)
        self.rows += len(record["labels"])
        for name, array in record.items():
            self.field_bytes[name] += array.nbytes


def shard_path(cache_dir: Path, index: int, suffix: str) -> Path:
    """Return the final place of a shard."""
    return cache_dir / SHARDS / f"{index:05d}.{suffix}"


def prepare_shard(cache_dir: Path, index: int, suffixes: Sequence[str]) -> None:
    """Make room to write a shard: remove what a killed run left of it.

    A shard without its sidecar does not exist, so one that was published by a run killed before the
    sidecar is a leftover too, unless its lock says that a live process is about to write the sidecar.

    Raises:
        CacheMismatchError: If the shard is already finished.
    """
    (cache_dir / SHARDS).mkdir(parents=True, exist_ok=True)
    _refuse_finished(cache_dir, index)
    clean_stale(cache_dir / SHARDS, f"{index:05d}.")
    for suffix in suffixes:
        path = shard_path(cache_dir, index, suffix)
        if (lock := try_lock(path)) is not None:
            try:
                _refuse_finished(cache_dir, index)  # its writer may have finished before we got the lock
                remove(path)
            finally:
                lock.release()


def _refuse_finished(cache_dir: Path, index: int) -> None:
    if sidecar_path(cache_dir, index).exists():
        raise CacheMismatchError(
            f"{sidecar_path(cache_dir, index)}: shard {index} is already finished; "
            "write only the shards that `missing_shards` names, or delete the sidecar to make it anew"
        )


def refuse_conflict(path: Path) -> CacheMismatchError:
    """Return the error of a writer that finds another, different shard in its place."""
    return CacheMismatchError(
        f"{path}: another process published this shard with different content; run one process a shard, "
        "with the same options and hardware, or delete this shard and its sidecar and build again"
    )


def select_fields(fields: Sequence[Field], names: Collection[str] | None, where: str) -> list[Field]:
    """Return the fields with these names, all for None."""
    if names is None:
        return list(fields)
    known = {f.name for f in fields}
    if unknown := sorted(set(names) - known):
        raise CacheFormatError(f"{where}: no fields {unknown}; it has {sorted(known)}")
    return [f for f in fields if f.name in names]


def frame_content_bytes(data: bytes) -> int | None:
    """Return the decoded size of the one zstd frame that ``data`` is; None if it is none, several or cut.

    Several count because decoders decode all of them: the first frame's header would not tell the size.

    Source:
        RFC 8878, sections 3.1.1.1 (frame header) and 3.1.1.2 (blocks).
    """
    if len(data) < 9 or data[:4] != b"\x28\xb5\x2f\xfd":
        return None
    descriptor = data[4]
    single_segment = descriptor >> 5 & 1
    start = 5 + (1 - single_segment) + (0, 1, 2, 4)[descriptor & 3]
    width = (single_segment, 2, 4, 8)[descriptor >> 6]
    if width == 0:
        return None
    content = int.from_bytes(data[start : start + width], "little") + (256 if width == 2 else 0)
    end, is_last = start + width, False
    while not is_last and end + 3 <= len(data):
        block = int.from_bytes(data[end : end + 3], "little")
        is_last, kind, size = bool(block & 1), block >> 1 & 3, block >> 3
        end += 3 + (1 if kind == 1 else size)  # kind 1 is one byte, repeated
    end += 4 * (descriptor >> 2 & 1)  # a checksum
    return content if is_last and end == len(data) else None
