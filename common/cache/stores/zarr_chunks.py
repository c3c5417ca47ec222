"""The values of one array of a shard, decoded chunk by chunk into their place; nothing of a chunk is copied on the way.

zarr-python reads any array of any store, through an event loop: for a shard's fifty small arrays that took more time than the
decoding. Here an array is what `zarr_metadata` lets pass: one file, its chunks' places at the end of it.
"""

from __future__ import annotations

import os
from pathlib import Path

import google_crc32c  # which zarr needs for the same checksums
import numpy as np
from numcodecs import blosc, zstd

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
