"""The teacher's cached gaze on a student's own visual tokens: by what tokens may be chosen, and a regression that expects it.

Dims: A answer rows, G layer groups, C cells of the cached grid, N visual tokens of a student, D features of a token,
I pictures of a batch, B batch, M most visual tokens of a sample.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.attention.tiles import Tile
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.batches.signals import LossTerm, Seen, Sides, Value

GAZE = "gaze"
"""The name of the teacher's gaze among a batch's targets; it is no loss."""
FLOOR = 1e-2  # of a uniform gaze: what is looked at less counts as that, so that one cell of mass 0 is no outlier
RIDGE = 0.01  # of the variance of a feature


def gaze_on(cells: Tensor, grids: Sequence[Tile], tiles: Sequence[Tile]) -> Tensor:
    """How a gaze over grids on the pictures falls on visual tokens: the mass under each token's box.

    A token that lies in padding gets nothing. Where tiles show a part of the picture twice, each view gets that part's mass.

    Args:
        cells: float32 ``[C]``, mass on each cell, which is spread evenly over the cell, and over its frames.
        grids: The cells of each view, which cover whole pictures (``cells_of`` of the codec).
        tiles: The student's, on the same pictures.

    Returns:
        float32 ``[N]``, 0 or more.
    """
    boxes, over = tile_boxes(tiles).double(), tile_boxes(grids).double()
    clipped = torch.cat([boxes[:, :4].clamp(0.0, 1.0), boxes[:, 4:]], dim=1)
    low = torch.maximum(clipped[:, None, [0, 1, 4]], over[None, :, [0, 1, 4]])
    high = torch.minimum(clipped[:, None, [2, 3, 5]], over[None, :, [2, 3, 5]])
    per_cell = [tile.token_count / (tile.span[1] - tile.span[0]) for tile in grids for _ in range(tile.token_count)]
    shares = (high - low).clamp_min(0.0).prod(dim=-1) * torch.tensor(
        per_cell, dtype=torch.float64
    )  # [N, C], of each cell
    return ((shares @ cells.double()) * content_mask(boxes.float())).float()


@dataclass(frozen=True)
class Gaze:
    """The teacher's gaze in a batch.

    Attributes:
        scores: float32 ``[I, M]`` in the order of the visual tokens, NaN behind each picture's last one; of one sample ``[N]``.
        samples: Which sample of the batch each is of, int64 ``[I]``.
    """

    scores: Tensor
    samples: Tensor

    def of_batch(self, batch: TrainingBatch) -> Tensor:
        """float32 ``[B, M]``; NaN also throughout where a sample has none."""
        whole: Tensor = self.scores.new_full(batch.keys.shape, float("nan"))
        whole[self.samples, : self.scores.shape[1]] = self.scores
        return whole


@dataclass(frozen=True, kw_only=True)
class GazeTerm(LossTerm):
    """Where the teacher looked while it answered, the mean over answer rows and layer groups; read like a loss, but none."""

    reads: tuple[str, ...] = (RowAttentionCodec.signal,)

    def target(self, sides: Sides) -> Tensor:
        """float32 ``[N]``; NaN where the teacher did not look at the picture, so that the student chooses itself."""
        cells = sides.decode(self.reads[0]).cells.float()  # [A, G, C]
        mean: Tensor = cells.mean(dim=(0, 1)) if len(cells) else cells.new_zeros(cells.shape[2])
        gaze = gaze_on(mean, sides.codecs[self.reads[0]].cells_of(sides.teacher_tiles), sides.student_tiles)
        return gaze if float(gaze.sum()) > 0 else torch.full_like(gaze, float("nan"))

    def collate(self, targets: Sequence[Tensor], places: Sequence[int]) -> Gaze:
        """Pad to the most visual tokens."""
        scores = torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=float("nan"))
        return Gaze(scores, torch.tensor(places, dtype=torch.int64))

    def value(self, seen: Seen, target: Any, fit: Any) -> Value:
        """Never asked for."""
        raise NotImplementedError("the gaze chooses tokens; it is no loss")


def fit_gaze(samples: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]], *, where: str) -> dict[str, Any]:
    """A ridge regression from features of visual tokens to the logarithm of the gaze on them, in closed form.

    The gaze is taken relative to a uniform one over the picture's tokens. Features are scaled to a variance of 1 before the
    penalty is added, so that it does not depend on their units.

    Args:
        samples: Of each picture features ``[N, D]`` and gaze ``[N]`` (0 or more, of any sum above 0).
        where: What they are of, for errors.

    Returns:
        JSON: ``weights`` ``[D]`` and ``bias``, of the features as they are.

    Raises:
        CacheMismatchError: If there is no picture that was looked at, or numbers are not finite.
    """
    total, sums, products, moments, target = 0, None, None, None, 0.0
    for features, gaze in samples:
        x = np.asarray(features, np.float64)
        share = np.asarray(gaze, np.float64)
        if not share.sum() > 0:
            continue
        y = np.log(np.maximum(share * (len(share) / share.sum()), FLOOR))
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise CacheMismatchError(
                f"token_selection=gaze: {where}: features of the vision tower or the cached gaze are not finite, so nothing can "
                "be fitted; choose token_selection=attention, sinks, grid or random"
            )
        parts = x.sum(axis=0), x.T @ x, x.T @ y
        sums, products, moments = (
            parts if sums is None else (sums + parts[0], products + parts[1], moments + parts[2])  # type: ignore[operator]
        )
        total, target = total + len(y), target + float(y.sum())
    if sums is None or products is None or moments is None:
        raise CacheMismatchError(
            f"token_selection=gaze: {where}: no sample has a picture that the teacher looked at, so nothing can be fitted; "
            "choose token_selection=attention, sinks, grid or random"
        )
    mean, level = sums / total, target / total
    covariance = products / total - np.outer(mean, mean)
    scale = np.sqrt(np.clip(np.diag(covariance), 0.0, None))
    scale = np.where(scale > 1e-9 * max(1.0, float(np.abs(mean).max())), scale, np.inf)  # a constant says nothing
    ridge = np.diag(np.full(len(mean), RIDGE))
    solved = np.linalg.solve(covariance / np.outer(scale, scale) + ridge, (moments / total - mean * level) / scale)
    weights = solved / scale
    return {"weights": [float(value) for value in weights.astype(np.float32)], "bias": float(level - mean @ weights)}
