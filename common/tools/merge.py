"""Several caches into one: of several data sets by one teacher, or parts of one plan built on several machines.

Nothing is averaged and no source wins: two caches that disagree about a sample are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.document_rules import MAX_SHARDS
from vlm_distill_cache.common.cache.documents import describe_differences
from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.cache.plan import DESCRIPTIVE, PLAN, THREADS, Plan, read_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE, SharedImages
from vlm_distill_cache.common.cache.side_files import CARD, MANIFEST, SINKS, refuse_occupied, side_files
from vlm_distill_cache.common.cache.sidecar import (
    FileEntry,
    ShardSidecar,
    check_sidecar,
    missing_shards,
    read_sidecar,
    sidecar_path,
    write_sidecar,
)
from vlm_distill_cache.common.cache.stores import open_reader
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.files.disk import refuse_overlap
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.remotes import open_remote
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import fetch_files
from vlm_distill_cache.common.tools.derive import (
    Slot,
    carry_fidelity,
    derive_cache,
    derive_plan,
    recountable_unknown,
    seal_derived,
    side_files_of,
    write_shards,
)
from vlm_distill_cache.common.tools.derived_card import DERIVED
from vlm_distill_cache.common.tools.lift import breadth, lift_plan, lift_record


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge left.

    Attributes:
        manifest: Of the sealed cache; None if shards are still missing.
        samples: Records in the new cache so far.
        repeated: Records that more than one source held, equal in all of them.
    """

    manifest: Manifest | None
    missing: tuple[int, ...]
    samples: int
    repeated: int


def _merge_parts(sources: Sequence[Path], target: Path, *, on_shard: Callable[[], object] | None = None) -> Merged:
    """Copy the shards of unfinished caches of one plan into one folder, and seal it if all are there."""
    plan = read_plan(sources[0])
    samples = repeated = 0

    def write_shard(index: int) -> None:
        nonlocal samples, repeated
        holders = [source for source in sources if sidecar_path(source, index).is_file()]
        if holders:
            source, sidecar = _choose(holders, index, plan)
            fetch_files(open_remote(source), target, sidecar.files)
            write_sidecar(target, sidecar)
            samples += len(sidecar.sample_ids)
            repeated += len(sidecar.sample_ids) if len(holders) > 1 else 0

    cards = (source / CARD for source in (target, *sources) if (source / CARD).is_file())
    card = next((path.read_bytes() for path in cards), None)
    write_shards(target, plan, write_shard, side_files=_side_files(sources), card=card, on_shard=on_shard)
    missing = tuple(missing_shards(target, plan))
    if missing:
        return Merged(manifest=None, missing=missing, samples=samples, repeated=repeated)
    sealed = [read_manifest(source) for source in sources if (source / MANIFEST).is_file()]
    fidelity = next((manifest.fidelity for manifest in sealed if manifest.fidelity), None)
    manifest = seal_derived(target, fidelity=fidelity)
    return Merged(manifest=manifest, missing=(), samples=samples, repeated=repeated)


def _side_files(sources: Sequence[Path]) -> list[tuple[Remote, dict[str, FileEntry]]]:
    """Find projector, vision tower and processor, which must be equal wherever they are."""
    held: dict[str, tuple[Path, FileEntry]] = {}
    for source in sources:
        for name in side_files(source):
            if name in (PLAN, INDEX, SINKS):
                continue
            entry = FileEntry.of(source / name)
            first, expected = held.setdefault(name, (source, entry))
            if entry != expected:
                raise CacheMismatchError(
                    f"{name}: {source} and {first} hold different files ({entry.xxh3_128}, "
                    f"{expected.xxh3_128}); parts of one plan must come from one teacher and one version of "
                    "its libraries: build one of them again where the other was built"
                )
    return [(open_remote(source), {name: entry}) for name, (source, entry) in held.items()]


def _choose(holders: Sequence[Path], index: int, plan: Plan) -> tuple[Path, ShardSidecar]:
    """Choose whose shard is taken: all the same, or one that could read what the others could not."""
    best, chosen = holders[0], _read(holders[0], index, plan)
    for source in holders[1:]:
        sidecar = _read(source, index, plan)
        if sidecar == chosen:
            continue
        if (where := _differing_record(best, chosen, source, sidecar, plan)) is not None:
            raise CacheMismatchError(
                f"shard {index}: {where} differs between {best} and {source}; parts of one plan hold a shard "
                "once, or equal: leave one of them out"
            )
        ours, theirs = set(chosen.sample_ids), set(sidecar.sample_ids)
        if not (ours <= theirs or theirs <= ours):
            raise CacheMismatchError(
                f"shard {index}: {best} and {source} could not read different samples of it; delete the "
                "shard's sidecar in both and build it where all can be read"
            )
        if ours < theirs:
            best, chosen = source, sidecar
    return best, chosen


def _read(source: Path, index: int, plan: Plan) -> ShardSidecar:
    sidecar = read_sidecar(source, index)
    check_sidecar(sidecar, plan, str(sidecar_path(source, index)))
    return sidecar


def differing_field(first: Record, other: Record) -> str | None:
    """Return the first field, by name, in which two records differ; None if they are equal."""
    for name in sorted(first.keys() | other.keys()):
        if name == VISUAL_SOURCE.name:  # where the arrays lie, not what they are
            continue
        a, b = first.get(name), other.get(name)
        if a is None or b is None or (a.dtype, a.shape) != (b.dtype, b.shape) or a.tobytes() != b.tobytes():
            return name
    return None


def _differing_record(first: Path, one: ShardSidecar, second: Path, other: ShardSidecar, plan: Plan) -> str | None:
    images = SharedImages(plan.all_fields)
    readers = [open_reader(plan.store, path, one.index, plan.all_fields) for path in (first, second)]
    try:
        for sample_id in sorted(set(one.sample_ids) & set(other.sample_ids)):
            records = [
                images.read(reader, reader.sample_ids.index(sample_id), where=f"sample {sample_id!r}")
                for reader in readers
            ]
            if (field := differing_field(*records)) is not None:
                return f"{field} of sample {sample_id!r}"
    finally:
        for reader in readers:
            reader.close()
    return None


def merge(
    sources: Sequence[str | Path],
    target: str | Path,
    *,
    store: str | None = None,
    on_shard: Callable[[], object] | None = None,
) -> Merged:
    """Merge caches with equal fingerprints; killed and called again, it goes on.

    Finished caches, of the same data or not, become one derived cache: samples in the order of the sources,
    each once; a sample that failed in one and is present in another is taken. Where one of them is of format version 2, the
    new cache is, and the records of the others become such records (`common.tools.lift`). Unfinished caches of one plan
    become that plan's cache: their shards are copied, and it is sealed if all are there.

    Args:
        sources: Two or more cache folders.
        target: A new folder, or one that an earlier call with the same sources began.
        store: Store of the new cache; None: the first source's.

    Raises:
        ConfigError: If there are fewer than two sources, or a folder lies inside another.
        CacheMismatchError: If sources differ in a fingerprint, a setting, a file beside the shards, or in what
            they say of one sample; or one is not finished and they are of different plans.
        CacheFormatError: If a source is damaged.
        DataError: If no source holds a record.
    """
    target, folders = Path(target), [Path(source) for source in sources]
    if check_sources(folders, target, store=store):
        return _merge_parts(folders, target, on_shard=on_shard)
    caches = [open_cache(source, open_shards=2) for source in folders]
    slots, repeated = _plan_slots(caches)
    plan = _merged_plan(caches, slots, store)
    fidelity = caches[0].manifest.fidelity
    if any(cache.manifest.fidelity != fidelity for cache in caches):
        fidelity = None  # each source's card stands in the new one
    fidelity = carry_fidelity(fidelity, _lifted(caches)[0], signals=plan.signals)
    manifest = derive_cache(
        target,
        plan,
        slots,
        lambda slot: lift_record(caches[slot.source].read(slot.sample_id), plan.all_fields),
        sources=[(open_remote(cache.path), cache.manifest) for cache in caches],
        fidelity=fidelity,
        unknown=recountable_unknown(
            read_sidecar(cache.path, shard) for cache in caches for shard in range(cache.plan.shard_count)
        ),
        on_shard=on_shard,
    )
    return Merged(manifest=manifest, missing=(), samples=sum(s.failed is None for s in slots), repeated=repeated)


def check_sources(sources: Sequence[Path], target: Path, *, store: str | None) -> bool:
    """Whether caches are parts of one plan, and not finished caches of their own; errors are those of `merge`."""
    if len(sources) < 2:
        raise ConfigError(f"{len(sources)} cache to merge; give two or more")
    for at, folder in enumerate(sources):
        refuse_overlap(folder, target, *sources[:at])
    refuse_occupied(target)
    plans = [read_plan(source) for source in sources]
    one_plan = all(plan.without_descriptions() == plans[0].without_descriptions() for plan in plans)
    if one_plan and not all((source / MANIFEST).is_file() for source in sources):
        if store not in (None, plans[0].store):
            raise ConfigError(
                f"--store {store}: parts of one plan are copied as they are ({plans[0].store}); "
                "merge them first, then run `cachectl convert`"
            )
        return True
    _refuse_unlike_parts(sources, plans)
    first, *others = (open_cache(source, open_shards=2) for source in sources)
    for other in others:
        refuse_different(first, other, lift=True)
    return False


def _refuse_unlike_parts(sources: Sequence[Path], plans: Sequence[Plan]) -> None:
    """Refuse unfinished caches of different plans, which can be neither parts of one nor merged as they are."""
    unsealed = [source for source in sources if not (source / MANIFEST).is_file()]
    if not unsealed:
        return
    before = plans[0].without_descriptions()
    other, now = next(
        (source, described)
        for source, plan in zip(sources, plans, strict=True)
        if (described := plan.without_descriptions()) != before
    )
    lines = describe_differences(before, now, there=str(sources[0]), here=str(other))
    threads = plans[0].extra.get(THREADS)
    option = f" (--set threads={threads})" if threads and threads != now["extra"].get(THREADS) else ""
    raise CacheMismatchError(
        f"not finished, and no parts of one plan: {', '.join(map(str, unsealed))}\n" + "\n".join(lines) + "\n"
        f"Parts of one cache have one plan: build that part again with the same options{option}, {other} with those "
        f"of {sources[0]}. Caches of different plans can be merged once each is finished (`teacher-cache build`)"
    )


def refuse_different(first: TeacherCache, other: TeacherCache, what: str = "merged", *, lift: bool = False) -> None:
    """Refuse to merge caches, or to do something else with both, that do not mean the same.

    Args:
        lift: That one is of an earlier format version, or has no videos, is no difference: its records become the other's.
    """
    one, two = map(_meaning, _lifted((first, other)) if lift else (first.plan, other.plan))
    lines = []
    if unlike := first.plan.signals.keys() ^ other.plan.signals.keys():
        held = (f"{cache.path} holds {', '.join(map(one_line, cache.signals))}" for cache in (first, other))
        lines.append(f"  signals: {'; '.join(held)}")
        for meaning in (one, two):  # what follows from it is not said again
            for name in unlike:
                meaning["signals"].pop(name, None)
                meaning["fields"].pop(name, None)
            meaning["fingerprints"].pop("codec", None)
    lines += describe_differences(one, two, there=str(first.path), here=str(other.path))
    files, others = side_files_of(first.manifest), side_files_of(other.manifest)
    lines += [
        f"  {name}: {first.path} and {other.path} hold different files"
        for name in sorted(files.keys() | others.keys())
        if files.get(name) != others.get(name)
    ]
    if lines:
        raise CacheMismatchError(
            f"{first.path} and {other.path} cannot be {what}, they differ:\n" + "\n".join(lines) + "\n"
            "Take caches of one teacher, template, geometry and codec; build one of them again with the "
            "other's options, or, of a part that was pulled, pull it again with the other's --signals and --top-k"
        )


def _lifted(caches: Sequence[TeacherCache]) -> list[Plan]:
    """The plans of caches, all in the newest format version that one of them has, and with videos if one has these."""
    broadest = max((cache.plan for cache in caches), key=breadth)
    return [lift_plan(cache.plan, broadest) for cache in caches]


def _meaning(plan: Plan) -> dict[str, Any]:
    """All of a plan that must be equal; data, partition, store and names may differ."""
    described = plan.to_dict()
    names = (*DESCRIPTIVE, "evaluation")  # for people; the teacher's fingerprint decides
    fields = {
        name: {field.name: _field_words(field) for field in group if field != VISUAL_SOURCE}
        for name, group in plan.fields.items()
    }
    return {
        "fingerprints": {name: value for name, value in plan.fingerprints.items() if name != "data"},
        "teacher": {name: value for name, value in plan.teacher.items() if name not in names},
        "extra": {name: value for name, value in plan.extra.items() if name not in (DERIVED, THREADS)},
        "fields": fields,
        **{name: described[name] for name in ("signals", "template", "geometry", "format_version")},
    }


def _field_words(field: Field) -> str:
    """An array's dtype and axes for people, who read them where two caches differ."""
    return ", ".join(f"{name} {value}" for name, value in field.to_dict().items() if name != "name")


def _plan_slots(caches: Sequence[TeacherCache]) -> tuple[list[Slot], int]:
    """Give each sample its place and its source, after comparing what several sources hold; also counts these."""
    slots: dict[str, Slot] = {}  # in order of first appearance
    repeated, fields = 0, _lifted(caches)[0].all_fields
    for source, cache in enumerate(caches):
        for shard in range(cache.plan.shard_count):
            for sample_id in cache.shard_sample_ids(shard):
                held = slots.get(sample_id)
                if held is not None and held.failed is None:
                    refuse_conflict(sample_id, caches[held.source], cache, fields)
                    repeated += 1
                else:  # a failed one keeps its place
                    slots[sample_id] = Slot(sample_id=sample_id, source=source)
            for sample_id, reason in read_sidecar(cache.path, shard).failed:
                slots.setdefault(sample_id, Slot(sample_id=sample_id, failed=reason, source=source))
    return list(slots.values()), repeated


def refuse_conflict(sample_id: str, first: TeacherCache, other: TeacherCache, fields: Sequence[Field]) -> None:
    """Refuse two caches that disagree about a sample; ``fields``: of the format version in which they are merged."""
    field = differing_field(*(lift_record(cache.read(sample_id), fields) for cache in (first, other)))
    if field is not None:
        what = "another picture" if field == "image_hash" else f"other bytes in {field}"
        raise CacheMismatchError(
            f"sample {sample_id!r}: {other.path} holds {what} than {first.path}; one of the two was built from "
            "other data or on other hardware: give the samples ids of their own, or leave one cache out"
        )


def _merged_plan(caches: Sequence[TeacherCache], slots: Sequence[Slot], store: str | None) -> Plan:
    first = _lifted(caches)[0]
    how = {"kind": "merge", "sources": [cache.manifest_hash for cache in caches]}
    plan = derive_plan(first, sample_count=len(slots), how=how, store=store)
    changes: dict[str, Any] = {"shard_size": max(first.shard_size, -(-len(slots) // MAX_SHARDS))}
    changes["teacher"] = {**first.teacher, **_named_together([cache.plan.teacher for cache in caches])}
    if len({cache.plan.fingerprints.get("data") for cache in caches}) == 1:
        changes["data"] = {**first.data, **_named_together([cache.plan.data for cache in caches])}
        return replace(plan, **changes)
    parts = [part for cache in caches for part in _data_parts(cache)]
    changes["data"] = {
        **_named_together(parts),
        "split": _shared([part.get("split") for part in parts], otherwise=""),
        "limit": _shared([part.get("limit") for part in parts], otherwise=0),
        "parts": parts,
    }
    stated = sorted({str(part["fingerprint"]) for part in parts})
    changes["fingerprints"] = plan.fingerprints | {"data": fingerprint(stated)}
    return replace(plan, **changes)


def _named_together(described: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Names, licences and sources of several: each one that is stated, once."""
    values = {name: dict.fromkeys(str(d[name]) for d in described if d.get(name)) for name in DESCRIPTIVE}
    return {name: " + ".join(found) for name, found in values.items() if found}


def _shared(values: Sequence[Any], *, otherwise: Any) -> Any:
    return values[0] if all(value == values[0] for value in values) else otherwise


def _data_parts(cache: TeacherCache) -> list[dict[str, Any]]:
    """The data sets of a cache; a merged one has several."""
    data = cache.plan.data
    if data.get("parts"):
        return list(data["parts"])
    return [{**data, "fingerprint": cache.plan.fingerprints.get("data"), "samples": len(cache)}]
