"""A cached record becomes what one student can be compared with: decoded, and pooled to a common grid.

Teacher and student may cut the picture into different tokens. Both are pooled to **the coarser of the two**,
by shared area: nobody is asked to tell apart what it, or the teacher, cannot see apart. All of this depends
on the sample alone, so it runs on loading threads and the loop meets tensors of equal shape.

Dims: A supervised rows, G layer groups, N_t teacher and N_s student visual tokens, C common cells.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import (
    Tile,
    content_mask,
    grid_tile,
    overlap_matrix,
    pool_keys,
    pool_queries,
    tile_boxes,
    tiles_from_array,
)
from vlm_distill_cache.common.attention.layers import GroupMatch
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.live import SparseLogits, TeacherMap, as_tensors, image_pairs
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.features import FeatureTarget, decode_features
from vlm_distill_cache.stage2_student.batches.grid import meet, meet_cells
from vlm_distill_cache.stage2_student.batches.layers import regroup, regroup_map, regroup_rows
from vlm_distill_cache.stage2_student.loss_weights import (
    ALL_ROWS,
    ATTENTION_SIGNALS,
    ATTENTION_TERMS,
    ROW_SIGNALS,
    cached_signals,
)


@dataclass(frozen=True)
class AttentionTarget:
    """The teacher's attention on the common cells of one sample.

    Attributes:
        teacher: float32; ``answer_attention`` and ``text_attention`` ``[A, G, C]``, ``visual_columns`` ``[G, C]``, ``visual_map``
            and ``all_attention`` ``[G, C, C]``; absolute probability mass.
        image_mass: Mass of a row on the image, float32 ``[A, G]``; None for signals without rows.
        student_pool: float32 ``[N_s, C]``.
        content: bool ``[C]``.
        kept: The teacher's half of the sink mask of ``visual_map``, bool ``[G, C, C]``; else None.
        complete: Whether each value of a ``visual_map`` is that of its own pair.
        text: The text rows of ``all_attention`` on the same cells, float32 ``[X, G, C]``; else None.
    """

    teacher: Tensor
    image_mass: Tensor | None
    student_pool: Tensor
    content: Tensor
    kept: Tensor | None = None
    complete: bool = True
    text: Tensor | None = None


@dataclass(frozen=True)
class SampleSignals:
    """What a sample's losses need of the teacher; ``attention`` is empty without an image."""

    logits: SparseLogits | None
    attention: Mapping[str, AttentionTarget]
    features: Mapping[str, FeatureTarget] = field(default_factory=dict)


def decode_signals(
    record: Record,
    codecs: Mapping[str, Any],
    student_tiles: tuple[Tile, ...],
    *,
    where: str,
    attention_record: Record | None = None,
    attention_rows: int | None = None,
    terms: Collection[str] | None = None,
    match: GroupMatch | None = None,
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
        terms: Attention losses to prepare for; None: one of each attention signal.
        match: How the cached layer groups become those of the losses; None: they stay.

    Returns:
        The signals, on the CPU.

    Raises:
        CacheMismatchError: If tiles and attention of the record differ in their number of visual tokens.
    """
    logits = as_tensors(codecs["logits"].decode(record)) if "logits" in codecs else None
    attention: dict[str, AttentionTarget] = {}
    source = record if attention_record is None else attention_record
    teacher_tiles = tiles_from_array(np.asarray(source["tiles"]))
    if student_tiles and teacher_tiles:
        for term in ATTENTION_TERMS:
            if term in (ATTENTION_SIGNALS if terms is None else terms) and codecs.keys() >= {*cached_signals([term])}:
                foreign = attention_rows is not None and term in ("text_attention", ALL_ROWS)
                rows = len(record["text_attention"]) if foreign else attention_rows
                sides = _Sides(codecs, source, teacher_tiles, student_tiles, match, rows, where)
                attention[term] = sides.target(term)
    own_tiles = tiles_from_array(np.asarray(record["tiles"]))
    features = decode_features(record, codecs, own_tiles, student_tiles, where=where)
    return SampleSignals(logits=logits, attention=attention, features=features)


@dataclass(frozen=True)
class _Sides:
    """One record and one student, about to meet; attributes as the arguments of `decode_signals`."""

    codecs: Mapping[str, Any]
    record: Record
    teacher_tiles: tuple[Tile, ...]
    student_tiles: tuple[Tile, ...]
    match: GroupMatch | None
    rows: int | None
    where: str

    def target(self, term: str) -> AttentionTarget:
        """The teacher's side of one loss term."""
        if term == "visual_map":
            return self._map()
        if term == ALL_ROWS:
            return self._all_rows()
        if term in ROW_SIGNALS:
            return self._rows(term)
        grid = meet(self.teacher_tiles, self.student_tiles)
        columns = as_tensors(self.codecs[term].decode(self.record))
        _check_tokens(term, columns, grid.teacher_pool.shape[0], self.where)
        pooled = pool_keys(regroup(columns, self.match, axis=0), grid.teacher_pool)  # [G, C]
        return AttentionTarget(pooled, None, grid.student_pool, grid.content)

    def _rows(self, signal: str) -> AttentionTarget:
        grid = meet_cells(self.codecs[signal].grid, self.student_tiles)
        decoded = regroup_rows(as_tensors(self.codecs[signal].decode(self.record)), self.match)
        cells, mass = decoded.cells, decoded.image_mass
        if self.rows is not None:
            chosen = torch.arange(self.rows) % max(1, cells.shape[0])
            cells, mass = cells[chosen], mass[chosen]
        return AttentionTarget(pool_keys(cells, grid.teacher_pool), mass, grid.student_pool, grid.content)

    def _map(self) -> AttentionTarget:
        """A visual map on the common cells, with the teacher's half of the sink mask.

        The cached mask holds where the common cells are the map's own; a map that is pooled once more gets a
        mask of its pooled values.
        """
        cells, decoded = self._decoded_map()
        grid = meet(cells, self.student_tiles)
        if not grid.is_teachers:
            values = decoded.whole(f"{self.where}: a student whose visual tokens are coarser than the map's")
            values = pool_queries(pool_keys(values, grid.teacher_pool), grid.teacher_pool)  # [G, C, C]
            decoded = TeacherMap.from_maps(values, token_mask=grid.content)
        pairs = image_pairs(decoded.values, grid.content)
        return AttentionTarget(
            decoded.values * pairs,
            None,
            grid.student_pool,
            grid.content,
            decoded.kept & pairs,
            decoded.complete,
        )

    def _all_rows(self) -> AttentionTarget:
        """Visual and text rows on the cells of the text rows, on which alone both can be compared.

        Text rows were pooled to a grid over the picture when they were cached; the map goes through the same grid,
        its keys by sum and its queries by mean, and so do the student's tokens.
        """
        text = self._rows("text_attention")
        cells, decoded = self._decoded_map()
        codec = self.codecs["text_attention"]
        grid = meet_cells(codec.grid, self.student_tiles)
        pool = _onto_grid(cells, codec.grid) @ grid.teacher_pool  # [N_t, C]
        values = pool_queries(pool_keys(decoded.whole(f"{self.where}: the loss all_attention"), pool), pool)
        return AttentionTarget(values, None, grid.student_pool, grid.content, text=text.teacher)

    def _decoded_map(self) -> tuple[tuple[Tile, ...], TeacherMap]:
        """The map's cells, and the map of the wanted layer groups."""
        codec: VisualMapCodec = self.codecs["visual_map"]
        cells, decoded = codec.cells_of(self.teacher_tiles), as_tensors(codec.decode(self.record))
        boxes = tile_boxes(cells)
        _check_tokens("visual_map", decoded.values, len(boxes), self.where)
        return cells, regroup_map(decoded, self.match, content=content_mask(boxes), wanted_by=self.where)


@lru_cache(maxsize=256)
def _onto_grid(cells: tuple[Tile, ...], grid: tuple[int, int]) -> Tensor:
    """Shares of the tokens of some tiles in the cells of a grid over the whole picture, float32 ``[N, cells]``."""
    return overlap_matrix(tile_boxes(cells), tile_boxes((grid_tile(*grid),)))


def _check_tokens(signal: str, attention: Tensor, tokens: int, where: str) -> None:
    """Refuse attention over another number of visual tokens than the record's tiles have."""
    if attention.shape[-1] != tokens:
        raise CacheMismatchError(
            f"{where}: {signal} covers {attention.shape[-1]} visual tokens, the record's tiles {tokens}; "
            "run `cachectl verify --deep` on the cache, then build the damaged shard again"
        )
