"""The teacher's hidden states and visual logits as a student's batch meets them.

Hidden states at visual tokens are averaged over the common cells of both sides, as attention queries are; logits
of visual tokens cannot be averaged without their tails, so they need equal tokens.

Dims: A supervised rows, N_t teacher and N_s student visual tokens, C common cells, S layers, D width, M most visual
tokens of a sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import Tile, pool_queries
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.live import SparseLogits, as_tensors
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.grid import meet
from vlm_distill_cache.stage2_student.loss_weights import FEATURE_TERMS


@dataclass(frozen=True)
class FeatureTarget:
    """One feature signal of one sample.

    Attributes:
        teacher: Hidden states, float32 ``[A, S, D]`` or, of cells that carry image, ``[C, S, D]``; None for logits.
        logits: The teacher's logits of visual tokens; None for hidden states.
        student_pool: Weights by which the student's visual tokens are averaged to the same cells, rows summing to
            one, float32 ``[C, N_s]``; None where rows meet one to one.
    """

    teacher: Tensor | None
    logits: SparseLogits | None = None
    student_pool: Tensor | None = None


def decode_features(
    record: Record,
    codecs: Mapping[str, Any],
    teacher_tiles: tuple[Tile, ...],
    student_tiles: tuple[Tile, ...],
    *,
    where: str,
) -> dict[str, FeatureTarget]:
    """Decode the wanted feature signals of one record; those of visual tokens only with an image on both sides.

    Args:
        record: The sample's.
        codecs: Codec of each wanted signal, of any sort.
        teacher_tiles: The teacher's visual tokens.
        student_tiles: The student's.
        where: Sample and cache, for errors.

    Raises:
        CacheMismatchError: If logits of visual tokens are wanted by a student with other visual tokens, or the
            record's tiles and features differ in number.
    """
    targets: dict[str, FeatureTarget] = {}
    for term in FEATURE_TERMS:
        if term not in codecs:
            continue
        if term == "hidden":
            targets[term] = FeatureTarget(as_tensors(codecs[term].decode(record)))
        elif teacher_tiles and student_tiles:
            decoded = as_tensors(codecs[term].decode(record))
            count = sum(tile.token_count for tile in teacher_tiles)
            if len(decoded) != count:
                raise CacheMismatchError(
                    f"{where}: {term} covers {len(decoded)} visual tokens, the record's tiles {count}; run "
                    "`cachectl verify --deep` on the cache, then build the damaged shard again"
                )
            if term == "visual_logits":
                targets[term] = FeatureTarget(None, _same_tokens(decoded, teacher_tiles, student_tiles, where))
            else:
                targets[term] = _pooled(decoded, teacher_tiles, student_tiles)
    return targets


def _same_tokens(
    logits: SparseLogits, teacher: tuple[Tile, ...], student: tuple[Tile, ...], where: str
) -> SparseLogits:
    layouts = [[(tile.rows, tile.cols) for tile in tiles] for tiles in (teacher, student)]
    if layouts[0] != layouts[1]:
        raise CacheMismatchError(
            f"{where}: visual_logits need equal visual tokens; the teacher's are {layouts[0]} (rows, columns of each "
            f"tile), the student's {layouts[1]}. Use a student with the teacher's visual tokens (projector=mlp), or "
            "set PHASE.losses.visual_logits=0 (PHASE: dpt, dft or sft); visual_hidden with hidden_kind=relation meets other tokens"
        )
    return logits


def _pooled(states: Tensor, teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> FeatureTarget:
    """Hidden states ``[N_t, S, D]`` and the student's weights on the common cells that carry image."""
    grid = meet(teacher, student)
    pooled = pool_queries(states.flatten(1), grid.teacher_pool)  # [C, S * D]
    touched = grid.content & (grid.teacher_pool.sum(dim=0) > 0) & (grid.student_pool.sum(dim=0) > 0)
    weights = grid.student_pool.T[touched]  # [C', N_s]
    return FeatureTarget(
        pooled[touched].unflatten(1, states.shape[1:]),
        student_pool=weights / weights.sum(dim=1, keepdim=True),
    )


@dataclass(frozen=True)
class FeatureBatch:
    """One feature signal of a batch; rows of all samples one after the other, in batch order.

    Attributes:
        teacher: float32 ``[R, S, D]``; None for logits.
        logits: Of visual tokens; None for hidden states.
        student_pool: float32 ``[R, M]``, of each row over its sample's visual tokens; None where rows meet one to one.
        row_counts: Rows of each sample that has any part in it.
        samples: Positions in the batch of these samples.
    """

    teacher: Tensor | None
    logits: SparseLogits | None
    student_pool: Tensor | None
    row_counts: tuple[int, ...]
    samples: tuple[int, ...]

    @property
    def count(self) -> int:
        """What the loss is a mean over."""
        return sum(self.row_counts)


def collate_features(features: Sequence[Mapping[str, FeatureTarget]]) -> dict[str, FeatureBatch]:
    """Join the samples' feature signals; a signal that no sample has is left out.

    Args:
        features: Of each sample, in batch order.
    """
    batches: dict[str, FeatureBatch] = {}
    for term in FEATURE_TERMS:
        held = [(place, found[term]) for place, found in enumerate(features) if term in found]
        if not held:
            continue
        states = [target.teacher for _, target in held if target.teacher is not None]
        logits = [target.logits for _, target in held if target.logits is not None]
        pools = [target.student_pool for _, target in held if target.student_pool is not None]
        widest = max((pool.shape[1] for pool in pools), default=0)
        counts = [len(part) for part in (states or logits)]
        batches[term] = FeatureBatch(
            teacher=torch.cat(states) if states else None,
            logits=SparseLogits.cat(logits) if logits else None,
            student_pool=torch.cat([torch.nn.functional.pad(pool, (0, widest - pool.shape[1])) for pool in pools])
            if pools
            else None,
            row_counts=tuple(counts),
            samples=tuple(place for place, _ in held),
        )
    return batches
