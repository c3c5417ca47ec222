"""Original LLaVA layouts at tiny size, written out by hand, and the same weights in the library's class."""

import json

import torch
from published_factory import TOWER, clip_shapes, random_tensors
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

WIDTH, INNER, LAYERS, VOCABULARY = 32, 48, 2, 40
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
RANK, ALPHA = 4, 8

# As in liuhaotian/llava-v1.5-7b, but for the sizes.
LLAVA_CONFIG = {
    "_name_or_path": "llava-v1.5-7b",
    "architectures": ["LlavaLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "freeze_mm_vision_resampler": False,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_aspect_ratio": "pad",
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_length": 4096,
    "max_position_embeddings": 4096,
    "mm_hidden_size": 16,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "clip",
    "model_type": "llava",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "tune_mm_mlp_adapter": False,
    "tune_mm_vision_resampler": False,
    "unfreeze_mm_vision_tower": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vocab_size": VOCABULARY,
}


def language_shapes(vocabulary=VOCABULARY):
    shapes = {
        "model.embed_tokens.weight": (vocabulary, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (vocabulary, WIDTH),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {
            f"{layer}mlp.gate_proj.weight": (INNER, WIDTH),
            f"{layer}mlp.up_proj.weight": (INNER, WIDTH),
            f"{layer}mlp.down_proj.weight": (WIDTH, INNER),
            f"{layer}input_layernorm.weight": (WIDTH,),
            f"{layer}post_attention_layernorm.weight": (WIDTH,),
        }
    return shapes


def projector_shapes(depth=2, prefix="model.mm_projector."):
    """One linear layer has no number; of several, the numbers between are those of the GELUs."""
    if depth == 1:
        return {f"{prefix}weight": (WIDTH, 16), f"{prefix}bias": (WIDTH,)}
    shapes = {}
    for index in range(depth):
        shapes |= {
            f"{prefix}{2 * index}.weight": (WIDTH, WIDTH if index else 16),
            f"{prefix}{2 * index}.bias": (WIDTH,),
        }
    return shapes


def llava_tensors(*, depth=2, vocabulary=VOCABULARY, dtype=torch.float32):
    """Language model, projector and tower, each under the names of the original code."""
    return (
        random_tensors(language_shapes(vocabulary), dtype=dtype),
        random_tensors(projector_shapes(depth), seed=1, dtype=dtype),
        random_tensors(clip_shapes(TOWER_PREFIX), seed=2, dtype=dtype),
    )


def write_tower(folder, tensors):
    """A CLIP vision tower in a folder of its own, as the hub's; ``tensors``: under the original names."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **TOWER}))
    side = {"height": TOWER["image_size"], "width": TOWER["image_size"]}
    settings = {
        "image_processor_type": "CLIPImageProcessor", "crop_size": side, "do_center_crop": True, "do_normalize": True,
        "do_resize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25], "resample": 3,
        "size": {"shortest_edge": TOWER["image_size"]},
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    renamed = {name.replace(TOWER_PREFIX, "vision_model."): value for name, value in tensors.items()}
    torch.save(renamed, folder / "pytorch_model.bin")


def write_shards(folder, tensors, *, count=2):
    """``pytorch_model-0000x-of-0000n.bin`` and their index."""
    names = sorted(tensors)
    index = {}
    for number in range(count):
        file = f"pytorch_model-0000{number + 1}-of-0000{count}.bin"
        part = names[number::count]
        torch.save({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(content))


def write_llava(folder, parts=None, *, tower="beside", projector="inside", depth=2, **changes):
    """A checkpoint; tower ``inside`` its weights or ``beside`` them in ``clip``, projector ``inside``, ``beside`` or ``both``."""
    language, projecting, seeing = parts or llava_tensors(depth=depth)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = {1: {"mm_projector_type": "linear"}, 2: {}}.get(depth, {"mm_projector_type": f"mlp{depth}x_gelu"})
    (folder / "config.json").write_text(json.dumps(LLAVA_CONFIG | kinds | changes))
    write_tower(folder / "clip", seeing)
    whole = dict(language)
    whole["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if projector in ("inside", "both"):
        whole |= projecting
    if projector in ("beside", "both"):
        torch.save(projecting, folder / "mm_projector.bin")
    if tower == "inside":
        whole |= seeing
        (folder / "clip" / "pytorch_model.bin").unlink()
    write_shards(folder, whole)
    return folder


def write_base(folder, language):
    """The language model alone, as vicuna is published."""
    folder.mkdir(parents=True)
    config = {name: value for name, value in LLAVA_CONFIG.items() if "mm" not in name} | {"model_type": "llama"}
    config["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, language)
    return folder


def adapter_tensors(*, seed=5, targets=("q_proj", "down_proj")):
    """Pairs A and B as peft names them."""
    shapes = {}
    for name, (rows, columns) in ((n, s) for n, s in language_shapes().items() if len(s) == 2):
        module = name.removesuffix(".weight")
        if module.endswith(targets):
            shapes[f"base_model.model.{module}.lora_A.weight"] = (RANK, columns)
            shapes[f"base_model.model.{module}.lora_B.weight"] = (rows, RANK)
    return random_tensors(shapes, seed=seed)


def write_lora(folder, parts, base, adapters, *, targets=("q_proj", "down_proj"), settings=None, **changes):
    """What LoRA training leaves (``liuhaotian/llava-v1.5-7b-lora``); ``base``: as adapter_config.json names it."""
    _, projecting, seeing = parts
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAVA_CONFIG | changes))
    write_tower(folder / "clip", seeing)
    stored = {
        "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "lora_alpha": ALPHA,
        "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": RANK, "revision": None,
        "target_modules": list(targets), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(stored | (settings or {})))
    torch.save(adapters, folder / "adapter_model.bin")
    torch.save({f"base_model.model.{name}": v for name, v in projecting.items()}, folder / "non_lora_trainables.bin")
    return folder


def in_the_library(language, projecting, seeing):
    """The same weights in the library's own class, renamed by hand; one more row for its image token, which is the last."""
    vocabulary = language["lm_head.weight"].shape[0]
    text = LlamaConfig(
        vocab_size=vocabulary + 1, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, rms_norm_eps=1e-5, max_position_embeddings=4096,
    )  # fmt: skip
    config = LlavaConfig(
        text_config=text, vision_config=CLIPVisionConfig(**TOWER), image_token_index=vocabulary, vision_feature_layer=-2
    )
    model = LlavaForConditionalGeneration(config).eval()
    state = {}
    for name, value in language.items():
        if value.shape[0] == vocabulary and ("embed" in name or "head" in name):
            value = torch.cat([value, torch.zeros(1, WIDTH)])
        state[name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)] = value
    for name, value in projecting.items():
        layer = {"0": "linear_1", "2": "linear_2"}[name.split(".")[2]]
        state[f"model.multi_modal_projector.{layer}.{name.split('.')[3]}"] = value
    for name, value in seeing.items():
        state[name.replace(TOWER_PREFIX, "model.vision_tower.")] = value
    model.load_state_dict(state)
    return model
