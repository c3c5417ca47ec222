"""What the teacher said of cached samples and where it looked, word by word, with students beside it: for a page.

Dims: A supervised rows, N visual tokens, C grid cells (row-major from the top left), W words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import overlap_matrix, pool_keys, show_twice, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, Tile, grid_tile, tiles_of
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.logits import LogitCodec, LogitRows
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.pixels import image_hash
from vlm_distill_cache.common.tools.picture import paint_heat
from vlm_distill_cache.common.tools.record_view import TokenText, load_token_text
from vlm_distill_cache.common.tools.views import Place, chosen, chosen_words, join_views, lay_out, shots_of
from vlm_distill_cache.data.questions import pictures_of
from vlm_distill_cache.data.sample import Dataset, Sample
from vlm_distill_cache.data.text.collate import Batch, collate, supervised_rows, visual_keys
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder, build_prompt
from vlm_distill_cache.data.text.generation import device_of, generate_answers, pad_token_id
from vlm_distill_cache.stage2_student.batches.dataset import answered_sample, encode_as_cached
from vlm_distill_cache.stage2_student.batches.layers import regroup_rows
from vlm_distill_cache.stage2_student.scores.evaluate import language_model_of
from vlm_distill_cache.stage2_student.students.model import generation_inputs_of, model_inputs_of

TEACHER = "teacher"
PICTURE_SIDE = 220
MOST_WORDS = 32  # of an answer
_HEAT_SIDE = 48  # pixels of a heat map; it is stretched over its picture
_MOST_FRAMES = 8  # of a sample, that are drawn
_LIKELY = 3  # of the teacher's tokens that are told
_MOST_TOKENS = 64  # of a student's answer


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where one model looked while it said a word.

    Attributes:
        heat: RGBA, to be stretched over the picture; each has its own scale, up to its strongest place.
        image_mass: Share of the attention on the picture, in [0, 1].
        cosine: Likeness to the teacher's, on its grid; None of the teacher itself, or where one of the two has no mass.
    """

    heat: PIL.Image.Image
    image_mass: float
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class Word:
    """One word of an answer: the teacher's most likely tokens at its first place, and who looked where."""

    text: str
    likely: Sequence[tuple[str, float]] = ()
    looks: Mapping[str, Look] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Taught:
    """One answer of a cached sample.

    Attributes:
        answer: What the cache was made with.
        written: Whether the teacher wrote it.
        teacher: What the teacher held for most likely at each of its tokens; empty where the cache has no logits.
        picture: Longer side ``PICTURE_SIDE`` pixels; of several, a sheet with a row for each and a strip of frames.
        note: How many pictures and frames of how many are drawn, where not all are.
        said: What each student answers, in its own words.
        words: Of the answer, at most ``MOST_WORDS``.
        chosen: The word on which the teacher is most concentrated.
    """

    sample_id: str
    question: str
    answer: str
    written: bool
    teacher: str
    picture: PIL.Image.Image | None
    said: Mapping[str, str]
    words: Sequence[Word]
    chosen: int = 0
    note: str = ""


Models = Mapping[str, tuple[Any, SampleEncoder]]


def collect_taught(
    models: Models, cache: TeacherCache, dataset: Dataset, *, match: GroupMatch | None, count: int
) -> list[Taught]:
    """Ask students about the first cached samples, one answer each, and lay what they say and see beside the teacher's.

    Args:
        models: Students by name with their encoders, all of one depth and with one way of cutting pictures.
        match: How the students' layers meet the cached groups of ``answer_attention``; None: no maps.
        count: Most samples; fewer where samples cannot be read, or have no picture to look at.
    """
    text = load_token_text(cache)
    codec = None if match is None else RowAttentionCodec.from_dict(cache.plan.signals[RowAttentionCodec.signal])
    captures = {name: AttentionCapture(language_model_of(model)) for name, (model, _) in models.items()}
    found: list[Taught] = []
    for position in range(len(dataset)):
        if len(found) == count:
            break
        if dataset.sample_ids[position] not in cache:
            continue
        try:
            sample = answered_sample(cache, dataset[position])
            looking = {} if match is None else models  # others may have other tokens than the cache
            encoded = {name: encode_as_cached(encoder, cache, sample) for name, (_, encoder) in looking.items()}
            pictures = pictures_of(sample, cache.plan.extra.get("frames"))
        except SampleError:
            continue
        if not all(one.tiles for one in encoded.values()):
            continue
        record = cache.read(sample.sample_id)
        sheet = lay_sheet(record, pictures)
        maps: dict[str, tuple[Tensor, Tensor]] = {}  # float [A, N or C] and its boxes, by model
        if match is not None and codec is not None:
            cells = regroup_rows(as_tensors(codec.decode(record)), match).cells.mean(dim=1)  # [A, C]
            maps[TEACHER] = cells, tile_boxes(codec.cells_of(tiles_of(record)))
            for name, (model, encoder) in models.items():
                batch = collate([encoded[name]], pad_token_id(encoder)).to(device_of(model))
                mass = _attention(model, captures[name], batch, match.student)  # [A, N]
                if len(sheet.places) > 1:  # on the teacher's cells, whose views are drawn
                    own = overlap_matrix(tile_boxes(encoded[name].tiles), maps[TEACHER][1])
                    maps[name] = pool_keys(mass, own), maps[TEACHER][1]
                else:
                    maps[name] = seen_once(mass, encoded[name].tiles)
        answers = _answers(record["labels"].tolist(), text)
        if not answers:
            continue
        turn, row = _most_telling(answers, maps.get(TEACHER), alone=sample.independent_turns)
        logits = _logits(record, cache)
        words = _words(record, logits, text, answers[turn], maps, sheet)
        places = [rows for _, rows in text.words(record["labels"].tolist()) if rows[0] in answers[turn]]
        asked = sample.turns[turn] if turn < len(sample.turns) else sample.turns[-1]
        found.append(
            Taught(
                sample_id=sample.sample_id,
                question=asked.question or "(a caption)",
                answer=asked.answer,
                written=AnswersCodec.signal in cache.plan.signals,
                teacher=_best(logits, answers[turn], text),
                picture=sheet.picture,
                note=sheet.note,
                said={name: _say(one, sample, asked.question, len(answers[turn])) for name, one in models.items()},
                words=words,
                chosen=next((place for place, rows in enumerate(places[:MOST_WORDS]) if row in rows), 0),
            )
        )
    return found


def teachers_words(
    cache: TeacherCache, sample_id: str, picture: PIL.Image.Image, answer: str, text: TokenText
) -> str | None:
    """What a teacher held for most likely at each place of one answer of a cached sample.

    Returns:
        None where the cache has no logits, or not this answer to this picture.
    """
    if LogitCodec.signal not in cache.plan.signals or sample_id not in cache:
        return None
    record = cache.read(sample_id)
    labels = record["labels"].tolist()
    if image_hash(picture) not in [row.tobytes() for row in record["image_hash"]]:
        return None
    for rows in _answers(labels, text):
        if text.decode([labels[row] for row in rows]).strip() == answer.strip():
            return _best(_logits(record, cache), rows, text)
    return None


def _logits(record: Record, cache: TeacherCache) -> LogitRows[np.ndarray] | None:
    settings = cache.plan.signals.get(LogitCodec.signal)
    return None if settings is None else LogitCodec.from_dict(settings).decode(record)


def _best(logits: LogitRows[np.ndarray] | None, rows: range, text: TokenText) -> str:
    """The most likely token of each row, as text."""
    return "" if logits is None else text.decode(logits.token_ids[rows.start : rows.stop, 0].tolist()).strip()


def _answers(labels: Sequence[int], text: TokenText) -> list[range]:
    """The rows of each answer, without the tokens that end them."""
    found, start = [], 0
    for row, label in enumerate([*labels, None]):
        if label is None or label in text.special:
            if row > start:
                found.append(range(start, row))
            start = row + 1
    return found


def _most_telling(answers: Sequence[range], seen: tuple[Tensor, Tensor] | None, *, alone: bool) -> tuple[int, int]:
    """The answer with the row that puts most of the teacher's mass on one cell, and that row; the first without maps.

    ``alone``: whether each question can be asked without the ones before it.
    """
    if seen is None:
        return 0, 0
    peak = seen[0].amax(dim=1)  # [A]
    open_to_us = range(len(answers) if alone else 1)
    best = [max(answers[turn], key=lambda row: float(peak[row])) for turn in open_to_us]
    turn = max(open_to_us, key=lambda one: float(peak[best[one]]))
    return turn, best[turn]


def _words(
    record: Record,
    logits: LogitRows[np.ndarray] | None,
    text: TokenText,
    rows: range,
    maps: Mapping[str, tuple[Tensor, Tensor]],
    sheet: Sheet,
) -> list[Word]:
    found = []
    for word, own in text.words(record["labels"].tolist()):
        if own[0] not in rows:
            continue
        likely: list[tuple[str, float]] = []
        if logits is not None:
            first = own[0]
            kept = logits.entry_mask[first]
            pairs = zip(logits.token_ids[first][kept], np.exp(logits.log_probs[first][kept]), strict=True)
            likely = [(text.of(int(token)), float(share)) for token, share in pairs][:_LIKELY]
        means = {name: (mass[own].mean(dim=0), boxes) for name, (mass, boxes) in maps.items()}
        found.append(Word(text=word, likely=likely, looks={name: _look(name, means, sheet) for name in means}))
        if len(found) == MOST_WORDS:
            break
    return found


def _look(name: str, means: Mapping[str, tuple[Tensor, Tensor]], sheet: Sheet) -> Look:
    """One word's map of one model; ``means`` are mass float ``[N]`` and boxes ``[N, 6]`` of all."""
    mass, boxes = means[name]
    cosine = None
    if name != TEACHER:
        cells, grid = means[TEACHER]
        own = pool_keys(mass, overlap_matrix(boxes, grid))
        norms = float(own.norm() * cells.norm())
        cosine = float(own @ cells) / norms if norms > 0 else None
    return Look(heat=sheet.heat(mass, boxes), image_mass=float(mass.sum()), cosine=cosine)


@torch.inference_mode()
def _attention(model: Any, capture: AttentionCapture, batch: Batch, groups: Groups) -> Tensor:
    request = AttentionRequest(supervised_rows(batch), visual_keys(batch), groups)
    was_training = model.training
    model.eval()
    with capture.record({"answer": request}) as maps:
        model(**model_inputs_of(model, batch))
    model.train(was_training)
    return maps["answer"][0].mean(dim=0).float().cpu()  # [A, N]


def _say(of: tuple[Any, SampleEncoder], sample: Sample, question: str, tokens: int) -> str:
    """A student's own answer, about as long as the one that it was taught; a dash where it cannot be asked."""
    model, encoder = of
    try:
        prompt = build_prompt(
            encoder, sample.images[0] if sample.images else None, question, sample.system, further=sample.images[1:]
        )
    except SampleError:
        return "-"
    return say(model, encoder, [prompt], min(_MOST_TOKENS, tokens + 8))[0]


def say(model: Any, encoder: SampleEncoder, prompts: Sequence[EncodedSample], most: int) -> tuple[str, ...]:
    """Greedy answers of at most so many tokens, in one batch."""
    made = generate_answers(model, encoder, prompts, max_new_tokens=most, inputs=generation_inputs_of(model))
    return made.texts


def shrink(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture whose longer side is ``PICTURE_SIDE`` pixels; small ones keep their edges."""
    scale = PICTURE_SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    how = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.LANCZOS
    return picture.convert("RGB").resize(size, how)


def seen_once(mass: Tensor, tiles: tuple[Tile, ...]) -> tuple[Tensor, Tensor]:
    """Attention float ``[A, N]`` and boxes that can be drawn: views of one place added up, nothing for newline tokens."""
    boxes = tile_boxes(tiles)
    if not show_twice(tiles):
        return mass, boxes
    cells = tile_boxes((grid_tile(FINEST_SIDE, FINEST_SIDE),))
    return pool_keys(mass, overlap_matrix(boxes, cells)), cells


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What is drawn of a sample.

    Attributes:
        picture: Its picture, or all that are drawn; None without any.
        drawn: Which of the views, in the order of the cells.
        places: Where they lie; empty of one picture.
        note: How many are drawn of how many, where not all are.
    """

    picture: PIL.Image.Image | None
    drawn: Sequence[int] = ()
    places: Sequence[Place] = ()
    note: str = ""

    def heat(self, mass: Tensor, boxes: Tensor) -> PIL.Image.Image:
        """`heat_picture`; of several views on each of them, with one scale for all: attention per area.

        Args:
            mass: Of the cells of all views, float ``[K]``.
            boxes: float ``[K, 6]`` from `tile_boxes`.
        """
        if not self.places:
            return heat_picture(mass, boxes)
        views = list(dict.fromkeys(map(tuple, boxes[:, 4:].tolist())))
        areas = (boxes[:, 2:4] - boxes[:, :2]).prod(dim=1)
        densest = float((mass / areas).max())
        parts = []
        for view, place in zip(self.drawn, self.places, strict=True):
            own = (boxes[:, 4:] == boxes.new_tensor(views[view])).all(dim=1)
            heat = heat_picture(mass[own], boxes[own], strongest=densest * float(areas[own][0]))
            parts.append(heat.resize(place.size, PIL.Image.Resampling.NEAREST))
        return join_views(parts, self.places, clear=True)


def lay_sheet(record: Record, pictures: Sequence[PIL.Image.Image]) -> Sheet:
    """Lay out what a cached sample shows.

    Args:
        pictures: Its pictures and frames, in order.
    """
    shots = shots_of(record, dict(enumerate(pictures)))
    if len(shots) < 2:
        return Sheet(picture=shrink(pictures[0]) if pictures else None)
    drawn = chosen(shots, frames=_MOST_FRAMES)
    shown = [shots[view] for view in drawn]
    places = lay_out(shown, [shot.sides or (1, 1) for shot in shown], still=PICTURE_SIDE, frame=PICTURE_SIDE // 2)
    parts = [
        None if shot.image is None else shot.image.convert("RGB").resize(place.size, PIL.Image.Resampling.LANCZOS)
        for shot, place in zip(shown, places, strict=True)
    ]
    return Sheet(picture=join_views(parts, places), drawn=drawn, places=places, note=chosen_words(shots, drawn))


def heat_picture(mass: Tensor, boxes: Tensor, *, strongest: float | None = None) -> PIL.Image.Image:
    """Paint attention, to be laid over a picture of any size.

    Args:
        mass: Attention of each token or cell, float ``[N]``.
        boxes: Their boxes on the picture, float ``[N, 6]`` from `tile_boxes`; what is outside of the picture is cut off.
        strongest: What is painted brightest; None: the largest mass.

    Returns:
        RGBA, square; each box in the colour of its mass relative to the largest, clear where there is none.
    """
    strongest = float(mass.max()) if strongest is None else strongest
    heat = np.zeros((_HEAT_SIDE, _HEAT_SIDE))
    for value, box in zip(mass.tolist(), boxes.tolist(), strict=True):
        x0, y0, x1, y1 = (max(0, round(side * _HEAT_SIDE)) for side in box[:4])
        heat[y0:y1, x0:x1] = value / strongest if strongest > 0 else 0.0
    painted = paint_heat(heat, None)
    painted.putalpha(PIL.Image.fromarray(np.rint(255 * (0.1 + 0.6 * heat)).astype(np.uint8)))
    return painted
