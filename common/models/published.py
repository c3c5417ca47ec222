"""MobileVLM V1 / V2 and CompoDistill checkpoints as their authors published them, in our own classes, strictly.

Both come with code of their own that today's library cannot run; here config and weights are read as data, key
by key. A missing, left-over or misshapen tensor is an error, never a random weight.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.atomic import new_directory, read_json, write_json_atomic
from vlm_distill_cache.common.files.hashing import file_checksum
from vlm_distill_cache.common.models.compodistill import CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.mobilevlm import MobileVLMForConditionalGeneration
from vlm_distill_cache.common.models.parts import read_config, tower_settings, tower_weights
from vlm_distill_cache.common.models.published_configs import (
    COMPODISTILL_TYPE,
    KNOWN_TOWERS,
    MOBILEVLM_TYPES,
    OWN_TYPES,
    TOWER_PREFIX,
    compodistill_config,
    compodistill_key,
    drop_buffers,
    mobilevlm_config,
)
from vlm_distill_cache.common.models.vision_language import VisionLanguageConfig, VisionLanguageModel
from vlm_distill_cache.common.models.weight_files import check_tensors, read_weights, weight_files

SOURCE = "converted_from.json"
_HOW = "(a student: SET=vision_tower={name}, --set; anything else: `distill import` with --vision-tower {name})"
_COPIED = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
_CLASSES: dict[str, type[VisionLanguageModel]] = {
    OWN_TYPES[0]: MobileVLMForConditionalGeneration,
    OWN_TYPES[1]: CompoDistillForConditionalGeneration,
}


def is_published(directory: Path) -> bool:
    """Whether `load_published` is the one to load a directory: by its ``config.json`` alone."""
    return _kind(read_config(directory)) is not None


def load_published(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    vision_tower: Path | None = None,
    converted: Path | None = None,
) -> VisionLanguageModel:
    """Load a published MobileVLM or CompoDistill, or a model that one of our classes saved.

    Args:
        directory: ``config.json`` and weights: safetensors or ``.bin``, whole or in shards.
        dtype: Of all weights; None: as stored.
        vision_tower: Directory of the CLIP tower, for a published MobileVLM whose checkpoint does not hold it; it
            replaces one that is there.
        converted: Folder to write our own layout (safetensors) to, once; it is read from there from then on.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ModelError: If the configuration or a weight is not what these models have, or a file is damaged.
    """
    if converted is not None:
        directory = convert_published(directory, converted, vision_tower=vision_tower)
    stored = read_config(directory)
    where, kind = str(directory), _kind(stored)
    if kind is None:
        raise ModelError(
            f"{directory}: model_type is {stored.get('model_type')!r}, expected one of "
            f"{', '.join([*MOBILEVLM_TYPES, COMPODISTILL_TYPE, *OWN_TYPES])}"
        )
    if vision_tower is not None and kind != "mobilevlm":
        raise ModelError(
            f"{directory} holds its own vision tower; leave vision_tower={vision_tower} out, it is for published "
            "MobileVLM checkpoints and for students that are built"
        )
    if kind == "own":
        model_class = _CLASSES[stored["model_type"]]
        config = model_class.config_class.from_pretrained(directory, local_files_only=True)
        return _fill(model_class, config, drop_buffers(read_weights(directory)), dtype=dtype, where=where)
    if kind == "compodistill":
        if (directory / "adapter_config.json").exists():
            raise ModelError(
                f"{directory}: a training checkpoint with adapters of its own (adapter_config.json), not a release; merge "
                "it with CompoDistill's scripts/upload/prepare_hf_model.py and give the result"
            )
        config = compodistill_config(stored, where=where)
        bridged, tensors = config.projector_type == "taf", drop_buffers(read_weights(directory))
        tensors = {compodistill_key(name, bridged=bridged): value for name, value in tensors.items()}
        return _fill(CompoDistillForConditionalGeneration, config, tensors, dtype=dtype, where=where)
    tower_folder = _tower_folder(directory, stored, vision_tower)
    config = mobilevlm_config(stored, _tower_settings(directory, stored, tower_folder), where=where)
    tensors = drop_buffers(read_weights(directory))
    if vision_tower is not None or not any(name.startswith(TOWER_PREFIX) for name in tensors):
        tensors = {name: value for name, value in tensors.items() if not name.startswith(TOWER_PREFIX)}
        tensors |= _separate_tower(directory, stored, tower_folder)
    return _fill(MobileVLMForConditionalGeneration, config, tensors, dtype=dtype, where=where)


def convert_published(directory: Path, target: Path, *, vision_tower: Path | None = None) -> Path:
    """Write a published checkpoint in our own layout, once: safetensors, tokenizer and image processor; return ``target``.

    A ``target`` that was written from the same original is left as it is. ``vision_tower``: as for `load_published`.

    Raises:
        ModelError: If ``target`` holds anything else, or the original cannot be loaded.
    """
    read_config(directory)  # says best what is missing
    source = {path.name: file_checksum(path) for path in [directory / "config.json", *weight_files(directory)]}
    if target.exists():
        try:
            found = read_json(target / SOURCE)
        except (FileNotFoundError, NotADirectoryError, CacheFormatError):
            found = None
        if found != source:
            raise ModelError(
                f"{target}: was not converted from {directory} as it is now; delete it or give another folder"
            )
        return target
    model = load_published(directory, vision_tower=vision_tower)
    with new_directory(target) as temporary:
        model.save_pretrained(temporary)
        if not any((directory / name).is_file() for name in _COPIED[-2:]):
            default_image_processor(model.config).save_pretrained(temporary)
        for name in _COPIED:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, temporary / name)
        write_json_atomic(temporary / SOURCE, source)
    return target


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


def _fill(
    model_class: type[VisionLanguageModel],
    config: VisionLanguageConfig,
    tensors: dict[str, Tensor],
    *,
    dtype: torch.dtype | None,
    where: str,
) -> VisionLanguageModel:
    """Make a model of exactly these tensors."""
    with torch.device("meta"):
        expected = model_class(config).state_dict()
    if config.tie_word_embeddings and "lm_head.weight" not in tensors and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    remedy = "expected exactly the tensors of the published checkpoint: download config.json and weights again"
    check_tensors(tensors, expected, where=where, remedy=remedy)
    if dtype is None:
        dtype = next(value.dtype for value in tensors.values() if value.is_floating_point())
    model: VisionLanguageModel = model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    model.eval()
    return model


def _tower_folder(directory: Path, stored: Mapping[str, Any], given: Path | None) -> Path | None:
    """A local folder of the vision tower: the one given, or the one that config.json names."""
    if given is not None:
        if not (given / "config.json").is_file():
            raise ModelError(f"vision_tower {given}: no config.json; give a directory with a CLIP model")
        return given
    named = directory / str(stored.get("mm_vision_tower") or "")
    return named if named != directory and (named / "config.json").is_file() else None


def _tower_settings(directory: Path, stored: Mapping[str, Any], folder: Path | None) -> dict[str, Any]:
    if folder is not None:
        return tower_settings(folder)
    name = str(stored.get("mm_vision_tower"))
    if name not in KNOWN_TOWERS:
        raise ModelError(
            f"{directory}: its vision tower {name!r} is not one that is known by name ({', '.join(KNOWN_TOWERS)}) and no "
            f"folder; give it by its name on the hub or as a folder {_HOW.format(name=name)}"
        )
    return KNOWN_TOWERS[name]


def _separate_tower(directory: Path, stored: Mapping[str, Any], folder: Path | None) -> dict[str, Tensor]:
    """Weights of a tower that lies outside the checkpoint, under the checkpoint's names."""
    if folder is None:
        name = stored.get("mm_vision_tower")
        raise ModelError(
            f"{directory}: its weights hold no vision tower, config.json names {name!r}; give it by its name on the "
            f"hub or as a folder {_HOW.format(name=name)}"
        )
    return {TOWER_PREFIX + name: value for name, value in tower_weights(folder).items()}
