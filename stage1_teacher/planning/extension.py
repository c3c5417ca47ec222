"""What a sealed cache is to become when it is topped up: the plan of one build with all of its options, and what is kept.

The new cache is the one that ``teacher-cache build`` would begin with these options, so that a build finds it complete.
Records are joined by sample id, so that new samples may stand anywhere in the data. A cache that was merged or pulled in
part stands for no whole data set: it keeps its samples and their order.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.documents import describe_differences
from vlm_distill_cache.common.cache.manifest import Manifest
from vlm_distill_cache.common.cache.plan import DESCRIPTIVE, FRAMES, LONG_SAMPLES, RANKS, THREADS, Plan, read_plan
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import base_fields
from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE, with_visual_source
from vlm_distill_cache.common.cache.sidecar import missing_shards, read_sidecar
from vlm_distill_cache.common.cache.versions import version_of
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.config import config_from_dict, config_to_dict
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, DistillError
from vlm_distill_cache.common.files.disk import is_mount_point
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.common.terminal.command_line import quoted
from vlm_distill_cache.common.tools.derived_card import DERIVED
from vlm_distill_cache.common.tools.lift import lift_plan
from vlm_distill_cache.common.tools.trust import open_trusted
from vlm_distill_cache.data.sample import Dataset, Survey
from vlm_distill_cache.data.sources.grouping import ChosenSamples
from vlm_distill_cache.data.sources.mixture import entry_of_cache
from vlm_distill_cache.stage1_teacher.config import SIGNALS, BuildConfig
from vlm_distill_cache.stage1_teacher.loop.kept import Kept
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS, Sizes
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.cache_folder import stored_plan
from vlm_distill_cache.stage1_teacher.planning.same_texts import refuse_other_texts, refuse_reordered

logger = logging.getLogger(__name__)

# What a codec says of an option; None: what no option gives.
_SHOWN: dict[str, Callable[[Any], Any]] = {
    "logits": lambda codec: codec.preset,
    "temperatures": lambda codec: codec.temperatures,
    "grid": lambda codec: codec.grid[0] if len(set(codec.grid)) == 1 else None,
    "frame_grid": lambda codec: (codec.frame_grid or (0,))[0] if codec.several else None,
    "attention_dtype": lambda codec: "f4" if getattr(codec, "exact", getattr(codec, "preset", "") == "f4") else "u1",
    "map_preset": lambda codec: None if codec.preset == "f4" else codec.preset,
    "map_grid": lambda codec: codec.grid,
    "hidden_layers": lambda codec: codec.layers,
    "hidden_dtype": lambda codec: "f4" if codec.exact else "f2",
    "groups": lambda codec: codec.groups,
}
_OF_WEIGHTS = ("teacher", "vision_tower")  # fingerprints that only weights tell
# As in the cache:
_AUTOMATIC = {"batch_size": 0, "threads": 0, "tensor_parallel": 0, "max_length": 0, "template": "auto", "dtype": "auto"}
_ANSWERS = AnswersCodec.signal  # an option, too
_ANSWER_OPTIONS = ("max_new_tokens", "answer_temperature", "answer_top_p", "answer_seed")
_BUILT_IN = re.compile(r"(?P<spec>easy-vqa|shapes(?::images=[0-9]{1,5}(?:,seed=[0-9]{1,9})?)?)(?:[\[/].*)?")


class NothingToAddError(DistillError):
    """A cache holds all that was asked for already."""


@dataclass(frozen=True, kw_only=True)
class ExtendConfig(BuildConfig):
    """Options of ``teacher-cache extend``; ``cache`` is the folder that the new cache is made in.

    Attributes:
        base: The cache that is topped up.
        given: The options that were given; of the others, those of the cache stay.
    """

    base: str
    given: tuple[str, ...] = ()

    def as_build(self, cache: Path) -> BuildConfig:
        """The options of a build of a cache as it will be."""
        values = {field.name: getattr(self, field.name) for field in fields(BuildConfig)}
        return BuildConfig(**values | {"cache": str(cache)})


def with_options_of(
    config: BuildConfig, base: Path, plan: Plan, manifest: Manifest, *, given: Collection[str]
) -> ExtendConfig:
    """The options that a cache was built with, under those that are given; its signals and the new ones.

    Raises:
        DistillError: If its plan says what no build has, or no option gives what is to stay.
    """
    given = {name for name in given if getattr(config, name, None) != _AUTOMATIC.get(name)}
    if "data" not in given:
        config = replace(config, data=_named_data(base, plan))
    teacher, data, generated = plan.teacher, plan.data, plan.signals.get(_ANSWERS)
    totals = manifest.totals
    there: dict[str, Any] = {
        "store": plan.store, "shard_size": plan.shard_size, "batch_size": plan.batch_size,
        "threads": plan.extra.get(THREADS), "tensor_parallel": plan.extra.get(RANKS), "max_length": plan.extra.get("max_length"),
        "frames": None if any(name.partition(".")[0] == FRAMES for name in given) else plan.extra.get(FRAMES),
        "long_samples": plan.extra.get(LONG_SAMPLES), "template": plan.template.get("name"),
        "dtype": teacher.get("dtype"), "quantisation": teacher.get("quantisation"),
        "device_map": teacher.get("device_map"), "layers": teacher.get("layer_choice"),
        "groups": len(teacher.get("groups") or ()) or None,
        "split": data.get("split") or None, "limit": None if DERIVED in plan.extra else _limit_of(config, base, plan, given),
        **stated(plan), _ANSWERS: None if generated is None else "generate",
        # What was tolerated is no part of a plan: as much as there is.
        "max_failed_share": max(config.max_failed_share, totals["failed"] / plan.sample_count),
        "max_unknown_share": max(config.max_unknown_share, totals.get("unknown_rows", 0) / max(1, totals["rows"])),
    }  # fmt: skip
    codecs = {name: codec_from_dict(plan.signals[name]) for name in SIGNALS if name in plan.signals}
    for name, codec in codecs.items():  # a new signal gets what others like it have
        there = _options_of(name, codec) | there
    if FRAMES not in plan.extra:  # nothing is pooled to this grid yet
        there.pop("frame_grid", None)
    if generated is not None:
        names = dict(zip(("max_new_tokens", "temperature", "top_p", "seed"), _ANSWER_OPTIONS, strict=True))
        there |= {option: generated.get(name) for name, option in names.items()}
    asked = config.signals if "signals" in given else ()
    there = {name: value for name, value in there.items() if value is not None and name not in given}
    there["signals"] = tuple(dict.fromkeys([*(name for name in plan.signals if name in SIGNALS), *asked]))
    there |= {"base": str(base), "given": sorted(given)}
    options = config_from_dict(ExtendConfig, config_to_dict(config) | there, where=f"the plan of {base}")
    for name, codec in codecs.items():
        if _governs(name, given) and not _gives(options, name, codec, plan):
            _refuse_unnamed(options, name, codec, plan)
    return options


def _options_of(signal: str, codec: Codec) -> dict[str, Any]:
    """The options of a build that a signal's codec shows."""
    shown = {option: _SHOWN[option](codec) for option in EXTRACTORS[signal].options if option in _SHOWN}
    return {option: value for option, value in shown.items() if value is not None}


def _gives(options: BuildConfig, signal: str, codec: Any, plan: Plan) -> bool:
    """Whether a build with these options would have this codec."""
    grid = (options.grid, options.grid) if options.grid else getattr(codec, "grid", (1, 1))
    layers = tuple(layer % (plan.teacher["layers"] + 1) for layer in options.hidden_layers)
    sizes = Sizes(
        grid=grid,
        layers=layers,
        width=getattr(codec, "width", 1),
        several=getattr(codec, "several", False),
        videos=getattr(codec, "frame_grid", None) is not None,
    )
    return bool(EXTRACTORS[signal].codec(options, sizes) == codec)


def _refuse_unnamed(options: ExtendConfig, signal: str, codec: Codec, plan: Plan) -> None:
    """Refuse to replace a signal where settings that were not given would become others, unasked."""
    shown = _options_of(signal, codec)
    unnamed = not _gives(replace(options, **shown), signal, codec, plan)
    if others := [
        name
        for name in EXTRACTORS[signal].options
        if name in _SHOWN
        and name not in options.given
        and (shown[name] != getattr(options, name) if name in shown else unnamed)
    ]:
        governing = ", ".join(name for name in EXTRACTORS[signal].options if name in options.given)
        raise ConfigError(
            f"{options.base}: {governing} would make {signal} anew, and no value of {', '.join(others)} gives the settings that "
            f"it has for all of its signals ({one_line(codec.to_dict())}), which would become others, too: give "
            f"{', '.join(others)} as well to say what is wanted, or leave {governing} out; nothing was changed"
        )


def unnamed_signals(options: BuildConfig, plan: Plan) -> list[str]:
    """Signals of a cache that a build with these options would hold in another way."""
    codecs = {name: codec_from_dict(plan.signals[name]) for name in SIGNALS if name in plan.signals}
    return [name for name, codec in codecs.items() if not _gives(options, name, codec, plan)]


def stated(plan: Plan) -> dict[str, Any]:
    """The licences and the source that a plan states, by their options; empty where it states none."""
    places = {
        "license": plan.data.get("cache_license"), "data_license": plan.data.get("license"),
        "teacher_license": plan.teacher.get("license"), "source": plan.data.get("source"),
    }  # fmt: skip
    return {option: str(text or "") for option, text in places.items()}


def unrecorded(options: BuildConfig, plan: Plan) -> list[str]:
    """What is said of licences and the source that are not those that a cache states, where nothing is added to it."""
    return [
        f"{name}={getattr(options, name)!r} is not recorded, the cache states {repr(text) if text else 'none'}: give it "
        "again when samples or signals are added to a cache of one build, or build another cache"
        for name, text in stated(plan).items() if getattr(options, name) != text
    ]  # fmt: skip


def _named_data(base: Path, plan: Plan) -> str:
    """The built-in data set that a cache names; nothing else is opened because a cache says so."""
    found = _BUILT_IN.fullmatch(str(plan.data.get("name")))
    if found is None:
        raise ConfigError(
            f"{base}: no data given (--data), and a cache does not hold the place of its own, which it calls "
            f"{one_line(plan.data.get('name'))}: give --data, and --images if it had them"
        )
    return found["spec"]


def _limit_of(config: BuildConfig, base: Path, plan: Plan, given: Collection[str]) -> int | None:
    """The limit that a cache was built with, if it was no limit of its entry of a mixture, which may have grown."""
    limit = plan.data.get("limit")
    entry = entry_of_cache(config.data, str(base)) if limit and "limit" not in given else None
    if entry is None or entry.limit == limit:
        return limit if entry is None else 0
    if entry.limit is None:
        logger.warning(
            "%s was built with limit=%d, which stays; its entry of %s has no limit: --set limit=0 takes all of it",
            base, limit, config.data,
        )  # fmt: skip
        return limit
    logger.info(
        "%s was built with limit=%d, its entry of %s says %d, which is taken", base, limit, config.data, entry.limit
    )
    return 0


def refuse_place(base: Path) -> None:
    """Refuse a cache that no new version can take the place of, before the teacher runs.

    Args:
        base: Its folder, resolved.

    Raises:
        ConfigError: With the remedy.
    """
    if (of := version_of(base)) is not None and of.is_dir():
        raise ConfigError(
            f"{base}: is a version of {of}, kept or made when that was extended: extend {of}, or copy this folder to another "
            "name and extend the copy"
        )
    with contextlib.suppress(OSError):  # a working directory that is gone
        if Path.cwd().is_relative_to(base):
            raise ConfigError(
                f"{base}: this command was started inside of the cache, and would stand in its older version afterwards: cd out "
                f"of it first, then extend {quoted(base)}"
            )
    if is_mount_point(base):
        raise ConfigError(
            f"{base}: is a mount point, which no other folder can take the place of: copy the cache into a folder of a disk "
            f"(cp -r {quoted(base)} FOLDER) and extend the copy, or mount the folder above it"
        )


def extend_plan(work: Build, config: ExtendConfig) -> Build:
    """Turn what a build would do into what is missing of it.

    Args:
        work: Teacher, data and codecs as the options say, planned as a build.

    Returns:
        The same with the codecs of the records that stay, and these.

    Raises:
        CacheMismatchError: If records cannot stay: what differs, by name. Nothing is changed.
        NothingToAddError: If there is nothing to do.
    """
    cache = open_trusted(config.base)
    # Samples with several pictures, or videos, may come to a cache that had none.
    old = lift_plan(cache.plan, work.plan)
    missing = {
        name
        for name, codec in work.codecs.items()
        if name not in old.signals
        or (_governs(name, config.given) and codec.to_dict() != codec_from_dict(old.signals[name]).to_dict())
    }
    if _ANSWERS in missing or (_ANSWERS in old.signals.keys() - work.codecs.keys()):
        raise ConfigError(
            f"{config.base}: the answers of a cache stay as they are, data's or the teacher's: leave "
            f"{', '.join(name for name in (_ANSWERS, *_ANSWER_OPTIONS) if name in config.given)} out, or build another cache"
        )
    kept = old.signals.keys() - missing
    codecs = {
        name: codec if name in missing else codec_from_dict(old.signals[name]) for name, codec in work.codecs.items()
    }
    signals = {name: old.signals[name] if name in kept else codec.to_dict() for name, codec in codecs.items()}
    fields = {name: old.fields[name] if name in kept else codec.fields() for name, codec in codecs.items()}
    bare = {name: tuple(field for field in group if field != VISUAL_SOURCE) for name, group in fields.items()}
    shares = any(VISUAL_SOURCE in group for group in work.plan.fields.values())
    stays = (*base_fields(old.format_version), *(field for name in sorted(kept) for field in bare[name]))
    plan = replace(
        work.plan,
        signals=signals,
        fields=with_visual_source(bare) if shares else bare,
        fingerprints=work.plan.fingerprints | {"codec": fingerprint(signals)},
        teacher=_described(old.teacher, work.plan.teacher, stays=("name", "revision", "evaluation")),
        data=_described(old.data, work.plan.data),
    )
    if THREADS not in old.extra:  # built before plans recorded it
        plan = replace(plan, extra={name: value for name, value in plan.extra.items() if name != THREADS})
    dataset = work.dataset
    if DERIVED in old.extra:
        dataset = _samples_of(cache, dataset)
        data = {"data": old.fingerprints["data"]} if "data" in old.fingerprints else {}
        plan = replace(
            plan, sample_count=len(dataset), data=old.data, extra=old.extra, fingerprints=plan.fingerprints | data
        )
    if not work.teacher.loads:
        plan = as_far_as_known(plan, old)
    attention = {name for name, extractor in EXTRACTORS.items() if extractor.attention}
    _refuse_differences(config, old, plan, keeps_attention=bool(attention & kept))
    ids = set(dataset.sample_ids)
    _refuse_absent(cache, [sample_id for sample_id in cache if sample_id not in ids])
    _refuse_begun(Path(config.cache), plan)
    kept_records = Kept(cache=cache, missing=frozenset(missing), fields=stays)
    refuse_other_texts(replace(work, dataset=dataset), kept_records)
    if not missing and not cache.failed and len(dataset) == len(cache):
        refuse_reordered(work, cache)
        raise NothingToAddError(f"{config.base}: holds all of that already")
    return replace(work, dataset=dataset, codecs=codecs, plan=plan, kept=kept_records)


def _governs(signal: str, given: Collection[str]) -> bool:
    """Whether one of the given options is one of a signal's codec."""
    options = EXTRACTORS[signal].options if signal in EXTRACTORS else (_ANSWERS, *_ANSWER_OPTIONS)
    return any(name in given for name in options)


def _described(old: Mapping[str, Any], new: Mapping[str, Any], *, stays: Collection[str] = ()) -> dict[str, Any]:
    """A description with the licences that a cache states, unless others are given, and what stays in any case."""
    stated = {name: old[name] for name in DESCRIPTIVE if name in old}
    return {**stated, **new, **{name: old[name] for name in stays if name in old}}


def survey_of_kept(base: str, dataset: Dataset, whole: Survey) -> Survey:
    """What the samples show that a cache will hold: a merged or partly pulled one keeps its own, others get all of the data.

    Args:
        whole: Of the data.
    """
    cache = TeacherCache(Path(base))
    if DERIVED not in cache.plan.extra:
        return whole
    return replace(_samples_of(cache, dataset).survey(), fingerprint=whole.fingerprint)


def _samples_of(cache: TeacherCache, dataset: Dataset) -> Dataset:
    """The samples of a cache, in its order, out of the data."""
    places = {sample_id: position for position, sample_id in enumerate(dataset.sample_ids)}
    wanted = []
    for shard in range(cache.plan.shard_count):
        sidecar = read_sidecar(cache.path, shard)
        wanted += [*sidecar.sample_ids, *(sample_id for sample_id, _ in sidecar.failed)]
    _refuse_absent(cache, [sample_id for sample_id in wanted if sample_id not in places])
    return ChosenSamples(dataset, [places[sample_id] for sample_id in wanted], name=dataset.name)


def _refuse_absent(cache: TeacherCache, absent: list[str]) -> None:
    """Refuse data that lack samples of a cache."""
    if absent:
        derived = " (its sources can be extended one by one, and merged again)" if DERIVED in cache.plan.extra else ""
        raise CacheMismatchError(
            f"{cache.place}: {len(absent)} of its samples are not in the data, first {absent[0]!r}: give the data that it was "
            f"built from, which may have grown, and no smaller limit{derived}; nothing was changed"
        )


def _refuse_differences(config: ExtendConfig, old: Plan, new: Plan, *, keeps_attention: bool) -> None:
    """Refuse a teacher, template, geometry or setting that the records are not of, by name."""

    def meaning(plan: Plan) -> dict[str, Any]:
        described = plan.without_descriptions()
        free = {"evaluation"} if keeps_attention else {"evaluation", "groups", "layer_choice"}
        extra = {name: value for name, value in plan.extra.items() if name not in ("order", DERIVED)}
        return {
            **{
                name: described[name]
                for name in ("format_version", "store", "shard_size", "batch_size", "template", "geometry")
            },
            "fingerprints": {n: v for n, v in plan.fingerprints.items() if n not in ("data", "codec")},
            "teacher": {name: value for name, value in described["teacher"].items() if name not in free},
            "extra": extra,
        }

    if lines := describe_differences(meaning(old), meaning(new), there="the cache", here="this run"):
        raise CacheMismatchError(
            f"{config.base} cannot be extended so, its records are of other settings:\n" + "\n".join(lines) + "\n"
            "Give the teacher and the options that it was built with (those that are not given are the cache's), or build "
            "another cache; nothing was changed"
        )


def _refuse_begun(folder: Path, plan: Plan) -> None:
    """Refuse to go on with an extension that was begun with other options, and has shards."""
    begun = stored_plan(folder)
    if begun is None or len(missing_shards(folder, begun)) == begun.shard_count:
        return
    one, two = begun.without_descriptions(), plan.without_descriptions()
    if one != two:
        del one["fields"], two["fields"]  # which follow from the signals
        lines = describe_differences(one, two, there="that one", here="this run")
        raise CacheMismatchError(
            f"{folder}: an extension with other options was begun there:\n" + "\n".join(lines) + "\n"
            "Give those options again to finish it, or delete that folder to begin anew"
        )


def plan_of(base: Path) -> Plan:
    """The plan of a cache that can be extended.

    Raises:
        CacheMismatchError: If no teacher can say more.
    """
    plan = read_plan(base)
    if plan.teacher.get("served"):
        raise CacheMismatchError(
            f"{base}: made of a served teacher's log-probabilities, which hold no more, and there is no teacher to run: import "
            "its responses to more samples with `cachectl import-logprobs` into another folder, and join both with "
            "`cachectl merge`; or build a cache from the teacher's weights (teacher-cache build --teacher DIR)"
        )
    return plan


def as_far_as_known(plan: Plan, stored: Plan) -> Plan:
    """A plan that was made without the teacher's weights, with what only they would tell as a cache has it."""
    of_weights = {name: stored.fingerprints[name] for name in _OF_WEIGHTS if name in stored.fingerprints}
    extra = {name: value for name, value in plan.extra.items() if name != THREADS}
    threads = {THREADS: stored.extra[THREADS]} if THREADS in stored.extra else {}
    asked = plan.extra.get(THREADS)
    return replace(
        plan,
        fingerprints={**plan.fingerprints, **of_weights},
        batch_size=plan.batch_size if plan.batch_size > 1 else stored.batch_size,
        extra={**extra, **({THREADS: asked} if asked else threads)},
    )
