"""MobileVLM V1 / V2 and CompoDistill checkpoints as their authors published them, in our own classes, strictly.

Both come with code of their own that today's library cannot run; here config and weights are read as data, key
by key. A missing, left-over or misshapen tensor is an error, never a random weight.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPImageProcessorPil, SiglipImageProcessorPil

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.checkpoint import Checkpoint
from vlm_distill_cache.common.models.compodistill import CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.explained import explained_errors
from vlm_distill_cache.common.models.mobilevlm import MobileVLMForConditionalGeneration
from vlm_distill_cache.common.models.parts import read_config
from vlm_distill_cache.common.models.published_configs import (
    COMPODISTILL_TYPE,
    MOBILEVLM_TYPES,
    OWN_TYPES,
    compodistill_config,
    compodistill_key,
    drop_buffers,
    mobilevlm_config,
)
from vlm_distill_cache.common.models.towers import find_tower, holds_tower
from vlm_distill_cache.common.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from vlm_distill_cache.common.models.weight_files import Weights, read_weights

_CLASSES: dict[str, type[VisionLanguageModel]] = {
    OWN_TYPES[0]: MobileVLMForConditionalGeneration,
    OWN_TYPES[1]: CompoDistillForConditionalGeneration,
}
# Not beside the classes, whose code goes with each student: there, ``config.json`` names them.
for _class in _CLASSES.values():
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    AutoModelForImageTextToText.register(_class.config_class, _class, exist_ok=True)


def is_published(directory: Path) -> bool:
    """Whether `load_published` is the one to load a directory: by its ``config.json`` alone."""
    return _kind(read_config(directory)) is not None


def is_own(directory: Path) -> bool:
    """Whether one of our classes saved a directory, rather than its model's authors."""
    return _kind(read_config(directory)) == "own"


def load_published(
    directory: Path, *, dtype: torch.dtype | None = None, vision_tower: Path | None = None
) -> VisionLanguageModel:
    """Load a published MobileVLM or CompoDistill, or a model that one of our classes saved.

    Args:
        directory: ``config.json`` and weights: safetensors or ``.bin``, whole or in shards.
        dtype: Of all weights; None: as stored.
        vision_tower: Directory of the CLIP tower, for a published MobileVLM whose checkpoint does not hold it; it
            replaces one that is there.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ModelError: If the configuration or a weight is not what these models have, or a file is damaged.
    """
    model: VisionLanguageModel = open_published(directory, vision_tower=vision_tower).load(dtype=dtype)
    return model


def open_published(directory: Path, *, vision_tower: Path | None = None) -> Checkpoint:
    """Look through what `load_published` loads, without reading a value; arguments and errors are its own."""
    with explained_errors(directory):
        return _open_published(directory, vision_tower)


def _open_published(directory: Path, vision_tower: Path | None) -> Checkpoint:
    stored = read_config(directory)
    kind = _kind(stored)
    if "quantization_config" in stored:
        raise ModelError(
            f"{directory}: its weights are quantised (quantization_config in config.json), which is read of the library's own "
            "models alone; give the student that it was made from. Others load it by from_pretrained"
        )
    if kind is None:
        raise ModelError(
            f"{directory}: model_type is {stored.get('model_type')!r}, expected one of "
            f"{', '.join([*MOBILEVLM_TYPES, COMPODISTILL_TYPE, *OWN_TYPES])}"
        )
    if kind == "mobilevlm":
        return _open_mobilevlm(directory, stored, vision_tower)
    if vision_tower is not None:
        raise ModelError(
            f"{directory} holds its own vision tower; leave vision_tower={vision_tower} out, it is for published "
            "MobileVLM and LLaVA checkpoints and for students that are built"
        )
    model_class: type[VisionLanguageModel]
    if kind == "own":
        model_class = _CLASSES[stored["model_type"]]
        config = model_class.config_class.from_pretrained(directory, local_files_only=True)
        weights = drop_buffers(read_weights(directory))
    else:
        model_class = CompoDistillForConditionalGeneration
        config, weights = _read_compodistill(directory, stored)
    return Checkpoint(
        where=directory, model_class=model_class, config=config, weights=weights, tokenizer_folder=directory
    )


def published_config(directory: Path) -> VisionLanguageConfig:
    """The configuration of what `load_published` loads, whose weights need not be there; errors are its own."""
    with explained_errors(directory):
        return _published_config(directory)


def _published_config(directory: Path) -> VisionLanguageConfig:
    stored = read_config(directory)
    kind, where = _kind(stored), str(directory)
    if kind == "own":
        own: VisionLanguageConfig = _CLASSES[stored["model_type"]].config_class.from_pretrained(
            directory, local_files_only=True
        )
        return own
    if kind == "compodistill":
        return compodistill_config(stored, where=where)
    return mobilevlm_config(stored, find_tower(directory, stored, given=None, inside=True).settings, where=where)


def _read_compodistill(directory: Path, stored: Mapping[str, Any]) -> tuple[VisionLanguageConfig, Weights]:
    if (directory / "adapter_config.json").exists():
        raise ModelError(
            f"{directory}: a training checkpoint with adapters of its own (adapter_config.json), not a release; merge "
            "it with CompoDistill's scripts/upload/prepare_hf_model.py and give the result"
        )
    config = compodistill_config(stored, where=str(directory))
    bridged, tensors = config.projector_type == "taf", drop_buffers(read_weights(directory))
    return config, {compodistill_key(name, bridged=bridged): value for name, value in tensors.items()}


def _open_mobilevlm(directory: Path, stored: Mapping[str, Any], vision_tower: Path | None) -> Checkpoint:
    weights = drop_buffers(read_weights(directory))
    tower = find_tower(directory, stored, given=vision_tower, inside=holds_tower(weights))
    config = mobilevlm_config(stored, tower.settings, where=str(directory))
    return Checkpoint(
        where=directory,
        model_class=MobileVLMForConditionalGeneration,
        config=config,
        weights=tower.replace(weights),
        tokenizer_folder=directory,
        tower_folder=tower.folder,
    )


def default_image_processor(config: VisionLanguageConfig) -> Any:
    """The PIL image processor that a tower was published with, for checkpoints that name it instead of holding it.

    How a picture becomes a square before it is the configuration's ``image_aspect_ratio``.
    """
    side = int(config.vision_config.image_size)
    if config.vision_config.model_type == "siglip_vision_model":
        return SiglipImageProcessorPil(size={"height": side, "width": side})
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _kind(stored: Mapping[str, Any]) -> str | None:
    found = stored.get("model_type")
    if found in OWN_TYPES:
        return "own"
    if found == COMPODISTILL_TYPE:
        return "compodistill"
    # MobileLLaMA, the language model alone, is a plain llama; what makes it a MobileVLM is the projector.
    if "mm_projector_type" in stored and (
        found in MOBILEVLM_TYPES or "MobileLlamaForCausalLM" in (stored.get("architectures") or ())
    ):
        return "mobilevlm"
    return None
