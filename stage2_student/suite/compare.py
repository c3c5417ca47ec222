"""``distill compare``: runs and suites side by side on one page, each against the first, without a model or a cache."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import FOLDER, say
from vlm_distill_cache.common.terminal.general import JSON, Command, answer, complete_folder
from vlm_distill_cache.common.terminal.result_files import ResultFile, marked
from vlm_distill_cache.stage2_student.final_folder import FINAL, read_provenance
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.page.charts import bars, curves
from vlm_distill_cache.stage2_student.scores.page.elements import (
    code,
    facts,
    legend,
    sections,
    table,
    with_interval,
    words,
    write_page,
)
from vlm_distill_cache.stage2_student.scores.page.legends import (
    CURVES,
    FLIPS,
    GAIN,
    INTERVAL,
    PAIRED,
    explain,
    verdict,
)
from vlm_distill_cache.stage2_student.scores.page.score_rows import score_groups, score_table
from vlm_distill_cache.stage2_student.scores.results import (
    HEADLINE,
    OUTCOMES,
    EvaluationReport,
    format_score,
    gain_of,
    outcomes,
    read_scores,
    table_rows,
)
from vlm_distill_cache.stage2_student.suite.page import (
    SUMMARY,
    Comparisons,
    SuiteOutput,
    compare_suites,
    compared_lines,
    notes_of,
    suite_parts,
)
from vlm_distill_cache.stage2_student.suite.table import laid_out
from vlm_distill_cache.stage2_student.training.output_folder import STAMP
from vlm_distill_cache.stage2_student.training.stamp import BASELINE, DISTILLED, load_stamp

_MARK = "<!-- written by distill compare -->"  # a later page may take its place
LOG = "log.jsonl"
_MOST_NOTES = 4  # above the first section
_AGREEMENT = "teacher/top1"
_BUILT_IN = re.compile(r"(shapes|easy-vqa)\b")


@dataclass(frozen=True, kw_only=True)
class RunOutput:
    """What `distill run` left in a folder.

    Attributes:
        scores: Of the distilled student.
        baseline: Of the other one.
        items: What tells the held-out items of this run from those of another.
        log: The steps of the distilled student's training.
    """

    path: Path
    stamp: Mapping[str, Any]
    scores: EvaluationReport
    baseline: EvaluationReport
    provenance: Mapping[str, Any]
    items: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]


def read_run(output: Path) -> RunOutput:
    """Read what a run left.

    Raises:
        ConfigError: It is not finished, or damaged.
    """
    from vlm_distill_cache.stage2_student.training.log import read_log  # torch

    again = "run the same `distill run` command again"
    try:
        stamp = load_stamp(output)
    except CacheFormatError as error:
        raise ConfigError(f"{error}; {again}") from error
    if not stamp.get("finished"):
        raise ConfigError(f"{output}: the run there is not finished; {again}")
    stored = read_scores(output)
    if lacking := {BASELINE, DISTILLED} - stored.keys():
        raise ConfigError(f"{output}: it has no scores of {', '.join(sorted(lacking))}; {again}")
    try:
        provenance = read_provenance(output / DISTILLED / FINAL)
    except (FileNotFoundError, CacheFormatError) as error:
        raise ConfigError(f"{output}: the distilled student is lost or damaged ({error}); {again}") from error
    return RunOutput(
        path=output,
        stamp=stamp,
        scores=EvaluationReport.from_dict(stored[DISTILLED]),
        baseline=EvaluationReport.from_dict(stored[BASELINE]),
        provenance=provenance,
        items=_items(stamp, provenance),
        log=read_log(output / DISTILLED),
    )


def _items(stamp: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Which held-out items a run was scored on: the options that choose them, and the data where they name none."""
    how, config = stamp["evaluation"], stamp["config"]
    caches = provenance.get("origin", {}).get("caches", [])
    data = how.get("data") or config.get("data") or next((cache.get("data_name") for cache in caches), None)
    if found := _BUILT_IN.match(str(data)):  # whose held-out items depend on the seed alone
        seed = re.search(r"\bseed=(\d+)", str(data))
        data = f"{found[1]}, seed {int(seed[1]) if seed else 0}"
    chosen = {"data": data, "images": how.get("images") or config.get("images"), "files": how.get("items")}
    return chosen | {name: how.get(name) for name in ("split", "limit")}


def run_gains(runs: Mapping[str, RunOutput]) -> dict[str, dict[str, Score]]:
    """What each run's student scores more than the first run's, by run and score, where both answered the same items."""
    (_, first), *others = runs.items()
    found: dict[str, dict[str, Score]] = {}
    for name, run in others:
        gains = {}
        for key, _, _ in HEADLINE:
            same = run.items == first.items if key != _AGREEMENT else _agreement(run) == _agreement(first)
            if same and (gain := gain_of(run.scores, first.scores, key)) is not None:
                gains[key] = gain
        found[name] = gains
    return found


def _agreement(run: RunOutput) -> list[Any]:
    """What tells the cached samples on which the agreement is measured from those of another run."""
    return [run.stamp["run"].get("cache"), run.stamp["evaluation"].get("agreement_samples")]


def other_items(runs: Mapping[str, RunOutput]) -> list[str]:
    """Of runs that were scored on other items than the first: in what they differ, a sentence each."""
    (first_name, first), *others = runs.items()
    notes = []
    for name, run in others:
        differs = [
            f"{key} {_said(key, run.items[key])} there, {_said(key, first.items[key])} here"
            for key in first.items
            if run.items[key] != first.items[key]
        ]
        if differs:
            same = _agreement(run) == _agreement(first) and gain_of(run.scores, first.scores, _AGREEMENT) is not None
            but = " but of the agreement with the teacher, which is on the same cached samples" if same else ""
            notes.append(
                f"{name} was scored on other items than {first_name} ({'; '.join(differs)}): no gain is told{but}"
            )
    return notes


def _said(key: str, value: Any) -> Any:
    return ("all" if key == "limit" else "none") if value is None else value


def lost_steps(runs: Mapping[str, RunOutput]) -> list[str]:
    """Of runs whose log does not hold all steps: how many it holds, a sentence each."""
    notes = []
    for name, run in runs.items():
        config = run.provenance["config"]
        steps = [config.get(phase, {}).get("steps") for phase in config.get("phases", ())]
        expected = None if None in steps else sum(steps)  # epochs: only the data tell how many steps they are
        if not run.log or len(run.log) < (expected or 0):
            of = "" if expected is None else f" of {expected:,}"
            path = run.path / DISTILLED / LOG
            notes.append(
                f"{name}: {path} is damaged or lost: {len(run.log):,}{of} steps can be read, and curves show no more"
            )
    return notes


def own_gain(run: RunOutput, key: str) -> Score | None:
    """What a run's student scores more than the run's own baseline."""
    return gain_of(run.scores, run.baseline, key)


def run_parts(runs: Mapping[str, RunOutput]) -> dict[str, str]:
    """The sections of a page about runs, by heading."""
    reports = {name: run.scores for name, run in runs.items()}
    headlines, details = table_rows(reports)
    gains, names = run_gains(runs), list(runs)
    first = names[0]
    rows = []
    for row in headlines:
        rows.append([words(row.heading), *(with_interval(*format_score(score, row.factor)) for score in row.scores)])
        own = [own_gain(run, row.name) for run in runs.values()]
        rows.append(["  gain over its own baseline", *(_gain(gain, row.factor) for gain in own)])
        if len(runs) > 1:
            against = [_gain(gains[name].get(row.name), row.factor) for name in names[1:]]
            rows.append([f"  gain over {words(first, 60)}", "", *against])
    told = {"interval": INTERVAL, "gain over its own baseline": GAIN, f"gain over {first}": PAIRED}
    return {
        "Headline": table(["", *names], rows) + legend({**told, **explain(headlines)}),
        "Scores": bars(score_groups(reports), names)
        + score_table([*headlines, *details], names)
        + legend({"interval": INTERVAL, **explain([*headlines, *details])}),
        "Wins and losses": _wins(runs),
        "Options in which they differ": _differences(runs),
        "Training": curves("curves", {name: run.log for name, run in runs.items()}) + legend({"loss": CURVES}),
        "Provenance": "".join(f"<h3>{words(name, 60)}</h3>{_provenance(run)}" for name, run in runs.items()),
    }


def _gain(gain: Score | None, factor: int) -> str:
    if gain is None:
        return "-"
    return f'<span class="{verdict(gain)}">{with_interval(*format_score(gain, factor, sign="+"))}</span>'


def _wins(runs: Mapping[str, RunOutput]) -> str:
    """How many items each student answers better than the first run's."""
    (first_name, first), *others = runs.items()
    rows = []
    for name, run in others:
        for key, heading, _ in HEADLINE[:2]:
            placed = outcomes(run.scores.items.get(key, {}), first.scores.items.get(key, {}))
            if placed is not None and run.items == first.items and any(placed.values()):
                counts = [f"{len(placed[outcome]):,}" for outcome in OUTCOMES]
                rows.append([words(f"{name}: {heading}", 120), *counts])
    if not rows:
        return ""
    head = ["", "both right", "only this one", f"only {first_name}", "neither"]
    told = {
        "both right": FLIPS["both"],
        "only this one": f"Items that this run's student answers better than that of {first_name}.",
        f"only {first_name}": f"Items that the student of {first_name} answers better.",
        "neither": FLIPS["neither"],
    }
    return table(head, rows) + legend(told)


def _differences(runs: Mapping[str, RunOutput]) -> str:
    flat = {name: _flat(run.stamp["config"]) | {"cache": run.stamp["run"].get("cache")} for name, run in runs.items()}
    keys = dict.fromkeys(key for of in flat.values() for key in of)
    rows = []
    for key in keys:
        values = [json.dumps(of.get(key)) for of in flat.values()]
        if len(set(values)) > 1 and key != "output":
            rows.append([words(key, 80), *(words(value, 120) for value in values)])
    return table(["option", *runs], rows, kind="words") if rows else ""


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}{key}.") if isinstance(inner, dict) else {f"{prefix}{key}": inner}
    return found


def _provenance(run: RunOutput) -> str:
    origin = run.provenance.get("origin", {})
    caches = origin.get("caches", [])
    told = {"fingerprint of the training": run.provenance["fingerprint"]}
    told |= {f"cache {cache.get('place', '')}": f"manifest {cache.get('hash')}" for cache in caches}
    commands = [str(cache["command"]) for cache in caches if cache.get("command")]
    return facts(told) + code("\n".join([*commands, "distill run --config config.yaml --cache CACHE --output OUTPUT"]))


def _run_lines(runs: Mapping[str, RunOutput]) -> list[list[str]]:
    """Cells of text: a line a headline and run, with both gains."""
    headlines, _ = table_rows({name: run.scores for name, run in runs.items()})
    gains, first = run_gains(runs), next(iter(runs))
    lines = [["score", "", "", "gain over its own baseline", *([f"gain over {first}"] if len(runs) > 1 else [])]]
    for row in headlines:
        for place, ((name, run), score) in enumerate(zip(runs.items(), row.scores, strict=True)):
            own, over = own_gain(run, row.name), gains.get(name, {}).get(row.name)
            told = [
                format_score(score, row.factor),
                *(format_score(each, row.factor, sign="+") for each in (own, over)),
            ]
            cells = [" ".join(each).rstrip() for each in told]
            cells[2] = cells[2] if place else ""
            lines.append(["" if place else row.heading, one_line(name), *cells][: len(lines[0])])
    return lines


def name_suites(suites: Mapping[str, SuiteOutput], taken: Iterable[str]) -> dict[str, SuiteOutput]:
    """Suites by what their models are called; where that is the name of several, with the folder behind it."""
    called = {name: one_line(output.summary["student"]["name"], limit=40) for name, output in suites.items()}
    counts = Counter([*called.values(), *taken])
    names = {name: own if counts[own] == 1 else f"{own} ({name})" for name, own in called.items()}
    unique = len({*names.values(), *taken}) == len(names) + len([*taken])
    return {names[name] if unique else name: output for name, output in suites.items()}


def name_outputs(folders: Sequence[Path]) -> dict[str, Path]:
    """A name for each folder: its own, with as many of those around it as tell it from the others.

    Raises:
        ConfigError: One is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    if twice := [str(folder) for folder, count in Counter(resolved).items() if count > 1]:
        raise ConfigError(f"{twice[0]} is given twice; give each folder once")
    for depth in range(1, max(len(folder.parts) for folder in resolved) + 1):
        names = ["/".join(folder.parts[-depth:]) for folder in resolved]
        if len(set(names)) == len(names):
            return dict(zip(names, folders, strict=True))
    raise AssertionError("different paths have different parts")


@click.command(cls=Command)
@click.argument("outputs", nargs=-1, required=True, type=FOLDER, metavar="OUTPUT...", shell_complete=complete_folder)
@click.option(
    "--output",
    "page",
    default="compare.html",
    show_default=True,
    type=ResultFile(marked(_MARK.encode())),
    help="HTML page to write.",
)
@JSON
def compare(outputs: tuple[Path, ...], page: Path) -> None:
    """Put runs, and suites of published benchmarks, side by side on one page.

    Each OUTPUT is a folder that `distill run` or `distill suite` wrote; all are compared with the first of their sort. Gains
    are told where both were asked the same items.
    """
    runs: dict[str, RunOutput] = {}
    suites: dict[str, SuiteOutput] = {}
    for name, folder in name_outputs(outputs).items():
        if (folder / SUMMARY).is_file():
            suites[name] = SuiteOutput(folder)
            _ = suites[name].summary
        elif (folder / STAMP).is_file():
            runs[name] = read_run(folder)
        else:
            raise ConfigError(
                f"{folder}: neither {STAMP}, as `distill run` writes it, nor {SUMMARY}, as `distill suite` does, is there; give "
                "such folders"
            )
    suites = name_suites(suites, list(runs))
    notes = [*other_items(runs), *lost_steps(runs)] if runs else []
    parts = run_parts(runs) if runs else {}
    compared = compare_suites(suites) if suites else {}
    if suites:
        notes += notes_of(suites, compared)
        parts |= suite_parts(suites, compared)
    title = f"{', '.join([*runs, *suites])} side by side"
    warned = "".join(f"<p><b>{words(note, 2000)}</b></p>" for note in notes[:_MOST_NOTES])
    if len(notes) > _MOST_NOTES:
        warned += f"<p>{len(notes) - _MOST_NOTES:,} more such notes stand below, each with its benchmark.</p>"
    write_page(page, one_line(title), [f"{_MARK}<h1>{words(title)}</h1>", warned, *sections(parts)])
    folders = {name: str(output.path) for of in (runs, suites) for name, output in of.items()}
    answer(page=page, notes=notes, folders=folders, **_document(runs, suites, compared))
    if runs:
        say(laid_out(_run_lines(runs), right=()) + "\n")
    if suites:
        say(laid_out(compared_lines(suites, compared), right=()) + "\n")
    for note in notes:
        say(f"note: {one_line(note, limit=1000)}")
    say(f"Page: {page}")


def _document(
    runs: Mapping[str, RunOutput], suites: Mapping[str, SuiteOutput], compared: Comparisons
) -> dict[str, Any]:
    """What programs read: scores of all, and gains over the first of each sort."""
    found: dict[str, Any] = {"runs": {}, "suites": {}}
    gains = run_gains(runs) if runs else {}
    for name, run in runs.items():
        own = {key: gain for key, _, _ in HEADLINE if (gain := own_gain(run, key)) is not None}
        found["runs"][name] = {
            "scores": {key: score.to_dict() for key, score in run.scores.scores.items()},
            "gain_over_baseline": {key: gain.to_dict() for key, gain in own.items()},
            "gain_over_first": {key: gain.to_dict() for key, gain in gains.get(name, {}).items()},
        }
    for name, output in suites.items():
        found["suites"][name] = {
            benchmark: {"measures": entry["measures"], "gain_over_first": {}}
            for benchmark, entry in output.summary["benchmarks"].items()
        }
    for benchmark, of in compared.items():
        for name, beside in of.items():
            told = {measure: gain.to_dict() for measure, gain in beside.gains.items() if gain is not None}
            found["suites"][name][benchmark]["gain_over_first"] = told
    return found
