"""CompoDistill's own models (teacher 4B, student 2B): SigLIP vision tower, MLP projector, Qwen2 language model.

The student's projector is the teacher's, frozen, and one linear layer (TAF), which here is ``projector_type``
``taf``; the teacher's is ``mlp``. The released code takes the tower's hidden state -2 and drops its first token
although SigLIP has no class token: 27 x 27 - 1 = 728 visual tokens.

Source:
    CompoDistill (arXiv:2510.12184); the released checkpoints' remote code is read (``published.py``), never run.
"""

from typing import Any, ClassVar

from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig

from vlm_distill_cache.common.models.vision_language import VisionLanguageConfig, VisionLanguageModel, VisualDecoder


class CompoDistillConfig(VisionLanguageConfig):
    """Configuration of a CompoDistill model: a Qwen2 behind a SigLIP tower."""

    model_type = "compodistill_distill"
    sub_configs = {"text_config": Qwen2Config, "vision_config": SiglipVisionConfig}  # noqa: RUF012

    image_token_id: int = 151936
    projector_type: str = "mlp"
    image_aspect_ratio: str = "square"


class CompoDistillModel(VisualDecoder, Qwen2Model):
    """A Qwen2Model with the projector and the vision tower inside."""

    def __init__(self, config: CompoDistillConfig) -> None:
        super().__init__(config.text_config)
        self.add_vision(config)
        self.post_init()


class CompoDistillForConditionalGeneration(VisionLanguageModel):
    """CompoDistill with its output projection."""

    config_class = CompoDistillConfig
    decoder_class: ClassVar[Any] = CompoDistillModel
    _no_split_modules = ["Qwen2DecoderLayer", "SiglipEncoderLayer"]  # noqa: RUF012
