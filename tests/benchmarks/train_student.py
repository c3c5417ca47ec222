"""A training from flat keyword arguments, one for each arm and seed of an experiment."""

from typing import Any

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage2_student import train as train_module
from vlm_distill_cache.stage2_student.config import TrainConfig


def train_student(*, after_step: train_module.AfterStep | None = None, **options: Any) -> train_module.TrainResult:
    """Train in this process; of ``options``, a phase may be a dict of fields of `PhaseConfig`."""
    return train_module.train(config_from_dict(TrainConfig, options, where="train_student"), after_step=after_step)
