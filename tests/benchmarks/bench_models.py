"""A student and a teacher twice as deep and twice as wide, both of random weights. Part of ``make bench``."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vlm_distill_cache.data import builtin
from vlm_distill_cache.stage1_teacher.demo.model import build_demo_model

STUDENT_LAYERS, STUDENT_WIDTH = 4, 192
TEACHER_LAYERS, TEACHER_WIDTH = 2 * STUDENT_LAYERS, 2 * STUDENT_WIDTH
SIZES = f"student {STUDENT_LAYERS} x {STUDENT_WIDTH}, teacher {TEACHER_LAYERS} x {TEACHER_WIDTH}"


def save_teacher(folder: Path) -> Path:
    """Save a LLaVA of the built-in teacher's kind, as its users save one; its prompt is the built-in one's."""
    tokenizer = builtin.load_tokenizer()
    model = build_demo_model(tokenizer, seed=0, width=TEACHER_WIDTH, layers=TEACHER_LAYERS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    builtin.load_image_processor().save_pretrained(folder)
    return folder


def save_language_model(folder: Path) -> Path:
    """Save the Llama that the student gets as its language model."""
    tokenizer = builtin.load_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=STUDENT_WIDTH, intermediate_size=8 * STUDENT_WIDTH // 3,
        num_hidden_layers=STUDENT_LAYERS, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
