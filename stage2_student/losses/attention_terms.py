"""The losses on attention as terms: what each reads of cache and student, and how both sides meet.

Dims: A supervised rows, X text rows, R most rows of a sample, G layer groups, N_t teacher and N_s student visual tokens,
M most visual tokens of a sample, C common cells, I samples with an image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import content_mask, overlap_matrix, pool_keys, pool_queries, tile_boxes
from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.attention.sinks import Floats, SinkMap, mean_over
from vlm_distill_cache.common.attention.tiles import Tile, box_array, of_view, tiles_of, views_of
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap, image_pairs, incomplete_map
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.text.collate import text_row_count
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.grid import CommonGrid, Meeting, meet_cells, meetings
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
    sink_shares,
    visual_columns_loss,
    visual_map_loss,
)
from vlm_distill_cache.stage2_student.losses.attention_targets import (
    AttentionTarget,
    Views,
    by_picture,
    one_view,
    pad_cells,
    pool_map,
    row_weights,
    sample_count,
    student_cells,
    views_of_student,
)

TextRows = Literal["answer", "text"]
"""Rows of the text that look at the image: those that predict answers, or all behind the image."""
SINK_FILTERED = "sink_filtered"


@dataclass(frozen=True, kw_only=True)
class AttentionTerm(LossTerm):
    """What the losses on attention share."""

    attends: ClassVar[bool] = True
    by_row: ClassVar[bool] = False
    by_pair: ClassVar[bool] = False
    by_picture: ClassVar[bool] = False

    def collate(self, targets: Sequence[AttentionTarget], places: Sequence[int]) -> AttentionTarget:
        """Pad targets to the most cells and visual tokens."""
        views = None
        if any(target.views is not None for target in targets):
            targets = [target if target.views is not None else one_view(target) for target in targets]
            views = Views.joined([target.views for target in targets if target.views is not None], places)
        cells = max(target.student_pool.shape[-1] for target in targets)
        keys = max(target.student_pool.shape[-2] for target in targets)
        padded = [pad_cells(target.teacher, cells, both=self.by_pair) for target in targets]
        join = torch.cat if self.by_picture and views is not None else torch.stack
        teacher = torch.cat(padded) if self.by_row else join(padded)
        content = join([pad_cells(target.content, cells) for target in targets if target.content is not None])
        pools = [target.student_pool for target in targets]
        masses = [target.image_mass for target in targets if target.image_mass is not None]
        masks = [pad_cells(target.kept, cells, both=True) for target in targets if target.kept is not None]
        texts = [pad_cells(target.text, cells) for target in targets if target.text is not None]
        sinks = [pad_cells(target.sinks, cells) for target in targets if target.sinks is not None]
        return AttentionTarget(
            teacher=teacher,
            student_pool=join([F.pad(pool, (0, cells - pool.shape[-1], 0, keys - pool.shape[-2])) for pool in pools]),
            content=None if bool(content.all()) else content,
            count=sample_count(teacher, views if self.by_picture else None),
            image_mass=torch.cat(masses) if masses else None,
            kept=join(masks) if masks else None,
            complete=all(target.complete for target in targets),
            text=torch.cat(texts) if texts else None,
            sinks=join(sinks) if sinks else None,
            views=views,
        )


@dataclass(frozen=True, kw_only=True)
class RowTerm(AttentionTerm):
    """Where rows of the text look on the image; which rows is said by `of`."""

    of: TextRows

    by_row: ClassVar[bool] = True

    def check_record(self, record: Record, encoded: EncodedSample, *, where: str) -> None:
        """Refuse another number of text rows; answers are compared as labels in any case."""
        if self.of == "text":
            _check_text_rows(_cached_rows(record, self.reads[0]), encoded, where=where)

    def target(self, sides: Sides) -> AttentionTarget:
        """The teacher's rows on the cells where its cached grid and the student's tokens meet."""
        return replace(_rows_target(sides, self.reads[0]), sinks=self._sinks(sides))

    def _sinks(self, sides: Sides) -> Tensor | None:
        """The sink scores of these cells."""
        if (found := sides.sinks.get("language_model")) is None:
            return None
        cells = sides.codecs[self.reads[0]].cells_of(sides.teacher_tiles)
        scores = np.concatenate([_sinks_of_cells(found, *both) for both in _by_view(sides.teacher_tiles, cells)])
        return _mean_of_cells(scores, meet_cells(cells, sides.student_tiles))

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
    by_picture: ClassVar[bool] = True

    def target(self, sides: Sides) -> AttentionTarget:
        """The teacher's column means on the common cells."""
        (signal,) = self.reads
        columns = sides.decode(signal)
        sides.check_tokens(signal, columns.shape[-1])
        columns = regroup(columns, sides.match, axis=0)
        found = sides.sinks.get("visual_rows")
        sinks = None if found is None else _on_views(found, sides.teacher_tiles)

        def one(part: Meeting, grid: CommonGrid) -> AttentionTarget:
            own = slice(*part.teacher_tokens)
            return AttentionTarget(
                pool_keys(columns[:, own], grid.teacher_pool),  # [G, C]
                grid.student_pool,
                grid.content,
                sinks=None if sinks is None else _mean_of_cells(sinks[own], grid),
            )

        return by_picture(sides.teacher_tiles, sides.student_tiles, one)

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """The mean over the common cells that carry image, of visual tokens by visual tokens."""
        weights = row_weights(target)  # [I, M]
        if target.views is not None:
            return target.views.requests("columns", batch, groups, weights)
        if len(batch.has_image) != len(batch.keys):
            weights = weights.new_zeros(batch.keys.shape).index_copy(0, batch.has_image.to(weights.device), weights)
        return {"columns": AttentionRequest(batch.keys, batch.keys, groups, weights)}

    def value(self, seen: Seen, target: AttentionTarget, fit: Any) -> Value:
        """`visual_columns_loss`, a mean over images."""
        views = target.views
        # [I, G, 1, M]; all rows where some are not fed
        received = (
            _of_images(seen.attention["columns"], seen.batch)
            if views is None
            else views.seen("columns", seen.attention, summed=seen.fed is None)
        )
        if seen.fed is not None:
            received = (row_weights(target)[:, None, :, None] * received).sum(dim=2, keepdim=True)
        columns = received[:, :, 0] @ target.student_pool  # [I, G, C]
        loss = visual_columns_loss(
            columns if views is None else views.sums(columns),
            target.teacher,
            kind=seen.losses.visual_columns_kind,
            token_mask=target.content,
            sinks=target.sinks,
            reduction=_reduction(seen.losses),
            sample_index=None if views is None else views.sample,
        )
        return loss, {}


@dataclass(frozen=True, kw_only=True)
class MapTerm(AttentionTerm):
    """The map of visual tokens by visual tokens; its `fit` is whether the cache holds each pair's own value."""

    by_pair: ClassVar[bool] = True
    visual_rows: ClassVar[VisualRows | None] = "causal"
    by_picture: ClassVar[bool] = True

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

        def one(part: Meeting, grid: CommonGrid) -> AttentionTarget:
            own = [view for view, (first, end) in decoded if part.teacher_tokens[0] <= first < part.teacher_tokens[1]]
            found = own[0]
            if not grid.is_teachers or len(own) > 1:
                coarser = f"{sides.where}: a student whose visual tokens are coarser than the map's"
                values = _pooled([view.whole(coarser) for view in own], grid.teacher_pool)  # [G, C, C]
                found = TeacherMap.from_maps(values, token_mask=grid.content)
            pairs = image_pairs(found.values, grid.content)
            return AttentionTarget(
                found.values * pairs,
                grid.student_pool,
                grid.content,
                kept=found.kept & pairs,
                complete=found.complete,
            )

        return by_picture(cells, sides.student_tiles, one)

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """Visual tokens by visual tokens."""
        if target.views is not None:
            return target.views.requests("visual", batch, groups)
        return {"visual": AttentionRequest(batch.keys, batch.keys, groups)}

    def measured(self, losses: LossWeights, fit: bool) -> tuple[str, ...]:
        """The shares of pairs, and of the teacher's mass where it is known, that the sink filter removes."""
        if losses.visual_map_kind != SINK_FILTERED:
            return ()
        return ("sink_pairs", "sink_mass") if fit else ("sink_pairs",)

    def value(self, seen: Seen, target: AttentionTarget, fit: bool) -> Value:
        """`visual_map_loss`, a mean over images, and `sink_shares`."""
        assert target.kept is not None
        student = pool_map(_maps(seen, target), target)  # [I, G, C, C]
        sample_index = None if target.views is None else target.views.sample
        teacher = TeacherMap(target.teacher, target.kept, target.complete)
        losses = seen.losses
        kind = losses.visual_map_kind
        reduction = _reduction(losses, published="sum" if kind == SINK_FILTERED else "mean")
        loss = visual_map_loss(
            student, teacher, kind=kind, token_mask=target.content, reduction=reduction, sample_index=sample_index
        )
        if kind != SINK_FILTERED:
            return loss, {}
        shares = sink_shares(student, teacher, token_mask=target.content, sample_index=sample_index)
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
        _check_text_rows(_cached_rows(record, self.reads[1]), encoded, where=where)

    def target(self, sides: Sides) -> AttentionTarget:
        """Visual and text rows on the cells of the text rows, on which alone both can be compared.

        Text rows were pooled to a grid over the picture when they were cached; the map goes through the same grid,
        its keys by sum and its queries by mean, and so do the student's tokens.
        """
        visual, of_text = self.reads
        text = _rows_target(sides, of_text)
        cells, decoded = _decoded_map(sides, visual)
        cached = sides.codecs[of_text].cells_of(sides.teacher_tiles)
        grid = meet_cells(cached, sides.student_tiles)
        pool = overlap_matrix(tile_boxes(cells), tile_boxes(cached)) @ grid.teacher_pool  # [N_t, C]
        values = _pooled([view.whole(f"{sides.where}: the loss all_attention") for view, _ in decoded], pool)
        several = len(views_of(sides.student_tiles)) > 1
        return AttentionTarget(
            values,
            grid.student_pool,
            grid.content,
            text=text.teacher,
            views=views_of_student(sides.student_tiles) if several else None,
        )

    def requests(self, batch: TrainingBatch, target: AttentionTarget, groups: Groups, fit: Any) -> Requests:
        """All text rows by visual tokens, and visual tokens by visual tokens."""
        text = {"text": _text_request("text", batch, groups)}
        if target.views is not None:
            return {**text, **target.views.requests("visual", batch, groups)}
        return {**text, "visual": AttentionRequest(batch.keys, batch.keys, groups)}

    def value(self, seen: Seen, target: AttentionTarget, fit: Any) -> Value:
        """`all_attention_loss`, a mean over images."""
        assert target.text is not None
        student = pool_map(_maps(seen, target), target)  # [I, G, C, C]
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


def _cached_rows(record: Record, signal: str) -> int:
    """Rows of the text whose attention a record holds; those of format version 2 have an entry for each view."""
    held: Any = record[signal]
    if not isinstance(held, np.ndarray) or "tile_pictures" not in record:
        return len(held)
    of_frames = record.get("text_frames", held[:0])
    frames = [view.is_frame for view in views_of(tiles_of(record))] if len(record["tiles"]) else []
    if len(of_frames):
        return len(of_frames) // max(1, sum(frames))
    return len(held) // max(1, len(frames))


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
    cached = codec.cells_of(sides.teacher_tiles)
    grid = meet_cells(cached, sides.student_tiles)
    decoded = regroup_rows(sides.decode(signal), sides.match)
    cells, mass = decoded.cells, decoded.image_mass
    if cells.shape[-1] != len(grid.teacher_pool):
        raise CacheMismatchError(
            f"{sides.where}: {signal} covers {cells.shape[-1]} cells, the record's tiles {len(grid.teacher_pool)}; "
            "run `cachectl verify --deep` on the cache, then build the damaged shard again"
        )
    if sides.own is not sides.record:
        rows = len(Sides.decode(replace(sides, record=sides.own), signal))
        chosen = torch.arange(rows) % max(1, cells.shape[0])
        cells, mass = cells[chosen], mass[chosen]
    pooled = pool_keys(cells, grid.teacher_pool)
    if any(not part.student for part in meetings(cached, sides.student_tiles)):
        mass = pooled.sum(dim=-1)  # pictures that the student does not see do not count
    return AttentionTarget(pooled, grid.student_pool, grid.content, image_mass=mass)


def _by_view(tiles: tuple[Tile, ...], cells: tuple[Tile, ...]) -> list[tuple[tuple[Tile, ...], tuple[Tile, ...]]]:
    """A teacher's tiles and the cached cells over them, of each view."""
    views = views_of(tiles)
    return [(tiles, cells)] if len(views) <= 1 else [(of_view(tiles, view), of_view(cells, view)) for view in views]


def _sinks_of_cells(found: SinkMap, tiles: tuple[Tile, ...], cells: tuple[Tile, ...]) -> Floats:
    """Sink scores of the cells over one view, float64 ``[C]``."""
    if found.places == "cell":
        return found.on(cells)
    return mean_over(found.on(tiles), box_array(tiles), box_array(cells))


def _on_views(found: SinkMap, tiles: tuple[Tile, ...]) -> Floats:
    """Sink scores of the visual tokens of all views, float64 ``[N]``: the places of each are those of a picture alone."""
    views = views_of(tiles)
    return found.on(tiles) if len(views) <= 1 else np.concatenate([found.on(of_view(tiles, view)) for view in views])


def _maps(seen: Seen, target: AttentionTarget) -> Tensor:
    """The student's visual maps, of samples or of views."""
    if target.views is None:
        return _of_images(seen.attention["visual"], seen.batch)
    return target.views.seen("visual", seen.attention)


def _mean_of_cells(scores: Floats, grid: CommonGrid) -> Tensor:
    """Scores of the teacher's side of a common grid as those of its cells, float32 ``[C]``: means weighted by area."""
    return pool_queries(torch.from_numpy(scores).float()[:, None], grid.teacher_pool)[:, 0]


def _decoded_map(sides: Sides, signal: str) -> tuple[tuple[Tile, ...], list[tuple[TeacherMap, tuple[int, int]]]]:
    """A map's cells, and of each view the map of the wanted layer groups and its cells: the first, and the end."""
    codec: VisualMapCodec = sides.codecs[signal]
    cells, decoded = codec.cells_of(sides.teacher_tiles), sides.decode(signal)
    maps = decoded if isinstance(decoded, tuple) else (decoded,)
    views = views_of(cells)
    parts = [cells] if len(views) <= 1 else [of_view(cells, view) for view in views]
    sides.check_tokens(signal, sum(view.values.shape[-1] for view in maps), cells)
    found, at = [], 0
    for view, own in zip(maps, parts, strict=True):
        sides.check_tokens(signal, view.values.shape[-1], own)
        content = content_mask(tile_boxes(own))
        end = at + view.values.shape[-1]
        found.append((regroup_map(view, sides.match, content=content, wanted_by=sides.where), (at, end)))
        at = end
    return cells, found


def _pooled(maps: Sequence[Tensor], pool: Tensor) -> Tensor:
    """Maps of views, each of its own tokens, on common cells: keys by sum, queries by mean over the tokens of all of them.

    Args:
        pool: Of the tokens of all views, one behind the other, float32 ``[N_t, C]``.
    """
    if len(maps) == 1:
        return pool_queries(pool_keys(maps[0], pool), pool)
    parts = pool.split([view.shape[-1] for view in maps])
    total = pool.sum(dim=0)
    total = torch.where(total > 0, total, torch.ones_like(total))
    return torch.stack([(own / total).T @ (view @ own) for view, own in zip(maps, parts, strict=True)]).sum(dim=0)


def _text_request(of: TextRows, batch: TrainingBatch, groups: Groups) -> AttentionRequest:
    return AttentionRequest(batch.rows if of == "answer" else batch.text_rows, batch.keys, groups)


def _student_rows(of: TextRows, seen: Seen, target: AttentionTarget) -> tuple[Tensor, Tensor]:
    """The student's rows on the common cells ``[A', G, C]``, and the sample with an image each belongs to."""
    batch = seen.batch
    rows = (batch.rows if of == "answer" else batch.text_rows)[batch.has_image]  # [I, R]
    cells = student_cells(_of_images(seen.attention[of], batch), target, rows)
    return cells, (rows >= 0).nonzero()[:, 0].to(cells.device, non_blocking=True)


def _of_images(attention: Tensor, batch: TrainingBatch) -> Tensor:
    """Attention of the samples with an image: ``[B, ...]`` to ``[I, ...]``, not copied where all have one."""
    if len(batch.has_image) == len(attention):
        return attention
    return attention[batch.has_image.to(attention.device, non_blocking=True)]
