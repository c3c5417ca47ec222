"""Students of an experiment: trained from flat keyword arguments, one for each arm and seed, or cut out of a teacher."""

from pathlib import Path
from typing import Any

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage2_student import train as train_module
from vlm_distill_cache.stage2_student.config import TrainConfig


def train_student(*, after_step: train_module.AfterStep | None = None, **options: Any) -> train_module.TrainResult:
    """Train in this process; of ``options``, a phase may be a dict of fields of `PhaseConfig`."""
    return train_module.train(config_from_dict(TrainConfig, options, where="train_student"), after_step=after_step)


def cut_out(options: dict[str, Any]) -> Path:
    """Cut a ``pruned:`` student out of its teacher, or find it done; its folder. Not for several processes at once."""
    from vlm_distill_cache.stage2_student.run import with_pruned_student
    from vlm_distill_cache.stage2_student.training.resolve import open_caches

    config = config_from_dict(TrainConfig, options, where="cut_out")
    return Path(with_pruned_student(config, open_caches(config), say=lambda line: None).student)
