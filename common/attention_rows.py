"""Attention of chosen rows, from queries and keys, in bounded memory.

softmax(QK^T) in float32 over all keys a row may see, averaged over heads at once, row chunk by row
chunk: no ``[B, H, T, T]`` exists, and extra memory is bounded by :data:`CHUNK_ELEMENTS` however many
heads or rows there are. Query heads that share a key head are stacked as rows, so keys are never repeated.

Dims: B batch, Tq queries, Tk keys, R requested rows (r in one chunk), M requested keys, H query heads,
Hkv key heads, D width of a head.
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Scores of one chunk, float32: 64 MB. Rows are cut so that B * H * r * Tk stays below it.
CHUNK_ELEMENTS = 1 << 24


def head_mean_attention(
    query: Tensor,
    key: Tensor,
    *,
    rows: Tensor,
    keys: Tensor,
    attention_mask: Tensor | None = None,
    causal: bool = False,
    scaling: float | None = None,
    softcap: float | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Attention of some rows on some keys, softmaxed over all keys, mean over heads.

    Args:
        query: Float ``[B, H, Tq, D]``, rotary embedding applied.
        key: Float ``[B, Hkv, Tk, D]``; H is a multiple of Hkv (grouped-query heads).
        rows: int64 ``[B, R]`` in ``[-1, Tq)``.
        keys: int64 ``[B, M]`` in ``[-1, Tk)``.
        attention_mask: ``[B or 1, 1 or H, Tq, Tk]``; bool (True = may look) or float (added to scores).
        causal: Query i sees keys 0..i, as SDPA's ``is_causal`` (upper left).
        scaling: Factor on the scores; by default ``D ** -0.5``.
        softcap: Scores are squeezed to below this by tanh before the mask (Gemma 2).
        chunk_rows: Rows at a time; by default as many as :data:`CHUNK_ELEMENTS` allows.

    Returns:
        float32 ``[B, R, M]``; 0 for padding and for rows that may look nowhere. With more than one
        chunk, the backward pass computes each chunk again rather than keep it.
    """
    B, H, _, D = query.shape
    Hkv, Tk = key.shape[1], key.shape[2]
    R, M = rows.shape[1], keys.shape[1]
    if R == 0 or M == 0:
        return query.new_zeros((B, R, M), dtype=torch.float32)
    rows, keys = rows.to(query.device), keys.to(query.device)
    real_rows, real_keys = rows >= 0, keys >= 0
    rows, keys = rows.clamp_min(0), keys.clamp_min(0)
    samples = torch.arange(B, device=query.device)[:, None]  # [B, 1]
    scale = D**-0.5 if scaling is None else scaling
    if attention_mask is not None:
        attention_mask = attention_mask.expand(B, -1, -1, -1)

    def attend(query: Tensor, key: Tensor, start: int, stop: int) -> Tensor:
        part = rows[:, start:stop]  # [B, r]
        additive, blocked = _row_masks(attention_mask, part, samples, causal=causal, key_count=Tk)
        # Under autocast the product would be rounded to 16 bits before the softmax.
        with torch.autocast(query.device.type, enabled=False):
            index = part[:, None, :, None].expand(-1, H, -1, D)
            wanted = query.gather(2, index).float() * scale  # [B, H, r, D]
            # Query heads that share a key head are stacked as rows: keys are never repeated.
            stacked = wanted.reshape(B, Hkv, -1, D)
            scores = (stacked @ key.float().transpose(2, 3)).view(B, H, -1, Tk)  # [B, H, r, Tk]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if additive is not None:
                scores = scores + additive
            if blocked is not None:
                # The smallest float rather than -inf: rows that see nothing stay finite, also in backward.
                scores = scores.masked_fill_(blocked, torch.finfo(torch.float32).min)
            mean = scores.softmax(dim=-1).mean(dim=1)  # [B, r, Tk]
        picked = mean.gather(2, keys[:, None, :].expand(-1, part.shape[1], -1))
        return picked if blocked is None else picked * ~blocked.all(dim=-1).all(dim=1)[:, :, None]

    step = chunk_rows or max(1, CHUNK_ELEMENTS // (B * H * Tk))
    starts = range(0, R, step)
    if len(starts) == 1:
        attention = attend(query, key, 0, R)
    elif torch.is_grad_enabled():
        attention = torch.cat(
            [
                checkpoint(
                    attend, query, key, s, min(s + step, R), use_reentrant=False, preserve_rng_state=False
                )
                for s in starts
            ],
            dim=1,
        )
    else:
        attention = torch.cat([attend(query, key, s, min(s + step, R)) for s in starts], dim=1)
    return attention * (real_rows[:, :, None] & real_keys[:, None, :])


def _row_masks(
    attention_mask: Tensor | None, rows: Tensor, samples: Tensor, *, causal: bool, key_count: int
) -> tuple[Tensor | None, Tensor | None]:
    """What to add to the scores of some rows, and what is blocked: each ``[B, 1 or H, r, Tk]`` or None."""
    if attention_mask is None:
        if not causal:
            return None, None
        positions = torch.arange(key_count, device=rows.device)
        return None, (positions > rows[:, :, None])[:, None]
    mask = attention_mask[samples, :, rows].transpose(1, 2)  # [B, 1 or H, r, Tk]
    if mask.dtype == torch.bool:
        return None, ~mask
    # Blocked is what a mask builder wrote as "minimum of the dtype" or -inf; smaller biases are kept.
    blocked = mask <= torch.finfo(mask.dtype).min / 2
    return mask.float().masked_fill(blocked, 0.0), blocked
