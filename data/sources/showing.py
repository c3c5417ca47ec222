"""Which picture or video of a sample stands where: markers counted against what the entry gives.

As many markers as pictures: each stands at its marker. No marker: all stand in front of the first question. Anything
else is the sample's error, which names both numbers, with two exceptions. The one picture of a sample whose first
question alone marks it, however often, stands in front, as in LLaVA's loader. And ms-swift puts what has no marker in
front of the first message (`Template._add_default_tags`, swift/llm/template/base.py), so that one marker that begins it
stands for all; LLaMA-Factory (`mm_plugin.py`, `_validate_messages`) and InternVL refuse such a sample, and LLaVA-NeXT
takes a picture for each marker.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.data.sample import Turn
from vlm_distill_cache.data.sources.markers import (
    IMAGE_MARKER,
    KINDS,
    Kind,
    Piece,
    Shown,
    marker_in,
    numbers_in,
    unread_sign,
)
from vlm_distill_cache.data.sources.pictures import are_same, content_of, distinct

_ALL_AT_ONE = ("messages", "query", "conversation")  # the forms of ms-swift


@dataclass(frozen=True)
class Given:
    """Pictures and videos that an entry gives, as they stand there.

    Attributes:
        images: In order.
        videos: In order.
        numbers: Of the images, where their keys have numbers (``image_2``); empty: they are counted.
    """

    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    numbers: Sequence[int] = ()

    def of(self, kind: Kind) -> Sequence[Any]:
        """Those of one kind."""
        return self.images if kind == "image" else self.videos


@dataclass
class Placed:
    """What a sample shows, in order, and its turns with their places.

    Attributes:
        media: Kind and value of each.
        turns: With places where not all stand in front of the first question.
    """

    media: list[tuple[Kind, Any]] = field(default_factory=list)
    turns: tuple[Turn, ...] = ()


def place_media(
    turns: Sequence[Turn], asked: Sequence[Sequence[Piece]], given: Given, *, form: str, speaks: bool = False
) -> Placed:
    """Find out which picture or video each marker stands for.

    Args:
        turns: As read, without what their questions show.
        asked: The pieces of each question.
        given: What the entry gives beside its texts.
        form: The key that the conversation stands under.
        speaks: The first question speaks of a picture without a marker.

    Raises:
        SampleError: The markers are more or fewer than the pictures or videos, or of another kind.
    """
    asked, given = _without_second_names(asked, given)
    asked = _as_videos(asked, given)
    shown = [piece for pieces in asked for piece in pieces if isinstance(piece, Shown)]
    own = [(one.kind, one.value) for one in shown if one.value is not None]
    media: list[tuple[Kind, Any]] = [*own, *(("image", v) for v in given.images), *(("video", v) for v in given.videos)]
    if not media:
        if shown or speaks:
            raise _miscounted(shown or [Shown()], given, own)
        return Placed(turns=tuple(turns))
    if len(media) > 1 or media[0][0] == "video":
        _refuse_in_answers(turns)
        _refuse_unread(asked)
    elif not shown and any(IMAGE_MARKER in turn.answer for turn in turns):
        _refuse_in_answers(turns)  # the one picture is the answer's
    in_front = not any(isinstance(piece, Shown) for pieces in asked[1:] for piece in pieces)
    if len(media) == 1 and in_front and all(one.kind == media[0][0] for one in shown):
        parts = sum(one.is_part for one in shown)
        if media[0][0] == "video" and len(shown) > 1 and not numbers_in(asked[0]):
            raise _miscounted(shown, given, own)
        if max(parts, len(numbers_in(asked[0]))) > 1:
            raise _miscounted([one for one in shown if one.is_part] if parts > 1 else shown, given, own)
        return Placed(media, tuple(turns))
    found = _standing(asked, shown, given, own, form=form)
    placed = _with_places(turns, asked, found)
    if any(place for turn in placed.turns[:1] for place in turn.places) or any(
        turn.places for turn in placed.turns[1:]
    ):
        return placed
    return replace(placed, turns=tuple(replace(turn, places=()) for turn in placed.turns))  # all in front


def _without_second_names(asked: Sequence[Sequence[Piece]], given: Given) -> tuple[list[tuple[Piece, ...]], Given]:
    """The same without what an entry gives both in its texts and beside them.

    Raises:
        SampleError: Beside what its texts name there are others, and no marker for them.
    """
    questions = [tuple(pieces) for pieces in asked]
    for kind in KINDS:
        shown = [p for pieces in questions for p in pieces if isinstance(p, Shown) and p.kind == kind]
        own, beside = [one.value for one in shown if one.value is not None], list(given.of(kind))
        if not own or not beside:
            continue
        kept = distinct({"messages": list(map(content_of, own)), "entry": list(map(content_of, beside))})
        if "messages" not in kept:  # both are the same list; the longer names say more
            values = iter(beside)
            questions = [
                tuple(replace(p, value=next(values)) if _names(p, kind) else p for p in pieces)  # type: ignore[type-var]
                for pieces in questions
            ]
            beside = []
        elif len(own) == len(shown):
            named = [content_of(value) for value in own]
            left = [value for value in map(content_of, beside) if not any(are_same(value, one) for one in named)]
            if left:
                raise SampleError(
                    f"its text names {_several(kind, len(own))} and the entry {len(left)} more, for which there is no marker; "
                    "name each in one place"
                )
            beside = []
        elif len(kept) == 1:
            beside = []
        given = replace(given, images=beside) if kind == "image" else replace(given, videos=beside)
    return questions, given


def _names(piece: Piece, kind: Kind) -> bool:
    return isinstance(piece, Shown) and piece.kind == kind and piece.value is not None


def _several(kind: Kind, count: int) -> str:
    return f"{'an' if kind == 'image' else 'a'} {kind}" if count == 1 else f"{count} {kind}s"


def _as_videos(asked: Sequence[tuple[Piece, ...]], given: Given) -> list[tuple[Piece, ...]]:
    """Where there are videos and no pictures, a picture's marker stands for a video, as in LLaVA-Video's data."""
    shown = [piece for pieces in asked for piece in pieces if isinstance(piece, Shown)]
    if given.images or not given.videos or any(one.kind == "video" or one.value is not None for one in shown):
        return list(asked)
    return [
        tuple(
            replace(p, kind="video", alone=p.alone if p.is_part else "") if isinstance(p, Shown) else p for p in pieces
        )
        for pieces in asked
    ]


def _standing(
    asked: Sequence[tuple[Piece, ...]],
    shown: Sequence[Shown],
    given: Given,
    own: Sequence[tuple[Kind, Any]],
    *,
    form: str,
) -> "_Standing":
    """What stands at each marker, and what in front of the first question."""
    at: dict[Kind, list[list[Any]]] = {}
    front: list[tuple[Kind, Any]] = []
    for kind in KINDS:
        marks = [one for one in shown if one.kind == kind and one.value is None]
        values = list(given.of(kind))
        if not marks:
            front += [(kind, value) for value in values]
        elif any(one.number is not None for one in marks):
            at[kind] = [[value] for value in _numbered(marks, values, given, own)]
        elif len(marks) == len(values):
            at[kind] = [[value] for value in values]
        elif len(marks) == 1 and len(values) > 1 and form in _ALL_AT_ONE and _leads(asked[0]):
            at[kind] = [values]
        else:
            raise _miscounted(marks, given, own)
    return _Standing(at, front)


@dataclass
class _Standing:
    """By kind what stands at each marker of it, in order; and what stands in front."""

    at: Mapping[Kind, list[list[Any]]]
    front: Sequence[tuple[Kind, Any]]


def _numbered(
    marks: Sequence[Shown], values: Sequence[Any], given: Given, own: Sequence[tuple[Kind, Any]]
) -> list[Any]:
    """The value of each marker by its number; one may be shown several times, and each must be shown."""
    numbers = [one.number for one in marks]
    if None in numbers:
        raise SampleError("some of its markers have a number and some have none; give all or none of them one")
    if marks[0].kind == "image" and len(given.numbers) == len(values) and set(numbers) == set(given.numbers):
        places = {number: place for place, number in enumerate(given.numbers)}
    else:
        first = 0 if 0 in numbers else 1
        places = {first + place: place for place in range(len(values))}
        if set(numbers) != set(places):
            raise _miscounted(marks, given, own)
    return [values[places[number]] for number in numbers if number is not None]


def _leads(pieces: Sequence[Piece]) -> bool:
    """Whether a question begins with what it shows."""
    first = next((piece for piece in pieces if not isinstance(piece, str) or piece.strip()), "")
    return isinstance(first, Shown) and not first.placed


def _with_places(turns: Sequence[Turn], asked: Sequence[tuple[Piece, ...]], found: _Standing) -> Placed:
    placed = Placed()
    left = {kind: iter(values) for kind, values in found.at.items()}
    new: list[Turn] = []
    for number, (turn, pieces) in enumerate(zip(turns, asked, strict=True)):
        text, places = "", []
        if not number:
            placed.media += found.front
            places += [0] * len(found.front)
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            text += piece.placed
            values = next(left[piece.kind]) if piece.value is None else [piece.value]
            placed.media += [(piece.kind, value) for value in values]
            places += [len(text)] * len(values)
        lead = len(text) - len(text.lstrip())
        places = [max(0, place - lead) for place in places]
        text = text.lstrip()
        end = max(len(text.rstrip()), places[-1] if places else 0)
        new.append(replace(turn, question=text[:end], places=tuple(places)))
    placed.turns = tuple(new)
    return placed


def _refuse_in_answers(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns, start=1):
        plain = (marker for marker in (IMAGE_MARKER, "<video>") if marker in turn.answer)  # in code, too
        if sign := next(plain, "") or marker_in(turn.answer):
            raise SampleError(
                f"the answer of turn {number} has {sign}: pictures are read in questions alone; take it out if it is text, or "
                "leave the sample out"
            )


def _refuse_unread(asked: Sequence[Sequence[Piece]]) -> None:
    """Refuse a question in which something looks like a marker and is none: what it stands for would be shown elsewhere."""
    for pieces in asked:
        for piece in pieces:
            if isinstance(piece, str) and (sign := unread_sign(piece)):
                raise SampleError(
                    f"its text has {sign!r}, which is no marker that is read: write <image> or <video> where a picture or a "
                    "video stands, and put what is text into `backquotes`"
                )


def _miscounted(marks: Sequence[Shown], given: Given, own: Sequence[tuple[Kind, Any]]) -> SampleError:
    """What is wrong with the number of markers."""
    kind = marks[0].kind
    own = [item for item in own if item[0] == kind]
    numbers = {one.number for one in marks if one.number is not None}
    spoken, named = (len(numbers) or len(marks)) + len(own), len(given.of(kind)) + len(own)
    speaks = _several(kind, spoken)
    names = f"no {kind}" if not named else f"{named} {kind}{'s' if named > 1 else ''}"
    if spoken == named and numbers:
        speaks, names = f"{kind}s {', '.join(map(str, sorted(numbers)))}", f"{names}, counted from 1"
    missing = "the file of the image" if kind == "image" else "the file of the video, or the list of its frames,"
    remedy = (
        f"write one marker for each {kind}, or none to have all in front" if named else f"give {missing} under '{kind}'"
    )
    return SampleError(f"its text speaks of {speaks}, but the entry names {names}; {remedy}")
