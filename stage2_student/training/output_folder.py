"""The folder a training or a run writes to: ours alone, and apart from the cache. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.cache.other_folders import refuse_inside
from vlm_distill_cache.common.config import read_yaml
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX, clean_stale, hold_folder
from vlm_distill_cache.common.files.disk import name_full_disk, nearest_there, refuse_overlap
from vlm_distill_cache.common.terminal.launch import enter_launch
from vlm_distill_cache.stage2_student.config import TrainConfig

CONFIG, STAMP, PIXELS = "config.yaml", "run.json", "pixels"
_FILES = (CONFIG, "log.jsonl", STAMP, "table.txt", "report.html", "evaluation.json", "evaluation.jsonl")


@contextmanager
def claim_output(output: Path, *caches: Path) -> Iterator[None]:
    """Hold a run's folder, so that no second process writes the same checkpoints and logs.

    Args:
        output: Created if it is missing; what killed processes left half written there is removed.
        *caches: The teacher caches, which must be other folders.

    Raises:
        ConfigError: If one of the folders lies in the other or in a student's, or another process holds ``output``.
        NoRoomError: If there is no more room to write.
    """
    refuse_overlap(output, *caches)
    refuse_inside(output)
    if enter_launch().rank != 0:  # one process of several holds it for all
        yield
        return
    is_new = not output.exists()
    with name_full_disk(output):
        output.mkdir(parents=True, exist_ok=True)
        with hold_folder(output, busy="another process works there; wait for it, or give another --output"):
            clean_stale(output)
            refuse_misplaced(output)
            try:
                yield
            finally:
                if is_new:
                    with suppress(OSError):  # not empty: more was done there than to refuse it
                        output.rmdir()


def refuse_misplaced(output: Path) -> None:
    """Refuse files where a training's folders go, and the other way round, before the first step.

    Raises:
        ConfigError: Naming the first one.
    """
    kinds = {
        **dict.fromkeys(("checkpoints", PIXELS, "tensorboard", "sft", "distilled", "best", "best-before"), True),
        **dict.fromkeys(_FILES, False),
    }
    for name, is_folder in kinds.items():
        path = output / name
        if os.path.lexists(path) and not (path.is_dir() if is_folder else path.is_file() or path.is_symlink()):
            raise ConfigError(f"{path}: expected a {'folder' if is_folder else 'file'}; move away what is there")


def pixel_folder(config: TrainConfig) -> Path | None:
    """Where a training keeps pictures as they were scaled; None: nowhere."""
    if config.pixel_cache == "none":
        return None
    return Path(config.output) / PIXELS if config.pixel_cache == "auto" else Path(config.pixel_cache)


def refuse_pixel_folder(config: TrainConfig) -> None:
    """Refuse a folder for scaled pictures that is, or lies in, a file, a cache or a student; needs nothing loaded.

    Raises:
        ConfigError: Naming it.
    """
    folder = pixel_folder(config)
    if folder is None or config.pixel_cache == "auto":  # where the output may be is asked for it
        return
    if not (there := nearest_there(folder)).is_dir():
        raise ConfigError(f"pixel_cache={config.pixel_cache}: {there} is a file; give another folder, or none")
    refuse_overlap(folder, *filter(None, (config.phase(name).cache for name in config.phases)))
    refuse_inside(folder)


def with_shared_pixels(config: TrainConfig) -> TrainConfig:
    """A run's configuration for its students, which share a folder of pictures that the run removes (`drop_pixels`)."""
    return replace(config, pixel_cache=str(pixel_folder(config) or "none"))


def drop_pixels(config: TrainConfig) -> None:
    """Remove the pictures that were kept for one training or run alone."""
    if config.pixel_cache == "auto":
        from vlm_distill_cache.data.text.pixel_cache import FILE  # what has trained has imported it

        folder = Path(config.output) / PIXELS
        with suppress(OSError):  # some disks hold what is open; and a folder with other files stays
            (folder / FILE).unlink(missing_ok=True)
            folder.rmdir()


def holds_anything(folder: Path) -> bool:
    """Whether a folder holds more than what a process left that was killed in its very first write."""
    return any(not path.name.startswith(TEMPORARY_PREFIX) for path in folder.glob("*"))


def refuse_foreign_folder(output: Path) -> None:
    """Refuse to train into a folder of other things, that of a run included, whose students have folders of their own.

    Raises:
        ConfigError: If it is not empty and holds no configuration of a training, or is no folder.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file; give a folder for --output")
    if (output / STAMP).exists():
        raise ConfigError(f"{output} is the folder of a run; go on with it by `distill run`, or give another --output")
    present = holds_anything(output)
    options = TrainConfig.__dataclass_fields__.keys()
    if present and not options & read_yaml(output / CONFIG, missing_ok=True).keys():
        raise ConfigError(
            f"{output} is not empty and holds no config.yaml of a training: it is not the folder of one; give "
            "another --output"
        )
