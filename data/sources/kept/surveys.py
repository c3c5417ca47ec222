"""What a look at every sample says of large data, kept: no process and no later run looks again.

Reading and understanding the texts takes most of what comes before the first batch. It is shared by several processes;
the parts are joined in order, so that a fingerprint is the same however it was made.
"""

import logging
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any

from vlm_distill_cache.data.sample import (
    Dataset,
    Survey,
    SurveyPart,
    join_surveys,
    survey_samples,
    survey_some,
    surveyed_together,
)
from vlm_distill_cache.data.sources.kept.store import Kept, kept_path, read_kept, write_kept

logger = logging.getLogger(__name__)

SHARED_FROM = 50_000  # samples, from which on several processes look at them
MOST_PROCESSES = 64
_surveyed: Dataset | None = None  # what processes that are forked from this one look at


def kept_survey(dataset: Dataset, of: Any) -> Survey:
    """The survey of a data set that was made of ``of``, JSON: names, sizes and times of its files."""
    of = ["survey", of]
    path = kept_path("surveys", of)
    found = read_kept(path, of)
    if found is not None:
        return Survey(**found.notes)
    if len(dataset) >= SHARED_FROM:
        logger.info("%s: the texts of %d samples are read, once", dataset.name, len(dataset))
    survey = _survey_together(dataset)
    write_kept(path, of, Kept(asdict(survey), {}))
    return survey


def survey_of_several(dataset: Dataset) -> Survey:
    """The survey of data that consist of others; kept of many samples, where all of these say what they are made of."""
    of = dataset.made_of() if len(dataset) >= SHARED_FROM else None
    return survey_samples(dataset) if of is None else kept_survey(dataset, of)


def _survey_together(dataset: Dataset) -> Survey:
    global _surveyed
    count = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if count < 2 or len(dataset) < SHARED_FROM or multiprocessing.current_process().daemon:
        return survey_samples(dataset)
    _surveyed = dataset
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
            return join_surveys(_in_order(pool, len(dataset), count))
    finally:
        _surveyed = None


def _in_order(pool: ProcessPoolExecutor, samples: int, processes: int) -> Iterator[SurveyPart]:
    """The parts as they are done, in order, few of them ahead of what is hashed."""
    some = surveyed_together(samples)
    ahead = 8 * processes
    waiting = [pool.submit(_survey, places) for places in some[:ahead]]
    for number in range(len(some)):
        part = waiting[number % ahead].result()
        if number + ahead < len(some):
            waiting[number % ahead] = pool.submit(_survey, some[number + ahead])
        yield part


def _survey(places: range) -> SurveyPart:
    assert _surveyed is not None  # it was set before the fork
    return survey_some(_surveyed, places)
