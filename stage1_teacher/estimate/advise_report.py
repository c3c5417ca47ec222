"""What ``teacher-cache advise`` shows: a table and a recommendation as text, and a page with the sizes against the errors.

The page is one file; no script, no font and no picture is fetched.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.printing import html_text, one_line, size_words
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.stage1_teacher.estimate.advise import FILTERED_ONLY, Advice, OptionSet, Recommendation
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS

TITLES = {
    "words": "what the teacher says, by presets and top-k of its logits",
    "attention": "where the teacher looks",
    "states": "the teacher's hidden states",
}
SHORT_RUN = (
    "so short a run ranks option sets whose scores differ by more than their intervals, and nothing else: longer training "
    "levels small differences, or makes them larger"
)
WIDTH, HEIGHT, LEFT, BELOW = 620, 340, 64, 44
LEAST_ERROR = 1e-6  # of the plot's scale; less is drawn there
STYLE = """
:root{color-scheme:light dark;--ink:#1c1917;--soft:#78716c;--line:#d6d3d1;--best:#0a7d6c}
@media(prefers-color-scheme:dark){:root{--ink:#f5f5f4;--soft:#a8a29e;--line:#44403c;--best:#5eead4}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);margin:0 auto;max-width:900px;padding:24px}
table{border-collapse:collapse}th,td{padding:3px 10px;border-top:1px solid var(--line);text-align:right}
th:first-child,td:first-child{text-align:left}pre{white-space:pre-wrap}svg{max-width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:var(--soft)}.best{fill:var(--best);font-weight:600}td.best{color:var(--best)}
"""


def advice_text(advice: Advice, scores: Mapping[str, Sequence[str]] | None = None) -> str:
    """The table for a terminal; ``*`` marks sets that no other set of their part beats.

    Args:
        advice: What was measured.
        scores: Of short students by the name of a logits set, a text each.
    """
    lines = [
        f"Advice for {advice.name}: {advice.samples} samples, about {advice.tokens} supervised tokens, from "
        f"{advice.probe} measured samples" + (f" ({advice.failed} could not be used)" if advice.failed else ""),
        *([f"  the first of these: {one_line(advice.reason)}"] if advice.failed else []),
        f"With the options given, the whole cache ({advice.store}) takes {size_words(advice.cache_bytes)}; of these "
        + "".join(f"{name} {size_words(max(size, 0))}, " for name, size in advice.signal_bytes.items())
        + f"projector, vision tower, processor and index {size_words(advice.side_bytes)}",
    ]
    for part in dict.fromkeys(found.part for found in advice.sets):
        shown = [found for found in advice.sets if found.part == part]
        head = "".join(f"{name:>16}" for name in ("bytes/token", "whole cache", *_columns(shown)))
        width = max(20, *(len(found.name) for found in shown))
        lines += ["", f"{part}: {TITLES[part]}", f"    {'':<{width}}{head}"]
        for found in shown:
            cells = "".join(f"{cell:>16}" for cell in _cells(found, _columns(shown)))
            given = "  (given)" if found.given else ""
            lines.append(f"  {'*' if found.best else ' '} {found.name:<{width}}{cells}{given}")
    lines += [
        "",
        "* no other set of its part has both fewer bytes and a smaller error. Gradient error as in the fidelity card: relative, "
        "of the logits' loss; for attention the sine between the gradients, for hidden states their relative error. bytes/token: "
        "all that the part adds on disk, a supervised token (a row of `cachectl inspect`, end token included); of few samples "
        "most of it are the descriptions of its files and shards, which inspect counts in its total alone.",
    ]
    if any(found.options.get("map_preset") in FILTERED_ONLY for found in advice.sets):
        lines.append(
            "map_preset blocks, compact and exact8 serve the sink-filtered loss, blocks and compact no other; "
            "exact serves all"
        )
    lines += [f"left out: {name}: {one_line(reason)}" for name, reason in advice.left_out.items()]
    if scores:
        lines += [
            "",
            "Short students, with 95 % intervals:",
            *(f"  {name:<20}{'; '.join(found)}" for name, found in scores.items()),
        ]
        lines.append(f"  ({SHORT_RUN})")
    return "\n".join(lines)


def _columns(sets: Sequence[OptionSet]) -> list[str]:
    return ["gradient error", *(["kept mass"] if any("kept_mass" in found.figures for found in sets) else [])]


def _cells(found: OptionSet, columns: Sequence[str]) -> list[str]:
    cells = [f"{found.token_bytes:.1f}", size_words(found.cache_bytes)]
    cells.append("-" if found.error is None else f"{found.error:.3g}")
    if "kept mass" in columns:
        kept = found.figures.get("kept_mass")
        cells.append("-" if kept is None else f"{kept:.5f}")
    return cells


def recommendation_text(
    found: Recommendation,
    command: str,
    *,
    budget: float | None,
    bound: float | None,
    advice: Advice,
    tolerated: float = 1.0,
    taken: str = "",
) -> str:
    """Why this choice, and the command that builds the cache.

    Args:
        tolerated: The share of samples that a build may fail to read.
        taken: The folder that was named for the cache, where that holds another one.
    """
    limits = [f"{size_words(budget)}"] if budget is not None else []
    limits += [f"a gradient error of {bound:g}"] if bound is not None else []
    asked = " and ".join(limits)
    error = "not measured" if found.error is None else f"{found.error:.3g}"
    size = f"{size_words(found.cache_bytes)}, gradient error {error}"
    if found.error is None and bound is not None:
        lines = [f"Whether anything keeps to {asked} was not measured; with the options given: {size}"]
    elif found.error is None:
        lines = [f"{'Within' if found.fits else 'Not within'} {asked}, with the options given: {size}"]
    elif found.fits:
        best = "fewest bytes, or 1 % more with a smaller error" if bound is not None else "smallest gradient error"
        lines = [f"Within {asked}, the {best}: {size}"]
    else:
        lines = [f"Nothing measured keeps to {asked}; the nearest is {size}"]
        if budget is not None and found.cache_bytes > budget:
            sizes = {name: size for name, size in advice.signal_bytes.items() if name != ANSWERS}
            largest = max(sizes, key=lambda name: sizes[name])
            less = ["fewer samples (--limit)"] if budget > advice.side_bytes else []
            less += [f"--signals without {largest} ({size_words(sizes[largest])})"] if len(sizes) > 1 else []
            fixed = f"{size_words(advice.side_bytes)} lie beside the shards, however few samples there are"
            lines.append(f"  {' or '.join(less)} would take less; {fixed}" if less else f"  {fixed}")
    if unseen := sorted({one.part for one in advice.sets} - {one.part for one in advice.sets if one.error is not None}):
        lines.append(
            f"  note: no sample of the probe has anything to compare of {', '.join(unseen)}: that was not measured, and "
            "stays as the options given say"
        )
    share = advice.failed / (advice.failed + advice.probe)
    if share > tolerated:
        enough = min(1.0, math.ceil(20 * share + 1) / 20)
        lines.append(
            f"  warning: {100 * share:.3g} % of the probe could not be used, and this build stops where more than "
            f"{100 * tolerated:.4g} % cannot (max_failed_share): mend the data, or add --set max_failed_share={enough:g}"
        )
    if not found.every_loss:
        lines.append(
            f"  note: map_preset={found.options['map_preset']} serves the sink-filtered loss only, for students with "
            "the map's own tokens"
        )
    if taken:
        lines.append(
            f"  note: {taken} holds a cache of other settings, so that another folder is named; `teacher-cache extend` adds "
            "signals, or finer ones, to it"
        )
    return "\n".join([*lines, f"Next: {command}"])


def cache_for(data: str, store: str) -> str:
    """A folder for the cache of some data, named after these."""
    name = re.sub(r"[^\w.-]+", "-", Path(data.rstrip("/")).stem).strip("-.")[:80]
    return f"build/cache/{name or 'data'}-{store}"


def free_place(cache: str) -> str:
    """A folder beside a cache that is not there yet."""
    places = (f"{cache.rstrip('/')}-{number}" for number in itertools.count(2))
    return next(place for place in places if not os.path.lexists(place))


def build_command(given: Mapping[str, Any], overrides: Sequence[str], chosen: Mapping[str, str]) -> str:
    """The `teacher-cache build` with the options of this command, and those that were chosen in place of others.

    Args:
        given: Values of the options shared with ``build``, by name.
        overrides: Those of ``--set``.
        chosen: Options of a build.
    """
    words = ["teacher-cache build"]
    words += [f"--{name} {quoted(str(value))}" for name, value in given.items() if value is not None]
    kept = [entry for entry in overrides if entry.partition("=")[0].strip() not in chosen]
    kept += [f"{name}={value}" for name, value in chosen.items()]
    return " ".join([*words, *(f"--set {quoted(entry)}" for entry in kept)])


def advice_page(advice: Advice, text: str) -> str:
    """The page: a plot a part, and the text."""
    plots = "".join(
        f"<h2>{html_text(part)}: {html_text(TITLES[part])}</h2>{_plot([s for s in advice.sets if s.part == part])}"
        for part in dict.fromkeys(found.part for found in advice.sets)
    )
    title = html_text(f"Advice for {advice.name}")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>"
        "<p>Bytes of the whole cache against the gradient error, both on logarithmic scales; option sets that no other beats "
        f"are joined.</p>{plots}<h2>Figures</h2><pre>{html_text(text)}</pre></body></html>\n"
    )


def _plot(sets: Sequence[OptionSet]) -> str:
    shown = [found for found in sets if found.error is not None]
    if not shown:
        return "<p>No sample of the probe has anything to compare.</p>"
    across = _scale([found.cache_bytes for found in shown], LEFT, WIDTH - 130)
    down = _scale([max(found.error or 0.0, LEAST_ERROR) for found in shown], HEIGHT - BELOW, 16)

    def place(found: OptionSet) -> tuple[float, float]:
        return across(found.cache_bytes), down(max(found.error or 0.0, LEAST_ERROR))

    best = sorted({place(found) for found in shown if found.best})
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in best)
    parts = [
        f'<line x1="{LEFT}" x2="{LEFT}" y1="8" y2="{HEIGHT - BELOW}" stroke="var(--line)"/>',
        f'<line x1="{LEFT}" x2="{WIDTH - 8}" y1="{HEIGHT - BELOW}" y2="{HEIGHT - BELOW}" stroke="var(--line)"/>',
        f'<polyline points="{path}" fill="none" stroke="var(--best)"/>',
    ]
    for edge, anchor in ((min, "start"), (max, "end")):
        size = edge(found.cache_bytes for found in shown)
        error = edge(max(found.error or 0.0, LEAST_ERROR) for found in shown)
        parts.append(f'<text x="{across(size):.1f}" y="{HEIGHT - 24}" text-anchor="{anchor}">{size_words(size)}</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{down(error) + 4:.1f}" text-anchor="end">{error:.2g}</text>')
    parts.append(f'<text x="{WIDTH // 2}" y="{HEIGHT - 6}" text-anchor="middle">bytes of the whole cache</text>')
    for found in shown:
        x, y = place(found)
        kind = ' class="best"' if found.best else ""
        label = html_text(found.name)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"{kind}><title>{label}</title></circle>')
        parts.append(
            f'<text x="{x + 6:.1f}" y="{y - 5:.1f}"{kind}>{html_text(" ".join(found.options.values()))}</text>'
        )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img">{"".join(parts)}</svg>'


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    low, high = math.log(min(values)), math.log(max(values))
    return lambda value: start + (end - start) * ((math.log(value) - low) / (high - low) if high > low else 0.5)


def advice_json(
    advice: Advice, found: Recommendation, command: str, scores: Mapping[str, Any] | None
) -> dict[str, Any]:
    """All of it as JSON."""
    recommendation = {
        "options": found.options, "cache_bytes": found.cache_bytes, "gradient_error": found.error, "fits": found.fits,
        "every_loss": found.every_loss, "command": command,
    }  # fmt: skip
    values = asdict(advice) | {"recommendation": recommendation}
    if scores is not None:
        values["students"] = {"scores": scores, "note": SHORT_RUN}
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]
