"""The losses on supervised rows, cross-entropy and logit distillation, of one forward pass of the student.

Where the output projection is a plain linear layer the pass never holds the rows' logits: they become losses and
gradients chunk by chunk (``fused``), inside the pass. Otherwise, or where visual tokens need logits too, it does.

Dims: A supervised rows, D width, V vocabulary, B batch, T sequence.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.logits import SparseLogits
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.loss_weights import LogitKind
from vlm_distill_cache.stage2_student.losses.fused import FusedLosses, fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss
from vlm_distill_cache.stage2_student.students.model import model_inputs_of


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """Means over supervised rows, float32 scalars.

    Attributes:
        total: Weighted sum of both, with a graph.
        lm: Cross-entropy, unweighted.
        divergence: From the teacher, unweighted; None without a teacher.
        row_logits: Logits of all rows that were asked for, float ``[rows, V]``; None if they were never held.
    """

    total: Tensor
    lm: Tensor
    divergence: Tensor | None
    row_logits: Tensor | None


def run_student(
    model: nn.Module,
    batch: TrainingBatch,
    rows: Tensor,
    teacher: SparseLogits | None,
    *,
    weights: tuple[float, float],
    kind: LogitKind,
    temperature: float,
    whole: bool,
) -> RowLosses:
    """Run the student and compute the losses on supervised rows.

    Args:
        model: The student, wrapped or not.
        batch: On the model's device.
        rows: Whose logits are needed, bool ``[B, T]``; supervised ones are among them.
        teacher: The teacher's logits of the supervised rows; None: cross-entropy alone.
        weights: Of cross-entropy and divergence.
        kind: Of the divergence.
        temperature: Of the divergence.
        whole: Whether the rows' logits themselves are needed.
    """
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
                lm_weight=weights[0],
                logit_weight=weights[1],
                kind=kind,
                temperature=temperature,
                **settings,
            )

        found: FusedLosses = model(**inputs, on_rows=on_rows)
        return RowLosses(total=found.total, lm=found.lm, divergence=found.logits, row_logits=None)
    row_logits = model(**inputs).logits
    logits = row_logits[(batch.inputs.labels != IGNORE_INDEX)[rows]] if whole else row_logits
    lm = lm_loss(logits, batch.labels)
    total, divergence = weights[0] * lm, None
    if teacher is not None:
        divergence = tail_bucket_loss(logits, teacher, kind=kind, temperature=temperature)
        total = total + weights[1] * divergence
    return RowLosses(total=total, lm=lm, divergence=divergence, row_logits=row_logits)
