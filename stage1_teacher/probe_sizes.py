"""How many bytes a probe's records take, by signal and in the chosen store, and how long writing them takes."""

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.manifest import BASE, Plan, read_sidecar, sidecar_path
from vlm_distill_cache.common.cache.shared_images import with_visual_source
from vlm_distill_cache.data.text.collate import Batch
from vlm_distill_cache.stage1_teacher.build.plan import Build
from vlm_distill_cache.stage1_teacher.loop.signals import TeacherSignals
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, Writer

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
            writer.add(batch, _only(signals, codecs))
        writer.finish(shard)
    files = read_sidecar(folder, 0).stored_bytes
    return files + sidecar_path(folder, 0).stat().st_size, plan


def _only(signals: TeacherSignals, codecs: Mapping[str, Any]) -> TeacherSignals:
    """Without what none of the codecs writes; signals of attention are left out by name anyway."""
    return replace(
        signals,
        logits=signals.logits if "logits" in codecs else None,
        visual_logits=signals.visual_logits if "visual_logits" in codecs else None,
        hidden={name: states for name, states in signals.hidden.items() if name in codecs},
    )
