"""What the fused loss does with a few rows: project, exponentiate once, turn logits into gradients, multiply these in.

All chunks work in the same buffers. What stays is a gradient of each hidden state, and the gradients of weight and
bias. In float32 the weight's is a sum over chunks. In a dtype of half precision such a sum, in float32, would be twice
as large as the gradient itself: if there are several chunks, a second pass goes over blocks of the vocabulary, with the
logits of all rows projected once more, and each block of the gradient is one product over all rows, rounded once.

Dims: A supervised rows, C rows of a chunk, B tokens of a block, D width, V student vocabulary, K kept entries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_distill_cache.stage2_student.loss_weights import LogitKind
from vlm_distill_cache.stage2_student.losses.logits import StudentRows, TeacherRows, diverge


@dataclass(frozen=True, kw_only=True)
class ChunkSettings:
    """How chunks are worked on.

    Attributes:
        lm_weight: Of the sum of cross-entropies in the total.
        divergence_weight: Of the sum of divergences in it, with the factor of temperature.
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
    """Bytes that a chunk's buffers take for each of its logits."""
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
        teacher: Rows at the settings' temperature; None: cross-entropy alone.

    Returns:
        Sums of cross-entropy and divergence over rows, float32, unweighted; gradients of the total by hidden states,
        weight and bias, of their dtypes, None where not needed, and **before** the factor `logit_scale`.
    """
    sums = torch.zeros(2, device=hidden.device)
    gradients = _Gradients(hidden, weight, settings)
    projection = weight.to(settings.dtype)
    offset = None if bias is None else bias.to(settings.dtype)
    buffers = _Buffers(settings, settings.chunk_rows, weight.shape[0], hidden.device)
    slopes: list[tuple[RowSlopes, ...]] = []
    for start in range(0, len(hidden), settings.chunk_rows):
        part = slice(start, start + settings.chunk_rows)
        inputs = hidden[part].to(settings.dtype)  # [C, D]
        buffers.project(inputs, projection, offset)
        found, of_chunk = buffers.losses(labels[part], None if teacher is None else _rows_of(teacher, part))
        sums += torch.stack(found)
        if any(settings.needs):
            gradients.add(part, buffers.gradient(of_chunk), inputs, projection)
            slopes.append(of_chunk)
    del buffers
    if gradients.by_blocks and slopes:
        together = tuple(RowSlopes.cat(parts) for parts in zip(*slopes, strict=True))
        gradients.add_blocks(hidden.to(settings.dtype), projection, offset, together, settings)
    return (sums[0], sums[1]), gradients.finished(weight, bias)


def _rows_of(teacher: TeacherRows, part: slice) -> TeacherRows:
    return TeacherRows(teacher.slots[part], teacher.log_probs[part], teacher.log_tail[part])


@dataclass(frozen=True, kw_only=True)
class RowSlopes:
    """What turns exponentials of some rows' logits into the gradient of their losses at one temperature.

    Attributes:
        top: float32 `[C]`, what is taken from a logit before it is exponentiated.
        factor: float32 `[C]`, of the exponentials outside `slots`.
        slots: int64 `[C, K]`, listed tokens.
        on_slots: float32 `[C, K]`, the gradient there.
        label_weight: What is taken off at the label.
    """

    top: Tensor
    factor: Tensor
    slots: Tensor
    on_slots: Tensor
    labels: Tensor
    label_weight: float

    @classmethod
    def cat(cls, parts: Sequence["RowSlopes"]) -> "RowSlopes":
        """Of all rows of some chunks."""

        def join(name: str) -> Tensor:
            return torch.cat([getattr(part, name) for part in parts])

        tensors = {name: join(name) for name in ("top", "factor", "slots", "on_slots", "labels")}
        return cls(**tensors, label_weight=parts[0].label_weight)

    def turn(self, exponentials: Tensor, start: int = 0) -> None:
        """Make exponentials of a block of the vocabulary the gradient, in place.

        Args:
            exponentials: float32 `[C, B + 1]` of tokens `start` to `start + B`; anything at `slots`, which are
                written, and in the last column, where whatever lies outside the block goes.
        """
        spare = exponentials.shape[1] - 1

        def place(tokens: Tensor) -> Tensor:
            inside = tokens - start
            return torch.where((inside >= 0) & (inside < spare), inside, spare)

        exponentials.mul_(self.factor[:, None]).scatter_(1, place(self.slots), self.on_slots)
        off = torch.full_like(self.top, -self.label_weight)
        exponentials.scatter_add_(1, place(self.labels)[:, None], off[:, None])


class _Gradients:
    """Gradients of the total; None where not needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, settings: ChunkSettings) -> None:
        needs_hidden, self.needs_weight, needs_bias = settings.needs
        device = hidden.device
        self.hidden = torch.empty_like(hidden) if needs_hidden else None
        self.weight: Tensor | None = None
        self.bias = torch.zeros(weight.shape[0], device=device) if needs_bias else None
        several = len(hidden) > settings.chunk_rows
        self.by_blocks = self.needs_weight and several and settings.dtype.itemsize < torch.float32.itemsize
        if self.by_blocks:
            self.weight = torch.empty_like(weight)

    def add(self, part: slice, logits: Tensor, inputs: Tensor, projection: Tensor) -> None:
        """Add a chunk, from its gradient by the logits, `[C, V]`."""
        if self.hidden is not None:
            self.hidden[part] = logits @ projection
        if self.bias is not None:
            self.bias += logits.sum(dim=0, dtype=torch.float32)
        if not self.needs_weight or self.by_blocks:
            return
        if self.weight is None:
            self.weight = logits.t() @ inputs
        else:
            self.weight.addmm_(logits.t(), inputs)

    def add_blocks(
        self,
        inputs: Tensor,
        projection: Tensor,
        offset: Tensor | None,
        slopes: Sequence[RowSlopes],
        settings: ChunkSettings,
    ) -> None:
        """The weight's gradient from all rows, `[A, D]`, a block of the vocabulary at a time."""
        assert self.weight is not None
        rows, vocabulary = len(inputs), len(projection)
        blocks = math.ceil(rows / settings.chunk_rows)  # of as many logits as a chunk
        tokens = math.ceil(vocabulary / blocks)
        buffers = _Buffers(settings, rows, tokens, inputs.device)
        for start in range(0, vocabulary, tokens):
            block = slice(start, start + tokens)
            buffers.project(inputs, projection[block], None if offset is None else offset[block])
            buffers.exponentiate(slopes)
            self.weight[block] = buffers.gradient(slopes, start).t() @ inputs

    def finished(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """By hidden states, weight and bias, of their dtypes: rounded once."""
        of_weight = None
        if self.needs_weight:
            of_weight = torch.zeros_like(weight) if self.weight is None else self.weight.to(weight.dtype)
        of_bias = None if self.bias is None or bias is None else self.bias.to(bias.dtype)
        return self.hidden, of_weight, of_bias


class _Buffers:
    """Memory that all chunks, or all blocks, work in; the methods are called in their order, once for each."""

    def __init__(self, settings: ChunkSettings, rows: int, tokens: int, device: torch.device) -> None:
        self.settings = settings
        self.learns = any(settings.needs)
        self.size = (rows, tokens)

        def make(wanted: bool) -> Tensor | None:
            # One column more, where entries without a token may be written.
            return torch.empty(rows, tokens + 1, device=device) if wanted else None

        self.logits = torch.empty(rows, tokens + 1, device=device)
        self.scaled = make(settings.temperature != 1.0)
        self.slope = make(settings.softcap is not None and self.learns)
        half = settings.dtype != torch.float32
        self.products = torch.empty(rows, tokens, device=device, dtype=settings.dtype) if half else None

    def project(self, inputs: Tensor, projection: Tensor, offset: Tensor | None) -> None:
        """Write logits in float32, `[C, V]` or `[A, B]`, and -inf in the column after them."""
        settings = self.settings
        rows, width = self.size = (len(inputs), len(projection))
        tokens = self.logits[:rows, :width]
        out = tokens if self.products is None else self.products[:rows, :width]
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
                torch.square(tokens, out=self.slope[:rows, :width]).neg_().add_(1.0)
            tokens.mul_(settings.softcap)
        self.logits[:rows, width] = -torch.inf

    def _at_temperatures(self) -> list[Tensor]:
        """The logits, and beside them those divided by the temperature if it is another one than 1."""
        rows, width = self.size
        logits = self.logits[:rows, : width + 1]
        if self.scaled is None:
            return [logits]
        return [logits, self.scaled[:rows, : width + 1]]

    def _scale(self) -> list[Tensor]:
        views = self._at_temperatures()
        if len(views) == 2:
            torch.div(views[0], self.settings.temperature, out=views[1])
        return views

    def losses(
        self, labels: Tensor, teacher: TeacherRows | None
    ) -> tuple[tuple[Tensor, Tensor], tuple[RowSlopes, ...]]:
        """Sums of cross-entropy and divergence, and slopes by temperature; the logits become exponentials."""
        settings = self.settings
        lm_weight, divergence_weight = settings.lm_weight, settings.divergence_weight

        def descend(rows: Tensor, buckets: TeacherRows | None, *weights: float) -> tuple[Tensor, Tensor, RowSlopes]:
            return losses_in_place(rows, labels, buckets, kind=settings.kind, weights=weights)

        if teacher is None or self.scaled is None:
            lm, divergence, slopes = descend(self._at_temperatures()[0], teacher, lm_weight, divergence_weight)
            return (lm, divergence), (slopes,)
        # At another temperature the two losses have different exponentials.
        logits, scaled = self._scale()
        lm, _, of_lm = descend(logits, None, lm_weight, 0.0)
        _, divergence, of_teacher = descend(scaled, teacher, 0.0, divergence_weight)
        return (lm, divergence), (of_lm, of_teacher)

    def exponentiate(self, slopes: Sequence[RowSlopes]) -> None:
        """What `losses` does with the logits, given what it found."""
        for logits, slope in zip(self._scale(), slopes, strict=False):
            logits.sub_(slope.top[:, None]).exp_()

    def gradient(self, slopes: Sequence[RowSlopes], start: int = 0) -> Tensor:
        """By the logits, `[C, V]` or `[A, B]`, in the dtype of the matrix products; before the factor of `logit_scale`."""
        rows, width = self.size
        views = self._at_temperatures()
        for exponentials, slope in zip(views, slopes, strict=False):
            slope.turn(exponentials, start)
        if len(slopes) == 2:
            views[0].add_(views[1], alpha=1.0 / self.settings.temperature)
        gradient = self.logits[:rows, :width]
        if self.slope is not None:
            gradient.mul_(self.slope[:rows, :width])
        return gradient if self.products is None else self.products[:rows, :width].copy_(gradient)


def losses_in_place(
    logits: Tensor, labels: Tensor, teacher: TeacherRows | None, *, kind: LogitKind, weights: Sequence[float]
) -> tuple[Tensor, Tensor, RowSlopes]:
    """Sums of both losses at one temperature, and what makes their weighted gradient.

    The whole vocabulary is exponentiated once, against the largest logit outside the listed tokens. Softmax there
    is all that both gradients need of it, and the mass of all others is exact however small.

    Args:
        logits: float32 `[C, V + 1]`, the last column -inf; **overwritten** with exponentials for `RowSlopes.turn`.
        weights: Of cross-entropy and divergence in the gradient.

    Returns:
        Float32 scalars in nats, cross-entropy and divergence, the latter 0 without a teacher; the slopes.
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
    factor = in_tail / mass.clamp_min(1.0)
    slopes = RowSlopes(top=top, factor=factor, slots=slots, on_slots=on_slots, labels=labels, label_weight=lm_weight)
    return lm, divergence, slopes
