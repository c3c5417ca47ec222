"""Which attention heads and MLP channels of each layer stay when a language model becomes narrower; pure functions.

Dims: H query heads, K key-value heads, C channels of the MLP, L layers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import ConfigError

# Matrix widths that are no multiple of 8 are slow on accelerators.
MULTIPLE = 8


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Sizes of a language model's layers, the same in all of them, as a library configuration says them.

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


def narrow_widths(widths: Widths, keep: float, *, heads: bool = True) -> Widths:
    """The sizes that keep a share of heads and channels.

    A library model has as many query heads for every key-value head: of all pairs that fit, the one whose
    number of query heads is nearest to the share, and of equally near ones that with more keys and values.

    Raises:
        ConfigError: If the share is no share.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"keep is {keep}; it must be a share of heads and channels above 0 and at most 1")
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


def choose_layer_parts(
    head_importance: Tensor, channel_importance: Tensor, *, have: Widths, want: Widths
) -> LayerParts:
    """The most important parts of one layer, in their old order.

    Returns:
        Within each key-value head its most important query heads; of the key-value heads those whose chosen
        query heads matter most together.
    """
    grouped = head_importance.reshape(have.key_value_heads, have.group)  # [K, H / K]
    chosen = largest(grouped, want.group)  # [K, H' / K'], inside each group
    served = largest(grouped.gather(1, chosen).sum(1)[None], want.key_value_heads)[0]  # [K']
    heads = (served[:, None] * have.group + chosen[served]).reshape(-1)
    return LayerParts(heads=heads, key_value_heads=served, channels=largest(channel_importance[None], want.channels)[0])


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the largest values of each row, ascending; of equal ones the first: float ``[R, V]`` to int64."""
    order = torch.argsort(values, dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values
