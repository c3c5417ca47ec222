"""Published configurations and key names of MobileVLM V1 / V2 and CompoDistill, as our own classes' ones.

What is read is listed, setting by setting: a ``config.json`` from elsewhere is data, and other settings of the
library can name code to fetch.
"""

import re
from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig, Qwen2Config
from transformers.activations import ACT2FN

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig
from vlm_distill_cache.common.models.vision_tower import TOWERS, TowerConfig
from vlm_distill_cache.common.printing import one_line

MOBILEVLM_TYPES = ("mobilevlm", "mobilellama")
COMPODISTILL_TYPE = "compodistill"
OWN_TYPES = (MobileVLMConfig.model_type, CompoDistillConfig.model_type)
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."

_CLIP_LARGE = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
# The towers that the published checkpoints name instead of describing (their cards; CLIP: arXiv:2103.00020).
KNOWN_TOWERS: dict[str, dict[str, Any]] = {
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
}

_PROJECTORS = ("ldpnet", "ldpnetv2")
_TEXT_SETTINGS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "attention_dropout",
    "use_sliding_window", "sliding_window", "max_window_layers", "bos_token_id", "eos_token_id", "pad_token_id",
    "tie_word_embeddings",
)  # fmt: skip
# What is read of a stored vision_config: a cache or checkpoint from elsewhere is data, and other settings of the
# library can name code to fetch (its attention implementation may be a repository).
_TOWER_SETTINGS = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads",
    "num_channels", "image_size", "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout",
    "initializer_range", "initializer_factor", "vision_use_head",
)  # fmt: skip
_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")


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
        config: TowerConfig = TOWERS[name][0](**{key: stored[key] for key in _TOWER_SETTINGS if key in stored})
    except Exception as error:  # of any class: the library checks each setting in its own way
        raise ModelError(
            f"{where}: its vision tower cannot be made: {one_line(error)}; take the configuration of the same checkpoint"
        ) from error
    return config


def text_settings(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a language model that are read of a stored configuration; unset ones are left out."""
    return {key: stored[key] for key in _TEXT_SETTINGS if stored.get(key) is not None}


def drop_buffers(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the two kinds of buffers that older libraries stored: rotary frequencies and position ids."""
    return {name: value for name, value in tensors.items() if not _BUFFERS.search(name)}


def mobilevlm_config(stored: Mapping[str, Any], tower: dict[str, Any], *, where: str) -> MobileVLMConfig:
    """Our configuration of a published ``mtgv/MobileVLM*``, from its ``config.json`` and its tower's configuration.

    Raises:
        ModelError: Naming ``where``, if it asks for something that no published MobileVLM has.
    """
    projector = str(stored.get("mm_projector_type"))
    if projector not in _PROJECTORS:
        raise ModelError(
            f"{where}: mm_projector_type is {projector!r}, expected one of {', '.join(_PROJECTORS)} (MobileVLM V1, V2)"
        )
    for name, expected in (("mm_vision_select_feature", "patch"), ("mm_use_im_start_end", False)):
        if stored.get(name, expected) != expected:
            raise ModelError(
                f"{where}: {name} is {stored[name]!r}, expected {expected!r} as in all published MobileVLM checkpoints"
            )
    vision = tower_config(tower, where=where)
    width = int(stored.get("mm_hidden_size", vision.hidden_size))
    if width != vision.hidden_size:
        raise ModelError(
            f"{where}: mm_hidden_size is {width}, the vision tower's width is {vision.hidden_size}; give the tower that "
            f"config.json names ({stored.get('mm_vision_tower')})"
        )
    text = LlamaConfig(**text_settings(stored))
    return MobileVLMConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=text.vocab_size,
        projector_type=projector,
        vision_feature_layer=int(stored.get("mm_vision_select_layer", -2)),
        image_aspect_ratio=_aspect_ratio(stored.get("image_aspect_ratio") or "pad", where),
        tie_word_embeddings=bool(stored.get("tie_word_embeddings", False)),
    )


def compodistill_config(stored: Mapping[str, Any], *, where: str) -> CompoDistillConfig:
    """Our configuration of a released CompoDistill teacher or student, from its ``config.json``.

    Raises:
        ModelError: Naming ``where``, if it asks for something that no released CompoDistill model has.
    """
    text_stored, vision_stored = stored.get("text_config"), stored.get("vision_config")
    if not isinstance(text_stored, dict) or not isinstance(vision_stored, dict):
        raise ModelError(f"{where}: expected text_config and vision_config in config.json; download it again")
    if text_stored.get("model_type") != "qwen2":
        raise ModelError(f"{where}: text_config is a {text_stored.get('model_type')!r}, expected 'qwen2'")
    if stored.get("connector_type") != "mlp2x_gelu":
        raise ModelError(f"{where}: connector_type is {stored.get('connector_type')!r}, expected 'mlp2x_gelu'")
    layer = stored.get("vision_feature_layer", -2)
    select = stored.get("vision_feature_select_strategy", "patch")
    if not isinstance(layer, int) or select not in ("patch", "cls_patch"):
        raise ModelError(
            f"{where}: vision_feature_layer {layer!r} with strategy {select!r}; expected one layer and 'patch' or "
            "'cls_patch'"
        )
    text = Qwen2Config(**text_settings(text_stored))
    # Some releases store the whole SigLIP's configuration, whose inner ones need not name their kind.
    inner = vision_stored.get("vision_config", vision_stored)
    vision = tower_config({"model_type": "siglip_vision_model", **inner}, where=where)
    bridge = int(stored.get("connector_hidden_size") or 0) if stored.get("post_connector_use") else 0
    teacher = {"act": "gelu", "in": vision.hidden_size, "hidden": bridge, "out": bridge} if bridge else None
    return CompoDistillConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=text.vocab_size,
        projector_type="taf" if bridge else "mlp",
        teacher_projector=teacher,
        vision_feature_layer=layer,
        vision_feature_select_strategy="patch" if select == "patch" else "full",
        image_aspect_ratio=_aspect_ratio(stored.get("image_aspect_ratio") or "square", where),
        tie_word_embeddings=bool(text_stored.get("tie_word_embeddings", False)),
    )


def compodistill_key(name: str, *, bridged: bool) -> str:
    """Our name of a released CompoDistill tensor; a name that is none of theirs stays, and is refused as left over.

    ``bridged``: whether the model has a post-projector (the student).
    """
    return _renamed(name, _released_names(bridged))


def released_key(name: str, *, bridged: bool) -> str:
    """The inverse of `compodistill_key`, for all tensors of our class."""
    return _renamed(
        name, sorted(((ours, theirs) for theirs, ours in _released_names(bridged)), key=lambda x: -len(x[0]))
    )


def _released_names(bridged: bool) -> list[tuple[str, str]]:
    first, second = ("teacher.linear_1", "teacher.linear_2") if bridged else ("0", "2")
    return [
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower._vision_tower.vision_model.", TOWER_PREFIX),
        ("connector._connector.0.", f"model.mm_projector.{first}."),
        ("connector._connector.2.", f"model.mm_projector.{second}."),
        ("connector.post_connector.", "model.mm_projector.post."),
    ]


def _renamed(name: str, prefixes: list[tuple[str, str]]) -> str:
    found, instead = next(((one, other) for one, other in prefixes if name.startswith(one)), ("", ""))
    return instead + name.removeprefix(found)


def _aspect_ratio(value: object, where: str) -> str:
    if value not in ("pad", "square"):
        raise ModelError(f"{where}: image_aspect_ratio is {value!r}, expected 'pad' or 'square'")
    return str(value)
