"""MobileVLM V1 and V2 as a transformers model: CLIP vision tower, LDP projector, Llama language model.

State-dict keys are exactly the published checkpoints' (``model.layers...``, ``model.mm_projector.mlp.mlp.0``,
``model.vision_tower.vision_tower.vision_model...``), which is why the inner model *is* a ``LlamaModel`` that
also holds the projector and the tower.
"""

from typing import Any, ClassVar

from transformers import CLIPVisionConfig, LlamaConfig, LlamaModel

from vlm_distill_cache.common.models.vision_language import VisionLanguageConfig, VisionLanguageModel, VisualDecoder


class MobileVLMConfig(VisionLanguageConfig):
    """Configuration of a MobileVLM: a Llama behind a CLIP tower; V1 has the projector ``ldpnet``, V2 ``ldpnetv2``."""

    model_type = "mobilevlm_distill"
    sub_configs = {"text_config": LlamaConfig, "vision_config": CLIPVisionConfig}  # noqa: RUF012


class MobileVLMModel(VisualDecoder, LlamaModel):
    """The published ``model``: a LlamaModel with the projector and the vision tower inside."""

    def __init__(self, config: MobileVLMConfig) -> None:
        super().__init__(config.text_config)
        self.add_vision(config)
        self.post_init()


class MobileVLMForConditionalGeneration(VisionLanguageModel):
    """MobileVLM with its output projection."""

    config_class = MobileVLMConfig
    decoder_class: ClassVar[Any] = MobileVLMModel
    _no_split_modules = ["LlamaDecoderLayer", "CLIPEncoderLayer"]  # noqa: RUF012
