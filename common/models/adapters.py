"""Low-rank adapters as peft writes them, merged tensor by tensor: ``W + scale * B A``, in float32, then in W's precision.

The model never lies in memory twice: a tensor is merged when it is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.models.parts import ADAPTER
from vlm_distill_cache.common.models.weight_files import StoredTensor, Weights
from vlm_distill_cache.common.printing import one_line

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_NAME = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")
# What would merge in another way; peft leaves those out or empty that are not used.
_UNUSED = (
    "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "layer_replication", "megatron_config",
    "trainable_token_indices", "lora_bias", "target_parameters",
)  # fmt: skip
_REMEDY = (
    "merge it with the code that it was trained with (LLaVA: scripts/merge_lora_weights.py), and give the merged folder"
)


def adapter_files(directory: Path) -> list[Path]:
    """The file of a directory's adapters; a ModelError if there is none."""
    for name in _FILES:
        if (directory / name).is_file():
            return [directory / name]
    raise ModelError(
        f"{directory}: {ADAPTER} is there, but none of {', '.join(_FILES)}; download the whole repository of the model"
    )


def adapter_base(directory: Path) -> object:
    """What adapters say they were made for; nobody has checked it."""
    return _settings(directory).get("base_model_name_or_path")


def merge_adapters(base: Weights, directory: Path, adapters: Weights) -> Weights:
    """Tensors of a model with a directory's adapters merged in, each when it is read.

    Args:
        base: The model's tensors, by the names that the adapters' modules have.
        adapters: Pairs A ``[r, in]`` and B ``[out, r]`` for a weight ``[out, in]``.

    Raises:
        ModelError: If an adapter is not a plain low-rank one of the rank that its settings say, is incomplete, or fits no
            weight of the model.
    """
    settings = _settings(directory)
    scale, rank = _scale(directory, settings)
    pairs: dict[str, dict[str, Tensor | StoredTensor]] = {}
    for name, value in adapters.items():
        match = _NAME.match(name)
        if match is None:
            raise ModelError(f"{directory}: adapter weight {name!r} is no low-rank A or B; {_REMEDY}")
        pairs.setdefault(f"{match['module']}.weight", {})[match["side"]] = value
    if not pairs:
        raise ModelError(f"{directory}: its adapter file holds no tensors; download it again")
    merged = dict(base)
    for name, pair in sorted(pairs.items()):
        if name not in base:
            raise ModelError(
                f"{directory}: its adapter for {name} fits no weight of {settings.get('base_model_name_or_path')}; is that "
                "the model it was trained from?"
            )
        shapes = {side: list(value.shape) for side, value in pair.items()}
        wanted = {"A": [rank, base[name].shape[-1]], "B": [base[name].shape[0], rank]}
        if shapes != wanted:
            raise ModelError(
                f"{directory}: its adapter for {name} has shapes {dict(sorted(shapes.items()))}, expected {wanted} (r={rank} in "
                f"{ADAPTER}, a weight of {list(base[name].shape)}); download the adapter and its base again"
            )
        merged[name] = _merged(base[name], pair["A"], pair["B"], scale)
    _refuse_unadapted(directory, settings, base, pairs)
    return merged


def _merged(
    weight: Tensor | StoredTensor, a: Tensor | StoredTensor, b: Tensor | StoredTensor, scale: float
) -> StoredTensor:
    def read() -> Tensor:
        value = weight[...]
        return (value.float() + scale * (b[...].float() @ a[...].float())).to(value.dtype)

    return StoredTensor(shape=torch.Size(weight.shape), dtype=weight.dtype, read=read)


def _settings(directory: Path) -> Mapping[str, Any]:
    try:
        settings = read_json((directory / ADAPTER).resolve())
    except (OSError, CacheFormatError) as error:
        raise ModelError(f"{directory / ADAPTER}: cannot be read ({error}); download it again") from error
    if not isinstance(settings, dict):
        raise ModelError(f"{directory / ADAPTER}: holds no settings; download it again")
    return settings


def _scale(directory: Path, settings: Mapping[str, Any]) -> tuple[float, int]:
    """The factor of ``B A``, and its rank."""
    where = directory / ADAPTER
    used = [name for name in _UNUSED if settings.get(name)]
    used += [name for name, plain in (("peft_type", "LORA"), ("bias", "none")) if settings.get(name, plain) != plain]
    if used:
        shown = ", ".join(f"{name}={one_line(repr(settings[name]), limit=40)}" for name in used)
        raise ModelError(f"{where}: {shown}: not a plain low-rank adapter, which alone can be merged here; {_REMEDY}")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise ModelError(
            f"{where}: r is {one_line(repr(rank), limit=40)} and lora_alpha {one_line(repr(alpha), limit=40)}, expected "
            "two numbers, r at least 1; download it again"
        )
    return alpha / (rank**0.5 if settings.get("use_rslora") else rank), rank


def _refuse_unadapted(directory: Path, settings: Mapping[str, Any], base: Weights, pairs: Mapping[str, Any]) -> None:
    """Refuse a file from which adapters of some layers are missing: peft would leave those layers as they are."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or settings.get("layers_to_transform") is not None:
        return
    lost = [
        name
        for name in sorted(base)
        if re.search(r"\.layers\.\d+\.", name) and name.startswith("model.layers.") and name.endswith(".weight")
        and any(name.removesuffix(".weight").endswith(f".{target}") for target in targets) and name not in pairs
    ]  # fmt: skip
    if lost:
        raise ModelError(
            f"{directory}: {len(lost)} adapters that target_modules in {ADAPTER} asks for are missing ({', '.join(lost[:3])}); "
            "download the adapter file again"
        )
