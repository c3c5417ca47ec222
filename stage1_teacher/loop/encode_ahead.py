"""Reading, decoding and tokenising ahead of the teacher, in processes of their own.

A thread could do the work, but would slow the teacher down: it holds the interpreter's lock while it runs, and the
thread that drives the teacher needs it back after each of its operations. Encoding in a thread was seen to cost the
built-in teacher more time than encoding takes, and a GPU waits for its next kernel in the same way.

Each process writes to a pipe of its own, which breaks when either side dies. A queue that processes share (torch's
DataLoader, Python's executors) waits for ever for the rest of what a killed process was writing.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.errors import DistillError, ProcessFailedError, SampleError
from vlm_distill_cache.common.terminal.command_line import end_with_parent
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder
from vlm_distill_cache.stage1_teacher.loop.spool import Spool
from vlm_distill_cache.stage1_teacher.loop.work import told
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard, run_ahead

SHARDS_AHEAD = 1
CHUNK = 16  # samples that a process hands over at a time
FEW_SAMPLES = 512  # for fewer no process is worth its start
_forking = threading.Lock()  # a process forked meanwhile would hold the pipe of another one open

Made = EncodedSample | DistillError | OSError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Samples:
    """Encoded samples by position; what went wrong is an item too, so that it crosses processes as it is."""

    dataset: Dataset
    encoder: SampleEncoder

    def __getitem__(self, position: int) -> Made:
        try:
            return self.encoder(self.dataset[position])
        except (DistillError, OSError) as error:
            return error
        except Exception as error:
            error.add_note(f"at {self.named(position)}")
            raise

    def named(self, position: int) -> str:
        """Which sample it is, for errors."""
        ids = getattr(self.dataset, "sample_ids", None)
        return f"entry {position} of the data" if ids is None else f"sample {ids[position]!r}"


def count_workers(wanted: int, device: torch.device, samples: int) -> int:
    """How many processes read and encode ahead of a teacher; 0: a thread does.

    A picture of 640 x 480 pixels takes one process about 20 ms, a teacher on a GPU takes a sample in less.

    Args:
        wanted: The number, of which there are no more than cores; or -1 for an automatic one.
        device: The teacher's; on a CPU its arithmetic has all cores but one.
    """
    if multiprocessing.current_process().daemon:  # may have no processes of its own
        return 0
    if wanted < 0:
        wanted = 0 if samples < FEW_SAMPLES else 4 if device.type == "cuda" else 1
    return min(wanted, len(os.sched_getaffinity(0)))


def encode_shards(
    dataset: Dataset,
    encoder: SampleEncoder,
    plan: Plan,
    todo: Iterable[int],
    *,
    workers: int,
    scratch: Path | None = None,
) -> Iterator[EncodedShard]:
    """Encode shards ahead of the consumer; what is being encoded is dropped when the consumer stops.

    Args:
        todo: Their numbers; the next one is asked for when the consumer begins with the one before it.
        workers: Processes that encode; 0: a thread of this one.
        scratch: Folder where pixels of large shards wait; None: they do in memory.

    Raises:
        DistillError: What the data set raised; or `ProcessFailedError`, if a process was killed.
    """
    samples = _Samples(dataset=dataset, encoder=encoder)
    processes = _Processes(samples, workers)
    stopped = threading.Event()

    def numbered() -> Iterator[tuple[int, int]]:
        """Shards, and the number of the first chunk of each; processes learn of one as soon as it is known."""
        first = 0
        for index in todo:
            processes.ask(first, plan.shard_range(index))
            yield index, first
            first += len(_chunks(plan.shard_range(index)))

    def encode(index: int, first: int) -> Iterator[Made]:
        for number, positions in enumerate(_chunks(plan.shard_range(index)), first):
            for made in processes.receive(number) if workers else map(samples.__getitem__, positions):
                if stopped.is_set():
                    raise ProcessFailedError("encoding was stopped")
                yield made

    def assemble(numbers: tuple[int, int]) -> EncodedShard:
        shard, spool = EncodedShard(index=numbers[0]), Spool(scratch)
        for position, made in zip(plan.shard_range(shard.index), encode(*numbers), strict=True):
            if isinstance(made, EncodedSample):
                shard.samples.append(spool.put_away(made))
            elif isinstance(made, SampleError):
                shard.fail(dataset.sample_ids[position], str(made))
            else:
                with told(samples.named(position)):
                    raise made
        return shard

    def stop() -> None:
        stopped.set()
        processes.kill()

    try:
        processes.start()
        yield from run_ahead(assemble, numbered(), count=SHARDS_AHEAD, name="encode", stop=stop)
    finally:
        processes.kill()
        processes.close()


def _chunks(positions: range) -> list[range]:
    return [positions[start : start + CHUNK] for start in range(0, len(positions), CHUNK)]


class _Processes:
    """Processes that take chunks in turn, and hand them over by a pipe each."""

    def __init__(self, samples: _Samples, count: int) -> None:
        self._samples, self._count = samples, count
        self._running: list[tuple[ForkProcess, Connection]] = []

    def start(self) -> None:
        """Start them; those that did start before an error are running."""
        fork = multiprocessing.get_context("fork")  # at once, and nothing is pickled; no process touches a GPU
        for rank in range(self._count):
            with _forking:
                here, there = fork.Pipe()
                with there:
                    arguments = (self._samples, rank, self._count, there)
                    process = fork.Process(target=_send_chunks, args=arguments, daemon=True)
                    process.start()
            self._running.append((process, here))

    def ask(self, first: int, positions: range) -> None:
        """Tell all of them of a shard, whose chunks are numbered from ``first``."""
        for _, connection in self._running:
            with contextlib.suppress(OSError):  # it has ended, which who waits for its chunk is told
                connection.send((first, positions))

    def receive(self, number: int) -> list[Made]:
        """Wait for a chunk; they are to be asked for in order.

        Raises:
            ProcessFailedError: If its process has ended.
        """
        process, connection = self._running[number % self._count]
        try:
            made: list[Made] = connection.recv()
        except (EOFError, OSError) as error:
            process.join()
            code = process.exitcode or 0
            how = f"ended with exit code {code}; what it printed is above. Fix that, then run the same command again"
            if code < 0:
                how = (
                    f"was killed by {signal.Signals(-code).name}. If nobody did that, memory ran out: use fewer of them, "
                    "run the same command with num_workers=1 (0: none; make: in CACHE_SET, teacher-cache build: --set)"
                )
            raise ProcessFailedError(
                f"a process that reads and encodes the data {how}; finished shards are kept"
            ) from error
        return made

    def kill(self) -> None:
        """Kill them at once, hanging ones too; they hold nothing that needs cleaning up."""
        for process, _ in self._running:
            process.kill()

    def close(self) -> None:
        """Wait for their end."""
        for process, connection in self._running:
            process.join()
            connection.close()


def _send_chunks(samples: _Samples, rank: int, count: int, there: Connection) -> None:
    """Encode this process's chunks of each shard and hand them over; a full pipe holds it up."""
    end_with_parent()
    # The parent stops this process, also when it is told to stop itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    while True:
        first, positions = there.recv()
        for number, chunk in enumerate(_chunks(positions), first):
            if number % count == rank:
                there.send([samples[position] for position in chunk])
