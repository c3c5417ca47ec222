"""Remove what is damaged from a cache, so that ``teacher-cache build`` rebuilds exactly that.

A shard exists if and only if its sidecar does, so a damaged shard's sidecar goes first: killed at any moment,
what is left is a cache with fewer shards, and another call goes on. ``shards/NNNNN.*`` are the cache's own
names: all that lies there goes with the shard. Files on no list are somebody else's, and stay; so does what the system does
not let us read, which may be sound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_distill_cache.common.cache.index import INDEX, index_file
from vlm_distill_cache.common.cache.layout import files_of_shard, shard_stem
from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.cache.plan import PLAN, SHARDS, Plan, planned_shards, read_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST, is_below_links
from vlm_distill_cache.common.cache.sidecar import FileEntry, sidecar_name
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files.atomic import fsync_directory, hold_folder, remove, try_lock, write_stream_atomic
from vlm_distill_cache.common.printing import brief, one_line
from vlm_distill_cache.common.tools.verify import Damage, verify

_OTHER_PLAN = (
    f"keep the pair that belongs together: copy {PLAN} or {MANIFEST} again from where the cache came from, or "
    f"delete {MANIFEST} if the plan is the right one; until then nothing is removed"
)


@dataclass(frozen=True, kw_only=True)
class Repair:
    """One thing that a repair does, or leaves to a person.

    Attributes:
        path: Relative to the cache; of a shard, its sidecar, which stands for its files too.
        action: ``remove`` and ``rewrite`` are done (unless only asked for), ``keep`` is not for a program to do.
        remedy: For ``keep``, what to do about it.
    """

    path: str
    action: Literal["remove", "rewrite", "keep"]
    reason: str
    remedy: str = ""

    @property
    def is_shard(self) -> bool:
        """Whether a shard goes."""
        return self.action == "remove" and self.path.startswith(f"{SHARDS}/") and self.path.endswith(".json")

    def __str__(self) -> str:
        said = f"{self.action}: {one_line(self.path)}: {brief(self.reason)}"
        return f"{said}; {self.remedy}" if self.remedy else said


def repair(
    cache_dir: Path, *, deep: bool = False, dry_run: bool = False, on_shard: Callable[[], object] | None = None
) -> list[Repair]:
    """Remove damaged shards, files beside them and a manifest that no longer holds; healthy shards are not touched.

    Args:
        deep: Look for wrong values too, as ``verify`` does.

    Returns:
        What was done, in order, and what is left to a person; empty if the cache is sound.

    Raises:
        ConfigError: If another command builds, extends or copies the cache: what it has not written yet looks damaged.
    """
    busy = "another command builds, extends or copies this cache; wait for its end, then run the same command again"
    with nullcontext() if dry_run else hold_folder(cache_dir, busy=busy):
        steps = list(_plan_steps(cache_dir, verify(cache_dir, deep=deep, on_shard=on_shard)))
        if not dry_run:
            for step in steps:
                _do(cache_dir, step)
    return steps


def _plan_steps(cache_dir: Path, damages: list[Damage]) -> Iterator[Repair]:
    """Yield the steps in the order in which a kill between any two of them does no harm."""
    by_kind: dict[str, list[Damage]] = {}
    unreadable = [damage for damage in damages if damage.unreadable]
    for damage in damages:
        if not damage.unreadable or damage.kind == "plan":
            by_kind.setdefault(damage.kind, []).append(damage)
    if "newer" in by_kind:  # what looks damaged may be what this version does not know
        yield from (_keep(damage, "nothing of this cache is removed") for damage in by_kind["newer"])
        return
    if "plan" in by_kind:
        yield from (_keep(damage, "nothing can be built without it") for damage in by_kind["plan"])
        return
    plan = read_plan(cache_dir)
    if (reason := _other_plan(cache_dir, plan)) is not None:
        yield Repair(path=PLAN, action="keep", reason=reason, remedy=_OTHER_PLAN)
        return

    # Nothing is known of what cannot be read, so it stays, a shard with all its files.
    yield from (_keep(damage) for damage in unreadable)
    spared = {damage.shard for damage in unreadable}
    dropped: dict[int, list[str]] = {}
    for damage in by_kind.get("shard", []):
        if damage.shard not in spared:
            dropped.setdefault(damage.shard or 0, []).append(f"{damage.path}: {damage.reason}")
    for shard, reasons in sorted(dropped.items()):
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        yield Repair(path=sidecar_name(shard, plan.shard_count), action="remove", reason=reasons[0] + more)
    for damage in by_kind.get("missing", []):
        for path in () if damage.shard in spared else _shard_files(cache_dir, damage.shard or 0):
            if (lock := try_lock(path)) is not None:  # else its writer is about to publish the sidecar
                lock.release()
                yield Repair(
                    path=path.relative_to(cache_dir).as_posix(),
                    action="remove",
                    reason="has no sidecar: left by a killed run",
                )
    for damage in by_kind.get("leftover", []):
        yield Repair(path=damage.path, action="remove", reason=damage.reason)

    lost = False
    for damage in by_kind.get("side file", []):
        path = cache_dir / damage.path
        if is_below_links(cache_dir, damage.path) or (path.is_dir() and not path.is_symlink()):
            yield _keep(damage, "a link or folder of somebody else's is in its place")
        elif path.exists() or path.is_symlink():
            yield Repair(path=damage.path, action="remove", reason=damage.reason)
        lost = True
    rebuilt = bool(dropped or lost or "missing" in by_kind)
    manifest = cache_dir / MANIFEST
    if manifest.is_dir():
        yield Repair(path=MANIFEST, action="keep", reason="a folder", remedy="move it elsewhere")
    elif any(damage.path == MANIFEST for damage in unreadable):
        pass  # it was named above
    elif (manifest.exists() or manifest.is_symlink()) and (rebuilt or "manifest" in by_kind):
        reason = "lists missing files" if rebuilt else by_kind["manifest"][0].reason
        yield Repair(path=MANIFEST, action="remove", reason=reason)
    elif "index" in by_kind and not rebuilt:
        yield Repair(path=INDEX, action="rewrite", reason=by_kind["index"][0].reason)

    for kind in ("data", "stranger"):
        yield from (_keep(damage) for damage in by_kind.get(kind, []) if damage.shard not in dropped)


def _other_plan(cache_dir: Path, plan: Plan) -> str | None:
    """Say that the manifest was made for another plan: every shard would look damaged, and none need be."""
    try:
        manifest = read_manifest(cache_dir)
    except CacheFormatError:
        return None
    if manifest.plan_hash == plan.hash:
        return None
    return f"{PLAN} is {plan.hash}, but {MANIFEST} was made for plan {manifest.plan_hash}"


def _keep(damage: Damage, why: str = "") -> Repair:
    reason = f"{damage.reason} ({why})" if why else damage.reason
    return Repair(path=damage.path, action="keep", reason=reason, remedy=damage.remedy)


def _shard_files(cache_dir: Path, shard: int) -> list[Path]:
    return files_of_shard(cache_dir, shard_stem(shard, planned_shards(cache_dir)))


def _do(cache_dir: Path, step: Repair) -> None:
    path = cache_dir / step.path
    if step.action == "remove":
        remove(path)
        if step.is_shard:
            fsync_directory(path.parent)  # before any of its files goes
            for file in _shard_files(cache_dir, int(path.stem)):
                remove(file)
    elif step.action == "rewrite":
        with index_file(cache_dir, read_plan(cache_dir)) as data:
            if read_manifest(cache_dir).files.get(INDEX) != FileEntry.of_stream(data):
                remove(cache_dir / MANIFEST)
            write_stream_atomic(path, data)
