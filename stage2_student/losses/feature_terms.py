"""The losses on logits and hidden states as terms.

Hidden states at visual tokens are averaged over the common cells of both sides, as attention queries are; logits
of visual tokens cannot be averaged without their tails, so they need equal tokens.

Dims: N_t teacher and N_s student visual tokens, C common cells, R rows of a term, M most visual tokens of a sample, S
layers, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import pool_queries
from vlm_distill_cache.common.attention.hidden import HiddenRequest, student_layers
from vlm_distill_cache.common.attention.layers import Groups
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.grid import meet_alone, meetings
from vlm_distill_cache.stage2_student.batches.signals import LossTerm, Requests, Seen, Sides, StudentSizes, Value
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.features import hidden_loss
from vlm_distill_cache.stage2_student.losses.logits import tail_bucket_loss

Layers = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LogitTerm(LossTerm):
    """Divergence from the teacher's logits on supervised rows."""

    needs_boxes: ClassVar[bool] = False
    in_pass: ClassVar[bool] = True
    tempered: ClassVar[bool] = True

    def target(self, sides: Sides) -> SparseLogits:
        """The teacher's rows."""
        rows: SparseLogits = sides.decode(self.reads[0])
        return rows

    def collate(self, targets: Sequence[SparseLogits], places: Sequence[int]) -> SparseLogits:
        """Rows of all samples one after the other."""
        return SparseLogits.cat(list(targets))

    def count(self, target: SparseLogits) -> int:
        """Supervised rows."""
        return len(target)

    def value(self, seen: Seen, target: SparseLogits, fit: Any) -> Value:
        """What `objective.run_student` found."""
        assert seen.divergence is not None
        return seen.divergence, {}


@dataclass(frozen=True)
class RowsTarget:
    """The teacher's side of rows: of one sample, or of a batch, one sample after the other.

    Attributes:
        teacher: Hidden states, float32 ``[R, S, D]``, at visual tokens of cells that carry image; or logits.
        student_pool: Weights by which a sample's visual tokens are averaged to the same cells, rows summing to one,
            float32 ``[R, N_s or M]``; None where rows meet one to one.
        row_counts: Of a batch: rows of each sample that has any part in it.
        samples: Of a batch: positions of these samples.
        blocks: Of a sample with several pictures: for each the number of rows and the first of its visual tokens, which the
            columns of ``student_pool`` count from; of a batch, for each picture also its sample's position in front.
    """

    teacher: Any
    student_pool: Tensor | None = None
    row_counts: tuple[int, ...] = ()
    samples: tuple[int, ...] = ()
    blocks: tuple[tuple[int, ...], ...] = ()

    @property
    def count(self) -> int:
        """What the loss is a mean over."""
        return sum(self.row_counts)


@dataclass(frozen=True, kw_only=True)
class RowsTerm(LossTerm):
    """What the losses on rows of hidden states or logits share."""

    def collate(self, targets: Sequence[RowsTarget], places: Sequence[int]) -> RowsTarget:
        """Rows of all samples one after the other."""
        parts: list[Any] = [target.teacher for target in targets]
        pools = [target.student_pool for target in targets if target.student_pool is not None]
        widest = max((pool.shape[1] for pool in pools), default=0)
        return RowsTarget(
            teacher=torch.cat(parts) if isinstance(parts[0], Tensor) else SparseLogits.cat(parts),
            student_pool=torch.cat([F.pad(pool, (0, widest - pool.shape[1])) for pool in pools]) if pools else None,
            row_counts=tuple(len(part) for part in parts),
            samples=tuple(places),
            blocks=tuple(
                (place, *block)
                for place, target in zip(places, targets, strict=True)
                for block in target.blocks or ((len(target.teacher), 0),)
            ),
        )


@dataclass(frozen=True, kw_only=True)
class VisualLogitTerm(RowsTerm):
    """Divergence from the teacher's logits at visual tokens."""

    logits_at_images: ClassVar[bool] = True
    tempered: ClassVar[bool] = True

    def target(self, sides: Sides) -> RowsTarget:
        """The teacher's rows of visual tokens, for a student with the same ones."""
        (signal,) = self.reads
        rows = sides.decode(signal)
        sides.check_tokens(signal, len(rows))
        teachers, students = (
            [(tile.rows, tile.cols) for tile in tiles] for tiles in (sides.teacher_tiles, sides.student_tiles)
        )
        seen = [[tile.span for tile in tiles] for tiles in (sides.teacher_tiles, sides.student_tiles)]
        others = "" if seen[0] == seen[1] else ", of other pictures or frames"
        if teachers != students or others:
            raise CacheMismatchError(
                f"{sides.where}: {signal} need equal visual tokens; the teacher's are {teachers} (rows, columns of each "
                f"tile), the student's {students}{others}. Use a student with the teacher's visual tokens (projector=mlp), or "
                f"set PHASE.losses.{signal}=0 (PHASE: dpt, dft or sft); {VisualHiddenCodec.signal} with "
                "hidden_kind=relation meets other tokens"
            )
        return RowsTarget(rows)

    def value(self, seen: Seen, target: RowsTarget, fit: Any) -> Value:
        """`tail_bucket_loss` at the visual tokens of the samples that have a teacher's."""
        assert seen.logits is not None
        chosen = torch.zeros_like(seen.rows)
        chosen[list(target.samples)] = seen.batch.inputs.visual_mask[list(target.samples)]
        logits = seen.logits[chosen[seen.rows]]
        loss = tail_bucket_loss(
            logits, target.teacher, kind=seen.losses.logit_kind, temperature=seen.losses.temperature
        )
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class HiddenTerm(RowsTerm):
    """Hidden states, at supervised rows or `at_images`; its `fit` is the student's layers that meet the cached ones."""

    def fit(self, plan: Plan, losses: LossWeights, student: StudentSizes, where: str) -> Layers:
        """The student's hidden states that meet those of the cache; refuses another width where the kind needs equal ones."""
        (signal,) = self.reads
        codec = codec_from_dict(plan.signals[signal])
        assert isinstance(codec, HiddenCodec)
        if losses.hidden_kind != "relation" and codec.width != student.width:
            raise CacheMismatchError(
                f"{where}: {signal} holds hidden states of width {codec.width}, the student has width {student.width}: "
                f"hidden_kind={losses.hidden_kind} needs equal widths. Set PHASE.losses.hidden_kind=relation "
                "(PHASE: dpt, dft or sft), or use a student of the teacher's width (a pruned one keeps it)"
            )
        depth = plan.stated("teacher.layers", where)
        return student_layers(
            codec.layers, teacher_depth=depth, student_depth=student.depth, kept=student.kept_layers(depth)
        )

    def target(self, sides: Sides) -> RowsTarget:
        """The teacher's states, those of visual tokens on the common cells that carry image."""
        (signal,) = self.reads
        if not self.at_images:
            return RowsTarget(sides.decode(signal))
        states = sides.decode(signal)  # [N_t, S, D]
        sides.check_tokens(signal, len(states))
        found, pools, blocks = [], [], []
        for part in meetings(sides.teacher_tiles, sides.student_tiles):
            if not (part.teacher and part.student):
                continue
            grid = meet_alone(part.teacher, part.student)
            own = states[slice(*part.teacher_tokens)]
            pooled = pool_queries(own.flatten(1), grid.teacher_pool)  # [C, S * D]
            touched = grid.content & (grid.teacher_pool.sum(dim=0) > 0) & (grid.student_pool.sum(dim=0) > 0)
            weights = grid.student_pool.T[touched]  # [C', N_s]
            found.append(pooled[touched].unflatten(1, states.shape[1:]))
            pools.append(weights / weights.sum(dim=1, keepdim=True))
            blocks.append((len(weights), part.student_tokens[0]))
        if len(found) == 1:
            return RowsTarget(found[0], student_pool=pools[0])
        widest = max(pool.shape[1] for pool in pools)
        padded = [F.pad(pool, (0, widest - pool.shape[1])) for pool in pools]
        return RowsTarget(torch.cat(found), student_pool=torch.cat(padded), blocks=tuple(blocks))

    def requests(self, batch: TrainingBatch, target: RowsTarget, groups: Groups, fit: Layers) -> Requests:
        """The wanted layers at supervised rows or visual tokens."""
        # Of a shallow student one layer may meet several of the teacher's.
        layers = tuple(dict.fromkeys(fit))
        return {self.reads[0]: HiddenRequest(batch.keys if self.at_images else batch.rows, layers)}

    def value(self, seen: Seen, target: RowsTarget, fit: Layers) -> Value:
        """`hidden_loss`, a mean over rows and layers."""
        place = {layer: index for index, layer in enumerate(dict.fromkeys(fit))}
        states = seen.hidden[self.reads[0]][:, :, [place[layer] for layer in fit]]  # [B, R or M, S, D]
        if target.student_pool is None:
            places = (seen.batch.rows >= 0).nonzero(as_tuple=True)  # on the CPU: nothing waits
            rows = states[tuple(place.to(states.device, non_blocking=True) for place in places)]
        else:
            rows = _pool_tokens(states, target.student_pool, target)
        return hidden_loss(rows, target.teacher, kind=seen.losses.hidden_kind, row_counts=target.row_counts), {}


def _pool_tokens(states: Tensor, pool: Tensor, target: RowsTarget) -> Tensor:
    """The student's states ``[B, M, S, D]`` on the common cells of each sample, ``[R, S, D]``."""
    pooled = []
    rows = [count for _, count, _ in target.blocks]
    for (place, _, first), weights in zip(target.blocks, pool.split(rows), strict=True):
        tokens = states[place][first : first + weights.shape[1]].float()  # [M, S, D]
        pooled.append((weights[:, : len(tokens)] @ tokens.flatten(1)).unflatten(1, tokens.shape[1:]))
    return torch.cat(pooled)
