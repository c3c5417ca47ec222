"""One self-contained HTML page: loss curves, the table of scores, and where teacher and student look.

No script, no font and no picture is fetched: the page can be mailed, and opens from disk.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image

from vlm_distill_cache.common.files.atomic import write_bytes_atomic
from vlm_distill_cache.common.printing import html_text
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.scores.overlays import Overlay
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport, format_score, table_rows

COLOURS = ("#0a7d6c", "#c2410c", "#4f46e5", "#a16207", "#be185d", "#475569")
CHART_WIDTH, CHART_HEIGHT, MARGIN = 520, 240, 44
STYLE = """
:root{color-scheme:light dark;--ink:#1c1917;--soft:#78716c;--line:#e7e5e4;--page:#fafaf9;--card:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#f5f5f4;--soft:#a8a29e;--line:#44403c;--page:#1c1917;--card:#292524}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;max-width:1160px;padding:24px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:36px 0 10px}p{margin:4px 0 12px;color:var(--soft);max-width:75ch}
.row{display:flex;flex-wrap:wrap;gap:16px}.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px}
svg{display:block;max-width:100%;height:auto}table{border-collapse:collapse;background:var(--card);border:1px solid var(--line)}
th,td{padding:5px 12px;border-top:1px solid var(--line);text-align:right;font-variant-numeric:tabular-nums}
th{border-top:0}th:first-child,td:first-child{text-align:left;white-space:pre}td small{color:var(--soft)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:0}dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
figure{margin:0}figcaption{color:var(--soft);font-size:13px;margin-bottom:4px}img{image-rendering:pixelated;border-radius:4px;max-width:100%}
.said{margin:0 0 8px;color:var(--ink)}.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin:0 5px 0 14px}
text{font:11px system-ui,sans-serif;fill:var(--soft)}
"""


def render_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    evaluations: Mapping[str, EvaluationReport],
    compared: tuple[str, str] | None = None,
    overlays: Sequence[Overlay] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    ``curves`` are the logged steps of each run (``read_log``); ``compared`` are the two models of which the table
    says what the second gains over the first; ``notes`` are what the scores do not tell.
    """
    known = "".join(f"<dt>{html_text(name)}</dt><dd>{html_text(value)}</dd>" for name, value in facts.items())
    colours = {run: COLOURS[index % len(COLOURS)] for index, run in enumerate(curves)}
    charts = "".join(
        f'<div class="card"><figcaption>loss: {html_text(name)}</figcaption>{_chart(series, colours)}</div>'
        for name, series in _loss_series(curves).items()
    )
    parts = [
        f"<h1>{html_text(title)}</h1>",
        f'<div class="card"><dl>{known}</dl></div>',
        "<h2>Scores</h2>",
        "<p>Value and 95 % bootstrap interval over items. Kinds are averaged without weights; what is 0 for all is left out.</p>",
        *(f"<p><b>{html_text(note)}</b></p>" for note in notes),
        _table(evaluations, compared) if evaluations else "<p>No evaluation was run.</p>",
        "<h2>Training</h2>",
        f"<p>Running means. {_legend(colours)}</p>" if curves else "<p>No training log was found.</p>",
        f'<div class="row">{charts}</div>',
    ]
    if overlays:
        parts += [
            "<h2>Where teacher and student look</h2>",
            "<p>The same picture and the same answer word. The teacher's map comes from the cache. "
            "Red is where most of the attention on the image goes; each map has its own scale.</p>",
            f'<div class="row">{"".join(map(_figure, overlays))}</div>',
        ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html_text(title)}</title><style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    write_bytes_atomic(path, page.encode())


def _loss_series(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By loss term: by run: (step, running mean) points."""
    series: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for run, records in curves.items():
        for term in ("total", *LossWeights.names()):
            points = [(float(r["step"]), float(r[term])) for r in records if isinstance(r.get(term), int | float)]
            points = [point for point in points if math.isfinite(point[1])]
            if points:
                series.setdefault(term, {})[run] = _smooth(points)
    return series


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Trailing means over a fortieth of the run, at most 200 points."""
    window = max(1, len(points) // 40)
    means = []
    total = 0.0
    for index, (step, value) in enumerate(points):
        total += value - (points[index - window][1] if index >= window else 0.0)
        means.append((step, total / min(index + 1, window)))
    return means[:: max(1, len(means) // 200)]


def _chart(series: Mapping[str, list[tuple[float, float]]], colours: Mapping[str, str]) -> str:
    """A line chart as SVG."""
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points]
    left, right, low, high = min(steps), max(steps), min(0.0, *values), max(values)
    width, height = CHART_WIDTH - 2 * MARGIN, CHART_HEIGHT - 2 * MARGIN

    def place(step: float, value: float) -> tuple[float, float]:
        x = MARGIN + width * (step - left) / max(right - left, 1e-9)
        return x, MARGIN + height * (1 - (value - low) / max(high - low, 1e-9))

    lines = []
    for share in (0.0, 0.5, 1.0):
        level = low + share * (high - low)
        y = place(left, level)[1]
        lines.append(
            f'<line x1="{MARGIN}" x2="{MARGIN + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
            f'<text x="{MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{level:.3g}</text>'
        )
    for step, anchor in ((left, "start"), (right, "end")):
        x = place(step, low)[0]
        lines.append(f'<text x="{x:.1f}" y="{CHART_HEIGHT - 14}" text-anchor="{anchor}">step {step:.0f}</text>')
    for run, points in series.items():
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colours[run]}" stroke-width="1.8"/>')
    return f'<svg viewBox="0 0 {CHART_WIDTH} {CHART_HEIGHT}" width="{CHART_WIDTH}" role="img">{"".join(lines)}</svg>'


def _legend(colours: Mapping[str, str]) -> str:
    return "".join(
        f'<span class="key" style="background:{colour}"></span>{html_text(run)}' for run, colour in colours.items()
    )


def _table(evaluations: Mapping[str, EvaluationReport], compared: tuple[str, str] | None) -> str:
    headlines, details = table_rows(evaluations, compared)
    gains = any(row.gain for row in headlines)
    head = "".join(f"<th>{html_text(name)}</th>" for name in [*evaluations, *(["gain"] if gains else [])])
    rows = []
    for row in [*headlines, *details]:
        cells = [_cell(*format_score(score, row.factor)) for score in row.scores]
        cells += [_cell(*format_score(row.gain, row.factor, sign="+"))] if row.gain else []
        cells += ["<td></td>"] * (len(evaluations) + gains - len(cells))
        rows.append(f"<tr><td>{html_text(row.heading)}</td>{''.join(cells)}</tr>")
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _cell(value: str, interval: str) -> str:
    return f"<td>{value} <small>{interval}</small></td>" if interval else f"<td>{value}</td>"


def _figure(overlay: Overlay) -> str:
    pictures = "".join(
        f"<figure><figcaption>{caption}</figcaption>{_image(picture, caption)}</figure>"
        for caption, picture in (("image", overlay.picture), ("teacher", overlay.teacher), ("student", overlay.student))
    )
    said = f"{html_text(overlay.text)} <b>{html_text(overlay.word)}</b> <small>({html_text(overlay.sample_id)})</small>"
    return f'<div class="card"><p class="said">{said}</p><div class="row">{pictures}</div></div>'


def _image(picture: PIL.Image.Image, caption: str) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{caption}" width="{picture.width}" src="data:image/png;base64,{data}">'
