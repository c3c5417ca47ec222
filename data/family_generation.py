"""The keyword arguments of ``generate`` for each family: a left-padded batch, its positions left to the library.

The library extends masks and positions token by token; it is therefore given only what it derives them from.

Dims: B batch, T longest prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.data.text.collate import Batch, collate
from vlm_distill_cache.data.text.encoding import EncodedSample

ModelInputs = Callable[..., Mapping[str, Any]]


def family_generation_inputs(
    model_inputs: ModelInputs,
    config: Any,
    prompts: Sequence[EncodedSample],
    pad_id: int,
    device: torch.device,
    *,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Arguments of ``generate`` for one family.

    Args:
        model_inputs: The family's arguments of a forward pass.
        config: The model's.
        prompts: At least one; sequences without labels.
        pad_id: Fills the front of shorter prompts.
        device: Where to put them.
        dtype: Of floating-point image inputs.

    Returns:
        Ids and mask int64 ``[B, T]``, token types where the family has them, and the pictures.
    """
    batch = left_padded(collate(prompts, pad_id), pad_id).to(device)
    inputs = dict(model_inputs(config, batch, dtype=dtype))
    positions = inputs.pop("position_ids", None)
    inputs["attention_mask"] = batch.attention_mask.long()
    if positions is not None and positions.ndim == 3:
        # Positions by time, row and column: the library derives them from where the image tokens are.
        inputs["mm_token_type_ids"] = batch.visual_mask.long()
    return inputs


def left_padded(batch: Batch, pad_id: int) -> Batch:
    """The same prompts with their padding in front, as generation needs it.

    Args:
        batch: As ``collate`` pads it, on the right; not packed, without labels.
        pad_id: Fills the front of shorter prompts.
    """
    longest = batch.input_ids.shape[1]
    shifts = [longest - length for length in batch.lengths]

    def roll(rows: Tensor, fill: int) -> Tensor:
        moved = torch.full_like(rows, fill)
        for index, shift in enumerate(shifts):
            moved[index, shift:] = rows[index, : longest - shift]
        return moved

    return replace(
        batch,
        input_ids=roll(batch.input_ids, pad_id),
        attention_mask=roll(batch.attention_mask, 0),
        position_ids=roll(batch.position_ids, 0),
        visual_mask=roll(batch.visual_mask, 0),
    )
