"""Visual tokens that attract attention whatever the picture shows: scores of places, and where they lie for other layouts.

A **place** is what stays the same from picture to picture. Where all pictures have equal layouts of visual tokens it is a
token of the layout; where pictures differ in the number of tiles, but not in the tiles' own grids, it is a place in a tile,
each tile being one picture more; elsewhere, and for attention that was pooled to a grid when it was cached, it is a cell of a
grid over the picture. No torch in here.

Dims: P pictures, N places of the map or visual tokens of a picture.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, SLIVER, Tile, box_array, carries_image, grid_tile

GAMMA = 1.1
"""The published exponent."""
Places = Literal["token", "tile", "cell"]
PLACES: tuple[Places, ...] = get_args(Places)
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


def sink_scores(attention: npt.ArrayLike, gamma: float = GAMMA, *, present: npt.ArrayLike | None = None) -> Floats:
    """How much each place is a sink: minmax of (mean over pictures of the attention that it receives) to the power gamma.

    Args:
        attention: What each place of each picture receives, at least 0, float ``[P, N]``.
        present: Where a place carries image, bool ``[P, N]``: the mean is over these pictures; a place that never does gets 0.
            None: everywhere.

    Returns:
        float64 ``[N]``, 0 for the place that receives least and 1 for the one that receives most; all 0 where all receive
        the same, or there are no pictures.

    Source:
        SToP (arXiv:2604.20937) and its released code, which takes the power of the mean.
    """
    values = np.asarray(attention, np.float64)
    shown = np.ones(values.shape, bool) if present is None else np.asarray(present, bool)
    powered: Floats = mean_received(values, shown) ** gamma
    seen = shown.any(axis=0)
    low, high = (float(bound(powered[seen], initial=start)) for bound, start in ((np.min, np.inf), (np.max, -np.inf)))
    if not seen.any() or high <= low:
        return np.zeros(values.shape[1])
    return np.where(seen, (powered - low) / (high - low), 0.0)


def mean_received(attention: Floats, present: Flags) -> Floats:
    """The mean over the pictures in which a place carries image, ``[N]``; 0 for a place that never does."""
    found: Floats = np.where(present, attention, 0.0).sum(axis=0) / np.maximum(present.sum(axis=0), 1)
    return found


def are_sinks(received: Floats, content: Flags) -> Flags:
    """Which tokens of one picture receive more than the mean plus one (unbiased) standard deviation, bool ``[N]``.

    Only those that carry image count, of which there must be two at least.

    Source:
        The threshold of CompoDistill's released sink filter (arXiv:2510.12184).
    """
    inside = received[content]
    if len(inside) < 2:
        return np.zeros(len(received), bool)
    above: Flags = content & (received > inside.mean() + inside.std(ddof=1))
    return above


@dataclass(frozen=True, eq=False)
class SinkMap:
    """The sinks of one teacher, as the pictures of a cache show them.

    Attributes:
        places: What a place is.
        tiles: Their layout: tiles in reading order; of ``tile``, one tile over its own frame; of ``cell``, a grid over the
            picture. Of ``token``, regions are those of the first picture.
        pictures: How many were looked at; of ``tile``, how many tiles.
        received: Mean attention that each place receives, float64 ``[N]``.
        often: In how many pictures each place is one of `are_sinks`, int64 ``[N]``.
        scores: `sink_scores`, float64 ``[N]``.
    """

    places: Places
    tiles: tuple[Tile, ...]
    pictures: int
    received: Floats
    often: npt.NDArray[np.int64]
    scores: Floats

    @property
    def shares(self) -> Floats:
        """Each place's share of all attention that the places receive, float64 ``[N]``."""
        total = float(self.received.sum())
        return self.received / total if total > 0 else np.zeros(len(self.received))

    @property
    def order(self) -> npt.NDArray[np.int64]:
        """Places by score, the largest first; of equal ones the first in reading order."""
        return np.argsort(-self.scores, kind="stable")

    def on(self, tiles: Sequence[Tile]) -> Floats:
        """The score of each visual token of a picture, float64 ``[N]``.

        A token of a coarser or finer grid has the mean of the places that it covers, weighted by area. Tokens are compared
        within the frame of their tile, since a tower's sinks are places of its own grid, padding or not; where the tiles
        differ in number, and for cells, by the part of the picture that they see. A token that meets no place has 0.
        """
        if self.places == "tile":
            return np.concatenate([np.zeros(0), *(self._in_frame(self.tiles[0], tile, self.scores) for tile in tiles)])
        if self.places == "cell" or len(tiles) != len(self.tiles):
            return mean_over(self.scores, box_array(self.tiles), box_array(tiles))
        ends = np.cumsum([tile.token_count for tile in self.tiles])[:-1]
        parts = np.split(self.scores, ends)
        found = [self._in_frame(*three) for three in zip(self.tiles, tiles, parts, strict=True)]
        return np.concatenate([np.zeros(0), *found])

    @staticmethod
    def _in_frame(ours: Tile, theirs: Tile, scores: Floats) -> Floats:
        if (ours.rows, ours.cols) == (theirs.rows, theirs.cols):
            return scores
        boxes = (box_array((grid_tile(tile.rows, tile.cols),)) for tile in (ours, theirs))
        return mean_over(scores, *boxes)


def find_sinks(
    pictures: Sequence[tuple[tuple[Tile, ...], npt.ArrayLike]], *, grid: tuple[int, int] | None = None
) -> SinkMap | None:
    """Find the sinks of a teacher from what its visual tokens receive.

    Args:
        pictures: Of each picture its tiles, and the attention that each visual token receives, float ``[N]``.
        grid: Rows and columns of a grid over the picture, if that is what the numbers are about.

    Returns:
        None without a picture that has any attention.
    """
    found = [(tiles, np.asarray(received, np.float64)) for tiles, received in pictures]
    found = [(tiles, received) for tiles, received in found if received.any()]
    if not found:
        return None
    shapes = {tuple((tile.rows, tile.cols) for tile in tiles) for tiles, _ in found}
    places: Places
    layout: tuple[Tile, ...]
    if grid is not None:
        places, layout = "cell", (grid_tile(*grid),)
        rows = [(received, np.ones(len(received), bool)) for _, received in found]
    elif len(shapes) == 1:
        places, layout = "token", found[0][0]
        rows = [(received, carries_image(box_array(tiles))) for tiles, received in found]
    elif len({shape for shapes_of_one in shapes for shape in shapes_of_one}) == 1:
        first = found[0][0][0]
        places, layout = "tile", (grid_tile(first.rows, first.cols),)
        rows = [
            (part, carries_image(box_array((tile,))))
            for tiles, received in found
            for tile, part in zip(tiles, np.split(received, len(tiles)), strict=True)
        ]
    else:
        places, layout = "cell", (grid_tile(FINEST_SIDE, FINEST_SIDE),)
        shown = np.ones(FINEST_SIDE**2, bool)
        rows = [(on_cells(tiles, received, FINEST_SIDE), shown) for tiles, received in found]
    attention, present = (np.stack(part) for part in zip(*rows, strict=True))
    often = np.stack([are_sinks(*row) for row in rows]).sum(axis=0, dtype=np.int64)
    return SinkMap(
        places=places,
        tiles=layout,
        pictures=len(rows),
        received=mean_received(attention, present),
        often=often,
        scores=sink_scores(attention, present=present),
    )


def on_cells(tiles: Sequence[Tile], received: Floats, side: int) -> Floats:
    """What each cell of a grid of ``side`` by ``side`` over the picture receives, float64 ``[side * side]``.

    As ``received @ overlaps(...)``, in a time that does not grow with the product of tokens and cells.
    """
    total = np.zeros((side, side))
    ends = np.cumsum([tile.token_count for tile in tiles])[:-1]
    for tile, part in zip(tiles, np.split(received, ends), strict=True):
        kept = np.where(carries_image(box_array((tile,))), part, 0.0).reshape(tile.rows, tile.cols)
        x0, y0, x1, y1 = tile.region
        total += _line_shares(tile.rows, y0, y1, side).T @ kept @ _line_shares(tile.cols, x0, x1, side)
    return total.ravel()


def _line_shares(parts: int, low: float, high: float, side: int) -> Floats:
    """Of each of equal parts of a line, the share of what lies in [0, 1] in each of ``side`` equal ones, ``[parts, side]``."""
    edges = np.clip(low + (high - low) * np.arange(parts + 1) / parts, 0.0, 1.0)
    marks = np.arange(side + 1) / side
    shared = np.minimum(edges[1:, None], marks[None, 1:]) - np.maximum(edges[:-1, None], marks[None, :-1])
    length = np.maximum(np.diff(edges), np.finfo(np.float64).tiny)[:, None]
    shares = np.where(shared > SLIVER * length, shared / length, 0.0)
    total = shares.sum(axis=1, keepdims=True)
    return shares / np.where(total > 0, total, 1.0)


def overlaps(source: npt.ArrayLike, target: npt.ArrayLike) -> Floats:
    """The share of each source box's picture area that falls on each target box, float64 ``[N, C]``.

    As `common.attention.boxes.overlap_matrix`, in numpy: rows sum to 1, or to 0 for boxes in padding.
    """
    boxes = np.asarray(source, np.float32)
    ours, theirs = (np.clip(np.asarray(part, np.float64), 0.0, 1.0) for part in (boxes, target))
    low = np.maximum(ours[:, None, :2], theirs[None, :, :2])
    high = np.minimum(ours[:, None, 2:], theirs[None, :, 2:])
    area = (ours[:, 2:] - ours[:, :2]).prod(axis=1)
    shares = np.clip(high - low, 0.0, None).prod(axis=2) / np.maximum(area, np.finfo(np.float64).tiny)[:, None]
    shares = np.where((shares > SLIVER) & carries_image(boxes)[:, None], shares, 0.0)
    total = shares.sum(axis=1, keepdims=True)
    return shares / np.where(total > 0, total, 1.0)


def mean_over(values: Floats, source: npt.ArrayLike, target: npt.ArrayLike) -> Floats:
    """The mean of the values of source boxes that each target box covers, weighted by shared area, float64 ``[C]``."""
    weights = overlaps(target, source)  # [C, N]
    found: Floats = weights @ values
    return found
