"""Samples of one forward pass: the student's tokens and, in the same order, what the teacher said of them.

Dims: B batch, T sequence, A supervised rows, R most rows of a sample, M most visual tokens, C common cells, I
samples with an image, G layer groups.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.data.text.collate import Batch, collate, supervised_rows, text_rows, visual_keys
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage2_student.batches.features import FeatureBatch, collate_features
from vlm_distill_cache.stage2_student.batches.signals import AttentionTarget, SampleSignals
from vlm_distill_cache.stage2_student.loss_weights import ALL_ROWS, ATTENTION_TERMS, FEATURE_TERMS, ROW_SIGNALS


@dataclass(frozen=True)
class AttentionBatch:
    """One attention signal of a batch, padded to the most cells; samples with an image only, in batch order.

    Attributes:
        teacher: float32; ``answer_attention`` ``[A', G, C]`` (rows of samples with an image), ``text_attention``
            likewise, ``visual_columns`` ``[I, G, C]``, ``visual_map`` and ``all_attention`` ``[I, G, C, C]``.
        image_mass: float32 ``[A', G]`` of signals with rows; else None.
        kept: The teacher's half of the sink mask of ``visual_map``, bool ``[I, G, C, C]``; else None.
        complete: Whether ``teacher`` holds the value of each pair of a ``visual_map``.
        student_pool: float32 ``[I, M, C]``.
        content: bool ``[I, C]``, False where a cell carries no image; None if all do.
        count: Rows (of signals with rows) or images on which the teacher has any mass: what the loss is a
            mean over.
        text: The text rows of ``all_attention``, float32 ``[X', G, C]``; else None.
    """

    teacher: Tensor
    image_mass: Tensor | None
    student_pool: Tensor
    content: Tensor | None
    count: int
    kept: Tensor | None = None
    complete: bool = True
    text: Tensor | None = None


@dataclass(frozen=True)
class TrainingBatch:
    """A micro-batch: what the student reads and what the teacher said of it.

    Attributes:
        inputs: Tokens, masks and pixels.
        labels: Targets of the supervised rows, batch order, int64 ``[A]``.
        logits: The teacher's logits of these rows; None if no loss reads them.
        attention: The teacher's attention by loss term.
        features: The teacher's hidden states and visual logits by loss term.
        rows: Positions of supervised rows, int64 ``[B, R]``, padding -1; on the CPU.
        text_rows: Positions of all text rows behind the visual tokens, int64 ``[B, X]``, padding -1; on the CPU.
        keys: Positions of visual tokens, int64 ``[B, M]``, padding -1; on the CPU.
        has_image: Positions in the batch of samples with an image, int64 ``[I]``.
        row_count: A.
    """

    inputs: Batch
    labels: Tensor
    logits: SparseLogits | None
    attention: Mapping[str, AttentionBatch]
    rows: Tensor
    text_rows: Tensor
    keys: Tensor
    has_image: Tensor
    row_count: int
    features: Mapping[str, FeatureBatch] = field(default_factory=dict)

    @property
    def units(self) -> tuple[int, ...]:
        """How much each loss is a mean over: supervised rows, then one number an attention or feature term."""
        found = (*map(self.attention.get, ATTENTION_TERMS), *map(self.features.get, FEATURE_TERMS))
        return (self.row_count, *(0 if target is None else target.count for target in found))

    def to(self, device: torch.device) -> "TrainingBatch":
        """The batch on a device; positions stay on the CPU, where they are checked without waiting."""
        if device.type == "cpu":
            return self
        moved: TrainingBatch = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, rows=self.rows, text_rows=self.text_rows, keys=self.keys)

    def pinned(self) -> "TrainingBatch":
        """The batch in page-locked memory, from which copies to an accelerator need not wait."""
        pinned: TrainingBatch = _map_tensors(self, lambda tensor: tensor.pin_memory())
        return pinned


def _map_tensors(value: Any, function: Any) -> Any:
    """Apply a function to every tensor of nested dataclasses and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{entry.name: _map_tensors(getattr(value, entry.name), function) for entry in fields(value)},
        )
    return value


@dataclass(frozen=True)
class TrainingSample:
    """One sample, encoded and decoded."""

    encoded: EncodedSample
    signals: SampleSignals

    @property
    def has_image(self) -> bool:
        """Whether the sample has visual tokens."""
        return bool(self.encoded.image_inputs)


def arrays_of(value: Any) -> Iterable[Tensor | np.ndarray]:
    """All tensors and arrays inside nested dataclasses and mappings."""
    if isinstance(value, Tensor | np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from arrays_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from arrays_of(getattr(value, entry.name))


def collate_samples(samples: Sequence[TrainingSample], *, pad_token_id: int) -> TrainingBatch:
    """Pad samples to one batch and concatenate the teacher's rows in the same order.

    Args:
        samples: At least one; all with the same signals.
        pad_token_id: Fills shorter sequences.

    Returns:
        The micro-batch, on the CPU.
    """
    inputs = collate([sample.encoded for sample in samples], pad_token_id)
    labels = inputs.labels[inputs.labels != IGNORE_INDEX]
    images = [position for position, sample in enumerate(samples) if sample.has_image]
    logits = [sample.signals.logits for sample in samples if sample.signals.logits is not None]
    attention: dict[str, AttentionBatch] = {}
    if images:
        for term in samples[images[0]].signals.attention:
            attention[term] = _collate_attention(
                term, [samples[position].signals.attention[term] for position in images]
            )
    return TrainingBatch(
        inputs=inputs,
        labels=labels,
        logits=SparseLogits.cat(logits) if logits else None,
        attention=attention,
        rows=supervised_rows(inputs),
        text_rows=text_rows(inputs),
        keys=visual_keys(inputs),
        has_image=torch.tensor(images, dtype=torch.int64),
        row_count=len(labels),
        features=collate_features([sample.signals.features for sample in samples]),
    )


def _collate_attention(term: str, targets: Sequence[AttentionTarget]) -> AttentionBatch:
    """Pad one attention term of samples with an image to the most cells and visual tokens."""
    cells = max(target.content.shape[0] for target in targets)
    keys = max(target.student_pool.shape[0] for target in targets)
    by_pair = term in ("visual_map", ALL_ROWS)
    padded = [_pad_cells(target.teacher, cells, both=by_pair) for target in targets]
    teacher = torch.cat(padded) if term in ROW_SIGNALS else torch.stack(padded)
    content = torch.stack([_pad_cells(target.content, cells, both=False) for target in targets])
    pools = [target.student_pool for target in targets]
    masses = [target.image_mass for target in targets if target.image_mass is not None]
    masks = [_pad_cells(target.kept, cells, both=True) for target in targets if target.kept is not None]
    texts = [_pad_cells(target.text, cells, both=False) for target in targets if target.text is not None]
    return AttentionBatch(
        teacher=teacher,
        image_mass=torch.cat(masses) if masses else None,
        student_pool=torch.stack(
            [torch.nn.functional.pad(pool, (0, cells - pool.shape[1], 0, keys - pool.shape[0])) for pool in pools]
        ),
        content=None if bool(content.all()) else content,
        count=int(has_mass(teacher).sum()),
        kept=torch.stack(masks) if masks else None,
        complete=all(target.complete for target in targets),
        text=torch.cat(texts) if texts else None,
    )


def _pad_cells(tensor: Tensor, cells: int, *, both: bool) -> Tensor:
    """Append empty cells to the last axis, or to the last two."""
    missing = cells - tensor.shape[-1]
    if missing == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, missing, 0, missing) if both else (0, missing))


def has_mass(teacher: Tensor) -> Tensor:
    """Which rows or samples an attention loss averages over: `[A or B, ...]` to bool `[A or B]`.

    Those without any mass are text-only, or pictures so narrow that no token carries image.
    """
    return teacher.flatten(1).any(dim=1)
