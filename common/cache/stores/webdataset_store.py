"""WebDataset: one tar per shard, one member ``KEY.safetensors.zst`` per sample, in the data set's order.

A member is a zstd frame around a safetensors file with the record's arrays; its metadata holds the real
sample id. KEY is the sample id with everything but letters, digits, ``_`` and ``-`` written as ``~xx``:
WebDataset cuts a key at its first dot, and a slash would make a folder. Headers are plain ustar without
time, owner or mode of their own, so equal records give equal tars.

In format version 2 a member leaves out the arrays that are empty: what a record of one picture has no use for costs nothing.
"""

from __future__ import annotations

import json
import math
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs import zstd
from numcodecs.zstd import Zstd
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy

from vlm_distill_cache.common.cache.document_rules import MAX_SHARD_SAMPLES
from vlm_distill_cache.common.cache.schema import (
    ONE_PICTURE,
    Field,
    Record,
    check_lengths,
    check_record,
    version_of,
)
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
_MAX_LAYOUTS = 8  # of one cache: with and without pictures, frames, several views
_CHECKED_AT_A_TIME = 1024  # headers
_MAX_KEY = 80  # with the extension below the 100 bytes of a ustar name
_NAMES = {"u1": "U8", "u2": "U16", "u4": "U32", "i8": "I64", "f2": "F16", "f4": "F32"}  # of dtypes, in safetensors
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


class _Layout:
    """Members that hold certain arrays, laid out as the writer does: their header follows from sample id and axes' lengths.

    For records of a few KB it takes a quarter of what `decode_member` and `check_record` take, which are the rule: what is laid
    out in any other way is left to them, and so is the error that says what is wrong.
    """

    def __init__(self, names: Sequence[str], fields: tuple[Field, ...]) -> None:
        """Describe them; ``names``: the arrays in the order in which they lie, the widest numbers first."""
        known = {field.name: field for field in fields}
        self._arrays: list[tuple[str, np.dtype, int, tuple[int, ...], str]] = []
        self._marks: dict[str, tuple[bytes, bytes]] = {}  # by axis: what its length stands between
        text = b'{"__metadata__":{"sample_id":"%b"}'
        for field in (known[name] for name in names):
            dtype, rest = field.numpy_dtype, b"".join(b",%d" % size for size in field.trailing)
            mark = b'"%b":{"dtype":"%b","shape":[' % (field.name.encode(), _NAMES[field.dtype].encode())
            text += b',%b%%d%b],"data_offsets":[%%d,%%d]}' % (mark, rest)
            self._marks.setdefault(field.axis, (mark, rest[:1] or b"]"))
            row_bytes = dtype.itemsize * math.prod(field.trailing)
            self._arrays.append((field.name, dtype, row_bytes, field.trailing, field.axis))
        self._text = text + b"}"
        self._absent = [field for field in fields if field.name not in names]

    @classmethod
    def of(cls, data: bytes, sample_id: str, fields: tuple[Field, ...]) -> _Layout | None:
        """The layout of a member that `decode_member` has read; None if it is no layout of the writer."""
        plain = bytearray(zstd.decompress(data))
        start = 8 + int.from_bytes(plain[:8], "little")
        layout = cls([name for name in json.loads(plain[8:start]) if name != "__metadata__"], fields)
        sizes = [dtype.itemsize for _, dtype, *_ in layout._arrays]
        whole = not layout._absent or version_of(fields) != ONE_PICTURE  # else empty arrays are there, too
        return layout if whole and sizes == sorted(sizes, reverse=True) and layout.read(plain, sample_id) else None

    def read(self, plain: bytearray, sample_id: str) -> Record | None:
        """Return the record of a member, whose arrays are views of its bytes; None: laid out otherwise."""
        start = 8 + int.from_bytes(plain[:8], "little")
        text = plain[8:start]
        lengths, numbers, arrays, begin = dict[str, int](), list[Any](), Record(), 0
        try:
            for axis, (mark, behind) in self._marks.items():
                place = text.index(mark) + len(mark)
                lengths[axis] = int(text[place : text.index(behind, place)])
            for name, dtype, row_bytes, trailing, axis in self._arrays:
                length = lengths[axis]
                arrays[name] = np.ndarray((length, *trailing), dtype, plain, start + begin)
                end = begin + length * row_bytes
                numbers += (length, begin, end)
                begin = end
            expected = self._text % (sample_id.encode(), *numbers)  # others than JSON would escape are met more often
            if start % 8 or text != expected.ljust(len(text)) or start + begin != len(plain):
                return None
            named = {axis: (length, axis) for axis, length in lengths.items()}
            for field in self._absent:
                arrays[field.name] = field.empty()
                if named.setdefault(field.axis, (0, field.axis))[0]:
                    return None
            check_lengths(arrays, named, "")
        except (ValueError, TypeError, MemoryError):
            return None
        return arrays


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
        member = tarfile.TarInfo(key_of(sample_id) + EXTENSION)  # as `_other_headers` has it
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
        self._layouts: list[_Layout] = []  # that were met
        self._descriptor: int | None = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._members = self._scan()
            self.sample_ids = tuple(self._id_of(i) for i in range(len(self._members)))
        except CacheFormatError:
            self.close()
            raise

    def _read(self, position: int, fields: Sequence[Field]) -> Record:
        key, offset, size = self._members[position]
        data, sample_id = self._pread(size, offset), self.sample_ids[position]
        record = self._as_written(data, sample_id)
        if record is None:
            record = self._as_it_is(data, f"{self._path}, member {key}", sample_id)
        if len(fields) == len(self._fields):
            return {field.name: record[field.name] for field in fields}
        return {
            field.name: record[field.name].copy() for field in fields
        }  # or all others would stay in memory with them

    def _as_written(self, data: bytes, sample_id: str) -> Record | None:
        size = frame_content_bytes(data)
        if not self._layouts or size is None or size > min(MAX_RECORD_BYTES, _MAX_EXPANSION * len(data)):
            return None
        try:
            # Given the memory to write to, numcodecs looks at it for longer than this copy of some KB takes.
            plain = bytearray(zstd.decompress(data))
        except DAMAGE_ERRORS:
            return None
        return next((found for layout in self._layouts if (found := layout.read(plain, sample_id)) is not None), None)

    def _as_it_is(self, data: bytes, member: str, sample_id: str) -> Record:
        found, record = decode_member(data, member)
        where = f"{self._path}, sample {sample_id!r}"
        if found != sample_id:
            raise CacheFormatError(f"{where}: the member says it is {found!r}; the shard is damaged")
        if version_of(self._fields) != ONE_PICTURE:
            record = {field.name: field.empty() for field in self._fields} | record
        check_record(record, self._fields, where)
        if len(self._layouts) < _MAX_LAYOUTS and (layout := _Layout.of(data, sample_id, self._fields)) is not None:
            self._layouts.append(layout)
        return record

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
        headers: list[bytes] = []
        size, place = os.fstat(self._descriptor or 0).st_size, 0
        while (header := self._pread(tarfile.BLOCKSIZE, place)).strip(b"\0"):
            name, length = _read_header(header)
            key, start = name.removesuffix(EXTENSION), place + tarfile.BLOCKSIZE
            is_record = key != name and _KEY.fullmatch(key) and len(header) == tarfile.BLOCKSIZE
            if not is_record or start + length > size or len(members) >= MAX_SHARD_SAMPLES:
                raise self._no_record(name)
            members.append((key, start, length))
            headers.append(header)
            if len(headers) == _CHECKED_AT_A_TIME:
                self._check_headers(headers)
                headers.clear()
            place = start + -(-length // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._check_headers(headers)
        end = -(-(place + 2 * tarfile.BLOCKSIZE) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
        if size != end or self._pread(end - place, place).strip(b"\0"):
            raise CacheFormatError(f"{self._path}: no end-of-archive mark after its records; truncated")
        return members

    def _check_headers(self, headers: Sequence[bytes]) -> None:
        """Refuse a header that is not the very one of its name and size."""
        for header in _other_headers(headers):
            raise self._no_record(_read_header(header)[0])

    def _no_record(self, name: str) -> CacheFormatError:
        return CacheFormatError(
            f"{self._path}: member {name!r} is not a record of a cache, or is cut off; the shard is damaged"
        )

    def _id_of(self, position: int) -> str:
        key = self._members[position][0]
        if "~" not in key:
            return key
        if "~h" in key:  # a long id, of which the key holds only the beginning and a hash
            _, offset, size = self._members[position]
            return decode_member(self._pread(size, offset), f"{self._path}, member {key}")[0]
        try:
            return _ESCAPED.sub(lambda escaped: bytes([int(escaped[1], 16)]), key.encode()).decode()
        except UnicodeDecodeError as error:
            raise CacheFormatError(f"{self._path}: member {key!r} is not a sample's key") from error

    def _pread(self, size: int, offset: int) -> bytes:
        if self._descriptor is None:
            raise ValueError(f"{self._path}: the reader is closed")
        return os.pread(self._descriptor, size, offset)


def _empty_header() -> bytes:
    member = tarfile.TarInfo()  # mtime, uid, gid are 0, names empty
    member.mode = 0o644
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


_HEADER = np.frombuffer(_empty_header(), dtype=np.uint8)
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 135), slice(148, 154)
_SUMMED = _HEADER.copy()  # the checksum's eight digits count as blanks
_SUMMED[148:156] = ord(" ")
_EIGHTS = 3 * np.arange(5, -1, -1)  # bits below each digit of a checksum


def _other_headers(headers: Sequence[bytes]) -> list[bytes]:
    """Those of some headers, 512 bytes each, that tarfile would not make for their names and sizes."""
    found = np.frombuffer(b"".join(headers), dtype=np.uint8).reshape(-1, len(_HEADER))
    expected = np.repeat(_SUMMED[None], len(found), axis=0)
    for part in (_NAME, _SIZE):
        expected[:, part] = found[:, part]
    sums = expected.sum(axis=1, dtype=np.int64)
    expected[:, 148:156] = _HEADER[148:156]
    expected[:, _SUM] = ord("0") + (sums[:, None] >> _EIGHTS & 7)
    return [headers[place] for place in np.flatnonzero((found != expected).any(axis=1)).tolist()]


def _read_header(header: bytes) -> tuple[str, int]:
    """Return what a tar header says of name and size, to be compared with tarfile's own; else no name."""
    name, digits = header[:100].rstrip(b"\0"), header[124:135]
    if not name.isascii() or len(digits) < 11 or digits.strip(b"01234567"):
        return "", 0
    return name.decode("ascii"), int(digits, 8)
