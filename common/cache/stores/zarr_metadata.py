"""What a shard's Zarr metadata may say, checked before anything acts on it.

A reader of Zarr builds whatever codec the metadata names and allocates whatever shape it declares, and a decoder
whatever size a chunk's first bytes declare. A cache that came from elsewhere gets none of that: one file an array,
one level of sharding, the codecs that the writer uses, the field's own dtype, bounded sizes, and chunks whose own
headers declare the size that the metadata says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.document_rules import MAX_SHARD_SAMPLES
from vlm_distill_cache.common.cache.schema import Field
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import read_json

CHUNK_BYTES = 256 << 10
_DATA_TYPES = {"u1": "uint8", "u2": "uint16", "u4": "uint32", "i8": "int64", "f2": "float16", "f4": "float32"}
_COMPRESSORS = ("blosc", "zstd")
_MAX_METADATA_BYTES = 4 << 20
_MIN_CHUNK_BYTES = 4096  # on average; smaller ones cost more memory than they hold


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Where the values of one array are, as its checked metadata says.

    Attributes:
        chunks: In its one file.
        chunk_bytes: Decoded bytes of each.
        compressor: ``blosc``, ``zstd`` or empty.
        chunk_checksums: Whether four bytes of crc32c follow each chunk.
    """

    shape: tuple[int, ...]
    chunks: int
    chunk_bytes: int
    compressor: str
    chunk_checksums: bool


def read_group_metadata(path: Path) -> tuple[int, dict[str, Any]]:
    """Read the consolidated metadata of a shard's group."""
    where = path / "zarr.json"
    try:
        root = read_json(where, max_bytes=_MAX_METADATA_BYTES)
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
) -> dict[str, ArrayLayout]:
    """Check what the metadata declares for all arrays of a shard.

    Args:
        expected: By name, the field whose dtype and trailing shape an array must have, and the bytes it may
            decode to.
    """
    if arrays.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - arrays.keys()), sorted(arrays.keys() - expected.keys())
        raise CacheFormatError(f"{path}: missing arrays {missing}, unexpected arrays {extra}; damaged")
    return {
        name: _check_array(arrays[name], field, limit, f"{path}/{name}") for name, (field, limit) in expected.items()
    }


def _check_array(metadata: Any, field: Field, limit: int, where: str) -> ArrayLayout:
    try:
        shape = tuple(metadata["shape"])
        grid = tuple(metadata["chunk_grid"]["configuration"]["chunk_shape"])
        names = (metadata["node_type"], metadata["chunk_grid"]["name"], metadata["chunk_key_encoding"])
        data_type, transformers = metadata["data_type"], metadata.get("storage_transformers")
        chunk, inner = _check_codecs(metadata["codecs"], where)
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise CacheFormatError(f"{where}: no metadata of an array ({error!r}); damaged") from error
    wanted = _DATA_TYPES[field.dtype]
    plain = names == ("array", "regular", {"name": "default", "configuration": {"separator": "/"}})
    if not plain or transformers or data_type != wanted or shape[1:] != field.trailing:
        raise CacheFormatError(
            f"{where}: declares {data_type} {shape}; expected {wanted} (n, *{field.trailing}) in plain chunks"
        )
    if not all(_is_count(n) for sizes in (shape, grid, chunk) for n in sizes):
        raise CacheFormatError(f"{where}: declares shape {shape} in chunks of {grid}; damaged")
    itemsize = field.numpy_dtype.itemsize
    size, shard_bytes, chunk_bytes = (math.prod(sizes) * itemsize for sizes in (shape, grid, chunk))
    if size > limit or max(shard_bytes, chunk_bytes) > 2 * size + CHUNK_BYTES:
        raise CacheFormatError(
            f"{where}: declares {size} bytes in chunks of {max(shard_bytes, chunk_bytes)}; at most {limit} are believed"
        )
    one_file = grid[1:] == chunk[1:] == field.trailing and grid[0] >= shape[0] and chunk[0] > 0
    if not one_file or grid[0] % chunk[0] or grid[0] // chunk[0] > 16 + size // _MIN_CHUNK_BYTES:
        raise CacheFormatError(
            f"{where}: declares shape {shape} in shards of {grid} and chunks of {chunk}; expected one shard of "
            f"whole rows, in chunks of {_MIN_CHUNK_BYTES} bytes or more"
        )
    return ArrayLayout(
        shape=shape,
        chunks=grid[0] // chunk[0],
        chunk_bytes=chunk_bytes,
        compressor=inner[0] if inner[:1] and inner[0] in _COMPRESSORS else "",
        chunk_checksums="crc32c" in inner,
    )


def _check_codecs(codecs: list[Any], where: str) -> tuple[tuple[int, ...], list[str]]:
    """Refuse codecs that a cache never uses; return the chunks' shape, and what follows their bytes."""
    [sharding] = codecs
    settings = sharding["configuration"]
    outer = (sharding["name"], settings.get("index_location", "end"))
    named = [codec["name"] for codec in settings["codecs"]]
    index = [codec["name"] for codec in settings["index_codecs"]]
    orders = [
        (codec.get("configuration") or {}).get("endian", "little")
        for codec in (*settings["codecs"], *settings["index_codecs"])
    ]
    allowed = [["bytes", *middle, *end] for middle in ([], ["blosc"], ["zstd"]) for end in ([], ["crc32c"])]
    if outer != ("sharding_indexed", "end") or index != ["bytes", "crc32c"] or named not in allowed:
        raise CacheFormatError(f"{where}: codecs {outer}, {named}, {index} are not those of a cache; refused")
    if set(orders) != {"little"}:
        raise CacheFormatError(f"{where}: byte orders {orders} are not those of a cache; refused")
    return tuple(settings["chunk_shape"]), named[1:]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
