"""The losses on attention as terms: what each reads of cache and student, and how both sides meet.

Dims: A supervised rows, X text rows, R most rows of a sample, G layer groups, N_t teacher and N_s student visual tokens,
M most visual tokens of a sample, C common cells, I samples with an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, pool_keys, pool_queries, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.attention.sinks import Floats, mean_over
from vlm_distill_cache.common.attention.tiles import Tile, box_array, grid_tile
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap, image_pairs, incomplete_map
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.text.collate import text_row_count
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.grid import CommonGrid, meet, meet_cells
from vlm_distill_cache.stage2_student.batches.layers import regroup, regroup_map, regroup_rows
from vlm_distill_cache.stage2_student.batches.signals import (
    LossTerm,
    Requests,
    Seen,
    Sides,
    StudentSizes,
    Value,
    VisualRows,
)
from vlm_distill_cache.stage2_student.loss_weights import LayerReduction, LossWeights
from vlm_distill_cache.stage2_student.losses.attention import (
    all_attention_loss,
    answer_attention_loss,
    has_mass,
    sink_shares,
    visual_columns_loss,
    visual_map_loss,
)

TextRows = Literal["answer", "text"]
"""Rows of the text that look at the image: those that predict answers, or all behind the image."""
SINK_FILTERED = "sink_filtered"


@dataclass(frozen=True)
class AttentionTarget:
    """The teacher's attention on the common cells, absolute probability mass: of one sample or of a batch.

    A batch is padded to the most cells and visual tokens and holds samples with an image only, in batch order: it has an
    axis I in front, but for rows of the text, which stand one after the other.

    Attributes:
        teacher: float32; of rows of the text ``[A or X, G, C]``, of column means ``[G, C]``, of maps ``[G, C, C]``.
        student_pool: float32 ``[N_s, C]``.
        content: bool ``[C]``, False where a cell carries no image; None (of a batch): all do.
        image_mass: Mass of a row of the text on the image, float32 ``[A or X, G]``; else None.
        kept: The teacher's half of a map's sink mask, bool ``[G, C, C]``; else None.
        complete: Whether each value of a map is that of its own pair.
        text: Text rows beside a map, on the same cells, float32 ``[X, G, C]``; else None.
        sinks: The teacher's sink scores of cells, float32 ``[C]``, of a batch ``[I, C]``; None where the losses ask for none.
        count: Of a batch: rows of the text or images on which the teacher has any mass, what the loss is a mean over.
    """

    teacher: Tensor
    student_pool: Tensor
    content: Tensor | None
    image_mass: Tensor | None = None
    kept: Tensor | None = None
    complete: bool = True
    text: Tensor | None = None
    sinks: Tensor | None = None
    count: int = 0

    def of_fed(self, fed: Tensor) -> "AttentionTarget":
        """A batch's target for a student that feeds fewer visual tokens: cells that none of them sees do not count.

        Args:
            fed: What each visual token stands for, float32 ``[I, M, M]``, rows that sum to 1, or to 0 of those not fed.
        """
        pool = fed.to(self.student_pool) @ self.student_pool  # [I, M, C]
        touched = pool.sum(dim=1) > 0
        content = touched if self.content is None else self.content & touched
        if self.kept is None:
            return replace(self, student_pool=pool, content=content)
        pairs = image_pairs(self.teacher, content)
        return replace(self, student_pool=pool, content=content, teacher=self.teacher * pairs, kept=self.kept & pairs)

    def of_fed_rows(self, fed: Tensor, rows: Tensor) -> "AttentionTarget":
        """As `of_fed`, of rows of the text whose masked cells are taken out of the teacher's, and of its mass on the image.

        Args:
            rows: Row positions of these samples, int64 ``[I, R]``, padding -1.
        """
        target = self.of_fed(fed)
        assert target.content is not None
        sample_index = (rows >= 0).nonzero()[:, 0].to(target.content.device)
        teacher = self.teacher * target.content[sample_index][:, None]
        return replace(target, teacher=teacher, image_mass=teacher.sum(dim=-1))


@dataclass(frozen=True, kw_only=True)
class AttentionTerm(LossTerm):
    """What the losses on attention share."""

    attends: ClassVar[bool] = True
    by_row: ClassVar[bool] = False
    by_pair: ClassVar[bool] = False

    def collate(self, targets: Sequence[AttentionTarget], places: Sequence[int]) -> AttentionTarget:
        """Pad targets to the most cells and visual tokens."""
        cells = max(target.student_pool.shape[1] for target in targets)
        keys = max(target.student_pool.shape[0] for target in targets)
        padded = [_pad_cells(target.teacher, cells, both=self.by_pair) for target in targets]
        teacher = torch.cat(padded) if self.by_row else torch.stack(padded)
        content = torch.stack([_pad_cells(target.content, cells) for target in targets if target.content is not None])
        pools = [target.student_pool for target in targets]
        masses = [target.image_mass for target in targets if target.image_mass is not None]
        masks = [_pad_cells(target.kept, cells, both=True) for target in targets if target.kept is not None]
        texts = [_pad_cells(target.text, cells) for target in targets if target.text is not None]
        sinks = [_pad_cells(target.sinks, cells) for target in targets if target.sinks is not None]
        return AttentionTarget(
            teacher=teacher,
            student_pool=torch.stack(
                [F.pad(pool, (0, cells - pool.shape[1], 0, keys - pool.shape[0])) for pool in pools]
            ),
            content=None if bool(content.all()) else content,
            count=int(has_mass(teacher).sum()),
            image_mass=torch.cat(masses) if masses else None,
            kept=torch.stack(masks) if masks else None,
            complete=all(target.complete for target in targets),
            text=torch.cat(texts) if texts else None,
            sinks=torch.stack(sinks) if sinks else None,
        )


@dataclass(frozen=True, kw_only=True)
class RowTerm(AttentionTerm):
    """Where rows of the text look on the image; which rows is said by `of`."""

    of: TextRows

    by_row: ClassVar[bool] = True

    def check_record(self, record: Record, encoded: EncodedSample, *, where: str) -> None:
        """Refuse another number of text rows; answers are compared as labels in any case."""
        if self.of == "text":
            _check_text_rows(len(record[self.reads[0]]), encoded, where=where)

    def target(self, sides: Sides) -> AttentionTarget:
        """The teacher's rows on the cells where its cached grid and the student's tokens meet."""
        return replace(_rows_target(sides, self.reads[0]), sinks=self._sinks(sides))

    def _sinks(self, sides: Sides) -> Tensor | None:
        """The sink scores of these cells."""
        if (found := sides.sinks.get("language_model")) is None:
            return None
        cells = (grid_tile(*sides.codecs[self.reads[0]].grid),)
        if found.places == "cell":
            scores = found.on(cells)
        else:
            scores = mean_over(found.on(sides.teacher_tiles), box_array(sides.teacher_tiles), box_array(cells))
        return _mean_of_cells(scores, meet_cells(sides.codecs[self.reads[0]].grid, sides.student_tiles))

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """The rows by visual tokens."""
        return {self.of: _text_request(self.of, batch, groups)}

    def value(self, seen: Seen, target: AttentionTarget, fit: Any) -> Value:
        """`answer_attention_loss`, a mean over rows that look at the image."""
        cells, sample_index = _student_rows(self.of, seen, target)
        assert target.image_mass is not None
        loss = answer_attention_loss(
            cells,
            RowAttention(target.teacher, target.image_mass),
            kind=seen.losses.answer_kind,
            cell_mask=None if target.content is None else target.content[sample_index],
            sample_index=sample_index,
            sinks=None if target.sinks is None else target.sinks[sample_index],
            reduction=_reduction(seen.losses),
        )
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class ColumnsTerm(AttentionTerm):
    """How much attention each visual token receives from the visual tokens."""

    visual_rows: ClassVar[VisualRows | None] = "alike"

    def target(self, sides: Sides) -> AttentionTarget:
        """The teacher's column means on the common cells."""
        (signal,) = self.reads
        grid = meet(sides.teacher_tiles, sides.student_tiles)
        columns = sides.decode(signal)
        sides.check_tokens(signal, columns.shape[-1])
        pooled = pool_keys(regroup(columns, sides.match, axis=0), grid.teacher_pool)  # [G, C]
        found = sides.sinks.get("visual_rows")
        sinks = None if found is None else _mean_of_cells(found.on(sides.teacher_tiles), grid)
        return AttentionTarget(pooled, grid.student_pool, grid.content, sinks=sinks)

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """The mean over the common cells that carry image, of visual tokens by visual tokens."""
        weights = row_weights(target)  # [I, M]
        if len(batch.has_image) != len(batch.keys):
            weights = weights.new_zeros(batch.keys.shape).index_copy(0, batch.has_image, weights)
        return {"columns": AttentionRequest(batch.keys, batch.keys, groups, weights)}

    def value(self, seen: Seen, target: AttentionTarget, fit: Any) -> Value:
        """`visual_columns_loss`, a mean over images."""
        received = _of_images(seen.attention["columns"], seen.batch)  # [I, G, 1, M]; all rows where some are not fed
        if seen.fed is not None:
            received = (row_weights(target)[:, None, :, None] * received).sum(dim=2, keepdim=True)
        columns = received[:, :, 0] @ target.student_pool  # [I, G, C]
        loss = visual_columns_loss(
            columns,
            target.teacher,
            kind=seen.losses.visual_columns_kind,
            token_mask=target.content,
            sinks=target.sinks,
            reduction=_reduction(seen.losses),
        )
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class MapTerm(AttentionTerm):
    """The map of visual tokens by visual tokens; its `fit` is whether the cache holds each pair's own value."""

    by_pair: ClassVar[bool] = True
    visual_rows: ClassVar[VisualRows | None] = "causal"

    def check_cache(
        self, signals: Mapping[str, Any], losses: LossWeights, where: str, match: GroupMatch | None
    ) -> None:
        """Refuse maps without single values but for the sink-filtered loss on groups that the cache holds."""
        if not _is_complete(signals[self.reads[0]]):
            if losses.visual_map_kind != SINK_FILTERED:
                raise incomplete_map(f"{where}: the loss visual_map_kind={losses.visual_map_kind}")
            if match is not None and not match.is_selection:
                raise incomplete_map(f"{where}: a mean over layers that the cache does not hold")

    def fit(self, plan: Plan, losses: LossWeights, student: StudentSizes, where: str) -> bool:
        """Whether the mass of sinks is known."""
        return _is_complete(plan.signals[self.reads[0]])

    def target(self, sides: Sides) -> AttentionTarget:
        """The teacher's map on the common cells, with its half of the sink mask.

        The cached mask holds where the common cells are the map's own; a map that is pooled once more gets a
        mask of its pooled values.
        """
        cells, decoded = _decoded_map(sides, self.reads[0])
        grid = meet(cells, sides.student_tiles)
        if not grid.is_teachers:
            values = decoded.whole(f"{sides.where}: a student whose visual tokens are coarser than the map's")
            values = pool_queries(pool_keys(values, grid.teacher_pool), grid.teacher_pool)  # [G, C, C]
            decoded = TeacherMap.from_maps(values, token_mask=grid.content)
        pairs = image_pairs(decoded.values, grid.content)
        return AttentionTarget(
            decoded.values * pairs,
            grid.student_pool,
            grid.content,
            kept=decoded.kept & pairs,
            complete=decoded.complete,
        )

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """Visual tokens by visual tokens."""
        return {"visual": AttentionRequest(batch.keys, batch.keys, groups)}

    def measured(self, losses: LossWeights, fit: bool) -> tuple[str, ...]:
        """The shares of pairs, and of the teacher's mass where it is known, that the sink filter removes."""
        if losses.visual_map_kind != SINK_FILTERED:
            return ()
        return ("sink_pairs", "sink_mass") if fit else ("sink_pairs",)

    def value(self, seen: Seen, target: AttentionTarget, fit: bool) -> Value:
        """`visual_map_loss`, a mean over images, and `sink_shares`."""
        assert target.kept is not None
        student = pool_map(_of_images(seen.attention["visual"], seen.batch), target)  # [I, G, C, C]
        teacher = TeacherMap(target.teacher, target.kept, target.complete)
        losses = seen.losses
        kind = losses.visual_map_kind
        reduction = _reduction(losses, published="sum" if kind == SINK_FILTERED else "mean")
        loss = visual_map_loss(student, teacher, kind=kind, token_mask=target.content, reduction=reduction)
        if kind != SINK_FILTERED:
            return loss, {}
        shares = sink_shares(student, teacher, token_mask=target.content)
        return loss, dict(zip(self.measured(losses, fit), shares, strict=False))


@dataclass(frozen=True, kw_only=True)
class AllRowsTerm(AttentionTerm):
    """Visual and text rows as one vector, the paper's A[:, :N_v]; `reads` are the map and the text rows."""

    by_pair: ClassVar[bool] = True
    visual_rows: ClassVar[VisualRows | None] = "causal"

    def check_cache(
        self, signals: Mapping[str, Any], losses: LossWeights, where: str, match: GroupMatch | None
    ) -> None:
        """Refuse maps without single values."""
        if not _is_complete(signals[self.reads[0]]):
            raise incomplete_map(f"{where}: the loss all_attention")

    def check_record(self, record: Record, encoded: EncodedSample, *, where: str) -> None:
        """Refuse another number of text rows."""
        _check_text_rows(len(record[self.reads[1]]), encoded, where=where)

    def target(self, sides: Sides) -> AttentionTarget:
        """Visual and text rows on the cells of the text rows, on which alone both can be compared.

        Text rows were pooled to a grid over the picture when they were cached; the map goes through the same grid,
        its keys by sum and its queries by mean, and so do the student's tokens.
        """
        visual, of_text = self.reads
        text = _rows_target(sides, of_text)
        cells, decoded = _decoded_map(sides, visual)
        cached_grid = sides.codecs[of_text].grid
        grid = meet_cells(cached_grid, sides.student_tiles)
        pool = _onto_grid(cells, cached_grid) @ grid.teacher_pool  # [N_t, C]
        values = pool_queries(pool_keys(decoded.whole(f"{sides.where}: the loss all_attention"), pool), pool)
        return AttentionTarget(values, grid.student_pool, grid.content, text=text.teacher)

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """All text rows by visual tokens, and visual tokens by visual tokens."""
        return {
            "text": _text_request("text", batch, groups),
            "visual": AttentionRequest(batch.keys, batch.keys, groups),
        }

    def value(self, seen: Seen, target: AttentionTarget, fit: Any) -> Value:
        """`all_attention_loss`, a mean over images."""
        assert target.text is not None
        student = pool_map(_of_images(seen.attention["visual"], seen.batch), target)  # [I, G, C, C]
        cells, sample_index = _student_rows("text", seen, target)
        loss = all_attention_loss(
            student,
            cells,
            target.teacher,
            target.text,
            text_sample=sample_index,
            row_weights=target.student_pool.sum(dim=1),
            token_mask=target.content,
            reduction=_reduction(seen.losses),
        )
        return loss, {}


def _reduction(losses: LossWeights, *, published: LayerReduction = "mean") -> LayerReduction:
    """Over layer groups; ``published``: as the loss's source has it."""
    return published if losses.attention_reduction == "published" else losses.attention_reduction


def _is_complete(codec: Mapping[str, Any]) -> bool:
    return VisualMapCodec.from_dict(codec).complete


def _check_text_rows(cached: int, encoded: EncodedSample, *, where: str) -> None:
    if cached != text_row_count(encoded):
        raise CacheMismatchError(
            f"{where}: the cache holds attention of {cached} text rows, the data now has "
            f"{text_row_count(encoded)}: a question or the template changed since the cache was built. Train "
            "with the data of the cache, or build the cache again"
        )


def _rows_target(sides: Sides, signal: str) -> AttentionTarget:
    """Rows of the text on the common cells; a foreign record's are repeated or cut to the sample's own number."""
    codec = sides.codecs[signal]
    grid = meet_cells(codec.grid, sides.student_tiles)
    decoded = regroup_rows(sides.decode(signal), sides.match)
    cells, mass = decoded.cells, decoded.image_mass
    if sides.own is not sides.record:
        rows = len(sides.own[codec.fields()[0].name])
        chosen = torch.arange(rows) % max(1, cells.shape[0])
        cells, mass = cells[chosen], mass[chosen]
    pooled = pool_keys(cells, grid.teacher_pool)
    return AttentionTarget(pooled, grid.student_pool, grid.content, image_mass=mass)


def _mean_of_cells(scores: Floats, grid: CommonGrid) -> Tensor:
    """Scores of the teacher's side of a common grid as those of its cells, float32 ``[C]``: means weighted by area."""
    return pool_queries(torch.from_numpy(scores).float()[:, None], grid.teacher_pool)[:, 0]


def _decoded_map(sides: Sides, signal: str) -> tuple[tuple[Tile, ...], TeacherMap]:
    """A map's cells, and the map of the wanted layer groups."""
    codec: VisualMapCodec = sides.codecs[signal]
    cells, decoded = codec.cells_of(sides.teacher_tiles), sides.decode(signal)
    sides.check_tokens(signal, decoded.values.shape[-1], cells)
    content = content_mask(tile_boxes(cells))
    return cells, regroup_map(decoded, sides.match, content=content, wanted_by=sides.where)


@lru_cache(maxsize=256)
def _onto_grid(cells: tuple[Tile, ...], grid: tuple[int, int]) -> Tensor:
    """Shares of the tokens of some tiles in the cells of a grid over the whole picture, float32 ``[N, cells]``."""
    return overlap_matrix(tile_boxes(cells), tile_boxes((grid_tile(*grid),)))


def _pad_cells(tensor: Tensor, cells: int, *, both: bool = False) -> Tensor:
    """Append empty cells to the last axis, or to the last two."""
    missing = cells - tensor.shape[-1]
    if missing == 0:
        return tensor
    return F.pad(tensor, (0, missing, 0, missing) if both else (0, missing))


def _text_request(of: TextRows, batch: TrainingBatch, groups: Groups) -> AttentionRequest:
    return AttentionRequest(batch.rows if of == "answer" else batch.text_rows, batch.keys, groups)


def _student_rows(of: TextRows, seen: Seen, target: AttentionTarget) -> tuple[Tensor, Tensor]:
    """The student's rows on the common cells ``[A', G, C]``, and the sample with an image each belongs to."""
    batch = seen.batch
    rows = (batch.rows if of == "answer" else batch.text_rows)[batch.has_image.cpu()]  # [I, R]
    cells = student_cells(_of_images(seen.attention[of], batch), target, rows)
    return cells, (rows >= 0).nonzero()[:, 0].to(cells.device)


def _of_images(attention: Tensor, batch: TrainingBatch) -> Tensor:
    """Attention of the samples with an image: ``[B, ...]`` to ``[I, ...]``, not copied where all have one."""
    return attention if len(batch.has_image) == len(attention) else attention[batch.has_image]


def student_cells(attention: Tensor, target: AttentionTarget, rows: Tensor) -> Tensor:
    """The student's rows of the text on the common cells, in the order of the teacher's rows.

    Args:
        attention: float32 ``[I, G, R, M]``, absolute mass.
        rows: Row positions of these samples, int64 ``[I, R]``, padding -1.
    """
    pooled = attention @ target.student_pool[:, None]  # [I, G, R, C]
    by_row = pooled.transpose(1, 2)  # [I, R, G, C]
    return by_row[(rows >= 0).to(by_row.device)]


def pool_map(attention: Tensor, target: AttentionTarget) -> Tensor:
    """A visual x visual map on the common cells, keys by sum, queries by mean: ``[I, G, M, M]`` to ``[I, G, C, C]``.

    Rows of cells that no token touches are 0.
    """
    pool = target.student_pool[:, None]  # [I, 1, M, C]
    touched = pool.sum(dim=2, keepdim=True).clamp_min(torch.finfo(pool.dtype).tiny)
    return (pool / touched).transpose(2, 3) @ (attention @ pool)


def row_weights(target: AttentionTarget) -> Tensor:
    """What each visual token counts in the mean of `pool_map` over cells that carry image, float32 ``[I, M]``."""
    pool = target.student_pool  # [I, M, C]
    touched = pool.sum(dim=1).clamp_min(torch.finfo(pool.dtype).tiny)  # [I, C]
    cells = torch.ones_like(touched) if target.content is None else target.content.to(pool.dtype)
    cells = cells / cells.sum(dim=1, keepdim=True).clamp_min(1.0)
    return (pool @ (cells / touched)[:, :, None])[:, :, 0]
