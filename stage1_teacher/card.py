"""The cache's README.md: a data set card that says what is in it, how true it is and how to use it."""

from pathlib import Path
from typing import Any

from common.atomic import write_bytes_atomic
from common.manifest import CARD, Plan
from common.plan import card_store_line


def write_card(cache_dir: Path, plan: Plan, fidelity: dict[str, Any] | None) -> None:
    """Write the card; a function of the plan and the fidelity figures alone.

    Args:
        cache_dir: The cache.
        plan: Its plan.
        fidelity: Figures of ``measure_fidelity``, or None if skipped.
    """
    signals = "\n".join(f"| `{name}` | `{codec}` |" for name, codec in sorted(plan.signals.items()))
    figures = (
        "\n".join(f"| {name} | {value} |" for name, value in fidelity.items())
        if fidelity
        else "| not measured | run `teacher-cache fidelity` |"
    )
    prints = "\n".join(f"| {name} | `{value}` |" for name, value in sorted(plan.fingerprints.items()))
    text = f"""---
tags: [knowledge-distillation, vision-language, teacher-cache]
---
# Teacher cache: {plan.teacher.get("name")} on {plan.data.get("name")}

What a vision-language teacher says and where it looks while saying it, for training students without it.

- Teacher: {plan.teacher.get("name")} (family `{plan.teacher.get("family")}`, {plan.teacher.get("dtype")})
- Data: {plan.data.get("name")}, {plan.sample_count} samples; images and questions are **not** in here
{card_store_line(plan)}- Prompt template: `{plan.template.get("name")}`
- Licences: the teacher's and the data set's apply to what is derived from them; name both when you pass this on

## Use

    distill train --student mobilevlm --data DATA --cache THIS_FOLDER --output RUN
    cachectl inspect THIS_FOLDER
    cachectl verify THIS_FOLDER

## Signals

| signal | codec |
|---|---|
{signals}

## Fidelity: decoded cache against the live teacher

| figure | mean over the probe |
|---|---|
{figures}

## Fingerprints

| of | value |
|---|---|
{prints}
"""
    write_bytes_atomic(cache_dir / CARD, text.encode())
