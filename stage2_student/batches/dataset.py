"""A data set joined with a teacher cache by sample_id: what `train()` reads, one micro-batch at a time.

The cache gives the order (its shards) and the signals; the data set gives images and text, encoded for this
student. Two checks guard the join on every sample: the labels must be the ones the teacher saw (unless the
student has other tokens and learns from pictures alone), and so must the picture. Everything here runs on loading
threads.

Dims: A supervised rows.
"""

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from vlm_distill_cache.common.attention.layers import GroupMatch, Groups
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.schema import BASE_FIELDS, Record
from vlm_distill_cache.common.codecs import AnswersCodec, codec_from_dict
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.data.sample import Dataset, Sample, with_answers
from vlm_distill_cache.data.text.collate import text_row_count
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder
from vlm_distill_cache.stage2_student.batches.batch import (
    AttentionBatch,
    TrainingBatch,
    TrainingSample,
    arrays_of,
    collate_samples,
)
from vlm_distill_cache.stage2_student.batches.layers import match_groups
from vlm_distill_cache.stage2_student.batches.signals import SampleSignals, decode_signals
from vlm_distill_cache.stage2_student.join import join_cache
from vlm_distill_cache.stage2_student.terms import cached_signals

__all__ = [
    "AttentionBatch",
    "CachedDataset",
    "SampleMemory",
    "TrainingBatch",
    "TrainingSample",
    "check_join",
    "collate_samples",
]


class SampleMemory:
    """Samples kept in memory, up to a size; for data sets that fit, read more than once."""

    def __init__(self, limit: int) -> None:
        """Start empty.

        Args:
            limit: Bytes; what comes when they are used up is made again each time.
        """
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
        sample_ids: The samples trained on, shard by shard.
        shards: Positions in ``sample_ids`` of each shard, int64 ``[n_i]``.
        failed: How many samples stage one left out, with a reason each in the cache.
        entries_read: Cached logit entries decoded so far.
        entries_beyond: Those of them whose token has no row in the student; they count as tail.
    """

    def __init__(
        self,
        dataset: Dataset,
        encoder: SampleEncoder,
        cache: TeacherCache,
        *,
        signals: Sequence[str],
        pad_token_id: int,
        limit: int | None = None,
        memory: SampleMemory | None = None,
        shuffle_teacher_images: bool = False,
        match: GroupMatch | None = None,
        compare_labels: bool = True,
        vocabulary: int | None = None,
    ) -> None:
        """Join; no sample is read yet.

        Args:
            dataset: Images and text.
            encoder: The student's.
            cache: The teacher's signals.
            signals: Which of them to read, or loss terms that read several (``all_attention``); none for supervised
                fine-tuning, which then reads no record.
            pad_token_id: Fills shorter sequences.
            limit: Use only the cache's first so many samples; of a merged cache, the first that are in the data.
            memory: Keeps encoded and decoded samples; joins of the same data and cache may share one.
            shuffle_teacher_images: Attention signals come from another sample (control experiment).
            match: How the cached layer groups become those that a student is aligned with; None: they stay.
            compare_labels: Whether the student's tokens must be the teacher's; not for signals of the picture alone.
            vocabulary: Output rows of the student; cached token ids beyond them are counted. None: not counted.

        Raises:
            CacheMismatchError: As `join.join_cache`, if the data set lacks samples that the cache holds.
        """
        self._dataset, self._encoder, self._cache = dataset, encoder, cache
        self._terms, self._match, read = tuple(signals), match, cached_signals(signals)
        self._codecs = {name: codec_from_dict(cache.plan.signals[name]) for name in read}
        wanted = [*BASE_FIELDS, *(entry for name in read for entry in cache.plan.fields[name])]
        self._fields = frozenset(entry.name for entry in wanted)
        self._pad_token_id = pad_token_id
        self._memory = SampleMemory(0) if memory is None else memory
        self._shuffle_teacher_images = shuffle_teacher_images
        self._compare_labels, self._vocabulary = compare_labels, vocabulary
        self.entries_read = self.entries_beyond = 0
        self._compared: set[int] = set()
        self._counting = threading.Lock()
        self.failed = len(cache.failed)
        join = join_cache(cache, dataset, limit=limit)
        self.sample_ids, self.shards, self._places = join.sample_ids, join.shards, join.places

    def __len__(self) -> int:
        return len(self.sample_ids)

    def student_groups(self, depth: int) -> Groups:
        """The layers of a student that meet the groups of its batches; ``depth``: how many layers it has."""
        return (self._match or match_groups(self._cache.plan, depth)).student

    def load(self, position: int) -> TrainingSample:
        """Encode and decode one sample.

        Args:
            position: In ``sample_ids``.

        Raises:
            CacheMismatchError: If labels or picture are not the ones the teacher saw.
        """
        sample_id = self.sample_ids[position]
        encoded: EncodedSample = self._memory.fetch(
            (sample_id, "encoded"), lambda: self._encoder(self.sample(position))
        )
        signals = SampleSignals(None, {})
        if self._codecs:
            key = (sample_id, *self._terms, self._match, self._shuffle_teacher_images)
            signals = self._memory.fetch(key, lambda: self._decode(position, encoded))
        elif position not in self._compared:
            # Without a teacher's signals too: a baseline on other pictures would be compared as if on the same.
            record = self._cache.read(sample_id, self._fields)
            where = f"sample {sample_id!r} of {self._cache.path}"
            check_join(record, encoded, where=where, compare_labels=self._compare_labels)
            self._compared.add(position)
        return TrainingSample(encoded, signals)

    def sample(self, position: int) -> Sample:
        """The sample as the teacher saw it: with the answers it wrote itself, if the cache holds such."""
        return answered_sample(self._cache, self._dataset[int(self._places[position])])

    def _decode(self, position: int, encoded: EncodedSample) -> SampleSignals:
        sample_id = self.sample_ids[position]
        record = self._cache.read(sample_id, self._fields)
        where = f"sample {sample_id!r} of {self._cache.path}"
        check_join(record, encoded, where=where, compare_labels=self._compare_labels)
        if self._vocabulary is not None and "token_ids" in record:
            beyond = int((np.asarray(record["token_ids"]) >= self._vocabulary).sum())
            with self._counting:
                self.entries_read += len(record["token_ids"])
                self.entries_beyond += beyond
        foreign = self._foreign_record(position, record) if self._shuffle_teacher_images else None
        return decode_signals(
            record,
            self._codecs,
            tuple(encoded.tiles),
            where=where,
            attention_record=foreign,
            attention_rows=len(record["labels"]) if foreign is not None else None,
            terms=self._terms,
            match=self._match,
        )

    def _foreign_record(self, position: int, record: Record) -> Record:
        """The record of the next sample, far away in the order, whose visual tokens are laid out the same."""
        for step in range(1, len(self)):
            other_id = self.sample_ids[(position + len(self) // 2 + step) % len(self)]
            other = self._cache.read(other_id, self._fields)
            if other["tiles"].shape == record["tiles"].shape and len(other["labels"]):
                return other
        return record

    def batch(self, positions: Iterable[int]) -> TrainingBatch:
        """Load and collate a micro-batch; ``positions`` are places in ``sample_ids``."""
        return collate_samples(
            [self.load(int(position)) for position in positions], pad_token_id=self._pad_token_id
        )


def answered_sample(cache: TeacherCache, sample: Sample) -> Sample:
    """A sample with the answers that the teacher of a cache wrote, if it wrote any.

    Args:
        cache: Holds the sample.
        sample: As the data set has it.

    Raises:
        CacheFormatError: If the cached answers cannot be read.
        SampleError: If their number is another than the sample's turns'.
    """
    stored = cache.plan.signals.get("answers")
    if stored is None:
        return sample
    codec = AnswersCodec.from_dict(stored)
    record = cache.read(sample.sample_id, frozenset(entry.name for entry in codec.fields()))
    return with_answers(sample, codec.decode(record))


def check_join(record: Record, encoded: EncodedSample, *, where: str, compare_labels: bool = True) -> None:
    """Refuse a record that was made from other words or another picture.

    Args:
        record: From the cache.
        encoded: The same sample as the student reads it.
        where: Sample and cache, for the error.
        compare_labels: Whether both have the same tokens; the picture is compared in any case.

    Raises:
        CacheMismatchError: Naming the sample, both values and the remedy.
    """
    labels = encoded.labels[encoded.supervised_rows]
    cached = np.asarray(record["labels"]).astype(np.int64)
    if compare_labels and not np.array_equal(labels, cached):
        raise CacheMismatchError(
            f"{where}: the cached labels are {_short(cached)}, the data now gives {_short(labels)}: text, "
            "template or "
            "tokenizer changed since the cache was built. Train with the data of the cache, or build the "
            "cache again"
        )
    if "text_attention" in record and len(record["text_attention"]) != text_row_count(encoded):
        raise CacheMismatchError(
            f"{where}: the cache holds attention of {len(record['text_attention'])} text rows, the data now has "
            f"{text_row_count(encoded)}: a question or the template changed since the cache was built. Train "
            "with the data of the cache, or build the cache again"
        )
    now, then = bytes(encoded.image_hash), np.asarray(record["image_hash"]).astype(np.uint8).tobytes()
    if now != then:
        raise CacheMismatchError(
            f"{where}: the picture's hash was {then.hex()} when the teacher saw it and is {now.hex()} now: "
            "the image "
            "file changed, or another one has its name. Restore it, or build the cache again"
        )


def _short(labels: np.ndarray) -> str:
    shown = ", ".join(str(value) for value in labels[:8])
    return f"[{shown}{', ...' if len(labels) > 8 else ''}] ({len(labels)} tokens)"
