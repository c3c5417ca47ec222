"""JSON objects that carry a checksum over themselves, and may list what the files beside them hold.

``checksum`` is the fingerprint of everything else in the object, so whoever reads it notices a flipped bit anywhere in it.
What it says of other files (bytes and xxh3_128 of each) can then be believed, and tells whether they are whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import is_out_of_reach, json_bytes, read_json, write_bytes_atomic
from vlm_distill_cache.common.files.hashing import file_checksum, fingerprint, fingerprint_parsed

CHECKSUM = "checksum"


def document_bytes(body: Mapping[str, Any]) -> bytes:
    """Return the file of a body: canonical JSON with its checksum."""
    return json_bytes({**body, CHECKSUM: fingerprint(dict(body))})


def write_signed(path: Path, body: Mapping[str, Any]) -> None:
    """Write a body with its checksum, atomically; equal bodies give equal bytes."""
    write_bytes_atomic(path, document_bytes(body))


def read_signed(path: Path, *, unsigned: Collection[str] = ()) -> dict[str, Any]:
    """Read a body and check it.

    Args:
        unsigned: Keys of such a file from before it had a checksum; one with exactly these is returned as it is.

    Raises:
        FileNotFoundError: If it is not there.
        CacheFormatError: If it is no file, no object, or not what was written.
        ConfigError: If the system does not let it be read, so that nothing is known of it.
    """
    try:
        found = read_json(path)
    except (OSError, CacheFormatError) as error:
        refuse_out_of_reach(path, error)
        raise
    if not isinstance(found, dict):
        raise CacheFormatError(f"{path}: damaged: holds {type(found).__name__}, expected an object")
    if unsigned and found.keys() == set(unsigned):
        return found
    body = checked_body(found, str(path))
    if unsigned and body.keys() == set(unsigned):
        raise CacheFormatError(
            f"{path}: damaged, or edited by hand: has a checksum, and lacks what is written with one"
        )
    return body


def refuse_out_of_reach(path: Path, error: Exception) -> None:
    """Tell what cannot be read at the moment from what is lost or damaged: it may be sound, and must stay.

    Raises:
        ConfigError: If the error is of that kind.
    """
    if is_out_of_reach(error):
        cause = error if isinstance(error, OSError) else error.__cause__
        raise ConfigError(
            f"{path}: cannot be read: {getattr(cause, 'strerror', None) or error}; nothing was changed. Make it readable "
            "(its mode or owner, or those of its folder; the disk), then run the same command again"
        ) from error


def checked_body(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a parsed document without its checksum, after a check that it fits."""
    body = dict(document)
    stated, found = body.pop(CHECKSUM, None), _checksum_of(body, where)
    if stated != found:
        raise CacheFormatError(f"{where}: damaged, or edited by hand: states checksum {stated}, has {found}")
    return body


def _checksum_of(body: Mapping[str, Any], where: str) -> str:
    try:
        return fingerprint_parsed(body)
    except (ValueError, RecursionError) as error:
        raise CacheFormatError(f"{where}: damaged: {error}") from error


def list_files(folder: Path, names: Iterable[str] | None = None) -> dict[str, list[Any]]:
    """Return ``[bytes, xxh3_128]`` of files by their path in a folder; None: of all that are there."""
    if names is None:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: [(folder / name).stat().st_size, file_checksum(folder / name)] for name in names}


def find_damage(folder: Path, listed: Any) -> list[str]:
    """Say what of the files that `list_files` listed is lost or changed, a text each; other files may be there.

    Raises:
        ConfigError: If the system does not let one be read.
    """
    if not isinstance(listed, dict):
        return [f"{folder}: damaged: no list of files"]
    damage = []
    for name, entry in listed.items():
        path = folder / name
        try:
            path.stat()  # is_file() would take one out of reach for none
            if not path.is_file():
                damage.append(f"{path}: missing")
            elif (found := [path.stat().st_size, file_checksum(path)]) != entry:
                damage.append(f"{path}: damaged or changed: has {found}, expected {entry} (bytes, xxh3_128)")
        except FileNotFoundError:
            damage.append(f"{path}: missing")
        except (OSError, ValueError) as error:  # a name with NUL is a ValueError
            refuse_out_of_reach(path, error)
            damage.append(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}")
    return damage
