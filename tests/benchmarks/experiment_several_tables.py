"""The tables of `make experiment-several` as Markdown: means and 95 % intervals over seeds, differences paired by seed."""

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_docs import table_in
from tests.benchmarks.experiment_tables import interval
from vlm_distill_cache.data.sample import Question
from vlm_distill_cache.data.shapes.clips import MOTIONS
from vlm_distill_cache.data.shapes.kinds import HELD_OUT
from vlm_distill_cache.data.shapes.pairs import COMPARISONS

BEGIN, END = "<!-- experiment-several -->\n", "<!-- /experiment-several -->\n"
SEEDS = (301, 302, 303)  # never used while anything was tuned
SFT, LOGITS, GAZE, COLUMNS = "SFT", "logit KD", "+ answer_attention", "+ visual_columns"
CUT = ", cut out"  # of students whose decoder is half of the teacher's
LOSSES: dict[str, dict[str, float]] = {
    SFT: {"lm": 1.0},
    LOGITS: {"lm": 1.0, "logits": 1.0},
    GAZE: {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
    COLUMNS: {"lm": 1.0, "logits": 1.0, "visual_columns": 1.0},
}
STUDENTS = ("", CUT)
ARMS = {name + student: losses for student in STUDENTS for name, losses in LOSSES.items()}
GROUPS: dict[str, tuple[str, ...]] = {
    "comparison": COMPARISONS,
    "motion": MOTIONS,
    "comparison, held-out combinations": tuple(kind + HELD_OUT for kind in COMPARISONS),
    "motion, held-out combinations": tuple(kind + HELD_OUT for kind in MOTIONS),
}

Scores = Mapping[str, float]  # percent, by kind of question


def mean_of(scores: Scores, group: str) -> float:
    """Unweighted mean of the kinds of a group, percent."""
    return statistics.mean(scores[kind] for kind in GROUPS[group])


def most_frequent(items: Iterable[Question]) -> dict[str, float]:
    """How many items the most frequent answer of their kind is right for, percent: what a model has that never looks."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        answers[item.kind][item.answer] += 1
    return {kind: round(100 * max(found.values()) / found.total(), 2) for kind, found in answers.items()}


def gains(results: Sequence[Mapping[str, Any]], arm: str, base: str, group: str) -> list[float]:
    """Points that an arm is above another, for each seed that both have."""
    of = {(found["arm"], found["seed"]): found["scores"] for found in results}
    seeds = [seed for (name, seed) in of if name == arm and (base, seed) in of]
    return [mean_of(of[arm, seed], group) - mean_of(of[base, seed], group) for seed in seeds]


def verdict(values: Sequence[float]) -> str:
    """What differences of the same seeds show, in words: only an interval without 0 is a difference."""
    if len(values) < 2:
        return "one seed: no interval, nothing is shown"
    mean, half = interval(list(values))
    if abs(mean) <= half:
        return f"not told apart from {LOGITS} ({mean:+.1f} ± {half:.1f} points)"
    return f"{'better' if mean > 0 else 'worse'} than {LOGITS} ({mean:+.1f} ± {half:.1f} points)"


def tables(stored: Mapping[str, Any]) -> str:
    """All tables, and a sentence for each signal and group.

    Args:
        stored: ``teacher`` and ``most_frequent``, percent by kind of question, and ``results``, a job each.
    """
    results = stored["results"]
    if not results:
        return ""

    def row(*cells: str) -> str:
        return "| " + " | ".join(cells) + " |"

    def means(arm: str, groups: Iterable[str], of: Mapping[str, tuple[str, ...]]) -> list[str]:
        found = [result["scores"] for result in results if result["arm"] == arm]
        return [
            "{:.1f} ± {:.1f}".format(
                *interval([statistics.mean(scores[kind] for kind in of[group]) for scores in found])
            )
            if found
            else "-"
            for group in groups
        ]

    lines = [row("answers that are right, %", *GROUPS), row(*["---"] * (len(GROUPS) + 1))]
    for name, what in (("most frequent answer of each kind", "most_frequent"), ("the teacher", "teacher")):
        lines.append(row(name, *(f"{mean_of(stored[what], group):.1f}" for group in GROUPS)))
    lines += [row(arm, *means(arm, GROUPS, GROUPS)) for arm in ARMS]
    lines.append("")
    for student in STUDENTS:
        for arm in (GAZE, COLUMNS):
            lines += [
                f"- {arm.removeprefix('+ ')}{student}, {group}: {verdict(found)}."
                for group in GROUPS
                if (found := gains(results, arm + student, LOGITS + student, group))
            ]
    kinds = [kind for group in GROUPS.values() for kind in group]
    for student in STUDENTS:
        arms = [arm + student for arm in LOSSES]
        lines += ["", row("by kind, %", "most frequent", "teacher", *arms), row(*["---"] * (len(arms) + 3))]
        lines += [
            row(
                kind.replace(HELD_OUT, ", held out"),
                *(f"{stored[what][kind]:.1f}" for what in ("most_frequent", "teacher")),
                *(means(arm, [kind], {kind: (kind,)})[0] for arm in arms),
            )
            for kind in kinds
        ]
    return "\n".join([*lines, ""])


def in_order(results: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results by arm and seed, the last of each; those of arms that are no more are left out."""
    last = {(found["arm"], found["seed"]): found for found in results if found["arm"] in ARMS}
    return [last[key] for key in sorted(last, key=lambda key: (list(ARMS).index(key[0]), key[1]))]


def write_page(page: Path, stored: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + tables(stored) + END))
