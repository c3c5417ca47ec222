"""Where teacher and student look while saying one word, drawn over the picture."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import overlap_matrix, pool_keys, show_twice, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, Tile, grid_tile
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.tools.picture import paint_heat
from vlm_distill_cache.data.sample import Dataset, Sample
from vlm_distill_cache.data.text.collate import Batch, collate, supervised_rows, visual_keys
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.generation import device_of, pad_token_id
from vlm_distill_cache.stage2_student.batches.dataset import answered_sample, encode_as_cached
from vlm_distill_cache.stage2_student.batches.layers import regroup_rows
from vlm_distill_cache.stage2_student.scores.evaluate import language_model_of
from vlm_distill_cache.stage2_student.students.model import model_inputs_of

PICTURE_SIDE = 220


@dataclass(frozen=True)
class Overlay:
    """One answer word with both heat maps.

    Attributes:
        text: Its conversation up to and including the word.
        picture: The image, longer side ``PICTURE_SIDE`` pixels.
    """

    sample_id: str
    text: str
    word: str
    picture: PIL.Image.Image
    teacher: PIL.Image.Image
    student: PIL.Image.Image


def collect_overlays(
    model: Any, encoder: SampleEncoder, cache: TeacherCache, dataset: Dataset, *, match: GroupMatch, count: int
) -> list[Overlay]:
    """Draw the answer word on which the teacher is most concentrated, for the first samples that have one.

    Args:
        cache: Must hold ``answer_attention``.
        match: How the student's layers meet the cached groups.

    Returns:
        At most ``count`` overlays, fewer where samples have no image or cannot be read.
    """
    codec = RowAttentionCodec.from_dict(cache.plan.signals[RowAttentionCodec.signal])
    capture = AttentionCapture(language_model_of(model))
    overlays: list[Overlay] = []
    for position in range(len(dataset)):
        if len(overlays) == count:
            break
        sample_id = dataset.sample_ids[position]
        if sample_id not in cache:
            continue
        try:
            sample = answered_sample(cache, dataset[position])
            encoded = encode_as_cached(encoder, cache, sample)
        except SampleError:
            continue
        if not encoded.tiles:
            continue
        teacher = regroup_rows(as_tensors(codec.decode(cache.read(sample_id))), match).cells.mean(dim=1)  # [A, C]
        row = _most_concentrated(teacher, encoded.labels, encoder)
        if row is None:
            continue
        batch = collate([encoded], pad_token_id(encoder)).to(device_of(model))
        student = _student_attention(model, capture, batch, match.student)  # [A, N]
        picture = sample.images[0].load()
        picture = picture.resize(_fit(picture.size), PIL.Image.Resampling.NEAREST)
        seen, boxes = seen_once(student[row], encoded.tiles)
        overlays.append(
            Overlay(
                sample_id=sample_id,
                text=_context(sample, encoded.input_ids, encoded.labels, row, encoder),
                word=_word(encoded.labels, row, encoder),
                picture=picture,
                teacher=draw_heat(picture, teacher[row], tile_boxes((grid_tile(*codec.grid),))),
                student=draw_heat(picture, seen, boxes),
            )
        )
    return overlays


@torch.inference_mode()
def _student_attention(model: Any, capture: AttentionCapture, batch: Batch, groups: Groups) -> Tensor:
    request = AttentionRequest(supervised_rows(batch), visual_keys(batch), groups)
    was_training = model.training
    model.eval()
    with capture.record({"answer": request}) as maps:
        model(**model_inputs_of(model, batch))
    model.train(was_training)
    return maps["answer"][0].mean(dim=0).cpu()  # [A, N]


def _most_concentrated(cells: Tensor, labels: np.ndarray, encoder: SampleEncoder) -> int | None:
    """The row of a word (not the end of an answer) that puts most of its mass on one cell."""
    ends = torch.from_numpy(labels[labels != IGNORE_INDEX] == encoder.tokenizer.eos_token_id)
    peak = cells.amax(dim=1).masked_fill(ends, 0.0)
    return int(peak.argmax()) if len(peak) and float(peak.max()) > 0 else None


def _word(labels: np.ndarray, row: int, encoder: SampleEncoder) -> str:
    return str(encoder.tokenizer.decode([int(labels[labels != IGNORE_INDEX][row])])).strip()


def _context(sample: Sample, ids: np.ndarray, labels: np.ndarray, row: int, encoder: SampleEncoder) -> str:
    """The question and the answer so far, from the tokens that this row's conversation shows."""
    position = int(np.flatnonzero(labels != IGNORE_INDEX)[row])
    answered, seen = 0, 0
    for turn in sample.turns:
        tokens = len(encoder.tokenizer(" " + turn.answer, add_special_tokens=False)["input_ids"]) + 1
        if seen + tokens > row:
            answered = row - seen
            said = encoder.tokenizer.decode(ids[position - answered + 1 : position + 1]).strip()
            return f"{turn.question or '(caption)'} {said}".strip()
        seen += tokens
    return str(encoder.tokenizer.decode(ids[max(0, position - 8) : position + 1]))


def _fit(size: tuple[int, int]) -> tuple[int, int]:
    scale = PICTURE_SIDE / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def seen_once(mass: Tensor, tiles: tuple[Tile, ...]) -> tuple[Tensor, Tensor]:
    """Attention float ``[N]`` and boxes that can be drawn: views of one place added up, nothing for newline tokens."""
    boxes = tile_boxes(tiles)
    if not show_twice(tiles):
        return mass, boxes
    cells = tile_boxes((grid_tile(FINEST_SIDE, FINEST_SIDE),))
    return pool_keys(mass, overlap_matrix(boxes, cells)), cells


def draw_heat(picture: PIL.Image.Image, mass: Tensor, boxes: Tensor) -> PIL.Image.Image:
    """Paint attention over a picture.

    Args:
        mass: Attention of each token or cell, float ``[N]``.
        boxes: Their boxes on the picture, float ``[N, 4]`` as shares of its sides.

    Returns:
        RGB of the same size, each box in the colour of its mass relative to the largest.
    """
    strongest = float(mass.max())
    width, height = picture.size
    heat = np.zeros((height, width))
    for value, (x0, y0, x1, y1) in zip(mass.tolist(), boxes.tolist(), strict=True):
        columns = slice(max(0, round(x0 * width)), max(0, round(x1 * width)))
        rows = slice(max(0, round(y0 * height)), max(0, round(y1 * height)))
        heat[rows, columns] = value / strongest if strongest > 0 else 0.0
    return paint_heat(heat, picture)
