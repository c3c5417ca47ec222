"""Language models whose layers have different numbers of heads and channels, which a library configuration cannot say.

A model is made with the sizes of its configuration, the largest; then each layer is narrowed to its own. A head stays as
wide as it is, and each key-value head serves as many query heads as any other of its layer.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlm_distill_cache.common.errors import ModelError

SIZES = ("heads", "key_value_heads", "channels")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def apply_layer_sizes(model: Any, parts: Mapping[str, str], stored: Any) -> None:
    """Narrow each layer's projections; of weights that are there the first rows and columns stay.

    Args:
        model: Ours or the library's; ``parts["language_model"]`` is the path of its decoder.
        stored: ``{"heads", "key_value_heads", "channels"}`` of each layer, in their order.

    Raises:
        ModelError: If the sizes are none of this model's layers.
    """
    path = parts.get("language_model", "")
    layers = list(getattr(model.get_submodule(path), "layers", []))
    if not isinstance(stored, list) or len(stored) != len(layers):
        raise ModelError(
            f"config.json: layer_sizes: expected a list with the sizes of {len(layers)} layers of {path}, got "
            f"{str(stored)[:80]}; use the config.json of the checkpoint"
        )
    for index, (layer, sizes) in enumerate(zip(layers, stored, strict=True)):
        _refuse_misfit(f"config.json: layer_sizes: layer {index}", layer, sizes)
        _narrow_layer(layer, **sizes)


def _refuse_misfit(where: str, layer: Any, sizes: Any) -> None:
    named = isinstance(sizes, Mapping) and sorted(sizes) == sorted(SIZES)
    if not named or any(type(size) is not int or size < 1 for size in sizes.values()):
        raise ModelError(f"{where}: expected whole numbers above 0 of {', '.join(SIZES)}, got {str(sizes)[:80]}")
    attention = layer.self_attn
    most = {
        "heads": attention.o_proj.in_features // attention.head_dim,
        "key_value_heads": attention.k_proj.out_features // attention.head_dim,
        "channels": layer.mlp.down_proj.in_features,
    }
    if larger := [name for name in SIZES if sizes[name] > most[name]]:
        raise ModelError(
            f"{where}: {larger[0]} is {sizes[larger[0]]}, the configuration gives its layers {most[larger[0]]}"
        )
    if sizes["heads"] % sizes["key_value_heads"]:
        raise ModelError(
            f"{where}: {sizes['heads']} heads cannot share {sizes['key_value_heads']} heads of keys and values evenly"
        )
    if (other := _of_single_heads(attention)) and any(sizes[name] != most[name] for name in SIZES[:2]):
        raise ModelError(
            f"{where}: self_attn.{other} has values for each head by itself, so that no layer can have fewer heads than the "
            "configuration says; leave the heads as they are (of a teacher that is cut: keep a share of layers alone, depth:KEEP)"
        )


def _of_single_heads(attention: Any) -> str | None:
    """A weight beside the projections that would have to be cut with their heads, such as a norm over all heads."""
    for name, value in attention.named_parameters():
        one_for_all = name.count(".") == 1 and value.shape == (
            attention.head_dim,
        )  # a norm of each head, the same for all
        if name.partition(".")[0] not in PROJECTIONS and not one_for_all:
            return str(name)
    return None


def _narrow_layer(layer: Any, *, heads: int, key_value_heads: int, channels: int) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    width = attention.head_dim
    narrow(attention.q_proj, rows=heads * width)
    narrow(attention.k_proj, rows=key_value_heads * width)
    narrow(attention.v_proj, rows=key_value_heads * width)
    narrow(attention.o_proj, columns=heads * width)
    narrow(mlp.gate_proj, rows=channels)
    narrow(mlp.up_proj, rows=channels)
    narrow(mlp.down_proj, columns=channels)
    attention.num_key_value_groups = heads // key_value_heads
    # What some versions of the library keep besides.
    for part, name, value in (
        (attention, "num_heads", heads),
        (attention, "num_key_value_heads", key_value_heads),
        (mlp, "intermediate_size", channels),
    ):
        if hasattr(part, name):
            setattr(part, name, value)


def narrow(linear: nn.Linear, *, rows: int | None = None, columns: int | None = None) -> None:
    """Leave a linear layer its first rows (outputs) and columns (inputs), on any device; None: all."""
    weight, bias = linear.weight, linear.bias
    if weight.shape == weight[:rows, :columns].shape:
        return
    # As it was made: a copy, whose memory holds nothing else.
    linear.weight = nn.Parameter(weight.detach()[:rows, :columns].clone(), requires_grad=weight.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape
    if bias is not None and rows is not None:
        linear.bias = nn.Parameter(bias.detach()[:rows].clone(), requires_grad=bias.requires_grad)
