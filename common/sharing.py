"""Trusting a cache that came from elsewhere: verify every byte; convert from one store to the other."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from common.atomic import TEMPORARY_PREFIX, try_lock, write_bytes_atomic
from common.cache import open_cache
from common.errors import CacheFormatError, ConfigError
from common.hashing import file_digests
from common.manifest import (
    CARD,
    MANIFEST,
    PLAN,
    SHARDS,
    FileEntry,
    Manifest,
    Plan,
    ShardSidecar,
    ShardSummary,
    read_manifest,
    read_plan,
    read_sidecar,
    seal,
    sidecar_path,
    write_plan,
)
from common.plan import card_store_line
from common.schema import Record, check_record
from common.sidecar import check_sidecar
from common.stores import DAMAGE_ERRORS, finish_shard, open_reader, open_writer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_COPY_AGAIN = "copy it again from where the cache came from"
_TOKEN_FIELDS = ("labels", "token_ids")
_SEAL = "run `teacher-cache seal`"


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a cache.

    Attributes:
        path: Relative to the cache.
        reason: What was expected and found.
        remedy: What to do about it.
    """

    path: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


def verify(
    cache_dir: Path, *, deep: bool = False, on_shard: Callable[[], object] | None = None
) -> list[Damage]:
    """Check a cache: descriptions, counts, dtypes, offsets, and size and both digests of every file.

    Args:
        cache_dir: The cache, sealed or not.
        deep: Decode every record too, and check lengths, finite values and token ids.
        on_shard: Called after each shard, for progress.

    Returns:
        One entry per damaged, missing or unexpected file; empty if all is well. Never raises for damage.
    """
    try:
        plan = read_plan(cache_dir)
    except CacheFormatError as error:
        return [Damage(path=PLAN, reason=str(error), remedy=_COPY_AGAIN)]
    damages: list[Damage] = []
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(cache_dir)
    except CacheFormatError as error:
        damages.append(Damage(path=MANIFEST, reason=str(error), remedy=f"{_SEAL}, or {_COPY_AGAIN}"))
    known = {MANIFEST, CARD, PLAN}
    if manifest is not None:
        damages += _check_manifest(cache_dir, plan, manifest)
        known |= manifest.files.keys()
    unlisted: list[str] = []
    owner: dict[str, int] = {}
    for index in range(plan.shard_count):
        known.add(sidecar_path(cache_dir, index).relative_to(cache_dir).as_posix())
        found, sidecar = _verify_shard(cache_dir, index, plan, manifest, deep=deep)
        damages += found
        if sidecar is not None:
            known |= sidecar.files.keys()
            damages += _repeated_ids(sidecar, owner)
        else:  # nobody can say which files belong to it
            unlisted.append(f"{SHARDS}/{index:05d}.")
        if on_shard is not None:
            on_shard()
    if manifest is None:
        unlisted += [path.name for path in cache_dir.iterdir() if path.name != SHARDS]
    return damages + _unexpected(cache_dir, known, unlisted)


def _check_manifest(cache_dir: Path, plan: Plan, manifest: Manifest) -> list[Damage]:
    damages = []
    if manifest.plan_hash != plan.hash:
        reason = f"made for plan {manifest.plan_hash}, but {PLAN} is {plan.hash}"
        damages.append(Damage(path=MANIFEST, reason=reason, remedy=f"{_SEAL}, or {_COPY_AGAIN}"))
    if len(manifest.shards) != plan.shard_count:
        reason = f"lists {len(manifest.shards)} shards, but the plan has {plan.shard_count}"
        damages.append(Damage(path=MANIFEST, reason=reason, remedy=f"{_SEAL}, or {_COPY_AGAIN}"))
    for name, entry in manifest.files.items():
        if (wrong := _file_damage(cache_dir / name, entry)) is not None:
            damages.append(Damage(path=name, reason=wrong, remedy=_COPY_AGAIN))
    return damages


def _verify_shard(
    cache_dir: Path, index: int, plan: Plan, manifest: Manifest | None, *, deep: bool
) -> tuple[list[Damage], ShardSidecar | None]:
    path = sidecar_path(cache_dir, index)
    name = path.relative_to(cache_dir).as_posix()
    remedy = f"delete {name} and run `teacher-cache build` again to make this shard anew, or {_COPY_AGAIN}"
    try:
        sidecar = read_sidecar(cache_dir, index)
        check_sidecar(sidecar, plan, name)
    except FileNotFoundError:
        remedy = "run `teacher-cache build` again to make this shard"
        return [Damage(path=name, reason="missing: the shard does not exist", remedy=remedy)], None
    except CacheFormatError as error:
        return [Damage(path=name, reason=str(error), remedy=remedy)], None
    damages = []
    listed = manifest.shards[index] if manifest is not None and index < len(manifest.shards) else None
    if listed is not None and listed != ShardSummary.of(sidecar):
        reason = f"is not the sidecar that {MANIFEST} lists"
        damages.append(Damage(path=name, reason=reason, remedy=f"{_SEAL}, or {_COPY_AGAIN}"))
    for file, entry in sidecar.files.items():
        if (wrong := _file_damage(cache_dir / file, entry)) is not None:
            damages.append(Damage(path=file, reason=wrong, remedy=remedy))
    if not damages and (wrong := _content_damage(cache_dir, plan, sidecar, deep=deep)) is not None:
        damages.append(Damage(path=name, reason=wrong, remedy=remedy))
    return damages, sidecar


def _file_damage(path: Path, entry: FileEntry) -> str | None:
    """Return what is wrong with a file, or None."""
    try:
        if path.is_symlink() or not path.is_file():
            return "a link or folder instead of a file" if path.is_symlink() or path.exists() else "missing"
        size = path.stat().st_size
        if size != entry.size:
            return f"{size} bytes; expected {entry.size}"
        fast, safe, _ = file_digests(path)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if fast != entry.xxh3_128:
        return f"checksum {fast}; expected {entry.xxh3_128}"
    if safe != entry.sha256:
        return f"sha256 {safe}; expected {entry.sha256}, although the fast checksum agrees: tampered with"
    return None


def _content_damage(cache_dir: Path, plan: Plan, sidecar: ShardSidecar, *, deep: bool) -> str | None:
    """Return what is wrong with a shard whose files are as its sidecar says, or None."""
    try:
        reader = open_reader(plan.store, cache_dir, sidecar.index, plan.all_fields)
        try:
            if reader.sample_ids != sidecar.sample_ids:
                return "holds other samples than its sidecar lists"
            reader.check()
            return _records_damage(reader.read, plan, sidecar) if deep else None
        finally:
            reader.close()
    except (CacheFormatError, *DAMAGE_ERRORS) as error:
        return str(error)


def _records_damage(read: Callable[[int], Record], plan: Plan, sidecar: ShardSidecar) -> str | None:
    rows, field_bytes = 0, dict.fromkeys(sidecar.field_bytes, 0)
    vocabulary: Any = plan.teacher.get("vocabulary")
    for position, sample_id in enumerate(sidecar.sample_ids):
        record = read(position)
        check_record(record, plan.all_fields, f"sample {sample_id!r}")
        rows += len(record["labels"])
        for name, array in record.items():
            field_bytes[name] += array.nbytes
            if array.dtype.kind == "f" and bool(np.isnan(array).any()):
                return f"sample {sample_id!r}: {name} holds NaN"
            if (
                name in _TOKEN_FIELDS
                and isinstance(vocabulary, int)
                and int(array.max(initial=0)) >= vocabulary
            ):
                return f"sample {sample_id!r}: {name} has {array.max()}, the vocabulary has {vocabulary}"
    if rows != sidecar.rows or field_bytes != sidecar.field_bytes:
        return f"holds {rows} rows and {field_bytes} bytes; its sidecar says otherwise"
    return None


def _repeated_ids(sidecar: ShardSidecar, owner: dict[str, int]) -> list[Damage]:
    for sample_id in sidecar.sample_ids:
        first = owner.setdefault(sample_id, sidecar.index)
        if first != sidecar.index:
            reason = f"sample {sample_id!r} is in shard {first} too"
            remedy = "give the data set's samples unique ids and build the cache again"
            return [Damage(path=f"{SHARDS}/{sidecar.index:05d}.json", reason=reason, remedy=remedy)]
    return []


def _unexpected(cache_dir: Path, known: set[str], unlisted: list[str]) -> list[Damage]:
    """Find links, leftovers of killed runs, and files on no list; ``unlisted`` begins names to excuse."""
    damages: list[Damage] = []

    def report(name: str, reason: str, remedy: str) -> None:
        damages.append(Damage(path=name, reason=reason, remedy=remedy))

    folders = [cache_dir]
    while folders:
        folder = folders.pop()
        try:
            paths = sorted(folder.iterdir())
        except OSError as error:
            report(folder.relative_to(cache_dir).as_posix(), f"cannot be read: {error.strerror}", _COPY_AGAIN)
            continue
        for path in paths:
            name = path.relative_to(cache_dir).as_posix()
            if path.name.startswith(TEMPORARY_PREFIX):
                if (lock := try_lock(path)) is not None:  # not being written right now
                    lock.release()
                    report(name, "left behind by a killed run", f"{_SEAL} to remove it")
            elif path.is_symlink() or not (path.is_dir() or path.is_file()):
                report(name, "a link or device", "replace it by a plain file or folder")
            elif path.is_dir():
                folders.append(path)
            elif name not in known and not any(name.startswith(start) for start in unlisted):
                report(name, "belongs to no shard and no list", "delete it")
    return damages


def convert(
    source: Path, target: Path, store: str, *, on_shard: Callable[[], object] | None = None
) -> Manifest:
    """Write the same cache in the other store; back again, it is byte-identical.

    Killed and called again, it goes on with the shards that are missing.

    Args:
        source: A sealed cache.
        target: A new folder, or one that an earlier call to convert the same cache began.
        store: ``zarr`` or ``webdataset``.
        on_shard: Called after each shard, for progress.

    Returns:
        The manifest of the new cache.

    Raises:
        ConfigError: If the cache is in that store already, or one folder lies inside the other.
        CacheFormatError: If the source is not sealed or damaged.
        CacheMismatchError: If the target holds another cache.
    """
    cache = open_cache(source, open_shards=1)
    if store == cache.plan.store:
        raise ConfigError(f"{source} is a {store} cache already; copy the folder, or choose the other store")
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ConfigError(f"{target} and {source} lie inside each other; choose a folder beside the cache")
    plan = replace(cache.plan, store=store)
    write_plan(target, plan)
    for index in range(plan.shard_count):
        if not sidecar_path(target, index).exists():
            writer = open_writer(store, target, index, plan.all_fields)
            try:
                for sample_id in cache.shard_sample_ids(index):
                    writer.append(sample_id, cache.read(sample_id))
                finish_shard(writer, read_sidecar(source, index).failed)
            finally:
                writer.abort()
        if on_shard is not None:
            on_shard()
    for name, entry in cache.manifest.files.items():
        if name != PLAN:
            _copy(source / name, target / name, entry)
    if (source / CARD).is_file():
        card = (source / CARD).read_bytes()
        old, new = card_store_line(cache.plan).encode(), card_store_line(plan).encode()
        write_bytes_atomic(target / CARD, card.replace(old, new, 1))
    return seal(target, fidelity=cache.manifest.fidelity)


def _copy(source: Path, target: Path, entry: FileEntry) -> None:
    """Copy a small file beside the shards, checked on the way."""
    if (reason := _file_damage(source, entry)) is not None:
        raise CacheFormatError(f"{source}: {reason}; {_COPY_AGAIN}")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(target, source.read_bytes())
