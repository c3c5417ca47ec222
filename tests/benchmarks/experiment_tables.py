"""The experiment's tables as Markdown: means and 95 % intervals over seeds, gains paired by seed."""

import math
import statistics
from typing import Any

from tests.benchmarks.experiment_arms import (
    ARMS,
    CURVE_ARMS,
    CURVE_SEEDS,
    CURVE_STEPS,
    LOGITS,
    QUARTER_ARMS,
    SFT,
    STEPS,
    TABLES,
)

# 97.5 % points of Student's t by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
HEADING = "| losses | captions by likelihood, % | questions, % | gain over {base}, points |"


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over seeds (0 for a single seed: none can be given)."""
    if len(values) < 2:
        return values[0], math.nan
    half = T_QUANTILE[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), half


def select(results: list[dict[str, Any]], **wanted: Any) -> dict[int, dict[str, Any]]:
    """Results that match, by seed."""
    return {r["seed"]: r for r in results if all(r[name] == value for name, value in wanted.items())}


def _table(results: list[dict[str, Any]], arms: tuple[str, ...], *, tokens: str, base: str) -> list[str]:
    lines = [HEADING.format(base=base.removeprefix("+ ")), "|---|---|---|---|"]
    reference = select(results, arm=base, tokens=tokens, steps=STEPS)
    for arm in arms:
        found = select(results, arm=arm, tokens=tokens, steps=STEPS)
        if not found:
            continue
        cells = ["{:.1f} ± {:.1f}".format(*interval([r["scores"][name] for r in found.values()]))
                 for name in ("likelihood", "questions")]  # fmt: skip
        paired = [r["scores"]["likelihood"] - reference[seed]["scores"]["likelihood"]
                  for seed, r in found.items() if seed in reference]  # fmt: skip
        gain = "-" if arm == base or not paired else "{:+.1f} ± {:.1f}".format(*interval(paired))
        lines.append(f"| {arm} | {cells[0]} | {cells[1]} | {gain} |")
    return [*lines, ""]


def tables(results: list[dict[str, Any]], teacher: dict[str, float]) -> str:
    """All tables.

    Args:
        results: One entry a job.
        teacher: The teacher's own scores, percent.
    """
    seeds = len(select(results, arm=SFT, tokens="same", steps=STEPS))
    lines = [
        f"Students with the teacher's visual tokens, {STEPS} steps, {seeds} seeds (teacher: "
        f"{teacher['likelihood']:.1f} / {teacher['questions']:.1f}):",
        "",
    ]
    for title, arms in TABLES.items():
        base = LOGITS if LOGITS in arms or title != "Cached against online" else arms[0]
        if any(select(results, arm=arm, tokens="same", steps=STEPS) for arm in arms):
            lines += [f"**{title}**", "", *_table(results, arms, tokens="same", base=base)]
    if select(results, tokens="quarter", steps=STEPS):
        lines += [f"Students with a quarter of the visual tokens, {STEPS} steps:", ""]
        lines += _table(results, QUARTER_ARMS, tokens="quarter", base=LOGITS)
    return "\n".join(lines + _curve(results))


def _curve(results: list[dict[str, Any]]) -> list[str]:
    """Scores against steps; nothing unless several numbers of steps were trained."""
    if len({r["steps"] for r in results}) < 2:
        return []
    lines = [f"Score against steps (quarter tokens, {len(CURVE_SEEDS)} seeds, captions by likelihood, %):", "",
             "| losses | " + " | ".join(map(str, CURVE_STEPS)) + " |", "|---" * (len(CURVE_STEPS) + 1) + "|"]  # fmt: skip
    for arm in CURVE_ARMS:
        row = []
        for steps in CURVE_STEPS:
            found = select(results, arm=arm, tokens="quarter", steps=steps)
            values = [found[seed]["scores"]["likelihood"] for seed in CURVE_SEEDS if seed in found]
            row.append("{:.1f} ± {:.1f}".format(*interval(values)) if values else "-")
        lines.append(f"| {arm} | " + " | ".join(row) + " |")
    return lines


def real_language_model_tables(results: list[dict[str, Any]], teacher: dict[str, float]) -> str:
    """The table of the experiment with a real language model: exact matches by kind of question.

    Args:
        results: One entry a student.
        teacher: The teacher's own scores, percent.
    """
    kinds = list(teacher)  # all questions, then each kind
    lines = [
        "| losses | " + " | ".join(f"{kind.split('/', 1)[-1]}, %" for kind in kinds) + " | gain over SFT, points |",
        "|---" * (len(kinds) + 2) + "|",
        "| (teacher) | " + " | ".join(f"{teacher[kind]:.1f}" for kind in kinds) + " | - |",
    ]
    plain = select(results, arm="SFT")
    for arm in dict.fromkeys(r["arm"] for r in results):
        found = select(results, arm=arm)
        cells = ["{:.1f} ± {:.1f}".format(*interval([r["scores"][kind] for r in found.values()])) for kind in kinds]
        paired = [r["scores"][kinds[0]] - plain[seed]["scores"][kinds[0]] for seed, r in found.items()]
        gain = "-" if arm == "SFT" else "{:+.1f} ± {:.1f}".format(*interval(paired))
        lines.append(f"| {arm} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results by seed, token count, budget and arm."""
    return sorted(results, key=lambda r: (r["seed"], r["tokens"], r["steps"], list(ARMS).index(r["arm"])))
