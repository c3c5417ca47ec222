"""The versions of a cache that is topped up: what it was before, and what it becomes, are folders beside it.

They are named by the manifest of the version *before*: a finished folder of another manifest than its name says waits to
take its place, one of the very manifest has given it up. Whoever opened a cache and finds another one in its place reads
on in the folder that he opened: it is known by its inode.
"""

from __future__ import annotations

import os
from pathlib import Path

from vlm_distill_cache.common.cache.manifest import Manifest

MARK, BEFORE, EXTENDING = ".", "before", "extending"
_HASH_DIGITS = 12

Identity = tuple[int, int]
"""Device and inode of a folder."""


def version_folder(cache_dir: Path, kind: str, manifest: Manifest) -> Path:
    """The folder of a version beside a cache; ``manifest``: of the version before."""
    return _named(cache_dir, kind, manifest.hash)


def kept_before(cache_dir: Path, manifest_hash: str) -> Path:
    """Where a cache that was topped up keeps what it was, by the hash of that version's manifest."""
    return _named(cache_dir, BEFORE, manifest_hash)


def _named(cache_dir: Path, kind: str, manifest_hash: str) -> Path:
    return cache_dir.with_name(f"{cache_dir.name}{MARK}{kind}-{manifest_hash[:_HASH_DIGITS]}")


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
