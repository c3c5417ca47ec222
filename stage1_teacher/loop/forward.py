"""The teacher over one shard, batch by batch, so that a GPU always has the next batch waiting.

A background thread collates ahead. The thread that drives the teacher queues a batch, the reduction of its output and
the copies to the CPU, and only then looks at the results of the batch before it. Whether those are finite is known
one batch late. On a CPU the same code runs, and nothing is ever pending.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from vlm_distill_cache.common.errors import DistillError, ModelError, SampleError
from vlm_distill_cache.data.text.collate import Batch, collate, length_buckets
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.signals import (
    TeacherSignals,
    check_finite,
    copies_done,
    reduce_output,
    to_cpu,
)
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, run_ahead
from vlm_distill_cache.stage1_teacher.teacher.inputs import TeacherInputs

BATCHES_AHEAD = 1


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A batch that the teacher can take at once."""

    samples: Sequence[EncodedSample]
    batch: Batch
    inputs: TeacherInputs


@dataclass(frozen=True, kw_only=True)
class _Queued:
    """A batch queued on the device, and its signals on the CPU, valid once the events are reached."""

    samples: Sequence[EncodedSample]
    batch: Batch
    signals: TeacherSignals | None
    events: tuple[torch.cuda.Event, ...] = ()

    def finish(self) -> TeacherSignals:
        """Wait for the signals.

        Raises:
            SampleError: If a sample of the batch cannot be used.
        """
        if self.signals is None:
            raise SampleError("a label that is not in the teacher's vocabulary")
        for event in self.events:
            event.synchronize()
        check_finite(self.signals)
        return self.signals


def run_shard(work: Build, shard: EncodedShard, batch_size: int) -> Iterator[tuple[Batch, TeacherSignals]]:
    """Run the teacher over one shard in length buckets; batches never cross a shard.

    A sample on which the teacher's output is not finite is moved from the shard's samples to its failures:
    its batch runs again, one sample at a time.

    Args:
        shard: Changed in place where a sample fails.
        batch_size: Most samples in a forward pass.

    Yields:
        Each batch with its reduced signals, on the CPU.
    """
    samples = list(shard.samples)
    buckets = length_buckets([len(sample) for sample in samples], batch_size)
    chosen = ([samples[index] for index in bucket] for bucket in buckets)
    before: _Queued | None = None
    for ready in run_ahead(partial(_prepare, work), chosen, count=BATCHES_AHEAD, name="collate"):
        queued = _queue(work, ready)
        if before is not None:
            yield from _finish(work, shard, before)
        before = queued
    if before is not None:
        yield from _finish(work, shard, before)


def _prepare(work: Build, samples: Sequence[EncodedSample]) -> _Ready:
    batch = collate(samples, work.teacher.pad_token_id)
    with _one_checkpoint(work, batch):
        return _Ready(samples=samples, batch=batch, inputs=work.prepare(batch))


@torch.inference_mode()
def _queue(work: Build, ready: _Ready) -> _Queued:
    """Queue a batch, and the copies of what is kept of its output; waits for nothing."""
    samples, batch = ready.samples, ready.batch
    with _one_checkpoint(work, batch):
        output = work.run(batch, ready.inputs)
    try:
        signals = reduce_output(output, batch, work.codecs, checked=False)
    except SampleError:
        return _Queued(samples=samples, batch=batch, signals=None)
    copied = to_cpu(signals, non_blocking=True)
    return _Queued(samples=samples, batch=batch, signals=copied, events=copies_done(signals))


def _finish(work: Build, shard: EncodedShard, queued: _Queued) -> Iterator[tuple[Batch, TeacherSignals]]:
    """Wait for a batch; where one of its samples cannot be used, each has another try alone."""
    try:
        signals = queued.finish()
    except SampleError:
        for sample in queued.samples:
            try:
                yield _run_alone(work, sample)
            except SampleError as error:
                shard.samples.remove(sample)
                shard.fail(sample.sample_id, f"teacher: {error}")
    else:
        yield queued.batch, signals


@torch.inference_mode()
def _run_alone(work: Build, sample: EncodedSample) -> tuple[Batch, TeacherSignals]:
    """Run one sample, and say what is wrong with it."""
    ready = _prepare(work, [sample])
    with _one_checkpoint(work, ready.batch):
        output = work.run(ready.batch, ready.inputs)
    signals = to_cpu(reduce_output(output, ready.batch, work.codecs))
    check_finite(signals)
    return ready.batch, signals


@contextmanager
def _one_checkpoint(work: Build, batch: Batch) -> Iterator[None]:
    """Say what errors inside a model mean.

    Raises:
        ModelError: If the model cannot take what its own processor and tokenizer made: files of two checkpoints.
    """
    try:
        yield
    except (DistillError, torch.OutOfMemoryError):
        raise
    except (IndexError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"teacher {work.teacher.directory} cannot read sample {batch.sample_ids[0]!r}: {error}; model, tokenizer and "
            "preprocessor_config.json must be files of one checkpoint"
        ) from error
