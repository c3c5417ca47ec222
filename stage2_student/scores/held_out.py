"""The items a student is scored on: checked before the first training step, and what their scores mean.

A user's file has no splits. Where no other data is named, students are scored on what they were trained on, and the
scores carry a note that says so. A student may outlive its cache, which is None here then.
"""

import logging
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import ConfigError, SampleError
from vlm_distill_cache.data.registry import open_dataset, open_evaluation
from vlm_distill_cache.data.sample import EvaluationSet, Question
from vlm_distill_cache.data.text.encoding import SampleEncoder, build_prompt
from vlm_distill_cache.stage2_student.batches.dataset import merged_fingerprints, splits_and_limits
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.students.encoder import encoder_of_cache
from vlm_distill_cache.stage2_student.training.preparation import BUILT_IN_DATA

PROBED_QUESTIONS = 32
RUN_OPTION, EVALUATE_OPTION = "EVAL_DATA=FILE or --set evaluation.data=FILE", "--data FILE"
_log = logging.getLogger(__name__)


def open_items(config: TrainConfig, encoder: SampleEncoder, cache: TeacherCache | None) -> EvaluationSet:
    """Open the items that a configuration names, without those that cannot be used; logs how many these are.

    Raises:
        ConfigError: If no data is named, and the cache's is not built in.
        DataError: If the data cannot be opened.
    """
    items = _open(config, cache)
    failed = frozenset(cache.failed if cache is not None and _is_own_data(config) else ())
    kept = tuple(
        item
        for item in items.questions
        if item.item_id.rpartition("-")[0] not in failed and _fault(item, encoder) is None
    )
    dropped = len(items.questions) - len(kept)
    if dropped:
        _log.warning("%d of %d questions cannot be read and are not scored", dropped, len(items.questions))
    return replace(items, questions=kept)


def probe_items(config: TrainConfig, cache: TeacherCache) -> list[str]:
    """Open the items before a student is trained, and say what its scores will not tell.

    Returns:
        Sentences to show with the scores; none if all is well.

    Raises:
        ConfigError: If no data is named and the cache's is not built in, or if nothing can be read of the
            data that was named for this.
        DataError: If the data cannot be opened.
    """
    items = _open(config, cache)
    cache.check_side_files(["processor"])
    encoder = encoder_of_cache(cache.plan, cache.path / "processor", max_length=config.max_length)
    step = max(1, len(items.questions) // PROBED_QUESTIONS)
    faults = [_fault(item, encoder) for item in items.questions[::step]]
    if faults and None not in faults and config.evaluation.data is not None:
        raise ConfigError(
            f"evaluation.data={config.evaluation.data}: none of {len(faults)} probed questions can be used; "
            f"the first: {faults[0]}. Name its image folder with --set evaluation.images=FOLDER"
        )
    return scoring_notes(config, cache, scorable=bool(items.pairs) or None in faults, option=RUN_OPTION)


def scoring_notes(config: TrainConfig, cache: TeacherCache | None, *, scorable: bool, option: str) -> list[str]:
    """What the scores of a configuration do not tell, as sentences.

    ``scorable`` says whether any item can be scored, ``option`` how other data is named where this is shown.
    """
    data = _data_of(config, cache)
    if not scorable:
        return [
            f"No question of {data} can be scored: only the agreement with the teacher is measured. "
            f"Name held-out questions with {option}."
        ]
    if not _is_training_data(config, data, cache):
        return []
    return [
        f"Questions are scored on the training data itself ({data}), so these scores include memorisation. "
        f"Name held-out questions with {option}."
    ]


def _open(config: TrainConfig, cache: TeacherCache | None) -> EvaluationSet:
    how = config.evaluation
    return open_evaluation(_data_of(config, cache), how.split, how.limit, images=_images_of(config))


def _data_of(config: TrainConfig, cache: TeacherCache | None) -> str:
    """The data set to score on, as ``data.registry`` takes it."""
    named = config.evaluation.data or config.data
    if named:
        return named
    remedy = f"name it with {EVALUATE_OPTION} (for distill run also {RUN_OPTION})"
    if cache is None:
        raise ConfigError(
            f"no data to score on is named, and the cache {config.cache}, which would tell, cannot be opened; {remedy}"
        )
    spec = str(cache.plan.data.get("name", "")).partition("[")[0].partition("/")[0]
    if spec.partition(":")[0] not in BUILT_IN_DATA:
        raise ConfigError(f"no data to score on: {config.cache} was built from {spec!r}; {remedy}")
    return spec


def _images_of(config: TrainConfig) -> Path | None:
    images = config.evaluation.images or config.images
    return None if images is None else Path(images)


def _is_own_data(config: TrainConfig) -> bool:
    return config.evaluation.data in (None, config.data)


def _is_training_data(config: TrainConfig, data: str, cache: TeacherCache | None) -> bool:
    """Whether the samples scored on are those of the cache; a saved `datasets` folder may have splits."""
    if data.partition(":")[0] in BUILT_IN_DATA:
        return False
    if cache is None:
        return _is_own_data(config)
    cached = {cache.plan.fingerprints.get("data"), *merged_fingerprints(cache)}
    split, images = config.evaluation.split, _images_of(config)
    return any(
        open_dataset(data, split=split, images=images, limit=limit).fingerprint() in cached
        for limit in dict.fromkeys(limit for _, limit in splits_and_limits(cache))
    )


def _fault(item: Question, encoder: SampleEncoder | None) -> str | None:
    """Why a question cannot be asked; None if it can. Without an encoder only the picture is looked at."""
    try:
        if encoder is not None:
            build_prompt(encoder, item.image, item.question)
        elif item.image is not None:
            item.image.load()
    except SampleError as error:
        return str(error)
    return None
