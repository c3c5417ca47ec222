"""A data set joined with a teacher cache by sample_id: what `train()` reads, one micro-batch at a time.

The cache gives the order (its shards) and the signals; the data set gives images and text, encoded for this
student. Two checks guard the join on every sample: the labels must be the ones the teacher saw, and so must
the picture. Everything here runs on loading threads.

Dims: B batch, T sequence, A supervised rows, R most rows of a sample, M most visual tokens, C common cells.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from common.cache import TeacherCache
from common.codecs import codec_from_dict
from common.codecs.logits import SparseLogits
from common.errors import CacheMismatchError
from common.schema import BASE_FIELDS, IGNORE_INDEX, Record
from data.collate import Batch, collate, supervised_rows, visual_keys
from data.encoding import EncodedSample, SampleEncoder
from data.sample import Dataset
from stage2_student.sampler import Indices
from stage2_student.signals import SampleSignals, decode_signals

_log = logging.getLogger(__name__)
AnyDataclass = TypeVar("AnyDataclass")


@dataclass(frozen=True)
class AttentionBatch:
    """One attention signal of a batch, padded to the most cells; samples with an image only, in batch order.

    Attributes:
        teacher: float32; ``answer_attention`` ``[A', G, C]`` (rows of samples with an image),
            ``visual_columns`` ``[I, G, C]``, ``visual_map`` ``[I, G, C, C]``.
        image_mass: float32 ``[A', G]`` of ``answer_attention``; else None.
        student_pool: float32 ``[I, M, C]``.
        content: bool ``[I, C]``, False where a cell carries no image; None if all do.
    """

    teacher: Tensor
    image_mass: Tensor | None
    student_pool: Tensor
    content: Tensor | None


@dataclass(frozen=True)
class TrainingBatch:
    """A micro-batch: what the student reads and what the teacher said of it.

    Attributes:
        inputs: Tokens, masks and pixels.
        labels: Targets of the supervised rows, batch order, int64 ``[A]``.
        logits: The teacher's logits of these rows; None if no loss reads them.
        attention: The teacher's attention by signal.
        rows: Positions of supervised rows, int64 ``[B, R]``, padding -1; on the CPU.
        keys: Positions of visual tokens, int64 ``[B, M]``, padding -1; on the CPU.
        has_image: Positions in the batch of samples with an image, int64 ``[I]``.
        row_count: A.
        image_row_count: A', supervised rows of samples with an image.
        image_count: I.
    """

    inputs: Batch
    labels: Tensor
    logits: SparseLogits | None
    attention: Mapping[str, AttentionBatch]
    rows: Tensor
    keys: Tensor
    has_image: Tensor
    row_count: int
    image_row_count: int
    image_count: int

    def to(self, device: torch.device) -> "TrainingBatch":
        """The batch on a device; positions stay on the CPU, where they are checked without waiting."""
        if device.type == "cpu":
            return self
        moved: TrainingBatch = _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))
        return replace(moved, rows=self.rows, keys=self.keys)

    def pinned(self) -> "TrainingBatch":
        """The batch in page-locked memory, from which copies to an accelerator need not wait."""
        pinned: TrainingBatch = _map_tensors(self, lambda tensor: tensor.pin_memory())
        return pinned


def _map_tensors(value: Any, function: Any) -> Any:
    """Apply a function to every tensor of nested dataclasses and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_tensors(item, function) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value,
            **{entry.name: _map_tensors(getattr(value, entry.name), function) for entry in fields(value)},
        )
    return value


@dataclass(frozen=True)
class TrainingSample:
    """One sample, encoded and decoded."""

    encoded: EncodedSample
    signals: SampleSignals

    @property
    def has_image(self) -> bool:
        """Whether the sample has visual tokens."""
        return self.encoded.pixel_values is not None


class CachedDataset:
    """Samples of a data set that a cache holds, in the cache's order.

    Attributes:
        sample_ids: The samples trained on, shard by shard.
        shards: Positions in ``sample_ids`` of each shard, int64 ``[n_i]``.
        failed: How many samples stage one left out, with a reason each in the cache.
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
        memory_bytes: int = 0,
        shuffle_teacher_images: bool = False,
    ) -> None:
        """Join; no sample is read yet.

        Args:
            dataset: Images and text.
            encoder: The student's.
            cache: The teacher's signals.
            signals: Which of them to read; none for supervised fine-tuning, which then reads no record.
            pad_token_id: Fills shorter sequences.
            limit: Use only the cache's first so many samples.
            memory_bytes: Keep encoded and decoded samples up to this size; one worker's or many threads'
                alike.
            shuffle_teacher_images: Attention signals come from another sample (control experiment).

        Raises:
            CacheMismatchError: If the data set lacks samples that the cache holds.
        """
        self._dataset, self._encoder, self._cache = dataset, encoder, cache
        self._codecs = {name: codec_from_dict(cache.plan.signals[name]) for name in signals}
        wanted = [*BASE_FIELDS, *(entry for name in signals for entry in cache.plan.fields[name])]
        self._fields = frozenset(entry.name for entry in wanted)
        self._pad_token_id = pad_token_id
        self._memory: dict[int, TrainingSample] = {}
        self._memory_left = memory_bytes
        self._shuffle_teacher_images = shuffle_teacher_images
        self.failed = len(cache.failed)
        where = {sample_id: index for index, sample_id in enumerate(dataset.sample_ids)}
        self.sample_ids: list[str] = []
        self.shards: list[Indices] = []
        total = len(cache.sample_ids) if limit is None else min(limit, len(cache.sample_ids))
        for shard in cache.manifest.shards:
            first, last = len(self.sample_ids), min(len(self.sample_ids) + shard.samples, total)
            self.sample_ids += cache.sample_ids[first:last]
            self.shards.append(np.arange(first, last, dtype=np.int64))
        missing = [sample_id for sample_id in self.sample_ids if sample_id not in where]
        if missing:
            raise CacheMismatchError(
                f"{len(missing)} of the {len(self.sample_ids)} samples in {cache.path} are not in the data "
                "set "
                f"{dataset.name} ({len(dataset)} samples); the first is {missing[0]!r}. Train with the data "
                "the "
                "cache was built from, or build a cache for this data (teacher-cache build --data ...)"
            )
        self._index = [where[sample_id] for sample_id in self.sample_ids]
        if self.failed:
            _log.info("%d samples that stage one could not read are left out", self.failed)

    def __len__(self) -> int:
        return len(self.sample_ids)

    def load(self, position: int) -> TrainingSample:
        """Encode and decode one sample.

        Args:
            position: In ``sample_ids``.

        Raises:
            CacheMismatchError: If labels or picture are not the ones the teacher saw.
        """
        kept = self._memory.get(position)
        if kept is not None:
            return kept
        sample_id = self.sample_ids[position]
        encoded = self._encoder(self._dataset[self._index[position]])
        signals = SampleSignals(None, {})
        if self._codecs:
            record = self._cache.read(sample_id, self._fields)
            where = f"sample {sample_id!r} of {self._cache.path}"
            check_join(record, encoded, where=where)
            foreign = self._foreign_record(position, record) if self._shuffle_teacher_images else None
            signals = decode_signals(
                record,
                self._codecs,
                tuple(encoded.tiles),
                where=where,
                attention_record=foreign,
                attention_rows=len(record["labels"]) if foreign is not None else None,
            )
        sample = TrainingSample(encoded, signals)
        size = sum(array.nbytes for array in _arrays(sample))
        if size <= self._memory_left:  # approximate when several threads load, and that is enough
            self._memory_left -= size
            self._memory[position] = sample
        return sample

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


def check_join(record: Record, encoded: EncodedSample, *, where: str) -> None:
    """Refuse a record that was made from other words or another picture.

    Args:
        record: From the cache.
        encoded: The same sample as the student reads it.
        where: Sample and cache, for the error.

    Raises:
        CacheMismatchError: Naming the sample, both values and the remedy.
    """
    labels = encoded.labels[encoded.supervised_rows]
    cached = np.asarray(record["labels"]).astype(np.int64)
    if not np.array_equal(labels, cached):
        raise CacheMismatchError(
            f"{where}: the cached labels are {_short(cached)}, the data now gives {_short(labels)}: text, "
            "template or "
            "tokenizer changed since the cache was built. Train with the data of the cache, or build the "
            "cache again"
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


def _arrays(value: Any) -> Iterable[Tensor | np.ndarray]:
    """All tensors and arrays inside nested dataclasses and mappings."""
    if isinstance(value, Tensor | np.ndarray):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _arrays(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from _arrays(getattr(value, entry.name))


def collate_samples(samples: Sequence[TrainingSample], *, pad_token_id: int) -> TrainingBatch:
    """Pad samples to one batch and concatenate the teacher's rows in the same order.

    Args:
        samples: At least one; all with the same signals.
        pad_token_id: Fills shorter sequences.

    Returns:
        The micro-batch, on the CPU.
    """
    inputs = collate([sample.encoded for sample in samples], pad_token_id)
    counts = [len(sample.encoded.supervised_rows) for sample in samples]
    images = [position for position, sample in enumerate(samples) if sample.has_image]
    logits = [sample.signals.logits for sample in samples if sample.signals.logits is not None]
    attention: dict[str, AttentionBatch] = {}
    if images:
        for signal in samples[images[0]].signals.attention:
            targets = [samples[position].signals.attention[signal] for position in images]
            cells = max(target.content.shape[0] for target in targets)
            keys = max(target.student_pool.shape[0] for target in targets)
            rows = [_pad_cells(target.teacher, cells, both=signal == "visual_map") for target in targets]
            by_row = signal == "answer_attention"
            content = torch.stack([_pad_cells(target.content, cells, both=False) for target in targets])
            masses = [target.image_mass for target in targets if target.image_mass is not None]
            attention[signal] = AttentionBatch(
                teacher=torch.cat(rows) if by_row else torch.stack(rows),
                image_mass=torch.cat(masses) if masses else None,
                student_pool=torch.stack(
                    [
                        torch.nn.functional.pad(pool, (0, cells - pool.shape[1], 0, keys - pool.shape[0]))
                        for pool in (target.student_pool for target in targets)
                    ]
                ),
                content=None if bool(content.all()) else content,
            )
    return TrainingBatch(
        inputs=inputs,
        labels=inputs.labels[inputs.labels != IGNORE_INDEX],
        logits=SparseLogits.cat(logits) if logits else None,
        attention=attention,
        rows=supervised_rows(inputs),
        keys=visual_keys(inputs),
        has_image=torch.tensor(images, dtype=torch.int64),
        row_count=sum(counts),
        image_row_count=sum(counts[position] for position in images),
        image_count=len(images),
    )


def _pad_cells(tensor: Tensor, cells: int, *, both: bool) -> Tensor:
    """Append empty cells to the last axis, or to the last two."""
    missing = cells - tensor.shape[-1]
    if missing == 0:
        return tensor
    return torch.nn.functional.pad(tensor, (0, missing, 0, missing) if both else (0, missing))
