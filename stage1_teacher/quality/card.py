"""The cache's README.md: a data set card that says what is in it, how true it is and how to use it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.counts import SampleCounts
from vlm_distill_cache.common.cache.plan import BASE, Plan, card_store_line, cut_words
from vlm_distill_cache.common.cache.side_files import CARD
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.cache.spaced import FEW_RECORDS
from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.printing import markdown, markdown_code, one_line
from vlm_distill_cache.common.tools.shift import ShiftReport, folder_shift
from vlm_distill_cache.common.tools.shift_view import shift_section
from vlm_distill_cache.common.tools.sinks import Sinks, card_lines
from vlm_distill_cache.data.questions import AskedData
from vlm_distill_cache.data.sample import Dataset

_MAX_CODEC = 4000  # characters of a codec's settings
# The Hub's classes of size: below this many samples, this name.
_SIZES = (
    (10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"),
)  # fmt: skip


def write_card(
    cache_dir: Path,
    plan: Plan,
    fidelity: dict[str, Any] | None,
    *,
    sinks: Sinks | None,
    dataset: Dataset | None = None,
) -> None:
    """Write the card of a cache whose shards are all there; ``dataset`` tells the questions, of which it holds none."""
    counts = SampleCounts()
    field_bytes = dict.fromkeys((field.name for field in plan.all_fields), 0)
    for index in range(plan.shard_count):
        sidecar = read_sidecar(cache_dir, index)
        counts.add(sidecar)
        for name, size in sidecar.field_bytes.items():
            field_bytes[name] = field_bytes.get(name, 0) + size
    asked = None if dataset is None else AskedData(dataset).questions
    shift = folder_shift(cache_dir, plan, total=counts.samples, asked=asked, most=FEW_RECORDS)
    text = card_text(plan, fidelity, counts=counts, field_bytes=field_bytes, sinks=sinks, shift=shift)
    write_bytes_atomic(cache_dir / CARD, text.encode())


def card_text(
    plan: Plan,
    fidelity: dict[str, Any] | None,
    *,
    counts: SampleCounts,
    field_bytes: Mapping[str, int],
    sinks: Sinks | None = None,
    shift: ShiftReport | None = None,
) -> str:
    """Write the card's text: a function of its arguments alone, equal for both stores but for the store's line.

    Args:
        fidelity: Figures of ``measure_fidelity``, or None if skipped.
        counts: Of all shards.
        field_bytes: Decoded bytes of all records by field.
        sinks: Of `write_sinks`.
        shift: How the gaze moves within answers; None: the cache does not hold it.
    """
    rows, samples = max(1, counts.rows), max(1, counts.samples)
    signals = ""
    for name, fields in [*sorted(plan.fields.items()), (BASE, ())]:
        known = {field.name for group in plan.fields.values() for field in group}
        names = {field.name for field in fields} if fields else field_bytes.keys() - known
        size = sum(field_bytes[field] for field in names)
        codec = (
            markdown_code(plan.signals[name], limit=_MAX_CODEC)
            if fields
            else "sample id, image hash, labels, visual tiles"
        )
        signals += f"| {markdown_code(name)} | {size / rows:.1f} | {size / samples:.0f} | {codec} |\n"
    figures = (
        "\n".join(f"| {markdown(name)} | {markdown(value)} |" for name, value in fidelity.items())
        if fidelity
        else "| not measured | the teacher was served |"
        if plan.teacher.get("served")
        else "| not measured | run `teacher-cache fidelity` |"
    )
    prints = "\n".join(
        f"| {markdown(name)} | {markdown_code(value)} |" for name, value in sorted(plan.fingerprints.items())
    )
    name = one_line(f"{plan.teacher.get('name')} on {plan.data.get('name')}")
    revision = f"revision {markdown_code(plan.teacher['revision'])}, " if plan.teacher.get("revision") else ""
    of = {key: markdown(plan.teacher.get(key)) for key in ("name", "dtype")}
    return f"""---
{_front_matter(plan, name)}---
# Teacher cache: {markdown(name)}

What a vision-language teacher says and where it looks while saying it, for training students without it.

- Teacher: {of["name"]} ({revision}family {markdown_code(plan.teacher.get("family"))}, {of["dtype"]})
- Data: {markdown(plan.data.get("name"))}, {plan.sample_count} samples; images and questions are **not** in here
{counts.card_lines()}{_cut_line(plan)}{card_store_line(plan)}- Prompt template: {markdown_code(plan.template.get("name"))}
{counts.failures.card_section()}
## Licence and provenance

| of | licence |
|---|---|
| this cache | {_cell(plan.data.get("cache_license"))} |
| the teacher | {_cell(plan.teacher.get("license"))} |
| the data | {_cell(plan.data.get("license"))} |

The teacher's and the data set's licences apply to what is derived from them: name both when you pass this on.
Source or contact: {_cell(plan.data.get("source"))}. The fingerprints below say which teacher and data these were.

## Use

    cachectl pull PLACE THIS_FOLDER          # s3://..., hf://datasets/..., https://... or a folder; verified on arrival
    cachectl verify THIS_FOLDER
    cachectl inspect THIS_FOLDER
    distill train --student mobilevlm --data DATA --cache THIS_FOLDER --output RUN

DATA is your own copy of the data set; each record is matched to its sample by id, labels and image hash.

## Signals

| signal | bytes a row | bytes a sample | codec |
|---|---|---|---|
{signals}
Bytes are those of the decoded arrays; on disk they are packed.

## Fidelity: decoded cache against the live teacher

| figure | mean over the probe |
|---|---|
{figures}
{shift_section(shift)}{card_lines(sinks, plan)}
## Fingerprints

| of | value |
|---|---|
{prints}
"""


def _cut_line(plan: Plan) -> str:
    cut = cut_words(plan)
    return f"- Long samples: {markdown(cut)}\n" if cut else ""


def _front_matter(plan: Plan, name: str) -> str:
    """What the Hugging Face Hub reads, as YAML; each value is JSON, which is YAML too."""
    size = next((word for limit, word in _SIZES if plan.sample_count < limit), "n>10M")
    entries = {
        "pretty_name": f"Teacher cache: {name}",
        "license": one_line(plan.data.get("cache_license") or "unknown"),
        "tags": ["knowledge-distillation", "vision-language", "teacher-cache"],
        "task_categories": ["image-text-to-text"],
        "size_categories": [size],
        "viewer": False,  # records are for training; the Hub's table viewer reads neither store
    }
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in entries.items())


def _cell(text: Any) -> str:
    return markdown(text) if text else "not stated"
