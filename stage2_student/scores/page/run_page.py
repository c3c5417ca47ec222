"""The page of a run: what came out first, then by kind, item by item, beside the teacher, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.config import config_to_dict
from vlm_distill_cache.common.hub import public_name
from vlm_distill_cache.common.locations import public_location
from vlm_distill_cache.common.printing import size_words
from vlm_distill_cache.common.tools.shift import ShiftReport
from vlm_distill_cache.common.tools.shift_view import LEGEND as SHIFT_LEGEND
from vlm_distill_cache.common.tools.shift_view import (
    kind_rows,
    largest_words,
    number,
    percent,
    shift_facts,
    span_rows,
)
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.pruned_folder import describe_cut, pruning_record
from vlm_distill_cache.stage2_student.scores.again import recipe_of, reproduce
from vlm_distill_cache.stage2_student.scores.flips import Flip, Flips
from vlm_distill_cache.stage2_student.scores.gaze import RunShift
from vlm_distill_cache.stage2_student.scores.page.charts import bars, curves, scored_on_the_way
from vlm_distill_cache.stage2_student.scores.page.elements import (
    choices,
    code,
    facts,
    legend,
    picture,
    sections,
    table,
    with_interval,
    words,
    write_page,
)
from vlm_distill_cache.stage2_student.scores.page.legends import (
    ALL_KEPT,
    COST,
    CURVES,
    FLIPS,
    GAIN,
    INTERVAL,
    ON_THE_WAY,
    SEEN_ALONE,
    TAUGHT,
    explain,
    verdict,
)
from vlm_distill_cache.stage2_student.scores.page.score_rows import score_groups, score_table
from vlm_distill_cache.stage2_student.scores.results import OUTCOMES, EvaluationReport, Row, format_score, table_rows
from vlm_distill_cache.stage2_student.scores.taught import TEACHER, Look, Taught, Word

_ROUNDING = 1e-6
_UNASKED = "What the teacher says here is not known: it is not loaded, and these items are not in the cache."
_TELLS = {"won": ("good", "only the distilled student is right"), "lost": ("bad", "only the baseline is right")}


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """What the page of a run shows.

    Attributes:
        facts: What was run, in words.
        cost: Of each model, by the names of `legends.COST`; what is not known is absent.
        curves: The logged steps of each student (``read_log``).
        on_the_way: What each student was scored while it trained (``read_evaluations``).
        evaluations: By model, the baseline first.
        compared: The two models of which the page says what the second gains over the first.
        no_flips: Why ``flips`` are empty.
        shift: None where no gaze is cached.
        provenance: What `PROVENANCE` says of the second: configuration, caches, fingerprints.
        notes: What the scores do not tell.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    cost: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    on_the_way: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    evaluations: Mapping[str, EvaluationReport] = field(default_factory=dict)
    compared: tuple[str, str] | None = None
    flips: Sequence[Flips] = ()
    no_flips: str = ""
    taught: Sequence[Taught] = ()
    shift: RunShift | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


def render_run_page(path: Path, page: RunPage) -> None:
    """Write the page of a run."""
    models = list(page.evaluations)
    headlines, details = table_rows(page.evaluations, page.compared)
    body = sections(
        {
            "Headline": _headline(page, headlines, models) if models else "<p>No evaluation was run.</p>",
            "Scores": bars(score_groups(page.evaluations), models)
            + score_table([*headlines, *details], models)
            + legend({"interval": INTERVAL, **_explained(page, [*headlines, *details])})
            if models
            else "",
            "Wins and losses": "".join(map(_flips, page.flips))
            or (page.no_flips and f"<p>{words(page.no_flips, 2000)}</p>"),
            "Beside the teacher": taught_cards(page.taught),
            "Shift of the gaze": _shift(page.shift),
            "Training": curves("curves", page.curves) + legend({"loss": CURVES}) + _on_the_way(page.on_the_way),
            "Provenance": _provenance(page.provenance),
        }
    )
    notes = "".join(f"<p><b>{words(note, 2000)}</b></p>" for note in page.notes)
    write_page(path, page.title, [f"<h1>{words(page.title)}</h1>", facts(page.facts), notes, *body])


def _explained(page: RunPage, rows: Sequence[Row]) -> dict[str, str]:
    """The legend of scores; of a student that feeds fewer visual tokens with what that does to them."""
    fewer = {row.heading for row in rows if row.name == "attention/cosine"} if "visual tokens" in page.facts else set()
    return {name: f"{told} {SEEN_ALONE}" if name in fewer else told for name, told in explain(rows).items()}


def _headline(page: RunPage, headlines: Sequence[Row], models: Sequence[str]) -> str:
    """A card for each of the scores that matter first, and what they cost."""
    own = page.compared[1] if page.compared else models[-1]
    cards = []
    for row in headlines:
        scores = dict(zip(models, row.scores, strict=True))
        value, interval = format_score(scores.get(own), row.factor)
        others = {
            name: with_interval(*format_score(score, row.factor)) for name, score in scores.items() if name != own
        }
        if TEACHER not in scores and not row.name.startswith(TEACHER):
            others[TEACHER] = "not scored"
        if row.gain is not None:
            gain = with_interval(*format_score(row.gain, row.factor, sign="+"))
            others["gain"] = f'<b class="{verdict(row.gain)}">{gain}</b>'
        below = "".join(f"<dt>{words(name, 60)}</dt><dd>{cell}</dd>" for name, cell in others.items())
        cards.append(
            f'<div class="card headline"><figcaption>{words(row.heading)}</figcaption>'
            f'<div class="big">{value}</div><p><small>{interval} {words(own, 60)}</small></p><dl>{below}</dl></div>'
        )
    rows = [
        [name, *(words(page.cost[model].get(name, "-")) for model in page.cost)]
        for name in COST
        if any(name in of for of in page.cost.values())
    ]
    cost = f"<h3>What it cost</h3>{table(['', *page.cost], rows)}" if rows else ""
    told = {"interval": INTERVAL, "gain": GAIN, **_explained(page, headlines), **{row[0]: COST[row[0]] for row in rows}}
    told[TEACHER] = (
        "Its own scores where whoever built the cache put them there, on the whole test set of its data; it is not loaded."
    )
    return f'<div class="row">{"".join(cards)}</div>{cost}{legend(told)}'


def _flips(flips: Flips) -> str:
    counts = table(
        ["both right", "only distilled", "only baseline", "neither"], [[str(flips.counts[key]) for key in OUTCOMES]]
    )
    cards = {outcome: "".join(_flip(one) for one in flips.shown if one.outcome == outcome) for outcome in _TELLS}
    shown = "".join(
        f'<h3><span class="{mark}">{tells}</span>: {flips.counts[outcome]} items'
        f'{"" if cards[outcome] else ", none to show"}</h3><div class="row">{cards[outcome]}</div>'
        for outcome, (mark, tells) in _TELLS.items()
    )
    unknown = "" if not flips.shown or any(one.teacher for one in flips.shown) else f"<p>{_UNASKED}</p>"
    return f"<h3>{words(flips.heading)}</h3>{counts}{unknown}{shown}{legend(FLIPS)}"


def _flip(flip: Flip) -> str:
    asked = "".join(f"<dt>{name}</dt><dd>{words(text)}</dd>" for name, text in flip.asked.items())
    said = "".join(f"<dt>{words(name, 60)}</dt><dd><b>{words(text)}</b></dd>" for name, text in flip.said.items())
    teacher = f"<dt>{TEACHER}</dt><dd>{words(flip.teacher)}</dd>" if flip.teacher else ""
    name = words(f"{flip.kind} {flip.item_id}".strip(), 80)
    return (
        f'<div class="card" style="width:250px">{picture(flip.picture, f"picture of {flip.item_id}")}'
        f"<dl>{asked}{said}{teacher}</dl><small>{name}</small></div>"
    )


def taught_cards(taught: Sequence[Taught]) -> str:
    """Answers of cached samples word by word, with where each model looks; empty where there are none."""
    if not taught:
        return ""
    cards = "".join(_answer(one, f"words-{place}") for place, one in enumerate(taught))
    maps = any(word.looks for one in taught for word in one.words)
    told = " The brighter a place, the more a model looks there while it says the word; each map has its own scale."
    return (
        "<p>Samples of the cache: the answer that was taught, what the students say of their own, and what the teacher held "
        f"for most likely. Step through the words by a click or the arrow keys.{told if maps else ''}</p>"
        f'<div class="row">{cards}</div>{legend(TAUGHT)}'
    )


def _answer(taught: Taught, group: str) -> str:
    """One answer, with a button for each word."""
    said = {
        "teacher's own answer" if taught.written else "answer in the data": taught.answer,
        **({"teacher, word by word": taught.teacher} if taught.teacher else {}),
        **{name: text or "(nothing)" for name, text in taught.said.items()},
    }
    rows = "".join(f"<dt>{words(name, 60)}</dt><dd>{words(text)}</dd>" for name, text in said.items())
    looks = list(dict.fromkeys(name for word in taught.words for name in word.looks))
    views = "".join(_view(taught, name) for name in looks)
    if taught.picture is not None:
        shown = picture(taught.picture, f"picture of {taught.sample_id}")
        views = f"<figure><figcaption>{words(taught.note or 'picture')}</figcaption>{shown}</figure>{views}"
    likely = "".join(f"<div><p>{_likely(word)}</p></div>" for word in taught.words)
    return (
        f'<div class="card"><p class="said"><b>{words(taught.question)}</b> <small>({words(taught.sample_id, 80)})</small></p>'
        f"<dl>{rows}</dl><br>{choices(group, [word.text for word in taught.words], taught.chosen)}"
        f'<div class="row">{views}</div><div><div class="panes">{likely}</div></div></div></div>'
    )


def _likely(word: Word) -> str:
    shown = ", ".join(f"{words(token, 40)} {100 * share:.1f} %" for token, share in word.likely)
    return f"next, by the teacher: {shown}" if shown else ""


def _view(taught: Taught, name: str) -> str:
    """One model's maps of all words over the picture, of which that of the chosen word is seen."""
    assert taught.picture is not None
    heats, told = [], []
    for word in taught.words:
        look = word.looks[name]
        heats.append(picture(look.heat, f"where {name} looks at {word.text}"))
        told.append(f"<div>{words(name, 60)}: {_mass(look)}</div>")
    return (
        f'<figure><figcaption class="panes">{"".join(told)}</figcaption><div class="view">'
        f'{picture(taught.picture, f"picture of {taught.sample_id}")}<div class="panes">{"".join(heats)}</div></div></figure>'
    )


def _mass(look: Look) -> str:
    alike = "" if look.cosine is None else f", cosine {look.cosine:.2f}"
    return f"{100 * look.image_mass:.0f} % on the picture{alike}"


def _shift(shift: RunShift | None) -> str:
    """Where the gaze goes within answers: the teacher's by kind of question, and the students' beside it."""
    if shift is None or not shift.teacher.answers:
        return ""
    report = shift.teacher
    said = "".join(f"<p>{words(line, 400)}.</p>" for line in shift_facts(report))
    spans = table(
        ["token", "tokens", "gaze on the kept", "its own best", "in common"],
        [[words(cell) for cell in row] for row in span_rows(report)],
    )
    kinds = table(
        ["kind", "answers (+ of one token)", "gaze on the kept", "its own best", "events", "with an event"],
        [[words(cell) for cell in row] for row in kind_rows(report)],
    )
    largest = "".join(
        f"<li>{words(one.sample_id, 80)}: {words(largest_words(one, report), 400)}</li>" for one in report.largest
    )
    beside = table(
        ["model", *(f"token {span}" for span in report.spans), "events", "with an event"],
        [
            [
                words(name, 60),
                *(percent(span.first) for span in of.spans.values()),
                number(of.events),
                percent(of.shifting),
            ]
            for name, of in shift.beside.items()
        ],
    )
    vacuous = [name for name, of in shift.beside.items() if name != TEACHER and _keeps_all(of)]
    students = (
        "<h3>The students beside it</h3><p>Gaze on the places that token 0 looked at most, of each model its own token 0: "
        f"{next(iter(shift.beside.values())).samples} cached samples, on the cells where all can be compared.</p>{beside}"
        if shift.beside and not vacuous
        else f"<h3>The students beside it</h3><p>{words(', '.join(vacuous))}: not shown, since {ALL_KEPT}</p>"
        if vacuous
        else ""
    )
    sheets = "".join(picture(sheet, "where token 0 and the shifted token look") for sheet in shift.sheets)
    drawn = (
        "<p>The picture; where token 0 looks and where the shifted one does, each with its own scale and the share of its "
        f"attention that lies on the picture; what is kept, and what the shifted token's gaze has there.</p>{sheets}"
        if sheets
        else ""
    )
    return f"{said}{spans}{kinds}<h3>The largest shifts</h3><ul>{largest}</ul>{drawn}{students}{legend(SHIFT_LEGEND)}"


def _keeps_all(report: ShiftReport) -> bool:
    """Whether all gaze lies on the kept places, in every token that was followed."""
    found = [span.first.value for span in report.spans.values() if span.tokens]
    return bool(found) and all(value > 1 - _ROUNDING for value in found)


def _on_the_way(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    charts = scored_on_the_way("scores", runs)
    return f"<h3>Scores while training</h3>{charts}{legend({'score': ON_THE_WAY})}" if charts else ""


def _provenance(provenance: Mapping[str, Any]) -> str:
    """Caches, fingerprints, versions and the commands that make it again, as the student keeps them."""
    if not provenance:
        return ""
    origin = provenance.get("origin", {})
    parts = [
        "<p>What the distilled student keeps of where it comes from (PROVENANCE, beside its weights). Names and licences are "
        "what the makers of cache and data state.</p>",
        facts({"fingerprint of the training": provenance["fingerprint"]}),
    ]
    for cache in origin.get("caches", []):
        known = {name.replace("_", " "): value for name, value in cache.items() if value not in (None, "", [])}
        known.pop("command", None)
        shown = {
            name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in known.items()
        }
        parts += [f"<h3>Cache {words(shown.pop('place', ''), 120)}</h3>", facts(shown)]
    if versions := origin.get("versions"):
        parts += ["<h3>Versions</h3>", facts(versions)]
    lines, settings = reproduce(provenance["config"], origin.get("caches", []), "run", origin.get("cut"))
    parts.append(
        "<h3>Make it again</h3><p>The cache, then the student. Words in capitals and PATH_TO stand for places of your own.</p>"
        f"{code(lines)}<details><summary>config.yaml</summary>{code(settings)}</details>"
    )
    return "".join(parts)


def called(config: TrainConfig) -> str:
    """A run's student by name, and how it was cut where a folder was given."""
    cut = describe_cut(pruning_record(config.student)).get("student")
    return f"{public_name(config.student)} ({cut})" if cut else public_name(config.student)


def run_facts(config: TrainConfig, cache: TeacherCache, phases: str, vocabulary: Mapping[str, Any]) -> dict[str, str]:
    """What was run, in words; ``vocabulary`` is what the student counted of it."""
    plan = cache.plan
    at = f"@{plan.teacher['revision']}" if plan.teacher.get("revision") else ""
    told = {
        "student": called(config),
        "teacher": f"{plan.teacher.get('name')}{at} (not loaded: its signals come from the cache)",
        "cache": f"{public_location(config.cache)} ({', '.join(sorted(plan.signals))})",
        "data": str(plan.data.get("name")),
        "phases": phases,
        **({"recipe": f"options of training as of {recipe}"} if (recipe := recipe_of(config_to_dict(config))) else {}),
        "seed": str(config.seed),
    }
    if vocabulary.get("entries_beyond"):
        told["vocabulary"] = (
            f"{vocabulary['entries_beyond']} of {vocabulary['entries_read']} cached logit entries read are tokens beyond "
            "the student's rows; they count as tail"
        )
    return told


def run_costs(
    sizes: Mapping[str, Mapping[str, str]], logs: Mapping[str, Sequence[Mapping[str, Any]]], cache: TeacherCache
) -> dict[str, dict[str, str]]:
    """What each model cost, by the names of `legends.COST`; ``sizes`` are parameters and weights of the students."""
    totals = cache.manifest.totals
    costs = {
        name: {
            **sizes[name],
            "training steps": str(len(log)),
            "training time": f"{sum(record['step_s'] for record in log):.0f} s",
        }
        for name, log in logs.items()
    }
    return {**costs, TEACHER: {"cache": f"{totals['samples']:,} samples, {size_words(totals['bytes'])}"}}
