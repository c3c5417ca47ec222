"""What a student learns from its teacher's hidden states: a pure function, float32 inside.

Dims: R rows, S layers, D width.
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.stage2_student.loss_weights import HiddenKind

_TINY = 1e-12


def hidden_loss(
    student: Tensor, teacher: Tensor, *, kind: HiddenKind = "relative_mse", row_counts: tuple[int, ...]
) -> Tensor:
    """How far a student's hidden states are from the teacher's.

    Args:
        student: float ``[R, S, D]``; of another width than the teacher's for ``relation`` only.
        teacher: float32 ``[R, S, D']``.
        kind: ``relative_mse``: squared error over the teacher's squared norm, row by row, so that no layer counts
            more because its numbers are larger. ``mse``: squared error, a mean over the width too. ``cosine``:
            1 - cosine. ``relation``: 1 - cosine of a row's similarities (cosines) to all rows of its sample, which
            needs no common width.
        row_counts: Rows of each sample; they sum to R.

    Returns:
        Scalar float32, dimensionless, mean over rows and layers; 0, with a graph, without rows.

    Source:
        ``mse``: structural pruning (arXiv 2604.24380), which recovers by A * MSE of the last hidden state + (1 - A) *
        cross-entropy; ours is over the cached layers and supervised rows. ``relative_mse``: the same, normalised.
        ``relation``: after the relational distillation of LLaVA-KD (arXiv 2410.16236), row by row instead of the whole matrix.
    """
    if kind not in get_args(HiddenKind):
        raise ValueError(f"kind: expected one of {list(get_args(HiddenKind))}, got {kind!r}")
    same = student.shape == teacher.shape if kind != "relation" else student.shape[:2] == teacher.shape[:2]
    if not same or sum(row_counts) != len(student):
        raise ValueError(
            f"hidden_loss: student has shape {[*student.shape]}, teacher {[*teacher.shape]}, samples "
            f"{sum(row_counts)} rows; {kind} needs equal {'rows and layers' if kind == 'relation' else 'shapes'}"
        )
    if not student.numel():
        return student.float().sum() * 0.0
    left, right = student.float(), teacher.float()
    if kind == "relative_mse":
        scale = right.square().mean(dim=-1).clamp_min(_TINY)  # [R, S]
        return ((left - right).square().mean(dim=-1) / scale).mean()
    if kind == "mse":
        return (left - right).square().mean()
    if kind == "cosine":
        return (1 - F.cosine_similarity(left, right, dim=-1)).mean()
    parts = [
        1 - F.cosine_similarity(_similarities(s), _similarities(t), dim=-1)
        for s, t in zip(left.split(list(row_counts)), right.split(list(row_counts)), strict=True)
    ]  # [S, R_i] each
    return torch.cat(parts, dim=1).mean()


def _similarities(states: Tensor) -> Tensor:
    """Cosines between the rows of one sample: float32 ``[R, S, D]`` to ``[S, R, R]``."""
    unit = F.normalize(states.transpose(0, 1), dim=-1, eps=_TINY)  # [S, R, D]
    return unit @ unit.transpose(1, 2)
