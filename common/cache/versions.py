"""The versions of a cache that is topped up: what it was before, and what it becomes, are folders beside it.

They are named by the manifest of the version *before*: a finished folder of another manifest than its name says waits to
take its place, one of the very manifest has given it up. Whoever opened a cache and finds another one in its place reads
on in the folder that he opened: it is known by its inode.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.errors import CacheFormatError

MARK, BEFORE, EXTENDING = ".", "before", "extending"
_HASH_DIGITS = 12
_VERSION = re.compile(rf"(.+)\{MARK}(?:{BEFORE}|{EXTENDING})-[0-9a-f]{{{_HASH_DIGITS}}}", re.DOTALL)

Identity = tuple[int, int]
"""Device and inode of a folder."""


def version_folder(cache_dir: Path, kind: str, manifest: Manifest) -> Path:
    """The folder of a version beside a cache; ``manifest``: of the version before."""
    return cache_dir.with_name(f"{cache_dir.name}{MARK}{kind}-{manifest.hash[:_HASH_DIGITS]}")


def kept_versions(cache_dir: Path) -> dict[str, Path]:
    """Where a cache is kept as it was before it was extended: folders beside it, by the hash of their manifest."""
    place, found = Path(os.path.realpath(cache_dir)), {}
    with contextlib.suppress(OSError):
        for folder in place.parent.iterdir():
            if folder.name.startswith(f"{place.name}{MARK}{BEFORE}-"):
                with contextlib.suppress(CacheFormatError, OSError):
                    manifest = read_manifest(folder)
                    if version_folder(place, BEFORE, manifest) == folder:
                        found[manifest.hash] = folder
    return found


def version_of(folder: Path) -> Path | None:
    """The cache that a folder, by its name, is a version of."""
    found = _VERSION.fullmatch(folder.name)
    return None if found is None else folder.with_name(found[1])


def identity(folder: Path) -> Identity | None:
    """What tells a folder from another one of its name; None if it is not there."""
    try:
        found = os.stat(folder)  # noqa: PTH116 - before each read: a Path's own takes three times as long
    except OSError:
        return None
    return found.st_dev, found.st_ino


def moved_to(cache_dir: Path, manifest: Manifest, opened: Identity) -> Path | None:
    """Where a cache lies that was opened in this folder, and is not there any more; None: nowhere that is known."""
    place = cache_dir.resolve()
    folders = (version_folder(place, kind, manifest) for kind in (EXTENDING, BEFORE))
    return next((folder for folder in folders if identity(folder) == opened), None)
