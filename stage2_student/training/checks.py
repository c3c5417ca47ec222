"""Bad news before the first step: does this cache fit the data, the tokenizer and the student?

Every check raises ``CacheMismatchError`` with both values and the remedy. That the cache is sealed and of a
known format is checked where it is opened (``common.cache.reader``); labels and pictures are checked again on every
sample (``batches.dataset.check_join``).
"""

import importlib.util
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_bf16_available
from torch import nn
from transformers import AutoConfig

from vlm_distill_cache.common.cache.plan import built_with, with_more
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, ModelError, SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.rules import AGAIN, shown
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.next_step import set_words
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.table import FAMILIES
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.text.processors import load_tokenizer, module_fingerprint, tokenizer_fingerprint
from vlm_distill_cache.data.text.templates import PromptTemplate
from vlm_distill_cache.stage2_student.batches.dataset import (
    MOST_PADDING,
    CachedDataset,
    merged_fingerprints,
    missing_samples,
)
from vlm_distill_cache.stage2_student.batches.sampler import micro_batch_count
from vlm_distill_cache.stage2_student.batches.signals import LossTerm
from vlm_distill_cache.stage2_student.batches.united import UnitedDataset
from vlm_distill_cache.stage2_student.config import SAVINGS, TrainConfig
from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.terms import TERMS, choose_terms
from vlm_distill_cache.stage2_student.students.encoder import knows_boxes
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.training.optimizers import refuse_no_bitsandbytes, try_8bit
from vlm_distill_cache.stage2_student.training.trackers import refuse_missing

PROBED_SAMPLES = 8
_log = logging.getLogger(__name__)


def of_tokens(terms: Mapping[str, LossTerm]) -> list[str]:
    """Those of some losses that belong to tokens: only a student with the teacher's tokens can learn them."""
    return [name for name, term in terms.items() if not term.of_picture]


def same_tokenizer(cache: TeacherCache, tokenizer: Any) -> bool:
    """Whether a tokenizer does to text what that of a cache's teacher does."""
    return cache.plan.fingerprints.get("tokenizer") == tokenizer_fingerprint(tokenizer)


def check_tokenizer(cache: TeacherCache, tokenizer: Any, terms: Mapping[str, LossTerm], *, where: str) -> None:
    """Refuse to distil what belongs to tokens across tokenizers: their ids mean different words."""
    wanted = of_tokens(terms)
    expected, found = cache.plan.fingerprints.get("tokenizer"), tokenizer_fingerprint(tokenizer)
    if wanted and expected != found:
        others = {name: term.reads for name, term in TERMS.items() if term.of_picture}
        possible = [name for name, reads in others.items() if {*reads} <= cache.plan.signals.keys()]
        remedy = (
            f"keep only what is of the picture alone ({', '.join(possible)}) and set the weights of "
            f"{', '.join(wanted)} to 0"
            if possible
            else with_more(
                cache.plan,
                f"build a cache with {' or '.join(others)}, which are of the picture alone",
                options=f"--signals {next(iter(others))}",
            )
        )
        raise CacheMismatchError(
            f"tokenizer of {where}: fingerprint {found}, the teacher of {cache.place} used {expected}; "
            f"{', '.join(wanted)} cannot be distilled across tokenizers. Use a student with the teacher's "
            f"tokenizer, or a cache of a teacher that has the student's, or {remedy}"
        )


def check_template(cache: TeacherCache, template: PromptTemplate, terms: Mapping[str, LossTerm]) -> None:
    """Refuse another prompt than the teacher saw, where a loss compares token with token."""
    cached = PromptTemplate.from_dict(cache.plan.template, origin=cache.place)
    if of_tokens(terms) and template != cached:
        raise CacheMismatchError(
            f"prompt template {template.name!r} ({fingerprint(template.to_dict())}) is not the one the "
            f"teacher of {cache.place} saw: {cached.name!r} ({fingerprint(cached.to_dict())}). Leave `template` unset "
            "to use the cache's, or build the cache with this template"
        )


def check_data(cache: TeacherCache, dataset: Dataset) -> None:
    """Refuse other data than the cache was built from; of a merged cache, than one of those it came from.

    A cache that was derived from another one keeps that one's fingerprint: it fits the same data.
    """
    expected, found = cache.plan.fingerprints.get("data"), dataset.fingerprint()
    merged = merged_fingerprints(cache)
    if found == expected or found in merged:
        return
    missing, first = missing_samples(cache, dataset.sample_ids)
    what = (
        f"{missing} of the cache's {len(cache)} sample ids are missing, the first is {first!r}"
        if missing
        else "all sample ids are there, but some question or answer changed, samples were added, or their order is another"
    )
    raise CacheMismatchError(
        f"data set {dataset.name} ({len(dataset)} samples, fingerprint {found}) is not the one {cache.place} was built "
        f"from ({_named(cache)}, fingerprint {' or '.join(merged) or expected}): {what}. Give the cache's data "
        f"({by_make('DATA=, IMAGES=, or ')}--data, --images), or build a cache for this data ({built_with(cache.plan)} "
        "--data ...)"
    )


def _named(cache: TeacherCache) -> str:
    """The data of a cache as its plan names them, with split and number of samples."""
    data = cache.plan.data
    limit = f", the first {data['limit']} samples" if data.get("limit") else ""
    return f"{shown(data.get('name'))}, split {shown(data.get('split'))}{limit}"


def check_losses(
    config: TrainConfig,
    caches: Mapping[str, TeacherCache],
    *,
    each: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Refuse a run one of whose losses its cache cannot serve; needs no student, so it comes before any training.

    Args:
        each: Around each check.
    """
    phases = [(name, config.phase(name).losses, caches[str(config.phase(name).cache)]) for name in config.phases]
    off = [
        f"{name}.losses.{loss}=0"
        for name, losses, cache in phases
        for loss, term in choose_terms(losses.distilled).items()
        if not {*term.reads} <= cache.plan.signals.keys()
    ]
    for name, losses, cache in phases:
        with each():
            check_signals(cache, losses, phase=name, off=off)
    # As far as the caches tell; which of their samples are trained on is known once the data is open.
    with each():
        check_pictures((name, losses, cache, partial(_may_have_pictures, cache)) for name, losses, cache in phases)


def check_machine(
    config: TrainConfig,
    *,
    processes: int,
    starts: int = 1,
    each: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> None:
    """Refuse what this machine, or a number of processes, cannot train; needs neither cache nor student.

    Args:
        processes: Of the training, on all machines.
        starts: Those that are started here, and share its devices.
        each: Around each check.

    Raises:
        ConfigError: Naming the option.
    """
    with each():
        refuse_device(config.device, processes=processes)
        on_gpu = config.device != "cpu" and torch.cuda.is_available()
        if on_gpu and starts > torch.cuda.device_count():
            raise ConfigError(
                f"--nproc {starts}: each process has a GPU of its own, and {torch.cuda.device_count()} are here; start as many "
                "at most, or set device=cpu"
            )
    with each():
        if config.dtype == "bfloat16" and config.device != "cpu" and not is_bf16_available(ignore_tpu=True):
            raise ConfigError("dtype=bfloat16: the accelerator of this machine cannot compute in it; set dtype=float32")
    for name in config.phases:
        with each():
            phase = config.phase(name)
            try:
                micro_batch_count(phase.batch_size, world_size=processes, micro_batch_size=phase.micro_batch_size)
            except ConfigError as error:
                raise ConfigError(f"phase {name}: {error}") from error
    with each():
        refuse_missing(config.report_to)
    with each():
        if config.quantisation != "none":
            refuse_no_bitsandbytes(f"quantisation={config.quantisation}", instead="quantisation=none")
        if config.optimizer == "adamw8bit":
            try_8bit(torch.device("cuda" if on_gpu else "cpu"))
    with each():
        lora = any(config.phase(name).trainable == "lora" for name in config.phases)
        if lora and importlib.util.find_spec("peft") is None:
            raise ConfigError(
                "trainable=lora needs peft, which is not installed: run `pip install 'vlm-distill-cache[lora]'`"
            )


def refuse_undivided(config: TrainConfig, *, divides: bool) -> None:
    """Refuse to divide a student among processes, as its launcher asks for, in ways of keeping it that are not divided.

    Raises:
        ConfigError: Naming the option.
    """
    plain = TrainConfig(cache=config.cache, output=config.output)
    for name in SAVINGS if divides else ():
        if (value := getattr(config, name)) != getattr(plain, name):
            raise ConfigError(
                f"{name}={value}: the launcher asks for FSDP2, which divides weights, gradients and averages as they always are; "
                f"leave {name} out, or launch without FSDP2"
            )


def refuse_device(device: str, *, processes: int) -> None:
    """Refuse a GPU that is not here, or one for several processes.

    Raises:
        ConfigError: Naming it.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return
    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r}: {torch.cuda.device_count()} CUDA devices are here; choose auto, cpu or one of them"
        )
    if index and processes > 1:
        raise ConfigError(f"device={device!r}: each of {processes} processes has a GPU of its own; write device=cuda")


def check_signals(cache: TeacherCache, losses: LossWeights, *, phase: str, off: Sequence[str] = ()) -> None:
    """Refuse losses whose signals, or whose temperature, are not in the cache, or not as they need them.

    Args:
        off: The settings that switch off all of the run's losses that cannot be served; empty: this one's.
    """
    held = cache.plan.signals
    terms = choose_terms(losses.distilled)
    for name, term in terms.items():
        lacking = [signal for signal in term.reads if signal not in held]
        if lacking:
            unserved = (term for term in terms.values() if not held.keys() >= set(term.reads))
            build = ",".join(dict.fromkeys(signal for term in unserved for signal in term.reads))
            raise CacheMismatchError(
                f"phase {phase}: loss {name!r} needs a signal that {cache.place} does not hold: {', '.join(lacking)}; "
                f"it holds {', '.join(map(one_line, sorted(held)))}. Switch it off: "
                f"{set_words(off or [f'{phase}.losses.{name}=0'])}, or "
                + with_more(
                    cache.plan,
                    "build a cache with this signal ("
                    f"{by_make(f'SIGNALS={build},..., ')}teacher-cache build --signals {build},...)",
                    options=f"--signals {build},...",
                )
            )
    if "answers" in held:
        read_codec(cache, "answers")  # the samples' own, whatever the losses
    for term in terms.values():
        codecs = [read_codec(cache, signal) for signal in term.reads]
        cached = [value for codec in codecs if isinstance(codec, LogitCodec) for value in codec.temperatures]
        wanted = f"temperatures=[{losses.temperature}]"
        if term.tempered and losses.temperature not in cached:
            raise CacheMismatchError(
                f"phase {phase}: losses.temperature is {losses.temperature}, {cache.place} holds tail masses at "
                f"{', '.join(map(str, cached))} only. Use one of these "
                f"({set_words([f'{phase}.losses.temperature={cached[0]}'])}), or "
                + with_more(
                    cache.plan,
                    f"build a cache with this temperature ({set_words([wanted], variable='CACHE_SET')})",
                    options=f"--set {wanted}",
                )
            )
        term.check_cache(held, losses, f"phase {phase}, {cache.place}", None)


def _may_have_pictures(cache: TeacherCache) -> bool:
    return cache.manifest.totals.get("pictures") != 0


def check_pictures(
    phases: Iterable[tuple[str, LossWeights, TeacherCache, Callable[[], bool]]],
) -> None:
    """Refuse losses on visual tokens where no sample has a picture: they would have nothing to learn from.

    Args:
        phases: Name, losses and cache of each, and whether any of its samples has a picture.
    """
    blind: dict[str, str] = {}
    places: list[str] = []
    for name, losses, cache, has_pictures in phases:
        looking = [loss for loss, term in choose_terms(losses.distilled).items() if term.at_images]
        if looking and not has_pictures():
            blind |= {f"{name}.losses.{loss}=0": loss for loss in looking}
            places.append(cache.place)
    if blind:
        raise CacheMismatchError(
            f"no sample that is trained on has a picture ({', '.join(dict.fromkeys(places))}), so nothing could be learnt "
            f"by {', '.join(dict.fromkeys(blind.values()))}. Switch them off: {set_words(blind)}; or, if there should be "
            "pictures, see how the data names them (docs/families.md) and build the cache again"
        )


def read_codec(cache: TeacherCache, signal: str) -> Codec:
    """The codec of a signal that a loss reads.

    Raises:
        CacheFormatError: If no codec has the plan's settings, or the plan's arrays are not its codec's.
    """
    try:
        codec = codec_from_dict(cache.plan.signals[signal])
    except CacheFormatError as error:
        raise CacheFormatError(f"{cache.place}: plan: signals.{signal}: {error}") from error
    lacking = [field.name for field in codec.fields() if field not in cache.plan.fields[signal]]
    if codec.signal != signal or lacking:
        raise CacheFormatError(
            f"{cache.place}: plan: signals.{signal} names the codec {codec.signal!r}, which holds no {signal}"
            + (f" without the array {lacking[0]}, which is not in fields.{signal} as it writes it" if lacking else "")
            + f"; the plan is damaged: {AGAIN}"
        )
    return codec


def refuse_other_teacher(config: TrainConfig, cache: TeacherCache) -> None:
    """Refuse to cut a student out of another teacher than the cache's, as far as tokenizer and width tell.

    Raises:
        ModelError: If the directory does not hold the cache's teacher.
    """
    teacher = Path(config.teacher or "")
    found, cached = tokenizer_fingerprint(load_tokenizer(teacher)), cache.plan.fingerprints.get("tokenizer")
    width = cache.plan.teacher.get("hidden_size")
    own = text_config(AutoConfig.from_pretrained(teacher, local_files_only=True)).hidden_size
    if found != cached or width not in (None, own):
        raise ModelError(
            f"--teacher {teacher}: tokenizer {found}, width {own}; the cache {cache.place} was built with tokenizer "
            f"{cached}, width {width}: give the directory of the cache's own teacher"
        )


def check_vision_tower(cache: TeacherCache, tower: nn.Module) -> None:
    """Refuse the teacher's projector (TAF) behind another vision tower than it was trained on."""
    expected, found = cache.plan.fingerprints.get("vision_tower"), module_fingerprint(tower)
    if expected != found:
        raise CacheMismatchError(
            f"projector 'taf' feeds the student's vision tower (fingerprint {found}) to the teacher's projector, which "
            f"was trained on another tower (fingerprint {expected} in {cache.place}). Use a student with the "
            "teacher's tower, or another projector (--set projector=ldpnetv2)"
        )


def check_geometry(
    cache: TeacherCache, geometry: Mapping[str, Any], terms: Mapping[str, LossTerm], *, where: str
) -> None:
    """Refuse to compare attention where it is not known which part of the picture a visual token sees.

    Boxes make any two geometries meet, whatever the processors; without boxes there is nothing to meet on.

    Args:
        geometry: The student's, as ``to_dict`` of its image encoder says it.
    """
    of_places = [name for name, term in terms.items() if term.needs_boxes]
    for side, described in ((where, geometry), (f"the teacher of {cache.place}", cache.plan.geometry)):
        if of_places and not knows_boxes(described):
            raise CacheMismatchError(
                f"{', '.join(of_places)} cannot be compared: which part of the picture each visual token of "
                f"{side} sees is not known (geometry {described.get('kind')!r}, "
                f"{described.get('class', 'unknown processor')}). Set the weights of these losses to 0 and "
                "distil logits, or use a model of a family that data/families/table.py lists"
            )


def check_visual_rows(cache: TeacherCache, visual_rows: str, terms: Mapping[str, LossTerm], *, where: str) -> None:
    """Refuse maps of a causal teacher for a student whose visual tokens see more than what precedes them.

    Means over their rows are another matter: they can be compared, though the two sides mean different things by
    them, which is said in the log.

    Args:
        visual_rows: ``causal``, ``image`` or ``prefix``: what a visual token of the student sees.
    """
    sees = {"causal": "what precedes them", "image": "the whole image", "prefix": "the whole prompt"}
    causal = [name for name, term in terms.items() if term.visual_rows == "causal"]
    if causal and visual_rows != "causal":
        of_text = [name for name, term in TERMS.items() if term.attends and term.visual_rows is None]
        raise CacheMismatchError(
            f"{where}: its visual tokens see {sees[visual_rows]}, those of the teacher only what precedes them: "
            f"{' and '.join(causal)} cannot be compared. Set the weight to 0 and use {' or '.join(of_text)}, "
            "whose rows see the whole image on both sides"
        )
    family = FAMILIES.get(str(cache.plan.teacher.get("family")))
    teachers = "causal" if family is None else family.visual_rows
    alike = [name for name, term in terms.items() if term.visual_rows == "alike"]
    if alike and visual_rows != teachers:
        _log.warning(
            "%s: visual tokens of %s see %s, those of the teacher of %s %s; a part of the difference "
            "between the two is no matter of where they look",
            ", ".join(alike), where, sees[visual_rows], cache.place, sees[teachers],
        )  # fmt: skip


def check_labels_fit(cache: TeacherCache, rows: int, tokenizer: Any, *, where: str) -> None:
    """Refuse a student with fewer output rows than its tokenizer has words.

    Rows may be more (padding to a round number), and the teacher's may be more than the student's.
    """
    if tokenizer.vocab_size > rows:
        raise CacheMismatchError(
            f"{where}: the student has {rows} output rows, the tokenizer {tokenizer.vocab_size} words, so answers in "
            f"{cache.place} may hold tokens that the student cannot say. Give a student directory whose weights "
            "and tokenizer belong together"
        )
    told = cache.plan.teacher.get("vocabulary")
    if same_tokenizer(cache, tokenizer) and isinstance(told, int) and told > 2 * rows + MOST_PADDING:
        raise CacheMismatchError(
            f"{cache.place}: its teacher is said to have a vocabulary of {told}, {where} with the same tokenizer has {rows} "
            "output rows; the plan is damaged: copy the cache again from where it came from, or build it again"
        )


def probe_inputs(model: Any, dataset: CachedDataset | UnitedDataset, *, where: str, most: int = 2) -> None:
    """Make the student's arguments of one small batch: what its family cannot take is refused before training."""
    try:
        model_inputs_of(model, dataset.batch(range(min(most, len(dataset)))).inputs)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from error


def shows_too_much(error: SampleError) -> bool:
    """Whether a sample has more pictures, or visual tokens, than the student reads: its file is as sound as before."""
    return any(option in str(error) for option in ("pictures_beyond", "visual_token_budget"))


def probe_samples(dataset: CachedDataset | UnitedDataset) -> None:
    """Load a few samples spread over the data: labels and pictures must be the ones the teacher saw."""
    step = max(1, len(dataset) // PROBED_SAMPLES)
    for position in range(0, len(dataset), step):
        try:
            dataset.load(position)
        except SampleError as error:
            if "max_length" in str(error):
                raise CacheMismatchError(
                    f"sample {dataset.sample_ids[position]!r} is in the cache but too long for this run: {error}. The "
                    "teacher read it with a larger max_length: leave max_length unset, or raise it"
                ) from error
            if "system prompt" in str(error):
                raise CacheMismatchError(
                    f"{error}. The teacher's template wrote it and the student's cannot: choose one that can (--set "
                    "template=...), or a student with the teacher's tokenizer, which takes the cache's template"
                ) from error
            if shows_too_much(error) or "prompt template" in str(error):
                raise CacheMismatchError(str(error)) from error
            raise CacheMismatchError(
                f"sample {dataset.sample_ids[position]!r} was readable when the cache was built and is not now: "
                f"{error}. Restore the file, check --images, or build the cache again"
            ) from error
