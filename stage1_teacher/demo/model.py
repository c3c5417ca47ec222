"""The built-in teacher's architecture: a LLaVA of about 1.1M parameters, random before training.

CLIP tower (3 layers, width 96, 36 patches of 12 pixels) -> two-layer projector -> Llama (6 layers,
width 96, 4 heads). Small enough for two CPU cores, and a real `LlavaForConditionalGeneration`, so
that stage one treats it as it treats LLaVA-1.5.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from vlm_distill_cache.data.builtin import IMAGE_TOKEN, MODEL_MAX_LENGTH
from vlm_distill_cache.data.shapes.scene import CELL, IMAGE_SIZE

WIDTH = 96
PATCH = CELL  # pixels; one grid cell of a drawn scene is one patch


def build_demo_model(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    width: int = WIDTH,
    vision_layers: int = 3,
    layers: int = 6,
) -> LlavaForConditionalGeneration:
    """Build the built-in teacher with random weights.

    Weights are N(0, 1 / sqrt(fan_in)): the library's constant 0.02 makes queries and keys about zero
    at width 96, and the trial's models then did not learn to look at the image. Each language layer's
    two output matrices start at zero, so that a layer is first the identity.

    Args:
        tokenizer: Gives vocabulary and special tokens.
        width: Hidden size of both towers, a multiple of 16.
        vision_layers: Of the vision tower.
        layers: Of the language model.

    Returns:
        The model in float32, training mode, SDPA attention.
    """
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MODEL_MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,  # the last layer: a tower this shallow has none to spare
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        for layer in model.model.language_model.layers:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    model.set_attn_implementation("sdpa")
    return model.train()


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split trainable parameters into hidden matrices (for Muon) and everything else (for AdamW).

    Embeddings, the patch kernel, norms, biases and class vectors are not hidden matrices.
    """
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            hidden = parameter.ndim == 2 and "embed" not in name and "lm_head" not in name
            (matrices if hidden else others).append(parameter)
    return matrices, others


class WarmCosine:
    """Muon on hidden matrices, AdamW on the rest, linear warm-up and cosine decay to zero.

    Muon reaches in 400 steps what AdamW reaches in 700 on this tower. The learning rate of Muon is
    rescaled to AdamW's update size, so one number serves both; ``others_scale`` lowers AdamW's, because
    noisy word embeddings kept the language model from learning relations.
    """

    def __init__(
        self, module: nn.Module, *, rate: float, steps: int, warmup: int = 30, others_scale: float = 1.0
    ) -> None:
        matrices, others = split_parameters(module)
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=others_scale * rate, betas=(0.9, 0.98), weight_decay=0.0)
        ]
        if matrices:
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
            self._optimizers.append(muon)
        self._scale = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warm_cosine(step, steps, warmup))
            for optimizer in self._optimizers
        ]
        self._parts: list[Any] = [*self._optimizers, *self._scale]
        self._parameters = [*matrices, *others]

    def step(self, loss: torch.Tensor) -> None:
        """Backpropagate, clip the gradient's norm to 1, update, and forget the gradient."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, schedule in zip(self._optimizers, self._scale, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, Any]]:
        """What `load_state_dict` goes on from: the state of each optimizer and schedule."""
        return [part.state_dict() for part in self._parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Go on from where another one with the same parameters was."""
        for part, state in zip(self._parts, states, strict=True):
            part.load_state_dict(state)


def warm_cosine(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor in [0, 1] at ``step`` of ``steps``."""
    rise = min(1.0, (step + 1) / max(1, warmup))
    done = min(1.0, step / max(1, steps))
    return rise * 0.5 * (1.0 + float(torch.cos(torch.tensor(torch.pi * done))))
