"""From a configuration to what the loop needs: student, encoder, each phase's data; all checked.

All bad news comes from here, before the first step of the first phase.
"""

import contextlib
import logging
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from vlm_distill_cache.common.attention.layers import GroupMatch
from vlm_distill_cache.common.cache.counts import picture_words, unknown_words
from vlm_distill_cache.common.cache.plan import FRAMES, described_parts
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import ConfigError, DataError, SampleError
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.files.rules import shown
from vlm_distill_cache.common.locations import is_url
from vlm_distill_cache.common.models.changed import changes_of
from vlm_distill_cache.common.remotes.mirror import find_mirror
from vlm_distill_cache.common.tools.fidelity_words import poor_fidelity
from vlm_distill_cache.common.tools.merge import refuse_different
from vlm_distill_cache.data.families.inputs import known_positions
from vlm_distill_cache.data.images.layouts.videos import stacks_videos
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.sources.mixture import Part, is_mixture, own_caches, read_mixture
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.pixel_cache import PixelCache
from vlm_distill_cache.data.text.templates import PromptTemplate, get_template
from vlm_distill_cache.stage2_student.batches.dataset import (
    CachedDataset,
    Join,
    SampleMemory,
    merged_fingerprints,
    splits_and_limits,
    was_cut,
)
from vlm_distill_cache.stage2_student.batches.gaze import GAZE, GazeTerm
from vlm_distill_cache.stage2_student.batches.layers import match_groups
from vlm_distill_cache.stage2_student.batches.sampler import ShardShuffle
from vlm_distill_cache.stage2_student.batches.share import take_samples
from vlm_distill_cache.stage2_student.batches.signals import LossTerm
from vlm_distill_cache.stage2_student.batches.sinks import needed_sinks, sinks_for
from vlm_distill_cache.stage2_student.batches.united import UnitedDataset
from vlm_distill_cache.stage2_student.config import PhaseConfig, PhaseName, TrainConfig, describe
from vlm_distill_cache.stage2_student.losses.fed_tokens import refuse_fewer_tokens
from vlm_distill_cache.stage2_student.losses.objective import Objective
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.students.encoder import describe_encoder, longest_sequence, pictures_taken
from vlm_distill_cache.stage2_student.students.model import StudentModel, vocabulary_rows
from vlm_distill_cache.stage2_student.students.parts import StudentParts, open_parts, teacher_tower
from vlm_distill_cache.stage2_student.students.presets import student_folder
from vlm_distill_cache.stage2_student.students.tower import check_tower_is_free, tower_parameters
from vlm_distill_cache.stage2_student.training.checks import (
    PROBED_SAMPLES,
    check_data,
    check_geometry,
    check_labels_fit,
    check_losses,
    check_pictures,
    check_template,
    check_tokenizer,
    check_vision_tower,
    check_visual_rows,
    probe_inputs,
    probe_samples,
    same_tokenizer,
    shows_too_much,
)
from vlm_distill_cache.stage2_student.training.resolve import open_caches
from vlm_distill_cache.stage2_student.training.token_choice import check_choice, choose_tokens

FEW_PICTURES = 0.5  # of a cache's samples: fewer are worth a line
BUILT_IN_DATA = ("shapes", "easy-vqa", "photo-scenes")
MOST_NAMED = 1_000_000  # drawn pictures: a list of their names takes a second and 100 MB
MOST_DRAWN = 20_000  # whatever a cache holds: their texts take 10 s
_BUILT_IN = re.compile(
    r"(?P<spec>easy-vqa|(?:shapes|photo-scenes)(?::images=(?P<images>[0-9]{1,18})(?:,seed=[0-9]{1,18}"
    r"(?:,(?:kinds|ground)=[a-z+]{1,40})?)?)?)(?:[\[/].*)?",
    re.ASCII,
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PreparedPhase:
    """One phase, ready to run.

    Attributes:
        tower: Names of the vision tower's parameters that are trained; none unless ``trainable`` is ``tower``.
        expect: Told which shards are read soon; None for a cache that is here.
    """

    name: PhaseName
    config: PhaseConfig
    steps: int
    dataset: CachedDataset | UnitedDataset
    shuffle: ShardShuffle
    objective: Objective
    tower: tuple[str, ...] = ()
    expect: Callable[[Iterable[int]], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run, ready to start.

    Attributes:
        fingerprint: What the run is: its configuration (without folders and speed settings) and its caches.
        cache_hashes: Manifest hash of each cache, by path.
        caches: These caches, by path.
        source: The student's own folder, whose processor files it keeps; None: it is made from its preset.
        pixels: What keeps the pictures of the phases' samples, once it is opened.
        gaze: The regression that expects the teacher's gaze, if that chooses visual tokens.
    """

    student: StudentModel
    tokenizer: Any
    image_processor: Any
    encoder: SampleEncoder
    encoder_description: Mapping[str, Any]
    phases: tuple[PreparedPhase, ...]
    fingerprint: str
    cache_hashes: Mapping[str, str]
    caches: Mapping[str, TeacherCache]
    pixels: PixelCache
    source: Path | None = None
    gaze: Mapping[str, Any] | None = None


def built_in_data(cache: TeacherCache) -> str | None:
    """The built-in data set that a cache names, as ``data.registry`` takes it; None: another one, or one far too large.

    Nothing else is opened, drawn or fetched because a cache says so: comparing its data draws every picture's text.
    """
    # The stored name also says split and limit: "shapes:images=1500,seed=0[:64]", "easy-vqa/train".
    found = _BUILT_IN.fullmatch(cache.plan.data.get("name") or "")
    if found is None:
        return None
    images = int(found["images"] or 0)
    drawn = sum(min(images, limit or images) for _, limit in splits_and_limits(cache))
    return found["spec"] if images <= MOST_NAMED and drawn <= max(2 * len(cache), MOST_DRAWN) else None


def open_cached_data(cache: TeacherCache, *, data: str | None, images: str | None) -> Dataset:
    """Open the data a cache was built from; `check_data` makes sure that it is that.

    Args:
        data: As in ``data.registry``; None: the built-in data set that the cache names.
    """
    spec = data or built_in_data(cache)
    if spec is None:
        raise ConfigError(
            f"no data given. {cache.place} was built from {shown(cache.plan.data.get('name'))}, which is no built-in data set, "
            "or one far larger than this cache; a cache does not say where its data lie: pass --data (and --images)"
        )
    folder = None if images is None else Path(images)
    commits = _commits_of(cache)
    if data is not None and is_mixture(data):
        return _open_mixture_for(cache, data, folder)
    *choices, (split, limit) = splits_and_limits(cache)
    for other_split, other_limit in choices:  # merged of parts of one data set, or of several
        with contextlib.suppress(DataError):  # a split of another of them
            dataset = open_dataset(spec, split=other_split, images=folder, limit=other_limit, commits=commits)
            if dataset.fingerprint() in merged_fingerprints(cache):
                return dataset
    return open_dataset(spec, split=split, images=folder, limit=limit, commits=commits)


def _commits_of(cache: TeacherCache) -> dict[str, str] | list[dict[str, str]]:
    """The commits of the hub's data sets that a cache was built from: they are read again, whatever came since.

    Of a mixture, those of each of its entries: two may be of one repository.
    """
    described = cache.plan.data
    if entries := described_parts(described.get("mixture")):
        return [_commit_of(entry) for entry in entries]
    found: dict[str, str] = {}
    for part in (described, *described_parts(described.get("parts"))):
        for entry in (part, *described_parts(part.get("mixture"))):
            found |= _commit_of(entry)
    return found


def _commit_of(described: Mapping[str, object]) -> dict[str, str]:
    held = {"repository", "revision"} <= described.keys()
    return {str(described["repository"]): str(described["revision"])} if held else {}


def _open_mixture_for(cache: TeacherCache, data: str, folder: Path | None) -> Dataset:
    """What of a mixture a cache was built from: all of it, or one of its entries where each has a cache."""
    entries = read_mixture(Path(data))
    if entries[0].cache is not None:
        for entry in entries:
            dataset = _open_entry(entry, cache, folder)
            if dataset.fingerprint() == cache.plan.fingerprints.get("data"):
                return dataset
    split, limit = splits_and_limits(cache)[-1]
    return open_dataset(data, split=split, images=folder, limit=limit, commits=_commits_of(cache))


def _open_entry(entry: Part, cache: TeacherCache, folder: Path | None) -> Dataset:
    split, limit = splits_and_limits(cache)[-1]
    return open_dataset(
        entry.data,
        split=entry.split or split,
        images=entry.images or folder,
        limit=entry.limit_within(limit),
        commits=_commits_of(cache),
    )


class _Part(NamedTuple):
    """Data with its cache: one of several in a mixture whose entries have caches of their own, or all of it."""

    place: str
    cache: TeacherCache
    dataset: Dataset
    weight: float = 1.0


def _open_parts(phase: PhaseConfig, caches: Mapping[str, TeacherCache]) -> list[_Part]:
    """The data of a phase with the caches that they are read from.

    Raises:
        CacheMismatchError: If the caches differ in teacher, template, geometry or signals, or are of other data.
    """
    place = str(phase.cache)
    places = own_caches(phase.data, place)
    if places is None:
        dataset = open_cached_data(caches[place], data=phase.data, images=phase.images)
        check_data(caches[place], dataset)
        return [_Part(place, caches[place], dataset)]
    parts = []
    for at, entry in zip(places, read_mixture(Path(str(phase.data))), strict=True):
        if at != place:
            refuse_different(caches[place], caches[at], "read together")
        dataset = _open_entry(entry, caches[at], None if phase.images is None else Path(phase.images))
        check_data(caches[at], dataset)
        parts.append(_Part(at, caches[at], dataset, entry.weight))
    return parts


def _expecting(parts: Sequence[_Part]) -> Callable[[Iterable[int]], None] | None:
    """What is told which shards are read soon, counted over all caches; None if all are here."""
    mirrors = [find_mirror(part.place) if is_url(part.place) else None for part in parts]
    if not any(mirrors):
        return None
    ends = list(accumulate(part.cache.plan.shard_count for part in parts))

    def expect(shards: Iterable[int]) -> None:
        of_place: list[list[int]] = [[] for _ in parts]
        for shard in shards:
            number = bisect_right(ends, shard)
            of_place[number].append(shard - (ends[number - 1] if number else 0))
        for mirror, found in zip(mirrors, of_place, strict=True):
            if mirror is not None:
                mirror.expect(found)

    return expect


def prepare(
    config: TrainConfig, caches: Mapping[str, TeacherCache] | None = None, *, parts: StudentParts | None = None
) -> Preparation:
    """Open data, find the student, refuse what does not fit, and only then load the student's weights.

    ``caches`` are as from `open_caches`, which is called where there are none; ``parts`` are a student's that the
    configuration does not name.

    Raises:
        CacheMismatchError: If a cache does not fit the data, the tokenizer or the student.
    """
    caches = caches or open_caches(config)
    source = None if parts else student_folder(config.student, config.student_weights)
    found = find_all(config, caches, parts=parts)
    encoder, parts, phases = found.encoder, found.parts, found.phases
    student = parts.load()
    tower = teacher_tower(student)
    if tower is not None:
        for cache in caches.values():
            check_vision_tower(cache, tower)
    hashes = {path: cache.manifest_hash for path, cache in caches.items()}
    gaze = choose_tokens(
        config,
        student,
        cache=caches[str(config.phase(config.phases[0]).cache)],
        encoder=parts.image_encoder,
        dataset=phases[0].dataset,
        where=f"student {config.student}",
    )
    return Preparation(
        student=student,
        tokenizer=parts.tokenizer,
        image_processor=parts.image_processor,
        encoder=encoder,
        encoder_description=describe_encoder(encoder),
        phases=tuple(_with_tower(phase, student) for phase in phases),
        fingerprint=fingerprint(describe(config, hashes)),
        cache_hashes=hashes,
        caches=caches,
        pixels=found.pixels,
        source=source,
        gaze=gaze,
    )


class Found(NamedTuple):
    """All of a run but its student's weights."""

    parts: StudentParts
    encoder: SampleEncoder
    phases: tuple[PreparedPhase, ...]
    pixels: PixelCache


def find_all(config: TrainConfig, caches: Mapping[str, TeacherCache], *, parts: StudentParts | None = None) -> Found:
    """Find student and data, and look at some samples; arguments and errors are those of `prepare`."""
    check_losses(config, caches)
    first = caches[str(config.phase(config.phases[0]).cache)]
    for cache in caches.values():
        cache.check_side_files()  # projector, vision tower and processor are read next
    parts = parts or open_parts(config, first)
    for step in ("do_rescale", "do_normalize"):
        if getattr(type(parts.image_processor), step, None) and not getattr(parts.image_processor, step):
            _log.warning(
                "%s: its image processor has %s false, which %s has true unless it is set: is preprocessor_config.json (or "
                "processor_config.json) that of the checkpoint?", parts.where, step, type(parts.image_processor).__name__,
            )  # fmt: skip
    for cache in caches.values():
        cache.check_shard_files()
        check_labels_fit(cache, vocabulary_rows(parts.model), parts.tokenizer, where=parts.where)
    check_choice(config, caches.values(), parts.model, parts.image_encoder, where=f"student {config.student}")
    encoder = encoder_for(config, parts, {str(config.phase(config.phases[0]).cache): first, **caches})
    pixels = PixelCache()
    phases = _prepare_phases(config, caches, replace(encoder, pixels=pixels), parts)
    return Found(parts, encoder, phases, pixels)


def encoder_for(config: TrainConfig, parts: StudentParts, caches: Mapping[str, TeacherCache]) -> SampleEncoder:
    """How a student reads samples whose teacher's words are in some caches; the first says the prompt template."""
    # What a cache could hold, its student can read.
    longest = max(longest_sequence(cache.plan) for cache in caches.values())
    return SampleEncoder(
        tokenizer=parts.tokenizer,
        image_encoder=parts.image_encoder,
        template=choose_template(config, parts, next(iter(caches.values()))),
        image_token_id=parts.image_token_id,
        max_length=config.max_length or longest,
        positions=known_positions(parts.model.config),
        **pictures_taken(
            parts.model.config,
            parts.image_encoder,
            next(iter(caches.values())).plan,
            fps=config.frames.fps,
            most=config.frames.most,
            most_pictures=config.most_pictures,
            pictures_beyond=config.pictures_beyond,
            visual_token_budget=config.visual_token_budget,
        ),
    )


def probe_planned(config: TrainConfig, dataset: Dataset, cache: TeacherCache, parts: StudentParts) -> None:
    """Refuse data of a cache that is not there yet by a few samples: too long for this run, or none that can be read.

    Raises:
        ConfigError: With the first sample's fault.
    """
    encoder = encoder_for(config, parts, {cache.place: cache})
    same, longest = same_tokenizer(cache, parts.tokenizer), longest_sequence(cache.plan)
    reads = _reading(encoder, encoder.template, cache, compares=same, limited=config.max_length is not None)
    places, faults = range(0, len(dataset), max(1, len(dataset) // PROBED_SAMPLES)), list[str]()
    for place in places:
        try:
            reads(dataset[place])
        except SampleError as error:
            if shows_too_much(error):
                raise ConfigError(str(error)) from error
            faults.append(str(error))
            with contextlib.suppress(SampleError):  # that the teacher cannot read it either is a recorded failure
                replace(reads, max_length=longest)(dataset[place])
                raise ConfigError(
                    f"{error}. The teacher reads up to max_length={longest}: leave max_length unset in stage two, or raise it"
                ) from error
    if len(faults) == len(places):
        raise ConfigError(
            f"data {dataset.name!r}: {parts.where} can read none of {len(places)} samples that were looked at: {faults[0]}"
        )


def cache_notes(config: TrainConfig, caches: Mapping[str, TeacherCache]) -> list[str]:
    """Say of each cache, by path, what of its samples is not learnt as somebody may believe.

    These are samples that stage one could not read, losses on pictures that few samples have, and words that the
    teacher's tokenizer lacks; and signals that lost much against the teacher's.
    """
    notes = []
    for place, cache in caches.items():
        totals = cache.manifest.totals
        pictures, unknown = totals.get("pictures"), totals.get("unknown_rows")
        if cache.failed:
            notes.append(f"{len(cache.failed)} samples that stage one could not read are left out ({cache.place})")
        phases = [config.phase(name) for name in config.phases if str(config.phase(name).cache) == place]
        looking = dict.fromkeys(
            loss for phase in phases for loss, term in choose_terms(phase.losses.distilled).items() if term.at_images
        )
        if looking and pictures is not None and pictures < FEW_PICTURES * totals["samples"]:
            said = f"only {picture_words(pictures, totals['samples'])}"
            notes.append(f"{said}: {', '.join(looking)} learn from these alone ({cache.place})")
        notes += [f"{sentence} ({cache.place})" for sentence in poor_fidelity(cache.plan, cache.manifest.fidelity)]
        if unknown:
            notes.append(f"{unknown_words(unknown, totals['rows'])} ({cache.place})")
    return notes


def choose_template(config: TrainConfig, parts: StudentParts, cache: TeacherCache) -> PromptTemplate:
    """The prompt a student reads a cache's samples in."""
    if config.template is not None:
        return get_template(config.template, parts.tokenizer)
    if same_tokenizer(cache, parts.tokenizer):
        return PromptTemplate.from_dict(cache.plan.template, origin=cache.place)
    if parts.template is None:
        raise ConfigError(
            f"{parts.where} has another tokenizer than {cache.place} and no prompt template of its own; name one "
            "(--set template=...)"
        )
    return parts.template


def check_phase(
    config: TrainConfig, name: PhaseName, cache: TeacherCache, parts: StudentParts
) -> tuple[dict[str, LossTerm], PromptTemplate, GroupMatch | None]:
    """Whether a student can learn a phase's losses from a cache, as far as their descriptions tell.

    Returns:
        The losses' terms, the student's prompt, and how layers meet; None: no loss compares layers.

    Raises:
        CacheMismatchError: If it cannot.
    """
    losses, where = config.phase(name).losses, f"phase {name}, {cache.place}"
    terms = choose_terms(losses.distilled)
    template = choose_template(config, parts, cache)
    check_tokenizer(cache, parts.tokenizer, terms, where=parts.where)
    check_template(cache, template, terms)
    check_geometry(cache, parts.image_encoder.to_dict(), terms, where=parts.where)
    check_visual_rows(cache, parts.visual_rows, terms, where=parts.where)
    if config.visual_tokens is not None or "visual_tokens" in changes_of(parts.model.config):
        refuse_fewer_tokens(terms, f"phase {name}")
    match = None
    if any(term.attends for term in terms.values()):
        match = match_groups(
            cache.plan, parts.depth, matching=losses.matching, layers=losses.attention_layers, where=where
        )
    for term in terms.values():
        term.check_cache(cache.plan.signals, losses, where, match)
    return terms, template, match


def _check_trained_tower(parts: StudentParts, dataset: CachedDataset | UnitedDataset, phase: str) -> None:
    """Raise a ConfigError if a phase trains a tower that must stay as it is, or no sample has a picture."""
    check_tower_is_free(parts.model, phase=phase, where=parts.where)
    if dataset.first_picture() is None:
        raise ConfigError(
            f"phase {phase}: trainable=tower, but no sample that is trained on has a picture: nothing would reach the tower; "
            f"set {phase}.trainable=all"
        )


def _with_tower(phase: PreparedPhase, student: StudentModel) -> PreparedPhase:
    """A phase with what of the vision tower it trains."""
    if not (phase.steps and phase.config.trainable == "tower"):
        return phase
    place = phase.dataset.first_picture()
    assert place is not None
    return replace(phase, tower=tower_parameters(student, phase.dataset.batch((place,)).inputs))


def _reading(
    encoder: SampleEncoder, template: PromptTemplate, cache: TeacherCache, *, compares: bool, limited: bool
) -> SampleEncoder:
    """A student's encoder for the samples of one cache.

    Args:
        compares: Whether it reads the teacher's own tokens, so that it is cut where the teacher was.
        limited: Whether the run itself says how long a sequence may be.
    """
    if not was_cut(cache):
        return replace(encoder, template=template)
    # The teacher's text to its limit, and the student's own number of visual tokens.
    more = encoder.image_encoder.token_count if compares and not limited else 0
    return replace(encoder, template=template, long_samples="truncate", max_length=encoder.max_length + more)


def _prepare_phases(
    config: TrainConfig, caches: Mapping[str, TeacherCache], encoder: SampleEncoder, parts: StudentParts
) -> tuple[PreparedPhase, ...]:
    opened: dict[tuple[object, ...], list[tuple[_Part, Join]]] = {}
    joined: dict[tuple[object, ...], CachedDataset | UnitedDataset] = {}
    memories: dict[tuple[object, ...], SampleMemory] = {}
    phases = []
    for name in config.phases:
        phase = config.phase(name)
        cache = caches[str(phase.cache)]
        losses, where = phase.losses, f"phase {name}, {cache.place}"
        terms, template, match = check_phase(config, name, cache, parts)
        source = (phase.cache, phase.data, phase.images)
        if source not in opened:
            parts_of_data = _open_parts(phase, caches)
            joins = take_samples(
                [(part.cache, part.dataset) for part in parts_of_data],
                limit=config.limit,
                share=config.data_share,
                seed=config.seed,
            )
            opened[source] = [(part, join) for part, join in zip(parts_of_data, joins, strict=True) if join is not None]
        shows_videos = any(FRAMES in part.cache.plan.extra for part, _ in opened[source])
        one_by_one = shows_videos and stacks_videos(encoder.image_encoder)
        # Phases of the same data share what is kept in memory; those with the same signals, their join.
        read = terms | ({GAZE: GazeTerm()} if config.follows_gaze else {})
        join = (*source, tuple(read), match, needed_sinks(losses))
        if join not in joined:
            compares = same_tokenizer(cache, parts.tokenizer) and template == PromptTemplate.from_dict(
                cache.plan.template
            )
            taken = opened[source]
            memory = round(config.memory_gib * 2**30 / len(taken))
            datasets = [
                CachedDataset(
                    part.dataset,
                    _reading(encoder, template, part.cache, compares=compares, limited=config.max_length is not None),
                    part.cache,
                    terms=read,
                    pad_token_id=encoder.tokenizer.pad_token_id or 0,
                    join=join_of_it,
                    memory=memories.setdefault((*source, part.place), SampleMemory(memory)),
                    shuffle_teacher_images=config.shuffle_teacher_images,
                    match=match,
                    compare_labels=compares,
                    vocabulary=vocabulary_rows(parts.model),
                    sinks=sinks_for(part.cache, losses, where=where),
                )
                for part, join_of_it in taken
            ]
            several = len(datasets) > 1
            joined[join] = UnitedDataset(datasets, [part.weight for part, _ in taken]) if several else datasets[0]
            probe_samples(joined[join])
            probe_inputs(parts.model, joined[join], where=parts.where, most=1 if one_by_one else 2)
        dataset = joined[join]
        if dataset.entries_beyond:
            _log.warning(
                "phase %s: %d of %d probed entries of the teacher's logits are tokens beyond the student's %d output "
                "rows; they count as tail, and their number is written beside the student",
                name,
                dataset.entries_beyond,
                dataset.entries_read,
                vocabulary_rows(parts.model),
            )
        if one_by_one and phase.micro_batch_size is None:
            _log.info(
                "phase %s: samples are passed one by one, as this model takes videos of one length in a pass", name
            )
            phase = replace(phase, micro_batch_size=1)
        fits = {name: term.fit(cache.plan, losses, parts, where) for name, term in terms.items()}
        shuffle = ShardShuffle(
            shards=dataset.shards, seed=config.seed, window=config.shuffle_window, repeats=dataset.repeats(config.seed)
        )
        steps = phase.step_count(shuffle.length)
        if steps and phase.trainable == "tower":
            _check_trained_tower(parts, dataset, name)
        if steps == 0:
            _log.info("phase %s has no steps and is left out", name)
        phases.append(
            PreparedPhase(
                name=name,
                config=phase,
                steps=steps,
                dataset=dataset,
                shuffle=shuffle,
                objective=Objective(losses=losses, groups=() if match is None else match.student, fits=fits),
                expect=_expecting([part for part, _ in opened[source]]),
            )
        )
    check_pictures(
        (phase.name, phase.config.losses, caches[str(phase.config.cache)], phase.dataset.has_pictures)
        for phase in phases
        if phase.steps
    )
    if not any(phase.steps for phase in phases):
        raise ConfigError(f"no phase of {', '.join(config.phases)} has a step; set steps or epochs")
    return tuple(phases)
