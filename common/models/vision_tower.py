"""Vision towers: pixels to patch features of one hidden state.

CLIP puts a class token in front of its patches, SigLIP does not; both checkpoints' select strategy ``patch``
drops the first token whatever it is, so SigLIP loses its first patch (27 x 27 - 1 = 728 tokens in CompoDistill).

Dims: M images, N patches, D_v tower width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from transformers.activations import ACT2FN

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.printing import one_line

TowerConfig = Any  # CLIPVisionConfig or SiglipVisionConfig: the library has no types

# By ``model_type``; a cache's or a checkpoint's ``vision_config`` says which.
TOWERS: dict[str, tuple[type[Any], type[Any]]] = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}

# What is read of a stored vision_config: a cache or checkpoint from elsewhere is data, and other settings of the
# library can name code to fetch (its attention implementation may be a repository).
_SETTINGS = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
    "initializer_range", "initializer_factor", "vision_use_head",
)  # fmt: skip


def tower_config(stored: dict[str, Any], *, where: str) -> TowerConfig:
    """Make a tower's configuration of stored plain JSON; without a ``model_type`` it is CLIP's.

    ``stored`` is the ``vision_tower.json`` of a cache, a preset's ``vision_tower``, or a checkpoint's ``vision_config``;
    ``where`` says whose, for the ModelError about a tower that is neither CLIP's nor SigLIP's.
    """
    name = str(stored.get("model_type", "clip_vision_model"))
    if name not in TOWERS:
        raise ModelError(
            f"{where}: its vision tower is a {name!r}, expected one of {', '.join(TOWERS)}; give the student a "
            "directory of weights with a tower of its own"
        )
    if (act := stored.get("hidden_act")) is not None and act not in ACT2FN:
        raise ModelError(f"{where}: hidden_act of its vision tower is {act!r}; transformers knows {sorted(ACT2FN)}")
    try:
        config: TowerConfig = TOWERS[name][0](**{key: stored[key] for key in _SETTINGS if key in stored})
    except Exception as error:  # of any class: the library checks each setting in its own way
        raise ModelError(
            f"{where}: its vision tower cannot be made: {one_line(error)}; take the configuration of the same checkpoint"
        ) from error
    return config


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
