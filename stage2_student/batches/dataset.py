"""A data set joined with a teacher cache by sample_id: what `train()` reads, one micro-batch at a time.

The cache gives the order (its shards) and the signals; the data set gives images and text, encoded for this
student. Two checks guard the join on every sample: the labels must be the ones the teacher saw (unless the
student has other tokens and learns from pictures alone), and so must the picture. Everything here runs on loading
threads.

Dims: A supervised rows.
"""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.attention.sinks import SinkMap
from vlm_distill_cache.common.attention.tiles import Tile, tiles_of, views_of
from vlm_distill_cache.common.cache.plan import LONG_SAMPLES, Plan, built_with
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import Record, base_fields
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import (
    CacheFormatError,
    CacheMismatchError,
    DistillError,
    SampleError,
    TooLongError,
)
from vlm_distill_cache.common.pixels import HASH_BYTES
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.data.sample import Dataset, Picked, Sample, with_answers
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch, TrainingSample, arrays_of
from vlm_distill_cache.stage2_student.batches.frames import (
    hashes_of,
    media_of,
    on_teachers_pictures,
    pair_media,
    shared_pictures,
    times_of,
)
from vlm_distill_cache.stage2_student.batches.layers import match_groups
from vlm_distill_cache.stage2_student.batches.signals import LossTerm, collate_samples, decode_signals
from vlm_distill_cache.stage2_student.batches.sinks import NO_SINKS

_log = logging.getLogger(__name__)

MOST_PADDING = 65_536  # rows that a vocabulary may have beyond twice a student's of the same tokenizer, amply
AROUND_TURN = 256  # tokens that a template may write around the texts of a turn, amply


@dataclass(frozen=True, kw_only=True)
class Join:
    """The samples that a data set and a cache share, in the cache's order.

    Attributes:
        sample_ids: n ids; the data set's own, asked for one by one.
        places: Of each in the data set, int64 ``[n]``.
        shards: Positions in ``places`` of each shard's samples, int64 ``[n_i]``.
    """

    sample_ids: Sequence[str]
    places: NDArray[np.int64]
    shards: list[NDArray[np.int64]]


def join_cache(cache: TeacherCache, dataset: Dataset, *, limit: int | None = None) -> Join:
    """Find the cache's samples in a data set; of a merged cache, those that come from this data set."""
    ids = dataset.sample_ids
    places = cache.places_in(ids)
    merged = bool(merged_fingerprints(cache))
    if not merged:
        places = places[:limit]
    ends = np.cumsum([shard.samples for shard in cache.manifest.shards])
    if (places < 0).any():
        kept = np.flatnonzero(places >= 0)[:limit]
        if not (merged and len(kept)):
            absent = np.flatnonzero(places < 0)
            raise CacheMismatchError(
                f"{len(absent)} of the {len(places)} samples in {cache.place} are not in the data set {dataset.name} "
                f"({len(dataset)} samples); the first is {cache.sample_ids[int(absent[0])]!r}. Give the data that the "
                f"cache was built from (--data, --images), or build a cache for these ({built_with(cache.plan)} --data ...)"
            )
        _log.info("%d of the %d samples of %s are of this data set", len(kept), len(cache), cache.place)
        places, ends = places[kept], np.searchsorted(kept, ends)
    places = places[:limit]
    ends = np.minimum(ends, len(places)).tolist()
    numbers = np.arange(len(places), dtype=np.int64)
    return Join(
        sample_ids=Picked(ids, places),
        places=places,
        shards=[numbers[a:b] for a, b in zip([0, *ends], ends, strict=False)],
    )


def choose(join: Join, positions: Iterable[int]) -> Join:
    """The samples at some positions alone."""
    kept = np.zeros(len(join.sample_ids), dtype=bool)
    kept[np.fromiter(positions, dtype=np.int64)] = True
    renumbered = np.cumsum(kept) - 1
    return Join(
        sample_ids=Picked(join.sample_ids, np.flatnonzero(kept)),
        places=join.places[kept],
        shards=[renumbered[shard[kept[shard]]] for shard in join.shards],
    )


def missing_samples(cache: TeacherCache, sample_ids: Sequence[str]) -> tuple[int, str]:
    """Return how many of a cache's samples a data set lacks, and the first one's id; empty if there is none."""
    absent = np.flatnonzero(cache.places_in(sample_ids) < 0)
    return len(absent), cache.sample_ids[int(absent[0])] if len(absent) else ""


def merged_fingerprints(cache: TeacherCache) -> tuple[str, ...]:
    """Fingerprints of the data sets that a merged cache was made from; empty for any other cache."""
    parts = cache.plan.data.get("parts")
    if not isinstance(parts, list):
        return ()
    return tuple(str(part.get("fingerprint")) for part in parts if isinstance(part, dict))


def splits_and_limits(cache: TeacherCache) -> list[tuple[str, int | None]]:
    """Of which split of its data a cache was built, and of how many samples (None: all); of a merged one of each part."""
    parts = cache.plan.data.get("parts")
    described = [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    described.sort(key=lambda part: -int(part.get("samples") or 0))
    pairs = [
        (str(data.get("split") or "train"), int(data.get("limit") or 0) or None)
        for data in described or [cache.plan.data]
    ]
    return list(dict.fromkeys(pairs))


LiveTeacher = Callable[[Sequence[Sample]], Sequence[Record]]
"""From samples to what a teacher says of each: base fields of a record, and each signal in tensors under its own name."""


class SampleMemory:
    """Samples kept in memory, up to a size; for data sets that fit, read more than once."""

    def __init__(self, limit: int) -> None:
        """Start empty; what comes when `limit` bytes are used up is made again each time."""
        self._left = limit
        self._kept: dict[tuple[object, ...], Any] = {}

    def fetch(self, key: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What is kept under a key, or what ``make`` makes; if two threads both make it, no harm is done."""
        kept = self._kept.get(key)
        if kept is not None:
            return kept
        made = make()
        size = sum(array.nbytes for array in arrays_of(made))
        if size <= self._left:
            self._left -= size
            self._kept[key] = made
        return made


class CachedDataset:
    """Samples of a data set that a cache holds, in the cache's order.

    Attributes:
        shards: Positions in ``sample_ids`` of each shard, int64 ``[n_i]``.
        failed: How many samples stage one left out, with a reason each in the cache.
        left_out: Reasons by id of those that have more tokens than the student has positions.
        entries_read: Cached logit entries decoded so far.
        entries_beyond: Those of them whose token has no row in the student; they count as tail.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: SampleEncoder,
        cache: TeacherCache,
        *,
        terms: Mapping[str, LossTerm],
        pad_token_id: int,
        limit: int | None = None,
        join: Join | None = None,
        memory: SampleMemory | None = None,
        shuffle_teacher_images: bool = False,
        match: GroupMatch | None = None,
        compare_labels: bool = True,
        vocabulary: int | None = None,
        sinks: Mapping[str, SinkMap] = NO_SINKS,
    ) -> None:
        """Join; no sample is read yet.

        Args:
            terms: Losses by name, whose signals are read; none for supervised fine-tuning, which then reads no record.
            limit: Take the first samples only, in the cache's order; None: all.
            join: Which samples are taken, if that is known already.
            memory: Keeps encoded and decoded samples; joins of the same data and cache may share one.
            shuffle_teacher_images: Attention signals come from another sample (control experiment).
            vocabulary: Output rows of the student; cached token ids beyond them are counted. None: not counted.
            sinks: Of the cache's teacher, where losses ask for them (`batches.sinks.sinks_for`).
        """
        self._dataset, self._encoder, self._cache = dataset, encoder, cache
        self._terms, self._match = dict(terms), match
        read = dict.fromkeys(signal for term in terms.values() for signal in term.reads)
        self._codecs = {name: codec_from_dict(cache.plan.signals[name]) for name in read}
        wanted = [
            *base_fields(cache.plan.format_version),
            *(entry for name in read for entry in cache.plan.fields[name]),
        ]
        self._fields = frozenset(entry.name for entry in wanted)
        self._pad_token_id = pad_token_id
        self._memory = SampleMemory(0) if memory is None else memory
        self._shuffle_teacher_images = shuffle_teacher_images
        self._compare_labels, self._vocabulary, self._sinks = compare_labels, vocabulary, sinks
        self.entries_read = self.entries_beyond = 0
        self._compared: set[int] = set()
        self._counting = threading.Lock()
        self.failed = len(cache.failed)
        join = join or join_cache(cache, dataset, limit=limit)
        self.sample_ids, self.shards, self._places = join.sample_ids, join.shards, join.places
        long = self._beyond_positions()
        self.left_out = {self.sample_ids[position]: reason for position, reason in long.items()}
        if long:
            _log.warning(
                "%d of %d samples of %s are longer than the student's positions and are not trained on; the first: %s",
                len(long), len(self.sample_ids), cache.place, next(iter(long.values())),
            )  # fmt: skip
            join = choose(join, (position for position in range(len(self.sample_ids)) if position not in long))
            self.sample_ids, self.shards, self._places = join.sample_ids, join.shards, join.places
            if not self.sample_ids:
                raise CacheMismatchError(
                    f"all samples of {cache.place} are longer than the {encoder.positions} positions that the student knows "
                    "(max_position_embeddings in its config.json); choose a student that knows more, or build a cache of "
                    "shorter conversations"
                )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_counting"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _counting=threading.Lock())

    def repeats(self, seed: int) -> NDArray[np.int64] | None:
        """How often each sample is seen in an epoch, int64 by position, as a mixture's weights say; None: once."""
        weighting = self._dataset.weighting()
        return None if weighting is None else weighting.of(self._places).repeats(seed)

    def has_pictures(self) -> bool:
        """Whether any sample has a picture; reads records only of shards that do not say."""
        told = [self._cache.manifest.shards[shard] for shard, places in enumerate(self.shards) if len(places)]
        return any(shard.pictures == shard.samples for shard in told) or self.first_picture() is not None

    def first_picture(self) -> int | None:
        """The place of the first sample with a picture; None: there is none."""
        for shard, places in enumerate(self.shards):
            if self._cache.manifest.shards[shard].pictures != 0:
                for place in places.tolist():
                    if self._cache.read(self.sample_ids[place], ("image_hash",))["image_hash"].any():
                        return int(place)
        return None

    def student_groups(self, depth: int) -> Groups:
        """The layers of a student that meet the groups of its batches; ``depth``: how many layers it has."""
        return (self._match or match_groups(self._cache.plan, depth)).student

    def load(self, position: int) -> TrainingSample:
        """Encode and decode one sample."""
        sample_id = self.sample_ids[position]
        encoded = self._encoded(position)
        targets: dict[str, Any] = {}
        if self._terms:
            key = (sample_id, *self._terms, self._match, self._shuffle_teacher_images, *self._sinks)
            targets = self._memory.fetch(key, lambda: self._decode(position, encoded))
        elif position not in self._compared:
            # Without a teacher's signals too: a baseline on other pictures would be compared as if on the same.
            record = self._cache.read(sample_id, self._fields)
            where = f"sample {sample_id!r} of {self._cache.place}"
            self._check(record, encoded, where)
            self._compared.add(position)
        return TrainingSample(encoded, targets)

    def live(self, positions: Sequence[int], teacher: LiveTeacher) -> list[TrainingSample]:
        """Encode samples, the teacher's side being what a live teacher says of them now; reads no signal of the cache."""
        if (plan := getattr(teacher, "plan", None)) is not None:
            _refuse_other_teacher(plan, self._cache, self._codecs)
        made = []
        said: Any = teacher([self.sample(place) for place in positions])
        records = list(said) if isinstance(said, Iterable) else []
        if len(records) != len(positions):
            raise CacheMismatchError(
                f"the live teacher gave {len(records)} records ({type(said).__name__}); expected a list of "
                f"{len(positions)}, one for each sample"
            )
        for position, record in zip(positions, records, strict=True):
            encoded, where = self._encoded(position), f"the live teacher on sample {self.sample_ids[position]!r}"
            base = ("labels", "tiles", "image_hash")
            if not isinstance(record, Mapping) or not record.keys() >= {*base}:
                gives = (
                    ", ".join(map(str, record)) or "nothing" if isinstance(record, Mapping) else type(record).__name__
                )
                raise CacheMismatchError(
                    f"{where}: it gave {gives}; expected a dict of {', '.join(base)} and the signals"
                )
            if lacking := [signal for signal in self._codecs if signal not in record]:
                raise CacheMismatchError(
                    f"{where}: it says nothing of {', '.join(lacking)}, which the losses read; it gives "
                    f"{', '.join(record)}. Make it with the options of the cache (BuildConfig.signals), or set these "
                    "losses to 0"
                )
            try:
                made.append(TrainingSample(encoded, self._compare(dict(record), encoded, where=where, live=True)))
            except DistillError:
                raise
            except Exception as error:  # what anybody's function returns
                raise CacheMismatchError(
                    f"{where}: {type(error).__name__}: {brief(str(error))}; expected {', '.join(base)} as in a cache's record, "
                    f"and {', '.join(self._codecs)} of the types and shapes that `LiveTeacher` gives"
                ) from error
        return made

    def _encoded(self, position: int) -> EncodedSample:
        key = (self.sample_ids[position], "encoded")
        found: EncodedSample = self._memory.fetch(key, lambda: self._encode(self.sample(position)))
        return found

    def _encode(self, sample: Sample) -> EncodedSample:
        """The student's sequence, cut where the teacher's was, if both have the same tokens."""
        return encode_as_cached(self._encoder, self._cache, sample) if self._compare_labels else self._encoder(sample)

    def _beyond_positions(self) -> dict[int, str]:
        """Which samples have more tokens than the student has positions, and the reason of each.

        Only those are encoded whose texts could be so long: no token is shorter than a byte.
        """
        limit = self._encoder.positions
        longest = int(self._cache.plan.extra.get("max_length", 0))  # of the teacher's, whose tokens these may be
        visual, sampling = self._encoder.image_encoder.token_count, self._encoder.sampling
        frames = sampling.most - 1 if sampling is not None else 0  # of a video beyond one
        # Such a sequence has the greatest length, and may have more visual tokens here.
        if longest and was_cut(self._cache):
            geometry = self._cache.plan.geometry
            longest += max(0, visual - math.prod(geometry.get("grid") or [0]) + bool(geometry.get("drops_first")))
        if limit is None or (self._compare_labels and 0 < longest <= limit):
            return {}
        found: dict[int, str] = {}
        for position in range(len(self.sample_ids)):
            try:
                sample = self.sample(position)
                texts = sum(
                    len(f"{turn.question}{turn.answer}".encode(errors="replace")) + AROUND_TURN for turn in sample.turns
                )
                texts += len(sample.system.encode(errors="replace"))
                if texts + AROUND_TURN + (len(sample.images) + len(sample.videos) * frames) * visual > limit:
                    self._encode(sample)
            except TooLongError as error:
                found[position] = str(error)
            except SampleError:
                continue  # it is told where the sample is loaded
        return found

    def sample(self, position: int) -> Sample:
        """The sample as the teacher saw it: with the answers it wrote itself, if the cache holds such."""
        return answered_sample(self._cache, self._dataset[int(self._places[position])])

    def _decode(self, position: int, encoded: EncodedSample) -> dict[str, Any]:
        sample_id = self.sample_ids[position]
        record = self._cache.read(sample_id, self._fields)
        where = f"sample {sample_id!r} of {self._cache.place}"
        if self._vocabulary is not None:
            refuse_strange_tokens(record, self._vocabulary, where=where)
        if self._vocabulary is not None and "token_ids" in record:
            beyond = int((np.asarray(record["token_ids"]) >= self._vocabulary).sum())
            with self._counting:
                self.entries_read += len(record["token_ids"])
                self.entries_beyond += beyond
        foreign = self._foreign_record(position, record) if self._shuffle_teacher_images else None
        return self._compare(record, encoded, where=where, foreign=foreign)

    def _compare(
        self, record: Record, encoded: EncodedSample, *, where: str, foreign: Record | None = None, live: bool = False
    ) -> dict[str, Any]:
        """The teacher's side of each term, after a look at whether record and student mean the same words and picture."""
        tiles = self._check(record, encoded, where)
        for term in self._terms.values():
            term.check_record(record, encoded, where=where)
        return decode_signals(
            record, self._codecs, self._terms, tiles,
            where=where, foreign=foreign, match=self._match, live=live, sinks=self._sinks,
        )  # fmt: skip

    def _check(self, record: Record, encoded: EncodedSample, where: str) -> tuple[Tile, ...]:
        """`check_join` with what the student may leave out."""

        def names() -> list[str]:
            return [medium.name for medium in self.sample(self.sample_ids.index(encoded.sample_id)).images]

        fewer = self._encoder.pictures_beyond == "drop"
        return check_join(record, encoded, where=where, compare_labels=self._compare_labels, fewer=fewer, names=names)

    def _foreign_record(self, position: int, record: Record) -> Record:
        """The record of the next sample, far away in the order, whose views and visual tokens are laid out the same."""
        for step in range(1, len(self)):
            other_id = self.sample_ids[(position + len(self) // 2 + step) % len(self)]
            other = self._cache.read(other_id, self._fields)
            if len(other["labels"]) and _shown(other) == _shown(record):
                return other
        return record

    def batch(self, positions: Iterable[int]) -> TrainingBatch:
        """Load and collate a micro-batch; ``positions`` are places in ``sample_ids``."""
        return self.collate([self.load(int(position)) for position in positions])

    def collate(self, samples: Sequence[TrainingSample]) -> TrainingBatch:
        """Join samples to a micro-batch."""
        return collate_samples(samples, self._terms, pad_token_id=self._pad_token_id)


def was_cut(cache: TeacherCache) -> bool:
    """Whether the teacher of a cache read only the beginning of samples that were too long."""
    return cache.plan.extra.get(LONG_SAMPLES) == "truncate"


def encode_as_cached(encoder: SampleEncoder, cache: TeacherCache, sample: Sample) -> EncodedSample:
    """Encode a sample for a student as far as the teacher of a cache, with the same tokens, read it.

    Raises:
        SampleError: As the encoder does.
    """
    if not was_cut(cache):
        return encoder(sample)
    return encoder(sample, rows=len(cache.read(sample.sample_id, ("labels",))["labels"]))


def answered_sample(cache: TeacherCache, sample: Sample) -> Sample:
    """A sample with the answers that the teacher of a cache wrote, if it wrote any.

    Raises:
        SampleError: If their number is another than the sample's turns'.
    """
    stored = cache.plan.signals.get("answers")
    if stored is None:
        return sample
    codec = AnswersCodec.from_dict(stored)
    record = cache.read(sample.sample_id, frozenset(entry.name for entry in codec.fields()))
    return with_answers(sample, codec.decode(record))


def _refuse_other_teacher(plan: Plan, cache: TeacherCache, signals: Iterable[str]) -> None:
    """Refuse a live teacher whose signals are laid out in another way than a cache's, or that reads another prompt."""
    sides = [{"template": of.template, "groups": of.teacher.get("groups")} for of in (plan, cache.plan)]
    for name in signals:
        for side, of in zip(sides, (plan, cache.plan), strict=True):
            stored = of.signals.get(name) or cache.plan.signals[name]  # one that is lacking is refused by its name
            side |= {f"{name}.{key}": stored.get(key) for key in ("grid", "layers", "width", "temperatures")}
    now, then = sides
    for name, found in now.items():
        if found != then[name]:
            raise CacheMismatchError(
                f"the live teacher has {name} {found}, that of {cache.place} {then[name]}; make it with the options that the "
                "cache was built with (BuildConfig)"
            )


def check_join(
    record: Record,
    encoded: EncodedSample,
    *,
    where: str,
    compare_labels: bool = True,
    fewer: bool = False,
    names: Callable[[], Sequence[str]] | None = None,
) -> tuple[Tile, ...]:
    """Refuse a record that was made from other words or other pictures.

    Pictures are compared one by one. Of a video that the two sides read at other times, frames of the same second are; where
    they share none, nothing tells whether it changed.

    Args:
        compare_labels: Whether both have the same tokens; the pictures are compared in any case.
        fewer: As of `pair_media`.
        names: What gives the names of the sample's pictures and videos, for errors.

    Returns:
        The student's tiles on the teacher's pictures.

    Raises:
        CacheMismatchError: What differs, and where.
        CacheFormatError: If what the record says of its pictures cannot be.
    """
    if "tile_pictures" in record:
        tiles_of(record)
    labels = encoded.labels[encoded.supervised_rows]
    cached = np.asarray(record["labels"]).astype(np.int64)
    if compare_labels and not np.array_equal(labels, cached):
        raise CacheMismatchError(
            f"{where}: the cached labels are {_short(cached, labels)}, the data now gives {_short(labels, cached)}: text, "
            "template or tokenizer changed since the cache was built. Train with the data of the cache, or build the cache "
            "again"
        )
    then, now = hashes_of(record), encoded.image_hashes
    if max(len(then), len(now)) <= 1 and (not fewer or len(then) == len(now)):
        _compare_pictures((then or (bytes(HASH_BYTES),))[0], encoded.image_hash, "the picture", where)
    theirs, ours = media_of(len(then), times_of(record)), media_of(len(now), encoded.frame_times)
    pairs = pair_media(theirs, ours, where=where, fewer=fewer)
    for number, teachers, students in shared_pictures(pairs):
        of = f"frame {teachers - theirs[number - 1].first + 1} of video" if theirs[number - 1].times else "picture"
        if then[teachers] != now[students]:
            name = f" ({names()[number - 1]})" if names else ""
            _compare_pictures(then[teachers], now[students], f"{of} {number} of {len(theirs)}{name}", where)
    return on_teachers_pictures(tuple(encoded.tiles), pairs, pictures=len(now))


def _compare_pictures(then: bytes, now: bytes, which: str, where: str) -> None:
    if now != then:
        raise CacheMismatchError(
            f"{where}: {which}'s hash was {then.hex()} when the teacher saw it and is {now.hex()} now: the image "
            "file changed, or another one has its name. Restore it, or build the cache again"
        )


def _shown(record: Record) -> tuple[int, list[tuple[float, float]], list[bool]]:
    """How many tiles a record's views have, and which pictures they show: the layout that a foreign record must have."""
    views = views_of(tiles_of(record))
    return len(record["tiles"]), [view.span for view in views], [view.is_frame for view in views]


def refuse_strange_tokens(record: Record, rows: int, *, where: str) -> None:
    """Refuse token ids of no vocabulary that a student with so many output rows could share.

    The plan says how large the teacher's is, and may lie or be silent; padding makes two of one tokenizer differ.
    """
    for name in ("token_ids", "visual_token_ids"):
        largest = int(record[name].max(initial=0)) if name in record else 0
        if largest >= 2 * rows + MOST_PADDING:
            raise CacheFormatError(
                f"{where}: {name} has {largest}, a student of the same tokenizer has {rows} output rows; no teacher says "
                "so, the cache is damaged: copy it again from where it came from, or build it again"
            )


def _short(labels: np.ndarray, others: np.ndarray) -> str:
    """Labels from two before the first that others have not."""
    both = min(len(labels), len(others))
    differ = np.flatnonzero(labels[:both] != others[:both])
    first = int(differ[0]) if len(differ) else both
    start = max(0, first - 2)
    shown = ", ".join(str(value) for value in labels[start : start + 8])
    around = f"{'..., ' if start else ''}{shown}{', ...' if len(labels) > start + 8 else ''}"
    return f"[{around}] ({len(labels)} tokens, the first other one at position {first})"
