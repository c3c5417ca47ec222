"""Several processes on one cache: which shards each takes, and how ``--nproc`` starts and watches them.

Part R of N takes shard i if ``i % N == R``, and waits for nobody. Part ``any`` takes the next free shard (``leases``), and
so do the processes of ``--nproc`` and of a launcher. Either way the plan says what there is to do, the sidecars say what
is done, and publishing is create-only, so that two processes on one shard by mistake cost time and nothing else.

The arithmetic of a CPU depends on its number of threads, and all arithmetic on how many samples are in a batch. A
cache's plan keeps both numbers, every process that builds or resumes it takes them from there, and so the bytes do not
depend on how many processes there are or how much memory each has.

Torch is imported where it is used, so that a command that is refused, or a process that fails, does so at once.
"""

import importlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlm_distill_cache.common.cache.plan import RANKS, THREADS
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal.command_line import leave_one_core
from vlm_distill_cache.common.terminal.launch import Launch
from vlm_distill_cache.common.terminal.processes import run_processes
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors, stored_plan

logger = logging.getLogger(__name__)

MAX_PROCESSES = 4096


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of several processes that share a cache's shards.

    Attributes:
        rank: Which, from 0.
        of: How many there are.
        takes_all: Works on every missing shard, from the last one on, instead of on its own.
        queued: Takes whichever shard is free, beside any number of others that do.
    """

    rank: int = 0
    of: int = 1
    takes_all: bool = False
    queued: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.of <= MAX_PROCESSES:
            raise ConfigError(
                f"part {self.rank}/{self.of}: expected R/N with 0 <= R < N <= {MAX_PROCESSES}; parts count from 0"
            )

    def __str__(self) -> str:
        return "any" if self.queued else f"{self.rank}/{self.of}"

    @property
    def is_whole(self) -> bool:
        """Whether no other process is to be expected."""
        return self.of == 1 and not self.queued

    def share(self, missing: Sequence[int]) -> list[int]:
        """The missing shards that this process builds, in its order."""
        if self.takes_all:
            return list(reversed(missing))
        return [index for index in missing if index % self.of == self.rank]

    def for_resume(self, missing: Sequence[int]) -> "Part":
        """This part; but one that finds its own shards finished when it begins builds what others left."""
        return self if self.share(missing) else replace(self, takes_all=self.of > 1)

    def split(self, processes: int) -> list["Part"]:
        """Share this part's shards among local processes."""
        rank, of = (0, 1) if self.takes_all else (self.rank, self.of)
        return [Part(rank=rank + of * local, of=of * processes) for local in range(processes)]


WHOLE = Part()
ANY = Part(queued=True)


def parse_part(text: str) -> Part:
    """Read ``R/N`` or ``any``."""
    if text == str(ANY):
        return ANY
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if match is None:
        raise ConfigError(
            f"part {text!r}: expected R/N, for example 0/4 for the first of four processes, or any, for whichever shard is free"
        )
    return Part(rank=int(match[1]), of=int(match[2]))


def choose_part(text: str | None, launch: Launch) -> tuple[Part, int]:
    """Find out which part this process is: as ``--part`` says; else of a queue if a launcher says that there are several.

    Returns:
        The part, and its rank among the processes of this machine.
    """
    if text is not None:
        return parse_part(text), launch.local
    if launch.size == 1:
        return WHOLE, 0
    logger.info(
        "one of %d processes, as %s says (%s): each takes the next free shard of a folder that all share; where they do not "
        "share it, give each its --part R/N",
        launch.size,
        launch.launcher,
        ", ".join(launch.names),
    )
    return ANY, launch.local


def local_device(device: str, local: int) -> str:
    """The device of the ``local``-th process of a machine: its own GPU where there are several."""
    if device not in ("auto", "cuda"):
        return device

    import torch

    if torch.cuda.device_count() > 1:
        return f"cuda:{local % torch.cuda.device_count()}"
    return device


def uses_gpu(config: BuildConfig) -> bool:
    """Whether the teacher runs on a GPU."""
    import torch

    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


def refuse_shared_gpus(config: BuildConfig, processes: int) -> None:
    """Refuse more processes than GPUs: each finds its batch size as if the memory of its GPU were its own.

    Raises:
        ConfigError: With both numbers.
    """
    if processes == 1 or not uses_gpu(config):
        return

    import torch

    here = 1 if ":" in config.device else torch.cuda.device_count()
    if processes > here:
        named = f"device={config.device} is one" if ":" in config.device else f"{here} are here"
        raise ConfigError(
            f"--nproc {processes}: each process has a GPU of its own, and {named}; start as many at most, or set device=cpu. "
            "To share a GPU all the same, start the parts by hand (--part R/N), with a batch_size of which all fit"
        )


def fix_threads(config: BuildConfig, *, several: bool, overwrite: bool = False) -> BuildConfig:
    """Set torch's threads, and return the configuration with the number that the plan is to keep.

    The number is ``threads`` if given, else that of the cache that is there, else ``OMP_NUM_THREADS``; else one
    for each of several processes, whatever their number, and all cores but one for a single process. On CUDA no
    number is kept, for none of the arithmetic is the CPU's.

    Args:
        several: Other processes work on this cache, here or on other machines.
    """
    import torch

    stored = None if overwrite else stored_plan(Path(config.cache))
    kept = config.threads
    if not kept and stored is not None:
        kept = int(stored.extra.get(THREADS, 0))
    if kept:
        torch.set_num_threads(kept)
        cores = len(os.sched_getaffinity(0))
        if kept > cores:
            logger.warning("computing with %d threads on %d cores, as this cache's plan says", kept, cores)
    elif several and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    else:
        leave_one_core()
    if not kept and stored is None and not uses_gpu(config):
        kept = torch.get_num_threads()
    return replace(config, threads=kept)


def fix_batch_size(config: BuildConfig, *, overwrite: bool = False) -> BuildConfig:
    """Return the configuration with the batch size of the cache that is there, unless one is given.

    Args:
        config: The options; without a cache an automatic batch size stays automatic.
    """
    stored = None if overwrite or config.batch_size else stored_plan(Path(config.cache))
    return config if stored is None else replace(config, batch_size=stored.batch_size)


def fix_ranks(config: BuildConfig, *, overwrite: bool = False) -> BuildConfig:
    """Return the configuration with the ranks that hold the teacher together as in the cache that is there, unless given."""
    stored = None if overwrite or config.tensor_parallel else stored_plan(Path(config.cache))
    return config if stored is None else replace(config, tensor_parallel=int(stored.extra.get(RANKS, 0)))


def choose_ranks(config: BuildConfig, processes: int | None, launch: Launch, *, overwrite: bool) -> int:
    """How many processes hold the teacher together (`fix_ranks`).

    Args:
        processes: Of ``--nproc``, if it was given.

    Raises:
        ConfigError: If those, or the launcher's, are no whole groups.
    """
    config = fix_ranks(config, overwrite=overwrite)
    ranks = max(1, config.tensor_parallel)
    if processes is not None and launch.size > 1 and ranks > 1:
        raise ConfigError(
            f"--nproc {processes} with tensor_parallel={ranks}: {launch.launcher} has started the processes; leave --nproc out"
        )
    count_workers(config, processes or ranks)
    return ranks


def refuse_ranks(config: BuildConfig, command: str) -> None:
    """Refuse several ranks in a command that times one process.

    Raises:
        ConfigError: With what says as much.
    """
    if config.tensor_parallel > 1:
        raise ConfigError(
            f"tensor_parallel={config.tensor_parallel}: `teacher-cache {command}` measures a teacher that one process holds; build "
            "a cache of a few samples (--limit 200) in a folder of its own, which says what it takes (`teacher-cache report`)"
        )


def count_workers(config: BuildConfig, processes: int) -> int:
    """How many workers so many processes are, of which some hold a teacher together.

    Raises:
        ConfigError: If they do not come out even.
    """
    ranks = max(1, config.tensor_parallel)
    if processes % ranks:
        raise ConfigError(
            f"--nproc {processes} with tensor_parallel={ranks}: so many processes hold one teacher; give --nproc a multiple of "
            f"{ranks}, or leave it out for one teacher"
        )
    return processes // ranks


def run_parts(
    target: Callable[[BuildConfig, Part], None], config: BuildConfig, parts: Sequence[Part], on_wait: Callable[[], None]
) -> None:
    """Run ``target`` in one fresh process for each part, and wait for all of them.

    Args:
        target: Function of a module, of the options and a part.
        config: The options; each process gets a GPU of its own where there are several, or as many as its teacher has ranks.
        on_wait: Called about once a second.

    Raises:
        ProcessFailedError: With the first failure as its process tells it; the others are stopped.
    """
    jobs = []
    for local, part in enumerate(parts):
        own = replace(config, device=local_device(config.device, local * max(1, config.tensor_parallel)))
        name = f"process {local + 1} of {len(parts)}" if part.queued else f"part {part}"
        jobs.append((name, (target.__module__, target.__name__, own, part)))
    run_processes(_run_part, jobs, on_wait=on_wait, kept="finished shards are kept")


def _run_part(module: str, target: str, config: BuildConfig, part: Part) -> None:
    with explain_disk_errors(config.cache):
        getattr(importlib.import_module(module), target)(config, part)
