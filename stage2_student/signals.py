"""A cached record becomes what one student can be compared with: decoded, and pooled to a common grid.

Teacher and student may cut the picture into different tokens. Both are pooled to **the coarser of the two**,
by shared area: nobody is asked to tell apart what it, or the teacher, cannot see apart. All of this depends
on the sample alone, so it runs on loading threads and the loop meets tensors of equal shape.

Dims: A supervised rows, G layer groups, N_t teacher and N_s student visual tokens, C common cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.codecs.logits import SparseLogits
from common.codecs.teacher_map import TeacherMap, image_pairs, incomplete_map
from common.codecs.visual_map import VisualMapCodec
from common.errors import CacheMismatchError
from common.layers import Groups, student_groups
from common.plan import Plan
from common.schema import Record
from common.visual_tokens import (
    Tile,
    area_pool,
    content_mask,
    grid_tile,
    overlap_matrix,
    pool_keys,
    pool_queries,
    tile_boxes,
    tiles_from_array,
)

ATTENTION_SIGNALS = ("answer_attention", "visual_columns", "visual_map", "text_attention")
ROW_SIGNALS = ("answer_attention", "text_attention")
"""Those with a row per position of the text; the others have one map an image."""


@dataclass(frozen=True)
class CommonGrid:
    """How two sides' visual tokens meet.

    Attributes:
        teacher_pool: Shares of each teacher token in each common cell, float32 ``[N_t, C]``.
        student_pool: Shares of each student token, float32 ``[N_s, C]``.
        content: Which common cells carry image, bool ``[C]``.
        is_teachers: Whether the common cells are the teacher's tokens, in their order.
    """

    teacher_pool: Tensor
    student_pool: Tensor
    content: Tensor
    is_teachers: bool = True


@lru_cache(maxsize=256)
def meet(teacher: tuple[Tile, ...], student: tuple[Tile, ...]) -> CommonGrid:
    """Choose the common cells of two token layouts: the side with fewer tokens that carry image.

    Args:
        teacher: Tiles of the teacher's tokens, or of a cached grid.
        student: Tiles of the student's tokens.

    Returns:
        The pooling of both sides; that of the side chosen is the identity on tokens that carry image.
    """
    teacher_boxes, student_boxes = tile_boxes(teacher), tile_boxes(student)
    teacher_content, student_content = content_mask(teacher_boxes), content_mask(student_boxes)
    if int(student_content.sum()) <= int(teacher_content.sum()):
        teacher_pool = area_pool(teacher_boxes, student_boxes)
        identity = torch.diag(student_content.float())
        return CommonGrid(
            teacher_pool=teacher_pool,
            student_pool=identity,
            content=student_content,
            is_teachers=torch.equal(teacher_pool, identity),
        )
    return CommonGrid(
        teacher_pool=torch.diag(teacher_content.float()),
        student_pool=overlap_matrix(student_boxes, teacher_boxes) * teacher_content,
        content=teacher_content,
    )


@lru_cache(maxsize=256)
def meet_cells(grid: tuple[int, int], student: tuple[Tile, ...]) -> CommonGrid:
    """Choose the common cells of a cached grid over the whole picture and a student's tokens.

    The teacher's tokens were pooled to the grid; the student's go through it too. Where the grid cuts tokens
    (padded and cropped pictures), a student that looks like its teacher then still matches it.

    Args:
        grid: Rows and columns.
        student: Tiles of the student's tokens.

    Returns:
        The pooling of both sides.
    """
    cells = (grid_tile(*grid),)
    common = meet(cells, student)
    through = overlap_matrix(tile_boxes(student), tile_boxes(cells))  # [N_s, cells]
    return replace(common, student_pool=through @ common.teacher_pool)


def matching_groups(plan: Plan, depth: int) -> Groups:
    """The student layers that meet a cache's layer groups, in the same order.

    Args:
        plan: The cache's.
        depth: The student's number of layers.

    Raises:
        ConfigError: If the student has fewer layers than the choice needs.
    """
    teacher = plan.teacher
    return student_groups(depth, len(teacher["groups"]), teacher.get("layer_choice", "middle"))


@dataclass(frozen=True)
class AttentionTarget:
    """The teacher's attention on the common cells of one sample.

    Attributes:
        teacher: float32; ``answer_attention`` and ``text_attention`` ``[A, G, C]``, ``visual_columns`` ``[G, C]``, ``visual_map``
            ``[G, C, C]``; absolute probability mass.
        image_mass: Mass of a row on the image, float32 ``[A, G]``; None for signals without rows.
        student_pool: float32 ``[N_s, C]``.
        content: bool ``[C]``.
        kept: The teacher's half of the sink mask of ``visual_map``, bool ``[G, C, C]``; else None.
        complete: Whether each value of a ``visual_map`` is that of its own pair.
    """

    teacher: Tensor
    image_mass: Tensor | None
    student_pool: Tensor
    content: Tensor
    kept: Tensor | None = None
    complete: bool = True


@dataclass(frozen=True)
class SampleSignals:
    """What a sample's losses need of the teacher; ``attention`` is empty without an image."""

    logits: SparseLogits | None
    attention: Mapping[str, AttentionTarget]


def decode_signals(
    record: Record,
    codecs: Mapping[str, Any],
    student_tiles: tuple[Tile, ...],
    *,
    where: str,
    attention_record: Record | None = None,
    attention_rows: int | None = None,
) -> SampleSignals:
    """Decode the wanted signals of one record and pool them for one student.

    Args:
        record: The sample's record.
        codecs: Codec of each wanted signal.
        student_tiles: The student's visual tokens; empty without an image.
        where: Sample and cache, for errors.
        attention_record: Take the attention signals from this record (the control experiment).
        attention_rows: Supervised rows the sample has, to which a foreign record's rows are repeated or cut;
            its text rows, likewise.

    Returns:
        The signals, on the CPU.

    Raises:
        CacheMismatchError: If tiles and attention of the record differ in their number of visual tokens.
    """
    logits = codecs["logits"].decode(record) if "logits" in codecs else None
    attention: dict[str, AttentionTarget] = {}
    source = record if attention_record is None else attention_record
    teacher_tiles = tiles_from_array(np.asarray(source["tiles"]))
    if student_tiles and teacher_tiles:
        for signal in ATTENTION_SIGNALS:
            if signal in codecs:
                foreign = attention_rows is not None and signal == "text_attention"
                rows = len(record[signal]) if foreign else attention_rows
                attention[signal] = _target(
                    signal, codecs[signal], source, teacher_tiles, student_tiles, where, rows
                )
    return SampleSignals(logits=logits, attention=attention)


def _target(
    signal: str,
    codec: Any,
    record: Record,
    teacher_tiles: tuple[Tile, ...],
    student_tiles: tuple[Tile, ...],
    where: str,
    rows: int | None,
) -> AttentionTarget:
    if signal == "visual_map":
        return _map_target(codec, record, teacher_tiles, student_tiles, where)
    decoded = codec.decode(record)
    if signal in ROW_SIGNALS:
        grid = meet_cells(codec.grid, student_tiles)
        cells, mass = decoded.cells, decoded.image_mass
        if rows is not None:
            chosen = torch.arange(rows) % max(1, cells.shape[0])
            cells, mass = cells[chosen], mass[chosen]
        return AttentionTarget(pool_keys(cells, grid.teacher_pool), mass, grid.student_pool, grid.content)
    grid = meet(teacher_tiles, student_tiles)
    _check_tokens(signal, decoded, grid.teacher_pool.shape[0], where)
    pooled = pool_keys(decoded, grid.teacher_pool)  # [G, C]
    return AttentionTarget(pooled, None, grid.student_pool, grid.content)


def _map_target(
    codec: VisualMapCodec,
    record: Record,
    teacher_tiles: tuple[Tile, ...],
    student_tiles: tuple[Tile, ...],
    where: str,
) -> AttentionTarget:
    """A visual map on the common cells, with the teacher's half of the sink mask.

    The cached mask holds where the common cells are the map's own; a map that is pooled once more gets a mask of
    its pooled values.
    """
    cells = codec.cells_of(teacher_tiles)
    grid = meet(cells, student_tiles)
    decoded = codec.teacher_map(record)
    _check_tokens("visual_map", decoded.values, grid.teacher_pool.shape[0], where)
    if not grid.is_teachers:
        values = decoded.whole(f"{where}: a student whose visual tokens are coarser than the map's")
        values = pool_queries(pool_keys(values, grid.teacher_pool), grid.teacher_pool)  # [G, C, C]
        decoded = TeacherMap.from_maps(values, token_mask=grid.content)
    pairs = image_pairs(decoded.values, grid.content)
    return AttentionTarget(
        decoded.values * pairs, None, grid.student_pool, grid.content, decoded.kept & pairs, decoded.complete
    )


def check_map_serves(signals: Mapping[str, Any], kind: str, *, where: str) -> None:
    """Refuse a kind of map loss that a cache's preset cannot serve, before anything is trained.

    Args:
        signals: The codec dictionaries of a plan.
        kind: ``sink_filtered`` or ``cosine``.
        where: Phase and cache, for the error.

    Raises:
        CacheMismatchError: With the remedy.
    """
    stored = signals.get("visual_map")
    if kind == "cosine" and stored is not None and not VisualMapCodec.from_dict(stored).complete:
        raise incomplete_map(f"{where}: the loss visual_map_kind=cosine")


def _check_tokens(signal: str, attention: Tensor, tokens: int, where: str) -> None:
    """Refuse attention over another number of visual tokens than the record's tiles have."""
    if attention.shape[-1] != tokens:
        raise CacheMismatchError(
            f"{where}: {signal} covers {attention.shape[-1]} visual tokens, the record's tiles {tokens}; "
            "run `cachectl verify --deep` on the cache, then build the damaged shard again"
        )
