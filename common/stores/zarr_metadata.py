"""What a shard's Zarr metadata may say, checked before zarr acts on it.

zarr-python builds whatever codec the metadata names and allocates whatever shape it declares. A cache that
came from elsewhere gets neither: only the standard codecs, only the field's own dtype, only bounded sizes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from common.atomic import read_json
from common.errors import CacheFormatError
from common.plan import MAX_SHARD_SAMPLES

if TYPE_CHECKING:
    from pathlib import Path

CHUNK_BYTES = 256 << 10
_DATA_TYPES = {
    "u1": "uint8",
    "u2": "uint16",
    "u4": "uint32",
    "i8": "int64",
    "f2": "float16",
    "f4": "float32",
}
_CODECS = {"sharding_indexed", "bytes", "blosc", "zstd", "gzip", "crc32c", "transpose"}


def read_group_metadata(path: Path) -> tuple[int, dict[str, Any]]:
    """Read the consolidated metadata of a shard's group.

    Returns:
        The number of samples, and the metadata of each array by name.

    Raises:
        CacheFormatError: If it is missing, damaged, or not that of a shard.
    """
    where = path / "zarr.json"
    try:
        root = read_json(where)
        samples = root["attributes"]["samples"]
        arrays = root["consolidated_metadata"]["metadata"]
        is_group = (root["zarr_format"], root["node_type"]) == (3, "group")
    except FileNotFoundError:
        raise CacheFormatError(f"{where}: missing; the shard is damaged") from None
    except (LookupError, TypeError) as error:
        raise CacheFormatError(f"{where}: not the group of a shard ({error!r}); damaged") from error
    if not is_group or not isinstance(arrays, dict):
        raise CacheFormatError(f"{where}: not the group of a shard; damaged")
    if not _is_count(samples) or samples > MAX_SHARD_SAMPLES:
        raise CacheFormatError(f"{where}: declares {samples!r} samples; at most {MAX_SHARD_SAMPLES} fit")
    return samples, arrays


def check_array_metadata(
    arrays: dict[str, Any], name: str, dtype: str, trailing: tuple[int, ...], limit: int, path: Path
) -> tuple[int, ...]:
    """Check what the metadata declares for one array.

    Args:
        arrays: From ``read_group_metadata``.
        name: Of the array.
        dtype: It must have, for example ``u4``.
        trailing: Shape after the first axis that it must have.
        limit: Bytes it may decode to.
        path: Of the shard, for error messages.

    Returns:
        The shape, whose decoded size is within ``limit``.

    Raises:
        CacheFormatError: If anything else is declared.
    """
    where = f"{path}/{name}"
    try:
        metadata = arrays[name]
        shape = tuple(metadata["shape"])
        grid = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        data_type, is_array = metadata["data_type"], metadata["node_type"] == "array"
        chunks = _check_codecs(metadata["codecs"], where)
    except (LookupError, TypeError, AttributeError) as error:
        raise CacheFormatError(f"{where}: no metadata of an array ({error!r}); damaged") from error
    if not is_array or data_type != _DATA_TYPES[dtype] or shape[1:] != trailing or len(grid) != len(shape):
        raise CacheFormatError(
            f"{where}: declares {data_type} {shape}; expected {_DATA_TYPES[dtype]} (n, *{trailing})"
        )
    if not all(_is_count(n) for sizes in (shape, grid, *chunks) for n in sizes):
        raise CacheFormatError(f"{where}: declares shape {shape} in chunks of {grid}; damaged")
    itemsize = np.dtype(dtype).itemsize
    size = math.prod(shape) * itemsize
    largest = max(math.prod(sizes) for sizes in (grid, *chunks)) * itemsize
    if size > limit or largest > 2 * size + CHUNK_BYTES:
        raise CacheFormatError(
            f"{where}: declares {size} bytes in chunks of {largest}; at most {limit} are believed"
        )
    return shape


def _check_codecs(codecs: list[Any], where: str) -> list[tuple[int, ...]]:
    """Refuse codecs that a cache never uses; return the shapes of inner chunks."""
    inner_shapes = []
    pending = list(codecs)
    while pending:
        codec = pending.pop()
        if codec["name"] not in _CODECS:
            raise CacheFormatError(f"{where}: codec {codec['name']!r} is not one a cache uses; refused")
        settings = codec.get("configuration") or {}
        pending += [*settings.get("codecs", []), *settings.get("index_codecs", [])]
        if "chunk_shape" in settings:
            inner_shapes.append(tuple(settings["chunk_shape"]))
    return inner_shapes


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
