"""That a cache's records are of the questions that the data have now: its own records do not hold them.

The fingerprint of the data covers every text, so that the one of the samples that were there before proves it. It cannot
where a text that had failed has changed or is gone, where a mixture has grown whose samples are kept by picture, and for a
cache of parts of several data sets: there the teacher reads some samples again, and must say what it said.
"""

import logging
import random
from dataclasses import replace
from typing import Any

from vlm_distill_cache.common.cache.plan import described_parts
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheMismatchError, SampleError
from vlm_distill_cache.common.tools.derived_card import DERIVED
from vlm_distill_cache.data.sample import Dataset, Sample, with_answers
from vlm_distill_cache.data.sources.grouping import ChosenSamples, GroupedByImage
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS
from vlm_distill_cache.stage1_teacher.loop.forward import run_alone
from vlm_distill_cache.stage1_teacher.loop.kept import Kept
from vlm_distill_cache.stage1_teacher.loop.work import Build

logger = logging.getLogger(__name__)

PROBED = 32  # samples that are read again
MOST_MOVED = {"float32": 0.05}  # of a row's probability, by other batches and the codec
_MOST_MOVED = 0.25  # in half precision
_REMEDY = "Give the data that it was built from, which may have grown, or build another cache; nothing was changed"


def refuse_other_texts(work: Build, kept: Kept) -> None:
    """Refuse data whose questions, answers, system prompts or order are not those of the records.

    Args:
        work: As planned for the whole data set.
        kept: The cache that is topped up.

    Raises:
        CacheMismatchError: By the sample's name, where it is among some that are looked at.
    """
    cache, found = kept.cache, work.plan.fingerprints["data"]
    expected = cache.plan.fingerprints.get("data")
    parts = described_parts(cache.plan.data.get("parts"))
    if found == expected or found in [part.get("fingerprint") for part in parts]:
        return
    derived = DERIVED in cache.plan.extra
    if not derived and _was_there(work.dataset, cache):
        return
    proved = _ask_again(work, kept) if work.teacher.loads else LogitCodec.signal in cache.plan.signals
    # Samples of a mixture are dealt anew when it grows, and a cache in the order of its pictures does not tell how they were.
    dealt = "mixture" in cache.plan.data and "order" in cache.plan.extra and len(work.dataset) > len(cache)
    if not (derived or dealt or cache.failed):
        raise CacheMismatchError(
            f"{cache.place}: the data say something else of the samples that it holds than when it was built: a question, an "
            f"answer, a system prompt or their order has changed (fingerprint expected {expected}, got {found}). {_REMEDY}"
        )
    if not proved:
        raise CacheMismatchError(
            f"{cache.place}: whether the questions of its samples are still the same cannot be told: the data are others than "
            f"it was built from (fingerprint expected {expected}, got {found}), and it holds no logits to compare. {_REMEDY}"
        )
    logger.warning(
        "%s: the data are others than it was built from, so their fingerprint does not prove that the questions of its samples "
        "are the same: the teacher %s",
        cache.place,
        f"{'read' if work.teacher.loads else 'will first read'} {min(PROBED, len(cache))} of {len(cache)} again, and "
        f"{'said what it had said' if work.teacher.loads else 'must say what it had said'}",
    )


def refuse_reordered(work: Build, cache: TeacherCache) -> None:
    """Refuse data that have the very samples of a cache in another order: students would not accept them."""
    if DERIVED not in cache.plan.extra and work.plan.fingerprints["data"] != cache.plan.fingerprints.get("data"):
        raise CacheMismatchError(
            f"{cache.place}: holds all of that already, for data in another order; students need the data as it was built "
            f"from. {_REMEDY}"
        )


class _Unread(ChosenSamples):
    """Samples of which some count as texts that cannot be read."""

    failed: frozenset[str] = frozenset()

    def __getitem__(self, index: int) -> Sample:
        if self.sample_ids[index] in self.failed:
            raise SampleError("failed before")
        return super().__getitem__(index)

    def made_of(self) -> Any:
        """As of all chosen samples; None where some do not say what their files do."""
        return None if self.failed else super().made_of()


def _was_there(dataset: Dataset, cache: TeacherCache) -> bool:
    """Whether the samples of a cache are as they were: in the order of the data, or in that of the cache."""
    plain = dataset.ungrouped if isinstance(dataset, GroupedByImage) else dataset
    places = {sample_id: place for place, sample_id in enumerate(plain.sample_ids)}
    failed = frozenset(cache.failed)
    orders = [sorted(places[name] for name in (*cache, *failed) if name in places)]
    if not failed and "order" not in cache.plan.extra:
        orders.append([places[name] for name in cache])
    for order in orders:
        chosen = _Unread(plain, order, name=plain.name)
        for unread in {frozenset[str](), failed}:  # their pictures had failed, or their texts
            chosen.failed = unread
            if chosen.fingerprint() == cache.plan.fingerprints.get("data"):
                return True
    return False


def _ask_again(work: Build, kept: Kept) -> bool:
    """Let the teacher read some samples that have a record; whether there was anything to compare.

    Raises:
        CacheMismatchError: If one is another, or the teacher says something else of it.
    """
    cache = kept.cache
    held = [place for place, name in enumerate(work.dataset.sample_ids) if kept.holds(name)]
    settings = cache.plan.signals.get(LogitCodec.signal)
    codec = None if settings is None else codec_from_dict(settings)
    bound = MOST_MOVED.get(work.teacher.dtype, _MOST_MOVED)
    for place in sorted(random.Random(0).sample(held, min(PROBED, len(held)))):
        name = work.dataset.sample_ids[place]
        try:
            sample = work.dataset[place]
            encoded = work.encoder(with_answers(sample, kept.answers(name)) if ANSWERS in work.codecs else sample)
        except SampleError as error:
            kept.refuse_others([], [(name, str(error))])
            raise
        kept.refuse_others([encoded], [])
        if codec is None or not len(encoded.supervised_rows):
            continue
        _, output, _ = run_alone(replace(work, codecs={codec.signal: codec}), encoded)
        said = output[codec.signal].float().cpu().softmax(dim=-1)  # [A, V]
        record = as_tensors(codec.decode(cache.read(name, {field.name for field in codec.fields()})))
        moved = (said.gather(1, record.token_ids.long()) - record.log_probs.exp()).abs() * record.entry_mask  # [A, K]
        if (most := float(moved.sum(dim=1).max()) / 2) > bound:
            raise CacheMismatchError(
                f"{cache.place}: the teacher says something else of sample {name!r} than its record: {most:.3f} of a row's "
                f"probability moved, expected at most {bound:g}; its question or system prompt has changed, or the teacher "
                f"runs otherwise. {_REMEDY}"
            )
    return codec is not None
