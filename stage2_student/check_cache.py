"""Bad news before the first step: does this cache fit the data, the tokenizer and the student?

Every check raises ``CacheMismatchError`` with both values and the remedy. That the cache is sealed and of a
known format is checked where it is opened (``common.cache``); labels and pictures are checked again on every
sample (``cached_dataset.check_join``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from common.cache import TeacherCache
from common.documents import describe_differences
from common.errors import CacheMismatchError, SampleError
from common.hashing import fingerprint
from data.fingerprints import module_fingerprint, tokenizer_fingerprint
from data.sample import Dataset
from data.templates import PromptTemplate
from stage2_student.cached_dataset import CachedDataset
from stage2_student.join import merged_fingerprints, missing_samples

PROBED_SAMPLES = 8


def check_tokenizer(cache: TeacherCache, tokenizer: Any, *, where: str) -> None:
    """Refuse to distil logits across tokenizers: their ids mean different words.

    Args:
        cache: The teacher's signals.
        tokenizer: The one the student reads and writes with.
        where: Whose it is, for the error.

    Raises:
        CacheMismatchError: Naming both fingerprints.
    """
    expected, found = cache.plan.fingerprints.get("tokenizer"), tokenizer_fingerprint(tokenizer)
    if expected != found:
        raise CacheMismatchError(
            f"tokenizer of {where}: fingerprint {found}, the teacher of {cache.path} used {expected}; "
            "logits cannot be "
            "distilled across tokenizers. Use a student with the teacher's tokenizer, or build a cache with "
            "a "
            "teacher that has the student's"
        )


def check_template(cache: TeacherCache, template: PromptTemplate) -> None:
    """Refuse another prompt than the teacher saw.

    Raises:
        CacheMismatchError: Naming both templates.
    """
    cached = PromptTemplate.from_dict(cache.plan.template)
    if template != cached:
        raise CacheMismatchError(
            f"prompt template {template.name!r} ({fingerprint(template.to_dict())}) is not the one the "
            "teacher of "
            f"{cache.path} saw: {cached.name!r} ({fingerprint(cached.to_dict())}). Leave `template` unset "
            "to use the "
            "cache's, or build the cache with this template"
        )


def check_data(cache: TeacherCache, dataset: Dataset) -> None:
    """Refuse other data than the cache was built from; of a merged cache, than one of those it came from.

    A cache that was derived from another one keeps that one's fingerprint: it fits the same data.

    Raises:
        CacheMismatchError: Naming both fingerprints, and how many sample ids are missing.
    """
    expected, found = cache.plan.fingerprints.get("data"), dataset.fingerprint()
    merged = merged_fingerprints(cache)
    if found == expected or found in merged:
        return
    missing, first = missing_samples(cache, dataset.sample_ids)
    what = (
        f"{missing} of the cache's {len(cache)} sample ids are missing, the first is {first!r}"
        if missing
        else "all sample ids are there, but some question or answer changed, or samples were added"
    )
    raise CacheMismatchError(
        f"data set {dataset.name} ({len(dataset)} samples, fingerprint {found}) is not the one {cache.path} "
        "was built "
        f"from ({cache.plan.data}, fingerprint {' or '.join(merged) or expected}): {what}. Give the cache's "
        "data (--data, --images), or build a cache for this data (teacher-cache build --data ...)"
    )


def check_signals(cache: TeacherCache, signals: Sequence[str], *, temperature: float, phase: str) -> None:
    """Refuse losses whose signal, or whose temperature, is not in the cache.

    Args:
        cache: The teacher's signals.
        signals: The signals the phase's losses read.
        temperature: Of the logit loss.
        phase: For the error.

    Raises:
        CacheMismatchError: Naming what is cached.
    """
    held = sorted(cache.plan.signals)
    for signal in signals:
        if signal not in held:
            raise CacheMismatchError(
                f"phase {phase}: loss {signal!r} needs a signal that {cache.path} does not hold; it holds "
                f"{', '.join(held)}. Set {phase}.losses.{signal}=0, or build the cache with this signal "
                f"(teacher-cache build --signals {','.join([*held, signal])})"
            )
    if "logits" in signals:
        cached = [float(value) for value in cache.plan.signals["logits"]["temperatures"]]
        if temperature not in cached:
            raise CacheMismatchError(
                f"phase {phase}: losses.temperature is {temperature}, {cache.path} holds tail masses at "
                f"{', '.join(map(str, cached))} only. Use one of these, or build the cache with this "
                "temperature"
            )


def check_vision_tower(cache: TeacherCache, tower: nn.Module) -> None:
    """Refuse the teacher's projector (TAF) behind another vision tower than it was trained on.

    Args:
        cache: Whose projector is used.
        tower: The student's vision tower.

    Raises:
        CacheMismatchError: Naming both fingerprints.
    """
    expected, found = cache.plan.fingerprints.get("vision_tower"), module_fingerprint(tower)
    if expected != found:
        raise CacheMismatchError(
            f"projector 'taf' feeds the student's vision tower (fingerprint {found}) to the teacher's "
            "projector, which "
            f"was trained on another tower (fingerprint {expected} in {cache.path}). Use a student with the "
            "teacher's tower, or another projector (--set projector=ldpnetv2)"
        )


def check_geometry(cache: TeacherCache, geometry: Mapping[str, Any], *, where: str) -> None:
    """Refuse pictures that are prepared in another way than the teacher's were; the token grid may differ.

    Args:
        cache: The teacher's signals.
        geometry: What decides the pixels, as ``ImageEncoder.to_dict`` says it.
        where: Whose it is, for the error.

    Raises:
        CacheMismatchError: Naming each differing setting with both values.
    """
    cached, found = ({k: v for k, v in g.items() if k != "grid"} for g in (cache.plan.geometry, geometry))
    lines = describe_differences(cached, found, there=str(cache.path), here=where)
    if lines:
        raise CacheMismatchError(
            f"{where} prepares images in another way than {cache.path}:\n" + "\n".join(lines) + "\n"
            "A student reads images in one way: use caches of teachers with the same image processor, and a "
            "student folder with that one (or without preprocessor_config.json, if its tower fits)"
        )


def probe_samples(dataset: CachedDataset, *, count: int = PROBED_SAMPLES) -> None:
    """Load a few samples spread over the data: labels and pictures must be the ones the teacher saw.

    Args:
        dataset: The join of data and cache.
        count: Samples to load.

    Raises:
        CacheMismatchError: As ``cached_dataset.check_join``, or if a sample the teacher read cannot be read
            now.
    """
    step = max(1, len(dataset) // count)
    for position in range(0, len(dataset), step):
        try:
            dataset.load(position)
        except SampleError as error:
            raise CacheMismatchError(
                f"sample {dataset.sample_ids[position]!r} was readable when the cache was built and is not "
                "now: "
                f"{error}. Restore the file, check --images, or build the cache again"
            ) from error
