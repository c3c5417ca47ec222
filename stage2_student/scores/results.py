"""What models scored: stored as JSON, and laid out as rows of a table, the three that matter first. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from vlm_distill_cache.common.cache.document_rules import EVALUATION
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.rules import check, entries
from vlm_distill_cache.common.files.signed import read_signed
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.stage2_student.scores.metrics import Score, difference, paired_difference

SCORES = "evaluation.json"
# Name in the report, heading, factor to the printed unit. Those of the first are kept item by item.
HEADLINE = (
    ("likelihood", "captions by likelihood, %", 100),
    ("questions", "questions, exact match, %", 100),
    ("teacher/top1", "top-1 agrees with teacher, %", 100),
)
# What follows; a name with a slash at its end stands for the kinds of a headline, one without any for a heading.
DETAILS = (
    ("", "captions by likelihood, by kind", 100),
    ("likelihood/", "  ", 100),
    ("likelihood_per_token", "captions by likelihood per token, %", 100),
    ("", "captions by letter, %", 100),
    ("letters/mean", "  both orders", 100),
    ("letters/right_first", "  right caption is (A)", 100),
    ("letters/right_second", "  right caption is (B)", 100),
    ("letters/both_right", "  right in both orders", 100),
    ("letters/likelihood", "  by log p(A) against log p(B)", 100),
    ("letters/bias", "  share of A minus share of B", 100),
    ("letters/unparsed", "  not a letter", 100),
    ("", "questions, by kind", 100),
    ("questions/", "  ", 100),
    ("teacher/kl", "KL(teacher || student), nats/row", 1),
    ("attention/cosine", "answer attention, cosine", 1),
    ("attention/kl", "answer attention, KL, nats/row", 1),
)
_FEW = 10  # items, of which an interval tells little
MEMORISED = "Questions are scored on the training data itself"  # how the note about it begins
SCORES_MEMORISED = "so these scores include memorisation"  # of all the items, or of some
Outcome = Literal["both", "won", "lost", "neither"]
OUTCOMES: tuple[Outcome, ...] = ("both", "won", "lost", "neither")
Place = tuple[str, int]  # kind, and which of its items
PAIRED = tuple(name for name, _, _ in HEADLINE)


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """Scores by name; ``NAME/KIND`` is one kind's part of ``NAME``, which is their unweighted mean.

    Attributes:
        scores: Shares in [0, 1], except ``teacher/kl``, ``attention/kl`` (nats a row), ``attention/cosine``
            and ``letters/bias`` ([-1, 1]). What was not asked for is absent.
        items: Of the names in ``PAIRED``, each item's score by kind, so that two models can be compared item by item.
        unreadable: Of items that could not be read and are not scored: ``items`` (int), ``of`` (int, all there are) and
            ``reasons`` (the first ones); empty if there are none.
    """

    scores: Mapping[str, Score] = field(default_factory=dict)
    items: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    unreadable: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON written beside a student."""
        scores = {name: score.to_dict() for name, score in self.scores.items()}
        left_out = {"unreadable": dict(self.unreadable)} if self.unreadable else {}
        return {"scores": scores, "items": self.items, **left_out}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of ``to_dict``."""
        scores = {name: Score(**score) for name, score in stored["scores"].items()}
        return cls(scores=scores, items=stored.get("items", {}), unreadable=stored.get("unreadable", {}))


def read_scores(output: Path) -> dict[str, Any]:
    """The scores of a run by model, each as of `EvaluationReport.to_dict`.

    Raises:
        ConfigError: If they are lost or damaged.
    """
    try:
        stored = check(read_signed(output / SCORES), entries(EVALUATION, most=10), str(output / SCORES))
    except (FileNotFoundError, CacheFormatError) as error:
        raise ConfigError(
            f"{output / SCORES} is missing or damaged ({error}); run the same `distill run` command again: it scores again"
        ) from error
    return dict(stored)


class Row(NamedTuple):
    """One line of the table; without scores it is the heading of those below. ``name`` is the score's in the reports."""

    heading: str
    factor: int
    scores: tuple[Score | None, ...] = ()
    gain: Score | None = None
    name: str = ""


def table_rows(
    reports: Mapping[str, EvaluationReport], compared: tuple[str, str] | None = None
) -> tuple[list[Row], list[Row]]:
    """Headlines first, then details; details that no report has, or that are 0 in all, are left out.

    ``compared`` are the two models of which the headlines say what the second gains over the first.
    """
    known = set().union(*(report.scores for report in reports.values()))

    def row(name: str, heading: str, factor: int) -> Row:
        return Row(heading, factor, tuple(report.scores.get(name) for report in reports.values()), name=name)

    headlines = [
        row(*entry)._replace(gain=_gain(reports, compared, entry[0])) for entry in HEADLINE if entry[0] in known
    ]
    details: list[Row] = []
    titles: list[Row] = []  # the heading of the group, until one of its rows stands below it
    for name, heading, factor in DETAILS:
        if not name:
            titles = [Row(heading, factor)]
            continue
        parts = sorted(part for part in known if part.startswith(name)) if name.endswith("/") else []
        # A kind may be named by a cache: of its teacher, or of its data.
        found = [row(part, heading + one_line(part.removeprefix(name), limit=40), factor) for part in parts]
        found += [row(name, heading, factor)] if name in known else []
        # Of kinds, all 0 says that none was met; each other one may be of another sort of data.
        found = [entry for entry in found if name.endswith("/") or any(map(_says_something, entry.scores))]
        if found and heading.startswith("  "):
            details, titles = details + titles, []
        details += found
    return headlines, details


def _says_something(score: Score | None) -> bool:
    return score is not None and any((score.value, score.low, score.high))


def _gain(reports: Mapping[str, EvaluationReport], compared: tuple[str, str] | None, name: str) -> Score | None:
    before, after = (reports.get(model) for model in compared or ("", ""))
    return None if before is None or after is None else gain_of(after, before, name)


def gain_of(after: EvaluationReport, before: EvaluationReport, name: str) -> Score | None:
    """What one model scores more than another; item by item where both were scored on as many items of each kind."""
    if not (name in before.scores and name in after.scores):
        return None
    old, new = before.items.get(name, {}), after.items.get(name, {})
    if new and {kind: len(part) for kind, part in old.items()} == {kind: len(part) for kind, part in new.items()}:
        return paired_difference(new, old)
    return difference(after.scores[name], before.scores[name])


def other_items_note(teacher: EvaluationReport, student: EvaluationReport) -> str:
    """That a cache's teacher was scored on more or fewer items than a student, as a sentence; empty if it was not."""
    differs = [
        f"{heading.removesuffix(', %')}: {teacher.scores[name].items:,} items, here {student.scores[name].items:,}"
        for name, heading, _ in HEADLINE
        if name in teacher.scores.keys() & student.scores.keys()
        and teacher.scores[name].items != student.scores[name].items
    ]
    if not differs:
        return ""
    return (
        f"The teacher's own scores are of other items than the students' ({'; '.join(differs)}): they were stored when its cache "
        "was built, so that columns differ by the items, too"
    )


def outcomes(
    after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]
) -> dict[Outcome, list[Place]] | None:
    """Where the items of two reports stand, by kind and place; won: ``after`` has more.

    Returns:
        None where the two were not scored on as many items of each kind.
    """
    if {kind: len(items) for kind, items in after.items()} != {kind: len(items) for kind, items in before.items()}:
        return None
    found: dict[Outcome, list[Place]] = {"both": [], "won": [], "lost": [], "neither": []}
    for kind, items in after.items():
        for place, (new, old) in enumerate(zip(items, before[kind], strict=True)):
            equal: Outcome = "both" if new == 1 else "neither"
            found["won" if new > old else "lost" if new < old else equal].append((kind, place))
    return found


def format_score(score: Score | None, factor: int, *, sign: str = "") -> tuple[str, str]:
    """Value and interval as text, percent with one digit, else three; a dash and nothing where there is no score.

    ``factor`` converts to the printed unit; ``sign="+"`` shows a plus too. An interval of few items, or of items that are all
    alike, looks surer than it is: behind it stands of how many.
    """
    if score is None:
        return "-", ""
    value, low, high = (
        f"{factor * part:{sign}z.{1 if factor == 100 else 3}f}" for part in (score.value, score.low, score.high)
    )
    of = f" of {score.items:,}" if score.items < _FEW or score.low == score.high else ""
    return value, f"[{low}, {high}]{of}"


def render_table(reports: Mapping[str, EvaluationReport], compared: tuple[str, str] | None = None) -> str:
    """Lay reports out side by side as text, one column a model: value and 95 % interval."""
    headlines, details = table_rows(reports, compared)
    gains = any(row.gain for row in headlines)
    lines = [["", *map(one_line, reports), *(["gain"] if gains else [])]]
    for row in [*headlines, *([Row("", 1)] if headlines and details else []), *details]:
        cells = [" ".join(format_score(score, row.factor)).rstrip() for score in row.scores]
        cells += [" ".join(format_score(row.gain, row.factor, sign="+"))] if row.gain else []
        lines.append([row.heading, *cells, *[""] * (len(lines[0]) - 1 - len(cells))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
    )
