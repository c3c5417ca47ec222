"""What the teacher is given of a batch, made on the CPU so that the thread which drives a GPU never waits for it.

Reading a number off a GPU (a count, a largest id, the positions where a mask is True) waits for everything queued on
it. All such numbers follow from the batch alone, so they are taken before it leaves the CPU.

Dims: B batch, T longest sequence, A supervised rows, N visual tokens, both of all samples.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenRequest
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.families.table import Family
from vlm_distill_cache.data.text.collate import Batch, supervised_rows, text_rows, visual_keys


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What to keep of a forward pass beside the logits of supervised rows.

    Attributes:
        groups: Layers of each attention group.
        answer_rows: Attention of supervised rows on visual tokens (``"answer"``).
        visual_rows: Attention of visual tokens on visual tokens (``"visual"``).
        columns: Its mean over the visual tokens that carry image (``"columns"``).
        text: Attention of all text rows on visual tokens (``"text"``).
        hidden: Layers of the hidden states of each signal: ``hidden`` at supervised rows, others at visual tokens.
        visual_logits: The logits of visual tokens too; they are as many rows as the image has tokens.
    """

    groups: tuple[tuple[int, ...], ...]
    answer_rows: bool
    visual_rows: bool
    columns: bool = False
    text: bool = False
    hidden: Mapping[str, tuple[int, ...]] | None = None
    visual_logits: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherInputs:
    """A batch as the teacher takes it.

    Attributes:
        model_inputs: The model's keyword arguments, floating-point image inputs in the model's dtype.
        rows: Rows whose logits are wanted, bool ``[B, T]``, always on the CPU.
        labels: Targets of the supervised rows, int64 ``[A]``, always on the CPU.
        row_counts: Supervised rows of each sample.
        visual_counts: Visual tokens of each sample.
        supervised: Which of the wanted rows are supervised, int64 ``[A]``; None: all.
        visual: Which of them are visual tokens, int64 ``[N]``; None: not wanted.
        attention: Rows and keys of the attention to record, by name.
        hidden: Rows of the hidden states to record, by signal.
    """

    model_inputs: Mapping[str, Any]
    rows: Tensor
    labels: Tensor
    row_counts: tuple[int, ...]
    visual_counts: tuple[int, ...]
    supervised: Tensor | None
    visual: Tensor | None
    attention: Mapping[str, AttentionRequest]
    hidden: Mapping[str, HiddenRequest]

    def pinned(self) -> "TeacherInputs":
        """The same in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._moved(Tensor.pin_memory)

    def to(self, device: torch.device) -> "TeacherInputs":
        """The same on the device; the copies are only queued where the memory is page-locked."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def _moved(self, move: Callable[[Tensor], Tensor]) -> "TeacherInputs":
        moved: dict[int, Tensor] = {}

        def move_once(tensor: Tensor) -> Tensor:
            if id(tensor) not in moved:  # requests of the same rows stay such
                moved[id(tensor)] = move(tensor)
            return moved[id(tensor)]

        return replace(
            self,
            model_inputs=_map_tensors(move, self.model_inputs),
            supervised=_map_tensors(move, self.supervised),
            visual=_map_tensors(move, self.visual),
            attention={name: _move_request(move_once, request) for name, request in self.attention.items()},
            hidden={name: HiddenRequest(move(request.rows), request.layers) for name, request in self.hidden.items()},
        )


@torch.inference_mode()
def prepare_inputs(batch: Batch, wanted: Wanted, *, family: Family, config: Any, dtype: torch.dtype) -> TeacherInputs:
    """Compute all that the teacher needs of a batch, on the CPU.

    Args:
        batch: On the CPU.
        wanted: What to keep of the pass.
        family: Knows the model's arguments.
        config: The model's.
        dtype: The model's.
    """
    supervised, keys = batch.labels != IGNORE_INDEX, visual_keys(batch)  # [B, T], [B, N of the fullest]
    answers = supervised_rows(batch)
    attention: dict[str, AttentionRequest] = {}
    if keys.shape[1]:
        if wanted.answer_rows:
            attention["answer"] = AttentionRequest(answers, keys, wanted.groups)
        if wanted.text:
            attention["text"] = AttentionRequest(text_rows(batch), keys, wanted.groups)
        if wanted.visual_rows:
            attention["visual"] = AttentionRequest(keys, keys, wanted.groups)
        if wanted.columns:
            attention["columns"] = AttentionRequest(keys, keys, wanted.groups, image_weights(batch, keys))
    length = supervised.shape[1]
    for request in attention.values():
        request.check_fits(batch=len(batch), queries=length, keys=length)
    rows = supervised | batch.visual_mask if wanted.visual_logits else supervised
    return TeacherInputs(
        model_inputs=family.model_inputs(config, batch, dtype=dtype),
        rows=rows,
        labels=batch.labels[supervised],
        row_counts=tuple(supervised.sum(1).tolist()),
        visual_counts=tuple(batch.visual_mask.sum(1).tolist()),
        supervised=supervised[rows].nonzero()[:, 0] if wanted.visual_logits else None,
        visual=batch.visual_mask[rows].nonzero()[:, 0] if wanted.visual_logits else None,
        attention=attention,
        hidden={
            name: HiddenRequest(answers if name == "hidden" else keys, layers)
            for name, layers in (wanted.hidden or {}).items()
        },
    )


def image_weights(batch: Batch, keys: Tensor) -> Tensor:
    """What a visual token counts in the mean over those of its sample that carry image; padding does not.

    Args:
        batch: Whose tiles.
        keys: Positions of the visual tokens, int64 ``[B, M]``, padding -1.

    Returns:
        float32 ``[B, M]``.
    """
    weights = torch.zeros(keys.shape)
    for index, tiles in enumerate(batch.tiles):
        if tiles:
            content = content_mask(tile_boxes(tiles)).float()  # [N]
            weights[index, keys[index] >= 0] = content / content.sum().clamp_min(1.0)
    return weights


def _map_tensors(move: Callable[[Tensor], Tensor], value: Any) -> Any:
    if isinstance(value, Tensor):
        return move(value)
    return {name: _map_tensors(move, part) for name, part in value.items()} if isinstance(value, Mapping) else value


def _move_request(move: Callable[[Tensor], Tensor], request: AttentionRequest) -> AttentionRequest:
    """The same request elsewhere: a new one would be checked again, and the check would wait for the GPU."""
    moved = copy(request)
    weights = None if request.row_weights is None else move(request.row_weights)
    vars(moved).update(rows=move(request.rows), keys=move(request.keys), row_weights=weights)
    return moved
