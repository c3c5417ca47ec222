"""Which layers' attention to keep, and which student layers meet which teacher layers. Pure functions.

Where a model looks shows in its middle layers, about 33 % to 60 % of the depth. *Group matching* gives a
student layer the mean over n consecutive teacher layers; neighbouring groups overlap (a window that
slides by one layer), so G groups over m teacher layers have n = m - G + 1 layers each.

Layer indices are 0-based; a group is a tuple of layer indices whose attention is averaged.

Source:
    CompoDistill (arXiv 2510.12184), its released layer table; depths outside the table follow our rule.
"""

from dataclasses import dataclass
from typing import Literal

from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.locations import by_make

Groups = tuple[tuple[int, ...], ...]
DepthPart = Literal["early", "middle", "late", "all"]
LayerChoice = DepthPart | tuple[int, ...]
Matching = Literal["group", "simple", "adaptive"]

# depth -> (first layer of each of a teacher's 7 groups, also a student's 7 layers; layers in a group)
PUBLISHED: dict[int, tuple[tuple[int, ...], int]] = {
    24: ((8, 9, 10, 11, 12, 13, 14), 2),
    28: ((9, 10, 11, 12, 13, 14, 15), 3),
    32: ((11, 12, 13, 14, 15, 16, 17), 3),
    40: ((13, 14, 15, 16, 17, 18, 19), 5),
}
PUBLISHED_COUNT = 7
_FROM_PERCENT, _TO_PERCENT = 33, 60


def middle_span(depth: int) -> tuple[int, ...]:
    """All middle layers of a model of at least 1: what its groups cover together.

    The published ones where there is a table (28 layers: 9..17), else 33 % to 60 % of the depth, each end rounded
    (6 layers: 2..4).
    """
    if depth < 1:
        raise ConfigError(f"a language model has at least 1 layer, got depth {depth}")
    if depth in PUBLISHED:
        firsts, size = PUBLISHED[depth]
        return tuple(range(firsts[0], firsts[-1] + size))
    first = min((_FROM_PERCENT * depth + 50) // 100, depth - 1)  # integers: the same on every machine
    last = min((_TO_PERCENT * depth + 50) // 100, depth - 1)
    return tuple(range(first, last + 1))


def middle_layers(depth: int, k: int = PUBLISHED_COUNT) -> tuple[int, ...]:
    """The ``k`` layers of a student that are aligned one by one, 1 to ``depth``.

    The published ones for their ``k`` of 7, else centred in :func:`middle_span` (reaching beyond it when the model is
    shallow).
    """
    if not 1 <= k <= depth:
        raise ConfigError(
            f"cannot choose {k} layers of a language model with {depth}; set the number of layer groups "
            f"between 1 and {depth}"
        )
    if depth in PUBLISHED and k == PUBLISHED_COUNT:
        return PUBLISHED[depth][0]
    span = middle_span(depth)
    first = min(max((span[0] + span[-1] - k + 1) // 2, 0), depth - k)
    return tuple(range(first, first + k))


def published_count(depth: int) -> int:
    """How many layers of a teacher are aligned where nobody says: the published 7.

    Of a teacher of fewer than 14 layers these would be more than its middle, and more than a small student has: there as
    many as there are middle layers (6 layers: 3).
    """
    return PUBLISHED_COUNT if depth >= 2 * PUBLISHED_COUNT else len(middle_span(depth))


def teacher_groups(depth: int, groups: int, layers: LayerChoice = "middle") -> Groups:
    """Layer groups to cache from a teacher.

    Args:
        groups: G, how many groups; 1 is one group of all the chosen layers.
        layers: ``middle``; ``early`` and ``late``: as many layers at either end; ``all``; or explicit indices.

    Returns:
        G groups: windows of equal size over the chosen layers, sliding by one. ``middle`` is widened
        around its centre when it has fewer than G layers.

    Raises:
        ConfigError: If a layer does not exist or there are fewer layers than groups.
    """
    chosen = _chosen_layers(depth, layers)
    if layers == "middle" and groups > len(chosen):
        chosen = middle_layers(depth, groups)
    return sliding_windows(chosen, groups)


def student_groups(depth: int, groups: int, layers: LayerChoice = "middle") -> Groups:
    """Layer groups of a student, as many as the teacher's, in the same order.

    With ``middle`` and more than one group each is a single layer (:func:`middle_layers`), as published;
    so it is with ``early`` and ``late``; with ``all`` or explicit indices, windows as for the teacher.
    Arguments and errors are those of :func:`teacher_groups`.
    """
    if layers in ("early", "middle", "late") and groups > 1:
        return sliding_windows(_single_layers(depth, groups, layers), groups)
    return teacher_groups(depth, groups, layers)


def sliding_windows(layers: tuple[int, ...], groups: int) -> Groups:
    """``groups`` windows of ``len(layers) - groups + 1`` consecutive entries, each one further."""
    if not 1 <= groups <= len(layers):
        raise ConfigError(
            f"cannot make {groups} layer groups of {len(layers)} layers {layers}; "
            f"set the number of groups between 1 and {len(layers)}, or choose more layers"
        )
    size = len(layers) - groups + 1
    return tuple(layers[start : start + size] for start in range(groups))


@dataclass(frozen=True)
class GroupMatch:
    """Which of a student's layers learn from what of a cache.

    Attributes:
        weights: Each wanted group as a weighted sum over the cached ones, ``[G, G_cached]``; rows sum to 1.
        student: The student's layers that meet each wanted group, G groups.
        teacher: The teacher's layers that each wanted group is the mean of, G groups.
    """

    weights: tuple[tuple[float, ...], ...]
    student: Groups
    teacher: Groups

    @property
    def is_identity(self) -> bool:
        """Whether the cached groups are used as they are, in their order."""
        return self.weights == _identity(len(self.teacher))

    @property
    def is_selection(self) -> bool:
        """Whether each wanted group is one of the cached ones: nothing is averaged anew."""
        return all(max(row) == 1.0 for row in self.weights)


def holds_every_layer(cached: Groups, depth: int) -> bool:
    """Whether a cache holds each layer of a teacher of several by itself, so that any mean over layers can be made."""
    return len(cached) == depth > 1 and all(len(group) == 1 for group in cached)


def match_cached_groups(
    *,
    teacher_depth: int,
    cached: Groups,
    layer_choice: LayerChoice,
    student_depth: int,
    matching: Matching = "group",
    layers: DepthPart | None = None,
    where: str = "the cache",
) -> GroupMatch:
    """How a student meets the layer groups that a cache holds.

    A cache of single layers, all of them (``groups`` = number of layers, ``layers=all``), serves every matching
    and choice of layers, since any mean over layers can be made of it. Other caches serve what they were
    built for: their groups as they are, which is group matching.

    Args:
        teacher_depth: Number of the teacher's layers.
        cached: Layer groups of the cache, as its plan names them.
        layer_choice: How they were chosen, as its plan names it.
        student_depth: Number of the student's layers.
        matching: See :func:`match_layers`.
        layers: Which part of the depth is aligned; None: the cache's groups as they are or, of a cache of all
            single layers, the middle ones.
        where: Which cache, for the error.

    Raises:
        ConfigError: If the student has too few layers of those chosen.
        CacheMismatchError: If the wanted groups cannot be made of the cached ones, or are more than the student's layers.
    """
    every_layer = holds_every_layer(cached, teacher_depth)
    as_cached = layers is None or layers == layer_choice
    if matching == "group" and as_cached and not every_layer:
        if len(cached) > student_depth:
            raise CacheMismatchError(
                f"{where}: it holds the teacher's attention in {len(cached)} layer groups, and the student's language model "
                f"has {student_depth} layers. Use a student of at least {len(cached)} layers, or build a cache of fewer "
                f"groups, in another folder (beside its other options "
                f"{by_make(f'CACHE_SET=groups={student_depth} with make, ')}--set groups={student_depth} of teacher-cache build)"
            )
        return GroupMatch(_identity(len(cached)), student_groups(student_depth, len(cached), layer_choice), cached)
    choice = layers if layers is not None else "middle" if every_layer else layer_choice
    teacher, student = match_layers(
        teacher_depth=teacher_depth, student_depth=student_depth, matching=matching, layers=choice
    )
    weights = []
    for wanted in teacher:
        parts = _parts_of(frozenset(wanted), cached)
        if parts is None:
            raise CacheMismatchError(
                f"{where}: {matching} matching of the {choice} layers needs the mean over the teacher's layers "
                f"{[*wanted]}, but it holds means over {[[*group] for group in cached]}, of which that cannot be "
                "made. Set PHASE.losses.matching=group and PHASE.losses.attention_layers=null "
                "(PHASE: dpt, dft or sft), or build a cache of single "
                f"layers (teacher-cache build --set groups={teacher_depth} --set layers=all), which serves "
                "every matching"
            )
        weights.append(tuple(len(group) / len(wanted) if i in parts else 0.0 for i, group in enumerate(cached)))
    return GroupMatch(tuple(weights), student, teacher)


def match_layers(
    *,
    teacher_depth: int,
    student_depth: int,
    groups: int | None = None,
    matching: Matching = "group",
    layers: LayerChoice = "middle",
) -> tuple[Groups, Groups]:
    """Teacher groups and the student groups they meet.

    Args:
        groups: G, how many pairs; None: :func:`matched_count`.
        matching: ``group``: sliding windows of the teacher's chosen layers. ``simple``: the j-th chosen
            layer of the one with the j-th of the other. ``adaptive``: each student layer with the one
            teacher layer at the same share of the depth.
        layers: Which layers are chosen, on either side.

    Returns:
        ``(teacher, student)``, G groups each, pair by pair.

    Raises:
        ConfigError: If either side has fewer layers than groups.
    """
    count = groups or matched_count(teacher_depth, student_depth, layers)
    if matching == "group":
        return teacher_groups(teacher_depth, count, layers), student_groups(student_depth, count, layers)
    mine = _single_layers(student_depth, count, layers)
    if matching == "simple":
        other = _single_layers(teacher_depth, count, layers)
    else:
        steps = max(student_depth - 1, 1)
        other = tuple((2 * layer * (teacher_depth - 1) + steps) // (2 * steps) for layer in mine)
    return tuple((layer,) for layer in other), tuple((layer,) for layer in mine)


def matched_count(teacher_depth: int, student_depth: int, layers: LayerChoice = "middle") -> int:
    """How many pairs of layers are aligned: the published 7, or what a shallower model has.

    With ``all`` or explicit indices as many as the side with fewer of them; ``early`` and ``late`` as many as ``middle``,
    so that they compare.
    """
    if layers not in ("middle", "early", "late"):
        return min(len(_chosen_layers(depth, layers)) for depth in (teacher_depth, student_depth))
    return min(PUBLISHED_COUNT, *(len(middle_span(depth)) for depth in (teacher_depth, student_depth)))


def _single_layers(depth: int, count: int, layers: LayerChoice) -> tuple[int, ...]:
    """``count`` layers of a choice, one by one."""
    if layers == "middle":
        return middle_layers(depth, count)
    chosen = _chosen_layers(depth, layers)
    if count > len(chosen):
        raise ConfigError(f"cannot choose {count} layers of the {len(chosen)} {layers} ones of {depth}")
    return chosen[-count:] if layers == "late" else chosen[:count]


def _identity(size: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(i == j) for j in range(size)) for i in range(size))


def _parts_of(wanted: frozenset[int], cached: Groups) -> frozenset[int] | None:
    """Indices of disjoint cached groups that hold exactly the wanted layers; None if there are none."""
    if not wanted:
        return frozenset()
    layers = dict.fromkeys(layer for group in cached for layer in group)
    order = {layer: place for place, layer in enumerate(layers)}
    if not wanted <= order.keys():
        return None
    # Groups are windows over the layers in this order: one alone can hold the first of the wanted ones, and no others
    # before it, so there is nothing to search.
    first = min(wanted, key=order.__getitem__)
    for index, group in sorted(enumerate(cached), key=lambda item: -len(item[1])):
        if first in group and wanted.issuperset(group):
            rest = _parts_of(wanted - frozenset(group), cached)
            if rest is not None:
                return rest | {index}
    return None


def _chosen_layers(depth: int, layers: LayerChoice) -> tuple[int, ...]:
    """Layer indices of a choice, checked against the depth."""
    span = middle_span(depth)
    if layers == "middle":
        return span
    if layers == "all":
        return tuple(range(depth))
    if layers == "early":
        return tuple(range(len(span)))
    if layers == "late":
        return tuple(range(depth - len(span), depth))
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong or len(set(layers)) != len(layers):
        raise ConfigError(
            f"layers {tuple(layers)} do not name distinct layers of a language model with {depth} "
            f"(0 to {depth - 1}); change `layers`"
        )
    return tuple(layers)
