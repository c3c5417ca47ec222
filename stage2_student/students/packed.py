"""Weights that take less memory while a student trains: all in bfloat16, the decoder's linear layers in 4 bits (QLoRA).

Before and behind training a student is what it always is: its linear layers, in float32. A packed layer is put back as the
values that it stood for, which its adapters were trained on, and not as those that it was packed from.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlm_distill_cache.data.families.models import BLOCK


@torch.no_grad()
def round_weights(student: Any) -> None:
    """Keep a student's parameters in bfloat16, rounded to the nearest; packed ones and buffers stay as they are."""
    for value in student.parameters():
        if value.is_floating_point():
            value.data = value.data.to(torch.bfloat16)


@torch.no_grad()
def widen_weights(student: Any) -> None:
    """Keep a student's parameters in float32."""
    for value in student.parameters():
        if value.is_floating_point():
            value.data = value.data.float()


@contextmanager
def widened(student: Any) -> Iterator[None]:
    """In the block a student's parameters are in float32; behind it in what they were, bit for bit if nothing changed them."""
    before = [(value, value.dtype) for value in student.parameters()]
    widen_weights(student)
    try:
        yield
    finally:
        for value, dtype in before:
            value.data = value.data.to(dtype)


@torch.no_grad()
def pack_layers(layers: nn.Module, *, dtype: torch.dtype, device: torch.device) -> list[str]:
    """Pack the plain linear layers in a decoder's layers in NF4, each on its own, so that no device holds all of them unpacked.

    A layer whose rows are no whole blocks stays as it is.

    Args:
        layers: Changed in place.
        dtype: Of the arithmetic.
        device: Where they are packed to.

    Returns:
        The names of plain layers that stay so.
    """
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    odd = []
    for name, layer in list(layers.named_modules()):
        if type(layer) is not nn.Linear:
            continue
        if layer.in_features % BLOCK:
            odd.append(name)
            continue
        packed = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            compress_statistics=False,
            quant_type="nf4",
            device="meta",
        )
        values = layer.weight.data.float().contiguous()
        made: Any = Params4bit
        packed.weight = made(
            values, requires_grad=False, compress_statistics=False, quant_type="nf4", module=packed
        ).to(device)
        packed.bias = layer.bias
        packed.support_avx512bf16_for_cpu = False  # which would lay them out in another way, once they are evaluated
        packed.train(layer.training)
        layers.set_submodule(name, packed)
    return odd


def is_packed(layer: Any) -> bool:
    """Whether a layer's weight is in 4 bits."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) is not None


@torch.no_grad()
def unpacked_layer(layer: Any, added: Tensor | None = None) -> nn.Linear:
    """A plain layer in main memory, float32, of the values that a packed one stands for.

    Args:
        added: To these values, float ``[out, in]``.
    """
    from bitsandbytes.functional import dequantize_4bit

    values = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float().cpu()
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(values if added is None else values + added.float().cpu(), requires_grad=False)
    if layer.bias is not None:
        plain.bias = layer.bias
    return plain


def unpack_layers(layers: nn.Module) -> None:
    """Put plain layers of their values in the place of packed ones."""
    for name, layer in list(layers.named_modules()):
        if is_packed(layer):
            layers.set_submodule(name, unpacked_layer(layer))


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters, of packed ones with the scales of their blocks."""
    total = 0
    for value in module.parameters():
        total += value.nbytes
        if (state := getattr(value, "quant_state", None)) is not None:
            total += state.absmax.nbytes
    return total
