"""Tiny random models of every family's architecture, saved as their authors' checkpoints are laid out."""

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers as hf
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration

WIDTH, LAYERS = 32, 3
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 24, "patch_size": 8,
}  # fmt: skip
PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72]]

# The parts of the published chat templates that pictures, videos and plain turns reach.
QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif c.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NEXT_CHAT = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {% else %} ASSISTANT: {% endif %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>\n{% elif c.type == 'video' %}<video>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)
WITH_VIDEO = QWEN_CHAT.replace("<|vision_start|><|video_pad|><|vision_end|>", "<video>\n")
ONEVISION_CHAT = WITH_VIDEO.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>\n")
INTERNVL_CHAT = WITH_VIDEO.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>\n")
SMOL_CHAT = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}{% if m.content[0].type == 'image' %}:{% else %}: "
    "{% endif %}{% for c in m.content %}{% if c.type == 'image' %}<image>{% elif c.type == 'video' %}<video>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
GEMMA_CHAT = (
    "<s>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


def byte_tokenizer(*special: str, chat: str = "", named: dict[str, str] | None = None, bos: bool = False) -> Any:
    """A fast tokenizer of single bytes that knows a family's special tokens; ``named`` become its attributes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    added = [AddedToken(token, special=True, normalized=False) for token in special]
    tokenizer.add_special_tokens(added)
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=chat or None, extra_special_tokens=named or {},
        clean_up_tokenization_spaces=False, padding_side="right",
    )  # fmt: skip


def square(side: int = 24) -> dict[str, int]:
    return {"height": side, "width": side}


def _clip(**options: Any) -> Any:
    return hf.CLIPImageProcessorPil(size=square(), crop_size=square(), do_center_crop=False, **options)


def _llava(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer("<image>", bos=True)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=9,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), tokenizer, _clip()


def _llava_original(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer(bos=True)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 3}, projection_dim=32),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=len(tokenizer), image_seq_length=9,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config), tokenizer, None


def _llava_next(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer("<image>", chat=NEXT_CHAT, bos=True)
    config = hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=hf.MistralConfig(**TEXT, vocab_size=len(tokenizer), sliding_window=40),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_grid_pinpoints=PINPOINTS,
        image_seq_length=9,
    )  # fmt: skip
    processor = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=square(), image_grid_pinpoints=PINPOINTS
    )
    return hf.LlavaNextForConditionalGeneration(config), tokenizer, processor


def _llava_onevision(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer("<image>", "<video>", "<|im_start|>", "<|im_end|>", chat=ONEVISION_CHAT)
    config = hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    processor = hf.LlavaOnevisionImageProcessorPil(size=square(), image_grid_pinpoints=PINPOINTS)
    return hf.LlavaOnevisionForConditionalGeneration(config), tokenizer, processor


def _llava_next_video(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer("<image>", "<video>", chat=NEXT_CHAT, bos=True)
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**{**VISION, "patch_size": 6}, projection_dim=32),
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"), image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    processor = hf.LlavaNextImageProcessorPil(
        size={"shortest_edge": 24}, crop_size=square(), image_grid_pinpoints=PINPOINTS
    )
    return hf.LlavaNextVideoForConditionalGeneration(config), tokenizer, processor


QWEN_SPECIAL = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def _qwen(config_class: Any, vision: dict[str, Any], **text: Any) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer(*QWEN_SPECIAL, chat=QWEN_CHAT)
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = config_class(
        vision_config=vision,
        text_config={**TEXT, "vocab_size": len(tokenizer), "rope_parameters": rope, **text},
        image_token_id=ids("<|image_pad|>"), video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"), vision_end_token_id=ids("<|vision_end|>"),
    )  # fmt: skip
    processor = hf.Qwen2VLImageProcessorPil(
        size={"shortest_edge": 256, "longest_edge": 2048}, patch_size=4, merge_size=2, temporal_patch_size=2
    )
    return config, tokenizer, processor


def _qwen2_vl(folder: Path) -> tuple[Any, Any, Any]:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": WIDTH,
        "patch_size": 4,
        "mlp_ratio": 2,
    }
    config, tokenizer, processor = _qwen(hf.Qwen2VLConfig, vision)
    return hf.Qwen2VLForConditionalGeneration(config), tokenizer, processor


def _qwen2_5_vl(folder: Path) -> tuple[Any, Any, Any]:
    vision = {
        "depth": 2, "hidden_size": 32, "num_heads": 2, "out_hidden_size": WIDTH, "intermediate_size": 64,
        "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config, tokenizer, processor = _qwen(hf.Qwen2_5_VLConfig, vision)
    return hf.Qwen2_5_VLForConditionalGeneration(config), tokenizer, processor


def _qwen3_vl(folder: Path) -> tuple[Any, Any, Any]:
    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 2, "out_hidden_size": WIDTH, "intermediate_size": 64,
        "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    config, tokenizer, processor = _qwen(hf.Qwen3VLConfig, vision, head_dim=8)
    return hf.Qwen3VLForConditionalGeneration(config), tokenizer, processor


def _split(name: str) -> tuple[Any, Any, Any]:
    marks = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    special = ("<image>", "<fake_token_around_image>", "<global-img>", "<|im_start|>", "<end_of_utterance>")
    tokenizer = byte_tokenizer(*special, *marks, chat=SMOL_CHAT)
    config = getattr(hf, f"{name}Config")(
        vision_config={**VISION, "patch_size": 4}, scale_factor=2,
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer), pad_token_id=0),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    # Up to 5.17 the library's top level has these classes only where torchvision is installed.
    pil = import_module(f"transformers.models.{name.lower()}.image_processing_pil_{name.lower()}")
    processor = getattr(pil, f"{name}ImageProcessorPil")(size={"longest_edge": 72}, max_image_size={"longest_edge": 24})
    return getattr(hf, f"{name}ForConditionalGeneration")(config), tokenizer, processor


def _idefics3(folder: Path) -> tuple[Any, Any, Any]:
    return _split("Idefics3")


def _smolvlm(folder: Path) -> tuple[Any, Any, Any]:
    return _split("SmolVLM")


def _internvl(folder: Path) -> tuple[Any, Any, Any]:
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = byte_tokenizer(*names.values(), "<|im_start|>", "<|im_end|>", chat=INTERNVL_CHAT, named=names)
    vision = hf.InternVLVisionConfig(**{**VISION, "image_size": [24, 24], "patch_size": [4, 4]}, use_mean_pooling=True)
    config = hf.InternVLConfig(
        vision_config=vision, text_config=hf.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=9,
    )  # fmt: skip
    processor = hf.GotOcr2ImageProcessorPil(size=square(), min_patches=1, max_patches=4)
    return hf.InternVLForConditionalGeneration(config), tokenizer, processor


def _paligemma(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer("<image>", named={"image_token": "<image>"}, bos=True)
    config = hf.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False,
                       "projection_dim": WIDTH, "num_image_tokens": 9},
        text_config=hf.GemmaConfig(**TEXT, head_dim=8, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=WIDTH,
    )  # fmt: skip
    processor = hf.SiglipImageProcessorPil(size=square())
    processor.image_seq_length = 9
    return hf.PaliGemmaForConditionalGeneration(config), tokenizer, processor


def _paligemma2(folder: Path) -> tuple[Any, Any, Any]:
    """PaliGemma 2: the language model squeezes scores and logits by tanh, and every other layer has a window."""
    tokenizer = byte_tokenizer("<image>", named={"image_token": "<image>"}, bos=True)
    config = hf.PaliGemmaConfig(
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False,
                       "projection_dim": WIDTH, "num_image_tokens": 9},
        text_config=hf.Gemma2Config(
            **TEXT, head_dim=8, vocab_size=len(tokenizer), sliding_window=24, query_pre_attn_scalar=8,
            attn_logit_softcapping=3.0, final_logit_softcapping=2.0,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), projection_dim=WIDTH,
    )  # fmt: skip
    processor = hf.SiglipImageProcessorPil(size=square())
    processor.image_seq_length = 9
    return hf.PaliGemmaForConditionalGeneration(config), tokenizer, processor


def _gemma3(folder: Path) -> tuple[Any, Any, Any]:
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = byte_tokenizer(
        *names.values(), "<start_of_turn>", "<end_of_turn>", chat=GEMMA_CHAT, named=names, bos=True
    )
    ids = tokenizer.convert_tokens_to_ids
    text = hf.Gemma3TextConfig(
        **TEXT, head_dim=8, vocab_size=len(tokenizer), sliding_window=24, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )  # fmt: skip
    config = hf.Gemma3Config(
        text_config=text,
        vision_config=hf.SiglipVisionConfig(**{**VISION, "patch_size": 4}, vision_use_head=False),
        mm_tokens_per_image=9, boi_token_index=ids("<start_of_image>"), eoi_token_index=ids("<end_of_image>"),
        image_token_index=ids("<image_soft_token>"),
    )  # fmt: skip
    processor = hf.Gemma3ImageProcessorPil(size=square(), image_seq_length=9)
    return hf.Gemma3ForConditionalGeneration(config), tokenizer, processor


def _mobilevlm(projector: str) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer(bos=True)
    config = MobileVLMConfig(
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=hf.CLIPVisionConfig(**{**VISION, "patch_size": 4, "num_hidden_layers": 3}),
        image_token_id=len(tokenizer), projector_type=projector,
    )  # fmt: skip
    return MobileVLMForConditionalGeneration(config), tokenizer, None


def _mobilevlm_v1(folder: Path) -> tuple[Any, Any, Any]:
    return _mobilevlm("ldpnet")


def _mobilevlm_v2(folder: Path) -> tuple[Any, Any, Any]:
    return _mobilevlm("ldpnetv2")


def _compodistill(folder: Path) -> tuple[Any, Any, Any]:
    tokenizer = byte_tokenizer()
    config = CompoDistillConfig(
        text_config=hf.Qwen2Config(**TEXT, vocab_size=len(tokenizer)),
        vision_config=hf.SiglipVisionConfig(**{**VISION, "num_hidden_layers": 3}),
        image_token_id=len(tokenizer),
    )
    return CompoDistillForConditionalGeneration(config), tokenizer, None


def save_mobilevlm(model: Any, folder: Path) -> None:
    """As ``mtgv/MobileVLM*``: one .bin, and the tower's configuration in a folder that config.json names."""
    text, config = model.config.text_config.to_dict(), model.config
    stored = {key: text[key] for key in ("vocab_size", "rms_norm_eps", *TEXT)} | {
        "model_type": "mobilevlm", "architectures": ["MobileLlamaForCausalLM"],
        "mm_projector_type": config.projector_type, "mm_hidden_size": 32, "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "mm_vision_tower": "clip", "image_aspect_ratio": "pad",
    }  # fmt: skip
    (folder / "clip").mkdir()
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "clip" / "config.json").write_text(config.vision_config.to_json_string())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def save_original_llava(model: Any, folder: Path) -> None:
    """As ``liuhaotian/llava-v1.5-7b``: a .bin without the tower, which lies in a folder that config.json names."""
    text, config = model.config.text_config.to_dict(), model.config
    stored = {key: text[key] for key in ("vocab_size", "rms_norm_eps", *TEXT)} | {
        "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_vision_tower": "clip",
        "mm_use_im_start_end": False, "image_aspect_ratio": "pad",
    }  # fmt: skip
    names = {
        "model.language_model.": "model.",
        "model.multi_modal_projector.linear_1.": "model.mm_projector.0.",
        "model.multi_modal_projector.linear_2.": "model.mm_projector.2.",
        "lm_head.": "lm_head.",
    }
    tensors, tower = {}, {}
    for name, value in model.state_dict().items():
        if name.startswith("model.vision_tower."):
            tower[name.replace("model.vision_tower.", "vision_model.")] = value
        else:
            theirs = next(prefix for prefix in names if name.startswith(prefix))
            tensors[names[theirs] + name.removeprefix(theirs)] = value
    (folder / "clip").mkdir()
    (folder / "config.json").write_text(json.dumps(stored))
    (folder / "clip" / "config.json").write_text(config.vision_config.to_json_string())
    torch.save(tower, folder / "clip" / "pytorch_model.bin")
    torch.save(tensors, folder / "pytorch_model.bin")


def save_compodistill(model: Any, folder: Path) -> None:
    """As the released teacher: text and vision configurations, and names of its own."""
    names = {
        "model.vision_tower.vision_tower.vision_model.": "vision_tower._vision_tower.vision_model.",
        "model.mm_projector.": "connector._connector.",
        "model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    stored = {
        "model_type": "compodistill", "connector_type": "mlp2x_gelu", "image_aspect_ratio": "square",
        "text_config": model.config.text_config.to_dict(), "vision_config": model.config.vision_config.to_dict(),
        "vision_feature_layer": -2, "vision_feature_select_strategy": "patch",
    }  # fmt: skip
    tensors = {}
    for name, value in model.state_dict().items():
        ours = next(prefix for prefix in names if name.startswith(prefix))
        tensors[names[ours] + name.removeprefix(ours)] = value.contiguous()
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


PUBLISHED = {
    "llava_original": save_original_llava,
    "mobilevlm_v1": save_mobilevlm,
    "mobilevlm_v2": save_mobilevlm,
    "compodistill": save_compodistill,
}

TINY: dict[str, Callable[[Path], tuple[Any, Any, Any]]] = {
    "llava": _llava,
    "llava_original": _llava_original,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "internvl": _internvl,
    "paligemma": _paligemma,
    "paligemma2": _paligemma2,
    "gemma3": _gemma3,
    "mobilevlm_v1": _mobilevlm_v1,
    "mobilevlm_v2": _mobilevlm_v2,
    "compodistill": _compodistill,
}

# Differ from one of the above in how they read videos alone: for the tests of videos.
TINY_VIDEO: dict[str, Callable[[Path], tuple[Any, Any, Any]]] = {"llava_next_video": _llava_next_video}


def save_tiny(name: str, folder: Path, *, seed: int = 0, wide: bool = False) -> Path:
    """Save a tiny random checkpoint of a family: model, tokenizer and image processor.

    A ``wide`` one has twice the width and heads: some processors' 4-bit kernels take multiples of 64 by 32 only.
    """
    torch.manual_seed(seed)
    width, heads, shared = (2 * WIDTH, 8, 4) if wide else (WIDTH, 4, 2)
    with (
        mock.patch.dict(TEXT, hidden_size=width, num_attention_heads=heads, num_key_value_heads=shared),
        mock.patch.dict(globals(), WIDTH=width),
    ):
        model, tokenizer, processor = (TINY | TINY_VIDEO)[name](folder)
    make_lively(model)
    if name in PUBLISHED:
        folder.mkdir(parents=True, exist_ok=True)
        PUBLISHED[name](model, folder)
    else:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_lively(model: torch.nn.Module) -> None:
    """Larger weights: the library's are so small that attention is uniform and every answer equally likely."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inner = any(part in name for part in ("language_model", "text_model", "model.layers", "lm_head"))
            if inner and "vision" not in name and parameter.ndim == 2:
                parameter.mul_(6.0)
