"""``--dry-run`` of cachectl's verbs that copy: what would be moved or written, and what stands in the way."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.plan import PLAN, read_plan, refuse_changed_plan
from vlm_distill_cache.common.cache.side_files import CARD, MANIFEST, refuse_occupied
from vlm_distill_cache.common.cache.sidecar import read_sidecar, sidecar_name, sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.files.disk import folder_bytes, refuse_overlap
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.printing import size_words
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import cache_bytes, in_parallel, read_remote_manifest
from vlm_distill_cache.common.remotes.pull import refuse_other_content
from vlm_distill_cache.common.remotes.push import many_files, read_remote_state, read_whole
from vlm_distill_cache.common.tools.convert import open_source
from vlm_distill_cache.common.tools.derive import another_folder
from vlm_distill_cache.common.tools.merge import check_sources
from vlm_distill_cache.common.tools.outlook import Outlook
from vlm_distill_cache.common.tools.select import Selection, look_at_part, parse_selection


def preview_push(cache_dir: Path, location: str, *, jobs: int, overwrite: bool) -> Outlook:
    """What a push would send."""
    outlook = Outlook([f"cachectl push would copy {cache_dir} to {location}"])
    manifest: Manifest | None = None
    with outlook.checking():
        manifest, counts = read_whole(cache_dir)
    with outlook.checking():
        refuse_overlap(cache_dir, location)
        if not is_url(location):
            outlook.needs_writing(Path(location))
            (refuse_inside if overwrite else refuse_occupied)(Path(location))
    if location.startswith("hf:"):
        from huggingface_hub import get_token

        if get_token() is None:
            outlook.problem(f"{location}: no token of the hub is given; log in with `hf auth login` or set HF_TOKEN")
    if manifest is None:
        return outlook
    with outlook.checking():
        remote = open_remote(location)
        remote.delete([])  # a place that nobody can write to says so
        there = read_remote_state(remote)
        if isinstance(there, Manifest) and there.hash == manifest.hash:
            outlook.lines.append(f"  it is there already: only what changed beside its records ({CARD}) would be sent")
            return outlook
        has_card = there is None and remote.size(PLAN) is None and remote.size(CARD) is not None
        if (there is not None or has_card) and not overwrite:
            what = (
                f"another cache ({there.hash})"
                if isinstance(there, Manifest)
                else there or f"a {CARD}, not this cache's"
            )
            raise CacheMismatchError(f"{location} holds {what}; push to another place, or replace it with --overwrite")
        present = (
            []
            if there is not None
            else in_parallel(
                [
                    partial(_shard_there, remote, cache_dir, len(manifest.shards), index)
                    for index in range(len(manifest.shards))
                ],
                jobs,
            )
        )
        done = sum(present)
        left = cache_bytes(manifest) - done
        outlook.lines.append(
            f"  {manifest.totals['samples']} samples in {len(manifest.shards)} shards; to send: {size_words(left)} of "
            f"{size_words(cache_bytes(manifest))}{', replacing what is there' if there is not None else ''}"
        )
        if said := many_files(remote, manifest, counts):
            outlook.lines.append(f"  {said}")
        if not is_url(location):
            outlook.needs_room(Path(location), left, "cache")
    return outlook


def _shard_there(remote: Remote, cache_dir: Path, shard_count: int, index: int) -> int:
    """The bytes of a shard that an earlier push has sent; 0 if it has not."""
    ours = sidecar_path(cache_dir, index).read_bytes()
    with contextlib.suppress(FileNotFoundError, CacheFormatError):
        if remote.read(sidecar_name(index, shard_count), max_bytes=len(ours)) == ours:
            return read_sidecar(cache_dir, index).stored_bytes + len(ours)
    return 0


def preview_pull(source: str, cache_dir: Path, *, part: Mapping[str, Any] | None) -> Outlook:
    """What a pull would bring; ``part`` is what `parse_selection` takes, None where all is wanted."""
    outlook = Outlook([f"cachectl pull would copy {source} to {cache_dir}"])
    outlook.needs_writing(cache_dir)
    selection: Selection | None = None
    with outlook.checking():
        selection = None if part is None else parse_selection(**part)
    with outlook.checking():
        refuse_overlap(cache_dir, source)
    with outlook.checking():
        remote = open_remote(source)
        manifest, _ = read_remote_manifest(remote)
        total = cache_bytes(manifest)
        outlook.lines.append(
            f"  the cache there: {manifest.totals['samples']} samples in {len(manifest.shards)} shards"
        )
        if part is not None:
            refuse_occupied(cache_dir)
            if selection is not None:
                _look_at_part(outlook, remote, cache_dir, selection, total)
            return outlook
        refuse_other_content(cache_dir, remote, manifest)
        there = folder_bytes(cache_dir)
        outlook.lines.append(f"  there already: {size_words(there)} of {size_words(total)}")
        outlook.needs_room(cache_dir, max(0, total - there), "cache")
    return outlook


def _look_at_part(outlook: Outlook, remote: Remote, cache_dir: Path, selection: Selection, total: int) -> None:
    plan, size = look_at_part(remote, selection)
    if (cache_dir / PLAN).is_file():
        with another_folder(cache_dir):
            refuse_changed_plan(read_plan(cache_dir), plan, where=str(cache_dir))
    outlook.lines.append(
        f"  a part of {size_words(total)}: {plan.sample_count} samples, {', '.join(sorted(plan.signals))}"
    )
    outlook.needs_room(cache_dir, size, "at most what is read of its shards")


def preview_merge(sources: Sequence[Path], target: Path, *, store: str | None) -> Outlook:
    """What a merge would write; whether samples that are in several caches are equal shows when they are read."""
    outlook = Outlook([f"cachectl merge would write {target} from {len(sources)} caches"])
    outlook.needs_writing(target)
    with outlook.checking():
        parts = check_sources(sources, target, store=store)
        finished = [read_manifest(source) for source in sources if (source / MANIFEST).is_file()]
        kind = (
            "parts of one plan" if parts else f"finished caches of {sum(m.totals['samples'] for m in finished)} samples"
        )
        outlook.lines.append(f"  {kind}, {store or read_plan(sources[0]).store}")
        outlook.needs_room(target, sum(map(folder_bytes, sources)), "at most all of them")
    return outlook


def preview_convert(source: Path, target: Path, *, store: str) -> Outlook:
    """What a conversion would write."""
    outlook = Outlook([f"cachectl convert would write {target} ({store}) from {source}"])
    outlook.needs_writing(target)
    with outlook.checking():
        refuse_occupied(target)
    with outlook.checking():
        cache = open_source(source, target, store)
        outlook.lines.append(f"  {len(cache)} samples in {cache.plan.shard_count} shards")
        outlook.needs_room(target, cache_bytes(cache.manifest), "about as much as the cache")
    return outlook
