"""Bring a whole cache here; if killed, it continues where it stopped.

A place without ``manifest.json`` holds no cache yet. So it is written last, after everything that it lists has been
checked, and read first; `push` does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from vlm_distill_cache.common.cache.documents import parse_document
from vlm_distill_cache.common.cache.layout import shard_folders
from vlm_distill_cache.common.cache.manifest import Manifest, refuse_other_plan
from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.plan import PLAN, Plan, read_plan
from vlm_distill_cache.common.cache.side_files import CARD, MANIFEST, MAX_CARD_BYTES
from vlm_distill_cache.common.cache.sidecar import FileEntry, check_sidecar, read_sidecar, sidecar_name, sidecar_path
from vlm_distill_cache.common.config import save_replay
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import (
    TEMPORARY_PREFIX,
    clean_stale,
    hold_folder,
    try_lock,
    write_bytes_atomic,
)
from vlm_distill_cache.common.files.disk import folder_bytes, name_written, refuse_overlap
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import (
    JOBS,
    Progress,
    Transferred,
    cache_bytes,
    check_room,
    descriptions,
    fetch_files,
    is_intact,
    read_remote_manifest,
)

MAX_SHARD_FILES = 10_000
_MARKER = f"{TEMPORARY_PREFIX}{MANIFEST}-pull"  # the manifest of the cache that is being pulled


def pull(
    location: str | Path,
    target: str | Path,
    *,
    jobs: int = JOBS,
    on_progress: Callable[[int, int], object] | None = None,
) -> tuple[Manifest, Transferred]:
    """Bring a whole cache here, byte for byte.

    Killed or failed and called again, it goes on where it stopped. Into a finished copy of the same cache it
    brings what has been lost or damaged there.

    Args:
        location: A folder or an address.
        target: A new or empty folder, or one that a pull of the same cache began or finished.
        jobs: Files at a time.
        on_progress: Called with the bytes that are here and those of the whole cache.

    Raises:
        CacheFormatError: If the remote holds no complete cache, or its descriptions do not fit each other.
        CacheMismatchError: If the target holds something else.
        TransferError: If a file cannot be fetched, or there is too little room.
    """
    target = Path(target)
    remote = open_remote(location)
    refuse_overlap(target, location)
    manifest, raw = read_remote_manifest(remote)
    refuse_other_content(target, remote, manifest)
    total = cache_bytes(manifest)
    present = folder_bytes(target)
    remedy = "choose another disk, or pull a part of the cache (`cachectl pull --help`)"
    check_room(target, total - present, remedy)
    if not (target / PLAN).exists():
        save_replay(None, target)  # of a cache that was here before
    target.mkdir(parents=True, exist_ok=True)
    with hold_folder(
        target, alone=False, busy="is being extended or begun anew; wait for its end, then run this again"
    ):
        moved = _pull_held(remote, target, manifest, raw, jobs=jobs, progress=Progress(total, on_progress))
    return manifest, moved


def _pull_held(
    remote: Remote, target: Path, manifest: Manifest, raw: bytes, *, jobs: int, progress: Progress
) -> Transferred:
    """Pull into a folder that stays what it is."""
    marker = target / _MARKER
    try:
        with name_written(target / MANIFEST, marker):
            write_bytes_atomic(marker, raw, create_only=True)
    except FileExistsError:
        if (found := _hash_of(marker)) not in (manifest.hash, None):
            raise _other_cache(target, found, remote, manifest) from None
        write_bytes_atomic(marker, raw)  # damaged, or only the fidelity card is newer
    lock = try_lock(marker)  # so that no process takes it for a leftover
    try:
        moved = fetch_files(remote, target, descriptions(manifest), jobs=jobs, progress=progress)
        plan = read_plan(target)
        _check_descriptions(target, plan, manifest)
        moved += fetch_files(remote, target, _shard_files(target, plan), jobs=jobs, progress=progress)
        moved += _pull_card(remote, target)
        held = (target / MANIFEST).is_file() and (target / MANIFEST).read_bytes() == raw
        write_bytes_atomic(target / MANIFEST, raw)
        moved += Transferred(present=1) if held else Transferred(files=1)
        marker.unlink(missing_ok=True)
    finally:
        if lock is not None:
            lock.release()
    for folder in (target, *shard_folders(target, plan.shard_count)):
        clean_stale(folder)
    return moved


def _hash_of(path: Path) -> str | None:
    """Return the hash of a manifest here, or None if it is damaged."""
    try:
        return Manifest.from_dict(parse_document(path.read_bytes(), str(path)), str(path)).hash
    except CacheFormatError:
        return None


def refuse_other_content(target: Path, remote: Remote, manifest: Manifest) -> None:
    """Refuse a target that is neither empty nor a finished or begun copy of the same cache, or lies in one."""
    refuse_inside(target)
    if target.is_symlink() and not target.exists():
        raise CacheMismatchError(f"{target}: a link to nowhere; name a new or empty folder")
    if target.exists() and not target.is_dir():
        raise CacheMismatchError(f"{target}: a file; name a new or empty folder")
    for name in (MANIFEST, _MARKER):
        if (target / name).is_file():
            found = _hash_of(target / name)
            # A damaged manifest beside the right plan: a copy to mend.
            if found == manifest.hash or (found is None and is_intact(target / PLAN, manifest.files[PLAN])):
                return
            raise _other_cache(target, found, remote, manifest)
    # Temporary files: of a pull that begins at this moment, or was killed at its beginning.
    if not target.exists() or all(path.name.startswith(TEMPORARY_PREFIX) for path in target.iterdir()):
        return
    raise CacheMismatchError(
        f"{target}: not empty, and no copy of {remote.location} (manifest {manifest.hash}); name a new or empty folder"
    )


def _other_cache(target: Path, found: str | None, remote: Remote, manifest: Manifest) -> CacheMismatchError:
    return CacheMismatchError(
        f"{target}: holds, or is receiving, another cache (manifest {found or 'damaged'}) than {remote.location} "
        f"(manifest {manifest.hash}); name a new folder, or delete this one"
    )


def _check_descriptions(target: Path, plan: Plan, manifest: Manifest) -> None:
    """Refuse descriptions that do not fit each other, before anything they announce is fetched."""
    refuse_other_plan(manifest, plan, f"{target}: the source")
    for index, summary in enumerate(manifest.shards):
        sidecar = read_sidecar(target, index)
        path = sidecar_path(target, index)
        check_sidecar(sidecar, plan, str(path))
        if sidecar_name(index, plan.shard_count) in sidecar.files or len(sidecar.files) > MAX_SHARD_FILES:
            raise CacheFormatError(
                f"{path}: lists itself, or {len(sidecar.files)} files, above {MAX_SHARD_FILES}; damaged or hostile, "
                "run `cachectl verify` on the source"
            )
        if sidecar.stored_bytes != summary.bytes:
            raise CacheFormatError(
                f"{target}: {MANIFEST} says that shard {index} has {summary.bytes} bytes, its sidecar "
                f"{sidecar.stored_bytes}; run `cachectl verify` on the source"
            )


def _shard_files(target: Path, plan: Plan) -> Iterator[tuple[str, FileEntry]]:
    for index in range(plan.shard_count):
        yield from read_sidecar(target, index).files.items()


def _pull_card(remote: Remote, target: Path) -> Transferred:
    """Bring the card, which is for people: no digest covers it, and its bytes are not counted."""
    try:
        card = remote.read(CARD, max_bytes=MAX_CARD_BYTES, expected=True)
    except FileNotFoundError:
        return Transferred()
    if (target / CARD).is_file() and (target / CARD).read_bytes() == card:
        return Transferred(present=1)
    write_bytes_atomic(target / CARD, card)
    return Transferred(files=1)
