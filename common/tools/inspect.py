"""What ``cachectl inspect CACHE`` says: a cache on one screen.

All that a cache says of itself may have been written by anybody: names and reasons are spelt out before they
are printed (``common.printing``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.counts import SampleCounts, divided_words, picture_words, unknown_words
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.cache.plan import BASE, Plan, built_with, read_plan
from vlm_distill_cache.common.cache.schema import Field, base_fields
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import ShardSidecar, missing_shards, read_sidecar
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import brief, one_line, size_words
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.common.terminal.next_step import distill_command
from vlm_distill_cache.common.tools.derived_card import derivation_words
from vlm_distill_cache.common.tools.fidelity_words import poor_fidelity

_MAX_FILES = 6  # shown
_MAX_FAILURES = 1000  # listed for programs
_MAX_ID = 80  # characters of a sample id in a command
_SHOWN_IDS = 5  # of samples that failed
_WIDTH = 110


@dataclass(kw_only=True)
class _Totals(SampleCounts):
    """Sums over the sidecars; ``first_id`` is the first sample's that can be shown whole, ``failed_ids`` the first few's."""

    stored: int = 0
    first_id: str = ""
    failed_ids: list[str] = field(default_factory=list)
    decoded_by_field: Counter[str] = field(default_factory=Counter)
    stored_by_field: Counter[str] = field(default_factory=Counter)

    def add(self, sidecar: ShardSidecar) -> None:
        super().add(sidecar)
        self.stored += sidecar.stored_bytes
        room = max(0, _SHOWN_IDS - len(self.failed_ids))
        self.failed_ids += [one_line(name, limit=_MAX_ID) for name, _ in sidecar.failed[:room]]
        if not self.first_id:
            self.first_id = next((name for name in sidecar.sample_ids if one_line(name, limit=_MAX_ID) == name), "")
        self.decoded_by_field.update(sidecar.field_bytes)
        for path, entry in sidecar.files.items():
            name = path.split("/")[2].removesuffix("_offsets") if path.count("/") > 2 else ""
            self.stored_by_field[name] += entry.size


def describe_cache(cache_dir: Path, *, location: str | None = None) -> str:
    """Describe a cache, sealed or not, on one screen.

    Args:
        cache_dir: Where its descriptions are.
        location: The folder or address that whoever asks knows it by; None: ``cache_dir``.
    """
    place = str(cache_dir) if location is None else location
    plan = read_plan(cache_dir)
    sealed = (cache_dir / MANIFEST).exists()
    manifest = read_manifest(cache_dir) if sealed else None
    totals, missing = _count(cache_dir, plan)
    prints = [f"{one_line(name)} {value[:12]}" for name, value in sorted(plan.fingerprints.items())]
    if manifest is not None:
        prints.insert(0, f"this cache {manifest.hash[:12]}")
    state = "sealed" if sealed else f"not sealed, {len(missing)} of {plan.shard_count} shards missing"
    lines = [
        f"teacher cache   {place}: {plan.store}, format version {plan.format_version}, {state}",
        f"teacher         {_words(plan.teacher, ('name', 'revision', 'family', 'dtype', 'layers', 'vocabulary'))}",
        f"data            {_words(plan.data, ('name', 'revision', 'spec', 'split', 'limit'))}",
        *(_wrapped("derived", derived) if (derived := derivation_words(plan)) else []),
        *_wrapped("licence", _licence_words(plan)),
        f"samples         {totals.samples:,} of {plan.sample_count:,} in {totals.shards} shards of "
        f"{plan.shard_size:,}; {totals.failures.total:,} failed"
        + (", of the missing shards nobody knows yet" if missing else ""),
        f"rows            {totals.rows:,} supervised, {totals.rows / max(1, totals.samples):.1f} a sample",
        f"pictures        {picture_words(totals.pictures, totals.samples, totals.shown)}",
        *([f"unknown words   {words}"] if (words := unknown_words(totals.unknown, totals.rows)) else []),
        *([f"memory          {words}"] if (words := divided_words(totals.divided)) else []),
        "",
        *_size_lines(plan, totals),
        "",
        *_codec_lines(plan.signals),
        *_wrapped("beside them", _side_words(manifest)),
        *_wrapped("fingerprints", prints or ["none"]),
    ]
    lines += [f"failed          {line}" for line in totals.failures.lines()]
    if totals.failures.total:
        more = ", ..." if totals.failures.total > len(totals.failed_ids) else ""
        lines.append(
            f"{'':<16}ids: {', '.join(totals.failed_ids)}{more}; all: cachectl inspect {quoted(place)} --failed"
        )
    lines += _wrapped("fidelity", _fidelity_words(manifest))
    lines += [
        f"{'':<16}{sentence}" for sentence in poor_fidelity(plan, None if manifest is None else manifest.fidelity)
    ]
    lines += ["", *_next_lines(cache_dir, place, plan, totals, sealed=sealed, missing=bool(missing))]
    return "\n".join(lines)


def failed_lines(cache_dir: Path) -> Iterator[str]:
    """A line for each sample that could not be used: its id and the reason."""
    plan = read_plan(cache_dir)
    missing = set(missing_shards(cache_dir, plan))
    for index in range(plan.shard_count):
        for name, reason in () if index in missing else read_sidecar(cache_dir, index).failed:
            yield f"{one_line(name)}: {brief(reason)}"


def cache_values(cache_dir: Path, *, all_failed: bool = False) -> dict[str, Any]:
    """What `describe_cache` says, for programs; failed samples by id and reason: the first `_MAX_FAILURES`, or all."""
    plan = read_plan(cache_dir)
    manifest = read_manifest(cache_dir) if (cache_dir / MANIFEST).exists() else None
    totals, missing = _count(cache_dir, plan)
    there = (index for index in range(plan.shard_count) if index not in missing)
    failed = (entry for index in there for entry in read_sidecar(cache_dir, index).failed)
    groups: dict[str, tuple[Field, ...]] = {BASE: base_fields(plan.format_version), **plan.fields}
    return {
        "store": plan.store,
        "format_version": plan.format_version,
        "sealed": manifest is not None,
        "manifest": None if manifest is None else manifest.hash,
        "shards": plan.shard_count,
        "missing": sorted(missing),
        "teacher": plan.teacher,
        "data": plan.data,
        "fingerprints": plan.fingerprints,
        "signals": plan.signals,
        "planned_samples": plan.sample_count,
        "samples": totals.samples,
        "rows": totals.rows,
        "pictures": totals.pictures,
        "pictures_and_frames": totals.shown or None,
        "unknown_words": totals.unknown,
        "failed": totals.failures.total,
        "failures": [
            {"sample_id": name, "reason": reason}
            for name, reason in islice(failed, None if all_failed else _MAX_FAILURES)
        ],
        "stored_bytes": totals.stored,
        "decoded_bytes": {
            name: sum(totals.decoded_by_field[field.name] for field in fields) for name, fields in groups.items()
        },
        "fidelity": None if manifest is None else manifest.fidelity,
    }


def _count(cache_dir: Path, plan: Plan) -> tuple[_Totals, set[int]]:
    """The sums over the shards that are there, and the numbers of the others."""
    missing, totals = set(missing_shards(cache_dir, plan)), _Totals()
    for index in range(plan.shard_count):
        if index not in missing:
            totals.add(read_sidecar(cache_dir, index))
    return totals, missing


def _size_lines(plan: Plan, totals: _Totals) -> list[str]:
    """Bytes by signal: as decoded, and for zarr, where each field has files of its own, as stored."""
    groups: dict[str, tuple[Field, ...]] = {BASE: base_fields(plan.format_version), **dict(sorted(plan.fields.items()))}
    lines = [f"{'signal':<18}{'B/row':>10}{'B/sample':>12}{'stored B/row':>16}{'stored B/sample':>18}"]
    for signal, fields in groups.items():
        size = sum(totals.decoded_by_field[f.name] for f in fields)
        kept = sum(totals.stored_by_field[f.name] for f in fields) if plan.store == "zarr" else None
        lines.append(_size_line(one_line(signal, limit=17), size, kept, totals))
    lines.append(_size_line("total", sum(totals.decoded_by_field.values()), totals.stored, totals))
    lines.append(f"{'':<18}{size_words(totals.stored)} stored, ids and descriptions of the shards included")
    return lines


def _size_line(name: str, decoded: int, stored: int | None, totals: _Totals) -> str:
    samples, rows = max(1, totals.samples), max(1, totals.rows)
    kept = ["-", "-"] if stored is None else [f"{stored / n:,.1f}" for n in (rows, samples)]
    return f"{name:<18}{decoded / rows:>10,.1f}{decoded / samples:>12,.1f}{kept[0]:>16}{kept[1]:>18}"


def _codec_lines(signals: dict[str, dict[str, Any]]) -> list[str]:
    """What is kept of each signal, in its codec's own words."""
    lines: list[str] = []
    for signal, settings in sorted(signals.items()):
        words = [f"{one_line(name)} {_short(value)}" for name, value in settings.items() if name != "codec"]
        words[:1] = [f"{one_line(signal)}: {words[0] if words else 'no settings'}"]
        lines += _wrapped("" if lines else "codecs", words)
    return lines or ["codecs          none"]


def _short(value: Any) -> str:
    if isinstance(value, list):
        between = "x" if all(isinstance(item, int) for item in value) else " and "
        return between.join(map(_short, value)) if len(value) <= 8 else f"{len(value)} values"
    return one_line(f"{value:g}" if isinstance(value, float) else value, limit=60)


def _licence_words(plan: Plan) -> list[str]:
    """Licences and origin, as whoever built the cache named them."""
    said = {
        "of the cache": plan.data.get("cache_license"),
        "of the teacher": plan.teacher.get("license"),
        "of the data": plan.data.get("license"),
        "from": plan.data.get("source"),
    }
    words = [f"{name}: {one_line(value)}" for name, value in said.items() if value]
    return words or ["not stated; the teacher's and the data set's apply to what is derived from them"]


def _side_words(manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return ["not listed before the cache is sealed"]
    sizes: dict[str, int] = {}
    for name, entry in manifest.files.items():
        top = name.split("/")[0] + ("/" if "/" in name else "")
        sizes[top] = sizes.get(top, 0) + entry.size
    shown = sorted(sizes.items(), key=lambda item: -item[1])
    words = [f"{one_line(name, limit=40)} {size_words(size)}" for name, size in shown[:_MAX_FILES]]
    return words + ([f"{len(shown) - _MAX_FILES} more"] if len(shown) > _MAX_FILES else [])


def _words(values: dict[str, Any], first: tuple[str, ...]) -> str:
    known = [f"{name} {one_line(values[name], limit=80)}" for name in first if values.get(name) not in (None, "", 0)]
    return ", ".join(word.removeprefix("name ") for word in known) or "not stated"


def _fidelity_words(manifest: Manifest | None) -> list[str]:
    if manifest is None or not manifest.fidelity:
        return ["not measured"]
    return [
        f"{one_line(name)} {value:.4g}" if isinstance(value, float) else f"{one_line(name)} {one_line(value)}"
        for name, value in manifest.fidelity.items()
        if isinstance(value, int | float | str)
    ]


def _wrapped(title: str, words: list[str]) -> list[str]:
    indent = 16
    lines, line = [], f"{title:<{indent}}"
    for i, word in enumerate(words):
        piece = word + (", " if i + 1 < len(words) else "")
        if len(line) > indent and len(line) + len(piece.rstrip()) > _WIDTH:
            lines.append(line.rstrip())
            line = " " * indent
        line += piece
    return [*lines, line.rstrip()]


def _next_lines(cache_dir: Path, place: str, plan: Plan, totals: _Totals, *, sealed: bool, missing: bool) -> list[str]:
    if missing:
        return [f"next            {built_with(plan)} with the same options makes the missing shards"]
    if not sealed and not totals.samples:
        return [f"next            {built_with(plan)} --overwrite, when its samples can be read: there is none to seal"]
    if not sealed:
        return [f"next            teacher-cache seal {quoted(place)}"]
    options = by_make(" SET=", " --set ")  # begin a line of their own
    check = f"verify {quoted(place)}" if place == str(cache_dir) else f"pull {quoted(place)} FOLDER"
    return [
        f"next            {distill_command(plan, place, pictures=totals.pictures)}".replace(
            options, f" \\\n{'':<15}{options}", 1
        ),
        f"                cachectl inspect {quoted(place)} {quoted(totals.first_id) if totals.first_id else 'SAMPLE_ID'}",
        f"                cachectl {check}",
    ]
