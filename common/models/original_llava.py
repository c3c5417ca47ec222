"""LLaVA-1 and 1.5 checkpoints in the layout of their own authors (``liuhaotian/llava-v1.5-7b``), in the library's class.

What may lie in a folder, beside ``config.json`` with its ``mm_*`` keys:

- the whole model, with or without the vision tower; the projector in it, or in ``mm_projector.bin``;
- ``mm_projector.bin`` alone, what pre-training gives, for the language model that ``config.json`` names;
- low-rank adapters and ``non_lora_trainables.bin``, merged here into the model that ``adapter_config.json`` names.

Every tensor is accounted for; a missing, left-over or misshapen one is an error before any is read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, LlavaConfig, LlavaImageProcessorPil

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.common.models.adapters import adapter_base, adapter_files, merge_adapters
from vlm_distill_cache.common.models.checkpoint import Checkpoint
from vlm_distill_cache.common.models.explained import explained_errors
from vlm_distill_cache.common.models.llava import llava_class
from vlm_distill_cache.common.models.parts import ADAPTER, has_tokenizer, read_config
from vlm_distill_cache.common.models.published import is_published
from vlm_distill_cache.common.models.published_configs import TOWER_PREFIX, drop_buffers, text_settings, tower_config
from vlm_distill_cache.common.models.towers import find_tower, holds_tower
from vlm_distill_cache.common.models.weight_files import Weights, has_weights, open_files, weight_files
from vlm_distill_cache.common.printing import one_line

_MARKS = ("mm_vision_tower", "mm_projector_type", "mm_hidden_size")
_PROJECTOR_FILE, _TRAINED_FILE = "mm_projector.bin", "non_lora_trainables.bin"
_PROJECTOR = "model.mm_projector."
_PIXELS = (  # what decides pixels in the processor of a tower
    "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop",
    "do_rescale", "do_normalize",
)  # fmt: skip
_DEPTHS = re.compile(r"mlp([1-9]\d?)x_gelu")
_CLASSES = {"llava_mistral": "LlavaMistralForCausalLM", "llava_qwen": "LlavaQwenForCausalLM"}
_LLAMA = "LlavaLlamaForCausalLM"
_CONVERTED = {  # by class: the same models in the library's layout
    _LLAMA: "llava-hf/llava-1.5-7b-hf",
    "tiles": "llava-hf/llava-v1.6-vicuna-7b-hf",  # of the same class
    "LlavaMistralForCausalLM": "llava-hf/llava-v1.6-mistral-7b-hf",
    "LlavaQwenForCausalLM": "llava-hf/llava-onevision-qwen2-7b-ov-hf",
}


def is_original_llava(directory: Path) -> bool:
    """Whether a directory is in the original layout of LLaVA, to be read here or refused; by its ``config.json`` alone."""
    stored = read_config(directory)
    marked = any(key in stored for key in _MARKS) and not isinstance(stored.get("vision_config"), dict)
    return marked and not is_published(directory)


def open_original_llava(directory: Path, *, vision_tower: Path | None = None) -> Checkpoint:
    """Look through an original LLaVA-1 or 1.5, without reading a value of its weights.

    Args:
        directory: One of the folders that stand at the top of this file.
        vision_tower: Directory of the CLIP tower to use, in place of the one inside or the one named.

    Raises:
        ModelError: If it is another LLaVA than these, a part of it cannot be had, or its tensors are not exactly the model's.
    """
    with explained_errors(directory):
        return _open(directory, vision_tower)


def _open(directory: Path, vision_tower: Path | None) -> Checkpoint:
    stored = read_config(directory)
    refuse_other_llavas(stored, where=directory)
    files, weights, tokenizer_folder = _collect(directory, stored)
    tower = find_tower(directory, stored, given=vision_tower, inside=holds_tower(weights))
    config = _llava_config(stored, tower.settings, where=directory)
    if tower.folder is not None and not tower.inside:
        files |= {f"vision_tower/{path.name}": path for path in weight_files(tower.folder)}
    return Checkpoint(
        where=directory,
        model_class=llava_class(_depth(stored)),
        config=config,
        weights={_library_name(name, _depth(stored)): value for name, value in tower.replace(weights).items()},
        tokenizer_folder=tokenizer_folder,
        tower_folder=tower.folder,
        files=files,
    )


def original_config(directory: Path) -> Any:
    """The library's configuration of what `open_original_llava` opens, whose weights need not be there; errors are its own."""
    with explained_errors(directory):
        stored = read_config(directory)
        refuse_other_llavas(stored, where=directory)
        return _llava_config(stored, find_tower(directory, stored, given=None, inside=True).settings, where=directory)


def original_image_processor(stored: Mapping[str, Any], tower_processor: Any) -> Any:
    """The processor that treats pictures as the original code does, of its tower's: padded to a square, or cropped."""
    settings = tower_processor.to_dict()
    same = {name: settings[name] for name in _PIXELS if settings.get(name) is not None}
    return LlavaImageProcessorPil(**same, do_pad=stored.get("image_aspect_ratio") == "pad")


def refuse_other_llavas(stored: Mapping[str, Any], *, where: Path) -> None:
    """Refuse, by its configuration alone, a checkpoint in this layout that is not read here.

    Raises:
        ModelError: What it is, and what to take instead.
    """
    kind, made = stored.get("model_type"), stored.get("architectures")
    name = str(made[0]) if isinstance(made, list) and made else _CLASSES.get(str(kind), _LLAMA)
    ratio = stored.get("image_aspect_ratio")
    tiles = str(ratio).startswith("anyres") or str(stored.get("mm_patch_merge_type") or "flat") != "flat"
    example = _CONVERTED["tiles" if tiles and name == _LLAMA else name if name in _CONVERTED else _LLAMA]
    remedy = f"take the same model as converted by llava-hf (for example {example}), if there is one"
    what = f"{where}: a checkpoint in the original LLaVA layout (model_type {one_line(repr(kind), limit=60)})"
    if kind not in ("llava", "llava_llama") or name != _LLAMA:
        raise ModelError(
            f"{what} of class {one_line(name, limit=60)}; of this layout, only LLaVA-1 and 1.5 with a Llama are read "
            f"({_LLAMA}): {remedy}"
        )
    if tiles:
        raise ModelError(
            f"{what} that cuts pictures into tiles (LLaVA-1.6, image_aspect_ratio {one_line(repr(ratio), limit=60)}), which "
            f"is not read in this layout; {remedy}"
        )
    for key, expected in (
        ("mm_use_im_start_end", (False,)),
        ("mm_vision_select_feature", ("patch",)),
        ("mm_resampler_type", (None,)),
        ("s2", (False,)),
        ("image_aspect_ratio", ("pad", "square", None)),
    ):
        if key in stored and stored[key] not in expected:
            shown = " or ".join(map(repr, expected))
            raise ModelError(
                f"{what}: {key} in config.json is {one_line(repr(stored[key]), limit=60)}, expected {shown}; {remedy}"
            )
    if _depth(stored) is None:
        raise ModelError(
            f"{what}: mm_projector_type in config.json is {one_line(repr(stored.get('mm_projector_type')), limit=60)}, "
            f"expected linear or mlp2x_gelu (or another depth of it); {remedy}"
        )


def _depth(stored: Mapping[str, Any]) -> int | None:
    """Linear layers of the projector; None: it is of another kind. LLaVA-1's configurations do not name theirs."""
    kind = str(stored.get("mm_projector_type") or "linear")
    match = _DEPTHS.fullmatch(kind)
    return int(match[1]) if match else 1 if kind == "linear" else None


def _llava_config(stored: Mapping[str, Any], tower: dict[str, Any], *, where: Path) -> Any:
    vision = tower_config(tower, where=str(where))
    if vision.model_type != "clip_vision_model":
        raise ModelError(f"{where}: its vision tower is a {vision.model_type}, expected CLIP's; give another directory")
    width = stored.get("mm_hidden_size") or vision.hidden_size
    if width != vision.hidden_size:
        raise ModelError(
            f"{where}: mm_hidden_size in config.json is {one_line(repr(width), limit=60)}, the vision tower's width is "
            f"{vision.hidden_size}; give the tower that it names ({stored.get('mm_vision_tower')})"
        )
    layer, depth = stored.get("mm_vision_select_layer", -2), vision.num_hidden_layers
    if not isinstance(layer, int) or not -depth - 1 <= layer <= depth:
        raise ModelError(f"{where}: mm_vision_select_layer in config.json is {layer!r}, the tower has {depth} layers")
    text = LlamaConfig(**text_settings(stored))
    linear = _depth(stored)
    return LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=text.vocab_size,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        projector_hidden_act="gelu",
        vision_feature_layer=layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=bool(stored.get("tie_word_embeddings", False)),
        **({} if linear == 2 else {"projector_depth": linear}),
    )


def _collect(directory: Path, stored: Mapping[str, Any]) -> tuple[dict[str, Path], Weights, Path]:
    """All tensors of a checkpoint under their own names, the files they are in, and the tokenizer's folder."""
    extra = directory / _PROJECTOR_FILE
    if (directory / ADAPTER).is_file():
        base = _base(directory, adapter_base(directory), f"base_model_name_or_path in {ADAPTER}")
        adapters = adapter_files(directory)
        files, weights = _whole(base, "base")
        trained = [path for path in (directory / _TRAINED_FILE, extra) if path.is_file()]
        files |= {path.name: path for path in (*adapters, *trained)}
        weights = merge_adapters(weights, directory, open_files(adapters))
        for path in trained:
            weights |= _renamed(open_files([path]))
    elif extra.is_file() and not has_weights(directory):
        base = _base(directory, stored.get("_name_or_path"), "_name_or_path in config.json")
        files, weights = _whole(base, "base")
        files[extra.name] = extra
        weights |= _renamed(open_files([extra]))
    else:
        base = directory
        files, weights = _whole(directory, "model")
    return files, weights, directory if has_tokenizer(directory) else base


def _whole(directory: Path, role: str) -> tuple[dict[str, Path], Weights]:
    """The tensors of a whole model, or of a language model, with the projector that lies beside them."""
    paths = weight_files(directory)
    weights = drop_buffers(open_files(paths))
    files = {f"{role}/{path.name}": path for path in paths}
    beside = directory / _PROJECTOR_FILE
    if beside.is_file():
        projector = _renamed(open_files([beside]))
        files[f"{role}/{beside.name}"] = beside
        for name in sorted(projector.keys() & weights.keys()):
            if not _equal(projector[name], weights[name]):
                raise ModelError(
                    f"{directory}: {name} differs between {_PROJECTOR_FILE} and {paths[0].name} (or its other shards), so "
                    f"nobody knows which is meant; delete {_PROJECTOR_FILE} to use the latter"
                )
        weights |= projector
    return files, weights


def _equal(left: Any, right: Any) -> bool:
    return bool(left.shape == right.shape and (left[...].float() == right[...].float()).all())


def _renamed(weights: Weights) -> Weights:
    """Tensors of a training's own files under the names of a whole checkpoint."""
    names = {name: re.sub(r"^base_model\.", "", name) for name in weights}
    wrapped = any(name.startswith("model.model.") for name in names.values())
    found: Weights = {}
    for name, plain in names.items():
        plain = plain.removeprefix("model.") if wrapped else plain
        plain = f"model.{plain}" if plain.startswith("mm_projector.") else plain
        found[plain] = weights[name]
    return drop_buffers(found)


def _base(directory: Path, named: object, where: str) -> Path:
    """The folder of the model that a checkpoint was trained from."""
    lack = f"{directory}: holds a part of a model only, and the rest of it"
    remedy = f"download the model that it was trained from, and write its folder as {where}"
    if not isinstance(named, str) or not named:
        raise ModelError(f"{lack} is not named; {remedy}")
    for folder in (directory / named, Path(named)):
        if (folder / "config.json").is_file() and folder.resolve() != directory.resolve():
            return folder
    try:
        return model_folder(named, what=f"{directory}: the model it was trained from").path
    except (ConfigError, ModelError) as error:
        shown = one_line(named, limit=200)
        raise ModelError(f"{lack}, {shown!r}, cannot be found: {error}; {remedy}") from error


def _library_name(name: str, depth: int | None) -> str:
    """The library's name of an original tensor; a name that is none of theirs stays, and is refused as left over."""
    if name.startswith(_PROJECTOR):
        rest = name.removeprefix(_PROJECTOR)
        if depth == 1:
            return f"model.multi_modal_projector.0.{rest}"
        layer, _, part = rest.partition(".")
        if depth == 2:
            layer = {"0": "linear_1", "2": "linear_2"}.get(layer, layer)
        return f"model.multi_modal_projector.{layer}.{part}"
    if name.startswith(TOWER_PREFIX):
        return "model.vision_tower." + name.removeprefix(TOWER_PREFIX)
    for part in ("embed_tokens.", "layers.", "norm."):
        if name.startswith(f"model.{part}"):
            return "model.language_model." + name.removeprefix("model.")
    return name


def original_name(name: str, depth: int) -> str:
    """The inverse of `_library_name`: of a projector of ``depth`` linear layers, by the names of our class or the library's."""
    part, _, rest = name.removeprefix("model.").partition(".")
    if part == "multi_modal_projector":
        layer, _, value = rest.partition(".")
        layer = {"linear_1": "0", "linear_2": "2"}.get(layer, layer)
        return _PROJECTOR + (value if depth == 1 else f"{layer}.{value}")
    if part == "vision_tower":
        return TOWER_PREFIX + rest
    return f"model.{rest}" if part == "language_model" else name
