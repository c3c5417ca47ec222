"""The values of one array of a shard: its one file, of chunks and their places behind them.

zarr-python reads and writes any array of any store, through an event loop: for a shard's fifty small arrays that took more time
than the coding. Here an array is what `zarr_metadata` lets pass, decoded chunk by chunk into its place; what is written is byte for
byte what zarr-python writes.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c  # which zarr needs for the same checksums
import numpy as np
from numcodecs import blosc, zstd
from numcodecs.blosc import Blosc

from vlm_distill_cache.common.cache.stores.base import frame_content_bytes
from vlm_distill_cache.common.cache.stores.zarr_metadata import ArrayLayout
from vlm_distill_cache.common.errors import CacheFormatError

blosc.use_threads = False  # as zarr sets it: its threads do not survive a fork, and readers are many already
_CRC_BYTES = 4


def read_chunks(path: Path, layout: ArrayLayout, dtype: np.dtype) -> np.ndarray:
    """Read an array of at least one row, from its one file.

    Raises:
        CacheFormatError: If a chunk lies outside of the file, or would decode to another size than the metadata says.
        Exception: One of `base.DAMAGE_ERRORS` if bytes cannot be decoded.
    """
    values = np.empty(layout.chunks * layout.chunk_bytes, np.uint8)
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        size, index_bytes = os.fstat(descriptor).st_size, 16 * layout.chunks + _CRC_BYTES
        index = os.pread(descriptor, index_bytes, max(0, size - index_bytes))
        if len(index) != index_bytes:
            raise CacheFormatError(f"{path}: too short for {layout.chunks} chunks; the shard is damaged")
        places = np.frombuffer(index[:-_CRC_BYTES], "<u8").reshape(-1, 2).tolist()
        if any(place + length > size - index_bytes for place, length in places):  # so is the mark of one never written
            raise CacheFormatError(f"{path}: a chunk lies outside the file; the shard is damaged")
        _without_checksum(index)
        for number, (place, length) in enumerate(places):
            chunk = os.pread(descriptor, length, place)
            declared = _declared_bytes(chunk, layout)
            if declared != layout.chunk_bytes:
                raise CacheFormatError(
                    f"{path}: a chunk declares {declared} bytes; expected {layout.chunk_bytes}; refused"
                )
            start = number * layout.chunk_bytes
            _decode(chunk, layout, values[start : start + layout.chunk_bytes])
    finally:
        os.close(descriptor)
    rows = values.view(dtype).reshape(-1, *layout.shape[1:])
    return rows[: layout.shape[0]]


def encode_chunks(values: np.ndarray, rows: int, compressor: Blosc) -> bytes:
    """The file of an array of at least one row, in chunks of so many; the last one is filled up with zeros."""
    chunks, places, begin = list[bytes](), list[int](), 0
    for first in range(0, len(values), rows):
        part = values[first : first + rows]
        if len(part) < rows:
            part = np.concatenate([part, np.zeros((rows - len(part), *part.shape[1:]), part.dtype)])
        chunks.append(compressor.encode(np.ascontiguousarray(part)))
        places += (begin, len(chunks[-1]))
        begin += len(chunks[-1])
    index = np.array(places, "<u8").tobytes()
    return b"".join((*chunks, index, google_crc32c.value(index).to_bytes(_CRC_BYTES, "little")))


def _decode(chunk: bytes, layout: ArrayLayout, into: np.ndarray) -> None:
    data = _without_checksum(chunk) if layout.chunk_checksums else chunk
    if layout.compressor == "blosc":
        blosc.decompress(data, into)
    elif layout.compressor == "zstd":
        zstd.decompress(data, into)
    else:
        into[:] = np.frombuffer(data, np.uint8)


def _without_checksum(data: bytes) -> bytes:
    """The bytes in front of their crc32c."""
    plain, stored = data[:-_CRC_BYTES], int.from_bytes(data[-_CRC_BYTES:], "little")
    if (found := google_crc32c.value(plain)) != stored:
        raise ValueError(f"crc32c is {found}; expected {stored}")
    return plain


def _declared_bytes(chunk: bytes, layout: ArrayLayout) -> int | None:
    """Return the decoded size that a chunk's first bytes declare, None if they are no header."""
    if layout.compressor == "zstd":
        return frame_content_bytes(chunk[:-_CRC_BYTES] if layout.chunk_checksums else chunk)
    if layout.compressor == "blosc":  # a header of 16 bytes; the decoded size is at 4
        return int.from_bytes(chunk[4:8], "little") if len(chunk) >= 16 else None
    return len(chunk) - _CRC_BYTES if layout.chunk_checksums else len(chunk)
