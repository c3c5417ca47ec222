"""Distillation with the teacher in the loop, as the released code does it: what a cache replaces.

Each micro-batch runs the teacher with eager attention and `output_attentions`, then learns from exact values. Order,
samples, losses and student are those of the cached run; only where the signals come from differs.
"""

from collections.abc import Iterable
from typing import Any

import torch

import vlm_distill_cache.stage2_student.train as train_module
from tests.benchmarks.train_student import train_student
from vlm_distill_cache.common.attention.hidden import gather_rows
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.text.collate import Batch, collate, supervised_rows, visual_keys
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.signals import Sizes, build_codecs, encode_records, reduce_output
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch, TrainingSample
from vlm_distill_cache.stage2_student.batches.dataset import CachedDataset
from vlm_distill_cache.stage2_student.batches.signals import collate_samples, decode_signals
from vlm_distill_cache.stage2_student.losses.terms import choose_terms
from vlm_distill_cache.stage2_student.training.preparation import Preparation, prepare

SIGNALS = ("logits", "answer_attention")


class OnlineDataset:
    """Joined data whose signals are the teacher's own, computed when a batch is asked for."""

    def __init__(self, joined: CachedDataset, work: Build) -> None:
        """Keep order and encoding of a cached join; its records are not read.

        Args:
            joined: Data joined with a cache of the same teacher.
            work: Teacher and its encoder.
        """
        self._joined, self._work = joined, work
        self._codecs = build_codecs(
            BuildConfig(signals=SIGNALS, logits="exact", attention_dtype="f4", groups=len(work.groups)),
            Sizes(grid=work.codecs["answer_attention"].grid),
        )
        self._terms = choose_terms(SIGNALS)
        self._language = work.teacher.model.model.language_model
        self._language.set_attn_implementation("eager")
        self._encoded: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Everything else is the cached join's."""
        return getattr(self._joined, name)

    def __len__(self) -> int:
        return len(self._joined)

    def batch(self, positions: Iterable[int]) -> TrainingBatch:
        """Run the teacher on a micro-batch and collate what it says with the student's inputs."""
        chosen = [int(position) for position in positions]
        for position in chosen:
            if position not in self._encoded:
                sample = self._joined.sample(position)
                self._encoded[position] = (self._work.encoder(sample), self._joined._encoder(sample))
        batch = collate([self._encoded[p][0] for p in chosen], self._work.teacher.pad_token_id)
        signals = reduce_output(run_eager(self._work, batch), batch, self._codecs)
        samples = []
        for position, record in zip(chosen, encode_records(signals, batch, self._codecs), strict=True):
            encoded = self._encoded[position][1]
            found = decode_signals(record, self._codecs, self._terms, tuple(encoded.tiles), where="online")
            samples.append(TrainingSample(encoded, found))
        return collate_samples(samples, self._terms, pad_token_id=self._joined._pad_token_id)


@torch.inference_mode()
def run_eager(work: Build, batch: Batch) -> dict[str, torch.Tensor]:
    """One pass with every attention matrix, of which the wanted rows are then taken."""
    teacher = work.teacher
    inputs = dict(teacher.family.model_inputs(teacher.config, batch, dtype=torch.float32))
    mask = inputs["attention_mask"]
    if mask.ndim == 4:  # eager attention adds its mask
        inputs["attention_mask"] = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    output = teacher.model(**inputs, use_cache=False, output_attentions=True)
    rows, keys = supervised_rows(batch), visual_keys(batch)
    groups = []
    for group in work.groups:
        mean = torch.stack([output.attentions[layer].mean(dim=1) for layer in group]).mean(dim=0)  # [B, T, T]
        groups.append(gather_rows(gather_rows(mean, rows).transpose(1, 2), keys).transpose(1, 2))
    return {
        "logits": output.logits[batch.labels != IGNORE_INDEX],
        "answer_attention": torch.stack(groups, dim=1),
    }


def prepare_online(work: Build) -> Any:
    """A `prepare` whose phases have the teacher in their loop."""

    def prepared(*arguments: Any) -> Preparation:
        run = prepare(*arguments)
        for phase in run.phases:
            object.__setattr__(phase, "dataset", OnlineDataset(phase.dataset, work))
        return run

    return prepared


def train_online(work: Build, **options: Any) -> Any:
    """`train_student` with the teacher in the loop, on the training thread as the released code has it."""
    original = train_module.prepare
    train_module.prepare = prepare_online(work)
    try:
        return train_student(num_workers=0, **options)
    finally:
        train_module.prepare = original
