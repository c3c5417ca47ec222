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

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap
from vlm_distill_cache.stage2_student.batches.batch import AttentionBatch, TrainingBatch
from vlm_distill_cache.stage2_student.loss_weights import (
    ALL_ROWS,
    ATTENTION_TERMS,
    FEATURE_TERMS,
    ROW_SIGNALS,
    AnswerLossKind,
    AttentionReduction,
    HiddenKind,
    LayerReduction,
    LogitKind,
    VisualMapKind,
)
from vlm_distill_cache.stage2_student.losses.attention import (
    all_attention_loss,
    answer_attention_loss,
    sink_shares,
    visual_columns_loss,
    visual_map_loss,
)
from vlm_distill_cache.stage2_student.losses.features import feature_loss, record_hidden, visual_logits, wanted_rows
from vlm_distill_cache.stage2_student.losses.rows import run_student

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A micro-batch's part of each mean of its step, in [0, 1]; 1 when it is the whole step.

    Attributes:
        rows: Of the supervised rows.
        attention: By attention or feature term, of the rows or images that it is a mean over; absent is 1.
    """

    rows: float = 1.0
    attention: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Loss terms of a micro-batch, each times the micro-batch's share, unweighted; float32 scalars.

    Attributes:
        lm: Cross-entropy, nats a row.
        logits: Divergence from the teacher, a row; None when off.
        attention: By term.
        features: Losses on hidden states and visual logits, by term.
        total: Weighted sum, the one to call ``backward`` on.
        measures: What is reported beside the losses, without gradient, shared out as they are: ``sink_pairs`` and
            ``sink_mass``, the shares of pairs and of the teacher's attention that the sink filter removes.
    """

    lm: Tensor
    logits: Tensor | None
    attention: Mapping[str, Tensor]
    total: Tensor
    measures: Mapping[str, Tensor] = field(default_factory=dict)
    features: Mapping[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """All terms by name, for the log, ``total`` first and measures last."""
        logits = {} if self.logits is None else {"logits": self.logits}
        terms = {**logits, **self.attention, **self.features}
        return {"total": self.total, "lm": self.lm, **terms, **self.measures}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to compute.

    Attributes:
        weights: Weight of each active term: ``lm``, ``logits`` and attention terms.
        groups: Student layers of each layer group, as many as the batch's; empty without attention.
        temperature: Of the logit loss.
        logit_kind: Kind of the logit loss.
        answer_kind: Kind of the answer-attention loss, and of the text-attention loss.
        visual_map_kind: Kind of the visual-map loss.
        attention_reduction: Over layer groups; ``published``: sum for ``sink_filtered``, mean for all others.
        hidden_kind: Kind of the losses on hidden states.
        feature_layers: The student's hidden states that meet the cached ones, by term.
        map_is_complete: Whether the cached visual maps hold single values, of which the sinks' mass is known.
    """

    weights: Mapping[str, float]
    groups: Groups = ()
    temperature: float = 1.0
    logit_kind: LogitKind = "forward_kl"
    answer_kind: AnswerLossKind = "kl"
    visual_map_kind: VisualMapKind = "sink_filtered"
    attention_reduction: AttentionReduction = "published"
    map_is_complete: bool = True
    hidden_kind: HiddenKind = "relative_mse"
    feature_layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

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
        wanted = [term for term in batch.attention if term in self.weights]
        features = {term: part for term, part in batch.features.items() if term in self.weights}
        rows = wanted_rows(batch, features)  # [B, T]
        with (
            record_attention(capture, attention_requests(batch, self.groups, wanted)) as maps,
            record_hidden(model, batch, features, self.feature_layers) as states,
        ):
            said = run_student(
                model,
                batch,
                rows,
                weights=self.weights,
                kind=self.logit_kind,
                temperature=self.temperature,
                whole="visual_logits" in features,
            )
        # A micro-batch without images: the log keeps its columns.
        nothing = torch.zeros_like(said.lm)
        attention = {term: nothing for term in ATTENTION_TERMS if term in self.weights}
        measures = dict.fromkeys(self._measured(), nothing)
        for term in wanted:
            share = shares.attention.get(term, 1.0)
            loss, measured = self._attention_loss(term, maps, batch)
            attention[term] = loss * share
            measures |= {name: value * share for name, value in measured.items() if name in measures}
        feature_terms = {term: nothing for term in FEATURE_TERMS if term in self.weights}
        for term, part in features.items():
            loss = feature_loss(
                part,
                states[term]
                if said.row_logits is None or term in states
                else visual_logits(said.row_logits, rows, batch, part),
                hidden_kind=self.hidden_kind,
                logit_kind=self.logit_kind,
                temperature=self.temperature,
            )
            feature_terms[term] = loss * shares.attention.get(term, 1.0)
        total = said.total * shares.rows
        for term, value in (*attention.items(), *feature_terms.items()):
            total = total + self.weights[term] * value
        if torch.is_grad_enabled() and not batch.inputs.image_inputs:
            # Nothing reached the projector: backward needs a path to it, and DDP a gradient of every parameter.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    total = total + parameter.sum() * 0.0
        return LossTerms(
            lm=said.lm * shares.rows,
            logits=None if said.logits is None else said.logits * shares.rows,
            attention=attention,
            total=total,
            measures=measures,
            features=feature_terms,
        )

    def _measured(self) -> tuple[str, ...]:
        """Names of the measures, the same for every micro-batch."""
        if "visual_map" not in self.weights or self.visual_map_kind != "sink_filtered":
            return ()
        return ("sink_pairs", "sink_mass") if self.map_is_complete else ("sink_pairs",)

    def _reduction(self, term: str) -> LayerReduction:
        if self.attention_reduction != "published":
            return self.attention_reduction
        return "sum" if term == "visual_map" and self.visual_map_kind == "sink_filtered" else "mean"

    def _attention_loss(
        self, term: str, maps: Mapping[str, Tensor], batch: TrainingBatch
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """One attention term, mean over its unit, and what is measured beside it."""
        target, reduction = batch.attention[term], self._reduction(term)
        if term in ROW_SIGNALS:
            name = "answer" if term == "answer_attention" else "text"
            cells, sample_index = _student_rows(name, maps, batch, target)
            assert target.image_mass is not None
            loss = answer_attention_loss(
                cells,
                RowAttention(target.teacher, target.image_mass),
                kind=self.answer_kind,
                cell_mask=None if target.content is None else target.content[sample_index],
                sample_index=sample_index,
                reduction=reduction,
            )
            return loss, {}
        if term == "visual_columns":
            columns = _of_images(maps["columns"], batch)[:, :, 0] @ target.student_pool  # [I, G, C]
            loss = visual_columns_loss(columns, target.teacher, token_mask=target.content, reduction=reduction)
            return loss, {}
        student = pool_map(_of_images(maps["visual"], batch), target)  # [I, G, C, C]
        if term == ALL_ROWS:
            assert target.text is not None
            cells, sample_index = _student_rows("text", maps, batch, target)
            loss = all_attention_loss(
                student,
                cells,
                target.teacher,
                target.text,
                text_sample=sample_index,
                row_weights=target.student_pool.sum(dim=1),
                token_mask=target.content,
                reduction=reduction,
            )
            return loss, {}
        assert target.kept is not None
        teacher = TeacherMap(target.teacher, target.kept, target.complete)
        kind = self.visual_map_kind
        loss = visual_map_loss(student, teacher, kind=kind, token_mask=target.content, reduction=reduction)
        if kind != "sink_filtered":
            return loss, {}
        pairs, mass = sink_shares(student, teacher, token_mask=target.content)
        return loss, {"sink_pairs": pairs, "sink_mass": mass}


def _student_rows(
    name: str, maps: Mapping[str, Tensor], batch: TrainingBatch, target: AttentionBatch
) -> tuple[Tensor, Tensor]:
    """The student's ``answer`` or ``text`` rows ``[A', G, C]``, and the sample with an image each belongs to."""
    rows = (batch.rows if name == "answer" else batch.text_rows)[batch.has_image.cpu()]  # [I, R]
    cells = student_answer_cells(_of_images(maps[name], batch), target, rows)
    return cells, sample_of_rows(rows).to(cells.device)


def _of_images(attention: Tensor, batch: TrainingBatch) -> Tensor:
    """Attention of the samples with an image: ``[B, ...]`` to ``[I, ...]``, not copied where all have one."""
    return attention if len(batch.has_image) == len(attention) else attention[batch.has_image]


def record_attention(
    capture: AttentionCapture | None, requests: Mapping[str, AttentionRequest]
) -> AbstractContextManager[Mapping[str, Tensor]]:
    """Record while the student runs, if there is anything to record."""
    return nullcontext({}) if capture is None or not requests else capture.record(requests)


def attention_requests(
    batch: TrainingBatch, groups: Groups, terms: Iterable[str] = ATTENTION_TERMS
) -> dict[str, AttentionRequest]:
    """Which of the student's attention some losses need of a batch.

    Args:
        batch: Whose positions to take; nothing is requested for a text-only one.
        groups: Student layers of each group.
        terms: Those that the batch lacks are left out.

    Returns:
        ``answer``: supervised rows by visual tokens; ``text``: all text rows by visual tokens; ``visual``:
        visual tokens by visual tokens; ``columns``: the mean of these over the common cells that carry image.
    """
    wanted = batch.attention.keys() & set(terms)
    requests: dict[str, AttentionRequest] = {}
    if "answer_attention" in wanted:
        requests["answer"] = AttentionRequest(batch.rows, batch.keys, groups)
    if wanted & {"text_attention", ALL_ROWS}:
        requests["text"] = AttentionRequest(batch.text_rows, batch.keys, groups)
    if wanted & {"visual_map", ALL_ROWS}:
        requests["visual"] = AttentionRequest(batch.keys, batch.keys, groups)
    if "visual_columns" in wanted:
        weights = row_weights(batch.attention["visual_columns"])  # [I, M]
        if len(batch.has_image) != len(batch.keys):
            weights = weights.new_zeros(batch.keys.shape).index_copy(0, batch.has_image, weights)
        requests["columns"] = AttentionRequest(batch.keys, batch.keys, groups, weights)
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


def row_weights(target: AttentionBatch) -> Tensor:
    """What each visual token counts in the mean over common cells that carry image, queries being pooled by mean.

    Args:
        target: The teacher's side.

    Returns:
        float32 ``[I, M]``.
    """
    pool = target.student_pool  # [I, M, C]
    touched = pool.sum(dim=1).clamp_min(torch.finfo(pool.dtype).tiny)  # [I, C]
    cells = torch.ones_like(touched) if target.content is None else target.content.to(pool.dtype)
    cells = cells / cells.sum(dim=1, keepdim=True).clamp_min(1.0)
    return (pool @ (cells / touched)[:, :, None])[:, :, 0]


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
        shares.append(
            Shares(rows=rows, attention=dict(zip((*ATTENTION_TERMS, *FEATURE_TERMS), attention, strict=True)))
        )
    return shares
