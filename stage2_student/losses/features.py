"""Feature terms of the objective: the student's side of hidden states and visual logits, and the losses on them.

Dims: B batch, T sequence, R rows of a term, M most visual tokens of a sample, S layers, D width, V vocabulary.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm_distill_cache.common.attention.hidden import HiddenCapture, HiddenRequest, student_layers
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs import codec_from_dict
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.features import FeatureBatch
from vlm_distill_cache.stage2_student.loss_weights import FEATURE_TERMS, HiddenKind, LogitKind
from vlm_distill_cache.stage2_student.losses.logits import tail_bucket_loss

_TINY = 1e-12


def hidden_loss(
    student: Tensor, teacher: Tensor, *, kind: HiddenKind = "relative_mse", row_counts: tuple[int, ...]
) -> Tensor:
    """How far a student's hidden states are from the teacher's.

    Args:
        student: float ``[R, S, D]``; of another width than the teacher's for ``relation`` only.
        teacher: float32 ``[R, S, D']``.
        kind: ``relative_mse``: squared error over the teacher's squared norm, row by row, so that no layer counts
            more because its numbers are larger. ``cosine``: 1 - cosine. ``relation``: 1 - cosine of a row's
            similarities (cosines) to all rows of its sample, which needs no common width.
        row_counts: Rows of each sample; they sum to R.

    Returns:
        Scalar float32, dimensionless, mean over rows and layers; 0, with a graph, without rows.

    Raises:
        ValueError: If the shapes do not fit each other or there is no such kind.

    Source:
        ``relative_mse``: the normalised hidden-state loss of structured-pruning recovery; ``relation``: after the
        relational distillation of LLaVA-KD (arXiv 2410.16236), row by row instead of the whole matrix.
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


def wanted_rows(batch: TrainingBatch, features: Mapping[str, FeatureBatch]) -> Tensor:
    """Rows whose logits the losses need, bool ``[B, T]``: supervised ones, and visual tokens if those have a loss."""
    supervised = batch.inputs.labels != IGNORE_INDEX
    return supervised | batch.inputs.visual_mask if "visual_logits" in features else supervised


def visual_logits(logits: Tensor, rows: Tensor, batch: TrainingBatch, part: FeatureBatch) -> Tensor:
    """The student's logits at the visual tokens of the samples that have a teacher's, float ``[R, V]``.

    Args:
        logits: Of ``rows``, batch-row order.
        rows: bool ``[B, T]``.
        batch: The micro-batch.
        part: The teacher's side.
    """
    chosen = torch.zeros_like(rows)
    chosen[list(part.samples)] = batch.inputs.visual_mask[list(part.samples)]
    return logits[chosen[rows]]


@contextmanager
def record_hidden(
    model: nn.Module,
    batch: TrainingBatch,
    features: Mapping[str, FeatureBatch],
    layers: Mapping[str, tuple[int, ...]],
) -> Iterator[dict[str, Tensor]]:
    """Record the student's hidden states of one forward pass, as rows that meet the teacher's.

    Args:
        model: The student, wrapped or not.
        batch: The micro-batch.
        features: Its wanted feature terms.
        layers: The student's hidden states of each term.

    Yields:
        By term, once the block is over: float ``[R, S, D]``.
    """
    wanted = [term for term in features if term != "visual_logits"]
    found: dict[str, Tensor] = {}
    if not wanted:
        yield found
        return
    capture = HiddenCapture(getattr(model, "module", model).language_model)
    requests = {
        # Of a shallow student one layer may meet several of the teacher's.
        term: HiddenRequest(batch.rows if term == "hidden" else batch.keys, tuple(dict.fromkeys(layers[term])))
        for term in wanted
    }
    with capture.record(requests) as states:
        yield found
    for term in wanted:
        place = {layer: index for index, layer in enumerate(requests[term].layers)}
        chosen = states[term][:, :, [place[layer] for layer in layers[term]]]  # [B, R or M, S, D]
        found[term] = _meeting_rows(chosen, batch, features[term], term)


def _meeting_rows(states: Tensor, batch: TrainingBatch, part: FeatureBatch, term: str) -> Tensor:
    if term == "hidden":
        return states[(batch.rows >= 0).to(states.device)]
    assert part.student_pool is not None
    pooled = []
    for place, weights in zip(part.samples, part.student_pool.split(list(part.row_counts)), strict=True):
        tokens = states[place][: weights.shape[1]].float()  # [M, S, D]
        pooled.append((weights[:, : len(tokens)] @ tokens.flatten(1)).unflatten(1, tokens.shape[1:]))
    return torch.cat(pooled)


def feature_loss(
    part: FeatureBatch, student: Tensor, *, hidden_kind: HiddenKind, logit_kind: LogitKind, temperature: float
) -> Tensor:
    """One feature term, a mean over its rows.

    Args:
        part: The teacher's side.
        student: float ``[R, S, D]``, or logits ``[R, V]``.
        hidden_kind: Of hidden states.
        logit_kind: Of visual logits.
        temperature: Of visual logits.
    """
    if part.logits is not None:
        return tail_bucket_loss(student, part.logits, kind=logit_kind, temperature=temperature)
    assert part.teacher is not None
    return hidden_loss(student, part.teacher, kind=hidden_kind, row_counts=part.row_counts)


def match_features(
    plan: Plan, terms: Collection[str], *, depth: int, width: int, kind: HiddenKind, where: str
) -> dict[str, tuple[int, ...]]:
    """The student's hidden states that meet those of a cache.

    Args:
        plan: The cache's.
        terms: Those with a loss, of any sort.
        depth: Layers of the student.
        width: Of the student's language model.
        kind: Of the losses on hidden states.
        where: Phase and cache, for errors.

    Returns:
        Layers by term.

    Raises:
        CacheMismatchError: If the kind needs the teacher's width and the student has another one.
    """
    layers: dict[str, tuple[int, ...]] = {}
    for term in FEATURE_TERMS:
        if term not in terms or term == "visual_logits":
            continue
        codec = codec_from_dict(plan.signals[term])
        assert isinstance(codec, HiddenCodec)
        if kind != "relation" and codec.width != width:
            raise CacheMismatchError(
                f"{where}: {term} holds hidden states of width {codec.width}, the student has width {width}: "
                f"hidden_kind={kind} needs equal widths. Set PHASE.losses.hidden_kind=relation "
                "(PHASE: dpt, dft or sft), or use a student of the "
                "teacher's width (a pruned one keeps it)"
            )
        layers[term] = student_layers(codec.layers, teacher_depth=int(plan.teacher["layers"]), student_depth=depth)
    return layers
