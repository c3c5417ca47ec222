"""What a student is trained on: pure functions of its outputs and a teacher's signals, float32 inside.

Logit losses average over supervised rows, attention losses over rows or samples that have an image; all are
0, with a graph, when there is nothing to learn from. They take live and cached signals alike.

Maps of several samples come as one batch `[B, G, N, N]` when the samples have equally many visual tokens, as
one processor's samples do; with unequal counts call per sample (`B = 1`) and average over the samples
that have an image. Rows and keys of samples without an image are zero, as the attention capture leaves them.

Dims: A supervised rows, V student vocabulary, K kept entries, B samples, G layer groups, C grid cells,
N visual tokens of the student's grid (the teacher's pooled to it).
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.codecs.logits import SparseLogits
from common.codecs.row_attention import RowAttention
from common.codecs.teacher_map import TeacherMap, image_pairs

AnswerLossKind = Literal["kl", "cosine", "relative"]
LayerReduction = Literal["mean", "sum"]

_TINY = 1e-12
"""Below any mass that matters: bounds logarithms and divisions where a student gives a cell nothing."""


class _TailBucketKL(torch.autograd.Function):
    """Sum over rows of the bucketed KL, with its closed-form gradient.

    Autograd through two log-sum-exps would keep three float32 copies of `[A, V]` and turn an empty tail
    (-inf) into NaN. For a kept token j the gradient is `P q_j - p_j`, for others
    `P q_j - eps_T softmax_tail_j`, with P the teacher's mass in all (1 but for rounding).
    """

    @staticmethod
    def forward(
        ctx: Any, student_logits: Tensor, slots: Tensor, log_p: Tensor, log_tail: Tensor, temperature: float
    ) -> Tensor:
        """Sum of the loss.

        Args:
            ctx: Autograd's.
            student_logits: float `[A, V]`.
            slots: int64 `[A, K]`, token ids; V for entries that are none of the student's tokens.
            log_p: float32 `[A, K]`, teacher's log-probabilities, -inf where `slots` is V.
            log_tail: float32 `[A]`, teacher's log-mass of all tokens not in `slots`.
            temperature: Divides the student's logits.
        """
        scaled = _with_spare_column(student_logits, temperature)  # [A, V + 1]
        normaliser = torch.logsumexp(scaled, dim=1)  # [A]
        log_q = scaled.gather(1, slots) - normaliser[:, None]  # [A, K]
        scaled.scatter_(1, slots, -torch.inf)
        tail = torch.logsumexp(scaled, dim=1)  # [A], of the student's tokens outside `slots`

        # A student all of whose tokens are listed has no tail: the bucket is then left out on both sides.
        p = log_p.exp()
        eps = torch.where(tail > -torch.inf, log_tail.exp(), 0)  # [A]
        kept = torch.where(p > 0, p * (log_p - log_q), 0).sum(dim=1)
        bucket = torch.where(eps > 0, eps * (log_tail - (tail - normaliser)), 0)
        ctx.save_for_backward(student_logits, slots, p, eps, normaliser, tail)
        ctx.temperature = temperature
        return (kept + bucket).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Closed form; one float32 copy of `[A, V]` and one temporary."""
        student_logits, slots, p, eps, normaliser, tail = ctx.saved_tensors
        scaled = _with_spare_column(student_logits, ctx.temperature)  # [A, V + 1]
        total = p.sum(dim=1) + eps  # [A]
        q = (scaled - normaliser[:, None]).exp_().mul_(total[:, None])
        on_kept = q.gather(1, slots) - p
        # exp(z - tail) is at most 1 outside `slots`; within, it is replaced, whatever it overflowed to.
        no_tail = torch.where(tail > -torch.inf, tail, torch.inf)
        in_tail = scaled.sub_(no_tail[:, None]).clamp_(max=0).exp_().mul_(eps[:, None])
        gradient = q.sub_(in_tail).scatter_(1, slots, on_kept)[:, :-1]
        gradient = gradient.mul_(grad_outputs[0] / ctx.temperature)
        return gradient.to(student_logits.dtype), None, None, None, None


def tail_bucket_kl(student_logits: Tensor, teacher: SparseLogits, *, temperature: float = 1.0) -> Tensor:
    """Forward KL(teacher || student) over the cached tokens and one bucket for all others.

    The bucket keeps both sides normalised: mass outside the cached tokens is neither dropped nor
    renormalised away, which cuts the gradient's error about tenfold at k=32. The student's mass in
    the bucket is a masked log-sum-exp, never log(1 - sum). Teacher tokens beyond the student's vocabulary
    count as part of the bucket; if the cached tokens are the student's whole vocabulary there is none.

    Args:
        student_logits: Raw logits of supervised rows, float `[A, V]`.
        teacher: Cached rows; log-probabilities in nats `[A, K]`, token ids `[A, K]`, tail log-mass `[A]`.
        temperature: Positive, dimensionless; must be one the cache holds a tail mass for.

    Returns:
        Scalar float32, nats per supervised row times temperature squared; 0 when there are no rows.

    Raises:
        ValueError: If the teacher has another number of rows.
        TemperatureNotCachedError: If the cache holds no tail mass at `temperature`.

    Source:
        Hinton et al. 2015 (arXiv:1503.02531), section 2; the bucket: Megatron-LM's ghost token.
    """
    rows, vocabulary = student_logits.shape
    if len(teacher) != rows:
        raise ValueError(f"tail_bucket_kl: student has {rows} rows, teacher {len(teacher)}; rows must match")
    log_p, log_tail = teacher.at(temperature)
    if rows == 0:
        return _nothing(student_logits)
    known = teacher.entry_mask & (teacher.token_ids < vocabulary)
    beyond = torch.where(teacher.entry_mask & ~known, log_p, -torch.inf)
    log_tail = torch.logsumexp(torch.cat([log_tail[:, None], beyond], dim=1), dim=1)
    slots = torch.where(known, teacher.token_ids, vocabulary)
    log_p = torch.where(known, log_p, -torch.inf)
    total: Tensor = _TailBucketKL.apply(student_logits, slots, log_p, log_tail, temperature)
    return total * (temperature**2 / rows)


def lm_loss(student_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the ground-truth tokens.

    Args:
        student_logits: Raw logits of supervised rows, float `[A, V]`.
        labels: int64 `[A]`, the target of each row; every row has one.

    Returns:
        Scalar float32, nats per supervised row; 0 when there are no rows.
    """
    if student_logits.shape[0] == 0:
        return _nothing(student_logits)
    return F.cross_entropy(student_logits.float(), labels)


def answer_attention_loss(
    student_cells: Tensor,
    teacher: RowAttention,
    *,
    kind: AnswerLossKind = "kl",
    cell_mask: Tensor | None = None,
    sample_index: Tensor | None = None,
) -> Tensor:
    """How differently student and teacher look at the image while predicting answer tokens.

    Both sides are renormalised over the image, per row and group: where a row looks, not how much. A
    row's loss is weighted by the teacher's mass on the image, since a row that hardly looks says
    little. Rows without any (text-only samples) are left out, of the mean too.

    Args:
        student_cells: Absolute probability mass on each grid cell, float `[A, G, C]`.
        teacher: The same rows, groups and grid.
        kind: `kl`: KL(teacher || student) over cells. `cosine`: 1 - cosine. `relative`: `kl` after each
            row is divided, cell by cell, by the mean row of its sample and renormalised, which brings out
            where it looks beside cells that attract attention in all rows.
        cell_mask: bool `[C]` or `[A, C]`, False for cells in padding: masked on both sides. None: all count.
        sample_index: int64 `[A]`, sample of each row, for `relative`. None: all rows are of one sample.

    Returns:
        Scalar float32: nats (`kl`, `relative`) or dimensionless (`cosine`), times mass; mean over rows with
        image, then over groups.

    Raises:
        ValueError: If the shapes differ or there is no such kind.

    Source:
        Ours (CompoDistill, arXiv:2510.12184, aligns visual rows); `relative` after arXiv:2502.17422.
    """
    if kind not in get_args(AnswerLossKind):
        raise ValueError(f"kind: expected one of {list(get_args(AnswerLossKind))}, got {kind!r}")
    _check_equal("answer_attention_loss", student_cells, teacher.cells)
    student, target = student_cells.float(), teacher.cells.float()  # [A, G, C]
    if cell_mask is not None:
        masked = ~(cell_mask if cell_mask.ndim == 1 else cell_mask[:, None])  # [C] or [A, 1, C]
        student, target = student.masked_fill(masked, 0), target.masked_fill(masked, 0)
        weight = target.sum(dim=-1)
    else:
        weight = teacher.image_mass.float()  # [A, G]
    present = has_mass(target)  # [A]
    if not bool(present.any()):
        return _nothing(student_cells)
    student, target, weight = student[present], target[present], weight[present]
    student, target = _share(student), _share(target)
    if kind == "relative":
        index = torch.zeros_like(present, dtype=torch.int64) if sample_index is None else sample_index
        student, target = (_relative_rows(rows, index[present]) for rows in (student, target))
    if kind == "cosine":
        per_row = 1 - F.cosine_similarity(target, student, dim=-1)
    else:
        log_ratio = target.clamp_min(_TINY).log() - student.clamp_min(_TINY).log()
        per_row = (target * log_ratio).sum(dim=-1)  # [A, G]
    return (weight * per_row).mean()


def visual_columns_loss(student: Tensor, teacher: Tensor, *, token_mask: Tensor | None = None) -> Tensor:
    """1 - cosine of how much attention each visual token receives from the visual tokens.

    Args:
        student: Mean over visual query rows per visual key (`column_means`), float `[B, G, N]`.
        teacher: The same, on the student's visual tokens.
        token_mask: bool `[B, N]`, False for tokens in padding: masked on both sides. None: all count.

    Returns:
        Scalar float32, dimensionless: mean over groups and over samples with visual tokens.

    Raises:
        ValueError: If the shapes differ.

    Source:
        CompoDistill's loss without its sink filter, of which N numbers a group are exact.
    """
    _check_equal("visual_columns_loss", student, teacher)
    left, right = student.float(), teacher.float()
    if token_mask is not None:
        left, right = left.masked_fill(~token_mask[:, None], 0), right.masked_fill(~token_mask[:, None], 0)
    return _mean_over_samples(1 - F.cosine_similarity(left, right, dim=-1), right, student, "mean")


def column_means(maps: Tensor) -> Tensor:
    """Mean over query rows of visual maps, causal zeros included: float `[..., N, N]` -> `[..., N]`."""
    return maps.mean(dim=-2)


def sink_filtered_cosine_loss(
    student: Tensor,
    teacher: TeacherMap,
    *,
    token_mask: Tensor | None = None,
    reduction: LayerReduction = "sum",
) -> Tensor:
    """1 - cosine of column means over the pairs where neither side shows an attention sink.

    A pair counts if its mass is at most mean + std of its map on both sides and the teacher's is not zero.
    The mask is a comparison, so no gradient flows through it, but it does follow the student. A teacher's map of
    any preset serves, with the mask it was cached with.

    Args:
        student: Visual maps, float `[B, G, N, N]`, query rows by key columns, zero above the diagonal.
        teacher: The same, on the student's visual tokens, and its half of the mask.
        token_mask: Tokens that carry image, bool `[B, N]`; padding enters neither mean nor std. None: all do.
        reduction: Over groups: `sum` as published, or `mean`.

    Returns:
        Scalar float32, dimensionless: mean over samples with visual tokens.

    Raises:
        ValueError: If the shapes differ or there is no such reduction.

    Source:
        CompoDistill's released code (arXiv:2510.12184); mean and unbiased std include the causal zeros.
    """
    _check_equal("sink_filtered_cosine_loss", student, teacher.values)
    columns, wanted = teacher.mean_columns(student.float(), token_mask)  # [B, G, N]
    losses = 1 - F.cosine_similarity(columns, wanted, dim=-1)
    return _mean_over_samples(losses, teacher.values, student, reduction)


def visual_map_cosine_loss(
    student: Tensor,
    teacher: TeacherMap,
    *,
    token_mask: Tensor | None = None,
    reduction: LayerReduction = "mean",
) -> Tensor:
    """1 - cosine of the flattened visual maps.

    Args:
        student: Visual maps, float `[B, G, N, N]`, query rows by key columns.
        teacher: The same, on the student's visual tokens.
        token_mask: Tokens that carry image, bool `[B, N]`; others are masked on both sides. None: all do.
        reduction: Over groups: `mean` as published, or `sum`.

    Returns:
        Scalar float32, dimensionless: mean over samples with visual tokens.

    Raises:
        ValueError: If the shapes differ or there is no such reduction.
        CacheMismatchError: If the teacher's map comes from a preset without single values.

    Source:
        CompoDistill (arXiv:2510.12184), the paper's visual attention alignment.
    """
    _check_equal("visual_map_cosine_loss", student, teacher.values)
    left, right = student.float(), teacher.whole("the loss visual_map_kind=cosine")
    if token_mask is not None:
        padding = ~image_pairs(left, token_mask)
        left, right = left.masked_fill(padding, 0), right.masked_fill(padding, 0)
    left, right = left.flatten(2), right.flatten(2)
    return _mean_over_samples(1 - F.cosine_similarity(left, right, dim=-1), right, student, reduction)


def has_mass(teacher: Tensor) -> Tensor:
    """Which rows or samples an attention loss averages over: `[A or B, ...]` to bool `[A or B]`.

    Those without any mass are text-only, or pictures so narrow that no token carries image.
    """
    return teacher.flatten(1).any(dim=1)


def _nothing(student: Tensor) -> Tensor:
    """Zero that still depends on the student, so that a batch without rows can be stepped as any other."""
    return student.float().sum() * 0.0


def _check_equal(where: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{where}: student has shape {[*student.shape]}, teacher {[*teacher.shape]}; "
            "pool the teacher to the student's grid and match its layer groups first"
        )


def _with_spare_column(logits: Tensor, temperature: float) -> Tensor:
    """float32 `[A, V + 1]`: logits / temperature, then -inf where entries without a token may be written."""
    scaled = torch.full((logits.shape[0], logits.shape[1] + 1), -torch.inf, device=logits.device)
    torch.div(logits.float(), temperature, out=scaled[:, :-1])
    return scaled


def _share(cells: Tensor) -> Tensor:
    """Each row's mass as a share of its image mass; a row without mass stays zero."""
    return cells / cells.sum(dim=-1, keepdim=True).clamp_min(_TINY)


def _relative_rows(shares: Tensor, sample_index: Tensor) -> Tensor:
    """Rows `[A, G, C]` divided by the mean row of their sample, renormalised; unseen cells stay 0."""
    _, index = torch.unique(sample_index, return_inverse=True)
    samples = int(index.max()) + 1
    sums = torch.zeros(samples, *shares.shape[1:], device=shares.device).index_add(0, index, shares)
    rows = torch.bincount(index, minlength=samples)[:, None, None]
    return _share(shares / (sums / rows)[index].clamp_min(_TINY))


def _mean_over_samples(losses: Tensor, teacher: Tensor, student: Tensor, reduction: LayerReduction) -> Tensor:
    """Reduce `[B, G]` over groups, then over the samples whose teacher has any mass."""
    if reduction not in get_args(LayerReduction):
        raise ValueError(f"reduction: expected one of {list(get_args(LayerReduction))}, got {reduction!r}")
    present = has_mass(teacher)  # [B]
    if not bool(present.any()):
        return _nothing(student)
    per_sample = losses[present].sum(dim=1) if reduction == "sum" else losses[present].mean(dim=1)
    return per_sample.mean()
