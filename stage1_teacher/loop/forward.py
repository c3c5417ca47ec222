"""The teacher over one shard, batch by batch, so that a GPU always has the next batch waiting.

A background thread collates ahead. The thread that drives the teacher queues a batch, the reduction of its output and
the copies to the CPU, and only then looks at the results of the batch before it. Whether those are finite is known
one batch late. On a CPU the same code runs, and nothing is ever pending. Where a teacher's layers lie on several GPUs
(``device_map``), each has a batch at work: as many batches wait as there are GPUs.

A batch for which memory does not suffice runs again in two halves, and these if need be. Which samples run together decides
the last bits of what is cached, so the shard keeps how many batches did (`EncodedShard.divided`); the plan's batch size stays,
and is tried with every other batch.
"""

import logging
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from vlm_distill_cache.common.errors import DistillError, ModelError, ProcessFailedError, SampleError
from vlm_distill_cache.data.text.collate import Batch, collate, joinable, length_buckets
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.signals import (
    TeacherSignals,
    check_finite,
    copies_done,
    named,
    reduce_output,
    to_cpu,
)
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, run_ahead
from vlm_distill_cache.stage1_teacher.teacher.inputs import TeacherInputs

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 1
_DEVICE = re.compile(r"CUDA|cuDNN|CUBLAS|NCCL|HIP")  # in errors that a GPU and its libraries raise


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A batch that the teacher can take at once; or what it could not be made for."""

    samples: Sequence[EncodedSample]
    batch: Batch | None = None
    inputs: TeacherInputs | None = None
    fault: ModelError | SampleError | None = None


@dataclass(frozen=True, kw_only=True)
class _Queued:
    """A batch queued on the device, and its signals on the CPU, valid once the events are reached."""

    samples: Sequence[EncodedSample]
    batch: Batch | None = None
    signals: TeacherSignals | None = None
    events: tuple[torch.cuda.Event, ...] = ()
    fault: ModelError | SampleError | None = None
    too_large: bool = False

    def finish(self) -> tuple[Batch, TeacherSignals]:
        """Wait for the signals.

        Raises:
            SampleError: If a sample of the batch cannot be used.
            ModelError: If the teacher cannot read the batch.
        """
        if self.fault is not None:
            raise self.fault
        assert self.batch is not None
        assert self.signals is not None
        for event in self.events:
            event.synchronize()
        check_finite(self.signals)
        return self.batch, self.signals


def run_shard(work: Build, shard: EncodedShard, batch_size: int) -> Iterator[tuple[Batch, TeacherSignals]]:
    """Run the teacher over one shard in length buckets; batches never cross a shard.

    A sample that the teacher cannot read, or on which its output is not finite, is moved from the shard's samples to its
    failures: its batch runs again, one sample at a time.

    Args:
        shard: Changed in place where a sample fails.
        batch_size: Most samples in a forward pass.

    Yields:
        Each batch with its reduced signals, on the CPU.

    Raises:
        ModelError: If the teacher has read no sample at all: that is no matter of a sample.
    """
    if work.kept is None:
        yield from _run_samples(work, shard, batch_size)
        return
    # Those that have a record first, for the signals that it lacks: in the batches of a build without the others.
    work.kept.refuse_others(shard.samples, shard.failed)
    there = [sample for sample in shard.samples if work.kept.holds(sample.sample_id)]
    new = [sample for sample in shard.samples if not work.kept.holds(sample.sample_id)]
    missing = {name: codec for name, codec in work.codecs.items() if name in work.kept.missing}
    for samples, codecs in ((there, missing), (new, work.codecs)):
        if codecs:
            part = replace(shard, samples=samples)
            yield from _run_samples(replace(work, codecs=codecs), part, batch_size)
    left = {sample.sample_id for sample in (*there, *new)}
    shard.samples[:] = [sample for sample in shard.samples if sample.sample_id in left]


def _run_samples(work: Build, shard: EncodedShard, batch_size: int) -> Iterator[tuple[Batch, TeacherSignals]]:
    """As `run_shard`, for all of a shard's samples and codecs alike."""
    samples = list(shard.samples)
    buckets = length_buckets([len(sample) for sample in samples], batch_size)
    chosen = (group for bucket in buckets for group in joinable([samples[index] for index in bucket]))
    waiting, most = deque[_Queued](), max(1, len(work.teacher.gpus))
    unread: list[tuple[EncodedSample, ModelError]] = []
    for ready in run_ahead(partial(_prepare, work), chosen, count=BATCHES_AHEAD, name="collate"):
        waiting.append(_queue(work, ready))
        if len(waiting) > most:
            yield from _finish(work, shard, waiting.popleft(), unread)
    while waiting:
        yield from _finish(work, shard, waiting.popleft(), unread)
    for sample, fault in unread:
        if not work.teacher.has_read:
            raise fault
        _fail(shard, sample, fault)


def _prepare(work: Build, samples: Sequence[EncodedSample]) -> _Ready:
    try:
        with one_checkpoint(work, samples):
            batch = collate(samples, work.teacher.pad_token_id)
            return _Ready(samples=samples, batch=batch, inputs=work.prepare(batch))
    except (ModelError, SampleError) as error:
        return _Ready(samples=samples, fault=error)


@torch.inference_mode()
def _queue(work: Build, ready: _Ready) -> _Queued:
    """Queue a batch, and the copies of what is kept of its output; waits for nothing, but of many rows (`select_entries`)."""
    samples, batch = ready.samples, ready.batch
    if batch is None:
        return _Queued(samples=samples, fault=ready.fault)
    try:
        with one_checkpoint(work, samples):
            output = work.run(batch, ready.inputs)
        signals = reduce_output(output, batch, work.codecs, checked=False)
        copied = to_cpu(signals, non_blocking=True)
        return _Queued(samples=samples, batch=batch, signals=copied, events=copies_done(signals))
    except (ModelError, SampleError) as error:
        return _Queued(samples=samples, fault=error)
    except torch.OutOfMemoryError:
        return _Queued(samples=samples, too_large=True)


def _finish(
    work: Build, shard: EncodedShard, queued: _Queued, unread: list[tuple[EncodedSample, ModelError]]
) -> Iterator[tuple[Batch, TeacherSignals]]:
    """Wait for a batch; where one of its samples cannot be used, each has another try alone.

    One that was too large runs again in halves. Those that the teacher cannot read are added to ``unread``.
    """
    if queued.too_large:
        for part in halves(shard, queued.samples):
            yield from _finish(work, shard, _queue(work, _prepare(work, part)), unread)
        return
    try:
        found = queued.finish()
    except (ModelError, SampleError):
        for sample in queued.samples:
            try:
                alone, _, kept = run_alone(work, sample)
            except SampleError as error:
                _fail(shard, sample, error)
            except ModelError as error:
                unread.append((sample, error))
            else:
                work.teacher.has_read = True
                yield alone, kept
    else:
        work.teacher.has_read = True
        yield found


def halves(shard: EncodedShard, samples: Sequence[EncodedSample]) -> tuple[Sequence[EncodedSample], ...]:
    """Both halves of a batch for which memory did not suffice, which is said and kept; its tensors must be gone.

    Raises:
        ModelError: If it is a single sample.
    """
    torch.cuda.empty_cache()
    count, longest = len(samples), max(map(len, samples))
    if count == 1:
        raise ModelError(
            f"{named([samples[0].sample_id])}: memory does not suffice for its {longest} tokens beside the teacher; end what "
            "else runs on the device, spread the teacher over several (device_map=auto), quantise it (quantisation=8bit), or "
            "set a smaller max_length"
        )
    logger.warning(
        "out of memory with %d samples of up to %d tokens: they run in halves, which takes longer; the cache says how many "
        "batches did. A new cache with batch_size=%d does not try so many at once", count, longest, count // 2,
    )  # fmt: skip
    shard.divided.append(count)
    return samples[: count // 2], samples[count // 2 :]


def _fail(shard: EncodedShard, sample: EncodedSample, error: SampleError | ModelError) -> None:
    shard.samples.remove(sample)
    shard.fail(sample.sample_id, f"teacher: {error}")


def run_alone(work: Build, sample: EncodedSample) -> tuple[Batch, dict[str, Tensor], TeacherSignals]:
    """Run one sample; its batch, what the teacher found, on its device, and what codecs get of that, on the CPU.

    Raises:
        SampleError: If it cannot be used; ModelError, if the teacher cannot read it.
    """
    batch, output, signals = run_once(work, [sample])
    check_finite(signals)
    return batch, output, signals


@torch.inference_mode()
def run_once(
    work: Build, samples: Sequence[EncodedSample], *, checked: bool = True
) -> tuple[Batch, dict[str, Tensor], TeacherSignals]:
    """Run some samples in one pass, which is not divided; the results are as of `run_alone`.

    Args:
        checked: Refuse logits that are not finite.

    Raises:
        torch.OutOfMemoryError: If memory does not suffice; others as of `run_alone`.
    """
    ready = _prepare(work, samples)
    if ready.batch is None or ready.inputs is None:
        raise ready.fault or SampleError("it cannot be prepared")
    with one_checkpoint(work, samples):
        output = work.run(ready.batch, ready.inputs)
    return ready.batch, output, to_cpu(reduce_output(output, ready.batch, work.codecs, checked=checked))


@contextmanager
def one_checkpoint(work: Build, samples: Sequence[EncodedSample]) -> Iterator[None]:
    """Say what errors inside a model mean, and with which samples they came.

    Raises:
        ModelError: If the model cannot take what its own processor and tokenizer made: files of two checkpoints.
    """
    names = named([sample.sample_id for sample in samples])
    try:
        yield
    except (SampleError, ProcessFailedError):
        raise
    except DistillError as error:
        raise ModelError(f"{names}: {error}") from error
    except (IndexError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError) or _DEVICE.search(str(error)):
            error.add_note(f"with {names}")  # it is no matter of the samples, and may befall all that come
            raise
        raise ModelError(
            f"teacher {work.teacher.directory} cannot read {names}: {error}; model, tokenizer and "
            "preprocessor_config.json must be files of one checkpoint"
        ) from error
    except Exception as error:
        error.add_note(f"with {names}")
        raise
