"""The cache's folder: what may be in it, whether it can be written, and what a full disk means. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.layout import shard_folders
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.cache.other_folders import IS_SKETCH, is_sketch, refuse_inside
from vlm_distill_cache.common.cache.plan import (
    DESCRIPTIVE,
    PLAN,
    SHARDS,
    THREADS,
    Plan,
    read_plan,
    refuse_changed_plan,
    write_plan,
)
from vlm_distill_cache.common.cache.side_files import (
    CARD,
    MANIFEST,
    SINKS,
    check_digests,
    is_leftover,
    side_files,
    walk_files,
)
from vlm_distill_cache.common.cache.sidecar import missing_shards, read_sidecar, sidecar_name
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError
from vlm_distill_cache.common.files.atomic import clean_stale, hold_folder, read_json, remove
from vlm_distill_cache.common.files.disk import is_below, name_full_disk, nearest_there, refuse_no_disk
from vlm_distill_cache.common.locations import by_make

logger = logging.getLogger(__name__)

# What `stage1_teacher.teacher.export` writes.
EXPORTED = ("projector.safetensors", "projector.json", "vision_tower.safetensors", "vision_tower.json", "processor")
# All that a cache folder holds at its top level.
OUR_NAMES = (PLAN, MANIFEST, INDEX, CARD, SINKS, SHARDS, *EXPORTED)

_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_WRITABLE = "make it writable, or give another folder for the cache; nothing was lost"


@contextmanager
def explain_disk_errors(cache: Path | str) -> Iterator[None]:
    """Say what a full or read-only disk means for the cache: the system's own error names no remedy.

    Raises:
        OSError: With the cache's path and the remedy; errors about other files pass unchanged.
    """
    try:
        with name_full_disk(Path(cache)):
            yield
    except OSError as error:
        if error.errno not in _REFUSED or not error.filename or not is_below(error.filename, Path(cache)):
            raise
        raise OSError(error.errno, f"cannot be written ({error.strerror}); {_WRITABLE}", str(cache)) from error


def refuse_unwritable(cache_dir: Path, *, sealed_too: bool = False) -> None:
    """Notice a read-only folder, or one inside another cache or a student, before a teacher is loaded.

    Args:
        sealed_too: A sealed cache will be written to as well; else it may lie on a read-only disk.
    """
    if not sealed_too and (cache_dir / MANIFEST).is_file():
        return
    refuse_inside(cache_dir)
    place = nearest_there(cache_dir)
    if place.is_dir() and not os.access(place, os.W_OK | os.X_OK):
        code = errno.EROFS if os.statvfs(place).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(code, f"cannot be written ({os.strerror(code)}); {_WRITABLE}", str(place))
    if place.is_dir():
        refuse_no_disk(place)


def in_use(cache_dir: Path, *, alone: bool = False) -> AbstractContextManager[None]:
    """Hold a cache's folder while it is built: any number of builds at once, or one that deletes what is there.

    Without this an `--overwrite` beside a running build would leave shards of both, sealed.

    Args:
        alone: Nobody else may build there at this moment.

    Raises:
        ConfigError: If another build is running there, and one of the two wants to be alone.
    """
    busy = (
        "another `teacher-cache build` is running on this folder, or a push that reads it, and --overwrite would delete its shards"
        if alone
        else "another `teacher-cache build` is running on this folder and is deleting what was there, or `extend` replaces it"
    )
    return hold_folder(
        cache_dir, alone=alone, busy=f"{busy}; stop it or wait for its end, then run the same command again"
    )


def refuse_replaced(cache_dir: Path, plan: Plan) -> None:
    """Stop a build whose folder was removed or begun anew: what it still writes would belong to no cache, or to another."""
    if stored_plan(cache_dir) != plan:
        raise CacheMismatchError(
            f"{cache_dir / PLAN} was removed or replaced while this build ran; delete what is left of the folder "
            "if nobody else builds there, then run the same command again"
        )


def stored_plan(cache_dir: Path) -> Plan | None:
    """The plan of a cache that was begun, or None; a damaged one counts as none here."""
    try:
        return read_plan(cache_dir)
    except CacheFormatError:
        return None


def prepare_cache(cache_dir: Path, plan: Plan, *, overwrite: bool) -> Plan:
    """Write ``plan.json``, or make sure that the one there says the same.

    Args:
        overwrite: Delete the cache that is there first; files that are not a cache's are never touched.

    Returns:
        The plan on disk; only descriptive entries may differ from ``plan``.

    Raises:
        ConfigError: If the folder holds something that is not a cache, or not only a cache.
        CacheMismatchError: If a cache with other options is there and ``overwrite`` is not set.
    """
    entries, strangers = check_cache_folder(cache_dir, overwrite=overwrite)
    if overwrite:
        # The plan goes last: until then a killed run leaves what is still known as a cache.
        for entry in sorted(entries, key=lambda entry: entry.name == PLAN):
            remove(entry)
    elif (cache_dir / PLAN).is_file():
        stored = read_plan(cache_dir)
        if THREADS not in stored.extra:  # begun before plans recorded it
            plan = replace(plan, extra={key: value for key, value in plan.extra.items() if key != THREADS})
        # Compared without writing: a complete cache may lie on a read-only disk.
        refuse_changed_plan(stored, plan, where=str(cache_dir))
        _check_beside(cache_dir, stored, strangers)
        _mention_descriptions(stored, plan)
        return stored
    write_plan(cache_dir, plan)
    return read_plan(cache_dir)  # as a resumed run will read it, so that both write the same bytes


def check_cache_folder(cache_dir: Path, *, overwrite: bool) -> tuple[list[Path], list[str]]:
    """What a cache's folder holds, and the names in it that are no part of a cache.

    Raises:
        ConfigError: If it holds something that is not a cache, or, to be overwritten, not only a cache.
    """
    if cache_dir.exists() and not cache_dir.is_dir():
        raise ConfigError(f"{cache_dir} is a file; give a folder for the cache ({by_make('CACHE=...', '--cache')})")
    if is_sketch(cache_dir):
        raise ConfigError(f"{cache_dir}: {IS_SKETCH}")
    entries = sorted(cache_dir.iterdir()) if cache_dir.is_dir() else []
    kept = [entry.name for entry in entries if not is_leftover(entry)]
    is_cache = any(_is_our_document(cache_dir / name) for name in (PLAN, MANIFEST))
    strangers = [name for name in kept if name not in OUR_NAMES]
    if kept and not is_cache:
        raise ConfigError(
            f"{cache_dir} is not a teacher cache: it holds {', '.join((strangers or kept)[:5])}; "
            f"give an empty or new folder ({by_make('CACHE=...', '--cache')})"
        )
    if overwrite and strangers:
        raise ConfigError(
            f"{cache_dir} holds {', '.join(strangers[:5])} beside the cache, which --overwrite does not delete; "
            f"move that away, or give a new folder ({by_make('CACHE=...', '--cache')})"
        )
    return entries, strangers


def begun_otherwise(cache_dir: Path, plan: Plan) -> bool:
    """Whether a folder holds no more than the plan of a build with other settings, of which no shard was finished.

    Such a build failed, most likely on what is now given otherwise; there is nothing to keep.
    """
    stored = stored_plan(cache_dir)
    if stored is None or (cache_dir / MANIFEST).exists():
        return False
    if has_shard_files(cache_dir):
        return False
    try:
        refuse_changed_plan(stored, plan, where=str(cache_dir))
    except CacheMismatchError:
        logger.info("%s was begun with other settings, and no shard was finished: it is begun anew", cache_dir)
        return True
    return False


def has_shard_files(cache_dir: Path) -> bool:
    """Whether a folder holds any part of a shard that was finished."""
    return any(path.is_file() and not is_leftover(path) for path in (cache_dir / SHARDS).rglob("*"))


def refuse_unlisted(cache_dir: Path, known: Collection[str]) -> None:
    """Refuse to seal a folder that holds more than the cache: a manifest vouches for every file it lists.

    Args:
        known: Paths of its own files outside ``shards/``; plan, index, sinks, manifest and card are known.
    """
    found = [name for name in side_files(cache_dir) if name not in known and name not in (PLAN, INDEX, SINKS)]
    if found:
        raise _strangers(cache_dir, found)


def refuse_others_files(cache_dir: Path, plan: Plan, manifest: Manifest) -> None:
    """Refuse a sealed cache whose folder holds files that its lists do not name: a new version would be without them.

    Raises:
        ConfigError: Naming them.
        CacheFormatError: If a list is damaged, or there is a link or a device.
    """
    listed = {CARD, MANIFEST, *manifest.files}
    for index in range(plan.shard_count):
        listed |= {sidecar_name(index, plan.shard_count), *read_sidecar(cache_dir, index).files}
    if found := [name for name in walk_files(cache_dir) if name not in listed]:
        raise ConfigError(
            f"{cache_dir} holds {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}, which is not part of the cache and "
            "would not be in the extended one; move that elsewhere, then run the same command again"
        )


def sealed_names(cache_dir: Path) -> set[str]:
    """The files a sealed cache vouches for; of one without a manifest, all below the names we write."""
    if (cache_dir / MANIFEST).is_file():
        return set(read_manifest(cache_dir).files)
    return {name for name in side_files(cache_dir) if name.partition("/")[0] in OUR_NAMES}


def intact_manifest(cache_dir: Path) -> Manifest | None:
    """The manifest of a finished cache; None if there is none, or it or a file beside the shards is lost or damaged."""
    if not (cache_dir / MANIFEST).is_file():
        return None
    try:
        manifest = read_manifest(cache_dir)
        check_digests(cache_dir, manifest.files)
    except CacheFormatError as error:
        logger.warning("%s; it is written again from the shards that are there", error)
        return None
    with contextlib.suppress(OSError):  # a read-only disk keeps what a killed run left; it is no part of the cache
        for folder in (cache_dir, cache_dir / "processor", *shard_folders(cache_dir, len(manifest.shards))):
            clean_stale(folder)
    return manifest


def drop_damaged_manifest(cache_dir: Path) -> None:
    """Remove a manifest that cannot be read, so that sealing derives it anew and does not compare with it."""
    try:
        if (cache_dir / MANIFEST).exists():
            read_manifest(cache_dir)
    except CacheFormatError:
        remove(cache_dir / MANIFEST)


def _check_beside(cache_dir: Path, plan: Plan, strangers: list[str]) -> None:
    if not strangers:
        return
    if not (cache_dir / MANIFEST).is_file() or missing_shards(cache_dir, plan):
        raise _strangers(cache_dir, strangers)
    logger.warning("%s also holds %s, which is not part of the cache", cache_dir, ", ".join(strangers[:5]))


def _mention_descriptions(stored: Plan, plan: Plan) -> None:
    """Say so where a licence or source that this run gives is not what the plan has: a plan never changes."""
    for part in ("teacher", "data"):
        old, new = getattr(stored, part), getattr(plan, part)
        for key in DESCRIPTIVE[1:]:
            # A folder has no revision: the weights are compared, whichever way they are named.
            if key in new and new[key] != old.get(key) and (key in old or key != "revision"):
                logger.warning(
                    "the cache was begun with %s.%s = %r and keeps that; %r is not recorded (a cache that is begun anew has it)",
                    part, key, old.get(key, ""), new[key],
                )  # fmt: skip


def _strangers(cache_dir: Path, names: list[str]) -> ConfigError:
    return ConfigError(
        f"{cache_dir} holds {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}, which is not part of the "
        "cache and would be sealed into it; move that away, then run the same command again"
    )


def _is_our_document(path: Path) -> bool:
    """Whether a file has the shape of our documents, of whatever version and however damaged."""
    try:
        data = read_json(path)
    except (OSError, CacheFormatError):
        return False
    return isinstance(data, dict) and {"format_version", "checksum"} <= data.keys()
