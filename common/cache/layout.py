"""Where a shard lies in a cache: ``shards/01234.tar``, or, of more than 5,000 shards, ``shards/12/12345.tar``.

A shard is two entries of a folder, and the hub wants no more than 10,000 in one.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlm_distill_cache.common.cache.other_folders import SHARDS

FLAT_SHARDS = 5_000  # a cache of more keeps them in folders
FOLDER_SHARDS = 1_000
_STEM = re.compile(rf"{SHARDS}/(?:(\d\d)/)?(\d{{5}})\.")


def shard_stem(index: int, shard_count: int) -> str:
    """Return what the paths of a shard's files begin with, relative to its cache: ``shards/00000.``.

    Args:
        shard_count: Shards of the whole cache, as its plan says.
    """
    folder = f"{index // FOLDER_SHARDS:02d}/" if shard_count > FLAT_SHARDS else ""
    return f"{SHARDS}/{folder}{index:05d}."


def shard_folders(cache_dir: Path, shard_count: int) -> list[Path]:
    """Return ``shards`` and the folders in it that shards lie in, whether they are there or not."""
    stems = (shard_stem(index, shard_count) for index in range(0, shard_count, FOLDER_SHARDS))
    return list(dict.fromkeys([cache_dir / SHARDS, *((cache_dir / stem).parent for stem in stems)]))


def stem_of(path: str) -> str:
    """Return the stem of the shard whose file this is, by its name alone; empty: no shard's."""
    found = _STEM.match(path)
    return found[0] if found and found[1] in (None, f"{int(found[2]) // FOLDER_SHARDS:02d}") else ""


def shard_of(path: str) -> int | None:
    """Return the number of the shard whose file this is, by its name alone, or None."""
    stem = stem_of(path)
    return int(stem[-6:-1]) if stem else None


def files_of_shard(cache_dir: Path, stem: str) -> list[Path]:
    """Return what lies in a folder under a shard's name, but its sidecar."""
    start = cache_dir / stem
    return sorted(path for path in start.parent.glob(f"{start.name}*") if path.name != f"{start.name}json")
