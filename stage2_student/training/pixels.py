"""Where a training keeps pictures as they were scaled for its student, and whether it is worth it."""

import logging
from collections.abc import Sequence

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.disk import disk_words, free_bytes
from vlm_distill_cache.data.text.pixel_cache import PixelCache, bytes_kept
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.training.output_folder import pixel_folder
from vlm_distill_cache.stage2_student.training.preparation import PreparedPhase

_log = logging.getLogger(__name__)


def keep_pixels(config: TrainConfig, phases: Sequence[PreparedPhase], pixels: PixelCache) -> None:
    """Keep the pictures of a training where its options say; each of several processes calls it.

    Raises:
        ConfigError: If they name a folder where nothing can be kept.
    """
    folder, is_own = pixel_folder(config), config.pixel_cache == "auto"
    if folder is None or (is_own and not reads_again(phases)):
        return
    try:
        most = (free_bytes(folder) + bytes_kept(folder)) // 2  # checkpoints need room, too
        pixels.open(folder, min(round(config.pixel_cache_gib * 2**30), most))
    except OSError as error:
        if not is_own:
            raise ConfigError(
                f"pixel_cache={config.pixel_cache}: {disk_words(error)}; give another folder, or none"
            ) from error
        _log.info("pictures are decoded each time they are read: %s", disk_words(error))


def reads_again(phases: Sequence[PreparedPhase]) -> bool:
    """Whether phases read more samples than their data have."""
    samples = {(phase.config.data, phase.config.images, phase.config.cache): len(phase.dataset) for phase in phases}
    return sum(phase.steps * phase.config.batch_size for phase in phases) > sum(samples.values())
