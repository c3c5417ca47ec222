"""Arrays about data, made once: files in a folder of the user's that every process maps, so that none holds a copy.

A file says what it was made of (names, sizes, times) and which code made it; one that says anything else, is damaged
or cannot be read is made anew, and nobody is told. Two processes that make the same file at once write the same bytes,
and each file appears whole. Where the folder cannot be written, what was made stays in memory.

============= ======== =============================================
part          dtype    content
============= ======== =============================================
magic         8 bytes
checksum      16 bytes xxh3_128 of all behind it
head          u4, JSON what it was made of, notes, names of the arrays
arrays                 one after another, each at a multiple of 8
============= ======== =============================================
"""

import functools
import json
import logging
import mmap
import os
import struct
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import xxhash
from numpy.typing import NDArray

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import temporary_for
from vlm_distill_cache.common.files.hashing import checksum, fingerprint, stream_checksum
from vlm_distill_cache.common.remotes.copies import RemoteFile
from vlm_distill_cache.common.remotes.mirror import mirror_settings

logger = logging.getLogger(__name__)

KEPT_FROM = 16 << 20  # bytes of data; to look through fewer takes no time
_MAGIC = b"VLMDKPT\1"
_FIXED = struct.Struct("<8s16sI")
_BODY = 24  # where what is summed begins


@dataclass(frozen=True)
class Kept:
    """What one file holds.

    Attributes:
        notes: JSON.
        arrays: By name; of a file, views of its mapped bytes, which cost no memory of this process's own.
    """

    notes: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]


def kept_folder() -> Path:
    """Where such files lie: beside the shards of caches that are read from addresses.

    Raises:
        ConfigError: If a variable of the environment is no size.
    """
    return mirror_settings()[0] / "data"


def kept_path(kind: str, of: Any) -> Path | None:
    """Where something that was made of ``of``, JSON, is kept; None where nothing can be."""
    try:
        return kept_folder() / kind / f"{fingerprint(of)}.bin"
    except (ConfigError, OSError, RuntimeError):  # no home
        return None


def read_kept(path: Path | None, of: Any) -> Kept | None:
    """Map a file; None if there is none that was made, whole, of ``of`` by this code."""
    if path is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            magic, digest, size = _FIXED.unpack(file.read(_FIXED.size))
            file.seek(_BODY)
            if magic != _MAGIC or stream_checksum(file) != digest.hex():  # read, so that no page stays mapped for it
                return None
            return _parse(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), size, of)
    except (OSError, ValueError, KeyError, TypeError, struct.error):
        return None


def write_kept(path: Path | None, of: Any, kept: Kept) -> bool:
    """Write a file whole, or say why that cannot be done; returns whether it is there."""
    if path is None:
        return False
    try:
        path.parent.resolve().mkdir(parents=True, exist_ok=True)  # behind a link that a look makes, too
        with temporary_for(path) as temporary:
            temporary.write_bytes(_bytes_of(of, kept))
            # Not flushed to the disk: of many archives that takes minutes, and a cut one is known.
            temporary.replace(path)
    except OSError as error:
        _tell_unwritable(path.parent, error.strerror or str(error))
        return False
    return True


def stamp_of(path: Path | RemoteFile) -> list[Any]:
    """What tells a file from others, and from itself when it was changed: its path, size and time, JSON."""
    if isinstance(path, RemoteFile):
        return path.stamp()
    status = path.stat()
    return [str(path.absolute()), status.st_size, status.st_mtime_ns]


@functools.cache
def code_version() -> str:
    """Hash of the code that reads data, and of the libraries that it leaves decisions to."""
    digest = xxhash.xxh3_128(f"{sys.version_info[:3]} {PIL.__version__} {np.__version__}".encode())
    root = Path(__file__).parents[2]
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _tell_unwritable(folder: Path, reason: str) -> None:
    logger.warning(
        "%s cannot be written (%s): the data are looked through again by each process; set VLM_DISTILL_CACHE_DIR to a folder "
        "that you may write",
        folder,
        reason,
    )


def _bytes_of(of: Any, kept: Kept) -> bytes:
    described = [[name, array.dtype.str, *array.shape] for name, array in kept.arrays.items()]
    values = {"of": of, "code": code_version(), "notes": kept.notes, "arrays": described}
    head = json.dumps(values, ensure_ascii=True).encode()
    head += b" " * (-(_FIXED.size + len(head)) % 8)
    parts = [struct.pack("<I", len(head)), head]
    for array in kept.arrays.values():
        data = np.ascontiguousarray(array).tobytes()
        parts += [data, b"\0" * (-len(data) % 8)]
    body = b"".join(parts)
    return _MAGIC + bytes.fromhex(checksum(body)) + body


def _parse(data: mmap.mmap, size: int, of: Any) -> Kept | None:
    """What a file of a head of so many bytes holds."""
    head = json.loads(data[_FIXED.size : _FIXED.size + size])
    if head["of"] != json.loads(json.dumps(of)) or head["code"] != code_version():
        return None
    arrays, at = {}, _FIXED.size + size
    for name, dtype, *shape in head["arrays"]:
        array = np.frombuffer(data, dtype=np.dtype(dtype), count=int(np.prod(shape)), offset=at).reshape(shape)
        arrays[name] = array
        at += array.nbytes + -array.nbytes % 8
    return Kept(head["notes"], arrays)
