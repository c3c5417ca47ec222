"""How the gaze moves while an answer is said: what the places that its first token looked at hold later on.

Dims: T tokens of one answer, C places on the picture, k kept places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.75


@dataclass(frozen=True, kw_only=True)
class GazeShift:
    """What `gaze_shift` finds of one answer; shares are of the gaze on the picture, NaN where a token has none.

    Attributes:
        first: Share of each token's gaze on the k places that token 0 looked at most, float64 ``[T]``.
        best: Share on the token's own best k places, the most that k places can hold, float64 ``[T]``.
        common: Share of its own best k places that are among token 0's, float64 ``[T]``; k / C if by chance.
        event: Whether the token shifts, bool ``[T]``.
        kept: The k places of token 0, int64 ``[k]``, ascending.
    """

    first: NDArray[np.float64]
    best: NDArray[np.float64]
    common: NDArray[np.float64]
    event: NDArray[np.bool_]
    kept: NDArray[np.int64]

    @property
    def measured(self) -> NDArray[np.bool_]:
        """Which tokens look at the picture at all, bool ``[T]``; none if token 0 does not."""
        return np.isfinite(self.first)


def kept_count(places: int) -> int:
    """How many places are kept of so many: a third, at least one."""
    return max(1, places // 3)


def gaze_shift(gaze: ArrayLike, *, keep: int | None = None, threshold: float = THRESHOLD) -> GazeShift:
    """Follow the gaze through one answer, and find the tokens at which a fixed choice of places fails.

    The kept set K begins as the best k places of token 0. Token t is a shift event if the share of its gaze on K is
    below ``threshold`` times the share on its own best k places; K then becomes these. Of places with equal gaze the one
    with the lower index is the better.

    Args:
        gaze: What each token's row looks at, float ``[T, C]``, at least 0; its sum need not be 1.
        keep: k; None: `kept_count` of C.

    Raises:
        ValueError: If ``gaze`` is not of that shape, or k not between 1 and C.

    Source:
        The rule is ours; that relevance shifts while an answer is decoded: arXiv 2604.12358 (DSTP), whose own rule could
        not be read.
    """
    rows = np.asarray(gaze, np.float64)
    if rows.ndim != 2 or not rows.shape[1]:
        raise ValueError(f"gaze_shift: expected gaze [T, C] of at least one place, got {[*rows.shape]}")
    tokens, places = rows.shape
    k = kept_count(places) if keep is None else keep
    if not 1 <= k <= places:
        raise ValueError(f"gaze_shift: expected k from 1 to {places}, got {k}")
    mass = rows.sum(axis=1, keepdims=True)
    seen = mass[:, 0] > 0
    shares = np.divide(rows, mass, out=np.full_like(rows, np.nan), where=mass > 0)
    if not tokens or not seen[0]:
        nothing = np.full(tokens, np.nan)
        no_set = np.zeros(0, np.int64)
        return GazeShift(first=nothing, best=nothing, common=nothing, event=np.zeros(tokens, bool), kept=no_set)
    own = np.argsort(-shares, axis=1, kind="stable")[:, :k]  # [T, k]
    is_own = np.zeros((tokens, places), bool)
    np.put_along_axis(is_own, own, values=True, axis=1)
    best = np.where(is_own, shares, 0).sum(axis=1)
    first = np.where(is_own[0], shares, 0).sum(axis=1)  # in the order of places: equal sets hold equal shares
    common = (is_own & is_own[0]).sum(axis=1) / k
    event, kept = np.zeros(tokens, bool), is_own[0]
    for token in np.flatnonzero(seen):
        if np.where(kept, shares[token], 0).sum() < threshold * best[token]:
            event[token], kept = True, is_own[token]
    unseen = np.where(seen, 0.0, np.nan)
    return GazeShift(
        first=first + unseen, best=best + unseen, common=common + unseen, event=event, kept=np.flatnonzero(is_own[0])
    )


class Interval(NamedTuple):
    """A ratio of sums over samples, and where 95 % of those of resampled samples lie; all NaN if it divides by 0."""

    value: float
    low: float
    high: float


_RESAMPLES, _AT_A_TIME = 2000, 250


def ratio_intervals(sums: NDArray[np.float64], counts: NDArray[np.float64], *, seed: int = 0) -> list[Interval]:
    """Means over what samples hold several of, with an interval from drawing samples (not tokens) again.

    Args:
        sums, counts: Of each sample and figure, float64 ``[I, F]``; the figure is the sum of the first over that of the
            second.

    Returns:
        One a figure. Resamples in which nothing is counted are left out; an interval of one sample has no width.

    Source:
        Efron 1979, the percentile method, 2000 resamples, as the scores of students have it.
    """
    items, figures = sums.shape
    if not items:
        return [Interval(np.nan, np.nan, np.nan)] * figures
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(_RESAMPLES // _AT_A_TIME):
        often = rng.multinomial(items, np.full(items, 1 / items), size=_AT_A_TIME).astype(np.float64)
        found.append(_ratio(often @ sums, often @ counts))
    values = _ratio(sums.sum(axis=0), counts.sum(axis=0))
    drawn = np.concatenate(found)  # [S, F]
    intervals = []
    for value, column in zip(values, drawn.T, strict=True):
        low, high = np.quantile(column[np.isfinite(column)], (0.025, 0.975)) if np.isfinite(value) else (np.nan, np.nan)
        intervals.append(Interval(float(value), float(low), float(high)))
    return intervals


def _ratio(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
