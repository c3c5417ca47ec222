"""A built-in teacher's measured accuracy, in the form that stage two prints beside its students."""

import math
from collections.abc import Mapping
from typing import Any


def evaluation_of(training: Mapping[str, Any]) -> dict[str, Any] | None:
    """Turn the accuracy in ``training.json`` into scores as ``distill evaluate`` writes them.

    Args:
        training: Content of the file; empty for other checkpoints.

    Returns:
        ``{"scores": {name: {"value", "low", "high", "items"}}}`` with shares in [0, 1] and normal 95 % intervals
        over items, kinds averaged without weights; None without a measured accuracy.
    """
    scores: dict[str, dict[str, float]] = {}
    for part, name in (("pairs", "likelihood"), ("questions", "questions")):
        kinds = training.get("accuracy", {}).get(part, {})
        means, variances, items = [], [], 0
        for kind, found in sorted(kinds.items()):
            share, count = found["accuracy"] / 100, found["items"]
            scores[f"{name}/{kind}"] = _score(share, share * (1 - share) / count, count)
            means.append(share)
            variances.append(share * (1 - share) / count)
            items += count
        if means:
            scores[name] = _score(sum(means) / len(means), sum(variances) / len(means) ** 2, items)
    return {"scores": scores} if scores else None


def _score(share: float, variance: float, items: int) -> dict[str, float]:
    half = 1.96 * math.sqrt(variance)
    rounded = [round(value, 6) for value in (share, max(0.0, share - half), min(1.0, share + half))]
    return {**dict(zip(("value", "low", "high"), rounded, strict=True)), "items": items}
