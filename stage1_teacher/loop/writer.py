"""What runs beside the teacher: threads ahead of it, encoding and writing behind it."""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from vlm_distill_cache.common.cache.counts import kept_reason
from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.cache.shared_images import ImageSharer, SharedImages
from vlm_distill_cache.common.cache.sidecar import UnknownWords, read_sidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.errors import CacheMismatchError, DataError
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.printing import brief
from vlm_distill_cache.data.text.collate import Batch, image_key
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.kept import Kept
from vlm_distill_cache.stage1_teacher.loop.signals import TeacherSignals, encode_records

In = TypeVar("In")
Out = TypeVar("Out")

BATCHES_BEHIND = 4
SHOWN_FAILURES = 5


@dataclass
class EncodedShard:
    """One shard's samples, ready for the teacher; failures with their reasons; answers that the teacher wrote.

    Attributes:
        divided: Samples of each batch that memory did not suffice for, and that ran in parts.
    """

    index: int
    samples: list[EncodedSample] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    answers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    divided: list[int] = field(default_factory=list)

    def fail(self, sample_id: str, reason: str) -> None:
        """Record a failure; a reason may quote from the data whatever is there."""
        self.failed.append((sample_id, kept_reason(reason)))


@dataclass
class FailureBudget:
    """How many unreadable samples a cache tolerates.

    Attributes:
        served: The samples are compared with the responses of a served teacher.
        failed: Failures so far, those of finished shards included.
        first: The first of them, ``(sample_id, reason)``, for the error.
    """

    total: int
    share: float
    served: bool = False
    failed: int = 0
    first: list[tuple[str, str]] = field(default_factory=list)

    @classmethod
    def of_finished(cls, cache_dir: Path, plan: Plan, *, share: float) -> "FailureBudget":
        """Start from the failures that the finished shards record: a resumed run tolerates no more."""
        budget = cls(total=plan.sample_count, share=share, served=bool(plan.teacher.get("served")))
        for index in range(plan.shard_count):
            if sidecar_path(cache_dir, index).is_file():
                budget._count(read_sidecar(cache_dir, index).failed)
        return budget

    def spend(self, failures: Sequence[tuple[str, str]]) -> None:
        """Count failures.

        Raises:
            DataError: When the share is exceeded, with the first reasons.
        """
        self._count(failures)
        # Divided, not multiplied: 0.29 * 100 is less than 29.
        if self.failed and self.failed / self.total > self.share:
            reasons = [
                f"  {brief(reason if repr(name) in reason else f'{name}: {reason}')}" for name, reason in self.first
            ]
            more = self.failed - len(self.first)
            enough = next((some for some in (0.1, 0.2, 0.5) if self.failed / self.total < some), 1)
            mend = "Fix the data"
            in_make = by_make('make: in CACHE_SET="..."; teacher-cache build: ')
            how = f"{in_make}--set max_failed_share={enough}"
            if self.served:
                mend = "Fix the responses, or what they are compared with (--teacher, --data, --set template=...)"
                how = f"--set max_failed_share={enough}"
            skip = f", or skip these samples: run the same command with max_failed_share={enough}, a share from 0 to 1 ({how})"
            raise DataError(
                f"{self.failed} of {self.total} samples cannot be used, more than the tolerated "
                f"{100 * self.share:.4g} %:\n"
                + "\n".join([*reasons, *([f"  ... and {more} more"] if more else [])])
                + f"\n{mend}{skip if self.failed < self.total else ''}"
            )

    def _count(self, failures: Sequence[tuple[str, str]]) -> None:
        self.failed += len(failures)
        self.first += failures[: SHOWN_FAILURES - len(self.first)]


def run_ahead(
    function: Callable[[In], Out],
    items: Iterable[In],
    *,
    count: int,
    name: str,
    stop: Callable[[], None] = lambda: None,
) -> Iterator[Out]:
    """Results of a function in the order of its arguments, computed by a background thread.

    Args:
        count: Results that may be ready, or in the making, before they are asked for.
        stop: Called at the end, whatever the reason, before a result that is still in the making is waited for.
    """
    with ThreadPoolExecutor(1, thread_name_prefix=name) as pool:
        pending: deque[Future[Out]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > count:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
            stop()


class Writer:
    """Encodes and writes in a background thread; the main loop waits when it falls behind."""

    def __init__(self, cache_dir: Path, plan: Plan, codecs: Mapping[str, Any], kept: Kept | None = None) -> None:
        """Prepare to write shards of ``plan``; ``kept``: what records had before, of a cache that is topped up."""
        self._cache_dir, self._plan, self._codecs, self._kept = cache_dir, plan, codecs, kept
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

    def finish(self, shard: EncodedShard, *, unknown: UnknownWords | None = None) -> None:
        """Queue the writing of a shard, after its batches; `unknown`: its rows that teach an unknown word."""
        order = [(sample.sample_id, image_key(sample)) for sample in shard.samples]
        rest = tuple(shard.failed), dict(shard.answers), unknown, len(shard.divided)
        self._submit(self._write, shard.index, order, *rest)

    def wait(self) -> None:
        """Wait until everything queued is written."""
        self._wait(0)

    def _submit(self, function: Callable[..., None], *args: Any) -> None:
        self._wait(BATCHES_BEHIND)
        self._pending.append(self._pool.submit(function, *args))

    def _wait(self, allowed: int) -> None:
        while len(self._pending) > allowed:
            self._pending.pop(0).result()

    def _encode(self, batch: Batch, signals: TeacherSignals) -> None:
        records = encode_records(signals, batch, self._codecs, version=self._plan.format_version)
        self._records |= dict(zip(batch.sample_ids, records, strict=True))

    def _write(
        self,
        index: int,
        order: list[tuple[str, str | None]],
        failed: tuple[tuple[str, str], ...],
        answers: Mapping[str, tuple[str, ...]],
        unknown: UnknownWords | None,
        divided: int,
    ) -> None:
        records, self._records = self._records, {}
        try:
            writer = open_writer(self._plan.store, self._cache_dir, index, self._plan.all_fields)
        except CacheMismatchError:
            if sidecar_path(self._cache_dir, index).exists():
                return  # another process finished the same shard meanwhile
            raise
        try:
            shared = SharedImages(self._plan.all_fields)
            sharer, of_images = ImageSharer(shared), self._kept_images(order, records, shared.names)
            for sample_id, key in order:
                record = records.get(sample_id, {})
                if AnswersCodec.signal in self._codecs:
                    record |= self._codecs[AnswersCodec.signal].encode(answers[sample_id])
                if self._kept is not None and self._kept.holds(sample_id):
                    record |= self._kept.record(sample_id)
                writer.append(sample_id, sharer.share(record | of_images.get(key, {}), key))
            writer.unknown, writer.divided = unknown, divided
            finish_shard(writer, failed)
        finally:
            writer.abort()

    def _kept_images(
        self, order: list[tuple[str, str | None]], records: Mapping[str, Record], names: Collection[str]
    ) -> dict[str | None, Record]:
        """What new samples get of an image that kept records have: its arrays stay, and a shard holds them once."""
        kept = self._kept
        if kept is None or not names:
            return {}
        asked = {key for sample_id, key in order if key is not None and not kept.holds(sample_id)}
        found: dict[str | None, Record] = {}
        for sample_id, key in order:
            if key in asked and key not in found and kept.holds(sample_id):
                record = records.get(sample_id, {}) | kept.record(sample_id)
                found[key] = {name: record[name] for name in names}
        return found
