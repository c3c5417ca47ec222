"""Which visual tokens a student feeds into its language model: scores, choices and pools, pure functions.

Dims: M pictures, samples or tiles, N visual tokens of each, P places of a frame, D width.
"""

import hashlib
from collections.abc import Sequence
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor


def choose(scores: Tensor, k: int | Sequence[int]) -> Tensor:
    """The k best tokens of each row; of equal ones the first.

    Args:
        scores: Float ``[M, N]``; -inf is padding, which is never chosen.
        k: Of all rows, or of each.

    Returns:
        Bool ``[M, N]``.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )
    wanted = torch.as_tensor(k, device=order.device).reshape(-1, 1)
    return (ranks < wanted) & (scores != -torch.inf)


def without_sinks(attention: Tensor, sinks: Tensor, penalty: float) -> Tensor:
    """What is left of the attention that places receive, sinks held against them; all float ``[..., N]``.

    Source:
        SToP (arXiv 2604.20937): attention - mu_s * s, mu_s 0.02 to 0.04.
    """
    return attention - penalty * sinks


def predicted_gaze(features: Tensor, weights: Tensor, bias: float) -> Tensor:
    """The logarithm of the gaze that a linear regression expects, ``[..., D]`` to float32 ``[...]``; ours."""
    return features.float() @ weights.float() + bias


def picture_noise(pixels: Tensor, count: int, seed: int) -> Tensor:
    """Numbers that are always the same for the same picture, float32 ``[count]`` between 0 and 1, on the CPU.

    The pixels are rounded to bfloat16, so that models of either precision draw the same.
    """
    content = pixels.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    digest = hashlib.sha256(seed.to_bytes(8, "little", signed=True) + content).digest()
    drawn = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.rand(count, generator=drawn)


def pooled_grid(rows: int, cols: int, k: int) -> tuple[int, int]:
    """The largest grid of at most k cells, and no finer, whose cells are as square as a whole number of rows allows.

    The number of rows is that of square cells, rounded down or up; then as many columns as fit. Of two equally large
    grids it is the one nearer to the picture's shape.
    """
    exact = sqrt(k * rows / cols)
    found = []
    for r in {min(rows, k, max(1, int(exact))), min(rows, k, max(1, int(exact) + 1))}:
        c = min(cols, k // r)
        found.append((r * c, -abs(r * cols - c * rows), r, c))
    return max(found)[2:]


def pool_cells(row: Tensor, col: Tensor, rows: int, cols: int, k: int) -> Tensor:
    """Tokens of a grid pooled to at most k cells: which token stands for each, the middle one of its cell.

    The cells of `pooled_grid` do not overlap; their sides differ by at most one token.

    Args:
        row: int64 ``[N]``, of each token, -1 for one that is no place of the grid.
        col: int64 ``[N]``, likewise.

    Returns:
        int64 ``[N]``, indices of tokens; -1 for those that are no places. Where the middle of a cell has no token, its
        first stands for it.
    """
    r, c = pooled_grid(rows, cols, k)
    cell_row, cell_col = row * r // rows, col * c // cols
    cell = torch.where(row < 0, -1, cell_row * c + cell_col)
    # Row y is of cell y * r // rows, so cell i begins at ceil(i * rows / r).
    middle_row = (-(-cell_row * rows // r) + -(-(cell_row + 1) * rows // r) - 1) // 2
    middle_col = (-(-cell_col * cols // c) + -(-(cell_col + 1) * cols // c) - 1) // 2
    index = torch.arange(len(row), device=row.device)
    none = torch.full((r * c,), len(row), device=row.device)

    def first(of: Tensor) -> Tensor:
        """The first of some tokens in each cell, [r * c]; as many as there are tokens: none."""
        return none.scatter_reduce(0, cell[of], index[of], "amin")

    middle = first((row == middle_row) & (col == middle_col) & (row >= 0))
    chosen = torch.where(middle < len(row), middle, first(row >= 0))
    return torch.where(row < 0, -1, chosen[cell.clamp_min(0)])


def without(stands_for: Tensor, gone: Tensor) -> Tensor:
    """Take tokens out of pools: where the one that stood for others is gone, the first that is left of them does.

    Args:
        stands_for: Which token stands for each, int64 ``[M, N]``; -1: none.
        gone: Bool ``[M, N]``.

    Returns:
        int64 ``[M, N]``; -1 also for those that are gone.
    """
    count = stands_for.shape[1]
    stays, owner = (stands_for >= 0) & ~gone, stands_for.clamp_min(0)
    index = torch.arange(count, device=gone.device).expand_as(owner)
    none = torch.full_like(owner, count)
    first = none.scatter_reduce(1, owner, torch.where(stays, index, none), "amin")
    left = torch.where(stays.gather(1, owner), owner, first.gather(1, owner))
    return torch.where(stays, left, -1)


def split_budget(counts: Sequence[int], k: int) -> list[int]:
    """Divide k tokens among blocks of so many: in proportion, by largest remainders, of equal ones the first."""
    total = sum(counts)
    k = min(k, total)
    shares = [k * count // total for count in counts]
    behind = sorted(range(len(counts)), key=lambda i: (-(k * counts[i] % total), i))
    for index in behind[: k - sum(shares)]:
        shares[index] += 1
    return shares


def repeated_places(frames: Tensor, sinks: Tensor | None, *, above: float, sink_weight: float = 0.07) -> Tensor:
    """Places of frames that look as they did in the frame before, which may be left out: the first of a run stays.

    Args:
        frames: Features of the same places over time, float ``[frames, P, D]``.
        sinks: Sink scores, float ``[P]``; None: 0.
        above: A place repeats while cosine + sink_weight * sink score is above it.

    Returns:
        Bool ``[frames, P]``; False in the first frame.

    Source:
        SToP (arXiv 2604.20937): cos(frame_t, frame_t+1) + mu_t * s > 0.8, mu_t 0.07.
    """
    alike = F.cosine_similarity(frames[:-1].float(), frames[1:].float(), dim=-1)  # [frames - 1, P]
    if sinks is not None:
        alike = alike + sink_weight * sinks
    first = torch.zeros(1, frames.shape[1], dtype=torch.bool, device=frames.device)
    return torch.cat([first, alike > above])
