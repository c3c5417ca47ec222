"""A run whose student can be divided among processes: every kind of phase, all that is hard about shares; five steps."""

import shutil
from pathlib import Path

import lora_runs
import train_runs

from vlm_distill_cache.stage2_student.training.checkpoint import CHECKPOINTS


def make_config(cache, output, **changes):
    """Projector; adapters with every kind of loss, layers computed again, micro-batches, clipping; the whole decoder."""
    losses = {"logits": 1.0, "answer_attention": 1.0, "visual_map": 0.5}
    options = {
        "gradient_checkpointing": True,
        "clip": 0.1,  # every step is scaled down
        "evaluation": train_runs.ON_THE_WAY,
        "dft": {
            "steps": 2, "batch_size": 6, "micro_batch_size": 2, "lr": 1e-2, "trainable": "lora", "losses": losses,
        },
        "sft": {"steps": 2, "batch_size": 4, "freeze": ["embeddings"]},
    }  # fmt: skip
    return lora_runs.make_config(cache, output, **options | changes)


def stopped_behind(step: int, whole: Path, output: Path) -> Path:
    """Make a folder what a finished run's would be if it had been killed behind a step."""
    shutil.copytree(whole, output, ignore=shutil.ignore_patterns("final", "best*", "tensorboard"))
    for folder in (output / CHECKPOINTS).iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return output
