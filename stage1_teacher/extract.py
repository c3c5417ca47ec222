"""Stage one: run the teacher once over a data set and write the cache. ``extract()`` is the main loop.

Three things run at the same time: a thread reads, decodes and tokenises the next shard, the main thread runs
the teacher, and a thread encodes and writes what the teacher said. On the built-in teacher that hides the
encoder (about 0.3 ms a sample) and the writer behind the forward pass.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from common.manifest import MANIFEST, Manifest, Plan, missing_shards, read_manifest, seal
from data.registry import open_dataset
from data.threads import leave_one_core
from stage1_teacher.card import write_card
from stage1_teacher.config import BuildConfig
from stage1_teacher.fidelity import measure_fidelity
from stage1_teacher.pipeline import FailureBudget, Writer, batches_of, encode_shards
from stage1_teacher.plan import build_encoder, codecs_for, make_plan, prepare_cache, teacher_directory
from stage1_teacher.projector_export import export_parts
from stage1_teacher.signals import reduce_output, to_cpu
from stage1_teacher.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """What a run did.

    Attributes:
        cache: The cache folder.
        built: Shards written by this run.
        samples: Samples this run put through the teacher.
        seconds: Wall-clock time of the main loop.
        failed: Samples that could not be read, in the whole cache.
        manifest: The sealed manifest.
    """

    cache: Path
    built: int
    samples: int
    seconds: float
    failed: int
    manifest: Manifest


def extract(config: BuildConfig, *, overwrite: bool = False) -> BuildSummary:
    """Run the teacher once over a data set and write a sealed cache.

    Args:
        config: What to run and what to keep.
        overwrite: Start again if the folder holds a cache with other options.

    Returns:
        What this run did; nothing is built when the cache is already complete.

    Raises:
        DistillError: With the remedy, if teacher, data or folder cannot be used.
    """
    leave_one_core()
    cache_dir = Path(config.cache)
    dataset = open_dataset(
        config.data, split=config.split, images=Path(config.images) if config.images else None,
        limit=config.limit or None,
    )  # fmt: skip
    directory, builtin = teacher_directory(
        teacher=config.teacher, data=config.data, scratch=cache_dir.parent / f"{config.data.partition(':')[0]}-teacher"
    )  # fmt: skip
    teacher = Teacher(directory, dtype=config.dtype, device=config.device)
    encoder = build_encoder(teacher, template=config.template, builtin=builtin, max_length=config.max_length)
    codecs = codecs_for(config, teacher)
    plan = make_plan(
        config, dataset=dataset, teacher=teacher, encoder=encoder, codecs=codecs, builtin=builtin
    )
    prepare_cache(cache_dir, plan, overwrite=overwrite)
    todo = missing_shards(cache_dir, plan)
    if not todo and (cache_dir / MANIFEST).is_file():
        manifest = read_manifest(cache_dir)
        return BuildSummary(
            cache=cache_dir, built=0, samples=0, seconds=0.0, failed=manifest.totals["failed"], manifest=manifest
        )  # fmt: skip
    export_parts(teacher, cache_dir)

    # The main loop: the next shards are encoded, and the last batches written, while the teacher runs.
    groups = teacher.groups(config.groups, config.layers)
    budget = FailureBudget(total=len(dataset), share=config.max_failed_share)
    started, samples = time.monotonic(), 0
    pad = int(teacher.tokenizer.pad_token_id or 0)
    with Writer(cache_dir, plan, codecs) as writer, _progress(plan, todo) as bar:
        for shard in encode_shards(dataset, encoder, plan, todo):
            budget.spend(shard.failed)
            for batch in batches_of(shard.samples, config.batch_size, pad):
                output = teacher.run(
                    batch, groups=groups, answer_rows="answer_attention" in codecs,
                    visual_rows="visual_map" in codecs or "visual_columns" in codecs,
                )  # fmt: skip
                writer.add(batch, to_cpu(reduce_output(output, batch, codecs)))
                samples += len(batch)
                bar.update(len(batch))
            writer.finish(shard)
            bar.update(len(shard.failed))
    seconds = time.monotonic() - started

    fidelity = measure_fidelity(
        teacher, dataset, encoder, plan, codecs, cache_dir, samples=config.fidelity_samples, groups=groups
    )
    write_card(cache_dir, plan, fidelity)
    manifest = seal(cache_dir, fidelity=fidelity)
    return BuildSummary(
        cache=cache_dir, built=len(todo), samples=samples, seconds=seconds,
        failed=manifest.totals["failed"], manifest=manifest,
    )  # fmt: skip


def _progress(plan: Plan, todo: Sequence[int]) -> "tqdm[Any]":
    done = plan.sample_count - sum(len(plan.shard_range(index)) for index in todo)
    return tqdm(
        total=plan.sample_count, initial=done, unit="sample", desc="teacher", smoothing=0.05, mininterval=0.5
    )
