"""What the fused loss does with a few rows: project, exponentiate once, turn logits into gradients, multiply these in.

All chunks work in the same buffers. What stays is a gradient of each hidden state, and sums of the gradients
of weight and bias.

Dims: A supervised rows, C rows of a chunk, D width, V student vocabulary, K kept entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stage2_student.logit_losses import StudentRows, TeacherRows, diverge
from stage2_student.terms import LogitKind

PRODUCT_ELEMENTS = 2**22
"""Of a product in half precision before it is added to the weight's gradient; 2-3 times faster than all at once."""


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """How chunks are worked on.

    Attributes:
        kind: Of the divergence.
        temperature: Of the divergence.
        softcap: Bound of the logits, or None.
        logit_scale: Factor of the logits, before soft-capping.
        lm_weight: Of the sum of cross-entropies in the total.
        divergence_weight: Of the sum of divergences in it, with the factor of temperature.
        chunk_rows: Most rows of a chunk.
        dtype: Of the matrix products.
        needs: Whether gradients by hidden states, weight and bias are wanted.
    """

    kind: LogitKind
    temperature: float
    softcap: float | None
    logit_scale: float
    lm_weight: float
    divergence_weight: float
    chunk_rows: int
    dtype: torch.dtype
    needs: tuple[bool, bool, bool]


def buffer_bytes(dtype: torch.dtype, *, temperature: float, softcap: float | None) -> int:
    """Bytes that a chunk's buffers take for each of its logits.

    Args:
        dtype: Of the matrix products.
        temperature: Another one than 1 takes a second buffer of float32.
        softcap: If any, it takes another one.
    """
    buffers = 1 + (temperature != 1.0) + (softcap is not None)
    return 4 * buffers + (0 if dtype == torch.float32 else dtype.itemsize)


def all_chunks(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    teacher: TeacherRows | None,
    settings: ChunkSettings,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """Both losses of all rows and the gradients of their weighted sum, in one pass.

    Args:
        hidden: float `[A, D]`.
        weight: float `[V, D]`.
        bias: float `[V]` or None.
        labels: int64 `[A]`.
        teacher: Rows at the settings' temperature; None: cross-entropy alone.
        settings: See there.

    Returns:
        Sums of cross-entropy and divergence over rows, float32, unweighted; gradients of the total by hidden states,
        weight and bias, of their dtypes, None where not needed, and **before** the factor `logit_scale`.
    """
    sums = torch.zeros(2, device=hidden.device)
    gradients = _Gradients(hidden, weight, settings)
    projection = weight.to(settings.dtype)
    offset = None if bias is None else bias.to(settings.dtype)
    buffers = _Buffers(settings, weight.shape[0], hidden.device)
    for start in range(0, len(hidden), settings.chunk_rows):
        part = slice(start, start + settings.chunk_rows)
        inputs = hidden[part].to(settings.dtype)  # [C, D]
        buffers.project(inputs, projection, offset)
        buckets = None if teacher is None else _rows_of(teacher, part)
        sums += torch.stack(buffers.losses(labels[part], buckets))
        if any(settings.needs):
            gradients.add(part, buffers.gradient(len(inputs)), inputs, projection)
    del buffers  # the weight's gradient in a dtype of half precision comes beside the sum in float32
    return (sums[0], sums[1]), gradients.finished(weight, bias)


def _rows_of(teacher: TeacherRows, part: slice) -> TeacherRows:
    return TeacherRows(teacher.slots[part], teacher.log_probs[part], teacher.log_tail[part])


class _Gradients:
    """Gradients of the total, those by weight and bias summed over chunks in float32; None where not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, settings: ChunkSettings) -> None:
        needs_hidden, self.needs_weight, needs_bias = settings.needs
        device = hidden.device
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight: Tensor | None = None
        self.bias = torch.zeros(weight.shape[0], device=device) if needs_bias else None
        self.is_one_chunk = len(hidden) <= settings.chunk_rows

    def add(self, part: slice, logits: Tensor, inputs: Tensor, projection: Tensor) -> None:
        """Add a chunk, from its gradient by the logits, `[C, V]`."""
        if self.hidden is not None:
            self.hidden[part] = logits @ projection
        if self.bias is not None:
            self.bias += logits.sum(dim=0, dtype=torch.float32)
        if not self.needs_weight:
            return
        if self.is_one_chunk:
            self.weight = logits.t() @ inputs
        elif self.weight is None:
            self.weight = torch.empty(projection.shape, device=projection.device)
            _add_product(self.weight, logits, inputs, is_first=True)
        else:
            _add_product(self.weight, logits, inputs)

    def finished(
        self, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """By hidden states, weight and bias, of their dtypes: rounded once."""
        of_weight = None
        if self.needs_weight:
            of_weight = torch.zeros_like(weight) if self.weight is None else self.weight.to(weight.dtype)
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, of_weight, of_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, is_first: bool = False) -> None:
    """Add `left.T @ right` to a float32 `[V, D]`, or write it there if it is the first.

    A product in half precision comes in pieces, and is added while still in the processor's cache.
    """
    if left.dtype == total.dtype:
        total.addmm_(left.t(), right, beta=0 if is_first else 1)
        return
    tokens = max(1, PRODUCT_ELEMENTS // total.shape[1])
    for some, columns in zip(total.split(tokens), left.split(tokens, dim=1), strict=True):
        product = columns.t() @ right
        if is_first:
            some.copy_(product)
        else:
            some.add_(product)


class _Buffers:
    """Memory that all chunks work in; the methods are called in their order, once a chunk."""

    def __init__(self, settings: ChunkSettings, vocabulary: int, device: torch.device) -> None:
        self.settings = settings
        self.learns = any(settings.needs)
        rows = settings.chunk_rows

        def make(wanted: bool) -> Tensor | None:
            # One column more, where entries without a token may be written.
            return torch.empty(rows, vocabulary + 1, device=device) if wanted else None

        self.logits = torch.empty(rows, vocabulary + 1, device=device)
        self.scaled = make(settings.temperature != 1.0)
        self.slope = make(settings.softcap is not None and self.learns)
        half = settings.dtype != torch.float32
        self.products = torch.empty(rows, vocabulary, device=device, dtype=settings.dtype) if half else None

    def project(self, inputs: Tensor, projection: Tensor, offset: Tensor | None) -> None:
        """Write a chunk's logits in float32, and -inf in the last column."""
        rows, settings = len(inputs), self.settings
        tokens = self.logits[:rows, :-1]
        out = tokens if self.products is None else self.products[:rows]
        if offset is None:
            torch.mm(inputs, projection.t(), out=out)
        else:
            torch.addmm(offset, inputs, projection.t(), out=out)
        if self.products is not None:
            tokens.copy_(out)
        if settings.logit_scale != 1.0:
            tokens.mul_(settings.logit_scale)
        if settings.softcap is not None:
            tokens.div_(settings.softcap).tanh_()
            if self.slope is not None:
                torch.square(tokens, out=self.slope[:rows, :-1]).neg_().add_(1.0)
            tokens.mul_(settings.softcap)
        self.logits[:rows, -1] = -torch.inf

    def losses(self, labels: Tensor, teacher: TeacherRows | None) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and divergence; the logits become the gradient of the total."""
        settings = self.settings
        logits = self.logits[: len(labels)]
        lm_weight, divergence_weight = settings.lm_weight, settings.divergence_weight

        def descend(rows: Tensor, buckets: TeacherRows | None, *weights: float) -> tuple[Tensor, Tensor]:
            return losses_in_place(
                rows, labels, buckets, kind=settings.kind, weights=weights, wants_gradient=self.learns
            )

        if teacher is None or self.scaled is None:
            return descend(logits, teacher, lm_weight, divergence_weight)
        # At another temperature the two losses have different exponentials.
        scaled = torch.div(logits, settings.temperature, out=self.scaled[: len(labels)])
        lm, _ = descend(logits, None, lm_weight, 0.0)
        _, divergence = descend(scaled, teacher, 0.0, divergence_weight)
        if self.learns:
            logits.add_(scaled, alpha=1.0 / settings.temperature)
        return lm, divergence

    def gradient(self, rows: int) -> Tensor:
        """What `losses` left, `[C, V]` in the dtype of the matrix products; before the factor of `logit_scale`."""
        gradient = self.logits[:rows, :-1]
        if self.slope is not None:
            gradient.mul_(self.slope[:rows, :-1])
        return gradient if self.products is None else self.products[:rows].copy_(gradient)


def losses_in_place(
    logits: Tensor,
    labels: Tensor,
    teacher: TeacherRows | None,
    *,
    kind: LogitKind,
    weights: Sequence[float],
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of both losses at one temperature; with `wants_gradient` the logits become their weighted gradient.

    The whole vocabulary is exponentiated once, against the largest logit outside the listed tokens. Softmax there
    is all that both gradients need of it, and the mass of all others is exact however small.

    Args:
        logits: float32 `[C, V + 1]`, the last column -inf; **overwritten**, the last column with anything.
        labels: int64 `[C]`.
        teacher: Rows at the temperature of `logits`; None: cross-entropy alone.
        kind: Of the divergence.
        weights: Of cross-entropy and divergence in the gradient.
        wants_gradient: False: `logits` are left as anything.

    Returns:
        Float32 scalars in nats, cross-entropy and divergence; the latter 0 without a teacher.
    """
    lm_weight, divergence_weight = weights
    at_label = logits.gather(1, labels[:, None])  # [C, 1]
    slots = labels.new_empty((len(labels), 0)) if teacher is None else teacher.slots  # [C, K]
    listed = logits.gather(1, slots)
    logits.scatter_(1, slots, -torch.inf)
    top = logits.amax(dim=1)  # [C], -inf if all of the student's tokens are listed
    top = torch.where(top > -torch.inf, top, 0.0)
    mass = logits.sub_(top[:, None]).exp_().sum(dim=1)  # [C], of the tail, at least 1 or none at all
    tail = top + mass.log()
    normaliser = torch.logsumexp(torch.cat([listed, tail[:, None]], dim=1), dim=1)  # [C]
    student = StudentRows(listed - normaliser[:, None], tail - normaliser, tail)
    lm = (normaliser - at_label[:, 0]).sum()
    on_slots = lm_weight * student.log_probs.exp()
    in_tail = lm_weight * student.log_tail.exp()
    divergence = torch.zeros_like(lm)
    if teacher is not None:
        found = diverge(teacher, student, kind)
        divergence = found.value.sum()
        pull = found.slots.sum(dim=1) + found.tail  # [C]
        on_slots += divergence_weight * (found.slots - student.log_probs.exp() * pull[:, None])
        in_tail += divergence_weight * (found.tail - student.log_tail.exp() * pull)
    if wants_gradient:
        logits.mul_((in_tail / mass.clamp_min(1.0))[:, None]).scatter_(1, slots, on_slots)
        logits.scatter_add_(1, labels[:, None], torch.full_like(at_label, -lm_weight))
    return lm, divergence
