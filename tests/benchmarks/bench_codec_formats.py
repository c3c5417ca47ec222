"""Other projects' teacher formats, emulated from their public descriptions on the same rows.

Only what decides size and gradient is emulated: which tokens are kept, in how many bits, and what the loss makes of the
mass that is not. Every format is given as the gradient on the student's logits, `[A, V]`.

Dims: A rows, V vocabulary, K kept tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numcodecs.zstd import Zstd
from torch import Tensor

Gradient = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class PeerFormat:
    """One peer's format.

    Attributes:
        name: For the table.
        gradient: Of the loss it trains with, from teacher's and student's log-probabilities `[A, V]` at T = 1.
        row_bytes: Stored bytes of a row, from the vocabulary; None if the vocabulary is too large for it.
        packed: The bytes of rows as stored, if they are compressed afterwards; then `row_bytes` is not used.
        source: Where the format is described.
    """

    name: str
    gradient: Gradient
    row_bytes: Callable[[int], float | None]
    packed: Callable[[Tensor], bytes] | None = None
    source: str


def _top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return teacher.topk(min(k, teacher.shape[1]), dim=1)


def _distillkit_values(teacher: Tensor, k: int, exact: int, powers: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The `exact` largest in bfloat16, the others by least squares on polynomial terms of their rank."""
    values, ids = _top(teacher, k)
    rank = torch.arange(k - exact, dtype=torch.float64) / max(1, k - exact - 1)
    design = torch.stack([rank**power for power in powers], dim=1)  # [K - exact, terms]
    rest = values[:, exact:].double()
    coefficients = torch.linalg.lstsq(design, rest.T).solution.float()  # [terms, A]
    fitted = (design.float() @ coefficients).T
    return torch.cat([values[:, :exact].bfloat16().float(), fitted], dim=1), ids


def _distillkit(k: int, exact: int, powers: tuple[float, ...], *, uniform: bool) -> Gradient:
    def gradient(teacher: Tensor, student: Tensor) -> Tensor:
        values, ids = _distillkit_values(teacher, k, exact, powers)
        kept = values.exp()
        mass = kept.sum(1, keepdim=True)
        if uniform:  # what is missing is spread evenly over all other tokens
            missing = (1 - mass).clamp_min(0) / (teacher.shape[1] - k)
            return student.exp() - missing.expand_as(teacher).scatter(1, ids, kept)
        return mass * student.exp() - torch.zeros_like(teacher).scatter(1, ids, kept)  # missing is zero

    return gradient


def _ghost_token(teacher: Tensor, student: Tensor) -> Tensor:
    """Top 32 and one bucket for all other mass on both sides, as in our own loss."""
    values, ids = _top(teacher, 32)
    kept = values.half().float().exp()
    inside = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, ids, value=True)
    weights = student.exp()
    teacher_tail = (1 - kept.sum(1, keepdim=True)).clamp_min(0)
    student_tail = weights.masked_fill(inside, 0).sum(1, keepdim=True).clamp_min(1e-30)
    outside = weights * (1 - teacher_tail / student_tail)
    return torch.where(inside, weights - torch.zeros_like(teacher).scatter(1, ids, kept), outside)


def _pack_words(teacher: Tensor) -> bytes:
    """Top 32 as words of a 17-bit id and a 15-bit value (a float16 whose sign is known), zstd as a whole."""
    values, ids = _top(teacher, 32)
    bits = (-values).half().numpy().view(np.uint16).astype(np.uint32) & 0x7FFF
    return bytes(Zstd(level=3).encode(np.ascontiguousarray((ids.numpy().astype(np.uint32) << 15) | bits)))


def _renormalised(teacher: Tensor, student: Tensor) -> Tensor:
    """Top 64 in float16, scaled to sum to one; the student's softmax is over the whole vocabulary."""
    values, ids = _top(teacher, 64)
    kept = values.half().float().softmax(1)
    return student.exp() - torch.zeros_like(teacher).scatter(1, ids, kept)


def _raw_top_k(teacher: Tensor, student: Tensor) -> Tensor:
    """Top 128 raw logits without a normaliser: both sides can only be compared among the kept tokens."""
    values, ids = _top(teacher, 128)
    kept = values.bfloat16().float().softmax(1)
    listed = student.gather(1, ids).softmax(1)
    return torch.zeros_like(teacher).scatter(1, ids, listed - kept)


def _id_bytes(k: int, extra: int) -> Callable[[int], float | None]:
    return lambda vocabulary: math.ceil(k * math.ceil(math.log2(vocabulary)) / 8) + extra


_RECOMMENDED = {"k": 128, "exact": 16, "powers": (0, 1, 2, 3, 4, 0.5)}
_BUDGET = {"k": 50, "exact": 1, "powers": (0, 1, 0.5)}
_DISTILLKIT = "README of arcee-ai/DistillKit, 'Recommended configuration' and 'budget pick'"

PEERS = (
    PeerFormat(
        name="DistillKit recommended, uniform tail",
        gradient=_distillkit(**_RECOMMENDED, uniform=True),  # type: ignore[arg-type]
        row_bytes=_id_bytes(128, 16 * 2 + 6 * 4),
        source=_DISTILLKIT,
    ),
    PeerFormat(
        name="DistillKit recommended, default tail (zero)",
        gradient=_distillkit(**_RECOMMENDED, uniform=False),  # type: ignore[arg-type]
        row_bytes=_id_bytes(128, 16 * 2 + 6 * 4),
        source=_DISTILLKIT,
    ),
    PeerFormat(
        name="DistillKit budget, default tail (zero)",
        gradient=_distillkit(**_BUDGET, uniform=False),  # type: ignore[arg-type]
        row_bytes=_id_bytes(50, 2 + 3 * 4),
        source=_DISTILLKIT,
    ),
    PeerFormat(
        name="Megatron-style top 32, ghost token",
        gradient=_ghost_token,
        row_bytes=lambda vocabulary: 128.0 if vocabulary <= 131_072 else None,
        packed=_pack_words,
        source="k = 32, vocabularies up to 131,072 (17 bits), 111-120 bytes",
    ),
    PeerFormat(
        name="float16 + int32 top 64, renormalised",
        gradient=_renormalised,
        row_bytes=lambda _: 64 * 6.0,
        source="64 tokens of 2 + 4 bytes",
    ),
    PeerFormat(
        name="MaxText raw top 128, no normaliser",
        gradient=_raw_top_k,
        row_bytes=lambda _: 128 * 6.0,
        source="AI-Hypercomputer/maxtext, save_top_k_teacher_logits (--top_k=128)",
    ),
)
