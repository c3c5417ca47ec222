"""New caches from the records of others: shard by shard, resumable, the same bytes every time.

A derived cache is a cache like any other: its own plan, sidecars and manifest. What tells it apart stands in
``plan.extra["derived"]``: from which manifests it was made and by which selection, so that a part is never
taken for the whole. The fingerprints of teacher, tokenizer, template and data stay those of its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.counts import SampleCounts, nothing_usable
from vlm_distill_cache.common.cache.index import INDEX
from vlm_distill_cache.common.cache.manifest import Manifest, seal
from vlm_distill_cache.common.cache.plan import PLAN, Plan, write_plan
from vlm_distill_cache.common.cache.schema import Field, Record
from vlm_distill_cache.common.cache.shared_images import ImageSharer, SharedImages, with_visual_source
from vlm_distill_cache.common.cache.side_files import CARD, MAX_CARD_BYTES, SINKS, refuse_occupied
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, UnknownWords, read_sidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.config import save_replay
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.files.disk import name_full_disk
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.remotes.base import Remote
from vlm_distill_cache.common.remotes.fetch import fetch_files
from vlm_distill_cache.common.tools.derived_card import DERIVED, write_derived_card
from vlm_distill_cache.common.tools.sinks import card_lines, write_sinks

# Figures of the fidelity card that do not name their signal.
_LOGIT_FIGURES = ("kept_mass", "entries_per_row", "rows_at_cap")


@dataclass(frozen=True, kw_only=True)
class Slot:
    """The place of one sample in a derived cache.

    Attributes:
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


def write_shards(
    target: Path,
    plan: Plan,
    write_shard: Callable[[int], object],
    *,
    side_files: Iterable[tuple[Remote, Mapping[str, FileEntry]]],
    card: bytes | None,
    on_shard: Callable[[], object] | None,
) -> None:
    """Write a cache out of others, up to its seal; killed and called again, it goes on.

    Args:
        target: A new folder, or one that an earlier call with the same plan began.
        write_shard: Makes a shard and its sidecar, or leaves those that are there; called with each number in turn.
        side_files: Projector, vision tower and processor, by where they come from; checked on the way.
        card: The new cache's README.md; None: it has none.
    """
    refuse_occupied(target)
    with name_full_disk(target):
        if not (target / PLAN).exists():
            save_replay(None, target)  # of a cache that was here before
        with another_folder(target):
            write_plan(target, plan)
        for remote, files in side_files:
            fetch_files(remote, target, files)
        for index in range(plan.shard_count):
            write_shard(index)
            if on_shard is not None:
                on_shard()
        if card is not None:
            write_bytes_atomic(target / CARD, card)


@contextmanager
def another_folder(target: Path) -> Iterator[None]:
    """The remedy of a plan that is not the one there is for a build; here it is another folder.

    Raises:
        CacheMismatchError: Naming the differences.
    """
    try:
        yield
    except CacheMismatchError as error:
        differences = str(error).rpartition("\n")[0]
        raise CacheMismatchError(f"{differences}\nName a new folder, or delete {target}.") from error


def seal_derived(target: Path, *, fidelity: dict[str, Any] | None, copied: bool = False) -> Manifest:
    """Seal what `write_shards` wrote; ``copied``: all records of one cache, whose sinks are known if it has them."""
    with name_full_disk(target):
        if not copied:
            write_sinks(target)
        return seal(target, fidelity=fidelity, rewritten=True)


def write_records(
    target: Path,
    plan: Plan,
    index: int,
    records: Iterable[tuple[str, Record]],
    failed: Iterable[tuple[str, str]],
    *,
    unknown: UnknownWords | None = None,
    divided: int = 0,
    tells_pictures: bool = True,
) -> None:
    """Write a shard of these records, by sample id, and of the samples that failed; one that is there stays.

    Args:
        unknown: How rows that teach an unknown word are counted, and with how many it begins; None: not.
        divided: Batches of the records that ran in parts, where they are all of a shard.
        tells_pictures: Whether records with a picture are counted.
    """
    if sidecar_path(target, index).exists():
        return
    writer = open_writer(plan.store, target, index, plan.all_fields)
    try:
        writer.unknown, writer.divided = unknown, divided
        writer.pictures = 0 if tells_pictures else None
        for sample_id, record in records:
            writer.append(sample_id, record)
        finish_shard(writer, failed)
    finally:
        writer.abort()


def recountable_unknown(sidecars: Iterable[ShardSidecar]) -> UnknownWords | None:
    """How the rows of records from several shards are counted that teach an unknown word; None: they cannot be."""
    found = [sidecar.unknown for sidecar in sidecars]
    counted = {unknown.token for unknown in found if unknown is not None}
    if None in found or len(counted) != 1:
        return None
    (token,) = counted
    hidden = token is None and any(unknown.rows for unknown in found if unknown is not None)
    return None if hidden else UnknownWords(rows=0, token=token)


def derive_cache(
    target: Path,
    plan: Plan,
    slots: Sequence[Slot],
    read: Callable[[Slot], Record],
    *,
    sources: Sequence[tuple[Remote, Manifest]],
    fidelity: dict[str, Any] | None = None,
    unknown: UnknownWords | None = None,
    on_shard: Callable[[], object] | None = None,
) -> Manifest:
    """Write a cache of chosen records of others; target, plan and on_shard as of `write_shards`.

    Args:
        slots: Its samples in order; ``plan.sample_count`` of them.
        read: Gives a slot's record with its image's arrays in it; called in order, shard by shard.
        sources: Where they come from; their cards are quoted, and the first's files beside the shards taken over.
        fidelity: Figures that still hold; see `carry_fidelity`.
        unknown: How rows that teach an unknown word are counted; see `recountable_unknown`.

    Raises:
        DataError: If all chosen samples failed.
    """
    if len(slots) != plan.sample_count:
        raise ValueError(f"{len(slots)} slots for a plan of {plan.sample_count} samples; expected as many")
    if all(slot.failed is not None for slot in slots):
        raise nothing_usable(
            ((slot.sample_id, slot.failed or "") for slot in slots),
            where=target,
            remedy="Choose other samples, or build a cache from data that can be read (`teacher-cache build`)",
        )

    def write_shard(index: int) -> None:
        positions = plan.shard_range(index)
        chosen = slots[positions.start : positions.stop]
        failed = [(slot.sample_id, slot.failed) for slot in chosen if slot.failed is not None]
        write_records(target, plan, index, _shared_anew(chosen, read, plan.all_fields), failed, unknown=unknown)

    files = [(remote, side_files_of(manifest)) for remote, manifest in sources[:1]]
    write_shards(target, plan, write_shard, side_files=files, card=None, on_shard=on_shard)
    counts = SampleCounts()
    for index in range(plan.shard_count):
        counts.add(read_sidecar(target, index))
    quoted = [(manifest.hash, _read_card(remote)) for remote, manifest in sources]
    with name_full_disk(target):
        found = write_sinks(target)
        write_bytes_atomic(
            target / CARD, write_derived_card(plan, fidelity, quoted, counts, sinks=card_lines(found, plan))
        )
        return seal(target, fidelity=fidelity, rewritten=True)


def _read_card(remote: Remote) -> str:
    try:
        return remote.read(CARD, max_bytes=MAX_CARD_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _shared_anew(
    slots: Iterable[Slot], read: Callable[[Slot], Record], fields: tuple[Field, ...]
) -> Iterator[tuple[str, Record]]:
    """Read a shard's records. Others share it now than before, so who holds an image's arrays is decided anew."""
    images = SharedImages(fields)
    sharer = ImageSharer(images)
    for slot in slots:
        if slot.failed is None:
            record = read(slot)
            record = sharer.share(record, images.content_key(record) if images.names else None)
            yield slot.sample_id, {field.name: record[field.name] for field in fields}


def side_files_of(manifest: Manifest, *, copied: bool = False) -> dict[str, FileEntry]:
    """The files beside the shards that a derived cache takes over as they are; with its sinks if all records are ``copied``."""
    others = (PLAN, INDEX) if copied else (PLAN, INDEX, SINKS)
    return {name: entry for name, entry in manifest.files.items() if name not in others}


def carry_fidelity(
    fidelity: dict[str, Any] | None, plan: Plan, *, signals: Mapping[str, dict[str, Any]]
) -> dict[str, Any] | None:
    """Keep the figures of a source's fidelity card that are still true of its derived cache.

    Returns:
        The figures of signals that are there with the same settings; None if nothing is left of them.
    """
    if fidelity is None:
        return None
    gone = [name for name, settings in plan.signals.items() if signals.get(name) != settings]
    kept = {
        name: value
        for name, value in fidelity.items()
        if not any(signal in name for signal in gone) and not (LogitCodec.signal in gone and name in _LOGIT_FIGURES)
    }
    return kept if kept.keys() - {"samples"} else None
