"""How a cached teacher's gaze shifts within its answers: measured over evenly spaced records, in words and for programs.

An answer is what stands before the token that ends it; the row of that token is no word's and is left out. The gaze
of a token is the row that predicts it, mean over the layer groups.

Dims: A supervised rows of a record, T tokens of one answer, C cells of the grid.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.attention.shift import (
    THRESHOLD,
    GazeShift,
    Interval,
    gaze_shift,
    kept_count,
    ratio_intervals,
)
from vlm_distill_cache.common.attention.tiles import tiles_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Record, base_fields
from vlm_distill_cache.common.cache.spaced import MOST_RECORDS, spaced_records, spaced_unsealed
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.tools.record_view import (
    FIRST_IDEOGRAPH,
    TokenText,
    load_token_text,
    read_token_text,
)

SPANS = {"1": (1, 1), "2-3": (2, 3), "4-7": (4, 7), "8+": (8, None)}
"""Tokens of an answer that are counted together, from and to; token 0 is the one that they are compared with."""
SHOWN_SHIFTS = 8
_LOOKED_AT = 64  # records that tell which token ends answers
_MOST_KINDS = 8  # of beginnings of questions
_LEAST_SHARE = 0.01  # of all answers, for a kind of its own
_SHARES = ("first", "best", "common")
_ALL, _BEGINS, CAPTIONS, OTHERS = "", " ...", "no question (a caption)", "other questions"
_FEW, _MAX_WORDS = 5, 32  # words of a short answer; characters of a question's first words
_READ, _INSIDE = 1000, "'-\u2019\u200c\u200d"  # characters of a question; what may stand inside a word
_NONE = Interval(np.nan, np.nan, np.nan)
_NUMBER, _OPTION = re.compile(r"[-+]?\d[\d.,/:]*"), re.compile(r"\(?[a-z]\)?")
Asked = Callable[[Sequence[str]], Mapping[str, Sequence[str]]]
"""From sample ids to the questions of each one's turns; samples that cannot be read are left out."""


class Gaze(NamedTuple):
    """Where one record looks: the A tokens that its rows predict, and float ``[A, C]``; None without a picture.

    ``views`` are the numbers of cells of each view, of several: an answer is followed on those that stand in front of it.
    """

    sample_id: str
    labels: Sequence[int]
    cells: NDArray[np.float64] | None
    views: tuple[int, ...] = ()

    def shift(self, rows: range) -> GazeShift:
        """How it moves within one answer."""
        own = self.cells[rows.start : rows.stop] if self.cells is not None else np.zeros((0, 1))
        parts = np.split(own, np.cumsum(self.views)[:-1], axis=1) if self.views else [own]
        seen = sum(part.shape[1] for part in parts if part.any())  # a row looks at all that stands in front of it
        return gaze_shift(own, keep=kept_count(seen) if seen else None)


@dataclass(frozen=True, kw_only=True)
class AnswerShift:
    """One answer of a record.

    Attributes:
        number: Which of the record's answers, from 0.
        rows: Its rows of the record.
        labels: Its tokens.
        text: What it says; empty where the cache holds no tokenizer.
        tokens: Token 0 and the `worst` one as text, of those that are shown; empty like ``text``.
    """

    sample_id: str
    number: int
    rows: range
    labels: Sequence[int]
    text: str
    shift: GazeShift
    tokens: tuple[str, ...] = ()

    @property
    def events(self) -> int:
        """Its shift events."""
        return int(self.shift.event.sum())

    @property
    def worst(self) -> int:
        """The token whose gaze lies least on token 0's places, of what its own best hold; 0 where there is one alone."""
        share = self.shift.first[1:] / self.shift.best[1:]
        return 0 if not np.isfinite(share).any() else 1 + int(np.nanargmin(share))


class SpanShift(NamedTuple):
    """Of some places in answers: the number of tokens, and the means of `GazeShift`'s shares."""

    tokens: int
    first: Interval
    best: Interval
    common: Interval


@dataclass(frozen=True, kw_only=True)
class KindShift:
    """What one kind of answer shows; ``answers`` counts those of at least two tokens, which alone can shift."""

    name: str
    answers: int
    single: int
    first: Interval
    best: Interval
    events: Interval
    shifting: Interval


@dataclass(frozen=True, kw_only=True)
class ShiftReport:
    """What `measure` found; shares in [0, 1], each with its interval.

    Attributes:
        samples: Records that were looked at, ``total`` those of the cache, ``pictures`` those of them with a gaze.
        kept, places: k and C; of several pictures those of one.
        frame_grid: Where samples may have several pictures, whose cells are then compared all together: rows and columns of
            the cells of a frame; else None.
        single: Answers of one token, which cannot shift, beside ``answers``, which can; ``blind`` ones never look.
        spans: By `SPANS`.
        events: Shift events an answer that can shift; ``shifting``: the share of these with at least one.
        kinds: The commonest first.
        asked: Whether kinds are of questions; else of answers alone, since a cache holds no question.
        largest: The answers of the largest shift, one a sample; see `AnswerShift.worst`.
    """

    samples: int
    total: int
    pictures: int
    grid: tuple[int, int]
    kept: int
    places: int
    threshold: float
    answers: int
    single: int
    blind: int
    spans: dict[str, SpanShift]
    events: Interval
    shifting: Interval
    kinds: tuple[KindShift, ...]
    asked: bool
    largest: tuple[AnswerShift, ...]
    frame_grid: tuple[int, int] | None = None

    def values(self) -> dict[str, Any]:
        """All figures for programs, JSON."""
        others = {name: value for name, value in vars(self).items() if name not in ("spans", "kinds", "largest")}
        if self.frame_grid is None:
            del others["frame_grid"]
        return {
            **_plain(others),
            "tokens": {span: _plain(of._asdict()) for span, of in self.spans.items()},
            "kinds": [_plain(vars(kind)) for kind in self.kinds],
            "largest": [
                {
                    "sample": one.sample_id,
                    "answer": one.number,
                    "text": one.text,
                    "token": one.worst,
                    "tokens": list(one.tokens),
                    "first": float(one.shift.first[one.worst]),
                    "best": float(one.shift.best[one.worst]),
                    "events": one.events,
                }
                for one in self.largest
            ],
        }


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in figures.items()}


def cache_shift(cache: TeacherCache, *, asked: Asked | None = None, most: int = MOST_RECORDS) -> ShiftReport:
    """Measure a sealed cache on evenly spaced records.

    Args:
        asked: Tells the questions; None: answers are grouped by what they are.

    Raises:
        CacheMismatchError: If it does not hold where answers look, with the remedy.
        CacheFormatError: If it is damaged.
    """
    cache.codec(RowAttentionCodec.signal)
    gazes = _gazes(spaced_records(cache, _fields(cache.plan), most=most), cache.plan)
    text, end = load_token_text(cache), cache.plan.template.get("answer_end")
    grids = grids_of(cache.plan)
    return measure(gazes, text, grid=grids[0], frame_grid=grids[1], total=len(cache), asked=asked, written_end=end)


def folder_shift(
    cache_dir: Path, plan: Plan, *, total: int, asked: Asked | None = None, most: int = MOST_RECORDS
) -> ShiftReport | None:
    """As `cache_shift`, of a folder whose shards are there but which is not sealed; None without answer attention."""
    if RowAttentionCodec.signal not in plan.signals:
        return None
    gazes = _gazes(spaced_unsealed(cache_dir, plan, _fields(plan), most=most), plan)
    text, end = read_token_text(cache_dir), plan.template.get("answer_end")
    grids = grids_of(plan)
    return measure(gazes, text, grid=grids[0], frame_grid=grids[1], total=total, asked=asked, written_end=end)


def grids_of(plan: Plan) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Rows and columns of the cells that the gaze is cached on: of a picture, and of a frame where there may be several."""
    codec = RowAttentionCodec.from_dict(plan.signals[RowAttentionCodec.signal])
    return codec.grid, (codec.frame_grid or codec.grid) if codec.several else None


def _fields(plan: Plan) -> list[str]:
    """What is read of each record."""
    base = (
        ("labels", "tiles")
        if plan.format_version == ONE_PICTURE
        else [f.name for f in base_fields(plan.format_version)]
    )
    return [*base, *(field.name for field in plan.fields[RowAttentionCodec.signal])]


def _gazes(records: Iterable[tuple[str, Record]], plan: Plan) -> Iterator[Gaze]:
    codec = RowAttentionCodec.from_dict(plan.signals[RowAttentionCodec.signal])
    for sample_id, record in records:
        cells = codec.decode(record).cells.mean(axis=1, dtype=np.float64) if len(record["tiles"]) else None
        views = tuple(tile.token_count for tile in codec.cells_of(tiles_of(record))) if codec.several else ()
        yield Gaze(sample_id, record["labels"].tolist(), cells, views)


def measure(
    gazes: Iterable[Gaze],
    text: TokenText,
    *,
    grid: tuple[int, int],
    total: int,
    frame_grid: tuple[int, int] | None = None,
    asked: Asked | None = None,
    written_end: str | None = None,
) -> ShiftReport:
    """Follow the gaze through each answer of some records.

    Args:
        gazes: Of the teacher, or of a student that said the same answers.
        total: Records that these stand for.
        written_end: What the prompt's template writes behind an answer where that is no special token (a line feed).
    """
    gazes = iter(gazes)
    head = list(islice(gazes, _LOOKED_AT))
    end = _end_of_answers([gaze.labels for gaze in head], text)
    samples, records = 0, list[list[AnswerShift]]()
    for gaze in chain(head, gazes):
        samples += 1
        if gaze.cells is not None:
            records.append(
                [
                    AnswerShift(
                        sample_id=gaze.sample_id,
                        number=number,
                        rows=rows,
                        labels=(own := gaze.labels[rows.start : rows.stop]),
                        text=text.decode(own).strip() if text.special else "",
                        shift=gaze.shift(rows),
                    )
                    for number, rows in enumerate(
                        _without_end(gaze.labels, text, written_end) or split_answers(gaze.labels, end)
                    )
                ]
            )
    questions = {} if asked is None else asked([of[0].sample_id for of in records if of])
    kinds = _kinds_of(records, questions)
    figures = _Figures(len(records))
    single, blind, counts = Counter[str](), 0, Counter[str]()
    for place, (answers, its_kinds) in enumerate(zip(records, kinds, strict=True)):
        for one, kind in zip(answers, its_kinds, strict=True):
            shift = one.shift
            if not shift.measured.any():
                blind += bool(one.rows)  # an empty answer is none
                continue
            if len(one.rows) == 1:
                single[kind] += 1
                continue
            counts[kind] += 1
            later = np.flatnonzero(shift.measured[1:]) + 1
            for group in (_ALL, kind):
                figures.add(place, (group, "events"), [shift.event.sum()])
                figures.add(place, (group, "shifting"), [shift.event.any()])
                figures.add(place, (group, "first"), shift.first[later])
                figures.add(place, (group, "best"), shift.best[later])
            for span, (start, stop) in SPANS.items():
                of = later[(later >= start) & (later <= (stop or len(one.rows)))]
                for name in _SHARES:
                    figures.add(place, (span, name), getattr(shift, name)[of])
    found = figures.intervals()

    def found_of(span: str) -> tuple[Interval, Interval, Interval]:
        first, best, common = (found.get((span, name), _NONE) for name in _SHARES)
        return first, best, common

    names = sorted({*counts, *single}, key=lambda kind: (-counts[kind] - single[kind], kind))
    return ShiftReport(
        samples=samples,
        total=total,
        pictures=len(records),
        grid=grid,
        kept=kept_count(grid[0] * grid[1]),
        places=grid[0] * grid[1],
        threshold=THRESHOLD,
        answers=sum(counts.values()),
        single=sum(single.values()),
        blind=blind,
        spans={span: SpanShift(figures.count((span, "first")), *found_of(span)) for span in SPANS},
        events=found.get((_ALL, "events"), _NONE),
        shifting=found.get((_ALL, "shifting"), _NONE),
        kinds=tuple(
            KindShift(
                name=kind,
                answers=counts[kind],
                single=single[kind],
                **{name: found.get((kind, name), _NONE) for name in ("first", "best", "events", "shifting")},
            )
            for kind in names
        ),
        asked=bool(questions),
        largest=_largest(records, text),
        frame_grid=frame_grid,
    )


def split_answers(labels: Sequence[int], end: int | None) -> list[range]:
    """The rows of each answer, without those of the token that ends it; the last one may be cut, and have none."""
    found, start = list[range](), 0
    for row, label in enumerate(labels):
        if label == end:
            found.append(range(start, row))
            start = row + 1
    if start < len(labels):
        found.append(range(start, len(labels)))
    return found


def _without_end(labels: Sequence[int], text: TokenText, written: str | None) -> list[range]:
    """The rows of the one answer before an end that is written out; none where it does not stand there.

    Such an end may stand inside an answer, too, which is then not cut: templates that write one hold one answer.
    """
    stands = (
        bool(written) and len(labels) > 0 and labels[-1] not in text.special and text.decode(labels[-1:]) == written
    )
    return [range(len(labels) - 1)] if stands else []


def _end_of_answers(labels: Iterable[Sequence[int]], text: TokenText) -> int | None:
    """The token that most records end with: a special one, if the tokenizer is known; None: there is none."""
    last = Counter(of[-1] for of in labels if len(of) and (not text.special or of[-1] in text.special))
    return min(last, key=lambda token: (-last[token], token)) if last else None


def _largest(records: Sequence[Sequence[AnswerShift]], text: TokenText) -> tuple[AnswerShift, ...]:
    """Of each record the answer that shifts most; the records that shift most."""
    moving = [[one for one in answers if len(one.rows) > 1 and one.worst] for answers in records]
    worst = [min(answers, key=_still_held) for answers in moving if answers]
    shown = sorted(worst, key=_still_held)[:SHOWN_SHIFTS]
    if not text.special:
        return tuple(shown)
    return tuple(replace(one, tokens=tuple(text.of(one.labels[token]) for token in (0, one.worst))) for one in shown)


def _still_held(one: AnswerShift) -> float:
    return float(one.shift.first[one.worst] / one.shift.best[one.worst])


class _Figures:
    """Sums and counts of each figure by sample, for intervals over samples."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._of: dict[tuple[str, str], NDArray[np.float64]] = {}  # [2, I]: sums, counts

    def add(self, sample: int, figure: tuple[str, str], values: Any) -> None:
        if len(values):
            of = self._of.setdefault(figure, np.zeros((2, self._samples)))
            of[:, sample] += float(np.sum(values)), len(values)

    def count(self, figure: tuple[str, str]) -> int:
        return int(self._of[figure][1].sum()) if figure in self._of else 0

    def intervals(self) -> dict[tuple[str, str], Interval]:
        if not self._of:
            return {}
        stacked = np.stack(list(self._of.values()))  # [F, 2, I]
        return dict(zip(self._of, ratio_intervals(stacked[:, 0].T, stacked[:, 1].T), strict=True))


def _kinds_of(records: Sequence[Sequence[AnswerShift]], questions: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The kind of each answer; beginnings of questions that are rare are one kind."""
    kinds = []
    for answers in records:
        asked = questions.get(answers[0].sample_id, ()) if answers else ()
        of = (
            asked if len(asked) >= len(answers) else [None] * len(answers)
        )  # else they are not these answers' questions
        kinds.append([_kind(of[one.number], one, known=bool(questions)) for one in answers])
    often = Counter(kind for of in kinds for kind in of if kind.endswith(_BEGINS))
    least = _LEAST_SHARE * sum(map(len, kinds))
    named = {kind for kind, count in often.most_common(_MOST_KINDS) if count >= least}
    return [[kind if kind in named or not kind.endswith(_BEGINS) else OTHERS for kind in of] for of in kinds]


def _beginning(question: str) -> str:
    """The first two words of a question, or the first two characters of a script that writes no spaces."""
    letters = "".join(
        one if one.isalnum() or one in _INSIDE or _is_mark(one) else " " for one in question.lower()[:_READ]
    )
    words = [word for part in letters.split() if (word := part.strip(_INSIDE))][:2]
    return words[0][:2] if words and ord(words[0][0]) >= FIRST_IDEOGRAPH else " ".join(words)


def _is_mark(character: str) -> bool:
    """Whether it belongs to the letter before it, as the vowels of Indian scripts do."""
    return unicodedata.category(character).startswith("M")


def _kind(question: str | None, answer: AnswerShift, *, known: bool) -> str:
    """By the answer where that tells, then by the first two words of the question."""
    said = answer.text.strip().rstrip(".").lower()
    if said in ("yes", "no"):
        return "yes or no"
    if _NUMBER.fullmatch(said):
        return "a number"
    if _OPTION.fullmatch(said):
        return "an option's letter"
    if question is not None:
        begins = _beginning(question)
        return one_line(begins, limit=_MAX_WORDS) + _BEGINS if begins else CAPTIONS
    if known:
        return "question not known"
    count = len(said.split()) if said else len(answer.rows)
    kind = "one" if count == 1 else "2 to 5" if count <= _FEW else "more than 5"
    return f"{kind} {'word' if said else 'token'}{'s' * (count > 1)}"
