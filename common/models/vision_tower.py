"""Vision towers: pixels to patch features of one hidden state.

CLIP puts a class token in front of its patches, SigLIP does not; both checkpoints' select strategy ``patch``
drops the first token whatever it is, so SigLIP loses its first patch (27 x 27 - 1 = 728 tokens in CompoDistill).

Dims: M images, N patches, D_v tower width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vlm_distill_cache.common.errors import ModelError

TowerConfig = Any  # CLIPVisionConfig or SiglipVisionConfig: the library has no types

# By ``model_type``; a cache's or a checkpoint's ``vision_config`` says which.
TOWERS: dict[str, tuple[type[Any], type[Any]]] = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}


class _TowerHolder(nn.Module):
    """Gives the library's tower its published name ``vision_model``."""

    def __init__(self, config: TowerConfig) -> None:
        super().__init__()
        self.vision_model = TOWERS[config.model_type][1](config)


class VisionTower(nn.Module):
    """A CLIP or SigLIP tower.

    Only the layers below the wanted hidden state run (23 of 24 for -2), without a graph unless one of their parameters
    requires a gradient.

    Args:
        feature_layer: Index into the tower's hidden states, as ``vision_feature_layer`` of LLaVA.
        select: ``patch`` drops the first token: CLIP's class token, or SigLIP's first patch; ``full`` keeps all.

    Attributes:
        grid: Rows and columns of patches.
        dropped_tokens: Patches left out at the beginning of the grid: 1 for SigLIP with ``patch``, else 0.
    """

    def __init__(self, config: TowerConfig, feature_layer: int, select: str = "patch") -> None:
        super().__init__()
        depth = config.num_hidden_layers
        if not -depth - 1 <= feature_layer <= depth:
            raise ModelError(f"vision_feature_layer: got {feature_layer}, the tower has {depth} layers")
        has_class_token = config.model_type == "clip_vision_model"
        if select not in ("patch", "full") or (has_class_token and select == "full"):
            raise ModelError(
                f"vision_feature_select_strategy: got {select!r} for a {config.model_type}; expected 'patch'"
                + ("" if has_class_token else " or 'full'")
            )
        self.layers_used = feature_layer % (depth + 1)
        side = int(config.image_size) // int(config.patch_size)
        self.grid = (side, side)
        self.drops_first = select == "patch"
        self.dropped_tokens = int(self.drops_first and not has_class_token)
        self.vision_tower = _TowerHolder(config)

    def used_parameters(self) -> list[nn.Parameter]:
        """Those that the features depend on: none of the layers above the wanted hidden state, and of no head."""
        tower = self.vision_tower.vision_model
        before = [tower.pre_layrnorm] if hasattr(tower, "pre_layrnorm") else []
        parts = (tower.embeddings, *before, *tower.encoder.layers[: self.layers_used])
        return [parameter for part in parts for parameter in part.parameters()]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode float pixels ``[M, 3, height, width]`` to float features ``[M, N - dropped, D_v]``."""
        tower = self.vision_tower.vision_model
        is_trained = any(parameter.requires_grad for parameter in self.used_parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            hidden: Tensor = tower.embeddings(pixel_values)
            if hasattr(tower, "pre_layrnorm"):
                hidden = tower.pre_layrnorm(hidden)
            for layer in tower.encoder.layers[: self.layers_used]:
                hidden = layer(hidden, None)
            return hidden[:, 1:] if self.drops_first else hidden
