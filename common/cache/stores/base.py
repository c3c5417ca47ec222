"""What a store is: a writer that publishes one shard whole, and a reader of its records by position.

Two stores, zarr and webdataset, hold the same fields with the same values. Both refuse a record that does
not have exactly the plan's fields, and both publish create-only: of two processes that write the same
shard by mistake, the second finds an identical shard and is content, or a different one and says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

from vlm_distill_cache.common.cache.schema import Field, Record, check_record, version_of
from vlm_distill_cache.common.cache.side_files import walk_files
from vlm_distill_cache.common.cache.sidecar import UnknownWords, shard_path, sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import (
    HeldLock,
    clean_stale,
    fsync_directory,
    publish_directory,
    publish_file,
    remove,
    try_lock,
)
from vlm_distill_cache.common.files.hashing import file_digests

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


class ShardWriter(ABC):
    """Writes one shard. Nothing is visible under its final name before ``close``.

    Attributes:
        suffix: Of the shard's name.
        format_version: Of the records, as their fields say.
        sample_ids: In the order appended.
        rows: Supervised rows so far.
        field_bytes: Decoded bytes so far by field.
        pictures: Records so far of samples with a picture; None: not counted, and the sidecar does not say.
        unknown: Rows so far that teach an unknown word, which whoever knows the tokenizer sets; None: not counted.
        divided: Batches that ran in parts, which whoever runs the teacher sets.
    """

    suffix: str

    def __init__(self, cache_dir: Path, index: int, fields: tuple[Field, ...]) -> None:
        self.cache_dir, self.index, self.fields = cache_dir, index, fields
        self.format_version = version_of(fields)
        self.sample_ids: list[str] = []
        self.rows = 0
        self.pictures: int | None = 0
        self.unknown: UnknownWords | None = None
        self.divided = 0
        self.field_bytes = {f.name: 0 for f in fields}
        self._seen: set[str] = set()
        self._final = shard_path(cache_dir, index, self.suffix)
        self._temporary: Path | None = None
        self._lock: HeldLock | None = None

    def append(self, sample_id: str, record: Record) -> None:
        """Add a record; refuses a repeated sample id and a record that does not fit the fields."""
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
        if self.pictures is not None:
            self.pictures += bool(record["image_hash"].any())
        if self.unknown is not None:
            self.unknown = self.unknown.plus(record["labels"])
        for name, array in record.items():
            self.field_bytes[name] += array.nbytes
        self._add(sample_id, record)

    def close(self) -> list[str]:
        """Publish the shard atomically; returns its files relative to the cache, and keeps its lock.

        Raises:
            CacheMismatchError: If another process published the shard with other content.
        """
        temporary, names = self._write()
        try:
            if temporary.is_dir():
                publish_directory(temporary, self._final)
            else:
                publish_file(temporary, self._final, create_only=True)
        except FileExistsError:
            if _digests(temporary) != _digests(self._final):
                raise CacheMismatchError(
                    f"{self._final}: another process published this shard with different content; run one process a "
                    "shard, with the same options and hardware, or delete this shard and its sidecar and build again"
                ) from None
            remove(temporary)
        self._temporary = None
        final = self._final.relative_to(self.cache_dir).as_posix()
        return [f"{final}{name}" for name in names]

    def abort(self) -> None:
        """Drop what is not published, and the lock; may be called at any time, any number of times."""
        if self._temporary is not None:
            remove(self._temporary)
            self._temporary = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @abstractmethod
    def _add(self, sample_id: str, record: Record) -> None:
        """Take a record that fits."""

    @abstractmethod
    def _write(self) -> tuple[Path, list[str]]:
        """Write all to the temporary file or folder, durably; return it, and what follows its name in each path."""


class ShardReader(ABC):
    """Reads the records of one shard. Safe to call from several threads.

    Attributes:
        suffix: Of the shard's name.
        is_folder: Whether a shard is one, or else a file.
        sample_ids: Of the records, in stored order.
    """

    suffix: str
    is_folder: bool
    sample_ids: tuple[str, ...]

    def __init__(self, cache_dir: Path, index: int, fields: tuple[Field, ...]) -> None:
        self._path, self._fields = shard_path(cache_dir, index, self.suffix), fields
        if self._path.is_symlink() or not (self._path.is_dir() if self.is_folder else self._path.is_file()):
            raise CacheFormatError(
                f"{self._path}: the shard is missing; run `cachectl repair`, then `teacher-cache build` again"
            )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def read(self, position: int, names: Collection[str] | None = None) -> Record:
        """Return one record, or the named fields of it, as arrays the caller owns.

        Raises:
            CacheFormatError: If the shard is damaged or has no such field.
            IndexError: If there is no such position.
        """
        if not 0 <= position < len(self):
            raise IndexError(f"{self._path}: no record {position}; there are {len(self)}")
        if names is None:
            return self._read(position, self._fields)
        known = {f.name for f in self._fields}
        if unknown := sorted(set(names) - known):
            raise CacheFormatError(f"{self._path}: no fields {unknown}; it has {sorted(known)}")
        return self._read(position, [f for f in self._fields if f.name in names])

    @abstractmethod
    def _read(self, position: int, fields: Sequence[Field]) -> Record:
        """Return these fields of a record that is there."""

    @abstractmethod
    def check(self) -> None:
        """Check dtypes, shapes and offsets of all fields, without decoding values where possible."""

    @abstractmethod
    def close(self) -> None:
        """Release files and memory; the reader is not used afterwards."""


def _digests(shard: Path) -> list[tuple[str, str, str, int]]:
    names = walk_files(shard) if shard.is_dir() else [""]
    return [(name, *file_digests(shard / name)) for name in names]


def prepare_shard(cache_dir: Path, index: int, suffixes: Sequence[str]) -> None:
    """Make room to write a shard: remove what a killed run left of it.

    A shard without its sidecar does not exist, so one that was published by a run killed before the
    sidecar is a leftover too, unless its lock says that a live process is about to write the sidecar.

    Raises:
        CacheMismatchError: If the shard is already finished.
    """
    folder = sidecar_path(cache_dir, index).parent
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        fsync_directory(folder.parent)
    _refuse_finished(cache_dir, index)
    clean_stale(folder, f"{index:05d}.")
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
