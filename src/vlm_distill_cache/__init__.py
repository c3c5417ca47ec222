"""Run a large vision-language teacher once, cache what a student needs, distil without the teacher.

Importing this is instant: each name below imports what it needs, torch for building and training, on first use. ::

    import vlm_distill_cache as vdc

    cache = vdc.open_cache("caches/llava")  # a folder, s3://..., hf://datasets/... or https://...
    record = cache["sample-17"]  # a dict of plain numpy arrays
    rows = cache.decode("logits", record)  # log-probabilities of each answer token's likeliest tokens
    for sample_id, record in cache.items(): ...
"""

from importlib import import_module
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_distill_cache.common.cache.reader import TeacherCache
    from vlm_distill_cache.common.errors import (
        CacheFormatError,
        CacheMismatchError,
        ConfigError,
        DataError,
        DistillError,
        LaunchError,
        ModelError,
        NewerFormatError,
        NoRoomError,
        ProcessFailedError,
        SampleError,
        SampleNotCachedError,
        TemperatureNotCachedError,
        TooLongError,
        TransferError,
    )
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.remotes.pull import pull
    from vlm_distill_cache.common.remotes.push import push
    from vlm_distill_cache.common.tools.convert import convert
    from vlm_distill_cache.common.tools.merge import merge
    from vlm_distill_cache.common.tools.select import Selection, pull_partial
    from vlm_distill_cache.common.tools.verify import verify
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.extract import extract as build
    from vlm_distill_cache.stage1_teacher.live import LiveTeacher
    from vlm_distill_cache.stage2_student.config import PhaseConfig, TrainConfig
    from vlm_distill_cache.stage2_student.loss_weights import LossWeights
    from vlm_distill_cache.stage2_student.run import train_alone as train
    from vlm_distill_cache.stage2_student.training.distillation import DistillationDataset, DistillationLoss
    from vlm_distill_cache.stage2_student.training.trainer_mixin import DistillationTrainerMixin

__version__ = "0.1.0"

__all__ = [
    "BuildConfig",
    "CacheFormatError",
    "CacheMismatchError",
    "ConfigError",
    "DataError",
    "DistillError",
    "DistillationDataset",
    "DistillationLoss",
    "DistillationTrainerMixin",
    "LaunchError",
    "LiveTeacher",
    "LossWeights",
    "ModelError",
    "NewerFormatError",
    "NoRoomError",
    "PhaseConfig",
    "ProcessFailedError",
    "SampleError",
    "SampleNotCachedError",
    "Selection",
    "TeacherCache",
    "TemperatureNotCachedError",
    "TooLongError",
    "TrainConfig",
    "TransferError",
    "build",
    "convert",
    "merge",
    "open_cache",
    "pull",
    "pull_partial",
    "push",
    "train",
    "verify",
]

_HOMES = {
    "BuildConfig": "stage1_teacher.config",
    "DistillationDataset": "stage2_student.training.distillation",
    "DistillationLoss": "stage2_student.training.distillation",
    "DistillationTrainerMixin": "stage2_student.training.trainer_mixin",
    "LiveTeacher": "stage1_teacher.live",
    "LossWeights": "stage2_student.loss_weights",
    "PhaseConfig": "stage2_student.config",
    "Selection": "common.tools.select",
    "TeacherCache": "common.cache.reader",
    "TrainConfig": "stage2_student.config",
    "build": "stage1_teacher.extract",
    "convert": "common.tools.convert",
    "merge": "common.tools.merge",
    "open_cache": "common.opening",
    "pull": "common.remotes.pull",
    "pull_partial": "common.tools.select",
    "push": "common.remotes.push",
    "train": "stage2_student.run",
    "verify": "common.tools.verify",
}  # all others are errors
_importing = RLock()  # the model library's own lazy names fail when several threads ask first


def __getattr__(name: str) -> Any:
    """Fetch a name from its home on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _importing:
        home = import_module(f"{__name__}.{_HOMES.get(name, 'common.errors')}")
        value = globals()[name] = getattr(home, {"build": "extract", "train": "train_alone"}.get(name, name))
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if not (_folder := Path(__file__).parent / "common").is_dir():
    raise ImportError(
        f"{_folder} is no folder: whatever made this clone, or the clone that this was installed from, writes links as "
        "text files. Allow links in the clone, then check out again: `git config core.symlinks true && git checkout -- "
        "src` (on Windows in developer mode); or install a wheel"
    )
