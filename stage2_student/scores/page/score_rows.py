"""Scores of some models as bars and as a table."""

from collections.abc import Mapping, Sequence

from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.page.charts import Group
from vlm_distill_cache.stage2_student.scores.page.elements import table, with_interval, words
from vlm_distill_cache.stage2_student.scores.results import (
    DETAILS,
    HEADLINE,
    EvaluationReport,
    Row,
    format_score,
    table_rows,
)


def score_groups(reports: Mapping[str, EvaluationReport]) -> list[Group]:
    """Bars: the headlines, then what stands below each heading of the details."""
    headlines, details = table_rows(reports)
    units = {100: [row for row in headlines if row.factor == 100], 1: [row for row in headlines if row.factor != 100]}
    groups = [
        Group("the three that matter first, %", factor, _bar_rows(rows)) for factor, rows in units.items() if rows
    ]
    alone = {heading for name, heading, _ in (*HEADLINE, *DETAILS) if name and not name.endswith("/")}
    heading = ""
    for row in details:
        if not row.scores:
            heading = row.heading
        elif row.heading in alone and not row.heading.startswith(" "):
            groups.append(Group("", row.factor, _bar_rows([row])))
        elif groups and groups[-1].heading == heading:
            groups[-1] = groups[-1]._replace(rows=[*groups[-1].rows, *_bar_rows([row])])
        else:
            groups.append(Group(heading, row.factor, _bar_rows([row])))
    return groups


def _bar_rows(rows: Sequence[Row]) -> list[tuple[str, Sequence[Score | None]]]:
    return [(row.heading, row.scores) for row in rows]


def score_table(rows: Sequence[Row], models: Sequence[str]) -> str:
    """All scores as numbers."""
    gains = any(row.gain for row in rows)
    lines = []
    for row in rows:
        cells = [with_interval(*format_score(score, row.factor)) for score in row.scores]
        cells += [with_interval(*format_score(row.gain, row.factor, sign="+"))] if row.gain else []
        lines.append([words(row.heading), *cells, *[""] * (len(models) + gains - len(cells))])
    shown = table(["", *models, *(["gain"] if gains else [])], lines)
    return f"<details open><summary>All scores as a table</summary>{shown}</details>"
