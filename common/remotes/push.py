"""Copy a finished cache to another place, where readers find all of it or nothing.

The order is the plan, which marks the place as taken; each shard's files and then its sidecar, so that a
sidecar there means the shard is; the files beside the shards; and last the manifest, once plan and sidecars
there are still ours. What it names is then looked for, and it is taken back if something is amiss. A push that was
killed goes on with the shards whose sidecars are not there yet. One push at a time: others are refused.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from vlm_distill_cache.common.cache.documents import parse_document
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest, refuse_other_plan
from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.plan import PLAN, Plan, read_plan
from vlm_distill_cache.common.cache.side_files import CARD, MANIFEST, refuse_occupied
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, read_sidecar, sidecar_name, sidecar_path
from vlm_distill_cache.common.config import save_replay
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, TransferError
from vlm_distill_cache.common.files.atomic import MAX_JSON_BYTES, hold_folder
from vlm_distill_cache.common.files.disk import refuse_overlap
from vlm_distill_cache.common.locations import by_make, is_url
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
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
from vlm_distill_cache.common.remotes.streams import stoppable

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


def push(
    cache_dir: str | Path,
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
        location: A folder or an address.
        jobs: Shards at a time.
        overwrite: Replace a finished cache that is there, or the unfinished push of another; also one of the same
            cache that has lost files.
        on_progress: Called with the bytes that are there and those of the whole cache.

    Raises:
        CacheFormatError: If the cache is not finished, or damaged.
        CacheMismatchError: If the place holds, or is receiving, another cache, or another push is writing there.
        ConfigError: If it is a folder of other things, lies in the cache, or another process is writing there.
        TransferError: If something cannot be copied.
    """
    cache_dir = Path(cache_dir)
    remote = open_remote(location)
    if not is_url(location):
        (refuse_inside if overwrite else refuse_occupied)(Path(location))
    remote.delete([])  # a place that cannot be written says so before anything else
    refuse_overlap(cache_dir, location)
    busy = "is being extended or begun anew; wait for its end, then run the same command again"
    with hold_folder(cache_dir, alone=False, busy=busy):
        return _push_held(cache_dir, remote, jobs=jobs, overwrite=overwrite, on_progress=on_progress)


def _push_held(
    cache_dir: Path, remote: Remote, *, jobs: int, overwrite: bool, on_progress: Callable[[int, int], object] | None
) -> tuple[Manifest, Transferred]:
    """Push a cache whose folder stays what it is."""
    manifest, counts = read_whole(cache_dir)
    if said := many_files(remote, manifest, counts):
        _log.warning("%s", said)
    progress = Progress(cache_bytes(manifest), on_progress)
    there = None if overwrite else read_remote_state(remote)
    with contextlib.nullcontext(lambda: None) if there == manifest else remote.hold() as check:
        run = _Push(remote, cache_dir, manifest, counts, jobs, overwrite, progress, check)
        if there == manifest:  # the fidelity card included
            progress.add(cache_bytes(manifest))
            present = Transferred(present=len(manifest.files) + sum(counts) + 1)  # and the manifest
            return manifest, present + run.send_card()
        there, moved = read_remote_state(remote), Transferred()  # once more: nobody else changes it now
        another = not isinstance(there, Manifest) or there.hash != manifest.hash
        if overwrite or another:
            if another and not is_url(remote.location):
                save_replay(None, remote.location)  # of the cache that was here before
            run.make_room(there)
            begun = not run.claim()
            moved += run.send_shards(begun=begun)
            moved += run.send_side_files()
            # It is not complete if another push wrote here meanwhile.
            in_parallel([partial(run.refuse_overwritten, name) for name in (PLAN, *run.sidecars())], jobs)
        elif isinstance(there, Manifest) and there.files != manifest.files:  # sinks were found since
            moved += run.send_side_files()
        moved += run.send_card()
        run.publish(there)
    return manifest, moved + Transferred(files=1)


def read_whole(cache_dir: Path) -> tuple[Manifest, list[int]]:
    """Read a cache's descriptions and look whether its files are there in full length; count each shard's files."""
    manifest, plan = read_manifest(cache_dir), read_plan(cache_dir)
    refuse_other_plan(manifest, plan, str(cache_dir))
    counts = []
    for index, summary in enumerate(manifest.shards):
        if not is_intact(sidecar_path(cache_dir, index), summary.sidecar):
            raise _damaged(cache_dir, sidecar_name(index, plan.shard_count))
        files = read_sidecar(cache_dir, index).files
        counts.append(len(files) + 1)
        for name, entry in files.items():
            path = cache_dir / name
            if not path.is_file() or path.stat().st_size != entry.size:
                raise _damaged(cache_dir, name)
    return manifest, counts


def many_files(remote: Remote, manifest: Manifest, counts: list[int]) -> str:
    """What to say of a cache of more files than the place asks for; nothing if it is not."""
    files = sum(counts) + len(manifest.files) + 1
    if remote.advised_files is None or files <= remote.advised_files:
        return ""
    tars = (
        ""
        if sum(counts) == 2 * len(counts)
        else "`cachectl convert --store webdataset` makes two files of a shard; else "
    )
    return (
        f"{remote.location}: the cache has {files:,} files, and no more than {remote.advised_files:,} are advised there: commits, "
        f"listings and clones of the repository will be slow; {tars}push to s3://BUCKET/PREFIX or a folder, or build it with a "
        f"larger shard_size ({by_make('CACHE_SET=', '--set ')}shard_size=...)"
    )


def _damaged(cache_dir: Path, name: str) -> CacheFormatError:
    return CacheFormatError(
        f"{cache_dir / name}: lost or damaged, so the cache is not pushed; run `cachectl verify {cache_dir}`"
    )


def read_remote_state(remote: Remote) -> Manifest | str | None:
    """Return the manifest there, what is wrong with it, or None if there is none."""
    if remote.size(MANIFEST) is None:
        return None
    try:
        return read_remote_manifest(remote)[0]
    except CacheFormatError as error:
        return str(error)


@dataclass(frozen=True)
class _Push:
    """One push and its steps.

    Attributes:
        counts: How many files each shard has, with its sidecar.
        refuse_lost: Raises once another push has taken over.
    """

    remote: Remote
    cache_dir: Path
    manifest: Manifest
    counts: list[int]
    jobs: int
    overwrite: bool
    progress: Progress
    refuse_lost: Callable[[], object]

    def make_room(self, there: Manifest | str | None) -> None:
        """Refuse to touch what is there, or, to overwrite it, make it an incomplete cache first."""
        if there is None:
            # Once the plan is there, the card is that of the push that began.
            foreign = self.remote.size(PLAN) is None and self.remote.size(CARD) is not None
            if foreign and not self.overwrite:
                raise self._taken(f"has a {CARD}, which the cache's card would replace")
            return
        if not self.overwrite:
            found = f"manifest {there.hash}" if isinstance(there, Manifest) else there
            raise self._taken(f"holds another cache ({found}; this one is {self.manifest.hash})")
        old = there.files.keys() - {PLAN} if isinstance(there, Manifest) else set()
        self.remote.delete([MANIFEST, CARD, *sorted(old)])
        self._clear()

    def claim(self) -> bool:
        """Write the plan, or find the same one there; False means that an earlier push, or another one, began."""
        ours = (self.cache_dir / PLAN).read_bytes()
        if self.remote.create(PLAN, ours):
            return True
        if self._is_there(PLAN):
            return False
        if not self.overwrite:
            raise self._taken("is receiving another cache")
        self._clear()
        if not self.remote.create(PLAN, ours) and not self._is_there(PLAN):
            raise self._taken("is receiving another cache at this moment")
        return True

    def send_shards(self, *, begun: bool) -> Transferred:
        """Send the shards that are not there yet; ``begun``: some may be."""
        return sum(self._by_shard(partial(self._send_batch, begun), self.counts), Transferred())

    def send_side_files(self) -> Transferred:
        """Send the files beside the shards, every time: nothing there says cheaply whether they are right."""
        files = {name: self._intact(name, entry) for name, entry in self.manifest.files.items()}
        plan = files.pop(PLAN)
        if files:
            self.remote.upload(files, on_bytes=self.progress.add)
        self.progress.add(plan.stat().st_size)
        return Transferred(len(files) + 1, sum(entry.size for entry in self.manifest.files.values()))

    def send_card(self) -> Transferred:
        """Send the card unless the same one is there; its bytes do not count, since it is no part of the cache."""
        path = self.cache_dir / CARD
        if not path.is_file():
            return Transferred()
        if self._is_there(CARD):
            return Transferred(present=1)
        self.remote.upload({CARD: path})
        return Transferred(files=1)

    def refuse_overwritten(self, name: str) -> None:
        """Refuse to go on where another push has written another file of this name."""
        if not self._is_there(name):
            raise self._taken(f"was changed by another push meanwhile ({name})")

    def sidecars(self) -> list[str]:
        """The names of all sidecars."""
        return [sidecar_name(shard, len(self.counts)) for shard in range(len(self.counts))]

    def publish(self, there: Manifest | str | None) -> None:
        """Write the manifest last, and take it back if what it names is not what is there."""
        self.refuse_lost()
        path = self.cache_dir / MANIFEST
        newer = isinstance(there, Manifest) and not self.overwrite  # only its fidelity card is
        if newer or not self.remote.keeps_conditions:
            self.remote.upload({MANIFEST: path})
        elif not self.remote.create(MANIFEST, path.read_bytes()):
            self.refuse_overwritten(MANIFEST)
        if self.remote.commits:
            return
        checks = [partial(self._refuse_size, name, entry.size) for name, entry in self.manifest.files.items()]
        for shard, name in enumerate(self.sidecars()):
            checks.append(partial(self.refuse_overwritten, name))
            sizes = read_sidecar(self.cache_dir, shard).files
            checks += [partial(self._refuse_size, file, entry.size) for file, entry in sizes.items()]
        try:
            in_parallel([*checks, partial(self.refuse_overwritten, MANIFEST)], self.jobs)
            self.refuse_lost()
        except (CacheMismatchError, TransferError):
            with contextlib.suppress(TransferError):
                if self._is_there(MANIFEST):
                    self.remote.delete([MANIFEST])
            raise

    def _refuse_size(self, name: str, size: int) -> None:
        if self.remote.size(name, expected=True) != size:
            raise self._taken(f"was changed by another push meanwhile ({name})")

    def _send_batch(self, begun: bool, shards: list[int]) -> Transferred:
        files: dict[str, Path] = {}
        present = size = 0
        for shard in shards:
            name, sidecar = sidecar_name(shard, len(self.counts)), read_sidecar(self.cache_dir, shard)
            shard_bytes = sidecar.stored_bytes + (self.cache_dir / name).stat().st_size
            if begun and self._is_there(name):
                present += len(sidecar.files) + 1
                self.progress.add(shard_bytes)
                continue
            if begun and self.remote.size(name) is not None:
                if not self.overwrite:
                    raise self._taken(f"is receiving another cache with the same plan (its {name} differs)")
                self.remote.delete([name])  # before its files change under it
            files |= {file: self._intact(file, entry) for file, entry in sidecar.files.items()}
            files[name] = self.cache_dir / name
            size += shard_bytes
        if files:
            # Who was overwritten meanwhile must not go on writing into what the other one has checked.
            self.refuse_lost()
            self.refuse_overwritten(PLAN)
            self.remote.upload(files, on_bytes=stoppable(self.progress.add))
        return Transferred(len(files), size, present)

    def _intact(self, name: str, entry: FileEntry) -> Path:
        """Return where a file is, after its digests have been checked: no damage is spread."""
        if not is_intact(path := self.cache_dir / name, entry):
            raise _damaged(self.cache_dir, name)
        return path

    def _is_there(self, name: str) -> bool:
        """Whether the remote has the same small file."""
        ours = (self.cache_dir / name).read_bytes()
        try:
            return self.remote.read(name, max_bytes=len(ours)) == ours
        except (FileNotFoundError, CacheFormatError):
            return False

    def _clear(self) -> None:
        """Remove a cache: its manifest is gone already, its plan goes last, so that a killed run can go on."""
        try:
            data = self.remote.read(PLAN, max_bytes=MAX_MANIFEST_BYTES)
            count = Plan.from_dict(parse_document(data, f"{self.remote.location}/{PLAN}")).shard_count
        except (FileNotFoundError, CacheFormatError):
            count = 0  # no plan of ours: what else is there is not ours to judge
        self._by_shard(partial(self._clear_batch, count), [1] * count)
        self.remote.delete([PLAN])

    def _clear_batch(self, count: int, shards: list[int]) -> None:
        names: list[str] = []
        for name in (sidecar_name(shard, count) for shard in shards):
            try:
                data = self.remote.read(name, max_bytes=MAX_JSON_BYTES)
                files = ShardSidecar.from_dict(parse_document(data, name), name).files
                names += [file for file in files if file.startswith(name.removesuffix("json"))]
            except FileNotFoundError:
                continue
            except CacheFormatError:
                pass  # nobody can say which files belong to it
            names.append(name)
        self.remote.delete(names)

    def _by_shard(self, task: Callable[[list[int]], _T], counts: list[int]) -> list[_T]:
        """Run a task on batches of shards of as many files as the remote likes; ``counts``: files of each shard."""
        batches: list[list[int]] = []
        room = 0
        for shard, count in enumerate(counts):
            if room <= 0:
                batches.append([])
                room = self.remote.upload_files
            batches[-1].append(shard)
            room -= count
        return in_parallel([partial(task, batch) for batch in batches], min(self.jobs, self.remote.upload_jobs))

    def _taken(self, what: str) -> CacheMismatchError:
        return CacheMismatchError(
            f"{self.remote.location}: {what}; push {self.cache_dir} to another place, or replace what is there with "
            "--overwrite"
        )
