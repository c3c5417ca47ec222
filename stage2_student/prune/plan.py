"""Which layers, attention heads and MLP channels stay when a language model is cut; pure functions.

Dims: L layers, H query heads, K key-value heads, C channels of the MLP, U units that stay or leave as one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import ConfigError

# Matrix widths that are no multiple of 8 are slow on accelerators; 4-bit weights have blocks of 64.
MULTIPLE, BLOCK = 8, 64


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of a layer; those of a library configuration are the same in all layers.

    Each key-value head serves ``heads / key_value_heads`` query heads; channels are of the MLP
    (``intermediate_size``).
    """

    heads: int
    key_value_heads: int
    channels: int

    @property
    def group(self) -> int:
        """Query heads of each key-value head."""
        return self.heads // self.key_value_heads


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """What stays of one layer; indices into the teacher's, ascending.

    Attributes:
        heads: Query heads, int64 ``[H']``; those of one key-value head stand together.
        key_value_heads: Key-value heads, int64 ``[K']``.
        channels: Of the MLP, int64 ``[C']``.
    """

    heads: Tensor
    key_value_heads: Tensor
    channels: Tensor

    @property
    def sizes(self) -> Widths:
        """Of the layer that they make."""
        return Widths(heads=len(self.heads), key_value_heads=len(self.key_value_heads), channels=len(self.channels))


@dataclass(frozen=True, kw_only=True)
class Importance:
    """How much each part matters, larger is more; numbers of one kind are comparable within a layer.

    Attributes:
        heads: Query heads, float32 ``[L, H]``.
        key_values: What a key-value head matters beside its query heads, float32 ``[L, K]``.
        channels: Of the MLP, float32 ``[L, C]``.
        layers: Whole layers, float32 ``[L]``.
        rows: Positions they are means over.
    """

    heads: Tensor
    key_values: Tensor
    channels: Tensor
    layers: Tensor
    rows: int


def narrow_widths(widths: Widths, keep: float, *, heads: bool = True) -> Widths:
    """The sizes that keep a share of heads and channels.

    A library model has as many query heads for every key-value head: of all pairs that fit, the one whose
    number of query heads is nearest to the share, and of equally near ones that with more keys and values.

    Raises:
        ConfigError: If the share is no share.
    """
    _refuse_no_share(keep)
    pairs = [
        (pairs_of, group) for pairs_of in range(1, widths.key_value_heads + 1) for group in range(1, widths.group + 1)
    ]
    key_value_heads, group = min(pairs, key=lambda pair: (abs(pair[0] * pair[1] - keep * widths.heads), -pair[0]))
    if not heads:
        key_value_heads, group = widths.key_value_heads, widths.group
    channels = max(MULTIPLE, MULTIPLE * round(keep * widths.channels / MULTIPLE))
    return Widths(
        heads=key_value_heads * group,
        key_value_heads=key_value_heads,
        channels=widths.channels if keep == 1 else min(channels, widths.channels),
    )


def choose_layers(importance: Tensor, count: int, *, first: int, last: int) -> list[int]:
    """The layers that stay: the ends that are spared, and the most important ones between them.

    Args:
        importance: float ``[L]``.
        count: How many stay, with the ends.
        first: Layers at the beginning that are spared.
        last: The same at the end.

    Returns:
        Indices, ascending; of equally important layers the first stay.
    """
    depth = len(importance)
    if count == depth:
        return list(range(depth))
    between = largest(importance[None, first : depth - last], count - first - last)[0] + first
    return [*range(first), *between.tolist(), *range(depth - last, depth)]


def choose_layer_parts(
    head_importance: Tensor,
    channel_importance: Tensor,
    *,
    have: Widths,
    want: Widths,
    key_value_importance: Tensor | None = None,
) -> LayerParts:
    """The most important parts of one layer, in their old order.

    Returns:
        Within each key-value head its most important query heads; of the key-value heads those that matter most
        together with their chosen query heads.
    """
    grouped = head_importance.reshape(have.key_value_heads, have.group)  # [K, H / K]
    chosen = largest(grouped, want.group)  # [K, H' / K'], inside each group
    scores = grouped.gather(1, chosen).sum(1)  # [K]
    if key_value_importance is not None:
        scores = scores + key_value_importance
    served = largest(scores[None], want.key_value_heads)[0]  # [K']
    heads = (served[:, None] * have.group + chosen[served]).reshape(-1)
    return LayerParts(heads=heads, key_value_heads=served, channels=largest(channel_importance[None], want.channels)[0])


def all_parts(have: Widths) -> LayerParts:
    """What stays of a layer that is spared."""
    return LayerParts(
        heads=torch.arange(have.heads),
        key_value_heads=torch.arange(have.key_value_heads),
        channels=torch.arange(have.channels),
    )


def rank_over_layers(importance: Importance, layers: Sequence[int], *, have: Widths, keep: float) -> list[LayerParts]:
    """What stays of some layers where the parts of all of them are ranked together.

    A key-value head stays or leaves with all its query heads; where a layer has one alone, query heads do by
    themselves. Channels do in eights of like importance, of 1024 or more in blocks of 64. Each layer keeps at least one of
    either.

    Raises:
        ConfigError: If the share is no share.
    """
    _refuse_no_share(keep)
    chosen = list(layers)
    heads = importance.heads[chosen].reshape(len(chosen), have.key_value_heads, have.group)  # [L', K, H / K]
    alone = have.key_value_heads == 1
    units = heads[:, 0] if alone else heads.sum(2) + importance.key_values[chosen]  # [L', U]
    kept_units = keep_over_layers(units, keep)
    order = torch.argsort(importance.channels[chosen], dim=1, descending=True, stable=True)  # [L', C]
    ranked = importance.channels[chosen].gather(1, order)
    size = BLOCK if have.channels >= 16 * BLOCK else MULTIPLE
    blocks = torch.stack([block.sum(1) for block in ranked.split(size, dim=1)], dim=1)  # [L', C / size], falling
    counts = keep_over_layers(blocks, keep).sum(1) * size
    found = []
    for units_here, places, count in zip(kept_units, order, counts.tolist(), strict=True):
        unit = units_here.nonzero()[:, 0]
        groups = torch.zeros(1, dtype=torch.int64) if alone else unit
        of_groups = (unit[:, None] * have.group + torch.arange(have.group)).reshape(-1)
        found.append(
            LayerParts(
                heads=unit if alone else of_groups, key_value_heads=groups, channels=places[:count].sort().values
            )
        )
    return found


def keep_over_layers(scores: Tensor, keep: float) -> Tensor:
    """Which units stay: the best of each layer, and of all others the best, together a share of all.

    Args:
        scores: float ``[L, U]``, finite.

    Returns:
        Bool ``[L, U]``; of equal units the first stay.
    """
    count = max(len(scores), math.floor(keep * scores.numel() + 0.5))
    best = largest(scores, 1)  # [L, 1]
    ranked = scores.scatter(1, best, math.inf).flatten()
    kept = torch.zeros(scores.numel(), dtype=torch.bool)
    kept[torch.argsort(ranked, descending=True, stable=True)[:count]] = True
    return kept.view(scores.shape)


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values of each row, ascending; of equal ones the first: float ``[R, V]`` to int64."""
    order = torch.argsort(values, dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


def _refuse_no_share(keep: float) -> None:
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; it must be a share of heads and channels above 0 and at most 1")
