"""A live teacher in stage two's loop: what it says of samples now, of the types that a cache's records decode to."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.codecs.live import map_tensors
from vlm_distill_cache.data.sample import Sample
from vlm_distill_cache.data.text.collate import collate, joinable
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.forward import one_checkpoint
from vlm_distill_cache.stage1_teacher.loop.signals import (
    EXTRACTORS,
    check_finite,
    encode_records,
    reduce_output,
    to_cpu,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_build


class LiveTeacher:
    """A teacher that is asked while a student trains, by the options that a cache of it is built with.

    Called with samples, it runs them in one forward pass, or in several where their pictures cannot be joined.

    Attributes:
        plan: What a cache of these options would hold.
    """

    plan: Plan

    def __init__(self, config: BuildConfig) -> None:
        """Load the teacher; nothing is written where ``config.cache`` says.

        Raises:
            DistillError: With the remedy, if teacher or data cannot be used.
        """
        self._work = open_build(replace(config, batch_size=config.batch_size or 1))
        self.plan = self._work.plan

    def __call__(self, samples: Sequence[Sample]) -> list[Record]:
        """What the teacher says of samples, on the CPU and without a graph.

        Returns:
            Of each, in order: ``labels`` u4 ``[A]``, ``tiles`` and the other base fields as in a cache's record; and each
            signal under its own name: `SparseLogits`, `RowAttention`, `TeacherMap` (of several views a tuple of them) or a
            float32 tensor, before any codec.

        Raises:
            SampleError: If a sample cannot be encoded, or the teacher's output on it is not finite.
            ModelError: If the teacher cannot read them.
        """
        work, found = self._work, dict[str, Record]()
        for group in joinable([work.encoder(sample) for sample in samples]):
            with one_checkpoint(work, group):
                batch = collate(group, work.teacher.pad_token_id)
                output = work.run(batch)
                # Copies: what inference mode made can be saved for no backward pass.
                signals = map_tensors(to_cpu(reduce_output(output, batch, work.codecs)), torch.clone)
                check_finite(signals)
            records = encode_records({}, batch, {}, version=self.plan.format_version)
            for name, live in signals.items():
                parts = EXTRACTORS[name].decoded(live, batch, work.codecs[name])
                records = [{**record, name: part} for record, part in zip(records, parts, strict=True)]
            found |= zip(batch.sample_ids, records, strict=True)
        return [found[sample.sample_id] for sample in samples]
