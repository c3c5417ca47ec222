"""The items a student is scored on: checked before the first training step, and what their scores mean.

A user's file has no splits. Where no other data is named, students are scored on what they were trained on, and the
scores carry a note that says so. A student may outlive its cache, which is None here then.
"""

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import ConfigError, DataError, SampleError
from vlm_distill_cache.common.files.rules import shown
from vlm_distill_cache.common.hub import hub_name
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.registry import TEXTS, open_dataset, open_evaluation
from vlm_distill_cache.data.sample import EvaluationSet, Question, load_picture, questions_of
from vlm_distill_cache.data.sources.mixture import MIXTURES, is_mixture
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.generation import prompt_of
from vlm_distill_cache.stage2_student.batches.dataset import merged_fingerprints, splits_and_limits
from vlm_distill_cache.stage2_student.config import EvaluationConfig, Split, TrainConfig
from vlm_distill_cache.stage2_student.scores.card import CardScores
from vlm_distill_cache.stage2_student.scores.results import MEMORISED, SCORES_MEMORISED, EvaluationReport
from vlm_distill_cache.stage2_student.students.encoder import encoder_of_cache
from vlm_distill_cache.stage2_student.training.preparation import BUILT_IN_DATA, built_in_data

PROBED_QUESTIONS = 32
# A larger share of items that cannot be read is refused: a wrong folder, more likely than bad files.
MOST_UNREADABLE = 0.5
SHOWN_REASONS = 3
_FOLDERS = re.compile(r"""(?<![^\s('"`=])(?:~|/)(?:[^\s'"`,;()/:]*/)+""")  # around a file, from the root or a home
_PROMPT = "sample 'prompt': "  # how an error calls what is asked; the item's id says more
EVALUATE_OPTION = "--data FILE"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class OpenedItems:
    """The items that can be scored, and what ``EvaluationReport.unreadable`` says of the others."""

    items: EvaluationSet
    unreadable: Mapping[str, Any]


def open_items(config: TrainConfig, encoder: SampleEncoder, cache: TeacherCache | None) -> OpenedItems:
    """Open the items that a configuration names, without those that cannot be read.

    Raises:
        ConfigError: If no data is named, and the cache's is not built in; or if more than ``MOST_UNREADABLE`` of the
            items cannot be read, with the first reasons.
        DataError: If the data cannot be opened.
    """
    opened = _open(config, encoder, cache)
    if found := opened.unreadable:
        _log.warning("%d of %d questions cannot be read and are not scored", found["items"], found["of"])
    return opened


def scored_items(
    config: TrainConfig, encoder: SampleEncoder, cache: TeacherCache, *, all_readable: bool
) -> EvaluationSet:
    """The items of scores that are there already; ``all_readable`` says that none was left out, so that none is opened.

    Raises:
        ConfigError, DataError: As `open_items`.
    """
    if not all_readable:
        return _open(config, encoder, cache).items
    how = config.evaluation
    return open_evaluation(_data_of(config, cache), how.split, how.limit, images=_images_of(config))


def probe_items(config: TrainConfig, cache: TeacherCache) -> list[str]:
    """Open the items before a student is trained, and say what its scores will not tell.

    Returns:
        Sentences to show with the scores; none if all is well.

    Raises:
        ConfigError: If no data is named and the cache's is not built in, or if too little can be read of the data that
            was named for this.
        DataError: If the data cannot be opened.
    """
    cache.check_side_files(["processor"])
    encoder = encoder_of_cache(cache.plan, cache.path / "processor", max_length=config.max_length)
    data = _data_of(config, cache)
    if config.evaluation.split != EvaluationConfig().split:  # asked for, so that it has to be there
        open_dataset(data, split=config.evaluation.split, images=_images_of(config), strict=True)
    if config.evaluation.data is not None:
        opened = _open(config, encoder, cache)
        scorable = bool(opened.items.pairs or opened.items.questions)
        notes = scoring_notes(config, cache, scorable=scorable, option=run_option())
        return [*notes, *filter(None, [unreadable_note(opened.unreadable)])]
    # The cache was built from this data: a look at some is enough.
    items = open_evaluation(data, config.evaluation.split, config.evaluation.limit, images=_images_of(config))
    step = max(1, len(items.questions) // PROBED_QUESTIONS)
    readable = any(_fault(item, encoder) is None for item in items.questions[::step])
    return scoring_notes(config, cache, scorable=bool(items.pairs) or readable, option=run_option())


def split_on_the_way(config: TrainConfig, cache: TeacherCache | None) -> Split:
    """Of which split items are taken while a student trains: of ``validation`` where the data have it."""
    try:
        open_dataset(_data_of(config, cache), split="validation", images=_images_of(config), strict=True)
    except DataError:
        return config.evaluation.split
    return "validation"


def run_option() -> str:
    """How other data to score on are named where students are trained."""
    return f"{by_make('EVAL_DATA=FILE or ')}--set evaluation.data=FILE"


def scoring_notes(
    config: TrainConfig, cache: TeacherCache | None, *, scorable: bool, option: str, known: bool = True
) -> list[str]:
    """What the scores of a configuration do not tell, as sentences.

    ``scorable`` says whether any item can be scored, ``option`` how other data is named where this is shown, ``known``
    whether it is recorded what the student was trained on.
    """
    data = _data_of(config, cache)
    if not scorable:
        return [
            f"No question of {data} can be scored: only the agreement with the teacher is measured. "
            f"Name held-out questions with {option}."
        ]
    remedy = f"{SCORES_MEMORISED}. Name held-out questions with {option}."
    if _is_training_data(config, data, cache):
        if not known:
            return [
                f"Questions are scored on the cache's data ({data}). Whether the student was trained on them is not recorded: "
                f"if it was, these scores include memorisation. Name held-out questions with {option}."
            ]
        limits = [] if cache is None else [limit for _, limit in splits_and_limits(cache) if limit is not None]
        part = f"; the cache holds its first {limits[0]} samples" if len(limits) == 1 else ""
        return [f"{MEMORISED} ({data}{part}), {remedy}"]
    shared, total = _trained_on(config, data, cache)
    some = "All questions that are scored" if shared == total else f"{shared} of the {total} questions"
    return [f"{some} of {data} are of the training data, too, {remedy}"] if shared else []


def card_scores(
    reports: Mapping[str, EvaluationReport],
    config: TrainConfig,
    cache: TeacherCache | None,
    notes: Sequence[str],
    *,
    trained: bool = True,
) -> CardScores:
    """Scores as a card has them, without the folders of this machine.

    Args:
        notes: What the scores do not tell.
        trained: Whether the students were trained from this very cache.
    """
    known = None if cache is None else cache.plan.data.get("name")
    data = str(config.evaluation.data or config.data or known or "its data")
    named = [data, str(known or ""), *map(str, filter(None, (config.evaluation.images, config.images, config.cache)))]
    for place in sorted(named, key=len, reverse=True):
        if "/" in place and "://" not in place and not hub_name(place.partition(":")[0]):
            notes = [note.replace(place, Path(place).name) for note in notes]
    kept = Path(data).name if data.startswith(("/", "~", ".")) else data
    of_file = Path(data).suffix.lower() in (*TEXTS, *MIXTURES, ".parquet", ".tar")  # which has no splits
    return CardScores(
        reports,
        kept if of_file else f"{kept}, split {config.evaluation.split}",
        tuple(_FOLDERS.sub("", note) for note in notes),
        "the first samples of the cache that it was trained from"
        if trained
        else "the first samples of another cache than the one that it was trained from",
    )


def _open(config: TrainConfig, encoder: SampleEncoder | None, cache: TeacherCache | None) -> OpenedItems:
    how = config.evaluation
    data, images = _data_of(config, cache), _images_of(config)
    known = cache.failed if cache is not None and _is_own_data(config) else {}
    failed: dict[str, str] = {}  # by sample or item
    items = open_evaluation(data, how.split, how.limit, images=images, on_failed=failed.__setitem__)
    kept = []
    for item in items.questions:
        reason = known.get(item.item_id.rpartition("-")[0]) or _fault(item, encoder)
        if reason is None:
            kept.append(item)
        else:
            failed[item.item_id] = f"{item.item_id}: {reason.removeprefix(_PROMPT)}"
    total = len(items.pairs) + len(kept) + len(failed)
    # What stage one could not read was accepted there.
    faults = [reason for name, reason in failed.items() if name.rpartition("-")[0] not in known and name not in known]
    if len(faults) > MOST_UNREADABLE * total:
        share = "none" if len(faults) == total else f"only {total - len(faults)}"
        raise ConfigError(
            f"{data}: {share} of {total} probed questions can be used, and scores of less than "
            f"{1 - MOST_UNREADABLE:.0%} of them would mislead; {_first(faults)}. Name the image folder with --images "
            "FOLDER (distill evaluate) or --set evaluation.images=FOLDER (distill run), or take out what cannot be read"
        )
    unreadable = {}
    if failed:
        shown = [one_line(reason) for reason in list(failed.values())[:SHOWN_REASONS]]
        unreadable = {"items": len(failed), "of": total, "reasons": shown}
    return OpenedItems(items=replace(items, questions=tuple(kept)), unreadable=unreadable)


def unreadable_note(unreadable: Mapping[str, Any]) -> str:
    """How many items are not scored and why, as a sentence; empty if all are."""
    if not unreadable:
        return ""
    return (
        f"{unreadable['items']} of {unreadable['of']} questions cannot be read and are not scored; "
        f"{_first(unreadable['reasons'])}"
    )


def _first(reasons: Sequence[str]) -> str:
    return f"the first: {'; '.join(one_line(reason) for reason in reasons[:SHOWN_REASONS])}"


def _data_of(config: TrainConfig, cache: TeacherCache | None) -> str:
    """The data set to score on, as ``data.registry`` takes it."""
    named = config.evaluation.data or config.data
    if named:
        return named
    remedy = f"name it with {EVALUATE_OPTION} (for distill run also {run_option()})"
    if cache is None:
        raise ConfigError(
            f"no data to score on is named, and the cache {config.cache}, which would tell, cannot be opened; {remedy}"
        )
    spec = built_in_data(cache)
    if spec is None:
        raise ConfigError(
            f"no data to score on: {config.cache} was built from {shown(cache.plan.data.get('name'))}; {remedy}"
        )
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
    if cache is None or (is_mixture(data) and _is_own_data(config)):  # whose caches may be several
        return _is_own_data(config)
    cached = {cache.plan.fingerprints.get("data"), *merged_fingerprints(cache)}
    split, images = config.evaluation.split, _images_of(config)
    if config.data is not None:  # the cache may have been extended since, to other data
        own = Path(config.images) if config.images else None
        with contextlib.suppress(DataError, OSError):  # the training's file may be gone
            cached |= {
                open_dataset(config.data, split=of, images=own, limit=limit).fingerprint()
                for of, limit in splits_and_limits(cache)
            }
    return any(
        open_dataset(data, split=split, images=images, limit=limit).fingerprint() in cached
        for limit in dict.fromkeys(limit for _, limit in splits_and_limits(cache))
    )


def _trained_on(config: TrainConfig, data: str, cache: TeacherCache | None) -> tuple[int, int]:
    """How many questions of other data are of the training's data, too, by id, text and picture's name; and of how many."""
    if config.data is None or config.data.partition(":")[0] in BUILT_IN_DATA or data.partition(":")[0] in BUILT_IN_DATA:
        return 0, 0
    split, limit = ("train", None) if cache is None else splits_and_limits(cache)[-1]
    items = open_evaluation(data, config.evaluation.split, config.evaluation.limit, images=_images_of(config)).questions
    try:
        trained = open_dataset(
            config.data, split=split, images=Path(config.images) if config.images else None, limit=limit
        )
    except (DataError, OSError):  # the training's file may be gone
        return 0, len(items)
    wanted = {item.item_id.rpartition("-")[0] for item in items}
    seen = set()
    for place, name in enumerate(trained.sample_ids):
        if name in wanted:
            with contextlib.suppress(SampleError):
                seen |= {_identity(item) for item in questions_of(trained[place], str)}
    return sum(_identity(item) in seen for item in items), len(items)


def _identity(item: Question) -> tuple[str, ...]:
    shown = (item.image.name, *(medium.name for medium in item.further))
    return item.item_id, *shown, item.question, item.answer, item.system


def _fault(item: Question, encoder: SampleEncoder | None) -> str | None:
    """Why a question cannot be asked; None if it can. Without an encoder only the picture is looked at."""
    try:
        if encoder is not None:
            prompt_of(encoder, item)
        elif item.image is not None:
            for medium in (item.image, *item.further):
                load_picture(medium)
    except SampleError as error:
        return str(error)
    return None
