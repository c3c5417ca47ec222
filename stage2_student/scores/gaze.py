"""How the gaze of a run's students shifts within answers that both they and the teacher said, beside the teacher's own.

Dims: A supervised rows of a batch, C cells on which student and teacher are compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.capture import AttentionCapture
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.tools.record_view import TokenText
from vlm_distill_cache.common.tools.shift import Gaze, ShiftReport, measure
from vlm_distill_cache.data.text.generation import device_of
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.losses.attention_targets import AttentionTarget, student_cells
from vlm_distill_cache.stage2_student.losses.objective import record, requests_of
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.scores.evaluate import language_model_of
from vlm_distill_cache.stage2_student.scores.taught import TEACHER
from vlm_distill_cache.stage2_student.students.model import model_inputs_of

_TOGETHER = 4  # samples


@dataclass(frozen=True, kw_only=True)
class RunShift:
    """What the page of a run tells of shifts.

    Attributes:
        teacher: Over evenly spaced records of the cache, on its grid.
        sheets: The first of its largest shifts, drawn (`draw_shift`).
        beside: The teacher and the students by name, on the same few samples and cells; empty where they cannot be compared.
    """

    teacher: ShiftReport
    sheets: Sequence[PIL.Image.Image] = ()
    beside: Mapping[str, ShiftReport] = field(default_factory=dict)


def compare_shifts(
    models: Mapping[str, Any], cached: CachedDataset, text: TokenText, *, written_end: str | None = None
) -> dict[str, ShiftReport]:
    """Follow the gaze of teacher and students through the same answers, on the cells where both can be told.

    Args:
        models: Students by name, all of one depth and one way of cutting pictures.
        cached: Samples joined to their records, with the teacher's answer attention.
        written_end: As of `measure`.

    Returns:
        By model, the teacher first; none where no sample has a picture.
    """
    gazes: dict[str, list[Gaze]] = {}
    for name, model in models.items():
        found = list(_gazes(model, cached))
        gazes.setdefault(TEACHER, [teacher for teacher, _ in found])
        gazes[name] = [own for _, own in found]
    places = next(
        (len(one.cells[0]) for of in gazes.values() for one in of if one.cells is not None and len(one.cells)), 0
    )
    if not places:
        return {}
    return {
        name: measure(of, text, grid=(1, places), total=len(of), written_end=written_end) for name, of in gazes.items()
    }


@torch.inference_mode()
def _gazes(model: Any, cached: CachedDataset) -> Iterator[tuple[Gaze, Gaze]]:
    """The teacher's gaze and the student's, sample by sample."""
    language_model = language_model_of(model)
    capture, groups = (
        AttentionCapture(language_model),
        cached.student_groups(int(language_model.config.num_hidden_layers)),
    )
    terms = choose_terms([RowAttentionCodec.signal])
    was_training = model.training
    model.eval()
    for start in range(0, len(cached), _TOGETHER):
        positions = range(start, min(start + _TOGETHER, len(cached)))
        batch = cached.batch(positions).to(device_of(model))
        target = batch.targets.get(RowAttentionCodec.signal)
        if target is None:
            continue  # without a picture
        with record(model, capture, requests_of(terms, batch, groups)) as (maps, _):
            model(**model_inputs_of(model, batch.inputs))
        own = student_cells(
            maps["answer"][batch.has_image.to(maps["answer"].device)], target, batch.rows[batch.has_image]
        )
        names = [cached.sample_ids[position] for position in positions]
        yield from _by_sample(names, batch, target, own)
    model.train(was_training)


def _by_sample(
    names: list[str], batch: TrainingBatch, target: AttentionTarget, own: Tensor
) -> Iterator[tuple[Gaze, Gaze]]:
    """Cut rows float ``[A, G, C]`` of a batch's samples with a picture; cells that carry no image are left out."""
    labels, start = batch.inputs.labels.cpu(), 0
    for image, sample in enumerate(batch.has_image.tolist()):
        said = labels[sample][labels[sample] != IGNORE_INDEX].tolist()
        rows = slice(start, start + len(said))
        cells = slice(None) if target.content is None else target.content[image]
        both = (side[rows].float().mean(dim=1)[:, cells].double().cpu().numpy() for side in (target.teacher, own))
        teacher, student = (Gaze(names[sample], said, gaze) for gaze in both)
        yield teacher, student
        start = rows.stop
