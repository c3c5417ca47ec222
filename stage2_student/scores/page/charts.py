"""Bars with intervals, and curves on a linear axis, on a log axis and as a table. Numbers in, HTML out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.page.elements import colour, keys, table, tabs, words
from vlm_distill_cache.stage2_student.scores.results import HEADLINE, format_score

_WIDTH, _HEIGHT = 500, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 20, 14, 32  # around the curves, for numbers at phone size
_MOST_POINTS = 200  # of a curve
_TABLE_ROWS = 12
_UNNAMED = 3  # bars below one name that colours alone tell apart
Points = Sequence[tuple[float, float]]


class Group(NamedTuple):
    """Bars below one heading: of each row its name and a score a model, None where it has none.

    ``factor`` leads to the printed unit: 100 for shares in percent.
    """

    heading: str
    factor: int
    rows: Sequence[tuple[str, Sequence[Score | None]]]


def bars(groups: Sequence[Group], models: Sequence[str]) -> str:
    """Bars of all models below each name, with their intervals; shares lie between 0 and 100 %, others as far as they go.

    Where there are many models, each bar has its model's name before it.
    """
    parts, each = [], len(models) > _UNNAMED
    for group in groups:
        known = [score for _, scores in group.rows for score in scores if score is not None]
        if not known:
            continue
        ends = [end for score in known for end in (score.low, score.high, score.value)]
        low = min(0.0, *ends)
        high = max(1.0 if group.factor == 100 and min(ends) >= 0 else 0.0, *ends)
        parts.append(f"<h3>{words(group.heading)}</h3>")  # an empty one is a gap
        for name, scores in group.rows:
            if each and any(scores):
                parts.append(f'<span class="of">{words(name.strip(), 60)}</span>')
            for place, score in enumerate(scores):
                if score is not None:
                    first = all(before is None for before in scores[:place])
                    value, interval = format_score(score, group.factor)
                    called = models[place] if each else name.strip() if first else ""
                    parts.append(
                        f'<span class="name">{words(called, 60)}</span>'
                        f"{_bar(score, low, high, place, models[place])}"
                        f'<span class="num">{value} <small>{interval}</small></span>'
                    )
    return f'<p>{keys(models)}</p><div class="bars">{"".join(parts)}</div>' if parts else ""


def _bar(score: Score, low: float, high: float, place: int, model: str) -> str:
    def at(value: float) -> float:
        return 100 * (value - low) / max(high - low, 1e-12)

    left, right = sorted((at(0.0), at(score.value)))
    return (
        f'<span class="track" title="{words(model, 60)}">'
        f'<i style="left:{left:.2f}%;width:{right - left:.2f}%;background:{colour(place)}"></i>'
        f'<u style="left:{at(0.0):.2f}%"></u>'
        f'<b style="left:{at(score.low):.2f}%;width:{at(score.high) - at(score.low):.2f}%"></b></span>'
    )


def curves(group: str, logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Running means of all losses of some runs, in three views; ``group`` is unique on the page, ``logs`` as of `read_log`."""
    series = {f"loss: {term}": of for term, of in _loss_series(logs).items()}
    if not series:
        return "<p>No training log was found.</p>"
    return _views(group, series, {run: _breaks(records) for run, records in logs.items()})


def scored_on_the_way(group: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The headline scores of students while they trained, in three views; ``runs`` as of `read_evaluations`."""
    series = {}
    for name, heading, factor in HEADLINE:
        found = {
            run: [
                (float(line["step"]), factor * float(line["scores"][name]["value"]))
                for line in lines
                if name in line["scores"]
            ]
            for run, lines in runs.items()
        }
        series[heading] = {run: points for run, points in found.items() if points}
    series = {heading: of for heading, of in series.items() if of}
    return _views(group, series, {run: [] for run in runs}) if series else ""


def _views(group: str, series: Mapping[str, Mapping[str, Points]], breaks: Mapping[str, Sequence[float]]) -> str:
    """Charts of some series by their titles, of each the points by run; ``breaks`` are the steps to mark of each run."""
    places = {run: place for place, run in enumerate(breaks)}
    panes = {
        view: "".join(_card(title, _chart(of, places, breaks, log=log)) for title, of in series.items())
        for view, log in {"linear axis": False, "log axis": True}.items()
    } | {"table": "".join(_card(title, _table(of)) for title, of in series.items())}
    return f"<p>{keys(list(breaks))}</p>" + tabs(
        group, {view: f'<div class="row">{pane}</div>' for view, pane in panes.items()}
    )


def _card(title: str, content: str) -> str:
    return f'<div class="card"><figcaption>{words(title)}</figcaption>{content}</div>'


def _loss_series(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Points]]:
    """By loss term: by run: (step, running mean) points."""
    series: dict[str, dict[str, Points]] = {}
    for run, records in logs.items():
        for term in ("total", *LossWeights.names()):
            points = [(float(r["step"]), float(r[term])) for r in records if isinstance(r.get(term), int | float)]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                series.setdefault(term, {})[run] = _smooth(points)
    return series


def _breaks(records: Sequence[Mapping[str, Any]]) -> list[float]:
    """The steps with which another phase begins."""
    pairs = itertools.pairwise(records)
    return [float(after["step"]) for before, after in pairs if before.get("phase") != after.get("phase")]


def _smooth(points: Points) -> Points:
    """Trailing means over a fortieth of the run, at most `_MOST_POINTS` of them, the last one among them."""
    window = max(1, len(points) // 40)
    means = []
    total = 0.0
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        means.append((step, total / min(index + 1, window)))
    return means[:: -max(1, math.ceil(len(means) / _MOST_POINTS))][::-1]


def _chart(
    series: Mapping[str, Points], places: Mapping[str, int], breaks: Mapping[str, Sequence[float]], *, log: bool
) -> str:
    """A line chart as SVG; on a log axis what is not above zero is left out."""
    shown = {run: [point for point in points if point[1] > 0 or not log] for run, points in series.items()}
    steps = [step for points in shown.values() for step, _ in points]
    values = [value for points in shown.values() for _, value in points]
    if not values:
        return "<p>Nothing above zero.</p>"
    left, right = min(steps), max(steps)
    low, high = (min(values), max(values)) if log else (min(0.0, *values), max(values))
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def level(value: float) -> float:
        return math.log(value) if log else value

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + width * (step - left) / max(right - left, 1e-9)
        return x, _TOP + height * (1 - (level(value) - level(low)) / max(level(high) - level(low), 1e-9))

    lines = []
    for share in (0.0, 0.5, 1.0):
        value = low * (high / low) ** share if log else low + share * (high - low)
        y = _TOP + height * (1 - share)
        lines.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        )
    for step, anchor in ((left, "start"), (right, "end")):
        x = place(step, low)[0]
        lines.append(f'<text x="{x:.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">step {step:.0f}</text>')
    for run, points in shown.items():
        for step in (step for step in breaks[run] if left < step < right):
            x = place(step, low)[0]
            lines.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_TOP + height}" stroke="{colour(places[run])}"'
                ' stroke-dasharray="2 4"/>'
            )
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour(places[run])}" stroke-width="1.8">'
            f"<title>{words(run, 60)}</title></polyline>"
        )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="curves">{"".join(lines)}</svg>'
    )


def _table(series: Mapping[str, Points]) -> str:
    """A dozen steps of each curve, the first and the last among them."""
    steps = sorted({step for points in series.values() for step, _ in points})
    each = max(1, math.ceil(len(steps) / _TABLE_ROWS))
    chosen = sorted({*steps[::each], steps[-1]})
    rows = [[f"{step:.0f}", *(_at(points, step) for points in series.values())] for step in chosen]
    return table(["step", *series], rows)


def _at(points: Points, step: float) -> str:
    """The last mean up to a step, while the curve goes on."""
    if not points or points[-1][0] < step:
        return "-"
    return next((f"{value:.4g}" for at, value in reversed(points) if at <= step), "-")
