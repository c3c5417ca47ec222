"""New caches from the records of others: shard by shard, resumable, the same bytes every time.

A derived cache is a cache like any other: its own plan, sidecars and manifest. What tells it apart stands in
``plan.extra["derived"]``: from which manifests it was made and by which selection, so that a part is never
taken for the whole. The fingerprints of teacher, tokenizer, template and data stay those of its sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.manifest import CARD, PLAN, Manifest, seal, sidecar_path, write_plan
from vlm_distill_cache.common.cache.shared_images import ImageSharer, SharedImages, with_visual_source
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.remotes.streams import name_full_disk
from vlm_distill_cache.common.tools.derived_card import DERIVED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from vlm_distill_cache.common.cache.plan import Plan
    from vlm_distill_cache.common.cache.schema import Record
    from vlm_distill_cache.common.cache.sidecar import FileEntry

# Figures of the fidelity card that do not name their signal.
_LOGIT_FIGURES = ("kept_mass", "entries_per_row", "rows_at_cap")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one sample in a derived cache.

    Attributes:
        sample_id: Of the sample.
        failed: Why its source could not read it; None for a record.
        source: Which of the sources holds its record.
    """

    sample_id: str
    failed: str | None = None
    source: int = 0


def derive_plan(
    source: Plan,
    *,
    sample_count: int,
    how: Mapping[str, Any],
    store: str | None = None,
    signals: Mapping[str, dict[str, Any]] | None = None,
) -> Plan:
    """Plan a cache of some records of another.

    Args:
        source: The plan of the cache the records come from.
        sample_count: Samples of the new cache, failed ones included.
        how: From what and by which selection; becomes ``extra["derived"]``.
        store: Store of the new cache; None: the source's.
        signals: Codec settings of the signals to keep; None: all as they are.

    Returns:
        The plan. Every fingerprint is the source's, but for the codec's if signals or settings changed.
    """
    kept = dict(source.signals) if signals is None else dict(signals)
    prints = dict(source.fingerprints)
    if "codec" in prints and kept != source.signals:
        prints["codec"] = fingerprint(kept)
    return replace(
        source,
        store=store or source.store,
        sample_count=sample_count,
        signals=kept,
        fields=with_visual_source({name: source.fields[name] for name in kept}),
        fingerprints=prints,
        extra={**source.extra, DERIVED: dict(how)},
    )


def derive_cache(
    target: Path,
    plan: Plan,
    slots: Sequence[Slot],
    read: Callable[[Slot], Record],
    *,
    add_side_files: Callable[[Path], object],
    card: bytes,
    fidelity: dict[str, Any] | None = None,
    on_shard: Callable[[], object] | None = None,
) -> Manifest:
    """Write a cache from records that are there already; killed and called again, it goes on.

    Args:
        target: A new folder, or one that an earlier call with the same plan began.
        plan: Of the new cache.
        slots: Its samples in order; ``plan.sample_count`` of them.
        read: Gives a slot's record with its image's arrays in it; called in order, shard by shard.
        add_side_files: Puts projector, vision tower and processor into the new cache, checked.
        card: The new cache's README.md.
        fidelity: Figures that still hold; see `carry_fidelity`.
        on_shard: Called after each shard, for progress.

    Returns:
        The manifest of the new cache.

    Raises:
        ValueError: If there are not as many slots as the plan has samples.
        CacheMismatchError: If the folder holds another cache.
    """
    if len(slots) != plan.sample_count:
        raise ValueError(f"{len(slots)} slots for a plan of {plan.sample_count} samples; expected as many")
    try:
        write_plan(target, plan)
    except CacheMismatchError as error:
        differences = str(error).rpartition("\n")[0]  # without the remedy, which is for `teacher-cache build`
        raise CacheMismatchError(f"{differences}\nName a new folder, or delete {target}.") from error
    add_side_files(target)
    with name_full_disk(target):
        for index in range(plan.shard_count):
            if not sidecar_path(target, index).exists():
                _write_shard(target, plan, index, slots, read)
            if on_shard is not None:
                on_shard()
        write_bytes_atomic(target / CARD, card)
        return seal(target, fidelity=fidelity, rewritten=True)


def _write_shard(target: Path, plan: Plan, index: int, slots: Sequence[Slot], read: Callable[[Slot], Record]) -> None:
    positions = plan.shard_range(index)
    chosen = slots[positions.start : positions.stop]
    fields = plan.all_fields
    images = SharedImages(fields)
    sharer = ImageSharer(images)
    writer = open_writer(plan.store, target, index, fields)
    try:
        for slot in chosen:
            if slot.failed is None:
                record = read(slot)
                # Which records share a shard has changed, so who holds an image's arrays is decided anew.
                record = sharer.share(record, images.content_key(record) if images.names else None)
                writer.append(slot.sample_id, {field.name: record[field.name] for field in fields})
        finish_shard(writer, [(slot.sample_id, slot.failed) for slot in chosen if slot.failed is not None])
    finally:
        writer.abort()


def side_files_of(manifest: Manifest) -> dict[str, FileEntry]:
    """The files beside the shards that a derived cache takes over as they are."""
    return {name: entry for name, entry in manifest.files.items() if name not in (PLAN, INDEX)}


def carry_fidelity(
    fidelity: dict[str, Any] | None, plan: Plan, *, signals: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Keep the figures of a source's fidelity card that are still true of its derived cache.

    Args:
        fidelity: The source's card.
        plan: The source's plan, whose codec settings the figures were measured with.
        signals: Codec settings of the new cache.

    Returns:
        The figures of signals that are there with the same settings; None if nothing is left of them.
    """
    if fidelity is None:
        return None
    gone = [name for name, settings in plan.signals.items() if signals.get(name) != settings]
    kept = {
        name: value
        for name, value in fidelity.items()
        if not any(signal in name for signal in gone) and not ("logits" in gone and name in _LOGIT_FIGURES)
    }
    return kept if kept.keys() - {"samples"} else None
