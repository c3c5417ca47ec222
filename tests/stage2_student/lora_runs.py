"""Runs with adapters that the tests share, small enough for seconds."""

import torch
from tiny_cache import DATA, make_teacher

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage2_student.config import TrainConfig

LOSSES = ("total", "lm", "logits", "answer_attention", "visual_map")


def make_config(cache, output, **changes):
    """Projector, adapters with every kind of loss, new adapters; five steps."""
    options = {
        "student": "mobilevlm-tiny",
        "data": DATA,
        "cache": str(cache),
        "output": str(output),
        "checkpoint_every": 1,
        "keep_checkpoints": 9,
        "device": "cpu",
        "lora": {"rank": 4, "alpha": 8.0},
        "dpt": {"steps": 1, "batch_size": 4, "trainable": "projector", "losses": {"logits": 1.0}},
        "dft": {
            "steps": 2,
            "batch_size": 6,
            "lr": 1e-2,
            "trainable": "lora",
            "losses": {"logits": 1.0, "answer_attention": 1.0, "visual_map": 0.5},
        },
        "sft": {"steps": 2, "batch_size": 4, "lr": 1e-2, "trainable": "lora"},
    }
    return config_from_dict(TrainConfig, options | changes)


def losses(records):
    """What must agree between two logs."""
    return [{k: v for k, v in r.items() if k in LOSSES or k in ("step", "phase", "lr")} for r in records]


def save_teacher(folder, *, seed=0):
    """The directory of a model of the tiny cache's teacher's architecture; with seed 0 it is that teacher."""
    made = make_teacher(seed=seed)
    made.model.save_pretrained(folder)
    made.encoder.tokenizer.save_pretrained(folder)
    made.encoder.image_encoder.processor.save_pretrained(folder)
    return folder


def equal_weights(left, right):
    """Whether two students hold the same names and bits."""
    first, second = left.state_dict(), right.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
