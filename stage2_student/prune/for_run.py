"""The student of a run that is cut out of the teacher of the run's own cache, measured on the cache's own samples."""

from pathlib import Path

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.data.sample import iterate_readable
from vlm_distill_cache.stage2_student.batches.share import some_samples
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.prune.cut import prune_directory
from vlm_distill_cache.stage2_student.pruned_folder import Kept
from vlm_distill_cache.stage2_student.students.encoder import encoder_of_cache
from vlm_distill_cache.stage2_student.training.checks import refuse_other_teacher
from vlm_distill_cache.stage2_student.training.preparation import open_cached_data


def prune_for_cache(config: TrainConfig, cache: TeacherCache, output: Path, *, kept: Kept) -> str:
    """Cut a run's student out of the teacher of its cache, by the cache's own samples.

    Raises:
        ModelError: If the directory does not hold the cache's teacher.
    """
    refuse_other_teacher(config, cache)
    phase = config.phase(config.phases[0])
    dataset = open_cached_data(cache, data=phase.data, images=phase.images)
    pruning = prune_directory(
        Path(config.teacher or ""),
        output,
        kept=kept,
        how=config.pruning,
        samples=iterate_readable(some_samples(dataset, config.pruning.samples)),
        encoder=encoder_of_cache(cache.plan, cache.path / "processor", max_length=config.max_length),
        described={"cache": cache.manifest_hash},
        device=config.device,
    )
    return f"{output}: {pruning}"
