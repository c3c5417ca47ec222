"""How much each attention head and MLP channel of a language model adds to its residual stream.

The importance of a part is the mean, over all positions of some samples, of the square of what it adds: exactly
what the layer's output would change by without it. Inputs and weights both count, and no gradient is needed.

Dims: L layers, H query heads, d width of a head, C channels, D width of the model, T sequence.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.common.errors import DataError, ModelError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Importance:
    """Mean squares of what parts add to the residual stream.

    Attributes:
        heads: float32 ``[L, H]``.
        channels: float32 ``[L, C]``.
        rows: Positions they are means over.
    """

    heads: Tensor
    channels: Tensor
    rows: int


class _Layer:
    """Sums of one decoder layer: of products of a head's outputs ``[H, d, d]``, of squares of channels ``[C]``."""

    def __init__(self, layer: nn.Module, heads: int) -> None:
        self.output: nn.Linear = layer.self_attn.o_proj  # type: ignore[union-attr, assignment]
        self.down: nn.Linear = layer.mlp.down_proj  # type: ignore[union-attr, assignment]
        self.heads = heads
        width = self.output.in_features // heads
        device = self.output.weight.device
        self.products = torch.zeros(heads, width, width, device=device)
        self.squares = torch.zeros(self.down.in_features, device=device)
        self.rows = 0

    def see_heads(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what enters the attention's output projection."""
        rows = inputs[0].detach().float().reshape(-1, self.heads, self.products.shape[1])  # [T, H, d]
        self.products += torch.einsum("thd,the->hde", rows, rows)
        self.rows += rows.shape[0]

    def see_channels(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Add what enters the MLP's output projection."""
        self.squares += inputs[0].detach().float().reshape(-1, self.down.in_features).square().sum(0)

    def head_importance(self) -> Tensor:
        """Mean of ``|W_h a_h|^2``, float32 ``[H]``."""
        weight = self.output.weight.detach().float()  # [D, H * d]
        by_head = weight.reshape(weight.shape[0], self.heads, -1).transpose(0, 1)  # [H, D, d]
        inner = by_head.transpose(1, 2) @ by_head  # [H, d, d]
        return (inner * self.products).sum((1, 2)).cpu() / self.rows

    def channel_importance(self) -> Tensor:
        """Mean of ``|W_c x_c|^2``, float32 ``[C]``."""
        return (self.squares * self.down.weight.detach().float().square().sum(0)).cpu() / self.rows


@torch.no_grad()
def measure_importance(
    model: Any, language_model: Any, batches: Iterable[Mapping[str, Any]], *, heads: int
) -> Importance:
    """Run a model over samples and see what each head and channel adds.

    The model is in evaluation mode; a batch is the keyword arguments of one forward pass, without padding, which
    would count as rows.

    Raises:
        ModelError: If the decoder's layers are built in another way.
        DataError: If there is no batch.
    """
    layers = prunable_layers(language_model)
    seen = [_Layer(layer, heads) for layer in layers]
    with ExitStack() as hooks:
        for layer in seen:
            hooks.enter_context(layer.output.register_forward_pre_hook(layer.see_heads))
            hooks.enter_context(layer.down.register_forward_pre_hook(layer.see_channels))
        for batch in batches:
            model(**batch, use_cache=False)
    if not seen[0].rows:
        raise DataError("no sample to measure the importance of heads and channels on; give more data")
    return Importance(
        heads=torch.stack([layer.head_importance() for layer in seen]),
        channels=torch.stack([layer.channel_importance() for layer in seen]),
        rows=seen[0].rows,
    )


def prunable_layers(language_model: Any) -> list[nn.Module]:
    """The decoder layers, if all are built as Llama's."""
    layers = list(getattr(language_model, "layers", []))
    for index, layer in enumerate(layers):
        for part, names in (("self_attn", ATTENTION), ("mlp", MLP)):
            found = getattr(layer, part, None)
            missing = [name for name in names if not isinstance(getattr(found, name, None), nn.Linear)]
            if missing:
                raise ModelError(
                    f"{type(language_model).__name__}, layer {index}: no linear {part}.{', '.join(missing)}; expected "
                    "layers built as Llama's (Llama, Qwen, Mistral, Gemma): this teacher cannot be pruned, choose "
                    "another student"
                )
    if not layers:
        raise ModelError(f"{type(language_model).__name__} keeps no list of decoder `layers`: it cannot be pruned")
    return layers
