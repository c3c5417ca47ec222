"""From the layer groups that a cache holds to those a student is aligned with: means of decoded attention.

A cache of single layers serves every way to match; one of published groups is used as it is. Means over layers
are taken of decoded values: those of 8-bit codes differ from the codes of means by rounding only.

Dims: G wanted and H cached layer groups.
"""

from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.layers import DepthPart, GroupMatch, Matching, match_cached_groups
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap


def match_groups(
    plan: Plan, depth: int, *, matching: Matching = "group", layers: DepthPart | None = None, where: str = "the cache"
) -> GroupMatch:
    """The student layers that meet what of a cache's layer groups.

    Args:
        layers: Which part of the depth; None: the cache's own choice.
    """
    choice: Any = plan.teacher.get("layer_choice", "middle")
    return match_cached_groups(
        teacher_depth=plan.stated("teacher.layers", where),
        cached=tuple(tuple(group) for group in plan.stated("teacher.groups", where)),
        layer_choice=tuple(choice) if isinstance(choice, list) else choice,
        student_depth=depth,
        matching=matching,
        layers=layers,
        where=where,
    )


def regroup(values: Tensor, match: GroupMatch | None, *, axis: int) -> Tensor:
    """Weighted sums over an axis of H cached groups, float32: G entries along it; without a match they stay."""
    if match is None or match.is_identity:
        return values
    weights = torch.tensor(match.weights)  # [G, H]
    combined: Tensor = torch.tensordot(weights, values, dims=([1], [axis]))
    return combined.movedim(0, axis)


def regroup_rows(rows: RowAttention, match: GroupMatch | None) -> RowAttention:
    """Rows of the wanted groups: ``[A, H, C]`` to ``[A, G, C]``, and their masses."""
    return RowAttention(regroup(rows.cells, match, axis=1), regroup(rows.image_mass, match, axis=1))


def regroup_map(maps: TeacherMap, match: GroupMatch | None, *, content: Tensor | None, wanted_by: str) -> TeacherMap:
    """Maps of the wanted groups: ``[H, N, N]`` to ``[G, N, N]``.

    Groups that the cache holds keep their exact sink mask; new means get a mask of their values.

    Args:
        content: Tokens that carry image, bool ``[N]``; None: all do.
    """
    if match is None or match.is_identity:
        return maps
    if match.is_selection:
        chosen = [row.index(1.0) for row in match.weights]
        return TeacherMap(maps.values[chosen], maps.kept[chosen], maps.complete)
    values = maps.whole(f"{wanted_by}: a mean over layers that the cache does not hold")
    return TeacherMap.from_maps(regroup(values, match, axis=0), token_mask=content)
