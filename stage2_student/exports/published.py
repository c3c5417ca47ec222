"""Students in the layouts that the authors of MobileVLM, CompoDistill and LLaVA-1.5 published, for those authors' own code.

`common.models.published` and ``original_llava`` read what is written here.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPImageProcessorPil

from vlm_distill_cache.common.files.atomic import write_bytes_atomic, write_json_atomic
from vlm_distill_cache.common.models.llava import LlavaOfAnyDepth
from vlm_distill_cache.common.models.original_llava import original_name
from vlm_distill_cache.common.models.published_configs import TOWER_PREFIX, released_key, text_settings
from vlm_distill_cache.common.models.vision_language import VisionLanguageModel
from vlm_distill_cache.stage2_student.exports.llava import as_llava
from vlm_distill_cache.stage2_student.exports.source import Source, cast, refuse, refuse_changed

LAYOUT, TOWER = "published", "vision_tower"
_SHARD = "2GB"  # a file of weights is put together in memory
_POOLED = (12, 12)  # what MobileVLM V2's own code pools any picture to
_log = logging.getLogger(__name__)


def write_published(target: Path, source: Source) -> Source:
    """Write a student in the layout of its own kind's authors.

    Returns:
        The student as it is read back.

    Raises:
        ModelError: If its authors' code could not compute it, or a weight is beyond the precision's range.
    """
    if source.quantise is not None:
        raise refuse(source, LAYOUT, "its authors' code quantises what it loads, and reads nothing quantised")
    refuse_changed(source, LAYOUT)
    own = source.own
    if own is None or (own.config.projector_type in ("mlp", "taf") and own.config.text_config.model_type == "llama"):
        written = _write_llava(target, source)
    elif own.config.text_config.model_type == "llama":
        written = _write_mobilevlm(target, source, own)
    else:
        written = _write_compodistill(target, source, own)
    _write_tokenizer(target, written)
    written.image_processor.save_pretrained(target)
    # In these layouts a picture is no token: its place is an id behind those of all tokens.
    rows = written.core.get_input_embeddings().num_embeddings
    index = rows if own is written.own is not None else max(rows, len(written.encoder.tokenizer))
    return replace(written, encoder=replace(written.encoder, image_token_id=index))


def _write_mobilevlm(target: Path, source: Source, own: VisionLanguageModel) -> Source:
    config = own.config
    _refuse_other_llamas(source, config.text_config)
    if config.projector_type == "ldpnetv2" and own.image_grid != _POOLED:
        _log.warning(
            "%s: its projector gives %d x %d visual tokens; MobileVLM's own code makes 12 x 12 of any picture, and so would "
            "compute something else",
            source.folder,
            *own.image_grid,
        )
    settings = {
        **_settings(source, config.text_config, tied=config.tie_word_embeddings),
        **_sight(source, config, projector=config.projector_type),
        "architectures": ["MobileLlamaForCausalLM"],
        "model_type": "mobilevlm",
        "vision_tower_type": "clip",
    }
    write_json_atomic(target / "config.json", settings)
    tensors = _write_weights(target, source, own.state_dict(), tied=config.tie_word_embeddings)
    _write_tower(target, source, config.vision_config, tensors)
    return source


def _write_llava(target: Path, source: Source) -> Source:
    """In the layout of LLaVA-1.5: a Llama behind a CLIP tower, and linear layers between; its code pads pictures itself."""
    student = source if type(source.core) is LlavaOfAnyDepth else as_llava(source, layout=LAYOUT)
    config = student.core.config
    text, depth = config.text_config, getattr(config, "projector_depth", 2)
    _refuse_other_llamas(source, text)
    for what, found, expected in (
        ("language model", text.model_type, "llama"),
        ("vision tower", config.vision_config.model_type, "clip_vision_model"),
        ("projector's activation", config.projector_hidden_act, "gelu"),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy, "default"),
        ("multimodal_projector_bias", getattr(config, "multimodal_projector_bias", True), True),
    ):
        if found != expected:
            raise refuse(source, LAYOUT, f"its {what} is {found!r}, that of LLaVA-1.5 {expected!r}")
    if not isinstance(config.vision_feature_layer, int):
        raise refuse(
            source, LAYOUT, f"it projects {len(config.vision_feature_layer)} hidden states of its tower, LLaVA-1.5 one"
        )
    kind = "linear" if depth == 1 else f"mlp{depth}x_gelu"
    settings = {
        **_settings(source, text, tied=config.tie_word_embeddings),
        **_sight(student, config, projector=kind),
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
    }
    write_json_atomic(target / "config.json", settings)
    named = {original_name(name, depth): value for name, value in student.core.state_dict().items()}
    tower = {
        name: named.pop(name) for name in list(named) if name.startswith(TOWER_PREFIX)
    }  # read from its folder alone
    _write_weights(target, source, named, tied=config.tie_word_embeddings)
    tower = cast(tower, source.dtype, where=str(source.folder))
    _write_tower(target, student, config.vision_config, tower)
    return student


def _write_compodistill(target: Path, source: Source, own: VisionLanguageModel) -> Source:
    config = own.config
    teacher = config.teacher_projector or {}
    if config.projector_type not in ("mlp", "taf") or config.pool_teacher_tokens:
        raise refuse(
            source, LAYOUT, f"its projector {config.projector_type!r} pools tokens, and CompoDistill's does not"
        )
    if config.projector_type == "taf" and (teacher["hidden"] != teacher["out"] or teacher["act"] != "gelu"):
        raise refuse(
            source,
            LAYOUT,
            f"its teacher's projector is {teacher}; CompoDistill's has one width and the activation gelu",
        )
    bridged = config.projector_type == "taf"
    text, vision = (part.to_dict() for part in (config.text_config, config.vision_config))
    settings = {
        **_settings(source, config.text_config, tied=config.tie_word_embeddings, whole=False),
        "architectures": ["CompoDistillForConditionalGeneration"],
        "model_type": "compodistill",
        "connector_type": "mlp2x_gelu",
        "connector_hidden_size": teacher["hidden"] if bridged else config.text_config.hidden_size,
        "post_connector_use": bridged,
        "ignore_index": -100,
        "image_token_index": -200,
        "image_aspect_ratio": "pad" if source.square == "pad" else "square",
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": "patch" if config.vision_feature_select_strategy == "patch" else "cls_patch",
        "vision_hidden_size": config.vision_config.hidden_size,
        "text_config": {**_text(text), "model_type": "qwen2", "tie_word_embeddings": config.tie_word_embeddings},
        "vision_config": {key: value for key, value in vision.items() if key not in ("dtype", "transformers_version")},
    }
    write_json_atomic(target / "config.json", settings)
    state = dict(own.state_dict())
    if bridged and teacher.get("bias") is False:
        for layer in ("linear_1", "linear_2"):
            name = f"model.mm_projector.teacher.{layer}"
            state[f"{name}.bias"] = state[f"{name}.weight"].new_zeros(state[f"{name}.weight"].shape[0])
    named = {released_key(name, bridged=bridged): value for name, value in state.items()}
    _write_weights(target, source, named, tied=config.tie_word_embeddings)
    return source


def _write_weights(target: Path, source: Source, named: Mapping[str, Tensor], *, tied: bool) -> dict[str, Tensor]:
    """Write all tensors but an output projection that is the embedding; returns them."""
    written = {name: value for name, value in named.items() if not (tied and name.endswith("lm_head.weight"))}
    tensors = cast(written, source.dtype, where=str(source.folder))
    save_torch_state_dict(tensors, target, max_shard_size=_SHARD)
    return tensors


def _write_tower(target: Path, source: Source, vision: Any, tensors: Mapping[str, Tensor]) -> None:
    """The CLIP tower in a folder of its own: the original code opens one by its name or folder before all else."""
    folder = target / TOWER
    folder.mkdir()
    prefix = TOWER_PREFIX.removesuffix("vision_model.")
    tower = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    save_file(tower, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {key: value for key, value in vision.to_dict().items() if key not in ("dtype", "transformers_version")}
    write_json_atomic(folder / "config.json", {**settings, "architectures": ["CLIPVisionModel"]})
    stored, side = source.image_processor.to_dict(), int(vision.image_size)
    kept = {key: stored[key] for key in ("image_mean", "image_std", "resample", "rescale_factor") if stored.get(key)}
    # A padded picture is a square already, and the first releases of this class know the shortest edge alone.
    whole = {"height": side, "width": side}
    size, crops = (whole, False) if source.square == "square" else ({"shortest_edge": side}, True)
    if source.square == "crop":
        size = stored["size"]
    _log.info(
        "The authors' code opens mm_vision_tower of config.json from the folder that it runs in: run it in the exported folder, "
        "or write the full path of %s there, in a copy",
        TOWER,
    )
    CLIPImageProcessorPil(**kept, size=size, crop_size=whole, do_center_crop=crops).save_pretrained(folder)


def _write_tokenizer(target: Path, source: Source) -> None:
    """The tokenizer's files in the words of the library's fourth version, which the authors' code runs with."""
    source.encoder.tokenizer.save_pretrained(target)
    model = source.folder / "tokenizer.model"
    settings = json.loads((target / "tokenizer_config.json").read_text(encoding="utf-8"))
    for name in ("backend", "is_local", "local_files_only"):
        settings.pop(name, None)
    if isinstance(extra := settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = extra
        del settings["extra_special_tokens"]
    if model.is_file():
        shutil.copyfile(model, target / model.name)
    else:  # or the class of a family, which reads that file
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json_atomic(target / "tokenizer_config.json", settings)
    steps = json.loads((target / "tokenizer.json").read_text(encoding="utf-8"))
    merges = steps["model"].get("merges")
    if merges and not any(isinstance(pair, str) or " " in "".join(pair) for pair in merges):
        steps["model"]["merges"] = [" ".join(pair) for pair in merges]
        write_bytes_atomic(target / "tokenizer.json", json.dumps(steps, ensure_ascii=False).encode())


def _settings(source: Source, text: Any, *, tied: bool, whole: bool = True) -> dict[str, Any]:
    """What all these layouts say at the top of ``config.json``."""
    stored = text.to_dict()
    return {
        **(_text(stored) if whole else {key: stored[key] for key in ("vocab_size", "hidden_size")}),
        "tie_word_embeddings": tied,
        "torch_dtype": str(source.dtype).removeprefix("torch."),
        "use_cache": True,
    }


def _text(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a language model in the words of the library's fourth version."""
    settings = text_settings(stored)
    rope = dict(settings.pop("rope_parameters", None) or {})
    theta, kind = rope.pop("rope_theta", settings.get("rope_theta", 10000.0)), rope.pop("rope_type", "default")
    scaling = {"type" if kind in ("linear", "dynamic") else "rope_type": kind, **rope}
    return {**settings, "rope_theta": theta, **({} if kind == "default" else {"rope_scaling": scaling})}


def _sight(source: Source, config: Any, *, projector: str) -> dict[str, Any]:
    """The ``mm_*`` settings of a MobileVLM or LLaVA."""
    return {
        "mm_projector_type": projector,
        "mm_vision_tower": TOWER,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "use_mm_proj": True,
        "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad" if source.square == "pad" else "square",
        "max_sequence_length": config.text_config.max_position_embeddings,
    }


def _refuse_other_llamas(source: Source, text: Any) -> None:
    """Refuse a Llama with parts that the authors' code does not have."""
    width = text.hidden_size // text.num_attention_heads
    for name, expected in (("attention_bias", False), ("mlp_bias", False), ("head_dim", width)):
        found = getattr(text, name, None)
        if found not in (None, expected):
            raise refuse(source, LAYOUT, f"its language model has {name}={found}, and that code knows {expected} alone")
