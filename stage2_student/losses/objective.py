"""The training objective: one forward pass of the student, and every loss term it is asked for.

A term is a mean over its own unit (rows, rows that look at an image, or images); each micro-batch contributes its
**share** of that mean, so that a step is the same function of its samples however they are split over micro-batches
and processes.

Where the output projection is a plain linear layer the pass never holds the supervised rows' logits: they become losses
and gradients chunk by chunk (``fused``), inside the pass. Otherwise, or where visual tokens need logits too, it does.

Dims: B batch, T sequence, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.hidden import HiddenCapture, HiddenRequest
from vlm_distill_cache.common.attention.layers import Groups
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.common.models.tokens.fewer_tokens import rows_needed, scores_given
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.gaze import GAZE, Gaze
from vlm_distill_cache.stage2_student.batches.signals import LossTerm, Requests, Seen
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.attention_targets import AttentionTarget
from vlm_distill_cache.stage2_student.losses.fed_tokens import (
    fed_shares,
    feeds_fewer,
    leaves_tokens_out,
    refuse_fewer_tokens,
)
from vlm_distill_cache.stage2_student.losses.fused import FusedLosses, fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss
from vlm_distill_cache.stage2_student.losses.terms import TERMS, choose_terms
from vlm_distill_cache.stage2_student.students.library import core_of
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.students.shards import all_reached, is_sharded


@dataclass(frozen=True, kw_only=True)
class Shares:
    """A micro-batch's part of each mean of its step; 1 when it is the whole step, else less, before any `times`.

    Attributes:
        rows: Of the supervised rows.
        terms: Of the rows or images that each term is a mean over; absent is 1.
    """

    rows: float = 1.0
    terms: Mapping[str, float] = field(default_factory=dict)

    def times(self, scale: float) -> "Shares":
        """The same, scaled by what somebody will divide losses by."""
        return Shares(rows=self.rows * scale, terms={name: share * scale for name, share in self.terms.items()})


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Losses of a micro-batch, each times the micro-batch's share; float32 scalars.

    Attributes:
        total: Weighted sum, the one to call ``backward`` on.
        terms: By name, unweighted: ``lm``, the cross-entropy in nats a row, and those of `TERMS` that have a weight.
        measures: What is reported beside the losses, without gradient, shared out as they are.
    """

    total: Tensor
    terms: Mapping[str, Tensor]
    measures: Mapping[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        """All by name, for the log, ``total`` first and measures last."""
        return {"total": self.total, **self.terms, **self.measures}


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What to compute.

    Attributes:
        groups: Student layers of each layer group, as many as the batch's; empty without attention.
        fits: What terms know of the cache and the student, by name, from `LossTerm.fit`.
    """

    losses: LossWeights
    groups: Groups = ()
    fits: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, model: nn.Module, capture: AttentionCapture | None, batch: TrainingBatch, shares: Shares
    ) -> Losses:
        """Run the student, wrapped or not, over a micro-batch on its device; `capture`: None without attention losses."""
        weights, fits = self.losses.active(), self.fits
        terms = choose_terms(weights)
        present = {name: term for name, term in terms.items() if name in batch.targets}
        requests = requests_of(present, batch, self.groups, fits)
        if feeds_fewer(model):
            refuse_fewer_tokens(present, "a student with fewer visual tokens")
        if fewer := leaves_tokens_out(model, batch.keys):
            # Which rows a mean is over is known when they are chosen.
            requests = {name: _of_all_rows(request) for name, request in requests.items()}
        whole = any(term.logits_at_images for term in present.values())
        supervised = batch.supervised()
        rows = (batch.inputs.labels != IGNORE_INDEX) | batch.inputs.visual_mask if whole else supervised  # [B, T]
        in_pass = next((name for name, term in present.items() if term.in_pass), None)
        # Nothing reaches the projector: backward needs a path to it, and DDP and FSDP a gradient of every parameter.
        unreached, sharded = torch.is_grad_enabled() and not batch.inputs.image_inputs, is_sharded(model)
        with (
            given_gaze(model, batch),
            all_reached(model) if unreached and sharded else nullcontext(),
            rows_needed(model, supervised),
            record(model, capture, requests) as (maps, states),
        ):
            teacher, weight = (None, 0.0) if in_pass is None else (batch.targets[in_pass], weights[in_pass])
            said = run_student(model, batch, rows, teacher, self.losses, weight=weight, whole=whole)
        fed = fed_shares(model, batch.keys) if fewer else None
        seen = Seen(batch, self.losses, maps, states, rows, said.row_logits, said.logits, fed)
        # A micro-batch without images: the log keeps its columns.
        nothing = torch.zeros_like(said.lm)
        values = {"lm": said.lm * shares.rows, **dict.fromkeys(terms, nothing)}
        measures = {n: nothing for name, term in terms.items() for n in term.measured(self.losses, fits.get(name))}
        total = said.total * shares.rows
        for name, term in present.items():
            share = shares.terms.get(name, 1.0)
            target = batch.targets[name]
            if fed is not None and isinstance(target, AttentionTarget):
                target = target.of_fed(fed[batch.has_image.to(fed.device)])
            loss, measured = term.value(seen, target, fits.get(name))
            values[name] = loss * share
            measures |= {measure: value * share for measure, value in measured.items()}
        for name, term in terms.items():
            if not term.in_pass:
                total = total + weights[name] * values[name]
        if unreached and not sharded:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    total = total + parameter.sum() * 0.0
        return Losses(total=total, terms=values, measures=measures)


def given_gaze(model: Any, batch: TrainingBatch) -> AbstractContextManager[Any]:
    """In the block the teacher's gaze chooses the student's visual tokens, where a batch holds it."""
    gaze: Gaze | None = batch.targets.get(GAZE)
    return nullcontext() if gaze is None else scores_given(core_of(model), gaze.of_batch(batch))


def _of_all_rows(request: AttentionRequest | HiddenRequest) -> AttentionRequest | HiddenRequest:
    return replace(request, row_weights=None) if isinstance(request, AttentionRequest) else request


def requests_of(
    terms: Mapping[str, LossTerm], batch: TrainingBatch, groups: Groups, fits: Mapping[str, Any] | None = None
) -> Requests:
    """What of the student some terms need recorded of a batch that has targets for them, by name of the request."""
    requests: dict[str, AttentionRequest | HiddenRequest] = {}
    for name, term in terms.items():
        requests |= term.requests(batch, batch.targets[name], groups, (fits or {}).get(name))

    def order(name: str) -> tuple[bool, bool]:
        """Rows of the text, then of images, then sums, which are taken of rows that were recorded before."""
        request = requests[name]
        weights = request.row_weights if isinstance(request, AttentionRequest) else None
        return weights is not None, request.rows is batch.keys

    return {name: requests[name] for name in sorted(requests, key=order)}


@contextmanager
def record(
    model: Any, capture: AttentionCapture | None, requests: Requests
) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """Record attention and hidden states of the student, wrapped or not, while it runs; only what is asked for."""
    looks = {name: request for name, request in requests.items() if isinstance(request, AttentionRequest)}
    states = {name: request for name, request in requests.items() if isinstance(request, HiddenRequest)}
    with ExitStack() as recording:
        maps = recording.enter_context(capture.record(looks)) if capture is not None and looks else {}
        hidden = HiddenCapture(getattr(model, "module", model).language_model) if states else None
        yield maps, {} if hidden is None else recording.enter_context(hidden.record(states))


def run_student(
    model: nn.Module,
    batch: TrainingBatch,
    rows: Tensor,
    teacher: SparseLogits | None,
    losses: LossWeights,
    *,
    weight: float,
    whole: bool,
) -> FusedLosses:
    """Run the student and compute the losses on supervised rows.

    Args:
        rows: Whose logits are needed, bool ``[B, T]``; supervised ones are among them.
        teacher: The teacher's logits of the supervised rows; None: cross-entropy alone.
        weight: Of the divergence from them.
        whole: Whether the rows' logits themselves are needed.
    """
    kind, temperature = losses.logit_kind, losses.temperature
    settings = None if whole else getattr(getattr(model, "module", model), "fused_settings", None)
    inputs = {**model_inputs_of(model, batch.inputs), "supervised": rows, "use_cache": False}
    if settings is not None:

        def on_rows(hidden: Tensor, head: nn.Linear) -> FusedLosses:
            return fused_losses(
                hidden,
                head.weight,
                batch.labels,
                teacher,
                bias=head.bias,
                lm_weight=losses.lm,
                logit_weight=weight,
                kind=kind,
                temperature=temperature,
                **settings,
            )

        found: FusedLosses = model(**inputs, on_rows=on_rows)
        return found
    row_logits = model(**inputs).logits
    logits = row_logits[(batch.inputs.labels != IGNORE_INDEX)[rows]] if whole else row_logits
    lm = lm_loss(logits, batch.labels)
    total, divergence = losses.lm * lm, None
    if teacher is not None:
        divergence = tail_bucket_loss(logits, teacher, kind=kind, temperature=temperature)
        total = total + weight * divergence
    return FusedLosses(total=total, lm=lm, logits=divergence, row_logits=row_logits)


def units_of(batch: TrainingBatch) -> tuple[int, ...]:
    """How much each loss of a batch is a mean over: supervised rows, then one number for each of `TERMS`."""
    targets = batch.targets
    return (batch.row_count, *(term.count(targets[name]) if name in targets else 0 for name, term in TERMS.items()))


def step_shares(batches: list[TrainingBatch], totals: Sequence[float]) -> list[Shares]:
    """The share of each of a process's micro-batches in its step.

    Args:
        totals: `units_of` batches, summed over the whole step.
    """
    shares = []
    for batch in batches:
        rows, *terms = (count / max(1.0, total) for count, total in zip(units_of(batch), totals, strict=True))
        shares.append(Shares(rows=rows, terms=dict(zip(TERMS, terms, strict=True))))
    return shares
