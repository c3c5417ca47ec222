"""Check a cache that came from elsewhere: every byte, every count, and on demand every value.

Holds one shard in memory at a time, and 24 bytes a sample to notice repeated ids.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from vlm_distill_cache.common.cache.index import INDEX, IndexBuilder, index_damage
from vlm_distill_cache.common.cache.layout import shard_folders, shard_of, shard_stem, stem_of
from vlm_distill_cache.common.cache.manifest import Manifest, ShardSummary, read_manifest
from vlm_distill_cache.common.cache.other_folders import is_part_of_cache
from vlm_distill_cache.common.cache.plan import PLAN, SHARDS, Plan, read_plan
from vlm_distill_cache.common.cache.schema import check_record
from vlm_distill_cache.common.cache.shared_images import SharedImages, SourceCheck
from vlm_distill_cache.common.cache.side_files import CARD, LEASES, MANIFEST, SINKS, open_plain
from vlm_distill_cache.common.cache.sidecar import (
    FileEntry,
    ShardSidecar,
    UnknownWords,
    check_sidecar,
    missing_shards,
    read_sidecar,
    read_sidecar_file,
    sidecar_name,
)
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.cache.stores.base import DAMAGE_ERRORS, ShardReader
from vlm_distill_cache.common.cache.versions import identity
from vlm_distill_cache.common.codecs.checks import codec_damage, value_damage
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, NewerFormatError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, is_out_of_reach, try_lock
from vlm_distill_cache.common.files.hashing import stream_digests
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.printing import brief, one_line
from vlm_distill_cache.common.tools.sinks import sinks_damage

COPY_AGAIN = "copy it again from where the cache came from (the same `cachectl pull` replaces what is damaged)"
_READ_IT = "it may be sound: make it readable first (mode and owner, of the folders above too, and the disk), then verify again"
_MAX_REASON = 600
_SEAL = "run `teacher-cache seal`"
_MAKE_ANEW = "run `cachectl repair` (--deep, where only that found it), then `teacher-cache build` again to"

Kind = Literal[
    "newer", "plan", "manifest", "unsealed", "shard", "missing", "index", "side file", "data", "leftover", "stranger"
]
_REMEDIES: dict[Kind, str] = {
    "newer": "nothing is to be repaired",
    "plan": COPY_AGAIN,
    "manifest": f"{_SEAL}, or {COPY_AGAIN}",
    "unsealed": f"{_SEAL}, or {COPY_AGAIN}",
    "shard": f"{_MAKE_ANEW} make this shard anew, or {COPY_AGAIN}",
    "missing": f"run `teacher-cache build` again to make this shard, or {COPY_AGAIN}",
    "index": f"run `cachectl repair` or `teacher-cache seal` to write it anew, or {COPY_AGAIN}",
    "side file": f"{_MAKE_ANEW} write it anew, or {COPY_AGAIN}",
    "data": "give the data set's samples unique ids and build the cache again",
    "leftover": f"{_SEAL} or `cachectl repair` to remove it",
    "stranger": "delete it",
}


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a cache.

    Attributes:
        path: Relative to the cache.
        kind: ``newer``: no damage, but of a newer version of this software. Else what it belongs to: the plan, the
            manifest, or one that was not written yet; a shard; a shard that was never made; the index; a file beside
            the shards; samples with equal ids; what a killed run left; a file on no list.
        own_remedy: What to do about it, if not what its kind says.
        unreadable: Whether the system did not let it be read, so that nothing is known of its content.
    """

    path: str
    kind: Kind
    reason: str
    own_remedy: str = ""
    unreadable: bool = False

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return _READ_IT if self.unreadable else self.own_remedy or _REMEDIES[self.kind]

    @property
    def shard(self) -> int | None:
        """The shard whose file it is, or None."""
        return shard_of(self.path)

    def __str__(self) -> str:
        return f"{one_line(self.path)}: {brief(self.reason, limit=_MAX_REASON)}; {self.remedy}"


def verify(cache_dir: str | Path, *, deep: bool = False, on_shard: Callable[[], object] | None = None) -> list[Damage]:
    """Check a cache: descriptions, counts, dtypes, offsets, and size and both digests of every file.

    Where an extended cache takes its place meanwhile, that one is checked, from the beginning.

    Args:
        deep: Decode every record too, and check that its codecs can have written its values.

    Returns:
        One entry per damaged, missing or unexpected file; empty if all is well. Never raises for damage.

    Raises:
        ConfigError: For an address.
        CacheFormatError: If the folder is no cache and no part of one, saying what it looks like.
    """
    if is_url(cache_dir):
        raise ConfigError(f"{cache_dir}: an address; pull the cache into a folder first, which checks every file")
    cache_dir = Path(cache_dir)
    while True:
        began = identity(cache_dir)
        try:
            damages = _verify(cache_dir, deep=deep, on_shard=on_shard)
        except (CacheFormatError, OSError):
            if identity(cache_dir) == began:
                raise
        else:
            if identity(cache_dir) == began:
                return damages


def _verify(cache_dir: Path, *, deep: bool, on_shard: Callable[[], object] | None) -> list[Damage]:
    if (cache_dir / SHARDS).is_symlink():
        return [_linked(SHARDS)]
    try:
        plan = read_plan(cache_dir)
    except (CacheFormatError, OSError) as error:
        if (
            isinstance(error, CacheFormatError)
            and not os.path.lexists(cache_dir / PLAN)
            and not is_part_of_cache(cache_dir)
        ):
            raise
        return [_failed(PLAN, "plan", error)]
    for folder in shard_folders(cache_dir, plan.shard_count):
        if folder.is_symlink():
            return [_linked(folder.relative_to(cache_dir).as_posix())]
    damages: list[Damage] = verify_codecs(plan) if deep else []
    deep = deep and not damages  # what its codec may write is not known
    manifest: Manifest | None = None
    try:
        manifest = read_manifest(cache_dir)
    except (CacheFormatError, OSError) as error:
        absent = not (cache_dir / MANIFEST).exists() and not (cache_dir / MANIFEST).is_symlink()
        damages.append(_unsealed(cache_dir, plan) if absent else _failed(MANIFEST, "manifest", error))
    known = {MANIFEST, CARD, PLAN}
    if manifest is not None:
        damages += _check_manifest(cache_dir, plan, manifest)
        known.update(manifest.files)
    unlisted: list[str] = []
    builder, field_bytes = IndexBuilder(), Counter({field.name: 0 for field in plan.all_fields})
    for index in range(plan.shard_count):
        known.add(sidecar_name(index, plan.shard_count))
        found, sidecar = verify_shard(cache_dir, index, plan, manifest, deep=deep)
        damages += found
        if sidecar is not None:
            known.update(sidecar.files)  # `|=` with keys would copy all that is known
            builder.add(sidecar)
            field_bytes.update(sidecar.field_bytes)
        else:  # nobody can say which files belong to it
            unlisted.append(shard_stem(index, plan.shard_count))
        if on_shard is not None:
            on_shard()
    if not unlisted:  # all sidecars are there
        damages += _index_damage(cache_dir, builder, plan.shard_count)
        if manifest is not None and manifest.field_bytes != field_bytes:
            damages.append(Damage(MANIFEST, "manifest", "field_bytes are not the sums over the sidecars"))
    if deep and not damages and manifest is not None and SINKS in manifest.files:
        wrong = sinks_damage(cache_dir, plan)
        damages += [] if wrong is None else [Damage(SINKS, "side file", wrong)]
    if manifest is None:
        unlisted += [path.name for path in cache_dir.iterdir() if path.name != SHARDS]
    return _one_each(damages + _unexpected(cache_dir, known, unlisted))


def _linked(folder: str) -> Damage:
    return Damage(folder, "plan", "a link; a cache holds plain files and folders only")


def split_unfinished(damages: list[Damage]) -> tuple[list[Damage], list[Damage]]:
    """Tell what is merely missing from what is damaged: a cache that is not sealed may lack shards.

    Returns:
        What an unfinished cache lacks, and the damages.

    Raises:
        NewerFormatError: If a part is from a newer version: what else is wrong cannot be told from what is new.
    """
    if newer := [damage for damage in damages if damage.kind == "newer"]:
        more = f" (and {len(newer) - 1} more)" if len(newer) > 1 else ""
        raise NewerFormatError(f"{newer[0]}{more}")
    unsealed = any(damage.kind == "unsealed" for damage in damages)
    lacking = [damage for damage in damages if unsealed and damage.kind in ("unsealed", "missing")]
    return lacking, [damage for damage in damages if damage not in lacking]


def _unsealed(cache_dir: Path, plan: Plan) -> Damage:
    try:
        missing = len(missing_shards(cache_dir, plan))
    except OSError as error:
        return _failed(MANIFEST, "unsealed", error)
    build = f"run `teacher-cache build` again, which seals it once all are there, or {COPY_AGAIN}" if missing else ""
    reason = f"not written: the cache is not sealed, {missing} of {plan.shard_count} shards are missing"
    return Damage(MANIFEST, "unsealed", reason, build)


def _failed(path: str, kind: Kind, error: Exception, reason: str = "") -> Damage:
    """What an error that reading a file raised says of it."""
    return Damage(
        path,
        "newer" if isinstance(error, NewerFormatError) else kind,
        reason or str(error),
        unreadable=is_out_of_reach(error),
    )


def verify_codecs(plan: Plan) -> list[Damage]:
    """Name the signals whose values cannot be checked: codecs of a newer version, or impossible settings."""
    newer, impossible = codec_damage(plan.signals)
    if newer:
        reason = f"from a newer version, values not checked: {'; '.join(newer)}"
        return [Damage(PLAN, "newer", reason, f"update this software; {_REMEDIES['newer']}")]
    return [Damage(PLAN, "plan", f"values not checked: {'; '.join(impossible)}")] if impossible else []


def _check_manifest(cache_dir: Path, plan: Plan, manifest: Manifest) -> list[Damage]:
    damages = []
    if manifest.plan_hash != plan.hash:
        reason = f"made for plan {manifest.plan_hash}, but {PLAN} is {plan.hash}"
        damages.append(Damage(MANIFEST, "manifest", reason))
    if manifest.format_version != plan.format_version:
        reason = f"is of format version {manifest.format_version}, but {PLAN} is of {plan.format_version}"
        damages.append(Damage(MANIFEST, "manifest", reason))
    if len(manifest.shards) != plan.shard_count:
        reason = f"lists {len(manifest.shards)} shards, but the plan has {plan.shard_count}"
        damages.append(Damage(MANIFEST, "manifest", reason))
    for name, entry in manifest.files.items():
        if (wrong := file_damage(cache_dir, name, entry, "index" if name == INDEX else "side file")) is not None:
            damages.append(wrong)
    return damages


def verify_shard(
    cache_dir: Path, index: int, plan: Plan, manifest: Manifest | None, *, deep: bool
) -> tuple[list[Damage], ShardSidecar | None]:
    """Check one shard as ``verify`` does, and give its sidecar if that can be read."""
    name = sidecar_name(index, plan.shard_count)
    try:
        sidecar, data = read_sidecar_file(cache_dir, index)
        check_sidecar(sidecar, plan, name)
    except FileNotFoundError:
        return [Damage(name, "missing", "missing: the shard does not exist")], None
    except (CacheFormatError, OSError) as error:
        return [_failed(name, "shard", error)], None
    damages = []
    listed = manifest.shards[index] if manifest is not None and index < len(manifest.shards) else None
    if listed is not None and listed != ShardSummary.of(sidecar, data):
        damages.append(Damage(name, "manifest", f"is not the sidecar that {MANIFEST} lists"))
    broken = [
        wrong
        for file, entry in sidecar.files.items()
        if (wrong := file_damage(cache_dir, file, entry, "shard")) is not None
    ]
    if not broken and (wrong := content_damage(cache_dir, plan, sidecar, deep=deep)) is not None:
        broken = [wrong]
    return damages + broken, sidecar


def file_damage(root: Path, name: str, entry: FileEntry, kind: Kind) -> Damage | None:
    """Return what is wrong with a file of a cache, or None; no link is followed."""
    try:
        with open_plain(root, name) as file:
            fast, safe, size = stream_digests(file)
    except FileNotFoundError:
        return Damage(name, kind, "missing")
    except OSError as error:
        return _failed(name, kind, error, f"cannot be read: {error.strerror or error}")
    if size != entry.size:
        return Damage(name, kind, f"{size} bytes; expected {entry.size}")
    if fast != entry.xxh3_128:
        return Damage(name, kind, f"checksum {fast}; expected {entry.xxh3_128}")
    if safe != entry.sha256:
        reason = f"sha256 {safe}; expected {entry.sha256}, although the fast checksum agrees: tampered with"
        return Damage(name, kind, reason)
    return None


def _index_damage(cache_dir: Path, builder: IndexBuilder, shard_count: int) -> list[Damage]:
    """Compare the index with the sidecars, if it is there; and find sample ids that appear twice."""
    expected, repeated = builder.finish(shard_count)
    with expected:
        if repeated is not None:
            first, second = repeated
            sidecar = read_sidecar(cache_dir, second.shard)
            names = [name for name, _ in sidecar.failed] if second.failed else sidecar.sample_ids
            reason = f"sample {names[second.position]!r} is in shard {first.shard} too"
            return [Damage(sidecar_name(second.shard, shard_count), "data", reason)]
        try:
            wrong = index_damage(cache_dir, expected) if (cache_dir / INDEX).exists() else None
        except (CacheFormatError, OSError) as error:
            return [_failed(INDEX, "index", error)]
    return [] if wrong is None else [Damage(INDEX, "index", wrong)]


def _unexpected(cache_dir: Path, known: set[str], unlisted: list[str]) -> list[Damage]:
    """Find links, leftovers of killed runs, and files on no list; ``unlisted`` begins names to excuse."""
    damages: list[Damage] = []
    of_shards = {start for start in unlisted if stem_of(start)}  # there may be many thousands
    others = tuple(start for start in unlisted if start not in of_shards)
    folders = [cache_dir]
    while folders:
        folder = folders.pop()
        try:
            entries = {path: path.is_dir() for path in sorted(folder.iterdir())}
        except OSError as error:
            name = folder.relative_to(cache_dir).as_posix()
            damages.append(_failed(name, "stranger", error, f"cannot be read: {error.strerror or error}"))
            continue
        for path, is_folder in entries.items():
            name = path.relative_to(cache_dir).as_posix()
            if name == LEASES and name in unlisted:  # of a cache that is being built
                continue
            leftover = path.name.startswith(TEMPORARY_PREFIX)
            unopened = name not in known and (leftover or not is_folder)
            if unopened and (refusal := _refusal(path)) is not None:
                kind: Kind = "leftover" if leftover else "stranger"
                damages.append(_failed(name, kind, refusal, f"cannot be read: {refusal.strerror or refusal}"))
            elif leftover:
                if (lock := try_lock(path)) is not None:  # not being written right now
                    lock.release()
                    damages.append(Damage(name, "leftover", "left behind by a killed run"))
            elif path.is_symlink() or not (is_folder or path.is_file()):
                damages.append(Damage(name, "stranger", "a link or device", "replace it by a plain file or folder"))
            elif is_folder:
                folders.append(path)
            elif name not in known and stem_of(name) not in of_shards and not name.startswith(others):
                damages.append(Damage(name, "stranger", "belongs to no shard and no list"))
    return damages


def _refusal(path: Path) -> OSError | None:
    """Why the system does not let a file, or one in a folder, be read; follows no link and opens no pipe."""
    try:
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            return next(filter(None, map(_refusal, path.iterdir())), None)
        if stat.S_ISREG(mode):
            with path.open("rb") as file:
                file.read(1)
    except OSError as error:
        return error if is_out_of_reach(error) else None
    return None


def _one_each(damages: list[Damage]) -> list[Damage]:
    """Join what is wrong with one file into one entry; the first remedy stands."""
    by_path: dict[str, Damage] = {}
    for damage in damages:
        first = by_path.setdefault(damage.path, damage)
        if first is not damage and damage.kind != "stranger":  # a link in a file's place is known already
            reason = f"{first.reason}; {damage.reason}"
            by_path[damage.path] = replace(first, reason=reason, unreadable=first.unreadable or damage.unreadable)
    return list(by_path.values())


def content_damage(cache_dir: Path, plan: Plan, sidecar: ShardSidecar, *, deep: bool) -> Damage | None:
    """Return what is wrong inside a shard whose files are as its sidecar says, or None.

    Args:
        deep: Decode all records; else only ids, dtypes, shapes and offsets.
    """
    name = sidecar_name(sidecar.index, plan.shard_count)
    try:
        reader = open_reader(plan.store, cache_dir, sidecar.index, plan.all_fields)
        try:
            if reader.sample_ids != sidecar.sample_ids:
                return Damage(name, "shard", "holds other samples than its sidecar lists")
            reader.check()
            wrong = _records_damage(reader, plan, sidecar) if deep else None
        finally:
            reader.close()
    except (CacheFormatError, *DAMAGE_ERRORS) as error:
        return _failed(name, "shard", error)
    return None if wrong is None else Damage(name, "shard", wrong)


def _records_damage(reader: ShardReader, plan: Plan, sidecar: ShardSidecar) -> str | None:
    rows, pictures, field_bytes = 0, 0, dict.fromkeys(sidecar.field_bytes, 0)
    told = (
        sidecar.unknown if sidecar.unknown is not None and sidecar.unknown.token is not None else UnknownWords(rows=0)
    )
    unknown = replace(told, rows=0)
    sources = SourceCheck(SharedImages(plan.all_fields))
    for position, sample_id in enumerate(sidecar.sample_ids):
        record = reader.read(position)
        check_record(record, plan.all_fields, f"sample {sample_id!r}")
        rows += len(record["labels"])
        pictures += bool(record["image_hash"].any())
        unknown = unknown.plus(record["labels"])
        for name, array in record.items():
            field_bytes[name] += array.nbytes
        try:
            with np.errstate(all="ignore"):  # whatever hostile numbers make of a check's own arithmetic
                wrong = next(value_damage(record, plan), None) or sources.damage(position, record)
        except CacheFormatError as error:
            wrong = str(error)
        if wrong is not None:
            return f"sample {sample_id!r}: {wrong}"
    if rows != sidecar.rows or field_bytes != sidecar.field_bytes:
        return f"holds {rows} rows and {field_bytes} bytes; its sidecar says otherwise"
    if sidecar.pictures not in (None, pictures):
        return f"holds {pictures} records with a picture; its sidecar says {sidecar.pictures}"
    if unknown != told:
        return f"holds {unknown.rows} rows whose target is token {told.token}; its sidecar says {told.rows}"
    return None
