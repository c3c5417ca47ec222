"""Samples of one forward pass: the student's tokens and, in the same order, what the teacher said of them.

Dims: B batch, T sequence, A supervised rows, R most rows of a sample, M most visual tokens, I samples with an image.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.data.images.byte_pixels import ImageInputs
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.data.text.encoding import EncodedSample


@dataclass(frozen=True)
class TrainingBatch:
    """A micro-batch: what the student reads and what the teacher said of it.

    Attributes:
        inputs: Tokens, masks and pixels.
        labels: Targets of the supervised rows, batch order, int64 ``[A]``.
        targets: The teacher's side by loss term, as the term's `collate` makes it; a term that no sample has is absent.
        rows: Positions of supervised rows, int64 ``[B, R]``, padding -1; on the CPU.
        text_rows: Positions of all text rows behind the visual tokens, int64 ``[B, X]``, padding -1; on the CPU.
        keys: Positions of visual tokens, int64 ``[B, M]``, padding -1; on the CPU.
        has_image: Positions in the batch of samples with an image, int64 ``[I]``; on the CPU.
        made_for: What a loss and a model must be to use it, of `DistillationDataset`.
    """

    inputs: Batch
    labels: Tensor
    targets: Mapping[str, Any]
    rows: Tensor
    text_rows: Tensor
    keys: Tensor
    has_image: Tensor
    row_count: int
    made_for: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.inputs)

    def supervised(self) -> Tensor:
        """Which rows are supervised, bool ``[B, T]``; on the CPU, where they can be counted without waiting."""
        samples, places = (self.rows >= 0).nonzero(as_tuple=True)
        found = torch.zeros(self.inputs.labels.shape, dtype=torch.bool)
        found[samples, self.rows[samples, places]] = True
        return found

    def to(self, device: torch.device | str | int, *, non_blocking: bool = True) -> "TrainingBatch":
        """The batch on a device; positions stay on the CPU, where they are checked without waiting."""
        if torch.device(device).type == "cpu":
            return self
        moved: TrainingBatch = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, rows=self.rows, text_rows=self.text_rows, keys=self.keys, has_image=self.has_image)

    def pin_memory(self) -> "TrainingBatch":
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
            value, **{entry.name: _map_tensors(getattr(value, entry.name), function) for entry in fields(value)}
        )
    return value


def arrays_of(value: Any) -> Iterable[Tensor | np.ndarray]:
    """All tensors and arrays inside nested dataclasses and mappings, as they are held in memory."""
    if isinstance(value, Tensor | np.ndarray):
        yield value
    elif isinstance(value, ImageInputs):
        yield from arrays_of(value.held)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from arrays_of(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from arrays_of(getattr(value, entry.name))


@dataclass(frozen=True)
class TrainingSample:
    """One sample, encoded, and the teacher's side of each loss term that it has one for."""

    encoded: EncodedSample
    targets: Mapping[str, Any]
    made_for: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_image(self) -> bool:
        """Whether the sample has visual tokens."""
        return bool(self.encoded.image_inputs)
