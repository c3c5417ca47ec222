"""What a student learns from a teacher's next-token distributions: pure functions, float32 inside.

A teacher's row is its K listed tokens and **one bucket** for all others; the student's row is cut the same way.
Both sides then sum to one, and forward KL, reverse KL, Jensen-Shannon and total variation are plain sums over
K + 1 buckets. With `q_b` the student's mass in bucket b, `h_b = q_b * dD/dq_b` and `H = sum_b h_b`, the gradient
of any such D by the logit of token j is closed-form: `h_j - q_j H` for a listed token, and
`softmax_tail_j (h_tail - q_tail H)` for the others. The whole vocabulary is met in two places only,
`split_rows` and `logit_gradient`, both in place on one buffer of rows.

All losses are means over supervised rows, and 0 with a graph when there are none.

Dims: A supervised rows, V student vocabulary, K kept entries.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.stage2_student.loss_weights import LogitKind

REVERSE_FLOOR_NATS = -30.0
"""Reverse KL is infinite where a teacher says never: its log-probabilities below this count as this."""


@dataclass(frozen=True)
class TeacherRows:
    """A teacher's buckets at one temperature, as the student's vocabulary can meet them.

    Attributes:
        slots: int64 `[A, K]`, token ids; V for entries that are none of the student's tokens.
        log_probs: float32 `[A, K]`, nats; -inf where `slots` is V.
        log_tail: float32 `[A]`, nats: log-mass of all tokens not in `slots`.
    """

    slots: Tensor
    log_probs: Tensor
    log_tail: Tensor


@dataclass(frozen=True)
class StudentRows:
    """A student's mass in the same buckets.

    Attributes:
        log_probs: float32 `[A, K]`, nats; -inf where `slots` is V.
        log_tail: float32 `[A]`, nats; -inf where all of the student's tokens are listed.
        tail_normaliser: float32 `[A]`, log-sum-exp of the scaled logits outside `slots`.
    """

    log_probs: Tensor
    log_tail: Tensor
    tail_normaliser: Tensor


@dataclass(frozen=True)
class Divergence:
    """A divergence of some rows, and what its gradient needs.

    Attributes:
        value: float32 `[A]`, nats (`tvd`: dimensionless).
        slots: `q_b * dD/dq_b` of the listed tokens, float32 `[A, K]`; finite.
        tail: The same of the bucket of all others, float32 `[A]`; finite.
    """

    value: Tensor
    slots: Tensor
    tail: Tensor


def teacher_rows(teacher: SparseLogits, *, vocabulary: int, temperature: float) -> TeacherRows:
    """Cut a teacher's rows for a student; tokens beyond the student's vocabulary join the bucket of all others.

    Args:
        vocabulary: V, rows of the student's output layer.
        temperature: Dimensionless; one that the teacher's rows hold a tail mass for.

    Raises:
        TemperatureNotCachedError: If they do not.
    """
    log_probs, log_tail = teacher.at(temperature)
    known = teacher.entry_mask & (teacher.token_ids < vocabulary)
    beyond = torch.where(teacher.entry_mask & ~known, log_probs, -torch.inf)
    return TeacherRows(
        slots=torch.where(known, teacher.token_ids, vocabulary),
        log_probs=torch.where(known, log_probs, -torch.inf),
        log_tail=torch.logsumexp(torch.cat([log_tail[:, None], beyond], dim=1), dim=1),
    )


def with_spare_column(logits: Tensor, temperature: float) -> Tensor:
    """float32 `[A, V + 1]`: logits / temperature, then -inf where entries without a token may be written."""
    scaled = torch.full((logits.shape[0], logits.shape[1] + 1), -torch.inf, device=logits.device)
    torch.div(logits.float(), temperature, out=scaled[:, :-1])
    return scaled


def split_rows(scaled: Tensor, slots: Tensor) -> StudentRows:
    """Log-mass of the listed tokens and of all others.

    The mass of all others is a masked log-sum-exp: log(1 - sum) loses it below 1e-7.

    Args:
        scaled: float32 `[A, V + 1]` from `with_spare_column`; **overwritten** with -inf at `slots`.
    """
    normaliser = torch.logsumexp(scaled, dim=1)  # [A]
    listed = scaled.gather(1, slots)  # [A, K]
    scaled.scatter_(1, slots, -torch.inf)
    tail = torch.logsumexp(scaled, dim=1)  # [A]
    return StudentRows(listed - normaliser[:, None], tail - normaliser, tail)


def diverge(teacher: TeacherRows, student: StudentRows, kind: LogitKind) -> Divergence:
    """The divergence of each row, and the student-side derivative of each bucket."""
    log_p = torch.cat([teacher.log_probs, teacher.log_tail[:, None]], dim=1)  # [A, K + 1]
    log_q = torch.cat([student.log_probs, student.log_tail[:, None]], dim=1)
    terms, pulls = _BUCKET_TERMS[kind](log_p, log_q)
    return Divergence(terms.sum(dim=1), pulls[:, :-1], pulls[:, -1])


def logit_gradient(scaled: Tensor, slots: Tensor, student: StudentRows, divergence: Divergence) -> Tensor:
    """Gradient of each row's divergence by its scaled logits, in place.

    Args:
        scaled: float32 `[A, V + 1]` as `split_rows` left it; **overwritten**.

    Returns:
        float32 `[A, V]`, a view of `scaled`.
    """
    pull = divergence.slots.sum(dim=1) + divergence.tail  # [A], H
    on_slots = divergence.slots - student.log_probs.exp() * pull[:, None]
    in_tail = divergence.tail - student.log_tail.exp() * pull
    # exp(z - tail) is at most 1; a student without a tail gets 0, not NaN.
    normaliser = torch.where(student.tail_normaliser > -torch.inf, student.tail_normaliser, torch.inf)
    scaled.sub_(normaliser[:, None]).exp_().mul_(in_tail[:, None])
    return scaled.scatter_(1, slots, on_slots)[:, :-1]


def _forward_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    # A student all of whose tokens are listed cannot meet the bucket: it is then left out on both sides.
    p = torch.where(log_q[:, -1:] > -torch.inf, log_p[:, -1:], -torch.inf)
    log_p = torch.cat([log_p[:, :-1], p], dim=1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0), -p


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    # dD/dq = log(q / p) + 1; the one is the same in all buckets and cancels.
    terms = torch.where(q > 0, q * (log_q - log_p.clamp_min(REVERSE_FLOOR_NATS)), 0)
    return terms, terms


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    of_p = torch.where(p > 0, p * (log_p - log_m), 0)
    of_q = torch.where(q > 0, q * (log_q - log_m), 0)
    return (of_p + of_q) / 2, of_q / 2


def _total_variation(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    apart = q - log_p.exp()
    return apart.abs() / 2, q * apart.sign() / 2


_BUCKET_TERMS: Mapping[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
    "tvd": _total_variation,
}
"""From log-masses `[A, K + 1]` of both sides: each bucket's term, and `q * d(term)/dq`; no NaN at masses of 0."""


class _DivergenceSum(torch.autograd.Function):
    """Sum over rows, with the closed-form gradient.

    Autograd through two log-sum-exps would keep three float32 copies of `[A, V]` and turn an empty tail
    (-inf) into NaN; this keeps the logits as they came and numbers per bucket.
    """

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher: TeacherRows, kind: LogitKind, temperature: float) -> Tensor:
        """Sum of the loss; one float32 copy of `[A, V]`, freed again."""
        student = split_rows(with_spare_column(student_logits, temperature), teacher.slots)
        divergence = diverge(teacher, student, kind)
        ctx.save_for_backward(
            student_logits,
            teacher.slots,
            *(student.log_probs, student.log_tail, student.tail_normaliser),
            *(divergence.slots, divergence.tail),
        )
        ctx.temperature = temperature
        return divergence.value.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """Closed form, on one float32 copy of `[A, V]`."""
        student_logits, slots, log_q, log_tail, tail, on_slots, on_tail = ctx.saved_tensors
        scaled = with_spare_column(student_logits, ctx.temperature).scatter_(1, slots, -torch.inf)
        divergence = Divergence(on_tail, on_slots, on_tail)  # values are not needed again
        gradient = logit_gradient(scaled, slots, StudentRows(log_q, log_tail, tail), divergence)
        gradient.mul_(grad_outputs[0] / ctx.temperature)
        return gradient.to(student_logits.dtype), None, None, None


def tail_bucket_loss(
    student_logits: Tensor, teacher: SparseLogits, *, kind: LogitKind = "forward_kl", temperature: float = 1.0
) -> Tensor:
    """A divergence between teacher and student over the cached tokens and one bucket for all others.

    The bucket keeps both sides normalised: mass outside the cached tokens is neither dropped nor
    renormalised away, which cuts the gradient's error about tenfold at k=32. Teacher tokens beyond the student's
    vocabulary count as part of the bucket. If the cached tokens are the student's whole vocabulary, it has no
    mass there: `forward_kl`, else infinite, leaves the bucket out; the others are bounded.

    Args:
        student_logits: Raw logits of supervised rows, float `[A, V]`.
        teacher: Cached rows; log-probabilities in nats `[A, K]`, token ids `[A, K]`, tail log-mass `[A]`.
        kind: `forward_kl`: KL(teacher || student). `reverse_kl`: KL(student || teacher), teacher's
            log-probabilities being at least `REVERSE_FLOOR_NATS`. `jsd`: Jensen-Shannon, in [0, log 2]. `tvd`:
            total variation, half the sum of absolute differences, in [0, 1].

    Returns:
        Scalar float32: nats (`tvd`: dimensionless) per supervised row, times temperature squared (`tvd`:
        temperature), so that gradients keep their size; 0 when there are no rows.

    Raises:
        TemperatureNotCachedError: If the cache holds no tail mass at `temperature`.

    Source:
        Hinton et al. 2015 (arXiv:1503.02531), section 2; the bucket: Megatron-LM's ghost token; reverse KL:
        MiniLLM (arXiv:2306.08543); JSD: GKD (arXiv:2306.13649) at beta 1/2; TVD: f-distill (arXiv:2307.15190).
    """
    if kind not in get_args(LogitKind):
        raise ValueError(f"kind: expected one of {list(get_args(LogitKind))}, got {kind!r}")
    rows, vocabulary = student_logits.shape
    if len(teacher) != rows:
        raise ValueError(f"tail_bucket_loss: student has {rows} rows, teacher {len(teacher)}; rows must match")
    buckets = teacher_rows(teacher, vocabulary=vocabulary, temperature=temperature)
    if rows == 0:
        return student_logits.float().sum() * 0.0
    total: Tensor = _DivergenceSum.apply(student_logits, buckets, kind, temperature)
    # A KL shrinks with the square of the temperature, a sum of absolute differences with the temperature.
    scale = temperature if kind == "tvd" else temperature**2
    return total * (scale / rows)


def lm_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the ground-truth tokens.

    Args:
        student_logits: Raw logits of supervised rows, float `[A, V]`.
        labels: int64 `[A]`, the target of each row; every row has one.

    Returns:
        Scalar float32, nats per supervised row; 0 when there are no rows.
    """
    if student_logits.shape[0] == 0:
        return student_logits.float().sum() * 0.0
    return F.cross_entropy(student_logits.float(), labels)
