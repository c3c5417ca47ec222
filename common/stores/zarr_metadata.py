"""What a shard's Zarr metadata may say, checked before zarr acts on it.

zarr-python builds whatever codec the metadata names and allocates whatever shape it declares. A cache that
came from elsewhere gets neither: only the standard codecs, only the field's own dtype, only bounded sizes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from common.atomic import read_json
from common.errors import CacheFormatError
from common.plan import MAX_SHARD_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from common.schema import Field

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


def check_metadata(
    arrays: dict[str, Any], expected: Mapping[str, tuple[Field, int]], path: Path
) -> dict[str, tuple[int, ...]]:
    """Check what the metadata declares for all arrays of a shard.

    Args:
        arrays: From ``read_group_metadata``.
        expected: By name, the field whose dtype and trailing shape an array must have, and the bytes it may
            decode to.
        path: Of the shard, for error messages.

    Returns:
        The shape of each array, whose decoded size is within its limit.

    Raises:
        CacheFormatError: If an array is missing, unexpected, or declares anything else.
    """
    if arrays.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - arrays.keys()), sorted(arrays.keys() - expected.keys())
        raise CacheFormatError(f"{path}: missing arrays {missing}, unexpected arrays {extra}; damaged")
    return {
        name: _check_array(arrays[name], field, limit, f"{path}/{name}")
        for name, (field, limit) in expected.items()
    }


def _check_array(metadata: Any, field: Field, limit: int, where: str) -> tuple[int, ...]:
    try:
        shape = tuple(metadata["shape"])
        grid = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        data_type, is_array = metadata["data_type"], metadata["node_type"] == "array"
        chunks = _check_codecs(metadata["codecs"], where)
    except (LookupError, TypeError, AttributeError) as error:
        raise CacheFormatError(f"{where}: no metadata of an array ({error!r}); damaged") from error
    wanted = _DATA_TYPES[field.dtype]
    if not is_array or data_type != wanted or shape[1:] != field.trailing or len(grid) != len(shape):
        raise CacheFormatError(
            f"{where}: declares {data_type} {shape}; expected {wanted} (n, *{field.trailing})"
        )
    if not all(_is_count(n) for sizes in (shape, grid, *chunks) for n in sizes):
        raise CacheFormatError(f"{where}: declares shape {shape} in chunks of {grid}; damaged")
    itemsize = field.numpy_dtype.itemsize
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
