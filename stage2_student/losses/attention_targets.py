"""The two sides of a loss on attention: the teacher's on the common cells, and what brings the student's there.

Columns and maps of a sample with several pictures are compared picture by picture, so that nothing grows with the square of
a sample's visual tokens.

Dims: A supervised rows, X text rows, R most rows of a sample, G layer groups, N_s student visual tokens, M most visual tokens
of a sample, C common cells, I samples with an image. Where one has several pictures: U pictures of all samples, V views of
the student's, M_v most visual tokens of a view.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlm_distill_cache.common.attention.capture import AttentionRequest
from vlm_distill_cache.common.attention.layers import Groups
from vlm_distill_cache.common.attention.tiles import Tile, views_of
from vlm_distill_cache.common.codecs.live import image_pairs
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.grid import CommonGrid, Meeting, meet_alone, meetings
from vlm_distill_cache.stage2_student.losses.attention import has_mass


@dataclass(frozen=True)
class Views:
    """What is compared picture by picture, of a sample or a batch where a sample has several.

    What is compared as one is a meeting (`batches.grid`): a picture, or frames that the two sides part differently. Each of
    the student's views looks at its own tokens alone, as the teacher's views did when they were cached.

    Attributes:
        tokens: Of each of V views the row of the batch, and its visual tokens there: the first, and the end.
        slots: The number of each view in its sample.
        picture: Which of U pictures each view belongs to, int64 ``[V]``.
        sample: Which of I samples each picture belongs to, int64 ``[U]``.
    """

    tokens: tuple[tuple[int, int, int], ...]
    slots: tuple[int, ...]
    picture: Tensor
    sample: Tensor

    @property
    def widest(self) -> int:
        """Most visual tokens of a view, M_v."""
        return max(end - first for _, first, end in self.tokens)

    def keys(self, batch: TrainingBatch, slot: int) -> Tensor:
        """Positions of the visual tokens of each sample's view of this number, int64 ``[B, M_k]``, padding -1."""
        chosen = [tokens for tokens, number in zip(self.tokens, self.slots, strict=True) if number == slot]
        found = batch.keys.new_full((len(batch.keys), max(end - first for _, first, end in chosen)), -1)
        for row, first, end in chosen:
            found[row, : end - first] = batch.keys[row, first:end]
        return found

    def requests(
        self, name: str, batch: TrainingBatch, groups: Groups, weights: Tensor | None = None
    ) -> dict[str, AttentionRequest]:
        """The visual tokens of each view by themselves, a request for each number.

        Args:
            weights: Of the rows of each view, float32 ``[V, M_v]``; None: the rows.
        """
        found = {}
        for slot in sorted(set(self.slots)):
            keys, own = self.keys(batch, slot), None
            if weights is not None:
                own = weights.new_zeros(keys.shape)
                for view, ((row, first, end), number) in enumerate(zip(self.tokens, self.slots, strict=True)):
                    if number == slot:
                        own[row, : end - first] = weights[view, : end - first]
            found[f"{name}.{slot}"] = AttentionRequest(keys, keys, groups, own)
        return found

    def seen(self, name: str, attention: Mapping[str, Tensor], *, summed: bool = False) -> Tensor:
        """What `requests` brought, a view each: float32 ``[V, G, M_v, M_v]``; where rows were ``summed`` ``[V, G, 1, M_v]``."""
        found = []
        for (row, first, end), slot in zip(self.tokens, self.slots, strict=True):
            own, count = attention[f"{name}.{slot}"][row], end - first  # [G, M_k or 1, M_k]
            missing, rows = self.widest - count, 1 if summed else count
            found.append(F.pad(own[:, :rows, :count], (0, missing, 0, 0 if summed else missing)))
        return torch.stack(found)

    def sums(self, values: Tensor) -> Tensor:
        """Sums over the views of each picture: ``[V, ...]`` to ``[U, ...]``."""
        return values.new_zeros(len(self.sample), *values.shape[1:]).index_add(0, self.picture, values)

    def own_parts(self, fed: Tensor) -> Tensor:
        """What each visual token stands for in its own view: ``[I, M, M]`` to ``[V, M_v, M_v]``, rows that sum to 1 or 0."""
        widest, owner = self.widest, self.sample[self.picture].tolist()
        found = [
            F.pad(fed[sample, first:end, first:end], (0, widest - (end - first)) * 2)
            for sample, (_, first, end) in zip(owner, self.tokens, strict=True)
        ]
        stacked = torch.stack(found)
        total = stacked.sum(dim=2, keepdim=True)
        return stacked / torch.where(total > 0, total, torch.ones_like(total))

    @staticmethod
    def joined(parts: "Sequence[Views]", places: Sequence[int]) -> "Views":
        """Those of a batch; ``places``: the row of each sample."""
        pictures = [0, *np.cumsum([len(part.sample) for part in parts]).tolist()]
        return Views(
            tokens=tuple(
                (place, first, end) for part, place in zip(parts, places, strict=True) for _, first, end in part.tokens
            ),
            slots=tuple(slot for part in parts for slot in part.slots),
            picture=torch.cat([part.picture + start for part, start in zip(parts, pictures, strict=False)]),
            sample=torch.cat([torch.full_like(part.sample, number) for number, part in enumerate(parts)]),
        )


def views_of_student(student: Sequence[Tile], parts: Sequence[Meeting] | None = None) -> Views:
    """Of one sample; without ``parts`` all its views are of one picture."""
    tokens, picture, at = [], [], 0
    for number, tiles in enumerate([student] if parts is None else [part.student for part in parts]):
        at = at if parts is None else parts[number].student_tokens[0]
        for view in views_of(tiles):
            count = sum(tile.token_count for tile in tiles if tile.span == view.span)
            tokens.append((0, at, at + count))
            picture.append(number)
            at += count
    pictures = 1 if parts is None else len(parts)
    return Views(
        tuple(tokens), tuple(range(len(tokens))), torch.tensor(picture), torch.zeros(pictures, dtype=torch.int64)
    )


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
        views: Of columns and maps where a sample has several pictures; else None. With it ``[U, ...]`` takes the place of
            ``[I, ...]``, of a sample too, and ``student_pool`` is float32 ``[V, M_v, C]``; only beside rows of the text, which
            look at all pictures, both stay those of samples.
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
    views: Views | None = None

    def view_pools(self) -> Tensor:
        """`student_pool` of each view, float32 ``[V, M_v, C]``; of targets with `views`."""
        assert self.views is not None
        if self.text is None:
            return self.student_pool
        owner, widest = self.views.sample[self.views.picture].tolist(), self.views.widest
        return torch.stack(
            [
                F.pad(self.student_pool[sample, first:end], (0, 0, 0, widest - (end - first)))
                for sample, (_, first, end) in zip(owner, self.views.tokens, strict=True)
            ]
        )

    def of_fed(self, fed: Tensor) -> "AttentionTarget":
        """A batch's target for a student that feeds fewer visual tokens: cells that none of them sees do not count.

        Args:
            fed: What each visual token stands for, float32 ``[I, M, M]``, rows that sum to 1, or to 0 of those not fed.
        """
        fed, by_view = fed.to(self.student_pool), self.views is not None and self.text is None
        if by_view and self.views is not None:
            fed = self.views.own_parts(fed)
        pool = fed @ self.student_pool  # [I, M, C]
        touched = pool.sum(dim=1)
        touched = (self.views.sums(touched) if by_view and self.views is not None else touched) > 0
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


def by_picture(
    teacher: tuple[Tile, ...], student: tuple[Tile, ...], one: Callable[[Meeting, CommonGrid], AttentionTarget]
) -> AttentionTarget:
    """What `one` makes of each meeting of two layouts; of a picture alone as it is, of several joined, with their `Views`."""
    parts = [part for part in meetings(teacher, student) if part.student and part.teacher]
    found = [one(part, meet_alone(part.teacher, part.student)) for part in parts]
    views = views_of_student(student, parts)
    if len(found) == len(views.tokens) == 1:
        return found[0]
    cells, widest = max(target.student_pool.shape[1] for target in found), views.widest
    both = found[0].kept is not None
    pools = [
        F.pad(pool, (0, cells - pool.shape[1], 0, widest - len(pool)))
        for number, (target, part) in enumerate(zip(found, parts, strict=True))
        for pool in target.student_pool.split(
            [end - first for (_, first, end), own in zip(views.tokens, views.picture, strict=True) if own == number]
        )
    ]
    masks = [pad_cells(target.kept, cells, both=True) for target in found if target.kept is not None]
    sinks = [pad_cells(target.sinks, cells) for target in found if target.sinks is not None]
    return AttentionTarget(
        torch.stack([pad_cells(target.teacher, cells, both=both) for target in found]),
        torch.stack(pools),
        torch.stack([pad_cells(target.content, cells) for target in found if target.content is not None]),
        kept=torch.stack(masks) if masks else None,
        complete=all(target.complete for target in found),
        sinks=torch.stack(sinks) if sinks else None,
        views=views,
    )


def one_view(target: AttentionTarget) -> AttentionTarget:
    """A sample with one picture beside samples with several."""
    alone = Views(
        ((0, 0, len(target.student_pool)),), (0,), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    )
    if target.text is not None:
        return replace(target, views=alone)
    return replace(
        target,
        teacher=target.teacher[None],
        student_pool=target.student_pool[None],
        content=_alone(target.content),
        kept=_alone(target.kept),
        sinks=_alone(target.sinks),
        views=alone,
    )


def _alone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[None]


def sample_count(teacher: Tensor, views: Views | None) -> int:
    """Rows or samples on which the teacher has any mass."""
    present = has_mass(teacher)
    return int(present.sum()) if views is None else len(views.sample[present].unique())


def pad_cells(tensor: Tensor, cells: int, *, both: bool = False) -> Tensor:
    """Append empty cells to the last axis, or to the last two."""
    missing = cells - tensor.shape[-1]
    if missing == 0:
        return tensor
    return F.pad(tensor, (0, missing, 0, missing) if both else (0, missing))


def student_cells(attention: Tensor, target: AttentionTarget, rows: Tensor) -> Tensor:
    """The student's rows of the text on the common cells, in the order of the teacher's rows.

    Args:
        attention: float32 ``[I, G, R, M]``, absolute mass.
        rows: Row positions of these samples, int64 ``[I, R]``, padding -1; on the CPU, where they are counted without waiting.
    """
    pooled = attention @ target.student_pool[:, None]  # [I, G, R, C]
    by_row = pooled.transpose(1, 2)  # [I, R, G, C]
    places = (rows >= 0).nonzero(as_tuple=True)
    return by_row[tuple(place.to(by_row.device, non_blocking=True) for place in places)]


def pool_map(attention: Tensor, target: AttentionTarget) -> Tensor:
    """A visual x visual map on the common cells, keys by sum, queries by mean: ``[I, G, M, M]`` to ``[I, G, C, C]``.

    Rows of cells that no token touches are 0. Maps of views, ``[V, G, M_v, M_v]``, become those of pictures, ``[U, G, C, C]``.
    """
    if target.views is not None:
        pools = target.view_pools()
        share = pools / _touched(pools, target.views)[:, None]
        return target.views.sums(share[:, None].transpose(2, 3) @ (attention @ pools[:, None]))
    pool = target.student_pool[:, None]  # [I, 1, M, C]
    touched = pool.sum(dim=2, keepdim=True).clamp_min(torch.finfo(pool.dtype).tiny)
    return (pool / touched).transpose(2, 3) @ (attention @ pool)


def _touched(pools: Tensor, views: Views) -> Tensor:
    """How many tokens of its picture touch each cell of a view, float32 ``[V, C]``."""
    return views.sums(pools.sum(dim=1))[views.picture].clamp_min(torch.finfo(pools.dtype).tiny)


def row_weights(target: AttentionTarget) -> Tensor:
    """What each visual token counts in the mean of `pool_map` over cells that carry image, float32 ``[I, M]``, or ``[V, M_v]``."""
    pool = target.student_pool  # [I, M, C]
    touched = pool.sum(dim=1).clamp_min(torch.finfo(pool.dtype).tiny)  # [I, C]
    cells = torch.ones_like(touched) if target.content is None else target.content.to(pool.dtype)
    if target.views is not None:
        touched = _touched(pool, target.views)  # [V, C]
        cells = torch.ones_like(touched) if target.content is None else cells[target.views.picture]
    cells = cells / cells.sum(dim=1, keepdim=True).clamp_min(1.0)
    return (pool @ (cells / touched)[:, :, None])[:, :, 0]
