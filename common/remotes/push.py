"""Taking a finished cache to another place, such that whoever looks there finds all of it or none.

The order is the plan, which marks the place as taken; each shard's files and then its sidecar, so that a
sidecar there means the shard is; the files beside the shards; and last the manifest, once plan and sidecars
there are still ours. A push that was killed goes on with the shards whose sidecars are not there yet.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_distill_cache.common.cache.documents import parse_document
from vlm_distill_cache.common.cache.manifest import (
    CARD,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    read_manifest,
    read_plan,
    read_sidecar,
    refuse_other_plan,
    sidecar_path,
)
from vlm_distill_cache.common.cache.side_files import refuse_occupied
from vlm_distill_cache.common.cache.sidecar import ShardSidecar, sidecar_name
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.atomic import MAX_JSON_BYTES
from vlm_distill_cache.common.files.disk import refuse_overlap
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.fetch import (
    JOBS,
    MAX_MANIFEST_BYTES,
    Progress,
    Transferred,
    cache_bytes,
    in_parallel,
    is_intact,
    read_remote_manifest,
)
from vlm_distill_cache.common.remotes.streams import StoppedError

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable

    from vlm_distill_cache.common.remotes import Remote


def push(
    cache_dir: Path,
    location: str | Path,
    *,
    jobs: int = JOBS,
    overwrite: bool = False,
    on_progress: Callable[[int, int], object] | None = None,
) -> tuple[Manifest, Transferred]:
    """Take a finished cache to another place.

    Killed or failed and called again, it goes on where it stopped. Every file's digests are checked before
    it leaves, so no damage is spread.

    Args:
        cache_dir: The cache.
        location: A folder or an address.
        jobs: Shards at a time.
        overwrite: Replace a finished cache that is there, or the unfinished push of another; also one of the same
            cache that has lost files.
        on_progress: Called with the bytes that are there and those of the whole cache.

    Returns:
        The cache's manifest, and what was moved.

    Raises:
        CacheFormatError: If the cache is not finished, or damaged.
        CacheMismatchError: If the place holds, or is receiving, another cache.
        ConfigError: If it is a folder of other things, or lies in the cache.
        TransferError: If something cannot be copied.
    """
    remote = open_remote(location)
    if not (is_url(location) or overwrite):
        refuse_occupied(Path(location))
    remote.delete([])  # a place that cannot be written says so before anything else
    refuse_overlap(cache_dir, location)
    manifest, plan, counts = _read_whole(cache_dir)
    progress = Progress(cache_bytes(manifest), on_progress)
    there = _remote_manifest(remote)
    if there == manifest and not overwrite:  # the fidelity card included
        progress.add(cache_bytes(manifest))
        present = Transferred(present=len(manifest.files) + sum(counts) + 1)  # and the manifest
        return manifest, present + _push_card(remote, cache_dir)
    moved = Transferred()
    if overwrite or not isinstance(there, Manifest) or there.hash != manifest.hash:
        _make_room(remote, cache_dir, manifest, there, jobs=jobs, overwrite=overwrite)
        begun = not _claim(remote, cache_dir, jobs=jobs, overwrite=overwrite)
        moved += _push_shards(remote, cache_dir, counts, jobs=jobs, overwrite=overwrite, begun=begun, progress=progress)
        moved += _push_side_files(remote, cache_dir, manifest, progress)
        _check_untouched(remote, cache_dir, plan, jobs=jobs)
    moved += _push_card(remote, cache_dir)
    remote.upload({MANIFEST: cache_dir / MANIFEST})
    return manifest, moved + Transferred(files=1)


def _read_whole(cache_dir: Path) -> tuple[Manifest, Plan, list[int]]:
    """Read the descriptions of a cache, look whether its files are there in full length; and count each shard's."""
    manifest, plan = read_manifest(cache_dir), read_plan(cache_dir)
    refuse_other_plan(manifest, plan, str(cache_dir))
    counts = []
    for index, summary in enumerate(manifest.shards):
        if not is_intact(sidecar_path(cache_dir, index), summary.sidecar):
            raise _damaged(cache_dir, sidecar_name(index))
        files = read_sidecar(cache_dir, index).files
        counts.append(len(files) + 1)
        for name, entry in files.items():
            path = cache_dir / name
            if not path.is_file() or path.stat().st_size != entry.size:
                raise _damaged(cache_dir, name)
    return manifest, plan, counts


def _damaged(cache_dir: Path, name: str) -> CacheFormatError:
    return CacheFormatError(
        f"{cache_dir / name}: lost or damaged, so the cache is not pushed; run `cachectl verify {cache_dir}`"
    )


def _taken(cache_dir: Path, remote: Remote, what: str) -> CacheMismatchError:
    return CacheMismatchError(
        f"{remote.location}: {what}; push {cache_dir} to another place, or replace what is there with --overwrite"
    )


def _remote_manifest(remote: Remote) -> Manifest | str | None:
    """Return the manifest there, what is wrong with it, or None if there is none."""
    if remote.size(MANIFEST) is None:
        return None
    try:
        return read_remote_manifest(remote)[0]
    except CacheFormatError as error:
        return str(error)


def _make_room(
    remote: Remote,
    cache_dir: Path,
    manifest: Manifest,
    there: Manifest | str | None,
    *,
    jobs: int,
    overwrite: bool,
) -> None:
    """Refuse to touch what is there, or, to overwrite it, make it an incomplete cache first."""
    if there is None:
        # Once the plan is there, the card is that of the push that began.
        foreign = remote.size(PLAN) is None and remote.size(CARD) is not None
        if foreign and not overwrite:
            raise _taken(cache_dir, remote, f"has a {CARD}, which the cache's card would replace")
        return
    if not overwrite:
        found = f"manifest {there.hash}" if isinstance(there, Manifest) else there
        raise _taken(cache_dir, remote, f"holds another cache ({found}; this one is {manifest.hash})")
    old = there.files.keys() - {PLAN} if isinstance(there, Manifest) else set()
    remote.delete([MANIFEST, CARD, *sorted(old)])
    _clear(remote, jobs)


def _claim(remote: Remote, cache_dir: Path, *, jobs: int, overwrite: bool) -> bool:
    """Write the plan, or find the same one there; False means that an earlier push, or another one, began."""
    ours = (cache_dir / PLAN).read_bytes()
    if remote.create(PLAN, ours):
        return True
    if _equals(remote, PLAN, ours):
        return False
    if not overwrite:
        raise _taken(cache_dir, remote, "is receiving another cache")
    _clear(remote, jobs)
    if not remote.create(PLAN, ours) and not _equals(remote, PLAN, ours):
        raise _taken(cache_dir, remote, "is receiving another cache at this moment")
    return True


def _equals(remote: Remote, name: str, data: bytes) -> bool:
    try:
        return remote.read(name, max_bytes=len(data)) == data
    except (FileNotFoundError, CacheFormatError):
        return False


def _clear(remote: Remote, jobs: int) -> None:
    """Remove a cache: its manifest is gone already, its plan goes last, so that a killed run can go on."""
    try:
        data = remote.read(PLAN, max_bytes=MAX_MANIFEST_BYTES)
        count = Plan.from_dict(parse_document(data, f"{remote.location}/{PLAN}")).shard_count
    except (FileNotFoundError, CacheFormatError):
        count = 0  # no plan of ours: what else is there is not ours to judge

    def clear(shards: Iterable[int], _: threading.Event) -> None:
        names: list[str] = []
        for shard in shards:
            name = sidecar_name(shard)
            try:
                data = remote.read(name, max_bytes=MAX_JSON_BYTES)
                files = ShardSidecar.from_dict(parse_document(data, name), name).files
                names += [file for file in files if file.startswith(name.removesuffix("json"))]
            except FileNotFoundError:
                continue
            except CacheFormatError:
                pass  # nobody can say which files belong to it
            names.append(name)
        remote.delete(names)

    _by_shard(clear, remote, [1] * count, jobs)
    remote.delete([PLAN])


def _by_shard(task: Callable[[list[int], threading.Event], None], remote: Remote, counts: list[int], jobs: int) -> None:
    """Run a task on batches of shards of as many files as the remote likes; ``counts``: files of each shard."""
    batches: list[list[int]] = []
    room = 0
    for shard, count in enumerate(counts):
        if room <= 0:
            batches.append([])
            room = remote.upload_files
        batches[-1].append(shard)
        room -= count
    in_parallel([partial(task, batch) for batch in batches], min(jobs, remote.upload_jobs))


def _push_shards(
    remote: Remote,
    cache_dir: Path,
    counts: list[int],
    *,
    jobs: int,
    overwrite: bool,
    begun: bool,
    progress: Progress,
) -> Transferred:
    """Send the shards that are not there yet; ``counts``: how many files each has."""
    results: list[Transferred] = []

    def push_batch(shards: Iterable[int], stop: threading.Event) -> None:
        def report(sent: int) -> None:
            if stop.is_set():
                raise StoppedError
            progress.add(sent)

        files: dict[str, Path] = {}
        present = size = 0
        for shard in shards:
            name = sidecar_name(shard)
            sidecar = read_sidecar(cache_dir, shard)
            ours = (cache_dir / name).read_bytes()
            if begun and _equals(remote, name, ours):
                present += len(sidecar.files) + 1
                progress.add(sidecar.stored_bytes + len(ours))
                continue
            if begun and remote.size(name) is not None:
                if not overwrite:
                    what = f"is receiving another cache with the same plan (its {name} differs)"
                    raise _taken(cache_dir, remote, what)
                remote.delete([name])  # before its files change under it
            for file, entry in sidecar.files.items():
                if not is_intact(cache_dir / file, entry):
                    raise _damaged(cache_dir, file)
                files[file] = cache_dir / file
            files[name] = cache_dir / name
            size += sidecar.stored_bytes + len(ours)
        if files:
            # Who was overwritten meanwhile must not go on writing into what the other one has checked.
            _refuse_overwritten(remote, cache_dir, PLAN)
            remote.upload(files, on_bytes=report)
        results.append(Transferred(files=len(files), bytes=size, present=present))

    _by_shard(push_batch, remote, counts, jobs)
    return sum(results, Transferred())


def _push_side_files(remote: Remote, cache_dir: Path, manifest: Manifest, progress: Progress) -> Transferred:
    """Send the files beside the shards, every time: nothing there says cheaply whether they are right."""
    files: dict[str, Path] = {}
    for name, entry in manifest.files.items():
        if not is_intact(cache_dir / name, entry):
            raise _damaged(cache_dir, name)
        if name != PLAN:
            files[name] = cache_dir / name
    if files:
        remote.upload(files, on_bytes=progress.add)
    progress.add((cache_dir / PLAN).stat().st_size)
    return Transferred(files=len(manifest.files), bytes=sum(entry.size for entry in manifest.files.values()))


def _push_card(remote: Remote, cache_dir: Path) -> Transferred:
    """Send the card if it is not there as it is here; its bytes are not counted, for it is no part of the cache."""
    path = cache_dir / CARD
    if not path.is_file():
        return Transferred()
    if _equals(remote, CARD, path.read_bytes()):
        return Transferred(present=1)
    remote.upload({CARD: path})
    return Transferred(files=1)


def _check_untouched(remote: Remote, cache_dir: Path, plan: Plan, *, jobs: int) -> None:
    """Refuse to call it complete if another push wrote here meanwhile."""

    def check(name: str, _: threading.Event) -> None:
        _refuse_overwritten(remote, cache_dir, name)

    names = [PLAN, *map(sidecar_name, range(plan.shard_count))]
    in_parallel([partial(check, name) for name in names], jobs)


def _refuse_overwritten(remote: Remote, cache_dir: Path, name: str) -> None:
    if not _equals(remote, name, (cache_dir / name).read_bytes()):
        raise _taken(cache_dir, remote, f"was changed by another push meanwhile ({name})")
