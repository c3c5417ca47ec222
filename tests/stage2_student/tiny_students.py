"""Random students of both sorts with inputs: MobileVLM, and a library model behind the same interface."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.stage2_student.students.library import LibraryStudent

IMAGE_TOKEN_ID = 40


def _configs(heads=4, key_value_heads=2, layers=2):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=24,
        patch_size=6,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_value_heads, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return vision, text


def _inputs(tokens):
    torch.manual_seed(1)
    ids = torch.randint(1, 39, (1, 12))
    ids[:, 1 : 1 + tokens] = IMAGE_TOKEN_ID
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 24, 24)}


def mobilevlm_student(*, seed=0):
    """A MobileVLM of 4 visual tokens, and inputs with one picture."""
    vision, text = _configs()
    torch.manual_seed(seed)
    config = MobileVLMConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN_ID)
    return MobileVLMForConditionalGeneration(config), _inputs(4)


def library_student(*, seed=0):
    """A LLaVA of 16 visual tokens behind the student's interface, and inputs with one picture."""
    vision, text = _configs()
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN_ID)
    inputs = _inputs(4)
    ids = torch.cat([inputs["input_ids"][:, :1], torch.full((1, 16), IMAGE_TOKEN_ID), inputs["input_ids"][:, 5:]], 1)
    model = LlavaForConditionalGeneration(config)
    return LibraryStudent(model, family_of(config.model_type)), inputs | {"input_ids": ids}
