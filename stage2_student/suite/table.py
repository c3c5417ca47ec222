"""The scores of a suite as text: what each benchmark is known by first, then all else that was counted."""

from collections.abc import Mapping, Sequence
from typing import Any

from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.results import format_score
from vlm_distill_cache.stage2_student.scores.token_words import CHANGES

MOST_KINDS = 16  # subsets of a benchmark; MME has 14
MOST_OTHERS = 8


def render_suite(summary: Mapping[str, Any]) -> str:
    """Lay out what `summary.json` holds: value and 95 % interval, percent where the factor is 100; and the notes.

    Kinds are shown of the headlines alone, and of other measures the first that differ.
    """
    benchmarks: Mapping[str, Mapping[str, Any]] = summary["benchmarks"]
    heads = [["", "scored", "score", one_line(summary["student"]["name"], limit=40), "95 %"]]
    for name, entry in benchmarks.items():
        measures = entry["measures"][:1] or [
            {"heading": "no score: " + ("its files hold no answers" if entry["items"] else "no item was asked")}
        ]
        heads += [[one_line(name, limit=40), f"{entry['scored']:,}", *_cells(measures[0])]]
    details: list[list[str]] = []
    for name, entry in benchmarks.items():
        rows = _details(entry["measures"])
        details += [[one_line(name, limit=40), "", ""], *rows] if rows else []
    rest = "all other measures: in summary.json and on the page" if details else ""
    tokens = [f"note: {one_line(said)}" for name in CHANGES if (said := summary["student"].get(name))]
    notes = "\n".join([*tokens, *notes_of(summary)])
    parts = [laid_out(heads, right=(1, 3)), laid_out(details, right=(1,)), rest, notes]
    return "\n\n".join(part for part in parts if part)


def _details(measures: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The kinds of the headline under its name, then other scores as a whole."""
    if not measures:
        return []
    own = f"{measures[0]['name']}/"
    # A kind that all items are of says nothing new.
    kinds = [each for each in measures if each["name"].startswith(own) and each["units"] != measures[0]["units"]]
    rows = [[f"  {one_line(measures[0]['heading'], limit=60)}, by kind:", "", ""]] if kinds else []
    rows += [["    " + heading, *cells] for heading, *cells in map(_cells, kinds[:MOST_KINDS])]
    if len(kinds) > MOST_KINDS:
        rows.append([f"    and {len(kinds) - MOST_KINDS:,} more kinds", "", ""])
    unread = (
        next((each["value"] for each in measures if each["name"] == "unparsed"), None) == 1
    )  # then letters say nothing
    others = [
        measure
        for measure in measures[1:]
        if "/" not in measure["name"]
        and measure["value"] is not None
        and not (unread and measure["name"].startswith("letter"))
    ]
    for heading, *cells in map(_cells, others[:MOST_OTHERS]):
        rows.append(["  " + heading, *cells])
    return rows


def render_outlook(planned: Mapping[str, Any]) -> str:
    """What a dry run says: a line a benchmark, and the notes."""
    lines = [["", "items", "generated", "weighed", "to ask", "what it is"]]
    for name, entry in planned["benchmarks"].items():
        counts = [f"{entry[key]:,}" for key in ("items", "generated", "weighed", "to_ask")]
        lines.append([one_line(name, limit=40), *counts, one_line(entry["title"])])
    head = f"{one_line(planned['student'])} would be asked:"
    columns = (
        "generated: questions that are answered in words; weighed: given answers whose likelihood is taken; to ask: items whose "
        "results are not there yet"
    )
    table = laid_out(lines, right=(1, 2, 3, 4))
    return "\n".join([head, table, columns, "", *notes_of(planned), "Dry run: nothing was written"])


def notes_of(summary: Mapping[str, Any]) -> list[str]:
    """What the scores do not tell, a line each: items that are not scored, files that were not read."""
    notes = []
    if summary["limit"] is not None:
        notes.append(f"note: at most {summary['limit']:,} items of each benchmark, of its kinds in turn (--limit)")
    for name, entry in summary["benchmarks"].items():
        left = entry["left_out"]
        if left["items"]:
            reasons = "; ".join(one_line(why) for why in left["reasons"][:2])
            are = "is" if left["items"] == 1 else "are"
            notes.append(
                f"note: {one_line(name)}: {left['items']:,} of {entry['of']:,} items {are} not scored: {reasons}"
            )
        notes += [f"note: {one_line(name)}: {one_line(note)}" for note in entry["notes"]]
    notes += [f"note: {one_line(note)}" for note in summary.get("notes", ())]
    notes += [f"not read: {one_line(file)}: {why}" for file, why in summary["unread"].items()]
    return notes


def _cells(measure: Mapping[str, Any]) -> tuple[str, str, str]:
    """Heading, value, interval."""
    heading = one_line(measure["heading"], limit=60)
    if measure.get("value") is None:
        return heading, "-", ""
    found = Score(value=measure["value"], low=measure["low"], high=measure["high"], items=measure["units"])
    return heading, *format_score(found, measure["factor"])


def laid_out(lines: Sequence[Sequence[str]], *, right: Sequence[int]) -> str:
    """Lines of cells in columns, those of ``right`` to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)] if lines else []
    return "\n".join(
        "  ".join(
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
