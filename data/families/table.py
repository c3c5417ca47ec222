"""What differs between model families, in one table: where the parts are and how an image becomes tokens.

A family that is not listed can still be a teacher of logits: `family_of` makes an entry for it that says what is
missing, and the model library's own processor prepares its pictures.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from vlm_distill_cache.data.families.images import (
    any_resolution_images,
    fixed_images,
    gemma3_images,
    image_token_id,
    internvl_images,
    library_images,
    llava_images,
    published_images,
    qwen_images,
    split_images,
)
from vlm_distill_cache.data.families.inputs import (
    counted_inputs,
    grid_position_inputs,
    image_block_inputs,
    library_inputs,
    plain_inputs,
    prefix_inputs,
    stacked_inputs,
    text_config,
)
from vlm_distill_cache.data.images.encoder import AnyImageEncoder
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.data.text.generation import left_padded

VisualRows = Literal["causal", "image", "prefix"]


def no_projector(config: Any) -> dict[str, Any] | None:
    """For families whose projector rules out TAF: it merges, pools or normalises tokens."""
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where a family keeps its parts, and what is particular about its inputs.

    Attributes:
        model_class: Class name in ``transformers``; empty: ``common.models.published`` loads it.
        template: Default prompt template (``data.text.templates``).
        language_model: Attribute path of the decoder whose attention is captured; empty: unknown, logits only.
        vision_tower: Attribute path of the vision tower; empty: unknown.
        projector: Attribute path of the projector; empty: unknown.
        image_encoder: From config, PIL image processor (the library's whole processor where the family is not
            listed) and tokenizer to the image encoder.
        projector_config: From the config to what rebuilds the projector (stage one exports it); it gives None
            where the projector is no two-layer MLP on a tower's patch tokens, so that TAF is impossible.
        visual_rows: What a visual token sees: only what precedes it, also its whole image, or the whole prompt.
        model_inputs: From config, batch and dtype to the keyword arguments of the model.
        most_pictures: How many pictures and videos a sample may have (`SampleEncoder.most_pictures`); None: any number.
    """

    model_class: str
    template: str = "chat"
    language_model: str = "model.language_model"
    vision_tower: str = "model.vision_tower"
    projector: str = "model.multi_modal_projector"
    image_encoder: Callable[[Any, Any, Any], AnyImageEncoder]
    projector_config: Callable[[Any], dict[str, Any] | None] = no_projector
    visual_rows: VisualRows = "causal"
    model_inputs: Callable[..., Mapping[str, Any]] = plain_inputs
    most_pictures: int | None = None

    @property
    def is_listed(self) -> bool:
        """Whether all signals are available, not logits alone."""
        return bool(self.language_model)

    @property
    def parts(self) -> dict[str, str]:
        """The paths that a changed model says (`common.models.changed`); empty where the family is not listed."""
        names = ("language_model", "vision_tower", "projector")
        return {name: getattr(self, name) for name in names} if self.is_listed else {}

    @property
    def packs(self) -> bool:
        """Whether independent conversations can share a picture in one sequence (`data.families.inputs`)."""
        return self.is_listed and self.visual_rows != "prefix"

    def generation_inputs(
        self,
        config: Any,
        prompts: Sequence[EncodedSample],
        pad_id: int,
        device: torch.device,
        *,
        dtype: torch.dtype,
    ) -> Mapping[str, Any]:
        """The keyword arguments of ``generate`` for prompts, at least one, without labels.

        Returns:
            Ids and mask int64 ``[B, T]``, padded on the left; token types where the family has them; the pictures.
        """
        batch = left_padded(collate(prompts, pad_id), pad_id).to(device)
        inputs = dict(self.model_inputs(config, batch, dtype=dtype))
        positions = inputs.pop("position_ids", None)
        inputs["attention_mask"] = batch.attention_mask.long()
        if positions is not None and positions.ndim == 3:
            # Positions by time, row and column: the library derives them from where image tokens (1) and those of videos (2) are.
            inputs["mm_token_type_ids"] = batch.visual_mask.long() * (
                1 + (batch.input_ids == config.video_token_id).long()
            )
        return inputs

    def image_token_id(self, config: Any) -> int:
        """Id that stands for one visual token in ``input_ids``; raises ModelError if there is none."""
        return image_token_id(config)


def _projector_config(config: Any, *, act: str, bias: bool) -> dict[str, Any]:
    """What rebuilds a two-layer projector."""
    layers = config.vision_feature_layer
    width = text_config(config).hidden_size
    return {
        "act": act,
        "bias": bias,
        "in": config.vision_config.hidden_size * (1 if isinstance(layers, int) else len(layers)),
        "hidden": width,
        "out": width,
        "vision_feature_layer": layers,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
    }


def _mlp_config(config: Any) -> dict[str, Any] | None:
    """Of the LLaVA family; of its original checkpoints, some have more layers or fewer."""
    if getattr(config, "projector_depth", 2) != 2:
        return None
    bias = getattr(config, "multimodal_projector_bias", True)
    return _projector_config(config, act=config.projector_hidden_act, bias=bias)


def _published_mlp_config(config: Any) -> dict[str, Any] | None:
    """Of our own classes, where the projector is the plain MLP (CompoDistill's teacher)."""
    return _projector_config(config, act="gelu", bias=True) if config.projector_type == "mlp" else None


def _alike(model_classes: Mapping[str, str], **entry: Any) -> dict[str, Family]:
    """Families that differ in the class of their model alone, given by model_type."""
    return {name: Family(model_class=model_class, **entry) for name, model_class in model_classes.items()}


FAMILIES: dict[str, Family] = {
    "llava": Family(
        model_class="LlavaForConditionalGeneration",
        template="vicuna_v1",
        image_encoder=llava_images,
        projector_config=_mlp_config,
    ),
    **_alike(
        {"llava_next": "LlavaNextForConditionalGeneration"},
        image_encoder=any_resolution_images,
        projector_config=_mlp_config,
    ),
    **_alike(
        {"llava_onevision": "LlavaOnevisionForConditionalGeneration"},
        image_encoder=any_resolution_images,
        projector_config=_mlp_config,
        model_inputs=counted_inputs,
    ),
    **_alike(
        {
            "qwen2_vl": "Qwen2VLForConditionalGeneration",
            "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
            "qwen3_vl": "Qwen3VLForConditionalGeneration",
        },
        vision_tower="model.visual",
        projector="model.visual.merger",
        image_encoder=qwen_images,
        model_inputs=grid_position_inputs,
    ),
    **_alike(
        {"idefics3": "Idefics3ForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration"},
        language_model="model.text_model",
        vision_tower="model.vision_model",
        projector="model.connector",
        image_encoder=split_images,
        model_inputs=stacked_inputs,
    ),
    "internvl": Family(
        model_class="InternVLForConditionalGeneration",
        image_encoder=internvl_images,
    ),
    "paligemma": Family(
        model_class="PaliGemmaForConditionalGeneration",
        template="paligemma",
        image_encoder=fixed_images,
        visual_rows="prefix",
        model_inputs=prefix_inputs,
    ),
    "gemma3": Family(
        model_class="Gemma3ForConditionalGeneration",
        image_encoder=gemma3_images,
        visual_rows="image",
        model_inputs=image_block_inputs,
    ),
    **_alike(
        {"mobilevlm_distill": "", "compodistill_distill": ""},
        template="vicuna_v1",
        language_model="model",
        vision_tower="model.vision_tower.vision_tower.vision_model",
        projector="model.mm_projector",
        image_encoder=published_images,
        projector_config=_published_mlp_config,
    ),
}


def unlisted_family() -> Family:
    """The entry of a family that is not in the table: logits only, pictures by the library's own processor."""
    return Family(
        model_class="AutoModelForImageTextToText",
        language_model="",
        vision_tower="",
        projector="",
        image_encoder=library_images,
        model_inputs=library_inputs,
        most_pictures=1,  # that its processor makes of several what it makes of each is not known
    )


def family_of(model_type: str) -> Family:
    """Look a model's family up; one that is not listed gives logits only."""
    return FAMILIES.get(model_type) or unlisted_family()


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Fetch a part of ``model`` by its dotted attribute path."""
    return model.get_submodule(path)
