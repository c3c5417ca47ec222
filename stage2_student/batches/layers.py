"""From the layer groups that a cache holds to those a student is aligned with: means of decoded attention.

A cache of single layers serves every way to match; one of published groups is used as it is. Means over layers
are taken of decoded values: those of 8-bit codes differ from the codes of means by rounding only.

Dims: G wanted and H cached layer groups.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.attention.layers import DepthPart, GroupMatch, Matching, match_cached_groups
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap, incomplete_map
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.terminal.next_step import set_words


def match_groups(
    plan: Plan,
    depth: int,
    *,
    matching: Matching = "group",
    layers: DepthPart | None = None,
    where: str = "the cache",
) -> GroupMatch:
    """The student layers that meet what of a cache's layer groups.

    Args:
        plan: The cache's.
        depth: The student's number of layers.
        matching: See `common.attention.layers.match_layers`.
        layers: Which part of the depth; None: the cache's own choice.
        where: Which cache, for the error.

    Raises:
        ConfigError: If the student has fewer layers than the choice needs.
        CacheMismatchError: If the cached groups do not serve the matching.
    """
    teacher = plan.teacher
    choice: Any = teacher.get("layer_choice", "middle")
    return match_cached_groups(
        teacher_depth=int(teacher["layers"]),
        cached=tuple(tuple(group) for group in teacher["groups"]),
        layer_choice=tuple(choice) if isinstance(choice, list) else choice,
        student_depth=depth,
        matching=matching,
        layers=layers,
        where=where,
    )


def regroup(values: Tensor, match: GroupMatch | None, *, axis: int) -> Tensor:
    """Weighted sums over an axis of cached groups.

    Args:
        values: float32, H entries along ``axis``.
        match: None: the groups stay as they are.
        axis: Of the groups.

    Returns:
        float32, G entries along ``axis``.
    """
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
        maps: As decoded.
        match: None: the groups stay as they are.
        content: Tokens that carry image, bool ``[N]``; None: all do.
        wanted_by: Sample and cache, for the error.

    Raises:
        CacheMismatchError: If new means are wanted of a map that holds no single values.
    """
    if match is None or match.is_identity:
        return maps
    if match.is_selection:
        chosen = [row.index(1.0) for row in match.weights]
        return TeacherMap(maps.values[chosen], maps.kept[chosen], maps.complete)
    values = maps.whole(f"{wanted_by}: a mean over layers that the cache does not hold")
    return TeacherMap.from_maps(regroup(values, match, axis=0), token_mask=content)


def map_is_complete(signals: Mapping[str, Any]) -> bool:
    """Whether a cache holds the value of each pair of its visual maps; ``signals``: its plan's codec dictionaries."""
    return "visual_map" in signals and VisualMapCodec.from_dict(signals["visual_map"]).complete


def check_all_rows(
    signals: Mapping[str, Any], *, where: str, off: Sequence[str] = ("dft.losses.all_attention=0",)
) -> None:
    """Refuse the loss of all rows where a cache (codec dictionaries of its plan) lacks one of its two signals.

    Args:
        signals: The codec dictionaries of a plan.
        where: Phase and cache, for the error.
        off: The settings that switch off what the cache cannot serve.

    Raises:
        CacheMismatchError: With the remedy.
    """
    lacking = [name for name in ("visual_map", "text_attention") if name not in signals]
    if lacking:
        raise CacheMismatchError(
            f"{where}: the loss all_attention needs the visual rows and the text rows, but the cache holds no "
            f"{' and no '.join(lacking)}. Switch it off ({set_words(off)}), or build the cache with both "
            "(teacher-cache build --signals logits,visual_map,text_attention)"
        )


def check_map_serves(
    signals: Mapping[str, Any],
    kind: str,
    *,
    where: str,
    all_rows: bool = False,
    match: GroupMatch | None = None,
) -> None:
    """Refuse a loss of maps that a cache's preset cannot serve, before anything is trained.

    Args:
        signals: The codec dictionaries of a plan.
        kind: Of the visual-map loss; only ``sink_filtered`` does without single values.
        where: Phase and cache, for the error.
        all_rows: Whether the loss of all rows is wanted, which needs single values.
        match: How layers meet; new means need single values.

    Raises:
        CacheMismatchError: With the remedy.
    """
    if "visual_map" not in signals or map_is_complete(signals):
        return
    wanted = {
        f"the loss visual_map_kind={kind}": kind != "sink_filtered",
        "the loss all_attention": all_rows,
        "a mean over layers that the cache does not hold": match is not None and not match.is_selection,
    }
    for name, asked in wanted.items():
        if asked:
            raise incomplete_map(f"{where}: {name}")
