"""Parts of other checkpoints for a model of ours: a vision tower, a language model.

Each is read from a directory that someone downloaded, and fills its place exactly: a missing, left-over or
misshapen tensor is an error.
"""

from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.models.published_configs import KNOWN_TOWERS, drop_buffers, text_settings
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.common.models.weight_files import GGUF, Weights, check_tensors, copy_weights, read_weights
from vlm_distill_cache.common.printing import brief, one_line

_LANGUAGE_MODELS = {"llama": "llama", "mobilellama": "llama", "qwen2": "qwen2"}
ADAPTER = "adapter_config.json"
_FIRST = "embeddings.patch_embedding.weight"
_OTHERS_PARTS = ("model.vision_tower.", "model.mm_projector.")


MAX_LAYERS = 2000  # published models have up to 130


def read_config(directory: Path) -> dict[str, Any]:
    """Read a checkpoint's ``config.json``.

    Raises:
        ModelError: If there is none, or it is damaged; says what is there instead.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(_without_config(directory))
    try:
        stored = read_json(path.resolve())
    except CacheFormatError as error:
        raise ModelError(f"{error}; expected JSON in UTF-8 without a byte order mark: download it again") from error
    if not isinstance(stored, dict):
        found = type(stored).__name__
        raise ModelError(
            f"{directory} cannot be loaded: config.json holds {found}, expected an object of settings; download it again"
        )
    for name, section in [
        ("", stored),
        *((f"{key}.", value) for key, value in stored.items() if isinstance(value, dict)),
    ]:
        for key in ("num_hidden_layers", "num_layers", "n_layer", "depth"):
            # Each is built before weights are compared.
            if isinstance(count := section.get(key), int) and count > MAX_LAYERS:
                raise ModelError(
                    f"{path}: {name}{key} is {brief(repr(count), limit=80)}, expected at most {MAX_LAYERS}; download it again"
                )
    return stored


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's own file lies in a directory; settings beside it (``tokenizer_config.json``) make none."""
    return any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def describe_lost_tokenizer(directory: Path) -> str:
    """What to do with a checkpoint's directory in which there is no tokenizer."""
    return (
        f"{directory}: no usable tokenizer: expected tokenizer.json, tokenizer.model, or vocab.json with merges.txt, and none "
        "is there; download the checkpoint again, with all its files, or copy its tokenizer's files there "
        "(tokenizer_config.json and special_tokens_map.json, too)"
    )


def describe_adapter(directory: Path) -> str:
    """What to do with a directory of low-rank adapters, whose whole model is not in it."""
    try:
        settings = read_json((directory / ADAPTER).resolve())
    except (OSError, CacheFormatError):
        settings = {}
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    base = one_line(base if isinstance(base, str) and base else "BASE", limit=200)
    return (
        f"{directory}: holds adapters ({ADAPTER}), which are no model without the one they were made for ({base}); merge "
        "them into it and give the folder MERGED (peft: `pip install 'vlm-distill-cache[lora]'`):\n"
        "  from peft import PeftModel\n"
        "  from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"  base = AutoModelForImageTextToText.from_pretrained({base!r})\n"
        f"  PeftModel.from_pretrained(base, {str(directory)!r}).merge_and_unload().save_pretrained('MERGED')\n"
        f"  AutoProcessor.from_pretrained({base!r}).save_pretrained('MERGED')"
    )


def _without_config(directory: Path) -> str:
    """What is there instead of a checkpoint with its ``config.json``."""
    if not directory.exists():
        return (
            f"{directory}: there is no such folder; give one that is there, or a name on the hub (org/name[@revision])"
        )
    if directory.suffix == ".gguf" or (directory.is_dir() and any(directory.glob("*.gguf"))):
        return f"{directory}: {GGUF}"
    if not directory.is_dir():
        return f"{directory}: no folder; give the folder that holds config.json, weights and tokenizer"
    if (directory / ADAPTER).is_file():
        return describe_adapter(directory)
    inner = sorted({path.parent for pattern in ("*/", "*/*/") for path in directory.glob(f"{pattern}config.json")})
    if inner:
        shown = ", ".join(str(path) for path in inner[:3])
        return f"{directory}: no config.json there; these folders inside it have one, give one of them: {shown}"
    found = "no config.json there" + ("" if any(directory.iterdir()) else ": it is empty")
    return (
        f"{directory}: {found}; expected a checkpoint directory with model, tokenizer and image processor files: one that "
        "save_pretrained wrote, or a downloaded one"
    )


def tower_settings(directory: Path) -> dict[str, Any]:
    """The configuration of a vision tower: alone, inside a whole CLIP or SigLIP, or inside a vision-language model."""
    stored = read_config(directory)
    if (named := str(stored.get("mm_vision_tower"))) in KNOWN_TOWERS:
        return KNOWN_TOWERS[named]
    inner = stored.get("vision_config")
    if not isinstance(inner, dict):
        return stored
    kind = str(stored.get("model_type"))
    return {"model_type": f"{kind}_vision_model", **inner}


def tower_weights(directory: Path) -> Weights:
    """A vision tower's tensors under the library's own names, without those of whatever lies beside it."""
    found = drop_buffers(read_weights(directory))
    # A tower alone may have a prefix or none; in CLIP, SigLIP, LLaVA, MobileVLM and CompoDistill each has its own.
    prefixes = [name.removesuffix(_FIRST) for name in found if name.endswith(_FIRST)]
    if len(prefixes) != 1:
        raise ModelError(
            f"{directory}: {len(prefixes)} tensors are named ...{_FIRST}, expected one: the first of a CLIP or SigLIP "
            "vision tower; give a directory that holds one"
        )
    prefix = prefixes[0]
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


def fill_vision_tower(student: VisionLanguageModel, directory: Path) -> None:
    """Copy a tower's weights from a directory into a model of ours; a ModelError if they are not exactly the tower's."""
    tensors, encoder = tower_weights(directory), student.vision_encoder
    remedy = "give a complete checkpoint of the tower"
    check_tensors(tensors, encoder.state_dict(), where=f"vision_tower {directory}", remedy=remedy)
    copy_weights(tensors, encoder.state_dict())


def language_model_settings(directory: Path, *, expected: str) -> dict[str, Any]:
    """The settings that are read of a language model's directory, a Llama (MobileLLaMA) or Qwen2 as the library saves it.

    ``expected`` is ``llama`` or ``qwen2``; another kind is a ModelError.
    """
    stored = read_config(directory)
    if _LANGUAGE_MODELS.get(str(stored.get("model_type"))) != expected:
        raise ModelError(
            f"language_model {directory}: model_type is {stored.get('model_type')!r}, this student needs {expected!r}"
        )
    return text_settings(stored)


def fill_language_model(student: VisionLanguageModel, directory: Path) -> None:
    """Copy a causal language model's weights from a directory into a model of ours; a ModelError if they do not fit."""
    tensors = drop_buffers(read_weights(directory))
    if "lm_head.weight" not in tensors and read_config(directory).get("tie_word_embeddings"):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    own = {name: value for name, value in student.state_dict().items() if not name.startswith(_OTHERS_PARTS)}
    remedy = "give a complete checkpoint of a language model"
    check_tensors(tensors, own, where=f"language_model {directory}", remedy=remedy)
    copy_weights(tensors, own)
