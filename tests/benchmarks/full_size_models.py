"""Published models at their full size with random weights, in the layouts of the hub: configs, names and shapes as there.

The values are noise, the files are not: names, shapes, precision and shards are those that a download has, so that
memory, time and bytes of loading and running them are too. Tokenizers have the published size and special tokens;
most of their pieces are fillers, because the published vocabularies are not here.
"""

import json
import math
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import sentencepiece
import torch
import transformers as hf
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.data.text.processors import load_tokenizer

Shapes = dict[str, tuple[int, ...]]

SHARD_BYTES = 5 * 10**9  # as the library writes them
TOWER = {
    "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
    "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000,
}  # fmt: skip
LLAVA = {  # llava-hf/llava-1.5-7b-hf
    "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "model_type": "llava", "pad_token_id": 32001, "projector_hidden_act": "gelu",
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 4096,
        "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "float16", "vocab_size": 32064,
    },
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    "vision_config": TOWER, "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "vocab_size": 32064,
}  # fmt: skip
QWEN = {  # Qwen/Qwen2.5-VL-3B-Instruct
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654,
    "image_token_id": 151655, "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 128000, "max_window_layers": 70,
    "model_type": "qwen2_5_vl", "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.41.2", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
        "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14,
        "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 151936,
}  # fmt: skip
MOBILEVLM = {  # mtgv/MobileVLM_V2-1.7B
    "_name_or_path": "mtgv/MobileVLM_V2-1.7B", "architectures": ["MobileLlamaForCausalLM"], "bos_token_id": 1,
    "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "image_aspect_ratio": "pad",
    "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048, "mm_hidden_size": 1024,
    "mm_projector_type": "ldpnetv2", "mm_use_im_patch_token": False, "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "model_type": "mobilevlm", "num_attention_heads": 16,
    "num_hidden_layers": 24, "num_key_value_heads": 16, "pad_token_id": 0, "pretraining_tp": 1, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
    "use_cache": True, "vision_tower_type": "clip", "vocab_size": 32000,
}  # fmt: skip
CLIP_PROCESSOR = {
    "crop_size": {"height": 336, "width": 336}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
    "do_rescale": True, "do_resize": True, "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor", "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
    "rescale_factor": 0.00392156862745098, "size": {"shortest_edge": 336},
}  # fmt: skip
QWEN_PROCESSOR = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
QWEN_WORDS = 151643
QWEN_CHAT = (  # the published one, but for videos and numbered pictures
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}{% if content['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}


def write_llava(folder: Path) -> None:
    """LLaVA-1.5-7B as llava-hf converted it: three shards, ``tokenizer.json``, CLIP's processor."""
    config = hf.LlavaConfig.from_dict(LLAVA)
    names = {
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
    }
    _write(folder, LLAVA, _renamed(_shapes(hf.LlavaForConditionalGeneration, config), names), CLIP_PROCESSOR)
    source = folder / "sentencepiece"
    write_sentencepiece(source)
    tokenizer = load_tokenizer(source)
    tokenizer.add_tokens([AddedToken("<image>", special=True), AddedToken("<pad>", special=True)], special_tokens=True)
    tokenizer.save_pretrained(folder)
    for path in source.iterdir():
        path.unlink()
    source.rmdir()


def write_qwen(folder: Path) -> None:
    """Qwen2.5-VL-3B-Instruct: two shards, the output projection tied, byte-level tokenizer."""
    config = hf.Qwen2_5_VLConfig.from_dict(QWEN)
    names = {"model.visual.": "visual.", "model.language_model.": "model."}
    shapes = _renamed(_shapes(hf.Qwen2_5_VLForConditionalGeneration, config), names)
    del shapes["lm_head.weight"]
    _write(folder, QWEN, shapes, QWEN_PROCESSOR)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"filler{index}" for index in range(QWEN_WORDS - len(letters)))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in QWEN_SPECIAL])
    fast = hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = QWEN_CHAT
    fast.save_pretrained(folder)


def write_mobilevlm(folder: Path) -> None:
    """MobileVLM V2 1.7B as published: one ``pytorch_model.bin`` with the tower inside, ``tokenizer.model``, no processor."""
    text = hf.LlamaConfig(**{key: value for key, value in MOBILEVLM.items() if hasattr(hf.LlamaConfig(), key)})
    config = MobileVLMConfig(text_config=text, vision_config=hf.CLIPVisionConfig(**TOWER), projector_type="ldpnetv2")
    _write(folder, MOBILEVLM, _shapes(MobileVLMForConditionalGeneration, config), None, pickled=True)
    write_sentencepiece(folder)


WRITERS: dict[str, Callable[[Path], None]] = {
    "LLaVA-1.5-7B": write_llava,
    "Qwen2.5-VL-3B": write_qwen,
    "MobileVLM-V2-1.7B": write_mobilevlm,
}


def write_sentencepiece(folder: Path) -> None:
    """A ``tokenizer.model`` of 32,000 pieces with byte fallback, as Llama's: some are learnt here, the rest are fillers."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = "".join(path.read_text(encoding="utf-8") for path in sorted(Path("docs").glob("*.md")))
    lines = [line for line in texts.splitlines() if line.strip()]
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(prefix), model_type="bpe", vocab_size=2000, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, minloglevel=2,
    )  # fmt: skip
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(prefix.with_suffix(".model").read_bytes())
    lowest = min(piece.score for piece in model.pieces)
    for number in range(32_000 - len(model.pieces)):
        model.pieces.add(piece=f"\u2581filler{number}\u2581", score=lowest - 1 - number)
    model.trainer_spec.vocab_size = 32_000
    prefix.with_suffix(".model").write_bytes(model.SerializeToString())
    prefix.with_suffix(".vocab").unlink()
    settings = {"add_bos_token": True, "add_eos_token": False, "legacy": False, "tokenizer_class": "LlamaTokenizer"}
    _write_json(folder / "tokenizer_config.json", {**settings, **SPECIAL_TOKENS, "model_max_length": 2048})
    _write_json(folder / "special_tokens_map.json", SPECIAL_TOKENS)


def _shapes(model_class: Any, config: Any) -> Shapes:
    """Names and shapes of a model's weights, which is not made."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in model_class(config).state_dict().items()}


def _renamed(shapes: Shapes, names: Mapping[str, str]) -> Shapes:
    """Shapes under the names of the published files, by the beginnings of ours."""
    found = {}
    for name, shape in shapes.items():
        old, new = next(((old, new) for old, new in names.items() if name.startswith(old)), ("", ""))
        found[new + name.removeprefix(old)] = shape
    return found


def _write(
    folder: Path,
    config: Mapping[str, Any],
    shapes: Shapes,
    processor: Mapping[str, Any] | None,
    *,
    pickled: bool = False,
) -> None:
    """Write config, processor and random bfloat16 weights; a shard at a time is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    if processor is not None:
        _write_json(folder / "preprocessor_config.json", processor)
    noise = torch.randn((1 << 24) + 43, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    if pickled:
        torch.save({name: _values(name, shape, noise) for name, shape in shapes.items()}, folder / "pytorch_model.bin")
        return
    shards: list[Shapes] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(other) for other in shards[-1].values()) + 2 * math.prod(shape) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = shape
    files = {}
    for number, shard in zip(count(1), shards, strict=False):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _values(name, shape, noise) for name, shape in shard.items()}, folder / file, {"format": "pt"})
        files |= dict.fromkeys(shard, file)
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})


def _values(name: str, shape: tuple[int, ...], noise: torch.Tensor) -> torch.Tensor:
    """Ones for the scale of a norm, else noise of standard deviation 0.02, another piece of it for each name."""
    if "norm" in name and name.endswith("weight") and len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    size, start = math.prod(shape), sum(name.encode()) * 7919 % len(noise)
    repeated = noise.roll(-start).repeat(-(-size // len(noise)))[:size]
    return repeated.reshape(shape).clone()


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
