"""How much attention each place of a picture receives in one layer of a vision tower, while the tower runs as it always does.

Only the attention module of that layer is told to show its queries and keys; it still computes its output the way the model
is set to. The attention is computed beside it, in float32 and in chunks of rows.

Dims: M pictures or tiles that the tower reads, H heads, T tokens of the tower, N visual tokens that the language model reads.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from math import isqrt
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from vlm_distill_cache.common.errors import ModelError

_NAME = "observed_tower"
_CHUNK = 1 << 24  # numbers of an attention map that exist at a time: 64 MiB
_observed: "WeakKeyDictionary[nn.Module, tuple[str, list[Tensor]]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class TowerRequest:
    """That the attention of a teacher's tower is wanted.

    Attributes:
        counts: Visual tokens of each sample of the batch, 0 without a picture.
    """

    counts: tuple[int, ...]


def received_attention(
    query: Tensor, key: Tensor, mask: Tensor | None = None, *, scaling: float | None = None
) -> Tensor:
    """The attention that each key receives, mean over heads and query rows.

    Args:
        query: Float ``[M, H, T, D]``, as attention functions get it.
        key: Float ``[M, H', T, D]``; H' divides H.
        mask: As SDPA takes it: bool (True = may look) or float (added), broadcast to ``[M, H, T, T]``; None: all see all.
        scaling: Of the scores; None: one over the root of D.

    Returns:
        float32 ``[M, T]``; a row of a picture without masks sums to 1.
    """
    pictures, heads, rows, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    keys = key.float().repeat_interleave(heads // key.shape[1], dim=1).transpose(2, 3)
    total = torch.zeros(pictures, key.shape[2], device=query.device)
    step = max(1, _CHUNK // max(1, pictures * heads * key.shape[2]))
    for start in range(0, rows, step):
        scores = query[:, :, start : start + step].float() @ keys * scale  # [M, H, rows, T]
        if mask is not None:
            part = mask[..., start : start + step, :] if mask.shape[-2] > 1 else mask
            scores = scores.masked_fill(~part, -torch.inf) if part.dtype == torch.bool else scores + part.float()
        total += scores.softmax(dim=-1).nan_to_num(0.0).sum(dim=(1, 2))  # a row that sees nothing has none to give
    return total / (heads * rows)


def _show(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Any:
    own, received = _observed[module]
    with torch.no_grad():
        received.append(received_attention(query, key, attention_mask, scaling=kwargs.get("scaling")))
    eager = own == "eager"
    run = sys.modules[type(module).__module__].eager_attention_forward if eager else AttentionInterface()[own]
    return run(module, query, key, value, attention_mask, **kwargs)


def attention_of_layer(tower: nn.Module, layer: int) -> nn.Module:
    """The attention module of a tower's layer, counted from 0.

    Raises:
        ModelError: If the tower's layers are not to be found, or have no attention by the library's interface.
    """
    layers = next((part for part in tower.modules() if isinstance(part, nn.ModuleList) and _attention(part)), None)
    if layers is None or not 0 <= layer < len(layers):
        raise ModelError(
            f"{type(tower).__name__}: no layer {layer} with queries and keys by the model library's attention interface was "
            f"found ({0 if layers is None else len(layers)} layers were): its attention cannot be had"
        )
    return _attention(layers[layer : layer + 1])[0]


def _attention(layers: nn.ModuleList) -> list[nn.Module]:
    """The attention module of each layer; none unless all have exactly one."""
    found = []
    for layer in layers:
        inside = [part for part in layer.modules() if hasattr(part, "config") and _projects(part)]
        if len(inside) != 1:
            return []
        found += inside
    return found


def _projects(module: nn.Module) -> bool:
    return hasattr(module, "qkv") or (hasattr(module, "q_proj") and hasattr(module, "k_proj"))


def last_layer(config: Any, tower: nn.Module) -> int:
    """The last layer of a tower that the projector's input depends on, from 0.

    Args:
        config: Of the whole model; ``vision_feature_layer`` counts hidden states, the tower's input first.

    Raises:
        ModelError: If there is none.
    """
    depth = next((len(p) for p in tower.modules() if isinstance(p, nn.ModuleList) and _attention(p)), 0)
    given = getattr(config, "vision_feature_layer", None)
    states = [depth] if given is None else [given] if isinstance(given, int) else list(given)
    last = max(state % (depth + 1) for state in states) - 1
    attention_of_layer(tower, last)
    return last


@contextmanager
def observe_tower(tower: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """Take down what attention each token of a tower receives in one layer, of the passes run inside the block.

    Args:
        layer: From 0; `last_layer` says which one the model reads last.

    Yields:
        Per call of that layer's attention float32 ``[M, T]``, mean over heads and query rows, without gradient. Qwen-VL's
        towers call it once for each picture (or window).
    """
    module: Any = attention_of_layer(tower, layer)
    if module in _observed:
        raise ModelError(f"{type(tower).__name__}: its layer {layer} is observed already; blocks cannot be nested")
    AttentionInterface.register(_NAME, _show)
    kept, received = module.config, list[Tensor]()
    own = str(kept._attn_implementation)
    # Flash attention takes other shapes; SDPA gives the same but for rounding.
    _observed[module] = (own if own in ("eager", "sdpa") else "sdpa", received)
    shown = copy(kept)
    shown._attn_implementation = _NAME
    module.config = shown
    try:
        yield received
    finally:
        module.config = kept
        del _observed[module]


def by_visual_token(
    model: Any, tower: nn.Module, received: Sequence[Tensor], image_inputs: Mapping[str, Any], *, tokens: int
) -> Tensor:
    """What the visual tokens of a batch receive, in the order in which the language model reads them.

    A token that a projector makes of several places (LDPv2, pixel shuffle, Gemma 3's pool, Qwen-VL's merger) receives their
    sum; a class token is no place; a newline token of LLaVA-NeXT and OneVision receives nothing.

    Args:
        received: Of `observe_tower`, or other values of the same places, with more axes behind or without.
        image_inputs: The model's arguments, of which ``image_sizes`` and ``image_grid_thw`` are read where there are some;
            ``tile_counts`` of the pictures where they are not those that their sizes would have.
        tokens: N of the whole batch.

    Returns:
        float32 ``[N]``, and what axes there are behind places.

    Raises:
        ModelError: If the tower's places do not make so many tokens in a way that is known.
    """
    inner = getattr(model, "model", model)
    if not received:
        raise ModelError(f"{type(tower).__name__} ran no layer that is observed; it must read pictures in this pass")
    if "image_grid_thw" in image_inputs:
        found = _merged(tower, torch.cat([part.flatten(0, 1) for part in received]), image_inputs["image_grid_thw"])
    elif "image_sizes" in image_inputs and hasattr(inner, "pack_image_features"):
        found = _packed(inner, torch.cat(list(received)), image_inputs["image_sizes"], image_inputs.get("tile_counts"))
    else:
        tiles = torch.cat(list(received))  # [M, T]
        found = _pooled(tiles, tokens // len(tiles)).flatten(0, 1)
    if len(found) != tokens:
        raise ModelError(
            f"{type(tower).__name__}: its places make {len(found)} visual tokens, the language model reads {tokens}; the "
            "attention of this model's tower cannot be had"
        )
    return found


def _pooled(received: Tensor, tokens: int) -> Tensor:
    """Places of a tile ``[M, T]`` as so many tokens ``[M, tokens]``: all, all but the first, or a coarser grid's."""
    places = received.shape[1]
    if places == tokens:
        return received
    if places == tokens + 1:  # a class token, or the first patch, which CompoDistill leaves out as if it were one
        return received[:, 1:]
    if isqrt(places) ** 2 != places:
        received = received[:, 1:]
    fine, coarse = isqrt(received.shape[1]), isqrt(tokens)
    if fine**2 != received.shape[1] or coarse**2 != tokens or coarse > fine:
        raise ModelError(
            f"a tile of {places} places becomes {tokens} visual tokens, which is no pooling of a square grid; the attention of "
            "this model's tower cannot be had"
        )
    share = _shares(fine, coarse).to(received)  # [fine, coarse]
    return torch.einsum("myx...,yr,xc->mrc...", received.unflatten(1, (fine, fine)), share, share).flatten(1, 2)


def _shares(fine: int, coarse: int) -> Tensor:
    """Of each of `fine` equal parts of a line, the share in each of `coarse` ones, ``[fine, coarse]``; rows sum to 1."""
    low, high = torch.arange(fine)[:, None] / fine, torch.arange(1, fine + 1)[:, None] / fine
    left, right = torch.arange(coarse)[None] / coarse, torch.arange(1, coarse + 1)[None] / coarse
    inside = (torch.minimum(high, right) - torch.maximum(low, left)).clamp_min(0.0)
    inside = torch.where(inside * fine > 1e-4, inside, 0.0)  # edges that should meet, and miss by rounding
    return inside / inside.sum(dim=1, keepdim=True)


def _merged(tower: Any, received: Tensor, grids: Tensor) -> Tensor:
    """Qwen-VL: patches stand in groups that become one token; those of 2.5 in the order of its windows."""
    side = int(tower.config.spatial_merge_size)
    tokens: Tensor = received.unflatten(0, (-1, side**2)).sum(dim=1)
    if not hasattr(tower, "window_size"):
        return tokens
    if hasattr(tower, "get_window_index"):
        order = tower.get_window_index(grids)[0]
    else:
        from transformers.vision_utils import get_vision_window_index

        order = get_vision_window_index(
            grids, spatial_merge_size=side, window_size=tower.window_size, patch_size=tower.patch_size
        )[0]
    return tokens[torch.as_tensor(order, device=tokens.device).argsort()]


def _packed(inner: Any, received: Tensor, sizes: Tensor, counts: Sequence[int] | None) -> Tensor:
    """LLaVA-NeXT and OneVision: the library's own code joins the tiles of each picture."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config = inner.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    counts = counts or [
        image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size) for size in sizes
    ]
    places = _pooled(received if received.ndim == 3 else received[..., None], side**2)  # [M, N, 1 or D]
    ratio = getattr(config, "vision_aspect_ratio", None)
    how = (
        {"vision_feature_select_strategy": config.vision_feature_select_strategy}
        if ratio is None
        else {"vision_aspect_ratio": ratio}
    )
    nothing = torch.zeros(places.shape[2], device=places.device)
    parts: Sequence[Tensor]
    parts, _ = inner.pack_image_features(list(places.split(list(counts))), sizes, image_newline=nothing, **how)
    joined = torch.cat(list(parts))  # [N, 1 or D]
    return joined[:, 0] if received.ndim == 2 else joined
