"""What differs between teacher families, in one table: where the parts are and how an image becomes tokens.

A family that is not listed cannot be used yet; the error names the listed ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from common.errors import ModelError
from data.collate import Batch


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its parts.

    Attributes:
        model_class: Class name in ``transformers``.
        template: Default prompt template (``data.templates``).
        language_model: Attribute path of the decoder whose attention is captured.
        vision_tower: Attribute path of the vision tower.
        projector: Attribute path of the projector.
        lm_head: Attribute path of the output projection.
        image_grid: From the config to (rows, cols) of one image's visual tokens.
        projector_config: From the config to what rebuilds the projector (see ``projector_export``).
        model_inputs: From config, batch and dtype to the keyword arguments of the inner model.
    """

    model_class: str
    template: str
    language_model: str
    vision_tower: str
    projector: str
    lm_head: str
    image_grid: Callable[[Any], tuple[int, int]]
    projector_config: Callable[[Any], dict[str, Any]]
    model_inputs: Callable[..., Mapping[str, Any]]


def plain_inputs(config: Any, batch: Batch, *, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments of a model whose mask and positions are those of any causal language model.

    Args:
        config: The model's.
        batch: On the model's device.
        dtype: Of floating-point image inputs.
    """
    inputs = batch.model_inputs()
    images = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in batch.image_inputs.items()
    }
    return inputs | images


def _llava_grid(config: Any) -> tuple[int, int]:
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    has_class_token = vision.model_type.startswith("clip")
    drops_first = config.vision_feature_select_strategy == "default"
    if has_class_token != drops_first:
        raise ModelError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} with a "
            f"{vision.model_type} tower gives {side * side + (1 if has_class_token else -1)} visual tokens, "
            f"which is no {side}x{side} grid; set it to {'default' if has_class_token else 'full'!r} "
            "in the checkpoint's config.json"
        )
    return side, side


def _llava_projector_config(config: Any) -> dict[str, Any]:
    layers = config.vision_feature_layer
    count = 1 if isinstance(layers, int) else len(layers)
    return {
        "act": config.projector_hidden_act,
        "bias": config.multimodal_projector_bias,
        "in": config.vision_config.hidden_size * count,
        "hidden": config.text_config.hidden_size,
        "out": config.text_config.hidden_size,
        "vision_feature_layer": layers,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


FAMILIES: dict[str, Family] = {
    "llava": Family(
        model_class="LlavaForConditionalGeneration",
        template="vicuna_v1",
        language_model="model.language_model",
        vision_tower="model.vision_tower",
        projector="model.multi_modal_projector",
        lm_head="lm_head",
        image_grid=_llava_grid,
        projector_config=_llava_projector_config,
        model_inputs=plain_inputs,
    ),
}


def family_of(config: Any, where: str) -> Family:
    """Look a model's family up.

    Raises:
        ModelError: If the family is not in the table.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ModelError(
            f"{where}: model_type {config.model_type!r} is not a supported teacher family; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return family


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Fetch a part of ``model`` by its dotted attribute path."""
    return model.get_submodule(path)
