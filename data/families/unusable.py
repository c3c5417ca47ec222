"""What a checkpoint directory is that no model can be opened from, and what to do about it: told before anything is loaded.

The library's own messages propose options that do not exist here, such as code from the checkpoint, and some directories
would make it fill the memory with a random model of the full size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.parts import ADAPTER, describe_adapter, read_config
from vlm_distill_cache.common.models.weight_files import weight_files
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.families.table import FAMILIES

_CONVERTED = {  # checkpoints with code of their own that their authors also give in the library's layout
    "internvl_chat": "OpenGVLab/InternVL3-8B-hf",
    "internvl": "OpenGVLab/InternVL3-8B-hf",
}


def refuse_unusable(directory: Path) -> None:
    """Refuse a directory of which the library can make no vision-language model.

    Args:
        directory: Holds no checkpoint in an authors' own layout (`common.models.published`, ``original_llava``).

    Raises:
        ModelError: Saying what it is instead, and what to do.
    """
    refuse_config(directory)
    weight_files(directory)


def refuse_config(directory: Path) -> None:
    """As `refuse_unusable`, for a directory whose weights are not there yet."""
    stored = read_config(directory)
    if (directory / ADAPTER).is_file():
        raise ModelError(describe_adapter(directory))
    if reason := _why_not(stored, directory):
        raise ModelError(f"{directory} cannot be loaded: {reason}")


def _why_not(stored: Mapping[str, Any], directory: Path) -> str:
    """What a configuration is of, and what to do, if it is of no model that can be opened; else empty."""
    kind = stored.get("model_type")
    if kind is not None and not isinstance(kind, str):
        return f"model_type in config.json is {_shown(kind)}, expected a name; {_known()}"
    if kind is None:
        return f"config.json names no model_type, so nobody knows what model this is; {_known()}"
    if kind not in CONFIG_MAPPING_NAMES and kind not in FAMILIES:
        return _unknown(kind, stored)
    if kind not in FAMILIES and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return _no_pictures(kind, directory)
    inner = {name: stored.get(name) for name in ("vision_config", "text_config") if name in stored}
    wrong = [name for name, part in inner.items() if not isinstance(part, dict)]
    if kind in FAMILIES and (wrong or "vision_config" not in inner):
        # The library would fill in a full-sized model.
        name = wrong[0] if wrong else "vision_config"
        return (
            f"{name} in config.json is {_shown(stored.get(name))}, expected the settings of that part; it needs config.json, "
            "weights, tokenizer and preprocessor_config.json of one model: download it again"
        )
    return ""


def _unknown(kind: str, stored: Mapping[str, Any]) -> str:
    if not stored.get("auto_map"):
        version = transformers.__version__
        return f"model_type {_shown(kind)} is not known to the installed transformers {version}; {_known()}"
    converted = f": {_CONVERTED[kind]}, for one" if kind in _CONVERTED else ""
    return (
        f"model_type {_shown(kind)} brings code of its own (auto_map in config.json), and code from a checkpoint is never "
        f"run here; take the model in the library's own layout, if its authors give it (often NAME-hf{converted}); {_known()}"
    )


def _no_pictures(kind: str, directory: Path) -> str:
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not kind.endswith("_text"):
        return (
            f"model_type {_shown(kind)} writes no text about pictures; {_known()}. A CLIP or SigLIP can be a student's tower "
            f"(--set vision_tower={directory} with student mobilevlm or compodistill)"
        )
    part = {"llama": "mobilevlm", "qwen2": "compodistill"}.get(kind)
    use = f". It can be the language model of a student: --set language_model={directory} with student {part}"
    return (
        f"a language model alone (model_type {_shown(kind)}), which sees no pictures; {_known()}{use if part else ''}"
    )


def _shown(kind: object) -> str:
    return one_line(repr(kind), limit=60)


def _known() -> str:
    """What can be given instead."""
    names = ", ".join(name.removesuffix("_distill") for name in FAMILIES)
    return (
        f"expected a vision-language model of one of these families: {names}; of others that the library knows as "
        "image-text-to-text models, only logits can be cached"
    )
