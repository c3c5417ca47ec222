"""WebDataset: one tar per shard, one member ``KEY.safetensors.zst`` per sample, in the data set's order.

A member is a zstd frame around a safetensors file with the record's arrays; its metadata holds the real
sample id. KEY is the sample id with everything but letters, digits, ``_`` and ``-`` written as ``~xx``:
WebDataset cuts a key at its first dot, and a slash would make a folder. Headers are plain ustar without
time, owner or mode of their own, so equal records give equal tars.

In format version 2 a member leaves out the arrays that are empty: what a record of one picture has no use for costs nothing.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from numcodecs.zstd import Zstd
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from vlm_distill_cache.common.cache.document_rules import MAX_SHARD_SAMPLES
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Field, Record, check_record, version_of
from vlm_distill_cache.common.cache.stores.base import (
    DAMAGE_ERRORS,
    MAX_RECORD_BYTES,
    ShardReader,
    ShardWriter,
    frame_content_bytes,
)
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import create_temporary
from vlm_distill_cache.common.files.hashing import checksum

EXTENSION = ".safetensors.zst"
_ZSTD_LEVEL = 9
_MAX_EXPANSION = 1 << 15  # of a zstd frame: 128 KiB of one byte take a block of 4
_MAX_HEADER_BYTES = 1 << 20  # of safetensors: some hundred bytes a field, and the sample id
_MAX_KEY = 80  # with the extension below the 100 bytes of a ustar name
_PLAIN = re.compile(rb"[A-Za-z0-9_-]")
_KEY = re.compile(r"[A-Za-z0-9_~-]+")
_ESCAPED = re.compile(rb"~([0-9a-f]{2})")


def key_of(sample_id: str) -> str:
    """Return a tar key for a sample id: no dots or slashes, unique, reversible unless it is long."""
    key = "".join(chr(byte) if _PLAIN.match(bytes([byte])) else f"~{byte:02x}" for byte in sample_id.encode())
    if len(key) <= _MAX_KEY:
        return key
    return f"{key[: _MAX_KEY - 34]}~h{checksum(sample_id.encode())}"  # "~h" cannot begin an escape


def encode_member(sample_id: str, record: Record) -> bytes:
    """Return the bytes of a tar member."""
    arrays = {name: np.ascontiguousarray(array) for name, array in record.items()}
    # One metadata key only: the order of several would not be fixed.
    plain = safetensors_numpy.save(arrays, metadata={"sample_id": sample_id})
    return bytes(Zstd(level=_ZSTD_LEVEL).encode(plain))


def decode_member(data: bytes, where: str) -> tuple[str, Record]:
    """Read what ``encode_member`` wrote, bounded before it allocates."""
    size, limit = frame_content_bytes(data), min(MAX_RECORD_BYTES, _MAX_EXPANSION * len(data))
    if size is None or size > limit:
        raise CacheFormatError(f"{where}: declares {size} bytes, above {limit}, or is damaged")
    try:
        plain = bytes(Zstd().decode(data))
        if (header_bytes := int.from_bytes(plain[:8], "little")) > _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {header_bytes} bytes; at most {_MAX_HEADER_BYTES} are believed")
        record = safetensors_numpy.load(plain)
        header = json.loads(plain[8 : 8 + header_bytes])
        sample_id = header["__metadata__"]["sample_id"]
    except (*DAMAGE_ERRORS, SafetensorError) as error:
        raise CacheFormatError(f"{where}: cannot be decoded ({error!r}); the shard is damaged") from error
    return sample_id, {name: array.copy() for name, array in record.items()}


class WebDatasetWriter(ShardWriter):
    """Streams records into a temporary tar and publishes ``shards/00000.tar`` on ``close``."""

    suffix = "tar"

    def __init__(self, cache_dir: Path, index: int, fields: tuple[Field, ...]) -> None:
        super().__init__(cache_dir, index, fields)
        self._temporary, self._lock = create_temporary(self._final)
        self._file = self._temporary.open("wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def _add(self, sample_id: str, record: Record) -> None:
        if self.format_version != ONE_PICTURE:
            record = {name: array for name, array in record.items() if len(array)}
        data = encode_member(sample_id, record)
        member = tarfile.TarInfo(key_of(sample_id) + EXTENSION)  # as `_member_header` has it
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, BytesIO(data))

    def _write(self) -> tuple[Path, list[str]]:
        if self._temporary is None:
            raise ValueError(f"{self._final}: the writer is closed")
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._temporary, [""]

    def abort(self) -> None:
        """Drop what is not published, and the lock."""
        self._file.close()
        super().abort()


class WebDatasetReader(ShardReader):
    """Reads ``shards/00000.tar`` at random: the members' places are scanned once, on opening."""

    suffix = WebDatasetWriter.suffix
    is_folder = False

    def __init__(self, cache_dir: Path, index: int, fields: tuple[Field, ...]) -> None:
        super().__init__(cache_dir, index, fields)
        self._descriptor: int | None = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._members = self._scan()
            self.sample_ids = tuple(self._id_of(i) for i in range(len(self._members)))
        except CacheFormatError:
            self.close()
            raise

    def _read(self, position: int, fields: Sequence[Field]) -> Record:
        where = f"{self._path}, sample {self.sample_ids[position]!r}"
        sample_id, record = self._decode(position)
        if sample_id != self.sample_ids[position]:
            raise CacheFormatError(f"{where}: the member says it is {sample_id!r}; the shard is damaged")
        if version_of(self._fields) != ONE_PICTURE:
            record = {field.name: field.empty() for field in self._fields} | record
        check_record(record, self._fields, where)
        return {field.name: record[field.name] for field in fields}

    def check(self) -> None:
        """Check the first record's fields, dtypes and shapes; the places were checked on opening."""
        if self._members:
            self.read(0)

    def close(self) -> None:
        """Close the tar."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        # Bound as a default: at the interpreter's exit the module's own names may be gone already.
        if (descriptor := getattr(self, "_descriptor", None)) is not None:
            close(descriptor)

    def _scan(self) -> list[tuple[str, int, int]]:
        """Return ``(key, offset, bytes)`` of each member; nothing is extracted, and tarfile is not asked.

        A header must be the very one that the writer writes for its name and size. So links, devices, folders,
        sparse files and extended headers, which could give a member any name or size, are not even parsed.
        """
        members: list[tuple[str, int, int]] = []
        size, place = os.fstat(self._descriptor or 0).st_size, 0
        while (header := self._pread(tarfile.BLOCKSIZE, place)).strip(b"\0"):
            name, length = _read_header(header)
            key, start = name.removesuffix(EXTENSION), place + tarfile.BLOCKSIZE
            is_record = key != name and _KEY.fullmatch(key) and header == _member_header(name, length)
            if not is_record or start + length > size or len(members) >= MAX_SHARD_SAMPLES:
                raise CacheFormatError(
                    f"{self._path}: member {name!r} is not a record of a cache, or is cut off; the shard is damaged"
                )
            members.append((key, start, length))
            place = start + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        end = -(-(place + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        if size != end or self._pread(end - place, place).strip(b"\0"):
            raise CacheFormatError(f"{self._path}: no end-of-archive mark after its records; truncated")
        return members

    def _id_of(self, position: int) -> str:
        key = self._members[position][0]
        if "~h" in key:  # a long id, of which the key holds only the beginning and a hash
            return self._decode(position)[0]
        try:
            return _ESCAPED.sub(lambda escaped: bytes([int(escaped[1], 16)]), key.encode()).decode()
        except UnicodeDecodeError as error:
            raise CacheFormatError(f"{self._path}: member {key!r} is not a sample's key") from error

    def _decode(self, position: int) -> tuple[str, Record]:
        key, offset, size = self._members[position]
        return decode_member(self._pread(size, offset), f"{self._path}, member {key}")

    def _pread(self, size: int, offset: int) -> bytes:
        if self._descriptor is None:
            raise ValueError(f"{self._path}: the reader is closed")
        return os.pread(self._descriptor, size, offset)


def _member_header(name: str, size: int) -> bytes:
    """Return the one header that a member of this name and size has, 512 bytes."""
    member = tarfile.TarInfo(name)  # mtime, uid, gid are 0, names empty
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def _read_header(header: bytes) -> tuple[str, int]:
    """Return what a tar header says of name and size, to be compared with `_member_header`; else no name."""
    name, digits = header[:100].rstrip(b"\0"), header[124:135]
    if not name.isascii() or not re.fullmatch(rb"[0-7]{11}", digits):
        return "", 0
    return name.decode("ascii"), int(digits, 8)
