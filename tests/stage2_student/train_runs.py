"""A run of three phases that the tests share, small enough for seconds."""

from tiny_cache import DATA

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage2_student.config import TrainConfig

LOSSES = ("total", "lm", "logits", "answer_attention", "visual_columns", "visual_map")
# Scored at steps 3, 6, ... and the last.
ON_THE_WAY = {"every": 3, "items": 1, "letters": False, "agreement_samples": 4, "best": "teacher/kl"}


def make_config(cache, output, **changes):
    """Three phases of 2, 5 and 1 steps over 20 samples: the epoch ends inside a step of the second."""
    options = {
        "student": "mobilevlm-tiny",
        "data": DATA,
        "cache": str(cache),
        "output": str(output),
        "checkpoint_every": 2,
        "keep_checkpoints": 3,
        "log_every": 3,
        "device": "cpu",
        "dpt": {"steps": 2, "batch_size": 4, "trainable": "projector", "losses": {"logits": 1.0}},
        "dft": {
            "steps": 6,
            "batch_size": 6,
            "losses": {"logits": 1.0, "answer_attention": 1.0, "visual_map": 0.5},
        },
        "sft": {"steps": 1, "batch_size": 4},
    }
    return config_from_dict(TrainConfig, options | changes)


def losses(records):
    return [{k: v for k, v in record.items() if k in LOSSES or k in ("step", "phase", "lr")} for record in records]
