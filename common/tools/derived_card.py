"""The README.md of a derived cache: what it was made from, what still holds, and its sources' own cards."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_distill_cache.common.cache.counts import SampleCounts
from vlm_distill_cache.common.cache.plan import Plan, card_store_line
from vlm_distill_cache.common.printing import markdown, markdown_code, one_line

DERIVED = "derived"
_MAX_CODEC = _MAX_QUOTED = 4000  # characters of a codec's settings, and of a line of a quoted card


def derivation_words(plan: Plan) -> list[str]:
    """Say of what a cache is a part, for a person; nothing for a cache as stage one built it."""
    how = plan.extra.get(DERIVED)
    if not isinstance(how, dict):
        return []
    sources = how.get("sources")
    names = [one_line(str(name)[:12]) for name in sources] if isinstance(sources, list) else []
    if how.get("kind") == "merge":
        return [f"merged from {len(names)} caches", *names]
    chosen = how.get("selection")
    selection = [_word(name, value) for name, value in chosen.items()] if isinstance(chosen, dict) else []
    words = [f"only a part of cache {' '.join(names)} of {one_line(how.get('of_samples'), limit=20)} samples"]
    return words + selection + (["which was derived itself"] if "before" in how else [])


def _word(name: str, value: Any) -> str:
    shown = ", ".join(map(str, value)) if isinstance(value, list) else value
    if isinstance(value, dict):
        shown = value.get("count")
    return f"{one_line(name, limit=40)}: {one_line(shown, limit=60)}"


def write_derived_card(
    plan: Plan,
    fidelity: Mapping[str, Any] | None,
    sources: Sequence[tuple[str, str]],
    counts: SampleCounts,
    *,
    sinks: str = "",
) -> bytes:
    """Return the card of a derived cache.

    Args:
        sources: Manifest hash and card of each cache it was made from; the cards are quoted.
        counts: Of its own shards.
        sinks: A section about its sinks, or nothing.
    """
    name = one_line(f"{plan.teacher.get('name')} on {plan.data.get('name')}")
    how = plan.extra[DERIVED]
    made = "\n".join(
        f"- {markdown(key)}: {markdown_code(value)}" for key, value in sorted(how.items()) if key != "sources"
    )
    signals = _rows(
        (markdown_code(signal), markdown_code(codec, limit=_MAX_CODEC))
        for signal, codec in sorted(plan.signals.items())
    )
    figures = _rows((markdown(figure), markdown(value)) for figure, value in sorted((fidelity or {}).items()))
    prints = _rows((markdown(of), markdown_code(value)) for of, value in sorted(plan.fingerprints.items()))
    licences = _rows(
        (of, markdown(described.get(key) or "not stated"))
        for of, described, key in (
            ("the caches", plan.data, "cache_license"),
            ("the teacher", plan.teacher, "license"),
            ("the data", plan.data, "license"),
        )
    )
    quoted = "\n".join(
        f"\n### Manifest `{manifest_hash}`\n\n{_quote(card) or '> (no card)'}" for manifest_hash, card in sources
    )
    return f"""---
{_front_matter(plan, name)}---
# Derived teacher cache: {markdown(name)}

**Not a cache as stage one built it**, but made from {len(sources)} by `cachectl`:

{made}
{counts.card_lines()}{card_store_line(plan)}{counts.failures.card_section()}
## Licence and provenance

| of | licence |
|---|---|
{licences}

The licences of all sources apply: name them when you pass this on. Their cards are quoted at the end.

## Use

    cachectl verify THIS_FOLDER
    cachectl inspect THIS_FOLDER
    distill train --student mobilevlm --data DATA --cache THIS_FOLDER --output RUN

## Signals

| signal | codec |
|---|---|
{signals}

## Fidelity: figures of the source's card that still hold

| figure | mean over the source's probe |
|---|---|
{figures or "| none | what was measured has changed, or differs between the sources |"}
{sinks}
## Fingerprints

| of | value |
|---|---|
{prints}

## Sources
{quoted}
""".encode()


def _front_matter(plan: Plan, name: str) -> str:
    licence = str(plan.data.get("cache_license") or "unknown")
    entries = {
        "pretty_name": f"Derived teacher cache: {name}",
        "license": "other" if " + " in licence else one_line(licence),  # the Hub knows one, or none
        "tags": ["knowledge-distillation", "vision-language", "teacher-cache"],
        "viewer": False,
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in entries.items())  # JSON is YAML too


def _rows(cells: Any) -> str:
    return "\n".join(f"| {left} | {right} |" for left, right in cells)


def _quote(card: str) -> str:
    """Somebody's card, as it was written: quoted, it links to nothing and loads no picture."""
    return "\n".join(f"> {markdown(line, limit=_MAX_QUOTED)}".rstrip() for line in card.splitlines())
