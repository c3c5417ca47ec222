"""Before anything is trained on a cache, every record of it is looked through once: whether a teacher can have said that.

Checksums prove that a cache is what somebody wrote, not that a teacher did. What was found sound is noted in a folder of
the user's (``$VLM_DISTILL_VERIFIED_DIR``; default ``vlm-distill-cache/verified`` in ``$XDG_CACHE_HOME`` or ``~/.cache``), never
beside the cache, where its author could have written the note. A note is the sha256 of a shard's sidecar, which covers its
files, in a file named by the plan, which says what they may hold: a copy of the same cache is known wherever it lies, work
that was broken off goes on, and of several processes each shard is looked through by one. What `teacher-cache build` wrote
itself is noted as it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from vlm_distill_cache.common.cache.manifest import Manifest
from vlm_distill_cache.common.cache.plan import Plan, read_plan
from vlm_distill_cache.common.cache.reader import OPEN_SHARDS, TeacherCache
from vlm_distill_cache.common.cache.sidecar import FileEntry, sidecar_path
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, NewerFormatError
from vlm_distill_cache.common.files.atomic import HeldLock
from vlm_distill_cache.common.files.notes import add_notes, notes_file, read_notes
from vlm_distill_cache.common.files.signed import document_bytes
from vlm_distill_cache.common.locations import is_url, public_location
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes.fetch import lock
from vlm_distill_cache.common.remotes.mirror import Mirror, find_mirror
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.common.tools.verify import Damage, verify_codecs, verify_shard

_RULES = b"2"  # to be raised when more is found than before: earlier notes are worth nothing then
_SAID_S = 2.0  # what took less is not worth a line
_noted: set[tuple[Path, str]] = set()  # by this process, whether or not the folder can be written
_log = logging.getLogger(__name__)


def open_trusted(location: Path | str, *, open_shards: int = OPEN_SHARDS, verify: bool = True) -> TeacherCache:
    """Open a cache to train or score with: as ``open_cache``, and no record of it is one that no teacher can have written.

    The records of a folder are looked through here, those of an address as each shard arrives; what is noted already is not.

    Args:
        open_shards: As of ``open_cache``.
        verify: False: look at nothing.

    Raises:
        CacheFormatError: If it is no cache, or damaged, or holds what no teacher says.
        NewerFormatError: If it holds signals of a newer version, whose values cannot be judged.
        TransferError: If an address cannot be read.
    """
    if not verify:
        return open_cache(location, open_shards=open_shards)
    if is_url(location):
        mirror = find_mirror(str(location))
        arriving, place = _Arriving(mirror, read_plan(mirror.folder)), public_location(mirror.location)
        return TeacherCache(
            mirror.folder, place=place, open_shards=open_shards, before_open=arriving, codec_of=codec_from_dict
        )
    cache = open_cache(location, open_shards=open_shards)
    cache.steady(lambda shards: demand_sound(shards.path, cache.plan, cache.manifest))
    return cache


@dataclass(frozen=True)
class _Arriving:
    """Brings a shard of an address here, and looks through it before its first use."""

    mirror: Mirror
    plan: Plan

    def __call__(self, shard: int) -> HeldLock:
        held = self.mirror.hold(shard)
        demand_sound(
            self.mirror.folder,
            self.plan,
            self.mirror.manifest,
            [shard],
            named=public_location(self.mirror.location),
        )
        return held


def demand_sound(
    cache_dir: Path, plan: Plan, manifest: Manifest, shards: Iterable[int] | None = None, *, named: str = ""
) -> None:
    """Look through the records of shards that are not noted as sound yet, and note them.

    Args:
        shards: None for all.
        named: What to call the cache; empty: its folder.

    Raises:
        CacheFormatError: With the first shard's damages.
        NewerFormatError: If a signal is of a newer version.
    """
    place, named = _place(plan), named or str(cache_dir)
    wanted = {
        index: manifest.shards[index].sidecar.sha256
        for index in (range(plan.shard_count) if shards is None else shards)
    }
    known = _known(place)
    todo = {index: digest for index, digest in wanted.items() if digest not in known}
    if not todo:
        return
    _refuse(named, verify_codecs(plan))
    began, records = time.monotonic(), sum(manifest.shards[index].samples for index in todo)
    with progress("look through", total=records, unit="record", shown=shards is None, keep=False) as bar:
        for index, digest in todo.items():
            with _alone(place.with_name(f"{place.name}-{index}")):
                if digest not in _known(place):  # else another process was faster
                    _refuse(named, verify_shard(cache_dir, index, plan, manifest, deep=True)[0])
                    _note(place, [digest])
            bar.update(manifest.shards[index].samples)
    if shards is None and (took := time.monotonic() - began) > _SAID_S:
        _log.info("%s: looked through %d records in %.0f s, which is done once", cache_dir, records, took)


def trust_built(cache_dir: Path, plan: Plan, shards: Iterable[int]) -> None:
    """Note shards that this process made of what its own teacher said."""
    _note(_place(plan), [FileEntry.of(sidecar_path(cache_dir, index)).sha256 for index in shards])


def _refuse(named: str, damages: list[Damage]) -> None:
    if damages:
        kind = NewerFormatError if damages[0].kind == "newer" else CacheFormatError
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise kind(f"{named}: {damages[0]}{more}; `cachectl verify --deep` names all that is wrong with it")


def _place(plan: Plan) -> Path:
    """The file with the notes of a plan's shards."""
    return notes_file(hashlib.sha256(_RULES + document_bytes(plan.to_dict())).hexdigest())


def _known(place: Path) -> set[str]:
    return {digest for where, digest in _noted if where == place} | read_notes(place)


def _note(place: Path, digests: list[str]) -> None:
    _noted.update((place, digest) for digest in digests)
    add_notes(place, digests)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes and threads off some work, where the folder can be written; the file goes with it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(path)
    except OSError:  # whoever notes something says so
        yield
        return
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        held.release()
