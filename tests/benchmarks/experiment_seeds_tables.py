"""The tables of `make experiment-seeds` as Markdown: means and 95 % intervals over seeds, differences paired by seed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_docs import table_in
from tests.benchmarks.experiment_seeds_arms import (
    ARMS,
    BASE,
    BUDGETS,
    CHOICES,
    CUTS,
    DATA_SHARES,
    DECODINGS,
    IMPORTANCES,
    KEPT,
    LOGITS,
    ORACLE,
    QUANTISED,
    QUANTISED_STUDENT,
    RECOVERIES,
    SHARES,
    UNPRUNED,
    decoded,
    recovered,
    selected,
)
from tests.benchmarks.experiment_tables import interval

BEGIN, END = "<!-- experiment-seeds -->\n", "<!-- /experiment-seeds -->\n"
CAPTIONS, QUESTIONS = "likelihood", "questions"
PLAIN_FORM = {
    **dict.fromkeys(("+ answer_attention, relative", "+ answer_attention, sink_suppressed"), BASE),
    "+ visual_columns, sink_suppressed": "+ visual_columns",
    "+ visual_map, sink_filtered": "+ visual_map, cosine",
}

Scores = Mapping[int, Mapping[str, float]]  # one arm's, by seed


class Results:
    """Scores by arm and seed, and cells made of them."""

    def __init__(self, stored: Mapping[str, Any]) -> None:
        """Take ``teacher``, ``cuts`` (scores of pruned students before they recover) and ``results``, a job each."""
        self.teacher, self.cuts = stored["teacher"], stored["cuts"]
        self._arms: dict[str, dict[int, Mapping[str, float]]] = {}
        for found in stored["results"]:
            self._arms.setdefault(found["arm"], {})[found["seed"]] = found["scores"]

    def has(self, *arms: str) -> bool:
        """Whether any of these arms was run."""
        return any(arm in self._arms for arm in arms)

    def mean(self, arm: str, name: str, shape: str = "{:.1f} ± {:.1f}") -> str:
        """Mean and interval of a score; a dash where there is none."""
        values = [scores[name] for scores in self._arms.get(arm, {}).values() if name in scores]
        return shape.format(*interval(values)) if values else "-"

    def compared(self, arm: str, base: str, name: str, what: Callable[[float, float], float], shape: str) -> str:
        """Mean and interval of what two arms' scores of the same seed give; a dash where nothing is to be compared."""
        first, second = self._arms.get(arm, {}), self._arms.get(base, {})
        values = [what(first[seed][name], second[seed][name]) for seed in first if seed in second]
        return shape.format(*interval(values)) if values and arm != base else "-"

    def gain(self, arm: str, base: str, name: str = CAPTIONS) -> str:
        """How many points an arm is above another."""
        return self.compared(arm, base, name, lambda a, b: a - b, "{:+.1f} ± {:.1f}")

    def retained(self, arm: str, base: str | None, name: str) -> str:
        """Percent of another arm's score, or of the teacher's."""
        if base is not None:
            return self.compared(arm, base, name, lambda a, b: 100 * a / b, "{:.1f} ± {:.1f}")
        scores = self._arms.get(arm, {}).values()
        values = [100 * found[name] / self.teacher[name] for found in scores]
        return "{:.1f} ± {:.1f}".format(*interval(values)) if values else "-"


def _table(*rows: list[str]) -> list[str]:
    head, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)] + [""]


def _losses(found: Results) -> list[str]:
    head = ["losses", "captions, %", "questions, %", "captions: above logit KD", "above its plain form"]
    rows = [
        [
            arm, found.mean(arm, CAPTIONS), found.mean(arm, QUESTIONS), found.gain(arm, LOGITS),
            found.gain(arm, PLAIN_FORM[arm]) if arm in PLAIN_FORM else "-",
        ]
        for arm in (LOGITS, *(name for name, arm in ARMS.items() if arm.part == "losses" and name != LOGITS))
    ]  # fmt: skip
    return _table(head, *rows)


def _selection(found: Results) -> list[str]:
    head = ["visual tokens", "chosen by"]
    for how in ("trained with it", "training-free"):
        head += [f"{how}: captions, %", "questions, %", "captions: above all tokens"]

    def cells(arm: str) -> list[str]:
        return [found.mean(arm, CAPTIONS), found.mean(arm, QUESTIONS), found.gain(arm, BASE)]

    rows = [
        [
            f"{share} %",
            choice,
            *cells(selected(share, choice, trained=True)),
            *cells(selected(share, choice, trained=False)),
        ]
        for share in SHARES
        for choice in (*CHOICES, ORACLE)
    ]
    return _table(head, ["100 %", "-", *cells(BASE) * 2], *rows)


def _decoding(found: Results) -> list[str]:
    head = ["attended a step", "set", "nats a token", "as with all tokens, %", "captions, %", "questions, %",
            "shifts an answer", "nats: below fixed", "agreement: above fixed"]  # fmt: skip
    rows = []
    for budget in BUDGETS:
        for how in DECODINGS:
            arm, fixed = decoded(budget, how), decoded(budget, "fixed")
            rows.append([
                f"{budget} %", how, found.mean(arm, "nats", "{:.4f} ± {:.4f}"), found.mean(arm, "agreement", "{:.2f} ± {:.2f}"),
                found.mean(arm, CAPTIONS), found.mean(arm, QUESTIONS), found.mean(arm, "events", "{:.2f} ± {:.2f}"),
                found.compared(arm, fixed, "nats", lambda a, b: b - a, "{:+.4f} ± {:.4f}"),
                found.compared(arm, fixed, "agreement", lambda a, b: a - b, "{:+.2f} ± {:.2f}"),
            ])  # fmt: skip
    return _table(head, *rows)


def _pruning(found: Results, *, alike: bool) -> list[str]:
    """Retention in percent of the teacher's scores, or (``alike``) of an unpruned student's that was trained alike."""
    head = ["student", "recovery", *([] if alike else ["before"]), *(f"{share} % of the data" for share in DATA_SHARES)]
    rows = []
    for cut in CUTS if alike else (UNPRUNED, *CUTS):
        for recovery in RECOVERIES:
            cells = []
            for share in DATA_SHARES:
                arm, base = recovered(cut, share, recovery), recovered(UNPRUNED, share, recovery) if alike else None
                cells.append(" / ".join(found.retained(arm, base, name) for name in (CAPTIONS, QUESTIONS)))
            before = [
                f"{100 * found.cuts[cut][name] / found.teacher[name]:.1f}" if cut in found.cuts else "-"
                for name in (CAPTIONS, QUESTIONS)
            ]
            rows.append([f"`{cut}`", recovery, *([] if alike else [" / ".join(before)]), *cells])
    return _table(head, *rows)


def _importance(found: Results) -> list[str]:
    """Scores before recovery, by what is kept and how it is chosen."""
    head = ["kept by", *(f"{keep}: {score}, %" for keep in KEPT for score in ("captions", "questions"))]
    rows = []
    for dimension, ways in IMPORTANCES.items():
        for way, how in ways.items():
            cuts = [f"pruned:{dimension}:{keep}" + (f", {way}" if how else "") for keep in KEPT]
            cells = [
                f"{found.cuts[cut][name]:.1f}" if cut in found.cuts else "-"
                for cut in cuts
                for name in (CAPTIONS, QUESTIONS)
            ]
            rows.append([f"{dimension}, {way}", *cells])
    return _table(head, *rows)


def _quantised(found: Results) -> list[str]:
    head = ["weights", "captions, %", "questions, %", "captions: above 32 bits", "questions: above", "MB of weights"]
    arms = {"32 bits": QUANTISED_STUDENT} | {bits: f"{QUANTISED_STUDENT}, {bits}" for bits in QUANTISED}
    rows = [
        [
            bits, found.mean(arm, CAPTIONS), found.mean(arm, QUESTIONS), found.gain(arm, QUANTISED_STUDENT),
            found.gain(arm, QUANTISED_STUDENT, QUESTIONS), found.mean(arm, "megabytes", "{:.2f}"),
        ]
        for bits, arm in arms.items()
    ]  # fmt: skip
    return _table(head, *rows)


TABLES: dict[str, tuple[str, str, Callable[[Results], list[str]]]] = {
    "Sink-aware losses": ("losses", "Differences are points, paired by seed.", _losses),
    "Fewer visual tokens": (
        "selection",
        "Every student learns from logits and answer attention. *Training-free*: the student of the first row, run with fewer "
        "tokens. *gaze*: predicted from the tower's features. *gaze of the teacher*: an oracle that looks at the scored picture.",
        _selection,
    ),
    "Shift-aware decoding": (
        "decoding",
        "The student with all tokens, not trained for it; the prompt is read with all of them. Nats and agreement (the same most "
        "likely token as with all) are of the right captions, token by token.",
        _decoding,
    ),
    "Pruned students: percent of the teacher's scores that is retained (captions / questions)": (
        "pruning", "*Before*: cut, and not trained since. A coin chooses half of the captions right.",
        lambda found: _pruning(found, alike=False),
    ),
    "Pruned students: percent of what an unpruned student keeps that was trained alike": (
        "pruning", "The same losses, share of the data, steps and seed.", lambda found: _pruning(found, alike=True),
    ),
    "Pruned students before they recover, by importance": (
        "pruning", "The same samples are measured for all; nothing depends on a seed.", _importance,
    ),
    "Quantised weights": ("quantised", f"The student {QUANTISED_STUDENT}.", _quantised),
}  # fmt: skip


def tables(stored: Mapping[str, Any]) -> str:
    """All tables of which something was run.

    Args:
        stored: ``teacher`` and ``cuts``, scores in percent, and ``results``, one entry a job.
    """
    found, lines = Results(stored), []
    for title, (part, said, make) in TABLES.items():
        if found.has(*(name for name, arm in ARMS.items() if arm.part == part)):
            lines += [f"### {title}", "", said, "", *make(found)]
    return "\n".join(lines)


def in_order(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results by arm and seed, the last of each; those of arms that are no more are left out."""
    last = {(found["arm"], found["seed"]): found for found in results}
    names = list(ARMS)
    return [
        last[key] for key in sorted((key for key in last if key[0] in ARMS), key=lambda k: (names.index(k[0]), k[1]))
    ]


def write_page(page: Path, stored: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + tables(stored) + END))
