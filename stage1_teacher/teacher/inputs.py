"""What the teacher is given of a batch, made on the CPU so that the thread which drives a GPU never waits for it.

Reading a number off a GPU (a count, a largest id, the positions where a mask is True) waits for everything queued on
it. All such numbers follow from the batch alone, so they are taken before it leaves the CPU.

Dims: B batch, T longest sequence, A rows of all samples whose logits are wanted.
"""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenRequest
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import map_tensors
from vlm_distill_cache.common.models.tokens.tower_attention import TowerRequest
from vlm_distill_cache.data.families.table import Family
from vlm_distill_cache.data.text.collate import Batch

Request = AttentionRequest | HiddenRequest | TowerRequest | Tensor
"""Attention, hidden states, attention of the tower, or the rows whose logits are wanted, bool ``[B, T]``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TeacherInputs:
    """A batch as the teacher takes it.

    Attributes:
        model_inputs: The model's keyword arguments, floating-point image inputs in the model's dtype.
        rows: Rows whose logits are wanted, and all supervised ones, bool ``[B, T]``, always on the CPU.
        places: By name: which of them a request is for, int64; None: all.
        attention: Rows and keys of the attention to record, by name.
        states: Rows of the hidden states to record, by name.
        towers: Whose attention in the vision tower to record, by name.
    """

    model_inputs: Mapping[str, Any]
    rows: Tensor
    places: Mapping[str, Tensor | None]
    attention: Mapping[str, AttentionRequest]
    states: Mapping[str, HiddenRequest]
    towers: Mapping[str, TowerRequest]

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
            model_inputs=map_tensors(self.model_inputs, move),
            places=map_tensors(self.places, move),
            attention={name: _move_request(move_once, request) for name, request in self.attention.items()},
            states={name: HiddenRequest(move(request.rows), request.layers) for name, request in self.states.items()},
        )


@torch.inference_mode()
def prepare_inputs(
    batch: Batch, requests: Mapping[str, Request], *, family: Family, config: Any, dtype: torch.dtype
) -> TeacherInputs:
    """Compute all that the teacher needs of a batch, on the CPU."""
    rows = batch.labels != IGNORE_INDEX  # [B, T]; whatever is wanted, the model is asked for some
    masks = {name: request for name, request in requests.items() if isinstance(request, Tensor)}
    for mask in masks.values():
        rows = rows | mask
    attention = {name: request for name, request in requests.items() if isinstance(request, AttentionRequest)}
    for request in attention.values():
        request.check_fits(batch=len(batch), queries=rows.shape[1], keys=rows.shape[1])
    return TeacherInputs(
        model_inputs=family.model_inputs(config, batch, dtype=dtype),
        rows=rows,
        places={n: None if torch.equal(mask, rows) else mask[rows].nonzero()[:, 0] for n, mask in masks.items()},
        attention=attention,
        states={name: request for name, request in requests.items() if isinstance(request, HiddenRequest)},
        towers={name: request for name, request in requests.items() if isinstance(request, TowerRequest)},
    )


def _move_request(move: Callable[[Tensor], Tensor], request: AttentionRequest) -> AttentionRequest:
    """The same request elsewhere: a new one would be checked again, and the check would wait for the GPU."""
    moved = copy(request)
    weights = None if request.row_weights is None else move(request.row_weights)
    vars(moved).update(rows=move(request.rows), keys=move(request.keys), row_weights=weights)
    return moved
