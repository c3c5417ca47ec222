"""Other projects' teacher formats, emulated from their public descriptions on the same rows.

Only what decides size and gradient is emulated: which tokens are kept, in how many bits, and what the loss makes of the
mass that is not. Every format is given as the gradient on the student's logits, `[A, V]`, NaN where its loss is.

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
Decoded = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From the teacher's log-probabilities `[A, V]` to the kept ones as they are read back, and their ids, `[A, K]`."""


@dataclass(frozen=True, kw_only=True)
class PeerFormat:
    """One peer's format.

    Attributes:
        name: For the table.
        gradient: Of the loss it trains with, from teacher's and student's log-probabilities `[A, V]` at T = 1.
        row_bytes: Stored bytes of a row, from the vocabulary; None if the vocabulary is too large for it.
        packed: The bytes of rows as stored, if they are compressed afterwards; then `row_bytes` is not used.
        decode: What is read back, where that errs by more than the rounding of a float.
        is_nan: Which rows' loss is NaN, from what was read back, ids and student; None: none.
        source: Where the format is described.
    """

    name: str
    gradient: Gradient
    row_bytes: Callable[[int], float | None]
    packed: Callable[[Tensor], bytes] | None = None
    decode: Decoded | None = None
    is_nan: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    source: str


def _top(teacher: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return teacher.topk(min(k, teacher.shape[1]), dim=1)


def _one_bucket(values: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """The gradient of kept tokens and one bucket for all other mass on both sides, as in our own loss."""
    kept, weights = values.exp(), student.exp()
    inside = torch.zeros_like(student, dtype=torch.bool).scatter(1, ids, value=True)
    teacher_tail = (1 - kept.sum(1, keepdim=True)).clamp_min(0)
    student_tail = weights.masked_fill(inside, 0).sum(1, keepdim=True).clamp_min(1e-30)
    outside = weights * (1 - teacher_tail / student_tail)
    return torch.where(inside, weights - torch.zeros_like(student).scatter(1, ids, kept), outside)


def _renormalised(values: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """Kept tokens scaled to sum to one; the student's softmax is over the whole vocabulary."""
    return student.exp() - torch.zeros_like(student).scatter(1, ids, values.softmax(1))


def _distillkit_values(k: int, exact: int, powers: tuple[float, ...], *, unit_range: bool) -> Decoded:
    """The `exact` largest in bfloat16, the others by a fit of polynomial terms of their rank, all of it in float32.

    Args:
        unit_range: Ranks run from 0 to 1 (`normalize_t`), else from 0 to k - exact - 1, the default: their fourth
            powers then reach 1.5e8, and float32 does not hold the fit.
    """

    def decoded(teacher: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = _top(teacher, k)
        count = k - exact
        ranks = torch.linspace(0, 1, count) if unit_range else torch.arange(count, dtype=torch.float32)
        design = torch.stack([ranks**power for power in powers], dim=1)  # [K - exact, terms]
        left, singular, right = torch.linalg.svd(design, full_matrices=False)
        inverse = torch.where(singular > 1e-5, 1 / singular, 0.0)
        coefficients = right.T @ (inverse[:, None] * (left.T @ values[:, exact:].T))  # [terms, A]
        fitted = (design[:, :, None] * coefficients).sum(1).T
        return torch.cat([values[:, :exact].bfloat16().float(), fitted], dim=1), ids

    return decoded


def _kept_masses(values: Tensor, ids: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's and the student's mass on the kept tokens, `[A, 1]`."""
    return values.exp().sum(1, keepdim=True), student.gather(1, ids).exp().sum(1, keepdim=True)


def _distillkit_bucket(values: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """`symmetric_uniform`: one bucket, of which log1p(-mass) is the log-mass.

    Where float32 says that the student's mass is 1 or more this is NaN; where the teacher's is (rounding may take it
    above 1), the loss is NaN and its gradient has no bucket.
    """
    mass, own = _kept_masses(values, ids, student)
    gradient = _one_bucket(values, ids, student) + student.exp() * (mass - 1).clamp_min(0)
    return gradient.masked_fill(own >= 1, math.nan)


def _distillkit_nan(values: Tensor, ids: Tensor, student: Tensor) -> Tensor:
    """Whose `symmetric_uniform` is NaN: bool `[A]`."""
    return (torch.maximum(*_kept_masses(values, ids, student)) >= 1)[:, 0]


def _ghost_token(teacher: Tensor, student: Tensor) -> Tensor:
    """Top 32 and one bucket."""
    values, ids = _top(teacher, 32)
    return _one_bucket(values.half().float(), ids, student)


def _pack_words(teacher: Tensor) -> bytes:
    """Top 32 as words of a 17-bit id and a 15-bit value (a float16 whose sign is known), zstd as a whole."""
    values, ids = _top(teacher, 32)
    bits = (-values).half().numpy().view(np.uint16).astype(np.uint32) & 0x7FFF
    return bytes(Zstd(level=3).encode(np.ascontiguousarray((ids.numpy().astype(np.uint32) << 15) | bits)))


def _top_64(teacher: Tensor, student: Tensor) -> Tensor:
    """Top 64 in float16, renormalised."""
    values, ids = _top(teacher, 64)
    return _renormalised(values.half().float(), ids, student)


def _raw_top_k(teacher: Tensor, student: Tensor) -> Tensor:
    """Top 128 raw logits without a normaliser: both sides can only be compared among the kept tokens."""
    values, ids = _top(teacher, 128)
    kept = values.bfloat16().float().softmax(1)
    listed = student.gather(1, ids).softmax(1)
    return torch.zeros_like(teacher).scatter(1, ids, listed - kept)


def _id_bytes(k: int, extra: int) -> Callable[[int], float | None]:
    return lambda vocabulary: math.ceil(k * math.ceil(math.log2(vocabulary)) / 8) + extra


def _distillkit(
    name: str,
    decode: Decoded,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor],
    row_bytes: Callable[[int], float | None],
) -> PeerFormat:
    return PeerFormat(
        name=name,
        gradient=lambda teacher, student: loss(*decode(teacher), student),
        decode=decode,
        is_nan=_distillkit_nan if loss is _distillkit_bucket else None,
        row_bytes=row_bytes,
        source="arcee-ai/DistillKit a61c2e7: README, 'Recommended configuration' and 'budget pick'; compression/, lossfuncs/",
    )


_TERMS = (0, 1, 2, 3, 4, 0.5)
_AS_PRINTED = _distillkit_values(128, 16, _TERMS, unit_range=False)
_UNIT_RANGE = _distillkit_values(128, 16, _TERMS, unit_range=True)
_BUDGET = _distillkit_values(50, 1, (0, 1, 0.5), unit_range=False)
_RECOMMENDED_BYTES = _id_bytes(128, 16 * 2 + 6 * 4)

PEERS = (
    _distillkit("DistillKit recommended, symmetric_uniform", _AS_PRINTED, _distillkit_bucket, _RECOMMENDED_BYTES),
    _distillkit("DistillKit recommended, zero", _AS_PRINTED, _renormalised, _RECOMMENDED_BYTES),
    _distillkit(
        "DistillKit recommended with normalize_t, symmetric_uniform",
        _UNIT_RANGE,
        _distillkit_bucket,
        _RECOMMENDED_BYTES,
    ),
    _distillkit("DistillKit recommended with normalize_t, zero", _UNIT_RANGE, _renormalised, _RECOMMENDED_BYTES),
    _distillkit("DistillKit budget, zero", _BUDGET, _renormalised, _id_bytes(50, 2 + 3 * 4)),
    PeerFormat(
        name="Megatron-style top 32, ghost token",
        gradient=_ghost_token,
        row_bytes=lambda vocabulary: 128.0 if vocabulary <= 131_072 else None,
        packed=_pack_words,
        source="k = 32, vocabularies up to 131,072 (17 bits), 111-120 bytes",
    ),
    PeerFormat(
        name="float16 + int32 top 64, renormalised",
        gradient=_top_64,
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
