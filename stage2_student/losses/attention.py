"""What a student learns from where its teacher looks: pure functions, float32 inside.

Losses of rows (answers, text) average over rows that look at the image, losses of maps over samples that have
one; all are 0, with a graph, when there is nothing to learn from. They take live and cached signals alike. Over
layer groups each is a mean or a sum: the ``reduction``. A ``token_mask``, bool ``[B, N]``, is False for tokens in padding,
which are masked on both sides; None: all carry image. Shapes that differ, and kinds or reductions that are none, raise
a ValueError.

Of several pictures of a sample, rows are one distribution over the cells of all of them. Columns and maps are compared picture
by picture: B then counts pictures, and ``sample_index``, int64 `[B]`, says whose each is; a loss is the mean over a sample's
pictures, then over samples. None: a picture each.

Maps of several samples come as one batch `[B, G, N, N]` when the samples have equally many visual tokens, as
one processor's samples do, or padded with cells that a mask leaves out. Rows and keys of samples without an
image are zero, as the attention capture leaves them.

Dims: A rows, B samples, G layer groups, C grid cells, N visual tokens of the student's grid (the teacher's
pooled to it).
"""

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap, image_pairs
from vlm_distill_cache.stage2_student.loss_weights import (
    SINK_SUPPRESSED,
    AnswerLossKind,
    LayerReduction,
    VisualColumnsKind,
    VisualMapKind,
)

_TINY = 1e-12
"""Below any mass that matters: bounds logarithms and divisions where a student gives a cell nothing."""


def answer_attention_loss(
    student_cells: Tensor,
    teacher: RowAttention,
    *,
    kind: AnswerLossKind = "kl",
    cell_mask: Tensor | None = None,
    sample_index: Tensor | None = None,
    sinks: Tensor | None = None,
    reduction: LayerReduction = "mean",
) -> Tensor:
    """How differently student and teacher look at the image while predicting answer tokens.

    Both sides are renormalised over the image, per row and group: where a row looks, not how much. A
    row's loss is weighted by the teacher's mass on the image, since a row that hardly looks says
    little. `kl_with_rest` teaches how much as well: it keeps the mass off the image as one more cell, and
    renormalises and weighs nothing. Rows without any mass (text-only samples) are left out, of the mean too.

    Args:
        student_cells: Absolute probability mass on each grid cell, float `[A, G, C]`.
        teacher: The same rows, groups and grid.
        kind: `kl`: KL(teacher || student) over cells. `cosine`: 1 - cosine. `relative`: `kl` after each
            row is divided, cell by cell, by the mean row of its sample and renormalised, which brings out
            where it looks beside cells that attract attention in all rows. `kl_with_rest`: KL over cells and
            the rest. `sink_suppressed`: `kl` after both sides' cells are multiplied by 1 - their sink score; a row's weight is
            the teacher's mass that is left, and without sinks this is `kl` bit for bit.
        cell_mask: bool `[C]` or `[A, C]`, False for cells in padding: masked on both sides, part of the
            rest. None: all count.
        sample_index: int64 `[A]`, sample of each row, for `relative`. None: all rows are of one sample.
        sinks: Sink scores of cells, float `[C]` or `[A, C]` in [0, 1], for `sink_suppressed`.

    Returns:
        Scalar float32: nats (`kl`, `relative`, `sink_suppressed`: times mass; `kl_with_rest`) or dimensionless (`cosine`,
        times mass); reduced over groups, mean over rows with image.

    Source:
        Ours (CompoDistill, arXiv:2510.12184, aligns visual rows); `relative` after arXiv:2502.17422; the scores of
        `sink_suppressed` are those of SToP (arXiv:2604.20937).
    """
    if kind not in get_args(AnswerLossKind):
        raise ValueError(f"kind: expected one of {list(get_args(AnswerLossKind))}, got {kind!r}")
    _check_equal("answer_attention_loss", student_cells, teacher.cells)
    student, target = student_cells.float(), teacher.cells.float()  # [A, G, C]
    weight = teacher.image_mass.float()  # [A, G]
    if cell_mask is not None:
        masked = ~(cell_mask if cell_mask.ndim == 1 else cell_mask[:, None])  # [C] or [A, 1, C]
        student, target = student.masked_fill(masked, 0), target.masked_fill(masked, 0)
        weight = target.sum(dim=-1)
    present = has_mass(target)  # [A]
    if kind == "kl_with_rest":
        student = torch.cat([student, (1 - student.sum(dim=-1, keepdim=True)).clamp_min(0)], dim=-1)
        target = torch.cat([target, (1 - weight[..., None]).clamp_min(0)], dim=-1)
        return _reduce(_kl(target, student), present, student_cells, reduction)
    if kind == SINK_SUPPRESSED:
        kept = _kept(sinks, "answer_attention_loss")
        kept = kept if kept.ndim == 1 else kept[:, None]  # [C] or [A, 1, C]
        before = target.sum(dim=-1)
        student, target = student * kept, target * kept
        weight = weight * torch.where(before > 0, target.sum(dim=-1) / before, 1.0)
    student, target = _share(student), _share(target)
    if kind == "relative":
        index = torch.zeros_like(present, dtype=torch.int64) if sample_index is None else sample_index
        student, target = (_relative_rows(rows, index, present) for rows in (student, target))
    per_row = 1 - F.cosine_similarity(target, student, dim=-1) if kind == "cosine" else _kl(target, student)
    return _reduce(weight * per_row, present, student_cells, reduction)


def visual_columns_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    kind: VisualColumnsKind = "cosine",
    token_mask: Tensor | None = None,
    sinks: Tensor | None = None,
    reduction: LayerReduction = "mean",
    sample_index: Tensor | None = None,
) -> Tensor:
    """1 - cosine of how much attention each visual token receives from the visual tokens.

    Args:
        student: Mean over visual query rows per visual key, causal zeros included, float `[B, G, N]`.
        teacher: The same, on the student's visual tokens.
        kind: `cosine`, or `sink_suppressed`: both sides multiplied by 1 - the tokens' sink scores first.
        sinks: Sink scores of tokens, float `[N]` or `[B, N]` in [0, 1], for `sink_suppressed`.

    Returns:
        Scalar float32, dimensionless: reduced over groups, mean over samples with visual tokens.

    Source:
        CompoDistill's loss without its sink filter, of which N numbers a group are exact; the scores of `sink_suppressed` are
        those of SToP (arXiv:2604.20937).
    """
    if kind not in get_args(VisualColumnsKind):
        raise ValueError(f"kind: expected one of {list(get_args(VisualColumnsKind))}, got {kind!r}")
    _check_equal("visual_columns_loss", student, teacher)
    left, right = student.float(), teacher.float()
    if token_mask is not None:
        left, right = left.masked_fill(~token_mask[:, None], 0), right.masked_fill(~token_mask[:, None], 0)
    present = has_mass(right)
    if kind == SINK_SUPPRESSED:
        kept = _kept(sinks, "visual_columns_loss")
        kept = kept if kept.ndim == 1 else kept[:, None]  # [N] or [B, 1, N]
        left, right = left * kept, right * kept
    losses = 1 - F.cosine_similarity(left, right, dim=-1)
    if kind == SINK_SUPPRESSED:  # columns that lie on sinks alone: nothing is left to differ from
        losses = losses * right.any(dim=-1)
    return _reduce(losses, present, student, reduction, sample_index)


def sink_filtered_cosine_loss(
    student: Tensor,
    teacher: TeacherMap,
    *,
    token_mask: Tensor | None = None,
    reduction: LayerReduction = "sum",
    sample_index: Tensor | None = None,
) -> Tensor:
    """1 - cosine of column means over the pairs where neither side shows an attention sink.

    A pair counts if its mass is at most mean + std of its map on both sides and the teacher's is not zero.
    The mask is a comparison, so no gradient flows through it, but it does follow the student. A teacher's map of
    any preset serves, with the mask it was cached with.

    Args:
        student: Visual maps, float `[B, G, N, N]`, query rows by key columns, zero above the diagonal.
        teacher: The same, on the student's visual tokens, and its half of the mask.

    Returns:
        Scalar float32, dimensionless: mean over samples with visual tokens.

    Source:
        CompoDistill's released code (arXiv:2510.12184); mean and unbiased std include the causal zeros. Its window, positions
        31 to 759, holds 728 visual tokens and one text token behind them, which is left out here.
    """
    _check_equal("sink_filtered_cosine_loss", student, teacher.values)
    columns, wanted = teacher.mean_columns(student.float(), token_mask)  # [B, G, N]
    losses = 1 - F.cosine_similarity(columns, wanted, dim=-1)
    return _reduce(losses, has_mass(teacher.values), student, reduction, sample_index)


def visual_map_loss(
    student: Tensor,
    teacher: TeacherMap,
    *,
    kind: VisualMapKind = "cosine",
    token_mask: Tensor | None = None,
    reduction: LayerReduction = "mean",
    sample_index: Tensor | None = None,
) -> Tensor:
    """How differently visual tokens look at visual tokens, over the whole map.

    Args:
        student: Visual maps, float `[B, G, N, N]`, query rows by key columns.
        teacher: The same, on the student's visual tokens.
        kind: `cosine`: 1 - cosine of the flattened maps, the paper's. `kl`: KL(teacher || student) of each row,
            renormalised over the visual keys and weighted by the teacher's mass on them, mean over the rows
            that carry image. `mse`: mean squared difference over the pairs of tokens that carry image, causal
            zeros included (masses are about 1/N, so this is of the order 1/N^2). `sink_filtered`:
            `sink_filtered_cosine_loss`.

    Returns:
        Scalar float32, dimensionless (`kl`: nats times mass): mean over samples with visual tokens.

    Raises:
        CacheMismatchError: If the teacher's map comes from a preset without single values.

    Source:
        CompoDistill (arXiv:2510.12184): the visual attention alignment and its ablation of loss kinds, of which
        the paper gives no formula beyond the names.
    """
    if kind not in get_args(VisualMapKind):
        raise ValueError(f"kind: expected one of {list(get_args(VisualMapKind))}, got {kind!r}")
    if kind == "sink_filtered":
        return sink_filtered_cosine_loss(
            student, teacher, token_mask=token_mask, reduction=reduction, sample_index=sample_index
        )
    _check_equal("visual_map_loss", student, teacher.values)
    left, right = student.float(), teacher.whole(f"the loss visual_map_kind={kind}")
    pairs = image_pairs(left, token_mask)
    left, right = left * pairs, right * pairs
    if kind == "cosine":
        losses = 1 - F.cosine_similarity(left.flatten(2), right.flatten(2), dim=-1)
    elif kind == "mse":
        losses = (left - right).square().sum(dim=(2, 3)) / pairs.sum(dim=(2, 3)).clamp_min(1)
    else:
        rows = pairs.any(dim=-1).sum(dim=-1).clamp_min(1)  # [B, G]
        losses = (right.sum(dim=-1) * _kl(_share(right), _share(left))).sum(dim=-1) / rows
    return _reduce(losses, has_mass(right), student, reduction, sample_index)


def all_attention_loss(
    student_map: Tensor,
    student_text: Tensor,
    teacher_map: Tensor,
    teacher_text: Tensor,
    *,
    text_sample: Tensor,
    row_weights: Tensor,
    token_mask: Tensor | None = None,
    reduction: LayerReduction = "mean",
) -> Tensor:
    """1 - cosine of all rows' attention on the image, flattened: the paper's A[:, :N_v].

    Every query row counts, visual and text; the columns are the visual ones. Both parts must lie on the same
    cells. Where cells hold several tokens, the map's rows are their mean, and weights keep the balance between
    visual and text rows that single tokens would have.

    Args:
        student_map: Visual rows, float `[B, G, C, C]`, query rows by key columns.
        student_text: Text rows of all samples, float `[X, G, C]`.
        text_sample: int64 `[X]`, the sample of each text row.
        row_weights: How many visual tokens each row of the maps stands for, float `[B, C]`.

    Returns:
        Scalar float32, dimensionless: mean over samples with visual tokens.

    Source:
        CompoDistill (arXiv:2510.12184), the formula of its visual attention alignment; the weights are ours.
    """
    _check_equal("all_attention_loss", student_map, teacher_map)
    _check_equal("all_attention_loss, text rows", student_text, teacher_text)
    seen_map, seen_text = student_map.float(), student_text.float()
    true_map, true_text = teacher_map.float(), teacher_text.float()
    if token_mask is not None:
        pairs, columns = image_pairs(seen_map, token_mask), token_mask[text_sample][:, None]  # [X, 1, C]
        seen_map, true_map = seen_map * pairs, true_map * pairs
        seen_text, true_text = seen_text * columns, true_text * columns

    def inner(left_map: Tensor, left_text: Tensor, right_map: Tensor, right_text: Tensor) -> Tensor:
        """Inner products `[B, G]` of the flattened rows."""
        visual = ((left_map * right_map).sum(dim=-1) * row_weights[:, None]).sum(dim=-1)
        return visual.index_add(0, text_sample, (left_text * right_text).sum(dim=-1))

    both = inner(seen_map, seen_text, true_map, true_text)
    seen = inner(seen_map, seen_text, seen_map, seen_text).clamp_min(_TINY**2).sqrt()
    true = inner(true_map, true_text, true_map, true_text).clamp_min(_TINY**2).sqrt()
    cosine = both / (seen * true)  # the squares are bounded, not the norms: the root of 0 has no gradient
    return _reduce(1 - cosine, has_mass(true_map), student_map, reduction)


def sink_shares(
    student: Tensor,
    teacher: TeacherMap,
    *,
    token_mask: Tensor | None = None,
    sample_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the sink filter of `sink_filtered_cosine_loss` takes out, of the pairs on which the teacher has mass.

    Returns:
        The share of these pairs, and the share of the teacher's mass on them, float32 scalars in [0, 1]: mean over
        groups, then over samples with visual tokens; 0 without any. The second is 0 for an incomplete map.
    """
    with torch.no_grad():
        kept = teacher.kept_with(student.float(), token_mask)  # [B, G, N, N]
        values = teacher.values * image_pairs(teacher.values, token_mask)
        present = has_mass(values)
        all_pairs = (values > 0).sum(dim=(-2, -1)).clamp_min(1)
        pairs = 1 - kept.sum(dim=(-2, -1)) / all_pairs
        mass = 1 - (values * kept).sum(dim=(-2, -1)) / values.sum(dim=(-2, -1)).clamp_min(_TINY)
        if not teacher.complete:
            mass = torch.zeros_like(mass)
        return _reduce(pairs, present, pairs, "mean", sample_index), _reduce(mass, present, mass, "mean", sample_index)


def has_mass(teacher: Tensor) -> Tensor:
    """Which rows or samples an attention loss averages over: `[A or B, ...]` to bool `[A or B]`.

    Those without any mass are text-only, or pictures so narrow that no token carries image.
    """
    return teacher.flatten(1).any(dim=1)


def _kept(sinks: Tensor | None, where: str) -> Tensor:
    """What the sink scores leave of each cell."""
    if sinks is None:
        raise ValueError(f"{where}: kind {SINK_SUPPRESSED!r} needs the sink scores of cells; give `sinks`")
    return 1 - sinks.float()


def _check_equal(where: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{where}: student has shape {[*student.shape]}, teacher {[*teacher.shape]}; "
            "pool the teacher to the student's grid and match its layer groups first"
        )


def _share(cells: Tensor) -> Tensor:
    """Each row's mass as a share of its image mass; a row without mass stays zero."""
    return cells / cells.sum(dim=-1, keepdim=True).clamp_min(_TINY)


def _kl(target: Tensor, student: Tensor) -> Tensor:
    """KL(target || student) over the last axis; cells that either side gives nothing stay finite."""
    return (target * (target.clamp_min(_TINY).log() - student.clamp_min(_TINY).log())).sum(dim=-1)


def _relative_rows(shares: Tensor, sample_index: Tensor, present: Tensor) -> Tensor:
    """Rows `[A, G, C]` divided by the mean row of their sample's `present` rows, renormalised; unseen cells stay 0."""
    samples = int(sample_index.max()) + 1 if len(sample_index) else 0
    counted = shares * present[:, None, None]
    # Sums serve as means: renormalising takes out the number of rows.
    sums = torch.zeros(samples, *shares.shape[1:], device=shares.device).index_add(0, sample_index, counted)
    return _share(shares / sums[sample_index].clamp_min(_TINY))


def _reduce(
    losses: Tensor,
    present: Tensor,
    student: Tensor,
    reduction: LayerReduction,
    sample_index: Tensor | None = None,
) -> Tensor:
    """Reduce `[A or B, G]` over groups, then average over the rows or samples that are `present`, bool `[A or B]`.

    Args:
        sample_index: Of pictures: an average over each sample's that are present comes first.
    """
    if reduction not in get_args(LayerReduction):
        raise ValueError(f"reduction: expected one of {list(get_args(LayerReduction))}, got {reduction!r}")
    index = present.nonzero()[:, 0]  # the one wait for a GPU
    if not len(index):
        # Still depends on the student, so that a batch without rows can be stepped as any other.
        return student.float().sum() * 0.0
    chosen = losses[index]
    each = chosen.sum(dim=1) if reduction == "sum" else chosen.mean(dim=1)
    return each.mean() if sample_index is None else _mean_of_samples(each, sample_index[index])


def _mean_of_samples(values: Tensor, sample_index: Tensor) -> Tensor:
    """The mean over samples of the mean over each one's pictures; both `[B]`, at least one."""
    _, owner, counts = sample_index.unique(return_inverse=True, return_counts=True)
    mean: Tensor = (values / counts[owner]).sum() / len(counts)
    return mean
