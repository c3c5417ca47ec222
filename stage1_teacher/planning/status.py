"""How far a build is, and who works on it: what ``teacher-cache status`` says. Needs no torch, and changes nothing."""

import time
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from vlm_distill_cache.common.cache.manifest import format_ranges, read_manifest, refuse_other_plan
from vlm_distill_cache.common.cache.plan import Plan, read_plan
from vlm_distill_cache.common.cache.side_files import MANIFEST
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.stage1_teacher.planning.leases import BEAT_S, SEAL, Leases, Worker

SIGNS_S = 2.5 * BEAT_S  # for which workers of other machines are looked at

State = Literal["works", "ended", "gone", "silent"]


@dataclass(frozen=True, kw_only=True)
class WorkerStatus:
    """One worker of a queue.

    Attributes:
        state: ``gone``: killed; ``silent``: on another machine, and without a sign of life while it was looked at.
        made: Shards that it has finished.
        making: Shards that it has and are missing; of a worker that is not alive they are free.
        seals: It is sealing the cache.
    """

    worker: Worker
    state: State
    made: int
    making: tuple[int, ...]
    seals: bool = False


@dataclass(frozen=True, kw_only=True)
class CacheStatus:
    """How far a cache is.

    Attributes:
        shards: In all.
        missing: Those that are not there.
        samples: In all.
        samples_left: Of the shards that are missing.
        damage: Why a manifest that is there is of no use; None: it is, or there is none.
        workers: Those that took shards from a queue since the cache was begun; none once it is sealed.
    """

    cache: Path
    sealed: bool
    shards: int
    missing: tuple[int, ...]
    samples: int
    samples_left: int
    damage: str | None
    workers: tuple[WorkerStatus, ...]

    @property
    def leased(self) -> int:
        """Shards that a worker is making."""
        return sum(len(entry.making) for entry in self.workers if entry.state == "works")

    @property
    def rate(self) -> float:
        """Samples a second of all workers that are alive."""
        return sum(entry.worker.rate for entry in self.workers if entry.state == "works")

    @property
    def seconds_left(self) -> float | None:
        """Until all shards are there, at this rate; None: not known."""
        return self.samples_left / self.rate if self.rate else None


def cache_status(cache_dir: Path) -> CacheStatus:
    """Look how far a cache is; for up to `SIGNS_S` seconds where workers of other machines are to be looked at.

    Raises:
        CacheFormatError: If the folder is no cache, saying what it looks like.
        ConfigError: If something else is in the place of leases.
    """
    plan = read_plan(cache_dir)
    leases = Leases(cache_dir)
    states = _states(leases)
    sealed, damage = _manifest_state(cache_dir, plan)  # before the shards: a build that goes on only adds some
    missing = dict.fromkeys(missing_shards(cache_dir, plan))
    had = {of: leases.holder(lease) for of, lease in leases.newest().items()}
    made = Counter(name for of, name in had.items() if of != SEAL and int(of) not in missing)
    making: dict[str, list[int]] = {}
    for index in missing:
        if (name := had.get(f"{index:05d}")) is not None:
            making.setdefault(name, []).append(index)
    workers = tuple(
        WorkerStatus(
            worker=worker,
            state=state,
            made=made[worker.name],
            making=tuple(making.get(worker.name, ())),
            seals=had.get(SEAL) == worker.name and not sealed,
        )
        for worker, state in states
    )
    return CacheStatus(
        cache=cache_dir,
        sealed=sealed and not missing,
        shards=plan.shard_count,
        missing=tuple(missing),
        samples=plan.sample_count,
        samples_left=sum(len(plan.shard_range(index)) for index in missing),
        damage=damage,
        workers=workers,
    )


def _manifest_state(cache_dir: Path, plan: Plan) -> tuple[bool, str | None]:
    """Whether there is a manifest that can be read and is this plan's, and what is wrong with one that is not."""
    if not (cache_dir / MANIFEST).is_file():
        return False, None
    try:
        refuse_other_plan(read_manifest(cache_dir), plan, str(cache_dir))
    except CacheFormatError as error:
        return False, str(error)
    return True, None


def _states(leases: Leases) -> list[tuple[Worker, State]]:
    """All workers, and whether they are alive: told by a lock, or else by a change of their files."""
    found: dict[str, tuple[Worker, State]] = {}
    unknown: dict[str, Worker] = {}
    for worker in leases.workers():
        if leases.is_dead(worker):
            found[worker.name] = worker, "ended" if worker.ended else "gone"
        elif leases.sees_locks_of(worker):
            found[worker.name] = worker, "works"
        else:
            unknown[worker.name] = worker
    until = time.monotonic() + SIGNS_S
    while unknown and time.monotonic() < until:
        time.sleep(BEAT_S / 10)
        for name in [*unknown]:
            now = leases.worker(name) or unknown[name]
            if now != unknown[name]:
                del unknown[name]
                found[name] = now, "ended" if now.ended else "works"
    for name, worker in unknown.items():
        found[name] = worker, "silent"
    return [found[name] for name in sorted(found)]


def status_values(status: CacheStatus) -> dict[str, Any]:
    """How far a cache is, for programs."""
    done, left = status.shards - len(status.missing), len(status.missing) - status.leased
    return {
        "cache": status.cache,
        "sealed": status.sealed,
        "damage": status.damage,
        "shards": {"all": status.shards, "done": done, "leased": status.leased, "left": left},
        "samples": {"all": status.samples, "done": status.samples - status.samples_left},
        "samples_per_second": status.rate,
        "seconds_left": status.seconds_left,
        "workers": [
            {
                "host": entry.worker.host,
                "pid": entry.worker.pid,
                "since": _utc(entry.worker.began),
                "state": entry.state,
                "shards": entry.made,
                "leased": entry.making,
                "seals": entry.seals,
                "samples": entry.worker.samples,
                "samples_per_second": entry.worker.rate,
            }
            for entry in status.workers
        ],
    }


def status_text(status: CacheStatus) -> str:
    """How far a cache is: one line for all, then one for each worker."""
    values = status_values(status)
    counts = values["shards"]
    if status.sealed:
        return f"{status.cache}: sealed, {counts['all']} shards, {status.samples} samples"
    lines = [
        f"{status.cache}: {counts['done']} of {counts['all']} shards done, {counts['leased']} leased, {counts['left']} left"
        f"{_speed(status)}; not sealed"
    ]
    lines += [f"  {_worker_text(entry)}" for entry in status.workers]
    if status.damage is not None:
        lines.append(f"  {status.damage}")
    if not any(entry.state == "works" for entry in status.workers):
        lines.append(
            "  no worker of a queue is at work (builds of one process, and parts R/N, are not listed); `teacher-cache build "
            "--part any` with the cache's options goes on"
        )
    return "\n".join(lines)


def _speed(status: CacheStatus) -> str:
    if status.seconds_left is None:
        return ""
    left = f", {_duration(status.seconds_left)} left" if status.missing else ""
    return f", {status.rate:.3g} samples/s{left}"


def _worker_text(entry: WorkerStatus) -> str:
    worker = entry.worker
    numbers = format_ranges(entry.making)
    doing = {
        "works": f"makes {numbers}" if numbers else "seals the cache" if entry.seals else "waits for the others",
        "ended": "has ended",
        "gone": "was killed",
        "silent": f"gave no sign of life for {SIGNS_S:.0f} s",
    }[entry.state]
    if entry.state != "works" and numbers:
        doing += f"; {numbers} will be taken over"
    return (
        f"{one_line(worker.host)}, process {worker.pid}, since {_utc(worker.began)}: {entry.made} shards, "
        f"{worker.rate:.3g} samples/s, {doing}"
    )


def _utc(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return "?"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
