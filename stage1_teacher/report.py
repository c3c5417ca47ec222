"""The text a build ends with: what was done, what it cost, what to run next."""

from itertools import chain
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.counts import FailureCounts, picture_words, shown_in, unknown_words
from vlm_distill_cache.common.cache.manifest import Manifest, read_manifest
from vlm_distill_cache.common.cache.plan import BASE, Plan, built_with, cut_words, read_plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.codecs.registry import CODECS
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.common.terminal.next_step import distill_command
from vlm_distill_cache.common.tools.fidelity_words import poor_fidelity
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extend import Extension
from vlm_distill_cache.stage1_teacher.extract import BuildSummary


def summary_text(summary: BuildSummary) -> str:
    """Describe a finished build for a terminal."""
    plan, manifest = read_plan(summary.cache), summary.manifest
    if manifest is None:
        return _part_text(summary)
    totals = manifest.totals
    samples, rows = max(1, totals["samples"]), max(1, totals["rows"])
    lines = []
    if summary.built:
        speed = summary.samples / max(summary.seconds, 1e-9)
        lines.append(
            f"Teacher cache written: {totals['samples']} samples, {totals['rows']} supervised rows, "
            f"{totals['failed']} failed; this run {summary.samples} samples in {summary.seconds:.1f} s "
            f"({speed:.1f} samples/s)"
        )
    else:
        lines.append(
            f"Teacher cache is up to date: {totals['samples']} samples, {totals['rows']} supervised rows, "
            f"{totals['failed']} failed"
        )
        if totals["failed"]:
            lines.append(
                f"  failed samples are not tried again; `{built_with(plan)} --overwrite` builds all of it anew"
                if plan.teacher.get("served")
                else "  failed samples are not tried again by a build: mend them, then run `teacher-cache extend "
                f"{quoted(summary.cache)}` with the same data and teacher"
            )
    if revision := plan.teacher.get("revision"):
        lines.append(f"  teacher {one_line(plan.teacher.get('name'))}@{one_line(revision)}")
    lines += _sample_lines(summary.cache, plan, manifest)
    lines.append(f"  {'signal':<18}{'bytes/row':>12}{'bytes/sample':>14}  (before compression)")
    for signal, fields in plan.fields.items():
        size = sum(manifest.field_bytes.get(field.name, 0) for field in fields)
        lines.append(f"  {signal:<18}{size / rows:>12.1f}{size / samples:>14.1f}")
    base = sum(
        size for name, size in manifest.field_bytes.items()
        if not any(name == field.name for fields in plan.fields.values() for field in fields)
    )  # fmt: skip
    lines.append(f"  {BASE:<18}{base / rows:>12.1f}{base / samples:>14.1f}")
    stored = totals["bytes"]
    lines.append(f"  {'shards on disk':<18}{stored / rows:>12.1f}{stored / samples:>14.1f}")
    if manifest.fidelity:
        kept, error = manifest.fidelity.get("kept_mass"), manifest.fidelity.get("logits_gradient_error")
        cosine = manifest.fidelity.get("answer_attention_gradient_cosine")
        parts = [f"kept mass {kept:.4f}"] if kept is not None else []
        parts += [f"KD gradient error {error:.4f}"] if error is not None else []
        parts += [f"attention gradient cosine {cosine:.5f}"] if cosine is not None else []
        lines.append(f"  fidelity on {manifest.fidelity['samples']} samples: " + ", ".join(parts))
    lines += [f"  warning: {sentence}" for sentence in poor_fidelity(plan, manifest.fidelity)]
    lines.append(f"Cache: {summary.cache}")
    return "\n".join(lines)


def extension_text(extension: Extension) -> str:
    """Describe what became of a cache that was to be extended, for a terminal."""
    return "\n".join([_added_text(extension), *(f"Note: {one_line(note)}" for note in extension.notes)])


def _added_text(extension: Extension) -> str:
    if extension.summary is None:
        return f"Nothing to add: {extension.cache} holds all of that, and no sample of it failed"
    if extension.before is None:
        plan, manifest = read_plan(extension.cache), read_manifest(extension.cache)
        lines = _sample_lines(extension.cache, plan, manifest)
        return "\n".join([f"Nothing was added to {extension.cache}: what had failed failed again", *lines])
    what = [f"{extension.samples} samples"] if extension.samples else []
    what += [f"signals {', '.join(extension.signals)}"] if extension.signals else []
    gone = read_manifest(extension.before).totals["failed"] - extension.summary.failed - extension.samples
    other = (
        f"nothing; {gone} failed samples are no longer in the data" if gone > 0 else "other failed samples, or reasons"
    )
    return (
        f"{summary_text(extension.summary)}\nAdded: {'; '.join(what) or other}\n"
        f"The cache as it was is kept for those who read it, until it is extended again: {extension.before}\n"
        f"  when nobody does: rm -r {quoted(extension.before)}"
    )


def extension_values(extension: Extension) -> dict[str, Any]:
    """What became of a cache that was to be extended, for programs."""
    values = {} if extension.summary is None else summary_values(extension.summary)
    added = {"signals": extension.signals, "samples": extension.samples}
    return {**values, "cache": extension.cache, "added": added, "before": extension.before, "notes": extension.notes}


def summary_values(summary: BuildSummary) -> dict[str, Any]:
    """What a build did and what its cache holds, for programs."""
    manifest = summary.manifest
    held = None if manifest is None else {"totals": manifest.totals, "fidelity": manifest.fidelity}
    return {
        "cache": summary.cache,
        "sealed": manifest is not None,
        "manifest": None if manifest is None else manifest.hash,
        "built": {"shards": summary.built, "samples": summary.samples, "seconds": summary.seconds},
        "missing": summary.missing,
        **(held or {}),
    }


def _sample_lines(cache: Path, plan: Plan, manifest: Manifest) -> list[str]:
    """What the samples were: with or without pictures, in words that the tokenizer knows or not, and why some failed."""
    totals = manifest.totals
    pictures, unknown = totals.get("pictures"), totals.get("unknown_rows")
    several = plan.format_version != ONE_PICTURE
    shown = sum(shown_in(read_sidecar(cache, shard.index)) for shard in manifest.shards) if several else 0
    lines = [f"  {picture_words(pictures, totals['samples'], shown)}"]
    codecs = {name: CODECS.get(str(settings.get("codec"))) for name, settings in plan.signals.items()}
    of_images = [name for name, codec in codecs.items() if codec is not None and codec.of_image]
    if pictures == 0 and of_images:
        lines.append(
            f"  warning: no sample has a picture, so there is nothing in {', '.join(of_images)} and no loss on it can "
            "be trained; if there should be pictures, see how the data names them (docs/families.md)"
        )
    if words := unknown_words(unknown, totals["rows"]):
        lines.append(f"  {'' if unknown is None else 'warning: '}{words}")
    if cut := cut_words(plan):
        lines.append(f"  {cut}")
    if totals["failed"]:
        failed = (read_sidecar(cache, shard.index).failed for shard in manifest.shards if shard.failed)
        lines += [f"  failed: {line}" for line in FailureCounts(chain.from_iterable(failed)).lines()]
    return lines


def _part_text(summary: BuildSummary) -> str:
    numbers = ", ".join(map(str, summary.missing[:10])) + (", ..." if len(summary.missing) > 10 else "")
    return (
        f"Part {summary.part} done: this run built {summary.built} shards, {summary.samples} samples in "
        f"{summary.seconds:.1f} s. {len(summary.missing)} shards are still missing ({numbers}); they are built by "
        f"the other parts (parts count from 0: 0/{summary.part.of} to {summary.part.of - 1}/{summary.part.of}).\n"
        f"Cache: {summary.cache}\n"
        "Next, where all parts write to this folder: the last one seals the cache. If a part was lost, run any part "
        "again to finish.\n"
        f"Next, where each part has a folder of its own: when all are done, cachectl merge {quoted(summary.cache)} "
        "FOLDER_OF_ANOTHER_PART ... --output NEW_FOLDER"
    )


def next_command(summary: BuildSummary, config: BuildConfig, *, recipe: str = "") -> str:
    """The command that uses the cache, with the data's place as it was given, by the recipe it was built by."""
    plan = read_plan(summary.cache)
    pictures = None if summary.manifest is None else summary.manifest.totals.get("pictures")
    command = distill_command(
        plan, summary.cache, pictures=pictures, data=config.data, images=config.images, recipe=recipe
    )
    return f"Next: {command}"
