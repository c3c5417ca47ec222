"""Low-rank adapters (LoRA) inside a student's language model: put in, trained, merged away.

The adapters sit in the decoder layers themselves (no wrapper around the student), so attention capture, losses
and evaluation see the student they know. Only linear layers of the decoder get one: never the vision tower, the
projector, the embedding or the output projection. Merging gives plain linear layers back.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vlm_distill_cache.common.attention.capture import checkpoint_recorded
from vlm_distill_cache.common.errors import ConfigError, ModelError

ADAPTER = "default"
_MARK = ".lora_"
_BASE = ".base_layer."


def decoder_layers(student: Any) -> nn.ModuleList:
    """The decoder layers of a student's language model.

    Raises:
        ModelError: If the language model keeps them under another name than ``layers``.
    """
    layers = getattr(student.language_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ModelError(
            f"{type(student.language_model).__name__} keeps no list of decoder `layers`, expected of every "
            "language model that gets adapters; train this student with trainable: all"
        )
    return layers


def checkpoint_layers(student: Any) -> None:
    """Let the decoder layers forget their activations in training and compute them again in the backward pass.

    Recorded attention is forgotten and computed again with them. The vision tower keeps none anyway.

    Raises:
        ModelError: If the layers do not know how.
    """
    for layer in decoder_layers(student):
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ModelError(
                f"{type(layer).__name__} is no layer that the model library can checkpoint; set gradient_checkpointing "
                "to false and lower micro_batch_size"
            )
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = checkpoint_recorded


def add_adapters(student: Any, *, rank: int, alpha: float, dropout: float, seed: int) -> list[nn.Parameter]:
    """Put an adapter into every linear layer of the decoder; the student computes what it did before.

    Args:
        student: Its decoder has no adapters.
        rank: Of each adapter's two matrices.
        alpha: Scale; an adapter adds ``alpha / rank * B A x``.
        dropout: On an adapter's input, in [0, 1).
        seed: Of the A matrices; B starts at 0.

    Returns:
        The adapters' parameters, trainable; all else of the student keeps its ``requires_grad``.

    Raises:
        ConfigError: If peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            f"trainable: lora needs peft ({error}); run: pip install 'vlm-distill-cache[lora]'"
        ) from error
    # From inside the decoder: a name such as `layers.0.self_attn.q_proj` would also match in the vision tower.
    layers = decoder_layers(student)
    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    before = {name: parameter.requires_grad for name, parameter in layers.named_parameters()}
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        bias="none",
        target_modules=names,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, layers, adapter_name=ADAPTER)
    for name, parameter in layers.named_parameters():
        parameter.requires_grad_(before.get(plain_name(name), True))
    return list(adapter_parameters(student).values())


def has_adapters(student: Any) -> bool:
    """Whether adapters are in."""
    return bool(adapter_parameters(student))


def adapter_parameters(student: Any) -> dict[str, nn.Parameter]:
    """The adapters' parameters, by their name in the student."""
    return {name: value for name, value in student.named_parameters() if _MARK in name}


def plain_name(name: str) -> str:
    """The name of a tensor in a student without adapters: ``q_proj.base_layer.weight`` is ``q_proj.weight``."""
    return name.replace(_BASE, ".")


@torch.no_grad()
def merge_adapters(student: Any) -> None:
    """Add every adapter to its layer and put the plain layer back: W + alpha / rank * B A.

    The student then computes the same up to rounding, and has the names and the size it had before.
    """
    layers = decoder_layers(student)
    for name, adapter in list(_adapted(layers)):
        adapter.merge(safe_merge=False, adapter_names=[ADAPTER])
        parent, _, child = name.rpartition(".")
        setattr(layers.get_submodule(parent), child, adapter.get_base_layer())
    if hasattr(layers, "peft_config"):
        del layers.peft_config


@torch.no_grad()
def load_adapters(student: Any, values: Mapping[str, Tensor]) -> None:
    """Copy stored adapters over those that are in.

    Args:
        student: With adapters.
        values: As from `adapter_parameters`.

    Raises:
        ModelError: If they are not exactly this student's.
    """
    own = adapter_parameters(student)
    if own.keys() != values.keys() or any(own[name].shape != value.shape for name, value in values.items()):
        raise ModelError(
            f"stored adapters ({len(values)} tensors) are not those of this student ({len(own)}): another size, rank "
            "or family; use another --output, or delete the folder to begin again"
        )
    for name, value in values.items():
        own[name].copy_(value)


def _adapted(layers: nn.Module) -> Iterator[tuple[str, Any]]:
    """Layers that hold an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    for name, module in layers.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module
