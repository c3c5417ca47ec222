"""``manifest.json``: what a finished cache holds, derived from its sidecars alone.

It is never written while a shard is missing.
"""

from __future__ import annotations

import builtins
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import IO, Any

from vlm_distill_cache.common.cache.counts import nothing_usable
from vlm_distill_cache.common.cache.document_rules import MANIFEST as MANIFEST_RULE
from vlm_distill_cache.common.cache.documents import (
    read_document,
    write_document,
)
from vlm_distill_cache.common.cache.index import INDEX, build_index
from vlm_distill_cache.common.cache.layout import shard_folders
from vlm_distill_cache.common.cache.plan import PLAN, SHARDS, Plan, read_plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE
from vlm_distill_cache.common.cache.side_files import CARD, MANIFEST, SINKS, check_digests, side_files
from vlm_distill_cache.common.cache.sidecar import (
    FileEntry,
    ShardSidecar,
    missing_shards,
    read_files,
    read_sidecar,
    read_sidecar_file,
)
from vlm_distill_cache.common.errors import CacheFormatError, NewerFormatError
from vlm_distill_cache.common.files.atomic import clean_stale, write_stream_atomic
from vlm_distill_cache.common.files.hashing import fingerprint_parsed
from vlm_distill_cache.common.files.rules import AGAIN, check
from vlm_distill_cache.common.files.signed import document_bytes


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """One line of the manifest: a shard's counts, and the digests of its sidecar.

    Attributes:
        pictures: Records with a picture; None where the sidecar does not say.
        unknown_rows: Rows whose target is an unknown word; None where the sidecar does not say.
    """

    index: int
    samples: int
    rows: int
    failed: int
    bytes: int
    sidecar: FileEntry
    pictures: int | None = None
    unknown_rows: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON stored in the manifest."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"sidecar": self.sidecar.to_dict()}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ShardSummary:
        """Read what ``to_dict`` wrote, as it stands in a manifest that fits its schema."""
        return cls(**(data | {"sidecar": FileEntry.from_dict(data["sidecar"])}))

    @classmethod
    def of(cls, sidecar: ShardSidecar, data: builtins.bytes | None = None) -> ShardSummary:
        """Summarise a sidecar; ``data`` is its file, if that was read."""
        return cls(
            index=sidecar.index,
            samples=len(sidecar.sample_ids),
            rows=sidecar.rows,
            failed=len(sidecar.failed),
            bytes=sidecar.stored_bytes,
            sidecar=FileEntry.of_bytes(document_bytes(sidecar.to_dict()) if data is None else data),
            pictures=sidecar.pictures,
            unknown_rows=None if sidecar.unknown is None else sidecar.unknown.rows,
        )


_OPTIONAL_COUNTS = ("pictures", "unknown_rows")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished cache holds. ``manifest.json``; derived, never edited.

    Attributes:
        field_bytes: Decoded bytes of all records by field.
        files: Every file outside ``shards/``, except the card and this one.
        fidelity: What the codecs lost against the live teacher, as stage one measured it; or None.
    """

    plan_hash: str
    shards: tuple[ShardSummary, ...]
    field_bytes: dict[str, int]
    files: dict[str, FileEntry]
    fidelity: dict[str, Any] | None = None
    format_version: int = ONE_PICTURE

    @property
    def totals(self) -> dict[str, int]:
        """Samples, rows, failed samples and stored bytes of all shards; pictures and unknown rows if all say theirs."""
        counts = {name: sum(map(attrgetter(name), self.shards)) for name in ("samples", "rows", "failed", "bytes")}
        optional = {name: [getattr(shard, name) for shard in self.shards] for name in _OPTIONAL_COUNTS}
        return counts | {name: sum(values) for name, values in optional.items() if None not in values}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of manifest.json."""
        return {
            "format_version": self.format_version,
            "plan_hash": self.plan_hash,
            "totals": self.totals,
            "field_bytes": self.field_bytes,
            "shards": [shard.to_dict() for shard in self.shards],
            "files": {name: entry.to_dict() for name, entry in self.files.items()},
            "fidelity": self.fidelity,
        }

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Manifest:
        """Read what ``to_dict`` wrote."""
        values = check(data, MANIFEST_RULE, where)
        manifest = cls(
            plan_hash=values["plan_hash"],
            shards=tuple(ShardSummary.from_dict(shard) for shard in values["shards"]),
            field_bytes=values["field_bytes"],
            files=read_files(values["files"], where),
            fidelity=values.get("fidelity"),
            format_version=values["format_version"],
        )
        for name in manifest.files:
            if name in (MANIFEST, CARD) or name.startswith(f"{SHARDS}/") or name == SHARDS:
                raise CacheFormatError(f"{where}: lists {name}, which is no file beside the shards; refused")
        if [shard.index for shard in manifest.shards] != list(range(len(manifest.shards))):
            raise CacheFormatError(f"{where}: shards are not numbered from 0; damaged")
        if values["totals"] != manifest.totals:
            raise CacheFormatError(f"{where}: totals are not the sums over the shards; damaged")
        return manifest

    @property
    def hash(self) -> str:
        """Fingerprint of the cache's content; what a student run records.

        Measuring the fidelity again keeps it, and so does looking for sinks, which the records say already.
        """
        body = {name: value for name, value in self.to_dict().items() if name != "fidelity"}
        files = {name: entry for name, entry in body["files"].items() if name != SINKS}
        return fingerprint_parsed(body | {"files": files})


def read_manifest(cache_dir: Path) -> Manifest:
    """Read manifest.json.

    Raises:
        CacheFormatError: If the cache is not sealed, or the manifest damaged or from a newer format.
    """
    path = cache_dir / MANIFEST
    try:
        return Manifest.from_dict(read_document(path), str(path))
    except NewerFormatError:
        raise
    except CacheFormatError as error:
        if AGAIN in str(error) or isinstance(error.__cause__, OSError):  # which is no matter of the file
            raise
        raise CacheFormatError(f"{error}; {AGAIN}") from error.__cause__
    except FileNotFoundError:
        read_plan(cache_dir)  # which says so if it is no cache
        raise CacheFormatError(
            f"{cache_dir}: the cache is not sealed (no {MANIFEST}); finish it with `teacher-cache build`, "
            "or with `teacher-cache seal` if all shards are there"
        ) from None


def refuse_other_plan(manifest: Manifest, plan: Plan, where: str) -> None:
    """Refuse a manifest that was made for another plan than the one beside it."""
    if manifest.plan_hash == plan.hash and len(manifest.shards) != plan.shard_count:
        raise CacheFormatError(
            f"{where}: {MANIFEST} lists {len(manifest.shards)} shards; expected {plan.shard_count}, for {plan.sample_count} "
            f"samples in shards of {plan.shard_size} ({PLAN}); {AGAIN}"
        )
    if manifest.plan_hash != plan.hash:
        raise CacheFormatError(
            f"{where}: {MANIFEST} belongs to another {PLAN} (plan {plan.hash}, manifest made for "
            f"{manifest.plan_hash}); run `cachectl verify` on it, then `teacher-cache seal`, or copy the cache again"
        )


def refuse_nothing_usable(cache_dir: Path, plan: Plan) -> None:
    """Refuse a cache whose shards are all there and hold no record.

    Raises:
        DataError: With the reasons of the failures.
    """
    sidecars = (read_sidecar(cache_dir, shard) for shard in range(plan.shard_count))
    if not any(sidecar.sample_ids for sidecar in sidecars):
        failed = (failure for shard in range(plan.shard_count) for failure in read_sidecar(cache_dir, shard).failed)
        raise nothing_usable(
            failed,
            where=cache_dir,
            remedy="Fix the data or the options, then build the cache anew: teacher-cache build --overwrite with the "
            "same options, or delete that folder first. Nothing was removed",
        )


def derive_manifest(cache_dir: Path, *, fidelity: dict[str, Any] | None = None) -> tuple[Manifest, IO[bytes]]:
    """Derive manifest and index, a file to be closed, from the plan, the sidecars and the files beside them."""
    plan = read_plan(cache_dir)
    if missing := missing_shards(cache_dir, plan):
        raise CacheFormatError(
            f"{cache_dir}: {len(missing)} of {plan.shard_count} shards are missing: {format_ranges(missing)}; "
            "run `teacher-cache build` again with the same options to make exactly these"
        )
    refuse_nothing_usable(cache_dir, plan)
    shards, field_bytes = [], Counter({f.name: 0 for f in plan.all_fields})

    def sidecars() -> Iterator[ShardSidecar]:
        for shard in range(plan.shard_count):
            sidecar, data = read_sidecar_file(cache_dir, shard)
            yield sidecar  # is checked
            field_bytes.update(sidecar.field_bytes)
            shards.append(ShardSummary.of(sidecar, data))

    index = build_index(cache_dir, plan, sidecars(), scratch=cache_dir)
    files = {name: FileEntry.of(cache_dir / name) for name in side_files(cache_dir) if name != INDEX}
    files[INDEX] = FileEntry.of_stream(index)
    manifest = Manifest(
        plan_hash=plan.hash,
        shards=tuple(shards),
        field_bytes=dict(field_bytes),
        files=files,
        fidelity=fidelity,
        format_version=plan.format_version,
    )
    return manifest, index


def seal(cache_dir: Path, *, fidelity: dict[str, Any] | None = None, rewritten: bool = False) -> Manifest:
    """Write the index and manifest.json once all shards are there, and remove what killed runs left behind.

    Args:
        fidelity: The fidelity card. None keeps the one of the present manifest if nothing else changed.
        rewritten: The files beside the shards were just written anew; else they must be those sealed before.

    Raises:
        CacheFormatError: If shards are missing (naming them), a sidecar does not fit the plan, sample ids
            repeat, or a file beside the shards changed since the cache was sealed.
        DataError: If no shard holds a record.
    """
    if not rewritten and (cache_dir / MANIFEST).exists():
        sealed = read_manifest(cache_dir).files
        # The index is written anew from the sidecars, and the sinks from the records, whatever became of them.
        check_digests(cache_dir, {name: entry for name, entry in sealed.items() if name not in (INDEX, SINKS)})
    for folder in (cache_dir, *shard_folders(cache_dir, read_plan(cache_dir).shard_count)):
        clean_stale(folder)
    manifest, index = derive_manifest(cache_dir, fidelity=fidelity)
    with index:
        if fidelity is None and (cache_dir / MANIFEST).exists():
            old = read_manifest(cache_dir)
            if (old.plan_hash, old.shards) == (manifest.plan_hash, manifest.shards):
                manifest = replace(manifest, fidelity=old.fidelity)
        write_stream_atomic(cache_dir / INDEX, index)
    write_document(cache_dir / MANIFEST, manifest.to_dict())
    return manifest


def format_ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ``0, 3-5, 9``, at most ten of them."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(parts[:10]) + (", ..." if len(parts) > 10 else "")
