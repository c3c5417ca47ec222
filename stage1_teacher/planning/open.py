"""Open data and teacher as a configuration says, and plan the cache."""

import logging
from dataclasses import replace
from pathlib import Path

from vlm_distill_cache.common.attention.layers import published_count
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, SEVERAL_PICTURES
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.sources.grouping import group_by_image
from vlm_distill_cache.data.sources.mixture import entry_of_cache
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.encode_ahead import count_workers
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.batch_size import automatic_batch_size
from vlm_distill_cache.stage1_teacher.planning.cache_folder import stored_plan
from vlm_distill_cache.stage1_teacher.planning.extension import ExtendConfig, extend_plan, survey_of_kept
from vlm_distill_cache.stage1_teacher.planning.plan import (
    beyond_positions,
    build_encoder,
    codecs_for,
    fields_of,
    make_plan,
    refuse_packing,
    refuse_signals,
    teacher_directory,
)
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

logger = logging.getLogger(__name__)


def open_build(config: BuildConfig, *, loads: bool = True) -> Build:
    """Open data and teacher as a configuration says, and plan the cache.

    With ``loads=False`` the teacher is only described: its weights are in no fingerprint, an automatic batch size is 1, and a
    built-in teacher that would be trained first is described by another one of its kind.
    """
    base = config.base if isinstance(config, ExtendConfig) else config.cache
    config = _for_entry(config, base)
    dataset = open_data(config, Path(base))
    scratch = Path(config.cache).parent / f"{config.data.partition(':')[0]}-teacher"
    directory = teacher_directory(
        teacher=config.teacher, data=config.data, scratch=scratch, cache=Path(config.cache), trains=loads
    )
    teacher = Teacher(
        directory,
        dtype=config.dtype,
        device=config.device,
        device_map=config.device_map,
        quantisation=config.quantisation,
        tensor_parallel=config.tensor_parallel or 1,
        loads=loads,
    )
    refuse_signals(config.signals, teacher)
    refuse_packing(dataset, teacher)
    stays = isinstance(config, ExtendConfig) and "max_length" not in config.given
    if not stays and (warning := beyond_positions(teacher, config.max_length)):
        logger.warning("%s", warning)
    config = replace(config, groups=config.groups or published_count(teacher.depth))
    encoder = build_encoder(
        teacher,
        template=config.template,
        max_length=config.max_length,
        long_samples=config.long_samples,
        frames=config.frames,
    )
    survey, version = dataset.survey(), ONE_PICTURE
    if isinstance(config, ExtendConfig):
        survey = survey_of_kept(config.base, dataset, survey)
    # A cache of several pictures that is topped up stays one, whatever the data is that is left of its own.
    if survey.several or (isinstance(config, ExtendConfig) and read_plan(Path(base)).format_version != ONE_PICTURE):
        version = SEVERAL_PICTURES
    codecs = codecs_for(config, teacher, several=version != ONE_PICTURE, videos=survey.videos > 0)
    if any(VISUAL_SOURCE in group for group in fields_of(codecs, teacher.family.visual_rows).values()):
        dataset = group_by_image(dataset)
    work = Build(
        teacher=teacher,
        dataset=dataset,
        encoder=encoder,
        codecs=codecs,
        groups=teacher.groups(config.groups, config.layers),
        plan=make_plan(
            config,
            dataset=dataset,
            teacher=teacher,
            encoder=encoder,
            codecs=codecs,
            survey=survey,
            version=version,
        ),
        workers=count_workers(config.num_workers, teacher.device, len(dataset)),
    )
    if isinstance(config, ExtendConfig):
        return extend_plan(work, config)
    if config.batch_size or not loads:
        return work
    return replace(
        work, plan=replace(work.plan, batch_size=automatic_batch_size(work, survey.fullest if survey.several else ""))
    )


def open_data(config: BuildConfig, cache: Path) -> Dataset:
    """Open the data as a configuration says.

    Raises:
        DataError: Also if they have no such split, unless ``cache`` was begun with it when nothing was said about that.
    """
    begun = stored_plan(cache)
    return open_dataset(
        config.data,
        split=config.split,
        images=Path(config.images) if config.images else None,
        limit=config.limit or None,
        strict=begun is None or begun.data.get("split") != config.split,
    )


def _for_entry(config: BuildConfig, cache: str) -> BuildConfig:
    """The options for that entry of a mixture whose cache is built, where each has its own; else those that are given."""
    entry = entry_of_cache(config.data, cache)
    if entry is None:
        return config
    return replace(
        config,
        data=entry.data,
        images=str(entry.images or config.images),
        limit=entry.limit_within(config.limit) or 0,
        split=entry.split or config.split,
    )
