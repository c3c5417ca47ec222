"""Which layers' attention to keep, and which student layers meet which teacher layers. Pure functions.

Where a model looks shows in its middle layers, about 33 % to 60 % of the depth. *Group matching* gives a
student layer the mean over n consecutive teacher layers; neighbouring groups overlap (a window that
slides by one layer), so G groups over m teacher layers have n = m - G + 1 layers each.

Layer indices are 0-based; a group is a tuple of layer indices whose attention is averaged.

Source:
    CompoDistill (arXiv 2510.12184), its released layer table; depths outside the table follow our rule.
"""

from typing import Literal

from common.errors import ConfigError

Groups = tuple[tuple[int, ...], ...]
LayerChoice = Literal["middle", "all"] | tuple[int, ...]
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
    """All middle layers of a model: what its groups cover together.

    Args:
        depth: Number of layers, at least 1.

    Returns:
        Consecutive layer indices: the published ones where there is a table (28 layers: 9..17), else
        33 % to 60 % of the depth, each end rounded (6 layers: 2..4).

    Raises:
        ConfigError: If ``depth`` is below 1.
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
    """The ``k`` layers of a student that are aligned one by one.

    Args:
        depth: Number of the student's layers.
        k: How many to choose, 1 to ``depth``.

    Returns:
        Consecutive indices: the published ones for their ``k`` of 7, else centred in :func:`middle_span`
        (reaching beyond it when the model is shallow).

    Raises:
        ConfigError: If ``k`` is not between 1 and ``depth``.
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


def one_group(depth: int) -> Groups:
    """The default: one group of all middle layers, on either side."""
    return (middle_span(depth),)


def teacher_groups(depth: int, groups: int, layers: LayerChoice = "middle") -> Groups:
    """Layer groups to cache from a teacher.

    Args:
        depth: Number of the teacher's layers.
        groups: G, how many groups; 1 is one group of all the chosen layers.
        layers: ``middle``, ``all``, or explicit indices.

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
    with ``all`` or explicit indices, windows as for the teacher.

    Args:
        depth: Number of the student's layers.
        groups: G, as many as the cache holds.
        layers: ``middle``, ``all``, or explicit indices.

    Raises:
        ConfigError: If a layer does not exist or there are fewer layers than groups.
    """
    if layers == "middle" and groups > 1:
        return sliding_windows(middle_layers(depth, groups), groups)
    return teacher_groups(depth, groups, layers)


def sliding_windows(layers: tuple[int, ...], groups: int) -> Groups:
    """``groups`` windows of ``len(layers) - groups + 1`` consecutive entries, each one further.

    Raises:
        ConfigError: If there are fewer layers than groups, or no groups.
    """
    if not 1 <= groups <= len(layers):
        raise ConfigError(
            f"cannot make {groups} layer groups of {len(layers)} layers {layers}; "
            f"set the number of groups between 1 and {len(layers)}, or choose more layers"
        )
    size = len(layers) - groups + 1
    return tuple(layers[start : start + size] for start in range(groups))


def match_layers(
    *, teacher_depth: int, student_depth: int, groups: int = PUBLISHED_COUNT, matching: Matching = "group"
) -> tuple[Groups, Groups]:
    """Teacher groups and the student groups they meet, for comparing the ways to match.

    Args:
        teacher_depth: Number of the teacher's layers.
        student_depth: Number of the student's layers.
        groups: G, how many pairs.
        matching: ``group``: sliding windows of the teacher's middle layers. ``simple``: the j-th middle
            layer of the one with the j-th of the other. ``adaptive``: each student layer with the one
            teacher layer at the same share of the depth.

    Returns:
        ``(teacher, student)``, G groups each, pair by pair.

    Raises:
        ConfigError: If either side has fewer layers than groups.
    """
    student = student_groups(student_depth, groups)
    if matching == "group":
        return teacher_groups(teacher_depth, groups), student
    if matching == "simple":
        return tuple((layer,) for layer in middle_layers(teacher_depth, groups)), student
    layers = middle_layers(student_depth, groups)
    steps = max(student_depth - 1, 1)
    return (
        tuple(((2 * layer * (teacher_depth - 1) + steps) // (2 * steps),) for layer in layers),
        tuple((layer,) for layer in layers),
    )


def _chosen_layers(depth: int, layers: LayerChoice) -> tuple[int, ...]:
    """Layer indices of a choice, checked against the depth."""
    if layers == "middle":
        return middle_span(depth)
    if layers == "all":
        return tuple(range(depth))
    wrong = [layer for layer in layers if not 0 <= layer < depth]
    if wrong or len(set(layers)) != len(layers):
        raise ConfigError(
            f"layers {tuple(layers)} do not name distinct layers of a language model with {depth} "
            f"(0 to {depth - 1}); change `layers`"
        )
    return tuple(layers)
