"""Published checkpoint layouts at tiny size: names, shapes and configurations written out by hand."""

import json

import torch

WIDTH, INNER, LAYERS, VOCABULARY = 32, 48, 2, 40
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}

# As in mtgv/MobileVLM-1.7B and mtgv/MobileVLM_V2-1.7B, but for the sizes.
MOBILEVLM_CONFIG = {
    "_name_or_path": "mtgv/MobileVLM_V2-1.7B",
    "architectures": ["MobileLlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "freeze_mm_mlp_adapter": False,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 2048,
    "max_sequence_length": 2048,
    "mm_hidden_size": 16,
    "mm_projector_lr": None,
    "mm_projector_type": "ldpnetv2",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "clip",
    "model_type": "mobilevlm",
    "num_attention_heads": 4,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
    "vision_tower_type": "clip",
    "vocab_size": VOCABULARY,
}

COMPODISTILL_CONFIG = {
    "architectures": ["CompoDistillForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_compodistill.CompoDistillConfig"},
    "connector_hidden_size": 20,
    "connector_type": "mlp2x_gelu",
    "hidden_size": WIDTH,
    "ignore_index": -100,
    "image_aspect_ratio": "square",
    "image_token_index": -200,
    "llm_model_name_or_path": "Qwen/Qwen1.5-1.8B",
    "model_type": "compodistill",
    "pad_token": "<|endoftext|>",
    "post_connector_use": True,
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 2048,
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "tokenizer_model_max_length": 2048,
    "torch_dtype": "float16",
    "vision_config": {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh", **TOWER},
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "patch",
    "vision_hidden_size": 16,
    "vocab_size": VOCABULARY,
}


def decoder_shapes(prefix="", *, biases=False):
    """A Llama's names and shapes; Qwen2's with biases."""
    shapes = {
        f"{prefix}model.embed_tokens.weight": (VOCABULARY, WIDTH),
        f"{prefix}model.norm.weight": (WIDTH,),
        f"{prefix}lm_head.weight": (VOCABULARY, WIDTH),
    }
    for index in range(LAYERS):
        layer = f"{prefix}model.layers.{index}."
        for name in "qkvo":
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (WIDTH, WIDTH)
            if biases and name != "o":
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (WIDTH,)
        shapes |= {
            f"{layer}mlp.gate_proj.weight": (INNER, WIDTH),
            f"{layer}mlp.up_proj.weight": (INNER, WIDTH),
            f"{layer}mlp.down_proj.weight": (WIDTH, INNER),
            f"{layer}input_layernorm.weight": (WIDTH,),
            f"{layer}post_attention_layernorm.weight": (WIDTH,),
        }
    return shapes


def tower_layer_shapes(prefix):
    shapes = {}
    for index in range(3):
        layer = f"{prefix}encoder.layers.{index}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{layer}self_attn.{name}.weight"] = (16, 16)
            shapes[f"{layer}self_attn.{name}.bias"] = (16,)
        for name in ("layer_norm1", "layer_norm2"):
            shapes[f"{layer}{name}.weight"] = shapes[f"{layer}{name}.bias"] = (16,)
        shapes |= {
            f"{layer}mlp.fc1.weight": (24, 16),
            f"{layer}mlp.fc1.bias": (24,),
            f"{layer}mlp.fc2.weight": (16, 24),
            f"{layer}mlp.fc2.bias": (16,),
        }
    return shapes


def clip_shapes(prefix):
    shapes = {
        f"{prefix}embeddings.class_embedding": (16,),
        f"{prefix}embeddings.patch_embedding.weight": (16, 3, 4, 4),
        f"{prefix}embeddings.position_embedding.weight": (37, 16),
    }
    for name in ("pre_layrnorm", "post_layernorm"):
        shapes[f"{prefix}{name}.weight"] = shapes[f"{prefix}{name}.bias"] = (16,)
    return shapes | tower_layer_shapes(prefix)


def siglip_shapes(prefix):
    head = f"{prefix}head."
    return tower_layer_shapes(prefix) | {
        f"{prefix}embeddings.patch_embedding.weight": (16, 3, 4, 4),
        f"{prefix}embeddings.patch_embedding.bias": (16,),
        f"{prefix}embeddings.position_embedding.weight": (36, 16),
        f"{prefix}post_layernorm.weight": (16,),
        f"{prefix}post_layernorm.bias": (16,),
        f"{head}probe": (1, 1, 16),
        f"{head}attention.in_proj_weight": (48, 16),
        f"{head}attention.in_proj_bias": (48,),
        f"{head}attention.out_proj.weight": (16, 16),
        f"{head}attention.out_proj.bias": (16,),
        f"{head}layernorm.weight": (16,),
        f"{head}layernorm.bias": (16,),
        f"{head}mlp.fc1.weight": (24, 16),
        f"{head}mlp.fc1.bias": (24,),
        f"{head}mlp.fc2.weight": (16, 24),
        f"{head}mlp.fc2.bias": (16,),
    }


LDPV2_SHAPES = {
    "model.mm_projector.mlp.mlp.0.weight": (WIDTH, 16),
    "model.mm_projector.mlp.mlp.0.bias": (WIDTH,),
    "model.mm_projector.mlp.mlp.2.weight": (WIDTH, WIDTH),
    "model.mm_projector.mlp.mlp.2.bias": (WIDTH,),
    "model.mm_projector.peg.peg.0.weight": (WIDTH, 1, 3, 3),
    "model.mm_projector.peg.peg.0.bias": (WIDTH,),
}
LDP_SHAPES = {
    "model.mm_projector.model.mlp.1.weight": (WIDTH, 16),
    "model.mm_projector.model.mlp.1.bias": (WIDTH,),
    "model.mm_projector.model.mlp.3.weight": (WIDTH, WIDTH),
    "model.mm_projector.model.mlp.3.bias": (WIDTH,),
}
for _block in (1, 2):
    _name = f"model.mm_projector.model.mb_block.{_block}.block."
    LDP_SHAPES |= {
        f"{_name}0.0.weight": (WIDTH, 1, 3, 3),
        f"{_name}0.1.weight": (WIDTH,),
        f"{_name}0.1.bias": (WIDTH,),
        f"{_name}1.fc1.weight": (8, WIDTH, 1, 1),
        f"{_name}1.fc1.bias": (8,),
        f"{_name}1.fc2.weight": (WIDTH, 8, 1, 1),
        f"{_name}1.fc2.bias": (WIDTH,),
        f"{_name}2.0.weight": (WIDTH, WIDTH, 1, 1),
        f"{_name}2.1.weight": (WIDTH,),
        f"{_name}2.1.bias": (WIDTH,),
    }


def random_tensors(shapes, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.2).to(dtype) for name, shape in sorted(shapes.items())}


def mobilevlm_tensors(version=2, *, tower=True, buffers=True, dtype=torch.float32):
    """The state dict of ``mtgv/MobileVLM*`` at tiny size, with the two kinds of buffers that old libraries saved."""
    prefix = "model.vision_tower.vision_tower.vision_model."
    shapes = decoder_shapes() | (LDPV2_SHAPES if version == 2 else LDP_SHAPES)
    tensors = random_tensors(shapes | (clip_shapes(prefix) if tower else {}), dtype=dtype)
    if buffers:
        for index in range(LAYERS):
            tensors[f"model.layers.{index}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors[f"{prefix}embeddings.position_ids"] = torch.arange(37)[None]
    return tensors


def compodistill_tensors(*, bridged=True, dtype=torch.float32):
    """The state dict of a released CompoDistill student (bridged) or teacher at tiny size."""
    hidden = 20 if bridged else WIDTH
    shapes = decoder_shapes("language_model.", biases=True) | siglip_shapes("vision_tower._vision_tower.vision_model.")
    shapes |= {
        "connector._connector.0.weight": (hidden, 16),
        "connector._connector.0.bias": (hidden,),
        "connector._connector.2.weight": (hidden, hidden),
        "connector._connector.2.bias": (hidden,),
    }
    if bridged:
        shapes |= {"connector.post_connector.weight": (WIDTH, 20), "connector.post_connector.bias": (WIDTH,)}
    return random_tensors(shapes, dtype=dtype)


def write_mobilevlm(folder, tensors, **changes):
    """config.json, pytorch_model.bin, and the tower's configuration in the folder that config.json names."""
    (folder / "clip").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MOBILEVLM_CONFIG | changes))
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **TOWER}))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def write_compodistill(folder, tensors, **changes):
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(COMPODISTILL_CONFIG | changes))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
