"""The tables of `make experiment-photos` as Markdown: means and 95 % intervals over seeds, differences paired by seed."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.bench_docs import table_in
from tests.benchmarks.experiment_photos_arms import (
    ANSWER,
    ARMS,
    COMPARED,
    CONTROL,
    CURVE_STEPS,
    GRIDS,
    LOGITS,
    LOSSES,
    ONLINE,
    PRESETS,
    QUARTERED,
    SFT,
    SINKS,
    STEPS,
    budget_arm,
    curve_arm,
    quarter_arm,
    width_arm,
)
from tests.benchmarks.experiment_photos_scores import DRAWN, Scoring
from tests.benchmarks.experiment_tables import interval

BEGIN, END = "<!-- experiment-photos -->\n", "<!-- /experiment-photos -->\n"


class Results:
    """Scores by arm and seed, and cells made of them."""

    def __init__(self, stored: Mapping[str, Any], scoring: Scoring) -> None:
        """Take what `experiment_photos` stores: of each result ``arm``, ``seed`` and ``scores``."""
        self.groups, self.decided_by = scoring.groups, scoring.decided_by
        self._scores: dict[str, dict[int, Mapping[str, float]]] = {}
        for found in stored["results"]:
            self._scores.setdefault(found["arm"], {})[found["seed"]] = found["scores"]

    def has(self, *arms: str) -> bool:
        """Whether one of these arms was run."""
        return any(arm in self._scores for arm in arms)

    def seeds(self, arm: str) -> int:
        """Of how many seeds there are scores."""
        return len(self._scores.get(arm, {}))

    def mean(self, arm: str, score: str) -> str:
        """Mean and interval; a dash where there is none."""
        values = [scores[score] for scores in self._scores.get(arm, {}).values()]
        return "{:.1f} ± {:.1f}".format(*interval(values)) if values else "-"

    def differences(self, arm: str, base: str, score: str) -> list[float]:
        """Points that an arm is above another, for each seed that both have."""
        first, second = self._scores.get(arm, {}), self._scores.get(base, {})
        return [first[seed][score] - second[seed][score] for seed in sorted(first) if seed in second]

    def gain(self, arm: str, base: str) -> str:
        """Mean and interval of the differences in the score that decides; a dash where there are none."""
        values = self.differences(arm, base, self.decided_by)
        return "{:+.1f} ± {:.1f}".format(*interval(values)) if values and arm != base else "-"


def verdict(values: Sequence[float]) -> str:
    """What differences of the same seeds show: only an interval without 0 is a difference."""
    if len(values) < 2:
        return "one seed: undecided"
    mean, half = interval(list(values))
    if abs(mean) <= half:
        return f"undecided ({mean:+.1f} ± {half:.1f})"
    return f"{'helped' if mean > 0 else 'harmed'} ({mean:+.1f} ± {half:.1f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)] + [""]


def _losses(found: Results, stored: Mapping[str, Any]) -> list[str]:
    head = ["losses", "seeds", *(f"{name}, %" for name in found.groups), f"{found.decided_by}: above logit KD"]
    rows = [
        [name, "", *(f"{stored[what][group]:.1f}" for group in found.groups), "-"]
        for name, what in (("the teacher", "teacher"), ("blind: the teacher sees the mean picture", "blind"))
    ]
    blind = [found_one["blind"] for found_one in stored["results"] if found_one["arm"] == SFT and "blind" in found_one]
    if blind:
        cells = ["{:.1f} ± {:.1f}".format(*interval([scores[group] for scores in blind])) for group in found.groups]
        rows.append([f"blind: {SFT} sees the mean picture", str(len(blind)), *cells, "-"])
    for name in (*LOSSES, ONLINE):
        cells = [found.mean(name, group) for group in found.groups]
        rows.append([name, str(found.seeds(name)), *cells, found.gain(name, LOGITS)])
    return _table(head, rows)


def _verdicts(found: Results) -> list[str]:
    """What helped, what harmed and what is undecided, arm by arm."""
    asked = {name: LOGITS for name in LOSSES if name not in (SFT, LOGITS, CONTROL)}
    return _compared(found, [(LOGITS, SFT), *asked.items(), (ANSWER, CONTROL), (ANSWER, ONLINE)])


def _compared(found: Results, pairs: Sequence[tuple[str, str]]) -> list[str]:
    rows = []
    for arm, base in pairs:
        cells = [verdict(values) if (values := found.differences(arm, base, group)) else "-" for group in found.groups]
        rows.append([arm, base, *cells])
    return _table(["arm", "against", *found.groups], rows)


def _kinds(found: Results, stored: Mapping[str, Any]) -> list[str]:
    arms = [name for name in LOSSES if found.has(name)]
    rows = [
        [
            kind,
            f"{stored['teacher'][kind]:.1f}",
            f"{stored['blind'][kind]:.1f}",
            *(found.mean(arm, kind) for arm in arms),
        ]
        for group in found.groups.values()
        for kind in group
        if kind in stored["teacher"]
    ]
    return _table(["kind, %", "teacher", "blind teacher", *arms], list(dict.fromkeys(map(tuple, rows))))


def _curve(found: Results, stored: Mapping[str, Any]) -> list[str]:
    steps = sorted((*CURVE_STEPS, STEPS))
    rows = [[name, *(found.mean(curve_arm(name, count), found.decided_by) for count in steps)] for name in COMPARED]
    return _table([f"{found.decided_by}, %", *(f"{count} steps" for count in steps)], rows)


def _variants(found: Results, stored: Mapping[str, Any]) -> list[str]:
    head = ["student", *(f"{name}, %" for name in found.groups), f"{found.decided_by}: above its logit KD"]
    rows = []
    for make, names in ((quarter_arm, QUARTERED), (width_arm, COMPARED)):
        for name in names:
            arm = make(name)
            rows.append([arm, *(found.mean(arm, group) for group in found.groups), found.gain(arm, make(LOGITS))])
    return _table(head, rows)


def _budget(found: Results, stored: Mapping[str, Any]) -> list[str]:
    head = [
        "logits",
        "gaze",
        "bytes a row",
        *(f"{name}, %" for name in found.groups),
        f"{found.decided_by}: above the default",
    ]
    rows = []
    default = budget_arm("default", GRIDS[-1])
    for preset in PRESETS:
        for grid in GRIDS:
            arm = budget_arm(preset, grid)
            size = stored["bytes_a_row"].get(arm)
            cells = [found.mean(arm, group) for group in found.groups]
            rows.append([
                f"`{preset}`", f"{grid} x {grid}", "-" if size is None else f"{size:.1f}", *cells, found.gain(arm, default),
            ])  # fmt: skip
    return _table(head, rows)


def _sinks(found: Results, stored: Mapping[str, Any]) -> list[str]:
    """How many sinks the cache shows, by part of the teacher, and whether it helps to do something against them."""
    head = ["where", "pictures", "sinks / places", "what they receive", "strongest place", "receives", "is a sink in"]
    rows = [
        [
            of["part"], str(of["pictures"]), f"{of['sinks']} / {of['places']}", f"{of['share']:.1%}", of["strongest"]["place"],
            f"{of['strongest']['share']:.1%}", f"{of['strongest']['sink_in']:.0%}",
        ]
        for of in stored["sinks"]
    ]  # fmt: skip
    return [*_table(head, rows), *_compared(found, SINKS)]


def _gaze(found: Results, stored: Mapping[str, Any]) -> list[str]:
    return _table(["student", "cosine"], [[name, f"{value:.3f}"] for name, value in stored["gaze"].items()])


def _teacher(found: Results, stored: Mapping[str, Any]) -> list[str]:
    """How the teacher learnt; scores of pictures that nothing else is scored on."""
    rows = [
        [
            str(entry["step"]),
            f"{entry['loss']:.3f}",
            f"{entry['seconds']:.1f}",
            *(f"{entry['scores'][g]:.1f}" for g in found.groups),
        ]
        for entry in stored["training"]["curve"]
    ]
    return _table(["teacher's step", "nats a token", "seconds a step", *(f"{name}, %" for name in found.groups)], rows)


TABLES = {
    "Arms": (("losses",), "Differences are points, paired by seed.", _losses),
    "By kind": (("losses",), "Chance is 50 % of captions and pictures.", _kinds),
    "Score against steps": (("curve",), "All arms keep the teacher's first layers.", _curve),
    "Fewer visual tokens, and a student pruned in width": (("quarter", "width"), "Equal steps, data and seeds.", _variants),
    "Bytes against score": (
        ("budget",), "Every student learns from logits and answer attention; only the cache differs. Bytes are those of these two "
        "signals a supervised row, before compression.", _budget,
    ),
    "Sinks": (
        ("losses", "sinks"), "Visual places that receive more than the mean and one standard deviation in more than half of the "
        "pictures, as the cache of all signals shows them. Of visual tokens in causal order the first receive more for that alone; "
        "where text looks is no matter of order. Below: what is done against sinks, beside the same loss without it.", _sinks,
    ),
    "Where students look": (
        ("losses",), "Likeness to the teacher's gaze on held-out pictures, mean over words, of one seed: what the page shows.",
        _gaze,
    ),
}  # fmt: skip


def tables(stored: Mapping[str, Any], scoring: Scoring = DRAWN) -> str:
    """All tables of which something was run.

    Args:
        stored: ``training`` (the teacher's), ``teacher`` and ``blind`` (its scores), ``bytes_a_row`` by cache, ``sinks``
            (`count_sinks`), ``gaze`` (`write_gaze`), and ``results``, a job each.
    """
    found, lines = Results(stored, scoring), []
    if not stored["results"]:
        return ""
    for title, (parts, said, make) in TABLES.items():
        if found.has(*(name for name, arm in ARMS.items() if arm.part in parts)):
            lines += [f"### {title}", "", said, "", *make(found, stored)]
        if title == "Arms" and lines:
            lines += ["What helped, by a 95 % interval that does not hold 0:", "", *_verdicts(found)]
    return "\n".join([*lines, "### The teacher's training", "", *_teacher(found, stored)])


def in_order(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results by arm and seed, the last of each; those of arms that are no more are left out."""
    last = {(found["arm"], found["seed"]): found for found in results if found["arm"] in ARMS}
    names = list(ARMS)
    return [last[key] for key in sorted(last, key=lambda key: (names.index(key[0]), key[1]))]


def expected_hours(parts: Mapping[str, int], results: Sequence[Mapping[str, Any]], workers: int) -> float:
    """Hours that jobs will take.

    Args:
        parts: How many jobs of each part.
        results: Of those that are done; a part's own tell best how long it takes.
    """
    total = 0.0
    for part, jobs in parts.items():
        done = [found["seconds"] for found in results if ARMS[found["arm"]].part == part]
        steps = statistics.mean(arm.steps for arm in ARMS.values() if arm.part == part)
        # Measured on one core: 2.4 s a step of a student (8 with the teacher beside it), 3 minutes for the scores.
        total += jobs * (statistics.mean(done) if done else steps * (8.0 if part == "online" else 2.4) + 180)
    return total / workers / 3600


def write_page(page: Path, stored: Mapping[str, Any]) -> None:
    """Put the tables between the marks of a page."""
    text = page.read_text()
    page.write_text(text.replace(BEGIN + table_in(text, BEGIN, END) + END, BEGIN + tables(stored) + END))
