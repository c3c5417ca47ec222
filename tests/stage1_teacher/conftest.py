"""Caches of tiny teachers, one a family, each built once."""

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers as hf
from family_caches import build, write_data
from tiny_families import NEXT_CHAT, TEXT, VISION, byte_tokenizer, make_lively, save_tiny, square


@pytest.fixture(scope="session")
def family_data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def family_cache(tmp_path_factory, family_data: Path):
    """From a family's name to a cache with every signal that it can give."""

    @cache
    def built(name: str):
        folder = tmp_path_factory.mktemp(name)
        signals = ["logits", "answer_attention", "text_attention", "visual_columns", "tower_attention"]
        if name != "gemma3" and not name.startswith("paligemma"):
            signals.append("visual_map")
        return build(save_tiny(name, folder / "teacher"), family_data, folder / "cache", signals=tuple(signals))

    return built


@pytest.fixture(scope="session")
def unlisted_teacher(tmp_path_factory) -> Path:
    """A VipLlava: loaded, prepared and run by the library alone."""
    folder = tmp_path_factory.mktemp("vipllava")
    tokenizer = byte_tokenizer("<image>", chat=NEXT_CHAT, bos=True)
    config = hf.VipLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}, projection_dim=32),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layers=[-1, -2],
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.VipLlavaForConditionalGeneration(config)
    make_lively(model)
    model.save_pretrained(folder)
    images = hf.CLIPImageProcessorPil(size=square(), crop_size=square(), do_center_crop=False)
    hf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    ).save_pretrained(folder)  # fmt: skip
    return folder
