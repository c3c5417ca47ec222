"""The page of published benchmarks: what a suite's folder holds, of one model or of several side by side."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import read_bounded, read_json
from vlm_distill_cache.common.files.rules import FLAG, Rule, check, entries, items, maybe, number, record, text, whole
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.page.charts import Group, bars
from vlm_distill_cache.stage2_student.scores.page.elements import (
    facts,
    legend,
    sections,
    table,
    with_interval,
    words,
    write_page,
)
from vlm_distill_cache.stage2_student.scores.page.legends import INTERVAL, PAIRED, verdict
from vlm_distill_cache.stage2_student.scores.results import format_score
from vlm_distill_cache.stage2_student.suite.legends import explain_measures
from vlm_distill_cache.stage2_student.suite.measures import Measure, gain
from vlm_distill_cache.stage2_student.suite.metrics.captions import METRICS as OF_CAPTIONS

SUMMARY, MEASURES, RESULTS, PAGE = "summary.json", "measures.json", "results.jsonl", "report.html"
_AGAIN = "run the same `distill suite` command again: it counts again what was answered"
_NO_GAIN = "A dash: none is defined, since the two were asked different items or have different subsets."
_WINS = {
    "unit": "What is counted, and drawn again for intervals: an item by its id, or items that belong together, as questions about "
    "one picture or all turns of one question.",
    "better": "Units that add more to this score. A unit that does not count with one of the two (for F1: where yes was neither "
    "said nor right) is in none of the numbers.",
    "said": "What was generated about the unit, where that is what the score counts; likelihoods have no such text.",
}
_SHOWN = 6  # units of each outcome
_MOST_BYTES = 1 << 30
_LARGEST = 1e12
_NUMBER, _COUNT, _WORDS = number(-_LARGEST, _LARGEST), whole(0, 1 << 40), text(1 << 16)
_MEASURE = record(
    {
        "name": _WORDS,
        "heading": _WORDS,
        "factor": _COUNT,
        "gains": maybe(FLAG),
        "units": _COUNT,
        "mean_of": _COUNT,
        **dict.fromkeys(("value", "low", "high"), maybe(_NUMBER)),
    },
    free=True,
)
_BENCHMARK = record(
    {
        **dict.fromkeys(("layout", "title", "metric", "instruction", "fingerprint"), _WORDS),
        "items": _COUNT,
        "notes": items(_WORDS, most=1000),
        "seconds": _NUMBER,
        "left_out": record({"items": _COUNT, "reasons": items(_WORDS, most=1000)}, free=True),
        "measures": items(_MEASURE, most=100_000),
    },
    free=True,
)
_SUMMARY = record(
    {
        "format": whole(1, 1),
        "student": record({"name": _WORDS}, free=True),
        "prompts": _WORDS,
        "limit": maybe(_COUNT),
        "files": record({"benchmarks": _WORDS, **dict.fromkeys(("images", "only"), items(_WORDS, most=10_000))}),
        "benchmarks": entries(_BENCHMARK, most=10_000),
        "unread": entries(_WORDS, most=1 << 20),
    },
    free=True,
)
# A look at each number would take a minute for the largest benchmarks.
_COUNTS = Rule(
    f"a list of numbers up to {_LARGEST:g}",
    lambda value: (
        isinstance(value, list)
        and {*map(type, value)} <= {int, float}
        and -_LARGEST <= min(value, default=0) <= max(value, default=0) <= _LARGEST
    ),
)
_UNIT_NAMES = Rule("a list of texts", lambda value: isinstance(value, list) and {*map(type, value)} <= {str})
_DIGESTS = Rule("texts by id", lambda value: isinstance(value, dict) and {*map(type, value.values())} <= {str})
_UNITS = record(
    {
        "asked": _DIGESTS,
        "measures": items(
            record(
                {
                    "name": _WORDS,
                    "heading": _WORDS,
                    "factor": _COUNT,
                    "gains": maybe(FLAG),
                    "summed": FLAG,
                    "units": _UNIT_NAMES,
                    "hits": _COUNTS,
                    "of": _COUNTS,
                    "parts": items(_WORDS, most=100_000),
                },
                free=True,
            ),
            most=100_000,
        ),
    },
    {"groups": _DIGESTS},  # by item; suites of before have none
    free=True,
)


@dataclass(frozen=True)
class SuiteOutput:
    """What `distill suite` left in a folder."""

    path: Path
    _read_before: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """What ``summary.json`` says.

        Raises:
            ConfigError: It is missing or damaged.
        """
        path = self.path / SUMMARY
        found = _read(path, _SUMMARY)
        if strange := [name for name in found["benchmarks"] if name in (".", "..") or Path(name).name != name]:
            raise ConfigError(f"{path}: {strange[0]!r} is no name of a benchmark; {_AGAIN}")
        return found

    def measures(self, benchmark: str) -> dict[str, Measure]:
        """The measures of a benchmark unit by unit, by name: those of ``summary.json``.

        Raises:
            ConfigError: They are missing or damaged.
        """
        path = self.path / benchmark / MEASURES
        known = {part.name for part in dataclasses.fields(Measure)}
        stored = self._unit_by_unit(benchmark)["measures"]
        measures = [Measure(**{key: value for key, value in one.items() if key in known}) for one in stored]
        found = {measure.name: measure for measure in measures}
        for one in measures:
            counts = {len(one.units), len(set(one.units)), len(one.hits), len(one.of)}
            if len(counts) > 1 or any(part not in found or found[part].parts for part in one.parts):
                raise ConfigError(f"{path}: {one.name}: units, hits, of and parts do not belong together; {_AGAIN}")
        told = [one["name"] for one in self.summary["benchmarks"][benchmark]["measures"]]
        if odd := sorted(found.keys() ^ {*told}):
            raise ConfigError(f"{path}: holds other measures than {SUMMARY} ({odd[0]}); {_AGAIN}")
        return found

    def asked(self, benchmark: str) -> dict[str, str]:
        """The items that a benchmark's scores count, by id: a hash of their texts and right answers.

        Raises:
            ConfigError: They are missing or damaged.
        """
        asked: dict[str, str] = self._unit_by_unit(benchmark)["asked"]
        return asked

    def _unit_by_unit(self, benchmark: str) -> dict[str, Any]:
        if benchmark not in self._read_before:
            self._read_before.clear()  # the largest hold 200,000 items
            self._read_before[benchmark] = _read(self.path / benchmark / MEASURES, _UNITS)
        return self._read_before[benchmark]

    def answers(self, benchmark: str, units: Sequence[str]) -> dict[str, str]:
        """What was generated about some units, several answers behind each other; empty where none was."""
        wanted, groups = set(units), self._unit_by_unit(benchmark).get("groups", {})
        found: dict[str, list[str]] = {}
        try:
            lines = read_bounded(self.path / benchmark / RESULTS, max_bytes=_MOST_BYTES).splitlines()
        except (FileNotFoundError, CacheFormatError):
            return {}
        for line in lines:
            try:
                entry = json.loads(line)
                item = entry.get("item")
                said = [text or "(nothing)" for text in entry.get("results", ()) if isinstance(text, str)]
                if said and (item in wanted or groups.get(item) in wanted):
                    whose = "" if item in wanted else f"{item}: "
                    found.setdefault(item if item in wanted else groups[item], []).append(whose + " / ".join(said))
            except (ValueError, AttributeError, TypeError):  # a line that somebody has damaged shows nothing
                continue
        return {unit: "; ".join(said) for unit, said in found.items()}


def _read(path: Path, rule: Rule) -> dict[str, Any]:
    try:
        found: dict[str, Any] = check(read_json(path, max_bytes=_MOST_BYTES), rule, str(path), remedy=_AGAIN)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} is missing; {_AGAIN}") from error
    except CacheFormatError as error:
        said = str(error)
        raise ConfigError(said if said.endswith(_AGAIN) else f"{said}; {_AGAIN}") from error
    return found


def write_suite_page(output: Path) -> Path:
    """Write the page of a suite's folder beside its ``summary.json``.

    Returns:
        Where it is.

    Raises:
        ConfigError: ``summary.json`` is missing or damaged.
    """
    found = SuiteOutput(output)
    name = found.summary["student"]["name"]
    title = f"{name} on published benchmarks"
    write_page(output / PAGE, title, [f"<h1>{words(title)}</h1>", *sections(suite_parts({name: found}, {}))])
    return output / PAGE


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A model beside the first one, on one benchmark.

    Attributes:
        gains: What it scores more, by measure, on the units that both have; None where that is not defined. Empty: the two
            were asked different things under one name.
        note: What a reader of the gains, or of their lack, must know; empty: nothing.
    """

    gains: Mapping[str, Score | None]
    note: str = ""


Comparisons = Mapping[str, Mapping[str, Beside]]  # by benchmark and model


def compare_suites(outputs: Mapping[str, SuiteOutput]) -> dict[str, dict[str, Beside]]:
    """Each model but the first beside the first, on the benchmarks that both were asked; by benchmark and model."""
    (first_name, first), *others = outputs.items()
    found: dict[str, dict[str, Beside]] = {}
    for benchmark, entry in first.summary["benchmarks"].items():
        for name, output in others:
            if (
                benchmark in output.summary["benchmarks"]
                and entry["measures"]
                and _entry(output, benchmark)["measures"]
            ):
                same, note = _sameness(first, output, benchmark)
                after, before = (output.measures(benchmark), first.measures(benchmark)) if same else ({}, {})
                gains = {
                    measure: gain(after[measure], before[measure], (after, before))
                    for measure in after
                    if measure in before
                }
                told = f"{benchmark}, {name} against {first_name}: {note}{'' if same else ': no gain is told'}"
                found.setdefault(benchmark, {})[name] = Beside(gains=gains, note=told if note else "")
    return found


def _sameness(first: SuiteOutput, output: SuiteOutput, benchmark: str) -> tuple[bool, str]:
    """Whether what two models were asked under one id is the same, and what of it must be known."""
    here, there = _entry(first, benchmark), _entry(output, benchmark)
    if here["metric"] != there["metric"]:
        return False, f"answers were counted as {there['metric']}, not as {here['metric']}"
    ours, theirs = first.asked(benchmark), output.asked(benchmark)
    shared = ours.keys() & theirs.keys()
    if not shared:
        return False, f"they were asked different items ({next(iter(theirs))}; {next(iter(ours))})"
    if changed := sorted(item for item in shared if ours[item] != theirs[item]):
        return False, (
            f"{len(changed):,} of {len(shared):,} items that have the same id differ in their texts or right answers "
            f"(the first: {changed[0]})"
        )
    notes = []
    if ours.keys() != theirs.keys():
        counts = f"{len(theirs):,} and {len(ours):,}"
        notes.append(f"gains are over the {len(shared):,} items that both were asked, of {counts}")
    if here["instruction"] != there["instruction"] and first.summary["prompts"] == output.summary["prompts"]:
        asked = (repr(of["instruction"]) if of["instruction"] else "nothing" for of in (there, here))
        notes.append("behind each question stood {}, not {}".format(*asked))
    return True, "; ".join(notes)


def notes_of(outputs: Mapping[str, SuiteOutput], compared: Comparisons) -> list[str]:
    """What a reader of the gains between suites must know."""
    (first_name, first), *others = outputs.items()
    prompts = first.summary["prompts"]
    notes = [
        f"{name} was asked with --prompts {output.summary['prompts']}, {first_name} with {prompts}: gains are those of both, the "
        "model and the prompts"
        for name, output in others
        if output.summary["prompts"] != prompts
    ]
    known = first.summary["benchmarks"].keys()
    apart = [name for name, output in others if not known & output.summary["benchmarks"].keys()]
    notes += [f"{name} and {first_name} have no benchmark in common: no gain is told" for name in apart]
    noted = [beside for of in compared.values() for beside in of.values() if beside.note]
    return notes + [beside.note for beside in sorted(noted, key=lambda beside: bool(beside.gains))]


def suite_parts(outputs: Mapping[str, SuiteOutput], compared: Comparisons) -> dict[str, str]:
    """The sections of a page, by heading; of several models each is ``compared`` with the first."""
    names = dict.fromkeys(name for output in outputs.values() for name in output.summary["benchmarks"])
    found = [_benchmark(outputs, benchmark, compared.get(benchmark, {})) for benchmark in names]
    wins = [_wins(outputs, benchmark, compared.get(benchmark, {})) for benchmark in names]
    return {
        "Benchmarks": _headlines(outputs, list(names), compared) + legend(_told(outputs)),
        "Scores by benchmark": "".join(found),
        "Wins and losses by benchmark": (won := "".join(wins)) and won + legend(_WINS),
        "Files that were not read": _unread(outputs),
        "Models": "".join(f"<h3>{words(name)}</h3>{facts(_facts(output))}" for name, output in outputs.items()),
    }


def _entry(output: SuiteOutput, benchmark: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = output.summary["benchmarks"].get(benchmark, {})
    return entry


def _told(outputs: Mapping[str, SuiteOutput]) -> dict[str, str]:
    return {
        "items": "Items that were asked and counted, of each model where they differ; those that were not stand below, with the "
        "reason.",
        "score": "The measure that the benchmark is known by, as its authors count it; percent where nothing else is said.",
        "interval": INTERVAL,
        **({"gain": f"{PAIRED} {_NO_GAIN}"} if len(outputs) > 1 else {}),
    }


def _headlines(
    outputs: Mapping[str, SuiteOutput],
    names: Sequence[str],
    compared: Comparisons,
) -> str:
    """A line a benchmark: its first measure."""
    rows = []
    for benchmark in names:
        found = [_entry(output, benchmark) for output in outputs.values()]
        known = [entry for entry in found if entry.get("measures")]
        measure = known[0]["measures"][0] if known else {"heading": "nothing that could be scored", "name": ""}
        counts = [f"{entry['items']:,}" if entry else "-" for entry in found]
        shown = counts[0] if len({*counts}) == 1 else " / ".join(counts)
        cells = _cells(outputs, benchmark, measure["name"], compared.get(benchmark, {}))
        rows.append([words(benchmark, 60), shown, words(_of_all(outputs, benchmark, measure), 120), *cells])
    return table(["benchmark", "items", "score", *_heads(outputs)], rows)


def compared_lines(outputs: Mapping[str, SuiteOutput], compared: Comparisons) -> list[list[str]]:
    """Cells of text: a line a benchmark and model with the measure that the benchmark is known by, and its gain."""
    first = next(iter(outputs))
    lines = [["benchmark", "score", "", "", *([f"gain over {first}"] if len(outputs) > 1 else [])]]
    for benchmark in dict.fromkeys(name for output in outputs.values() for name in output.summary["benchmarks"]):
        known = [entry for output in outputs.values() if (entry := _entry(output, benchmark)).get("measures")]
        if not known:
            lines.append([one_line(benchmark, limit=40), "nothing that could be scored", *[""] * (len(lines[0]) - 2)])
            continue
        measure = known[0]["measures"][0]
        head = [one_line(benchmark, limit=40), one_line(_of_all(outputs, benchmark, measure), limit=60)]
        for name, output in outputs.items():
            beside = compared.get(benchmark, {}).get(name)
            found = beside.gains.get(measure["name"]) if beside else None
            shown = "" if name == first else " ".join(format_score(found, measure["factor"], sign="+")).rstrip()
            value = " ".join(format_score(_score(_measure(output, benchmark, measure["name"])), measure["factor"]))
            lines.append([*head, one_line(name), value.rstrip(), shown][: len(lines[0])])
            head = ["", ""]
    return lines


def _heads(outputs: Mapping[str, SuiteOutput]) -> list[str]:
    first = next(iter(outputs))
    return [head for name in outputs for head in ([name] if name == first else [name, f"{name}, gain"])]


def _cells(
    outputs: Mapping[str, SuiteOutput], benchmark: str, measure: str, compared: Mapping[str, Beside]
) -> Iterator[str]:
    """Values of one measure, and gains beside all but the first model's."""
    for place, (name, output) in enumerate(outputs.items()):
        stored = _measure(output, benchmark, measure)
        factor = stored["factor"] if stored else 100
        yield with_interval(*format_score(_score(stored), factor))
        if place:
            found = compared[name].gains.get(measure) if name in compared else None
            shown = "-" if found is None else with_interval(*format_score(found, factor, sign="+"))
            mark = (
                verdict(found, more_is_better=bool(stored["gains"]))
                if found and stored and stored["gains"] is not None
                else ""
            )
            yield f'<span class="{mark}">{shown}</span>'


def _measure(output: SuiteOutput, benchmark: str, name: str) -> Mapping[str, Any] | None:
    return next((one for one in _entry(output, benchmark).get("measures", ()) if one["name"] == name), None)


def _score(stored: Mapping[str, Any] | None) -> Score | None:
    if stored is None or None in (ends := (stored["value"], stored["low"], stored["high"])):
        return None
    return Score(value=ends[0], low=ends[1], high=ends[2], items=stored["units"])


def _benchmark(outputs: Mapping[str, SuiteOutput], benchmark: str, compared: Mapping[str, Beside]) -> str:
    """One benchmark: what is to be known, bars, all measures as a table, their legend."""
    of_models = [_entry(output, benchmark) for output in outputs.values()]
    entry = next(filter(None, of_models))
    measures = {one["name"]: one for of in of_models for one in of.get("measures", ())}
    notes = dict.fromkeys(note for of in of_models for note in of.get("notes", ()))
    for model, of in zip(outputs, of_models, strict=True):
        if of and (left := of["left_out"])["items"]:
            whose = f" by {model}" if len(outputs) > 1 else ""
            are = "item is" if left["items"] == 1 else "items are"
            notes[f"{left['items']:,} {are} not scored{whose}: {'; '.join(left['reasons'][:3])}"] = None
        if not of:
            notes[f"{model} was not asked"] = None
    notes |= dict.fromkeys(beside.note for beside in compared.values() if beside.note)
    rows = [
        [
            words(("  " if "/" in name else "") + _of_all(outputs, benchmark, one), 120),
            *_cells(outputs, benchmark, name, compared),
        ]
        for name, one in measures.items()
    ]
    shown = table(["", *_heads(outputs)], rows) if rows else "<p>Nothing could be scored.</p>"
    return (
        f"<h3>{words(entry['title'])} <small>({words(benchmark, 60)}, counted as {words(entry['metric'], 60)})</small></h3>"
        + "".join(f"<p>{words(note, 1000)}</p>" for note in notes)
        + bars(_groups(outputs, benchmark, measures), list(outputs))
        + f"<details><summary>All measures as a table</summary>{shown}</details>"
        + legend(explain_measures(measures.values(), entry["metric"]))
    )


def _heading(measure: Mapping[str, Any]) -> str:
    """What a row is called; a subset without a heading of its own by its name alone."""
    heading, name = str(measure["heading"]), str(measure["name"])
    return name.partition("/")[2] or name if heading == name else heading


def _of_all(outputs: Mapping[str, SuiteOutput], benchmark: str, measure: Mapping[str, Any]) -> str:
    """What a row of all models is called: what one has summed over more subsets than another has a heading of its own."""
    found = [_measure(output, benchmark, measure["name"]) for output in outputs.values()]
    return " / ".join(dict.fromkeys(_heading(one) for one in found if one)) or str(measure["heading"])


def _groups(
    outputs: Mapping[str, SuiteOutput], benchmark: str, measures: Mapping[str, Mapping[str, Any]]
) -> list[Group]:
    """All whole measures together by their unit, then the subsets of the first; the table has those of the others, too."""
    first = next(iter(measures), "")
    groups: dict[tuple[str, int], list[tuple[str, Sequence[Score | None]]]] = {}
    for name, one in measures.items():
        base, _, subset = name.partition("/")
        if subset and base != first:
            continue
        whole = "all items" if one["factor"] == 100 else "all items, not in percent"
        heading = f"{measures[first]['heading']}, by subset" if subset else whole
        scores = [_score(_measure(output, benchmark, name)) for output in outputs.values()]
        groups.setdefault((heading, one["factor"]), []).append((_of_all(outputs, benchmark, one), scores))
    return [Group(heading, factor, rows) for (heading, factor), rows in groups.items()]


def _wins(outputs: Mapping[str, SuiteOutput], benchmark: str, compared: Mapping[str, Beside]) -> str:
    """Units on which each model and the first differ in the first measure, with what both generated."""
    (first_name, first), *others = outputs.items()
    parts = []
    for name, output in others:
        headline = next(iter(_entry(first, benchmark).get("measures", ())), {"name": ""})
        if name not in compared or headline["name"] not in compared[name].gains:
            continue
        before, after = (
            _ratios(first.measures(benchmark), headline["name"]),
            _ratios(output.measures(benchmark), headline["name"]),
        )
        shared = [unit for unit in before if unit in after]
        won = [unit for unit in shared if after[unit] > before[unit]]
        lost = [unit for unit in shared if after[unit] < before[unit]]
        counts = [len(shared) - len(won) - len(lost), len(won), len(lost)]
        heads = ["alike", f"{name} better", f"{first_name} better"]
        parts.append(f"<h3>{words(benchmark, 60)}: {words(headline['heading'], 80)}</h3>")
        parts.append(table(heads, [[f"{count:,}" for count in counts]]))
        chosen = [*won[:_SHOWN], *lost[:_SHOWN]]
        generated = _entry(first, benchmark)["metric"] not in OF_CAPTIONS  # whose first measure is a likelihood
        said = [of.answers(benchmark, chosen) for of in (first, output)] if generated else []
        rows = [
            [words(unit, 120), f"{before[unit]:.3g}", f"{after[unit]:.3g}", *(words(of.get(unit, "-")) for of in said)]
            for unit in chosen
        ]
        if rows:
            head = ["unit", first_name, name, *([f"{first_name} said", f"{name} said"] if said else [])]
            parts.append(f"<details><summary>Some of them</summary>{table(head, rows, kind='words')}</details>")
    return "".join(parts)


def _ratios(measures: Mapping[str, Measure], name: str) -> dict[str, float]:
    """What each unit adds to a measure; of one made of parts, the mean over those that the unit is in."""
    whole = measures[name]
    found: dict[str, list[float]] = {}
    for part in [measures[part] for part in whole.parts] or [whole]:
        for unit, hits, of in zip(part.units, part.hits, part.of, strict=True):
            if of > 0:
                found.setdefault(unit, []).append(hits / of)
    return {unit: sum(values) / len(values) for unit, values in found.items()}


def _unread(outputs: Mapping[str, SuiteOutput]) -> str:
    files = {file: why for output in outputs.values() for file, why in output.summary["unread"].items()}
    return (
        table(["file", "why"], [[words(file), words(why, 1000)] for file, why in files.items()], kind="words")
        if files
        else ""
    )


def _facts(output: SuiteOutput) -> dict[str, object]:
    """Who was asked and how."""
    summary = output.summary
    student = {key: value for key, value in summary["student"].items() if isinstance(value, str | int | float)}
    asked = sum(entry["items"] for entry in summary["benchmarks"].values())
    seconds = sum(entry["seconds"] for entry in summary["benchmarks"].values())
    limit = summary["limit"]
    prints = {f"fingerprint of {name}": entry["fingerprint"] for name, entry in summary["benchmarks"].items()}
    files, only = summary["files"], ",".join(summary["files"]["only"])
    options = [("prompts", summary["prompts"]), ("limit", limit), ("only", only), ("cache", student.get("reads_as"))]
    options += [("images", folder) for folder in files["images"]]
    again = [
        "distill suite",
        quoted(str(student.get("place", "STUDENT"))),
        quoted(files["benchmarks"]),
        "--output OUTPUT",
    ]
    again += [f"--{name} {quoted(str(value))}" for name, value in options if value]
    return {
        **student,
        "prompts": summary["prompts"],
        "items": f"{asked:,} asked in {seconds:,.0f} s{'' if limit is None else f', at most {limit:,} of each benchmark'}",
        **prints,
        "make it again": " ".join(again),
    }
