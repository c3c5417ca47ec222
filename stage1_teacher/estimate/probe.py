"""What an estimate is made from: the teacher, the encoder and the store, timed and weighed on a few samples."""

import itertools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlm_distill_cache.common.attention.capture import IMPLEMENTATION
from vlm_distill_cache.common.cache.manifest import BASE, Plan, read_sidecar, sidecar_path
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.shared_images import with_visual_source
from vlm_distill_cache.common.errors import DataError, SampleError
from vlm_distill_cache.data.families.inputs import additive_mask, text_config
from vlm_distill_cache.data.families.table import submodule
from vlm_distill_cache.data.sample import Dataset, Sample
from vlm_distill_cache.data.text.collate import Batch, collate, length_buckets
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.answers import ANSWERS, answer_shard
from vlm_distill_cache.stage1_teacher.loop.encode_ahead import encode_shards
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.signals import TeacherSignals
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, Writer
from vlm_distill_cache.stage1_teacher.planning.batch_size import available_memory
from vlm_distill_cache.stage1_teacher.teacher.export import export_parts

MAX_RUNS, ENOUGH_S = 5, 2.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes of a signal, mean over the probe's samples.

    Attributes:
        decoded: Of its arrays.
        stored: What it adds to a sample on disk, packed.
    """

    decoded: float
    stored: float


def best_time(function: Callable[[], object]) -> float:
    """Shortest of a few runs, in seconds: other work on the machine only ever adds. Long runs are done once."""
    times: list[float] = []
    while len(times) < MAX_RUNS and sum(times) < ENOUGH_S:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return min(times)


def weigh_probe(
    work: Build, scratch: Path, shard: EncodedShard, passes: list[tuple[Batch, TeacherSignals]]
) -> dict[str, Any]:
    """Write the probe as one shard: whole, empty, and with each signal alone beside the base fields.

    What an empty shard takes is counted a shard, the rest a sample; so a small probe stands for large shards.

    Args:
        work: Codecs and plan.
        scratch: A temporary folder.
        shard: The probe's samples.
        passes: What the teacher said about them.

    Returns:
        ``signals``, ``stored``, ``shard_bytes``, ``write`` and ``shard_write`` of a ``Probe``.
    """
    count = len(shard.samples)
    empty, full = EncodedShard(index=0), replace(shard, index=0)
    folders = (scratch / f"timed-{number}" for number in itertools.count())
    whole, plan = _write(work, work.codecs, scratch / "whole", full, passes)
    overhead, _ = _write(work, work.codecs, scratch / "empty", empty, [])
    seconds = best_time(lambda: _write(work, work.codecs, next(folders), full, passes))
    shard_seconds = best_time(lambda: _write(work, work.codecs, next(folders), empty, []))
    decoded = read_sidecar(scratch / "whole", 0).field_bytes
    base = _write(work, {}, scratch / "base", full, passes)[0]
    base -= _write(work, {}, scratch / "base-empty", empty, [])[0]
    named = {field.name for group in plan.fields.values() for field in group}
    signals = {}
    for name, fields in plan.fields.items():
        codecs = {name: work.codecs[name]}
        alone = _write(work, codecs, scratch / f"only-{name}", full, passes)[0]
        alone -= _write(work, codecs, scratch / f"only-{name}-empty", empty, [])[0]
        size = sum(decoded[field.name] for field in fields)
        signals[name] = Size(decoded=size / count, stored=(alone - base) / count)
    rest = sum(size for name, size in decoded.items() if name not in named)
    signals[BASE] = Size(decoded=rest / count, stored=base / count)
    return {
        "signals": signals,
        "stored": (whole - overhead) / count,
        "shard_bytes": overhead,
        "write": max(0.0, seconds - shard_seconds) / count,
        "shard_write": shard_seconds,
    }


def _write(
    work: Build,
    codecs: Mapping[str, Any],
    folder: Path,
    shard: EncodedShard,
    passes: list[tuple[Batch, TeacherSignals]],
) -> tuple[int, Plan]:
    """Bytes on disk and the plan of one shard with some of the signals."""
    size = max(1, len(shard.samples))
    plan = replace(
        work.plan,
        sample_count=size,
        shard_size=size,
        signals={name: codec.to_dict() for name, codec in codecs.items()},
        fields=with_visual_source({name: codec.fields() for name, codec in codecs.items()}),
    )
    with Writer(folder, plan, codecs) as writer:
        for batch, signals in passes:
            writer.add(batch, signals)
        writer.finish(shard)
    files = read_sidecar(folder, 0).stored_bytes
    return files + sidecar_path(folder, 0).stat().st_size, plan


RUNS = 4  # of neighbouring samples: conversations about one picture stand side by side and share its signals
MEMORY_SHARE = 0.6  # of what is free, for eager attention
SHARDS = 3  # of a rehearsal of the main loop
SLOW_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What was measured; times are seconds a sample unless stated.

    Attributes:
        samples: Samples measured.
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
        teacher_parameters: Number of the teacher's parameters.
        device: What computed.
        threads: CPU threads of the arithmetic.
        cores: CPU cores of the machine.
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

    def to_dict(self) -> dict[str, Any]:
        """The measurements as JSON."""
        return asdict(self)


def measure_probe(work: Build, *, samples: int, batch_size: int, load: float) -> Probe:
    """Run a probe through all of stage one, each step timed alone, the records into a temporary shard.

    Args:
        work: Teacher, data and codecs.
        samples: Most samples; they are taken in a few runs of neighbours, spread over the data.
        batch_size: Samples a forward pass.
        load: Seconds it took to open ``work``.

    Raises:
        DataError: If no sample of the probe can be used.
    """
    positions = probe_positions(len(work.dataset), samples)
    shard, encode = _encode(work, positions, batch_size)
    if not shard.samples:
        reason = shard.failed[-1][1] if shard.failed else "the data set is empty"
        raise DataError(f"no sample of the probe can be used; the last one: {reason}")
    batches = list(_batches(work, shard.samples, batch_size))
    passes = list(run_shard(work, shard, batch_size))  # warm-up; also takes out what the teacher cannot do
    # Each pass ends with a copy to the CPU, so that all of it is timed.
    teacher = best_time(lambda: list(run_shard(work, shard, batch_size))) / len(shard.samples)
    plain = best_time(lambda: _run_plain(work, batches)) / len(shard.samples)
    eager, eager_batch = _time_eager(work, shard.samples, batch_size)
    with tempfile.TemporaryDirectory() as scratch:
        weighed = weigh_probe(work, Path(scratch), shard, passes)
        names = export_parts(work.teacher, Path(scratch))
        times = {
            "encode": encode,
            "teacher": teacher,
            **{name: weighed[name] for name in ("write", "shard_write")},
        }
        loop = _rehearse(work, Path(scratch) / "loop", positions, batch_size, times)
        side_bytes = sum((Path(scratch) / name).stat().st_size for name in names)
    count = len(shard.samples)
    return Probe(
        samples=count,
        failed=len(shard.failed),
        rows=sum(int((batch.labels != IGNORE_INDEX).sum()) for batch, _ in passes) / count,
        tokens=sum(map(len, shard.samples)) / count,
        side_bytes=side_bytes,
        encode=encode,
        loop=loop,
        teacher=teacher,
        plain=plain,
        eager=eager,
        eager_batch=eager_batch,
        load=load,
        teacher_parameters=sum(p.numel() for p in work.teacher.model.parameters()),
        device=_device_name(work.teacher.device),
        threads=torch.get_num_threads(),
        cores=len(os.sched_getaffinity(0)),
        **weighed,
    )


def probe_positions(total: int, samples: int) -> list[int]:
    """Where in the data set the probe lies: ``RUNS`` runs of neighbours, evenly spread.

    Args:
        total: Samples of the data set.
        samples: Most positions.
    """
    samples = min(samples, total)
    runs = min(RUNS, samples)
    positions: set[int] = set()
    for run in range(runs):
        length = samples // runs + (run < samples % runs)
        start = max(0, min(run * total // runs, total - length))
        positions |= set(range(start, start + length))
    return sorted(positions)


def _encode(work: Build, positions: list[int], batch_size: int) -> tuple[EncodedShard, float]:
    """The probe's samples, and seconds a sample; done twice, because the first time loads libraries."""
    shard, seconds = EncodedShard(index=0), 0.0
    for _ in range(2):
        shard, started = EncodedShard(index=0), time.perf_counter()
        if ANSWERS in work.codecs:
            shard = answer_shard(work, positions, index=0, batch_size=batch_size)
            return shard, (time.perf_counter() - started) / len(positions)
        for position in positions:
            try:
                shard.samples.append(work.encoder(work.dataset[position]))
            except SampleError as error:
                shard.fail(work.dataset.sample_ids[position], str(error))
        seconds = time.perf_counter() - started
    return shard, seconds / len(positions)


def _batches(work: Build, samples: list[EncodedSample], batch_size: int) -> Iterator[Batch]:
    for bucket in length_buckets([len(sample) for sample in samples], batch_size):
        yield collate([samples[index] for index in bucket], work.teacher.pad_token_id)


def _run_plain(work: Build, batches: list[Batch]) -> None:
    for batch in batches:
        output = work.teacher.run(work.teacher.prepare(batch, {"rows": batch.labels != IGNORE_INDEX}))
        output["rows"][-1:].cpu()  # waits for the device


def _time_eager(work: Build, samples: list[EncodedSample], batch_size: int) -> tuple[float | None, int]:
    """Seconds a sample with every map of every layer and head, at the largest batch that fits, and that batch."""
    teacher, longest = work.teacher, max(map(len, samples))
    if not teacher.family.is_listed:  # where its language model is, is not known
        return None, 0
    text = text_config(teacher.config)
    width = torch.finfo(getattr(torch, teacher.dtype)).bits // 8
    # Each layer keeps its map; the layer at work also has scores, mask and a float32 softmax.
    maps = (teacher.depth + 3) * int(text.num_attention_heads) * longest**2 * width
    one = maps + longest * int(text.vocab_size) * width * 2
    batch = min(batch_size, int(_free_memory(teacher.device) * MEMORY_SHARE) // one)
    if batch < 1:
        return None, 0
    language_model: Any = submodule(teacher.model, teacher.family.language_model)
    language_model.set_attn_implementation("eager")
    try:
        batches = list(_batches(work, samples, batch))
        _run_eager(work, batches[:1])  # warm-up
        seconds = best_time(lambda: _run_eager(work, batches))
    finally:
        language_model.set_attn_implementation(IMPLEMENTATION)
    return seconds / len(samples), batch


@torch.inference_mode()
def _run_eager(work: Build, batches: list[Batch]) -> None:
    dtype = getattr(torch, work.teacher.dtype)
    for batch in batches:
        teacher = work.teacher
        inputs = dict(teacher.family.model_inputs(teacher.config, batch.to(teacher.device), dtype=dtype))
        inputs["attention_mask"] = additive_mask(inputs["attention_mask"], dtype)  # eager attention adds its mask
        output = teacher.model(**inputs, use_cache=False, output_attentions=True)
        output.logits[:, -1:, -1:].cpu()  # waits for the device


@dataclass(frozen=True, kw_only=True)
class _Again:
    """The probe's samples, once for each shard of a rehearsal."""

    dataset: Dataset
    positions: list[int]

    @property
    def sample_ids(self) -> Sequence[str]:
        return [self.dataset.sample_ids[position] for position in self.positions] * SHARDS

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[self.positions[index % len(self.positions)]]


def _rehearse(work: Build, folder: Path, positions: list[int], batch_size: int, times: Mapping[str, float]) -> float:
    """Seconds a sample of the main loop, run over a few small shards; threads that want one core wait for each other.

    Args:
        work: Teacher, data and codecs.
        folder: A temporary cache.
        positions: Of the probe.
        batch_size: Samples a forward pass.
        times: Seconds of the steps alone: ``encode``, ``teacher`` and ``write`` a sample, ``shard_write`` a shard.
    """
    count = len(positions)
    if ANSWERS in work.codecs:  # the teacher writes answers before it scores them
        return times["encode"] + max(times["teacher"], times["write"])
    alone = max(times["teacher"], times["encode"] / max(1, work.workers) + times["write"])
    if times["teacher"] * count > SLOW_S:  # then the teacher is all that counts, and a rehearsal would take minutes
        return alone
    plan = replace(work.plan, sample_count=count * SHARDS, shard_size=count)
    data = _Again(dataset=work.dataset, positions=positions)
    started = time.perf_counter()
    with Writer(folder, plan, work.codecs) as writer:
        for shard in encode_shards(data, work.encoder, plan, range(SHARDS), workers=work.workers):  # type: ignore[arg-type]
            for batch, signals in run_shard(work, shard, batch_size):
                writer.add(batch, signals)
            writer.finish(shard)
    seconds = time.perf_counter() - started
    # The first shard's reading and the last one's writing have nothing to hide behind.
    ends = count * (times["encode"] + times["write"]) + times["shard_write"]
    return max(times["teacher"], (seconds - ends) / (count * SHARDS))


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
