"""Cross-entropy and logit distillation straight from hidden states: `[A, V]` exists for a few rows at a time.

The output projection, both losses and their gradients run chunk by chunk over the supervised rows. A chunk's
logits are exponentiated once, in place, and turned in place into the gradient of the **weighted sum** of both losses,
which is multiplied into the gradients of hidden states, weight and bias at once. Autograd gets gradients that
are ready when `forward` returns, and only scales them.

That is why the weights of the two losses are arguments and only their sum has a graph. Were both differentiable,
`backward` alone would know their weights: it would have to keep two gradients of every tensor, or project and
exponentiate all rows again. So there are three matrix products, as many as without fusing, and one pass; four in half
precision with more than one chunk and a trained weight (see `losses.fused_chunks`).

Dims: A supervised rows, C rows of a chunk, D width, V student vocabulary, K kept entries.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.stage2_student.loss_weights import LogitKind
from vlm_distill_cache.stage2_student.losses.fused_chunks import ChunkSettings, all_chunks, buffer_bytes
from vlm_distill_cache.stage2_student.losses.logits import TeacherRows, teacher_rows

CHUNK_BYTES = {"cpu": 2**27, "cuda": 2**28}
"""Of all buffers of a chunk, by kind of device. In float32 the weight's gradient is read and written once a chunk: the
faster arithmetic is against memory, the more rows pay for that."""


@dataclass(frozen=True, kw_only=True)
class FusedLosses:
    """Both losses of some rows, float32 scalars, means over rows.

    Attributes:
        total: Their weighted sum, the only one with a graph.
        lm: As `lm_loss`, unweighted, without a graph.
        logits: As `tail_bucket_loss`, unweighted, without a graph; None without a teacher.
        row_logits: The rows' logits ``[A, V]``, where they were held: not by `fused_losses`.
    """

    total: Tensor
    lm: Tensor
    logits: Tensor | None
    row_logits: Tensor | None = None


def fused_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: SparseLogits | None,
    *,
    bias: Tensor | None = None,
    lm_weight: float = 1.0,
    logit_weight: float = 1.0,
    kind: LogitKind = "forward_kl",
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float | None = None,
    chunk_rows: int | None = None,
) -> FusedLosses:
    """Both losses of `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`, never held whole.

    Equal to `lm_loss` and `tail_bucket_loss` of these logits. Matrix products run in the weight's dtype, or
    autocast's; all else, and the sum of the weight's gradient over chunks, in float32. A frozen weight's gradient is
    not computed, and without autograd none is. The total can be differentiated once: gradients are scaled in
    place. Under autograd checkpointing the second forward pass repeats this one.

    Args:
        hidden: Last hidden states of the supervised rows, float `[A, D]`.
        weight: Of the output projection, float `[V, D]`; may be the embedding's.
        teacher: Cached or live rows; None: cross-entropy alone.
        temperature: As for `tail_bucket_loss`; another one than 1 takes a second buffer.
        softcap: Bound of the logits (Gemma 2); takes another buffer.
        logit_scale: Factor before soft-capping (Cohere; Granite divides by `logits_scaling`).
        chunk_rows: Rows worked on at once; by default as many as fit in `CHUNK_BYTES`.

    Returns:
        Weighted total with a graph, both losses without; 0 when there are no rows.

    Raises:
        TemperatureNotCachedError: If the cache holds no tail mass at `temperature`.

    Source:
        In-forward gradients over chunks: Liger Kernel (arXiv:2410.10989), section 3.2; closed forms:
        `losses.logits`.
    """
    _check_shapes(hidden, weight, labels, teacher, bias)
    if kind not in get_args(LogitKind):
        raise ValueError(f"kind: expected one of {list(get_args(LogitKind))}, got {kind!r}")
    for name, value in (("chunk_rows", chunk_rows), ("softcap", softcap)):
        if value is not None and value <= 0:
            raise ValueError(f"{name}: expected a positive number or None, got {value!r}")
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    device = hidden.device.type
    recording = torch.is_grad_enabled()
    dtype = torch.get_autocast_dtype(device) if _is_autocast(device) else weight.dtype
    if chunk_rows is None:
        buffers = buffer_bytes(dtype, temperature=temperature, softcap=softcap)
        chunk_rows = max(1, CHUNK_BYTES.get(device, CHUNK_BYTES["cpu"]) // (buffers * vocabulary))
    # A KL shrinks with the square of the temperature, a sum of absolute differences with the temperature.
    factor = temperature if kind == "tvd" else temperature**2
    settings = ChunkSettings(
        kind=kind,
        temperature=temperature,
        softcap=softcap,
        logit_scale=1.0 if logit_scale is None else logit_scale,
        lm_weight=lm_weight,
        divergence_weight=logit_weight * factor,
        chunk_rows=_balanced(rows, chunk_rows),
        dtype=dtype,
        needs=(
            recording and hidden.requires_grad,
            recording and weight.requires_grad,
            recording and bias is not None and bias.requires_grad,
        ),
    )
    buckets = None if teacher is None else teacher_rows(teacher, vocabulary=vocabulary, temperature=temperature)
    total, lm, divergence = _FusedSum.apply(hidden, weight, bias, labels, buckets, settings)
    rows = max(rows, 1)
    logits = None if teacher is None else divergence * (factor / rows)
    return FusedLosses(total=total / rows, lm=lm / rows, logits=logits)


def _check_shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: SparseLogits | None, bias: Tensor | None
) -> None:
    fits = hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1]
    if not fits or labels.shape != hidden.shape[:1]:
        raise ValueError(
            "fused_losses: expected hidden [A, D], weight [V, D] and labels [A], got "
            f"{[*hidden.shape]}, {[*weight.shape]} and {[*labels.shape]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"fused_losses: expected bias [{weight.shape[0]}], got {[*bias.shape]}")
    if teacher is not None and len(teacher) != hidden.shape[0]:
        raise ValueError(f"fused_losses: student has {hidden.shape[0]} rows, teacher {len(teacher)}; rows must match")


def _is_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _balanced(rows: int, most: int) -> int:
    """Rows of a chunk when all are about equally long: no small one comes last."""
    chunks = max(1, math.ceil(rows / most))
    return max(1, math.ceil(rows / chunks))


class _FusedSum(torch.autograd.Function):
    """Sums over rows: the weighted total, cross-entropy and divergence; gradients are ready after `forward`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: TeacherRows | None,
        settings: ChunkSettings,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over chunks of rows; `[C, V]` in float32, and once more in a half-precision dtype."""
        # Autocast would take the products' operands for its own; the dtype is in the settings already.
        device = hidden.device.type
        with torch.autocast(device, enabled=False) if _is_autocast(device) else nullcontext():
            sums, gradients = all_chunks(hidden, weight, bias, labels, teacher, settings)
        ctx.save_for_backward(*gradients)
        ctx.logit_scale = settings.logit_scale
        lm, divergence = sums
        ctx.mark_non_differentiable(lm, divergence)
        total = settings.lm_weight * lm + settings.divergence_weight * divergence
        return total, lm, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale what `forward` found, in place: the gradient of a whole vocabulary is not copied."""
        scale = grad_outputs[0] * ctx.logit_scale
        scaled = (None if part is None else part.mul_(scale) for part in ctx.saved_tensors)
        return (*scaled, None, None, None)
