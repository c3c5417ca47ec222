"""The files beside the shards: projector, vision tower, processor, index, plan; sizes at once, digests on use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm_distill_cache.common.cache.plan import SHARDS
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX
from vlm_distill_cache.common.plain_files import check_file, check_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from vlm_distill_cache.common.cache.sidecar import FileEntry

MANIFEST, CARD = "manifest.json", "README.md"

_REMEDY = (
    "run `teacher-cache build` again with the same options to write it anew, or copy it from an intact cache"
)


def check_sizes(cache_dir: Path, files: Mapping[str, FileEntry]) -> None:
    """Refuse files that are lost, cut or longer than they were sealed, without reading them.

    Raises:
        CacheFormatError: Naming the first.
    """
    for name, entry in files.items():
        check_size(cache_dir, name, entry, _REMEDY)


def check_digests(cache_dir: Path, files: Mapping[str, FileEntry]) -> None:
    """Refuse files that are lost or have other bytes than they were sealed with.

    Raises:
        CacheFormatError: Naming the first.
    """
    for name, entry in files.items():
        check_file(cache_dir, name, entry, _REMEDY)


def side_files(cache_dir: Path) -> list[str]:
    """Return the relative paths of all files outside ``shards/``, except the manifest and the card.

    Raises:
        CacheFormatError: If there is a link or another thing that is not a plain file.
    """
    return sorted(name for name in walk_files(cache_dir, skip=(SHARDS,)) if name not in (MANIFEST, CARD))


def walk_files(root: Path, skip: Iterable[str] = ()) -> list[str]:
    """Return the relative paths of all files below ``root``, temporaries of live writers left out.

    Raises:
        CacheFormatError: If there is a link or another thing that is not a plain file.
    """
    names, folders = [], [root]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            name = path.relative_to(root).as_posix()
            if name in skip or path.name.startswith(TEMPORARY_PREFIX):
                continue
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise CacheFormatError(
                    f"{path}: a link or device; a cache holds plain files and folders only"
                )
            if path.is_dir():
                folders.append(path)
            else:
                names.append(name)
    return sorted(names)
