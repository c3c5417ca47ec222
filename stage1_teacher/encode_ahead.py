"""Reading, decoding and tokenising ahead of the teacher, in processes of their own.

A thread would do for the work, but not for the teacher: whoever runs Python holds the interpreter's lock, and the
thread that drives the teacher needs it back after each of its operations. Encoding in a thread was seen to cost the
built-in teacher more time than encoding takes, and a GPU waits for its next kernel in the same way.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from common.errors import DistillError, ProcessFailedError, SampleError
from common.manifest import Plan
from data.encoding import EncodedSample, SampleEncoder
from data.sample import Dataset
from stage1_teacher.pipeline import EncodedShard, run_ahead

SHARDS_AHEAD = 1
CHUNK = 16  # samples that a process hands over at a time

Made = EncodedSample | DistillError | OSError


@dataclass(frozen=True, kw_only=True, eq=False)
class _Samples(TorchDataset[Made]):
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
        made.close()  # ends the processes


def _encode(samples: _Samples, ranges: Sequence[range], workers: int) -> Generator[Made]:
    """All samples of some ranges, in order."""
    if not workers:
        for positions in ranges:
            yield from map(samples.__getitem__, positions)
        return
    chunks = [
        list(positions[start : start + CHUNK])
        for positions in ranges
        for start in range(0, len(positions), CHUNK)
    ]
    largest = -(-max(map(len, ranges)) // CHUNK)
    loader = DataLoader(
        samples,
        batch_sampler=chunks,
        num_workers=workers,
        prefetch_factor=max(2, -(-largest // workers)),  # all processes together: a shard
        collate_fn=list,
        multiprocessing_context="fork",  # at once, and nothing has to be pickled; no process touches a GPU
    )
    try:
        for chunk in loader:
            yield from chunk
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):  # raised in a process, not about one
            raise
        raise ProcessFailedError(
            f"a process that reads and encodes the data ended: {error}. If nobody stopped it, memory ran out: use fewer "
            "of them, make teacher-cache CACHE_SET=num_workers=1 (0: none), with otherwise the same options; finished "
            "shards are kept"
        ) from error
