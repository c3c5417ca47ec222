"""What ``cachectl inspect CACHE --shift`` says and draws: figures as text or Markdown, pictures of the largest shifts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from vlm_distill_cache.common.attention.shift import Interval
from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.printing import markdown, one_line
from vlm_distill_cache.common.terminal.result_files import PICTURE_MARK, marked, refuse_others_file
from vlm_distill_cache.common.tools.picture import WordMap, check_pictures, draw_picture, split_views, word_maps
from vlm_distill_cache.common.tools.record_view import TokenText, load_token_text, save_picture
from vlm_distill_cache.common.tools.shift import AnswerShift, ShiftReport, cache_shift
from vlm_distill_cache.common.tools.views import shots_of

if TYPE_CHECKING:
    from PIL.Image import Image

LEGEND = {
    "the kept third": "The places (a third of the cells, at least one) that the first token of an answer, token 0, looked at most.",
    "tokens": "Their number within the answer; the token that ends an answer is not counted.",
    "gaze on the kept": "How much of the gaze of these tokens lies on the kept places of token 0; the gaze of a token is its "
    "attention on the picture, mean over heads and the cached layers, as a share of all on the picture.",
    "its own best": "The same for as many places, chosen anew for each token: the most that so many places can hold.",
    "in common": "Share of a token's own best places that are among those of token 0; about a third by chance.",
    "event": "A token whose gaze on the kept places is below 0.75 of what its own best places hold; these are kept from then on. "
    "The rule is ours.",
    "events": "Such events, in answers of at least two tokens; shorter ones cannot shift.",
    "with an event": "Share of these answers that have at least one.",
    "kind": "Of an answer that is yes or no, a number or an option's letter just that; else the first two words of the question, "
    "of scripts that write no spaces its first two characters, the eight commonest that begin at least 1 % of the questions, the "
    "others together; where no question is known, how many words "
    "the answer has. In brackets with a +: answers of one token.",
    "interval": "In brackets: 95 % of the means that other draws of these samples give (2000 draws, with replacement); one without "
    "width is no certainty.",
}
"""What each number means."""
_CARD_LARGEST = 3
_NAME = "shift-{:02}.png"


class Asks(Protocol):
    """The data that a cache was built from."""

    def questions(self, sample_ids: Sequence[str]) -> dict[str, Sequence[str]]:
        """The questions of each sample's turns."""
        ...

    def pictures(self, sample_id: str, frames: Mapping[str, Any] | None = None) -> Sequence[Image] | None:
        """A sample's pictures and frames; ``frames``: how the cache sampled videos."""
        ...


def measure_cache(cache: TeacherCache, data: Asks | None, *, name: str) -> ShiftReport:
    """`cache_shift`, with the questions of the data if there are any.

    Raises:
        CacheMismatchError: If none of the samples that were looked at is in the data called ``name``, or a sample that
            shifts most has another picture there.
    """
    if data is None:
        return cache_shift(cache)
    report = cache_shift(cache, asked=data.questions)
    if report.pictures and not report.asked:
        raise CacheMismatchError(
            f"{cache.place}: none of the {report.pictures} samples that were looked at is in {one_line(name)}; give the data "
            f"that the cache was built from, {one_line(cache.plan.data.get('name'))}"
        )
    for one in report.largest:  # other data may have the same ids
        if (pictures := data.pictures(one.sample_id, cache.plan.extra.get("frames"))) is not None:
            record = cache.read(one.sample_id, ("image_hash",))
            check_pictures(pictures, record, name=f"sample {one.sample_id!r} of {one_line(name)}")
    return report


def shift_lines(report: ShiftReport, place: str) -> Iterator[str]:
    """All figures as lines of a terminal."""
    yield f"shift of the gaze   {place}"
    yield f"{'':<20}{_looked_at(report)}"
    yield f"{'':<20}{_answers(report)}"
    if not report.answers:
        yield f"{'':<20}no answer of two tokens that looks at a picture: nothing can shift"
        return
    yield f"kept                {_kept(report)}"
    yield ""
    yield f"{'token':<28}{'tokens':>8}{'gaze on the kept':>22}{'its own best':>22}{'in common':>22}"
    for span, count, *shares in span_rows(report):
        yield f"{span:<28}{count:>8}{shares[0]:>22}{shares[1]:>22}{shares[2]:>22}"
    yield ""
    yield f"events              {number(report.events)} an answer; {percent(report.shifting)} of these answers have at least one"
    yield ""
    yield f"{_kinds_of(report):<28}{'answers':>8}{'gaze on the kept':>22}{'its own best':>22}{'events':>22}{'with an event':>22}"
    for name, answers, *figures in kind_rows(report):
        yield f"{name:<28}{answers:>8}{figures[0]:>22}{figures[1]:>22}{figures[2]:>22}{figures[3]:>22}"
    yield ""
    yield "largest shifts      of each sample one answer; the token whose gaze the kept places lose most of"
    for place_of, one in enumerate(report.largest, start=1):
        yield f"{place_of:>4}  {one_line(one.sample_id, limit=60)}, {largest_words(one, report)}"
    yield ""
    for name, said in LEGEND.items():
        yield f"{name}: {said}"


def shift_section(report: ShiftReport | None) -> str:
    """A section of a cache's card; empty where nothing is known or nothing can shift."""
    if report is None or not report.answers:
        return ""
    spans = "".join(f"| {' | '.join(map(str, row))} |\n" for row in span_rows(report))
    kinds = "".join(f"| {markdown(row[0])} | {' | '.join(map(str, row[1:]))} |\n" for row in kind_rows(report))
    largest = "".join(
        f"- {markdown(one.sample_id, limit=80)}: {markdown(largest_words(one, report))}\n"
        for one in report.largest[:_CARD_LARGEST]
    )
    legend = "".join(f"- {name}: {said}\n" for name, said in LEGEND.items())
    facts, kept, events = shift_facts(report)
    return f"""
## Shift of the gaze within answers

{facts}. {kept}.

| token | tokens | gaze on the kept | its own best | in common |
|---|---|---|---|---|
{spans}
{events}.

| {_kinds_of(report)} | answers | gaze on the kept | its own best | events | with an event |
|---|---|---|---|---|---|
{kinds}
The largest shifts:

{largest}
{legend}
More of it, and pictures: `cachectl inspect THIS_FOLDER --shift`.
"""


def shift_facts(report: ShiftReport) -> tuple[str, str, str]:
    """What was looked at, what is kept, and how often that fails, in sentences without their full stops."""
    return (
        f"{_looked_at(report)}; {_answers(report)}",
        f"Kept: {_kept(report)}",
        f"Events: {number(report.events)} an answer; {percent(report.shifting)} of these answers have at least one",
    )


def span_rows(report: ShiftReport) -> list[tuple[str, int, str, str, str]]:
    """A row for each span of tokens: its name, their number, and three shares."""
    return [
        (span, count, percent(first), percent(best), percent(common))
        for span, (count, first, best, common) in report.spans.items()
    ]


def kind_rows(report: ShiftReport) -> list[tuple[str, str, str, str, str, str]]:
    """A row for each kind of answers: its name, their number, two shares, events, and the share with one."""
    rows = []
    for kind in report.kinds:
        single = f" (+{kind.single})" if kind.single else ""
        shares = percent(kind.first), percent(kind.best), number(kind.events), percent(kind.shifting)
        rows.append((kind.name, f"{kind.answers}{single}", *shares))
    return rows


def largest_words(one: AnswerShift, report: ShiftReport) -> str:
    """Where and how much an answer shifts most."""
    held, best = (100 * float(shares[one.worst]) for shares in (one.shift.first, one.shift.best))
    said = f", {one_line(one.text, limit=60)!r}" if one.text else ""
    tokens = f" ({one.tokens[1]!r}; token 0: {one.tokens[0]!r})" if one.tokens else ""
    return (
        f"answer {one.number + 1}{said}: at token {one.worst}{tokens} {held:.0f} % on the {len(one.shift.kept)} kept, "
        f"{best:.0f} % on its own best; {one.events} event{'s' * (one.events != 1)}"
    )


def percent(share: Interval) -> str:
    """A share and its interval in percent; a dash where nothing was counted."""
    return _shown(share, 100, 0) + ("" if np.isnan(share.value) else " %")


def number(mean: Interval) -> str:
    """A mean and its interval; a dash where nothing was counted."""
    return _shown(mean, 1, 2)


def _shown(of: Interval, factor: int, digits: int) -> str:
    if np.isnan(of.value):
        return "-"
    value, low, high = (f"{factor * one:.{digits}f}" for one in of)
    return f"{value} [{low}, {high}]"


def _looked_at(report: ShiftReport) -> str:
    some = "All" if report.samples == report.total else f"{report.samples:,} evenly spaced of"
    return f"{some} {report.total:,} samples, {report.pictures:,} with a picture"


def _answers(report: ShiftReport) -> str:
    blind = f", {report.blind:,} that do not look at it" if report.blind else ""
    many = "s" * (report.answers != 1)
    return (
        f"{report.answers:,} answer{many} of at least two tokens, {report.single:,} of one, which cannot shift{blind}"
    )


def _kept(report: ShiftReport) -> str:
    rows, columns = report.grid
    if report.frame_grid is not None:
        on_frames = (
            "" if report.frame_grid == report.grid else " and of {} x {} on each frame".format(*report.frame_grid)
        )
        return (
            f"the third of the cells of all pictures in front of an answer (a grid of {rows} x {columns} on each{on_frames}) that "
            f"its token 0 looked at most; an even gaze would have {100 * report.kept / report.places:.0f} % there"
        )
    return (
        f"the {report.kept} of {report.places} cells (a grid of {rows} x {columns}) that token 0 of an answer looked at most; "
        f"an even gaze would have {100 * report.kept / report.places:.0f} % there"
    )


def _kinds_of(report: ShiftReport) -> str:
    return "kind of question" if report.asked else "kind of answer"


def draw_shifts(cache: TeacherCache, report: ShiftReport, data: Asks | None, folder: Path) -> list[tuple[Path, bool]]:
    """Draw the largest shifts: the sample's picture, and over it where token 0 and the shifted token look.

    Args:
        data: Has the pictures; None draws the maps alone.
        folder: New, empty, or of earlier pictures of this command, which these replace; see `picture_folder`.

    Returns:
        Each file, and whether the picture itself is in it.

    Raises:
        ConfigError: If nothing shifts.
        CacheMismatchError: If a picture of the data is not the one that the teacher saw.
    """
    if not report.largest:
        raise ConfigError(f"{cache.place}: no answer of two tokens looks at a picture, so there is no shift to draw")
    text, drawn = load_token_text(cache), list[tuple[Path, bool]]()
    folder.mkdir(exist_ok=True)
    for place, one in enumerate(report.largest, start=1):
        pictures = None if data is None else data.pictures(one.sample_id, cache.plan.extra.get("frames"))
        path = folder / _NAME.format(place)
        save_picture(draw_shift(cache, report, one, text, pictures), path)
        drawn.append((path, pictures is not None))
    for path in folder.iterdir():
        if path not in {file for file, _ in drawn}:
            path.unlink()  # an earlier one of ours: `picture_folder` found no other
    return drawn


def draw_shift(
    cache: TeacherCache, report: ShiftReport, one: AnswerShift, text: TokenText, pictures: Sequence[Image] | None
) -> Image:
    """Draw one shift: the pictures if they are there, and over them the gaze of token 0, of the shifted token, and what is kept.

    Raises:
        CacheMismatchError: If a picture is not the one that the teacher saw.
    """
    record = cache.read(one.sample_id)
    if pictures is not None:
        check_pictures(pictures, record, name=f"sample {one.sample_id!r} of the data")
    shots = shots_of(record, dict(enumerate(pictures or ())))
    words = []
    for token in (0, one.worst):
        row = one.rows[token]
        own = next((word for word, rows in text.words(record["labels"].tolist()) if row in rows), "")
        words.append((f"token {token}: {own or text.of(one.labels[token])}", [row]))
    maps = word_maps(record, cache.plan, words)
    grids = [cells.shape for cells in maps[0].views]
    kept = np.zeros(sum(rows * cols for rows, cols in grids))
    kept[one.shift.kept] = 1.0
    first, *further = (
        cells / cells.size for cells in split_views(kept, grids)
    )  # of each picture the share that is kept
    share = float(one.shift.first[one.worst])
    held = WordMap(word=f"kept; token {one.worst}:", cells=first, image_mass=share, further=tuple(further))
    said = one_line(one.text, limit=80) or f"{len(one.rows)} tokens"
    title = f"{one_line(one.sample_id, limit=60)}, answer {one.number + 1}: {said}"
    return draw_picture([*maps, held], title=title, image=shots[0].image, shots=shots)


def picture_folder(folder: Path) -> Path:
    """Refuse a folder for pictures in which anything else lies.

    Raises:
        ConfigError: With what to do instead.
    """
    refuse_inside(folder / "shift")
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_dir():
                raise ConfigError(f"{path}: a folder where only pictures of this command may be; give a new folder")
            refuse_others_file(path, marked(PICTURE_MARK))
    elif os.path.lexists(folder):
        raise ConfigError(f"{folder}: a file; --shift draws several pictures, give a new folder for them")
    elif not folder.parent.is_dir():
        raise ConfigError(f"{folder}: there is no folder {folder.parent}; make it, or choose another place")
    return folder
