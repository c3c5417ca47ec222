"""The training objective: one forward pass of the student, and every loss term it is asked for.

The wiring between batch, model and the pure losses of ``losses.py``. A term is a mean over its own unit
(rows, rows that look at an image, or images); each micro-batch contributes its **share** of that mean, so
that a step is the same function of its samples however they are split over micro-batches and processes.

Dims: B batch, T sequence, A supervised rows, R most rows of a sample, G layer groups, M visual tokens, C
common cells, I samples with an image, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from common.codecs.row_attention import RowAttention
from common.codecs.teacher_map import TeacherMap
from common.schema import IGNORE_INDEX
from common.visual_attention import AttentionCapture, AttentionRequest
from stage2_student.losses import (
    AnswerLossKind,
    answer_attention_loss,
    column_means,
    lm_loss,
    sink_filtered_cosine_loss,
    tail_bucket_kl,
    visual_columns_loss,
    visual_map_cosine_loss,
)
from stage2_student.signals import ATTENTION_SIGNALS, ROW_SIGNALS
from stage2_student.training_batch import AttentionBatch, TrainingBatch

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A micro-batch's part of each mean of its step, in [0, 1]; 1 when it is the whole step.

    Attributes:
        rows: Of the supervised rows.
        attention: By signal, of the rows or images on which its teacher has any mass; absent is 1.
    """

    rows: float = 1.0
    attention: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Loss terms of a micro-batch, each times the micro-batch's share, unweighted; float32 scalars.

    Attributes:
        lm: Cross-entropy, nats a row.
        logits: KL to the teacher, nats a row; None when off.
        attention: By signal.
        total: Weighted sum, the one to call ``backward`` on.
    """

    lm: Tensor
    logits: Tensor | None
    attention: Mapping[str, Tensor]
    total: Tensor

    def named(self) -> dict[str, Tensor]:
        """All terms by name, for the log, ``total`` first."""
        logits = {} if self.logits is None else {"logits": self.logits}
        return {"total": self.total, "lm": self.lm, **logits, **self.attention}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to compute.

    Attributes:
        weights: Weight of each active term: ``lm``, ``logits`` and attention signals.
        groups: Student layers of each layer group, as many as the cache's; empty without attention.
        temperature: Of the logit loss.
        answer_kind: Kind of the answer-attention loss, and of the text-attention loss.
        visual_map_kind: Kind of the visual-map loss.
    """

    weights: Mapping[str, float]
    groups: Groups = ()
    temperature: float = 1.0
    answer_kind: AnswerLossKind = "kl"
    visual_map_kind: Literal["sink_filtered", "cosine"] = "sink_filtered"

    def __call__(
        self, model: nn.Module, capture: AttentionCapture | None, batch: TrainingBatch, shares: Shares
    ) -> LossTerms:
        """Run the student over a micro-batch.

        Args:
            model: The student, wrapped or not.
            capture: Of the student's language model; None without attention losses.
            batch: On the model's device.
            shares: The micro-batch's part of its step.

        Returns:
            The terms, with a graph.
        """
        signals = [signal for signal in batch.attention if signal in self.weights]
        supervised = batch.inputs.labels != IGNORE_INDEX  # [B, T]
        with record_attention(capture, attention_requests(batch, self.groups, signals)) as maps:
            logits = model(**batch.inputs.model_inputs(), supervised=supervised, use_cache=False).logits
        attention = {
            signal: self._attention_loss(signal, maps, batch) * shares.attention.get(signal, 1.0)
            for signal in signals
        }
        for signal in self.weights:
            if signal not in ("lm", "logits"):
                # A micro-batch without images: the log keeps its columns.
                attention.setdefault(signal, logits.new_zeros((), dtype=torch.float32))
        lm = lm_loss(logits, batch.labels) * shares.rows
        total = self.weights.get("lm", 0.0) * lm
        logit_term = None
        if batch.logits is not None and "logits" in self.weights:
            logit_term = tail_bucket_kl(logits, batch.logits, temperature=self.temperature) * shares.rows
            total = total + self.weights["logits"] * logit_term
        for signal, value in attention.items():
            total = total + self.weights[signal] * value
        if torch.is_grad_enabled() and not batch.inputs.image_inputs:
            # Nothing reached the projector: backward needs a path to it, and DDP a gradient of every parameter.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    total = total + parameter.sum() * 0.0
        return LossTerms(lm=lm, logits=logit_term, attention=attention, total=total)

    def _attention_loss(self, signal: str, maps: Mapping[str, Tensor], batch: TrainingBatch) -> Tensor:
        """One attention term, mean over its unit.

        ``sink_filtered`` sums over layer groups, as released; all others are means over them.
        """
        target = batch.attention[signal]
        chosen = batch.has_image
        if signal in ROW_SIGNALS:
            rows, name = (batch.rows, "answer") if signal == "answer_attention" else (batch.text_rows, "text")
            rows = rows[batch.has_image.cpu()]  # [I, R]
            cells = student_answer_cells(maps[name][chosen], target, rows)
            assert target.image_mass is not None
            sample_index = sample_of_rows(rows).to(cells.device)  # [A']
            return answer_attention_loss(
                cells,
                RowAttention(target.teacher, target.image_mass),
                kind=self.answer_kind,
                cell_mask=None if target.content is None else target.content[sample_index],
                sample_index=sample_index,
            )
        student = pool_map(maps["visual"][chosen], target)  # [I, G, C, C]
        if signal == "visual_columns":
            columns = mean_columns(student, target.content)
            return visual_columns_loss(columns, target.teacher, token_mask=target.content)
        assert target.kept is not None
        teacher = TeacherMap(target.teacher, target.kept, target.complete)
        loss = visual_map_cosine_loss if self.visual_map_kind == "cosine" else sink_filtered_cosine_loss
        return loss(student, teacher, token_mask=target.content)


def record_attention(
    capture: AttentionCapture | None, requests: Mapping[str, AttentionRequest]
) -> AbstractContextManager[Mapping[str, Tensor]]:
    """Record while the student runs, if there is anything to record."""
    return nullcontext({}) if capture is None or not requests else capture.record(requests)


def attention_requests(
    batch: TrainingBatch, groups: Groups, signals: Iterable[str] = ATTENTION_SIGNALS
) -> dict[str, AttentionRequest]:
    """Which of the student's attention some losses need of a batch.

    Args:
        batch: Whose positions to take; nothing is requested for a text-only one.
        groups: Student layers of each group.
        signals: The losses' signals; those that the batch lacks are left out.

    Returns:
        ``answer``: supervised rows by visual tokens; ``text``: all text rows by visual tokens; ``visual``:
        visual tokens by visual tokens.
    """
    wanted = batch.attention.keys() & set(signals)
    requests: dict[str, AttentionRequest] = {}
    if "answer_attention" in wanted:
        requests["answer"] = AttentionRequest(batch.rows, batch.keys, groups)
    if "text_attention" in wanted:
        requests["text"] = AttentionRequest(batch.text_rows, batch.keys, groups)
    if wanted & {"visual_columns", "visual_map"}:
        requests["visual"] = AttentionRequest(batch.keys, batch.keys, groups)
    return requests


def student_answer_cells(attention: Tensor, target: AttentionBatch, rows: Tensor) -> Tensor:
    """The student's answer or text rows on the common cells, in the order of the teacher's rows.

    Args:
        attention: float32 ``[I, G, R, M]``, absolute mass.
        target: The teacher's side.
        rows: Row positions of these samples, int64 ``[I, R]``, padding -1.

    Returns:
        float32 ``[A', G, C]``.
    """
    pooled = attention @ target.student_pool[:, None]  # [I, G, R, C]
    by_row = pooled.transpose(1, 2)  # [I, R, G, C]
    return by_row[(rows >= 0).to(by_row.device)]


def pool_map(attention: Tensor, target: AttentionBatch) -> Tensor:
    """A visual x visual map on the common cells: keys by sum, queries by mean.

    Args:
        attention: float32 ``[I, G, M, M]``.
        target: The teacher's side.

    Returns:
        float32 ``[I, G, C, C]``; rows of cells that no token touches are 0.
    """
    pool = target.student_pool[:, None]  # [I, 1, M, C]
    touched = pool.sum(dim=2, keepdim=True).clamp_min(torch.finfo(pool.dtype).tiny)
    return (pool / touched).transpose(2, 3) @ (attention @ pool)


def mean_columns(maps: Tensor, content: Tensor | None) -> Tensor:
    """Mean over the rows that carry image: what each cell receives.

    Args:
        maps: float32 ``[I, G, C, C]``.
        content: bool ``[I, C]``; None: every cell carries image.

    Returns:
        float32 ``[I, G, C]``.
    """
    if content is None:
        return column_means(maps)
    rows = content.to(maps.dtype)[:, None, :, None]  # [I, 1, C, 1]
    return (maps * rows).sum(dim=2) / rows.sum(dim=2).clamp_min(1.0)


def sample_of_rows(rows: Tensor) -> Tensor:
    """The sample each row belongs to: int64 ``[I, R]`` positions (padding -1) to int64 ``[A']``."""
    return (rows >= 0).nonzero()[:, 0]


def step_shares(batches: list[TrainingBatch], totals: Sequence[float]) -> list[Shares]:
    """The share of each of a process's micro-batches in its step.

    Args:
        batches: This process's micro-batches.
        totals: ``TrainingBatch.units`` summed over the whole step.

    Returns:
        One entry per micro-batch; a unit that the step lacks has share 0.
    """
    shares = []
    for batch in batches:
        rows, *attention = (count / max(1.0, total) for count, total in zip(batch.units, totals, strict=True))
        shares.append(Shares(rows=rows, attention=dict(zip(ATTENTION_SIGNALS, attention, strict=True))))
    return shares
