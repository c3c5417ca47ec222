"""``teacher-cache advise``: what each way of keeping the teacher's signals costs and loses, before a cache is built.

The teacher runs once over a probe that is spread over the data. Of each of its passes every option set is made, compared
with the pass as a fidelity card does it, and kept on disk, so that memory holds one sample's dense logits and, while a
set is weighed, one shard of its records. The bytes are those of shards that the code of a build writes.
"""

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vlm_distill_cache.common.attention.layers import published_count
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import FRAMES, SHARDS, Plan, write_plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Field, Record
from vlm_distill_cache.common.cache.shared_images import ImageSharer, SharedImages
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualMapCodec
from vlm_distill_cache.common.errors import ConfigError, DataError, ModelError, SampleError
from vlm_distill_cache.common.files.disk import folder_bytes
from vlm_distill_cache.common.files.hashing import fingerprint
from vlm_distill_cache.common.terminal.command_line import tell
from vlm_distill_cache.common.terminal.progress import progress
from vlm_distill_cache.common.tools.derived_card import DERIVED
from vlm_distill_cache.common.tools.sinks import write_sinks
from vlm_distill_cache.data.sources.grouping import ChosenSamples
from vlm_distill_cache.data.text.collate import image_key
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.estimate.probe import probe_positions
from vlm_distill_cache.stage1_teacher.extract import open_shards
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS
from vlm_distill_cache.stage1_teacher.loop.forward import run_alone
from vlm_distill_cache.stage1_teacher.loop.signals import EXTRACTORS, encode_records, reduce_output, to_cpu
from vlm_distill_cache.stage1_teacher.loop.unknown_words import UnknownBudget, UnknownToken
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.planning.cache_folder import stored_plan
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.parts import fix_threads, refuse_ranks
from vlm_distill_cache.stage1_teacher.planning.plan import codecs_for, fields_of
from vlm_distill_cache.stage1_teacher.quality.card import write_card
from vlm_distill_cache.stage1_teacher.quality.fidelity import Seen, Totals, compare, first_sample
from vlm_distill_cache.stage1_teacher.teacher.export import export_parts

# Samples of a run of the probe: conversations about one picture stand side by side and share its signals.
NEIGHBOURS = 16
LOGITS = (*LOGIT_PRESETS, *(f"fixed:{k}" for k in (2, 4, 8, 16, 32, 64, 128, 255)))
MAPS = ("exact", "blocks", "compact", "exact8")
FILTERED_ONLY = ("blocks", "compact", "exact8")
"""Values of `map_preset` that do not serve every loss as the exact map does."""
NEAR = 1.01  # sizes of whole caches that count as one
FIRST, LONG_S = 3, 90.0  # samples that tell how long a probe takes, and seconds that are worth a word
_INDEX_ENTRY = 24  # bytes of a sample in a cache's index

Options = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class OptionSet:
    """One way of keeping some of the signals; the others are as the options of the command say.

    Attributes:
        part: Which signals: ``words`` (logits), ``attention`` or ``states``.
        options: Options of a build.
        token_bytes: On disk, of this part's signals, a supervised token.
        cache_bytes: Of the whole cache with it, projector, vision tower, sidecars and index included.
        error: Largest gradient error of the part's signals: relative L2 of the logits', the sine between cached and
            live gradient for attention, relative L2 of hidden states; None if there is nothing to compare.
        figures: As in the fidelity card.
        best: No other set of its part has both fewer bytes and a smaller error.
        given: It is what the options of the command say.
    """

    part: str
    options: dict[str, str]
    token_bytes: float
    cache_bytes: int
    error: float | None
    figures: dict[str, float]
    best: bool = False
    given: bool = False

    @property
    def name(self) -> str:
        """Its options, as they are given."""
        return name_of(self.options)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was measured, of a whole data set.

    Attributes:
        samples: Of the data set.
        probe: Samples that were measured.
        failed: Samples of the probe that could not be used, with the first reason.
        tokens: Supervised tokens of the data set.
        signal_bytes: On disk, what each signal adds to the cache that the options of the command describe.
        cache_bytes: Of that cache.
        side_bytes: Of these, what does not lie in shards: projector, vision tower, processor, index and lists.
        left_out: Option sets that cannot hold a sample of the probe, with the reason.
    """

    name: str
    store: str
    samples: int
    probe: int
    failed: int
    reason: str
    tokens: int
    signal_bytes: dict[str, int]
    cache_bytes: int
    side_bytes: int
    sets: tuple[OptionSet, ...]
    left_out: dict[str, str]

    def recommend(self, *, budget: float | None = None, bound: float | None = None) -> "Recommendation":
        """The smallest error within a budget in bytes; or the fewest bytes within a bound of the error, up to ``NEAR``.

        Sets of the map that serve one loss only are taken where nothing else fits; ``exact8`` never is. A part of which
        nothing was measured stays as the options of the command say.
        """

        def rank(one: Recommendation) -> tuple[float, ...]:
            error, size = one.error or 0.0, one.cache_bytes
            if one.fits:
                return (not one.every_loss, size, error) if bound is not None else (not one.every_loss, error, size)
            # The nearest to what was asked for: the budget counts more than the bound.
            return (max(size, budget), error) if budget is not None else (error, size)

        found = list(self._combinations(budget, bound))
        best = min([one for one in found if one.fits] or found, key=rank)
        if bound is None or not best.fits:
            return best
        # Of caches of about the same size, the better one.
        near = [one for one in found if one.fits and one.every_loss == best.every_loss]
        near = [one for one in near if one.cache_bytes <= NEAR * best.cache_bytes]
        return min(near, key=lambda one: (one.error or 0.0, one.cache_bytes))

    def _combinations(self, budget: float | None, bound: float | None) -> Iterator["Recommendation"]:
        """Each choice of one set a part."""
        parts = dict.fromkeys(found.part for found in self.sets)
        for chosen in product(*(self._choices(part) for part in parts)):
            options = {key: value for found in chosen for key, value in found.options.items()}
            if options.get("map_preset") == "exact8":
                continue
            size = self.cache_bytes + sum(found.cache_bytes - self.cache_bytes for found in chosen)
            error = max((found.error for found in chosen if found.error is not None), default=None)
            yield Recommendation(
                options=options,
                cache_bytes=size,
                error=error,
                fits=(budget is None or size <= budget) and (bound is None or (error is not None and error <= bound)),
                every_loss=options.get("map_preset") not in FILTERED_ONLY,
            )

    def _choices(self, part: str) -> list[OptionSet]:
        sets = [found for found in self.sets if found.part == part]
        if any(found.error is not None for found in sets):
            return [found for found in sets if found.error is not None]
        return [found for found in sets if found.given] or sets[:1]  # nothing tells what the smallest would lose


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """One choice.

    Attributes:
        error: None if nothing was measured; parts of the cache of which nothing was are left out.
        fits: It keeps to the budget and to the bound; else it is the nearest to them.
        every_loss: False: its visual maps serve the sink-filtered loss alone.
    """

    options: dict[str, str]
    cache_bytes: int
    error: float | None
    fits: bool
    every_loss: bool


def name_of(options: Options) -> str:
    """Options of a build as they are given."""
    return " ".join(f"{key}={value}" for key, value in options.items())


def option_sets(config: BuildConfig) -> Iterator[tuple[str, dict[str, str]]]:
    """What is compared for the signals of a configuration: its own options, the first of each part, and all others."""
    parts = {part_of(name) for name in config.signals}
    given: dict[str, list[dict[str, str]]] = {}
    if "words" in parts:
        given["words"] = [{LogitCodec.signal: name} for name in (config.logits, *LOGITS)]
    if VisualMapCodec.signal in config.signals:
        own: dict[str, str] = {"attention_dtype": config.attention_dtype, "map_preset": config.map_preset}
        others = [{"attention_dtype": "u1", "map_preset": preset} for preset in MAPS]
        given["attention"] = [own, *others, {"attention_dtype": "f4", "map_preset": "exact"}]
    elif "attention" in parts:
        given["attention"] = [{"attention_dtype": kind} for kind in (config.attention_dtype, "u1", "f4")]
    if "states" in parts:
        given["states"] = [{"hidden_dtype": kind} for kind in (config.hidden_dtype, "f2", "f4")]
    for part, sets in given.items():
        for place, options in enumerate(sets):
            if options not in sets[:place]:
                yield part, options


@dataclass
class Measured:
    """What is left of the probe: records of every option set on disk, and how they compare with the teacher.

    Attributes:
        folder: Where they lie.
        config: The options of the command.
        plan: Of a cache of the probe's samples.
        total: Samples of the whole data set.
        whole: Shards of a cache of all of it.
        own: The codecs of the options of the command.
        codecs: By the options of a set, those of its signals.
        totals: Figures by codec.
        unusable: Codecs that cannot hold a sample, with the reason.
        shards: Of the probe, ``(sample id, image key)`` of each record, and the failures.
        rows: Supervised rows of the probe.
        empty: Bytes of a shard without records, by its fields.
    """

    folder: Path
    config: BuildConfig
    plan: Plan
    total: int
    whole: int
    own: dict[str, Codec]
    visual_rows: str
    codecs: list[tuple[str, dict[str, str], dict[str, Codec]]] = field(default_factory=list)
    totals: dict[Codec, Totals] = field(default_factory=dict)
    unusable: dict[Codec, str] = field(default_factory=dict)
    shards: list[tuple[list[tuple[str, str | None]], list[tuple[str, str]]]] = field(default_factory=list)
    rows: int = 0
    empty: dict[tuple[Field, ...], int] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Ids of the samples that were measured."""
        return [name for order, _ in self.shards for name, _ in order]

    def keep(self, number: int, codec: Codec | None, record: Record) -> None:
        """Put a part of a record away; without a codec, the part that all records have."""
        np.savez(self._place(number, codec), allow_pickle=False, **record)

    def _place(self, number: int, codec: Codec | None) -> Path:
        place = self.folder / ("base" if codec is None else fingerprint(codec.to_dict()))
        place.mkdir(exist_ok=True)
        return place / f"{number}.npz"

    def _plan_of(self, codecs: Mapping[str, Codec]) -> Plan:
        settings = {name: codec.to_dict() for name, codec in codecs.items()}
        prints = {**self.plan.fingerprints, "codec": fingerprint(settings)}
        return replace(self.plan, signals=settings, fields=fields_of(codecs, self.visual_rows), fingerprints=prints)

    def _write_shards(self, target: Path, plan: Plan, codecs: Mapping[str, Codec]) -> int:
        """Write the probe's shards as a build does; returns their bytes."""
        number = 0
        for index, (order, failed) in enumerate(self.shards):
            writer = open_writer(plan.store, target, index, plan.all_fields)
            try:
                sharer = ImageSharer(SharedImages(plan.all_fields))
                for name, key in order:
                    record: Record = {}
                    for codec in (None, *codecs.values()):
                        with np.load(self._place(number, codec)) as kept:
                            record |= {field: kept[field] for field in kept.files}
                    writer.append(name, sharer.share(record, key))
                    number += 1
                finish_shard(writer, failed)
            finally:
                writer.abort()
        return folder_bytes(target / SHARDS)

    def weigh(self, codecs: Mapping[str, Codec]) -> float:
        """Bytes of all shards of the whole data set, predicted from those of the probe and from a shard without records."""
        plan = self._plan_of(codecs)
        with TemporaryDirectory(dir=self.folder) as scratch:
            filled = self._write_shards(Path(scratch), plan, codecs)
        if plan.all_fields not in self.empty:
            with TemporaryDirectory(dir=self.folder) as scratch:
                finish_shard(open_writer(plan.store, Path(scratch), 0, plan.all_fields))
                self.empty[plan.all_fields] = folder_bytes(Path(scratch) / SHARDS)
        empty = self.empty[plan.all_fields]
        samples = sum(len(order) + len(failed) for order, failed in self.shards)
        return (filled - len(self.shards) * empty) * self.total / samples + self.whole * empty

    def write_cache(self, target: Path, options: Options) -> None:
        """Write a sealed cache of the probe with some options in place of those of the command."""
        codecs = self._codecs_of(options)
        how = {"kind": "probe", "of_samples": self.total, "selection": {"samples": len(self.names)}}
        plan = self._plan_of(codecs)
        plan = replace(plan, extra={**plan.extra, DERIVED: how})
        write_plan(target, plan)
        shutil.copytree(self.folder / "parts", target, dirs_exist_ok=True)
        self._write_shards(target, plan, codecs)
        figures = self.figures(codecs)
        write_card(target, plan, figures, sinks=write_sinks(target))
        seal(target, fidelity=figures, rewritten=True)

    def _codecs_of(self, options: Options) -> dict[str, Codec]:
        codecs = dict(self.own)
        for _, given, found in self.codecs:
            if given.items() <= options.items():
                codecs |= found
        return codecs

    def is_taken(self, place: Path, options: Options) -> bool:
        """Whether a place holds a cache that a build with some options would not go on with."""
        there = stored_plan(place)
        wanted = replace(self._plan_of(self._codecs_of(options)), sample_count=self.total)
        return there is not None and any(
            getattr(there, name) != getattr(wanted, name)
            for name in ("store", "sample_count", "shard_size", "signals", "fingerprints")
        )

    def figures(self, codecs: Mapping[str, Codec]) -> dict[str, Any]:
        """What the fidelity card would say of some codecs."""
        found: dict[str, Any] = {"samples": len(self.names)}
        for totals in (self.totals[codec] for codec in codecs.values() if codec in self.totals):
            found |= {**totals.means(), **totals.sink_figures()}
        return found

    def side_bytes(self) -> int:
        """Bytes of all that lies beside the shards of a cache of the whole data set."""
        with TemporaryDirectory(dir=self.folder) as scratch:
            cache = Path(scratch)
            self.write_cache(cache, {})
            beside = folder_bytes(cache) - folder_bytes(cache / SHARDS)
        listed = sum(len(order) + len(failed) for order, failed in self.shards)
        return beside + _INDEX_ENTRY * (self.total - listed)


def measure_options(config: BuildConfig, folder: Path, *, samples: int) -> Measured:
    """Run the teacher once over a probe, and keep and compare every option set of each sample.

    Args:
        config: The options a build would get.
        folder: An empty folder for what is put away, as large as some caches of the probe.
        samples: Size of the probe; no more than the data set has.

    Raises:
        DataError: If no sample of the probe can be used.
        DistillError: With the remedy, if teacher or data cannot be used.
    """
    refuse_ranks(config, "advise")
    work = open_build(fix_threads(config, several=False, overwrite=True))
    positions = probe_positions(len(work.dataset), samples, max(1, samples // NEIGHBOURS))
    plan = replace(work.plan, sample_count=len(positions))
    dataset = ChosenSamples(work.dataset, positions, name=work.dataset.name)
    total, whole = work.plan.sample_count, work.plan.shard_count
    if ANSWERS not in work.codecs:  # as a build does, which would stop there
        words = UnknownToken.of(work.encoder)
        UnknownBudget(words=words, total=total, share=config.max_unknown_share).probe(work.dataset, work.encoder)
    work = replace(work, dataset=dataset, plan=plan)
    own = dict(work.codecs)
    measured = Measured(
        folder=folder, config=config, plan=plan, total=total, whole=whole, own=own,
        visual_rows=work.teacher.family.visual_rows,
    )  # fmt: skip
    grouped = replace(config, groups=config.groups or published_count(work.teacher.depth))
    for part, options in option_sets(config):
        found = codecs_for(
            replace(grouped, **options),  # type: ignore[arg-type]
            work.teacher,
            several=work.plan.format_version != ONE_PICTURE,
            videos=FRAMES in work.plan.extra,
        )
        touched = {name: codec for name, codec in found.items() if name in EXTRACTORS and part_of(name) == part}
        measured.codecs.append((part, options, touched))
    reason, began = "", time.monotonic()
    with progress("probe", total=len(positions), unit="sample") as bar:
        for shard in open_shards(work, plan, range(plan.shard_count), batch_size=plan.batch_size):
            order: list[tuple[str, str | None]] = []
            unread: list[tuple[EncodedSample, ModelError]] = []
            done = len(measured.names)
            for sample in list(shard.samples):
                try:
                    answers = shard.answers.get(sample.sample_id)
                    _measure_sample(work, measured, sample, done + len(order), answers)
                    work.teacher.has_read = True
                except ModelError as error:
                    unread.append((sample, error))
                except SampleError as error:
                    shard.fail(sample.sample_id, f"teacher: {error}")
                else:
                    order.append((sample.sample_id, image_key(sample)))
                    measured.rows += len(sample.supervised_rows)
                    if done + len(order) == FIRST:
                        _tell_time(time.monotonic() - began, len(positions), len(measured.codecs))
                bar.update(1)
            for sample, fault in unread:
                if not work.teacher.has_read:
                    raise fault
                shard.fail(sample.sample_id, f"teacher: {fault}")
            bar.update(len(shard.failed))
            reason = reason or (shard.failed[0][1] if shard.failed else "")
            measured.shards.append((order, list(shard.failed)))
    if not measured.names:
        raise DataError(f"no sample of the probe can be used; the first one: {reason}")
    (folder / "parts").mkdir()
    export_parts(work.teacher, folder / "parts")
    return measured


def _tell_time(took: float, samples: int, sets: int) -> None:
    """Say how long the rest of a probe takes if it goes on as with its first samples, where that is long."""
    if (left := took / FIRST * (samples - FIRST)) > LONG_S:
        tell(
            f"The probe takes about {left / 60:.0f} minutes more, most of it to compare {sets} option sets; with fewer --samples "
            "or --signals it takes less"
        )


def part_of(signal: str) -> str:
    """The part of the options that a signal belongs to."""
    if EXTRACTORS[signal].attention or signal == TowerAttentionCodec.signal:
        return "attention"
    return "words" if signal.endswith(LogitCodec.signal) else "states"


def _measure_sample(
    work: Build, measured: Measured, sample: EncodedSample, number: int, answers: Sequence[str] | None
) -> None:
    batch, output, _ = run_alone(work, sample)
    version = work.plan.format_version
    base = encode_records({}, batch, {}, version=version)[0]
    measured.keep(number, None, base)
    if answers is not None:
        measured.keep(number, work.codecs[ANSWERS], work.codecs[ANSWERS].encode(tuple(answers)))
    # Reduced again outside of the teacher's pass: the comparison asks for gradients.
    first = first_sample(output, to_cpu(reduce_output(output, batch, measured.own)), len(sample.supervised_rows))
    seen: set[Codec] = set()
    for _, _, codecs in measured.codecs:
        for name, codec in codecs.items():
            if codec in seen or codec in measured.unusable:
                continue
            seen.add(codec)
            signals = to_cpu(reduce_output({k: v for k, v in output.items() if k == name}, batch, {name: codec}))
            try:
                EXTRACTORS[name].check(signals[name])
                record = encode_records(signals, batch, {name: codec}, version=version)[0]
            except SampleError as error:
                measured.unusable[codec] = str(error)
                continue
            own = {k: v for k, v in record.items() if k not in base}
            measured.keep(number, codec, own)
            totals = measured.totals.setdefault(codec, Totals())
            compare(codec, Seen(record, sample.tiles, first, first, totals))


def advise(measured: Measured) -> Advice:
    """Weigh every option set of a probe, and say which are best."""
    own = measured.own
    beside, shards = measured.side_bytes(), measured.weigh(own)
    tokens = measured.rows * measured.total / sum(len(order) + len(failed) for order, failed in measured.shards)
    without = {name: measured.weigh({k: v for k, v in own.items() if k != name}) for name in own}
    bare: dict[str, float] = {}
    sets: list[OptionSet] = []
    left_out: dict[str, str] = {}
    for part, options, codecs in measured.codecs:
        if faults := [measured.unusable[codec] for codec in codecs.values() if codec in measured.unusable]:
            left_out[name_of(options)] = faults[0]
            continue
        if part not in bare:
            bare[part] = measured.weigh({k: v for k, v in own.items() if k not in codecs})
        size = shards if codecs.items() <= own.items() else measured.weigh({**own, **codecs})
        figures = {
            name: value
            for codec in codecs.values() if codec in measured.totals
            for name, value in measured.totals[codec].means().items() if not name.startswith("control_")
        }  # fmt: skip
        sets.append(
            OptionSet(
                part=part,
                options=options,
                token_bytes=(size - bare[part]) / max(tokens, 1),
                cache_bytes=round(size + beside),
                error=largest_error(figures),
                figures=figures,
                given=all(getattr(measured.config, name) == value for name, value in options.items()),
            )
        )
    failed = [entry for _, entries in measured.shards for entry in entries]
    plan = measured.plan
    return Advice(
        name=f"{plan.teacher.get('name')} on {plan.data.get('name')}",
        store=plan.store,
        samples=measured.total,
        probe=len(measured.names),
        failed=len(failed),
        reason=failed[0][1] if failed else "",
        tokens=round(tokens),
        signal_bytes={name: round(shards - size) for name, size in without.items()},
        cache_bytes=round(shards + beside),
        side_bytes=beside,
        sets=tuple(mark_best(sets)),
        left_out=left_out,
    )


def largest_error(figures: Mapping[str, float]) -> float | None:
    """The gradient error that stands for several figures of a fidelity card; None if there are none."""
    errors = [value for name, value in figures.items() if name.endswith("_error")]
    cosines = [value for name, value in figures.items() if name.endswith("_gradient_cosine")]
    errors += [math.sqrt(max(0.0, 1 - value**2)) for value in cosines]
    return max(errors, default=None)


def mark_best(sets: Sequence[OptionSet]) -> list[OptionSet]:
    """Mark those of each part that no other set of it beats in one of bytes and error without losing in the other."""

    def beaten(one: OptionSet) -> bool:
        own = one.cache_bytes, one.error or 0.0
        others = [(other.cache_bytes, other.error or 0.0) for other in sets if other.part == one.part]
        return any(other != own and other[0] <= own[0] and other[1] <= own[1] for other in others)

    return [replace(one, best=not beaten(one)) for one in sets]


def parse_bytes(text: str) -> float:
    """Read a size: ``20GB``, ``1.5 TiB``, ``500000``.

    Raises:
        ConfigError: If it is none.
    """
    units = {f"{prefix}{kind}": base**power for base, kind in ((1000, "b"), (1024, "ib"))
             for power, prefix in enumerate(("k", "m", "g", "t", "p"), start=1)}  # fmt: skip
    lowered = text.strip().lower()
    number = lowered.rstrip("abcdefghijklmnopqrstuvwxyz").strip()
    unit = lowered[len(number) :].strip() or "b"
    try:
        size = float(number) * float(({"b": 1} | units)[unit])
    except (ValueError, KeyError):
        size = math.nan
    if not 0 < size < math.inf:
        raise ConfigError(f"budget: expected a size such as 20GB, 500MB or 1.5TiB, got {text!r}")
    return size
