"""What runs beside the teacher: reading and tokenising ahead of it, encoding and writing behind it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import DataError, SampleError
from common.manifest import Plan
from common.schema import Record
from common.stores import finish_shard, open_writer
from data.collate import Batch, collate, length_buckets
from data.encoding import EncodedSample, SampleEncoder
from data.sample import Dataset
from stage1_teacher.signals import TeacherSignals, encode_records

SHARDS_AHEAD = 2
BATCHES_BEHIND = 4


@dataclass
class EncodedShard:
    """One shard's samples, ready for the teacher; failures with their reasons."""

    index: int
    samples: list[EncodedSample] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class FailureBudget:
    """How many unreadable samples a run tolerates.

    Attributes:
        total: Samples of the data set.
        share: Largest tolerated share.
    """

    total: int
    share: float
    failed: int = 0

    def spend(self, failures: Sequence[tuple[str, str]]) -> None:
        """Count failures.

        Raises:
            DataError: When the share is exceeded, with the latest reason.
        """
        self.failed += len(failures)
        if self.failed > self.share * self.total:
            sample_id, reason = failures[-1]
            raise DataError(
                f"{self.failed} of {self.total} samples cannot be read, more than the tolerated "
                f"{self.share:.1%}; the latest, {sample_id!r}: {reason}. Mend the data, or raise "
                "--set max_failed_share=0.1 to go on without them"
            )


def encode_shards(
    dataset: Dataset, encoder: SampleEncoder, plan: Plan, todo: Sequence[int]
) -> Iterator[EncodedShard]:
    """Encode shards in a background thread, a few ahead of the consumer."""

    def encode(index: int) -> EncodedShard:
        shard = EncodedShard(index=index)
        for position in plan.shard_range(index):
            try:
                shard.samples.append(encoder(dataset[position]))
            except SampleError as error:
                shard.failed.append((dataset.sample_ids[position], str(error)))
        return shard

    with ThreadPoolExecutor(1, thread_name_prefix="encode") as pool:
        pending: list[Future[EncodedShard]] = []
        try:
            for index in todo:
                pending.append(pool.submit(encode, index))
                if len(pending) > SHARDS_AHEAD:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def batches_of(samples: Sequence[EncodedSample], batch_size: int, pad_token_id: int) -> Iterator[Batch]:
    """Collate one shard's samples in length buckets; batches never cross a shard."""
    for bucket in length_buckets([len(sample) for sample in samples], batch_size):
        yield collate([samples[index] for index in bucket], pad_token_id)


class Writer:
    """Encodes and writes in a background thread; the main loop waits when it falls behind."""

    def __init__(self, cache_dir: Path, plan: Plan, codecs: Mapping[str, Any]) -> None:
        """Prepare to write shards of ``plan``.

        Args:
            cache_dir: The cache folder.
            plan: Its plan.
            codecs: Codec by signal.
        """
        self._cache_dir, self._plan, self._codecs = cache_dir, plan, codecs
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._pending: list[Future[None]] = []
        self._records: dict[str, Record] = {}

    def __enter__(self) -> "Writer":
        """Start."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Wait for everything that is pending; after an error, drop it."""
        try:
            if kind is None:
                self._wait(0)
        finally:
            self._pool.shutdown(cancel_futures=kind is not None)

    def add(self, batch: Batch, signals: TeacherSignals) -> None:
        """Queue one batch for encoding."""
        self._submit(self._encode, batch, signals)

    def finish(self, shard: EncodedShard) -> None:
        """Queue the writing of a shard, after its batches."""
        order = [sample.sample_id for sample in shard.samples]
        self._submit(self._write, shard.index, order, tuple(shard.failed))

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        self._wait(BATCHES_BEHIND)
        self._pending.append(self._pool.submit(function, *args))

    def _wait(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.pop(0).result()

    def _encode(self, batch: Batch, signals: TeacherSignals) -> None:
        records = encode_records(signals, batch, self._codecs)
        self._records |= dict(zip(batch.sample_ids, records, strict=True))

    def _write(self, index: int, order: list[str], failed: tuple[tuple[str, str], ...]) -> None:
        writer = open_writer(self._plan.store, self._cache_dir, index, self._plan.all_fields)
        try:
            for sample_id in order:
                writer.append(sample_id, self._records[sample_id])
            finish_shard(writer, failed)
        finally:
            writer.abort()
        self._records = {}
