"""Reading, decoding and tokenising ahead of the teacher, in processes of their own.

A thread would do for the work, but not for the teacher: whoever runs Python holds the interpreter's lock, and the
thread that drives the teacher needs it back after each of its operations. Encoding in a thread was seen to cost the
built-in teacher more time than encoding takes, and a GPU waits for its next kernel in the same way.

Each process writes to a pipe of its own, which breaks when either side dies. A queue that processes share (torch's
DataLoader, Python's executors) waits for ever for the rest of what a killed process was writing.
"""

import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess

import torch

from common.errors import DistillError, ProcessFailedError, SampleError
from common.manifest import Plan
from data.encoding import EncodedSample, SampleEncoder
from data.sample import Dataset
from stage1_teacher.pipeline import EncodedShard, run_ahead

SHARDS_AHEAD = 1
CHUNK = 16  # samples that a process hands over at a time

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


def encode_shards(
    dataset: Dataset, encoder: SampleEncoder, plan: Plan, todo: Sequence[int], *, workers: int
) -> Iterator[EncodedShard]:
    """Encode shards ahead of the consumer.

    Args:
        dataset: The data.
        encoder: From a sample to the teacher's input.
        plan: The partition into shards.
        todo: Shards wanted.
        workers: Processes that encode; 0: a thread of this one.

    Raises:
        DistillError: What the data set raised; or `ProcessFailedError`, if a process was killed.
    """
    ranges = [plan.shard_range(index) for index in todo]
    made = _encode(_Samples(dataset=dataset, encoder=encoder), ranges, workers)

    def assemble(index: int) -> EncodedShard:
        shard = EncodedShard(index=index)
        for position in plan.shard_range(index):
            sample = next(made)
            if isinstance(sample, EncodedSample):
                shard.samples.append(sample)
            elif isinstance(sample, SampleError):
                shard.fail(dataset.sample_ids[position], str(sample))
            else:
                raise sample
        return shard

    try:
        yield from run_ahead(assemble, todo, count=SHARDS_AHEAD, name="encode")
    finally:
        # Still at work after a second Ctrl-C, which waits for no thread: processes then end with this one.
        with suppress(ValueError):
            made.close()  # ends the processes


def _encode(samples: _Samples, ranges: Sequence[range], workers: int) -> Generator[Made]:
    """All samples of some ranges, in order."""
    chunks = [
        positions[start : start + CHUNK] for positions in ranges for start in range(0, len(positions), CHUNK)
    ]
    if not workers or multiprocessing.current_process().daemon:  # which may have no processes of its own
        for positions in chunks:
            yield from map(samples.__getitem__, positions)
        return
    fork = multiprocessing.get_context("fork")  # at once, and nothing is pickled; no process touches a GPU
    processes: list[ForkProcess] = []
    connections: list[Connection] = []
    try:
        for first in range(min(workers, len(chunks))):
            here, there = fork.Pipe(duplex=False)
            connections.append(here)
            arguments = (samples, chunks[first::workers], there, tuple(connections))
            process = fork.Process(target=_send_chunks, args=arguments, daemon=True)
            process.start()
            processes.append(process)
            there.close()
        for number in range(len(chunks)):
            yield from _receive(processes[number % workers], connections[number % workers])
    finally:
        for process, connection in zip(processes, connections, strict=False):
            process.terminate()
            process.join()
            connection.close()


def _send_chunks(
    samples: _Samples, chunks: Sequence[range], there: Connection, others: Sequence[Connection]
) -> None:
    """Encode chunks and hand them over; a full pipe holds this process up."""
    # The parent stops this process, also when it is told to stop itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    for connection in others:  # else no pipe would break when the parent is gone
        connection.close()
    try:
        for positions in chunks:
            there.send([samples[position] for position in positions])
    except BrokenPipeError:
        os._exit(1)


def _receive(process: ForkProcess, connection: Connection) -> list[Made]:
    try:
        made: list[Made] = connection.recv()
    except (EOFError, OSError) as error:
        process.join()
        code = process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        raise ProcessFailedError(
            f"a process that reads and encodes the data {how}. If nobody stopped it, memory ran out: use fewer of them, "
            "make teacher-cache CACHE_SET=num_workers=1 (0: none) with otherwise the same options; finished shards are kept"
        ) from error
    return made
