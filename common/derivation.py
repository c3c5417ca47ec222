"""What a derived cache says of itself, ``plan.extra["derived"]``: that it is a part of another, or a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlm_distill_cache.common.printing import one_line

if TYPE_CHECKING:
    from vlm_distill_cache.common.cache.plan import Plan

DERIVED = "derived"


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
