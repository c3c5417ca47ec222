"""What an estimate is made from: one shard of a few samples, built by the code of a real build, timed and weighed."""

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from vlm_distill_cache.common.attention.capture import IMPLEMENTATION
from vlm_distill_cache.common.cache.plan import BASE, Plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX, Field, Record, base_fields
from vlm_distill_cache.common.cache.sidecar import sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_reader, open_writer
from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.data.families.inputs import additive_mask, text_config
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.sources.grouping import ChosenSamples
from vlm_distill_cache.data.text.collate import Batch, collate, length_buckets
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.extract import open_shards
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import Writer
from vlm_distill_cache.stage1_teacher.planning.batch_size import free_memory
from vlm_distill_cache.stage1_teacher.teacher.export import export_parts

MAX_RUNS, ENOUGH_S, LONG_S = 5, 2.0, 20.0
RUNS = 4  # of neighbouring samples: conversations about one picture stand side by side and share its signals
MEMORY_SHARE = 0.6  # of what is free, for eager attention

Out = TypeVar("Out")


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of a signal a sample: of its arrays, and what it adds on disk, packed."""

    decoded: float
    stored: float


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured; times are seconds a sample unless stated.

    Attributes:
        failed: Samples of the probe that could not be used.
        rows: Supervised rows of a sample.
        tokens: Length of a sample.
        signals: By signal, and ``base`` for what every record holds.
        stored: Bytes a sample on disk, all signals, sidecar included.
        shard_bytes: Bytes on disk that each shard costs whatever is in it.
        side_bytes: Projector, vision tower, processor.
        encode: Reading, decoding and tokenising.
        teacher: Stage one's forward pass, the wanted attention and its reduction included.
        plain: Forward pass with SDPA alone.
        eager: Forward pass with eager attention and all its maps, as a teacher beside a student runs it; None if one
            sample does not fit the memory.
        eager_batch: Samples a pass that ``eager`` was measured with.
        write: Encoding and writing records.
        loop: All of it as the main loop does it, reading and writing beside the teacher.
        shard_write: Seconds that each shard costs whatever is in it.
        load: Seconds to load the teacher and open the data.
        host_memory: Most resident memory of this process until stage one's pass was done, bytes; weights that are mapped
            from their files count.
        device_memory: Most memory of the device until then, bytes; None on a CPU.
    """

    samples: int
    failed: int
    rows: float
    tokens: float
    signals: dict[str, Size]
    stored: float
    shard_bytes: int
    side_bytes: int
    encode: float
    teacher: float
    plain: float
    eager: float | None
    eager_batch: int
    write: float
    loop: float
    shard_write: float
    load: float
    teacher_parameters: int
    device: str
    threads: int
    cores: int
    host_memory: int
    device_memory: int | None

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON."""
        return asdict(self)


def timed(function: Callable[[], Out]) -> tuple[Out, float]:
    """The result of a function, and its shortest time of a few runs, in seconds.

    Other work on the machine only ever adds, and so does what a first run loads; it counts only where it is long.
    """
    times: list[float] = []
    while True:
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
        if times[0] > LONG_S or len(times) == MAX_RUNS or (len(times) > 1 and sum(times) > ENOUGH_S):
            return result, min(times)


def measure_probe(work: Build, *, samples: int, load: float) -> Probe:
    """Build one shard of a few samples in a temporary folder, and time and weigh it.

    Args:
        work: Teacher, data and codecs.
        samples: Most samples; they are taken in a few runs of neighbours, spread over the data.
        load: Seconds it took to open ``work``.

    Raises:
        DataError: If no sample of the probe can be used.
    """
    positions = probe_positions(len(work.dataset), samples)
    plan = replace(work.plan, sample_count=len(positions), shard_size=len(positions))
    work = replace(work, dataset=ChosenSamples(work.dataset, positions, name=work.dataset.name), plan=plan)
    alone = replace(work, workers=0)
    (shard,), encode = timed(lambda: list(open_shards(alone, plan, [0], batch_size=plan.batch_size)))
    # Each pass ends with a copy to the CPU, so that all of it is timed; the first takes out what cannot be used.
    passes, teacher = timed(lambda: list(run_shard(work, shard, plan.batch_size)))
    count = len(shard.samples)
    if not count:
        raise DataError(f"no sample of the probe can be used; the last one: {shard.failed[-1][1]}")
    host_memory, device_memory = peak_memory(work.teacher.device)  # what follows is not stage one's
    batches = [batch for batch, _ in passes]
    _, plain = timed(lambda: _run_plain(work, batches))
    eager, eager_batch = _time_eager(work, shard.samples)
    with tempfile.TemporaryDirectory() as scratch:

        def build(passes: Iterable[Any]) -> Path:
            folder = Path(tempfile.mkdtemp(dir=scratch))
            with Writer(folder, plan, work.codecs) as writer:
                for batch, signals in passes:
                    writer.add(batch, signals)
                writer.finish(shard)
            return folder

        folder, write = timed(lambda: build(passes))
        _, together = timed(lambda: build(run_shard(work, shard, plan.batch_size)))
        reader = open_reader(plan.store, folder, 0, plan.all_fields)
        records = {name: reader.read(place) for place, name in enumerate(reader.sample_ids)}
        reader.close()
        side_bytes = sum((folder / name).stat().st_size for name in export_parts(work.teacher, folder))
    shard_bytes, shard_write = timed(lambda: _weigh(plan, plan.all_fields, {}))
    stored = (_weigh(plan, plan.all_fields, records) - shard_bytes) / count
    write = max(0.0, write - shard_write) / count
    # The last batch's writing has nothing to hide behind here, but has in a build.
    loop = max(teacher / count, (together - shard_write) / count - write / len(batches))
    encode /= len(positions)
    # A thread that encodes costs the teacher what it takes, a process does not; written answers come first anyway.
    loop = max(loop, encode / work.workers) if work.workers and ANSWERS not in work.codecs else loop + encode
    device = work.teacher.device
    return Probe(
        samples=count,
        failed=len(shard.failed),
        rows=sum(int(sample.supervised_rows.size) for sample in shard.samples) / count,
        tokens=sum(map(len, shard.samples)) / count,
        signals=_weigh_signals(plan, records),
        stored=stored,
        shard_bytes=shard_bytes,
        side_bytes=side_bytes,
        encode=encode,
        teacher=teacher / count,
        plain=plain / count,
        eager=eager,
        eager_batch=eager_batch,
        write=write,
        loop=loop,
        shard_write=shard_write,
        load=load,
        teacher_parameters=sum(p.numel() for p in work.teacher.model.parameters()),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        host_memory=host_memory,
        device_memory=device_memory,
    )


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """Most resident memory of this process so far, and most memory of a device, bytes; None on a CPU."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host, torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def probe_positions(total: int, samples: int, runs: int = RUNS) -> list[int]:
    """Where in a data set of ``total`` samples the probe lies: some runs of neighbours, evenly spread."""
    if samples >= total:
        return list(range(total))
    runs = min(runs, samples)
    positions: set[int] = set()
    for run in range(runs):
        length = samples // runs + (run < samples % runs)
        start = max(0, min(run * total // runs, total - length))
        positions |= set(range(start, start + length))
    return sorted(positions)


def _weigh(plan: Plan, fields: Sequence[Field], records: Mapping[str, Record]) -> int:
    """Bytes on disk of a shard with some fields of some records, by sample id; its sidecar included."""
    with tempfile.TemporaryDirectory() as scratch:
        writer = open_writer(plan.store, Path(scratch), 0, fields)
        for sample_id, record in records.items():
            writer.append(sample_id, {field.name: record[field.name] for field in fields})
        return finish_shard(writer).stored_bytes + sidecar_path(Path(scratch), 0).stat().st_size


def _weigh_signals(plan: Plan, records: Mapping[str, Record]) -> dict[str, Size]:
    """Bytes of each signal, alone beside the base fields, and of these; without those of a shard without records."""

    def weigh(fields: Sequence[Field], *, beside: Sequence[Field] = (), less: float = 0.0) -> Size:
        decoded = sum(record[field.name].nbytes for record in records.values() for field in fields)
        written = (*beside, *fields)
        stored = (_weigh(plan, written, records) - _weigh(plan, written, {})) / len(records)
        return Size(decoded=decoded / len(records), stored=stored - less)

    of_all = base_fields(plan.format_version)
    base = weigh(of_all)
    sizes = {name: weigh(fields, beside=of_all, less=base.stored) for name, fields in plan.fields.items()}
    return sizes | {BASE: base}


@torch.inference_mode()
def _run_plain(work: Build, batches: Sequence[Batch]) -> None:
    for batch in batches:
        logits = row_logits(work.teacher.model, _inputs(work, batch), batch.labels != IGNORE_INDEX)
        logits[-1:].cpu()  # waits for the device


def _time_eager(work: Build, samples: Sequence[EncodedSample]) -> tuple[float | None, int]:
    """Seconds a sample with every map of every layer and head, at the largest batch that fits, and that batch."""
    teacher, longest = work.teacher, max(map(len, samples))
    if not teacher.family.is_listed:  # where its language model is, is not known
        return None, 0
    text = text_config(teacher.config)
    width = torch.finfo(getattr(torch, teacher.dtype)).bits // 8
    # Each layer keeps its map; the layer at work also has scores, mask and a float32 softmax.
    maps = (teacher.depth + 3) * int(text.num_attention_heads) * longest**2 * width
    one = maps + longest * int(text.vocab_size) * width * 2
    size = min(work.plan.batch_size, int(free_memory(teacher.device) * MEMORY_SHARE) // one)
    if size < 1:
        return None, 0
    buckets = length_buckets([len(sample) for sample in samples], size)
    batches = [collate([samples[index] for index in bucket], teacher.pad_token_id) for bucket in buckets]
    language_model: Any = teacher.language_model
    language_model.set_attn_implementation("eager")
    try:
        _, seconds = timed(lambda: _run_eager(work, batches))
    finally:
        language_model.set_attn_implementation(IMPLEMENTATION)
    return seconds / len(samples), size


@torch.inference_mode()
def _run_eager(work: Build, batches: Sequence[Batch]) -> None:
    for batch in batches:
        inputs = _inputs(work, batch)  # eager attention adds its mask
        inputs["attention_mask"] = additive_mask(inputs["attention_mask"], getattr(torch, work.teacher.dtype))
        output = work.teacher.model(**inputs, use_cache=False, output_attentions=True)
        output.logits[:, -1:, -1:].cpu()  # waits for the device


def _inputs(work: Build, batch: Batch) -> dict[str, Any]:
    teacher = work.teacher
    moved = batch.to(teacher.device)
    return dict(teacher.family.model_inputs(teacher.config, moved, dtype=getattr(torch, teacher.dtype)))
