"""Teachers that a student can be cut out of: whose layers are built as Llama's."""

from pathlib import Path
from typing import Any

from torch import nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.families.models import FamilyModel, describe_family_model
from vlm_distill_cache.data.families.table import submodule
from vlm_distill_cache.stage2_student.pruned_folder import Kept, PruningConfig, layers_kept

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def check_prunable(teacher: Path, kept: Kept, how: PruningConfig) -> None:
    """Look at a teacher without its weights.

    Raises:
        ModelError: If it cannot be pruned.
        ConfigError: If what is kept and spared does not fit its depth.
    """
    found = describe_family_model(teacher)
    refuse_unlisted(teacher, found)
    layers_kept(len(prunable_layers(submodule(found.model, found.family.language_model))), kept, how)


def refuse_unlisted(teacher: Path, found: FamilyModel) -> None:
    """Refuse a teacher of which nobody knows where its parts are; a ModelError."""
    if not found.family.is_listed:
        raise ModelError(
            f"{teacher}: model_type {found.model.config.model_type!r} is not listed in data/families/table.py"
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
