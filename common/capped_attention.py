"""Attention whose scores are squeezed by tanh (Gemma 2): SDPA drops that silently, so the library's eager code runs."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import ModelError


def capped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    is_causal: bool | None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the eager attention of the module's own family; all its scores exist at once, ``[B, H, Tq, Tk]``.

    Args:
        module: An attention module of the model library.
        query: Float ``[B, H, Tq, D]``.
        key: Float ``[B, Hkv, Tk, D]``.
        value: Float ``[B, Hkv, Tk, D]``.
        attention_mask: As SDPA takes it: bool (True = may look), float (added to scores), or None.
        is_causal: As SDPA takes it: counts where there is no mask; None: what the module says.
        **kwargs: ``softcap`` and all else that the module passes.

    Returns:
        What the library's attention functions return: output ``[B, Tq, H, D]`` and attention.

    Raises:
        ModelError: If the family has no eager attention.
    """
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise ModelError(
            f"{type(module).__name__} passes `softcap` to attention, which SDPA cannot apply, and its family has no "
            "eager attention in the installed transformers; this model cannot be used"
        )
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    if attention_mask is None and causal and query.shape[2] > 1:
        rows, columns = (torch.arange(tensor.shape[2], device=query.device) for tensor in (query, key))
        attention_mask = (rows[:, None] >= columns[None, :])[None, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # eager attention adds its mask
        zeros = torch.zeros(attention_mask.shape, dtype=query.dtype, device=query.device)
        attention_mask = zeros.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    output: tuple[Tensor, Any] = eager(module, query, key, value, attention_mask, **kwargs)
    return output
