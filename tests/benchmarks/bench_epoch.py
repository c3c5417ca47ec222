"""What a sample of an epoch costs to read, from a thousand records to a million. Part of ``make bench``.

Plan, index, manifest and sidecars describe every record. The shards of the first window of the epoch's order hold
real records, the rest are never opened: a cache of a million costs no more disk than one of ten thousand. All is in
the page cache, so it is the reader that is measured, not the disk.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_measure import Spread, Values, ratio
from vlm_distill_cache.common.cache.documents import document_bytes
from vlm_distill_cache.common.cache.layout import shard_stem
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.schema import Record
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, sidecar_path
from vlm_distill_cache.common.cache.stores import finish_shard, open_writer
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage2_student.batches.dataset import join_cache
from vlm_distill_cache.stage2_student.batches.sampler import ShardShuffle

SHARD, WINDOW = 256, 8
SIZES = {"1k": 4 * SHARD, "10k": 40 * SHARD, "100k": 400 * SHARD, "1M": 4000 * SHARD}


@dataclass
class MadeUpData:
    """Ids of a data set of which no sample is asked for."""

    count: int
    name: str = "made up"
    sample_ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.sample_ids = [sample_name(position) for position in range(self.count)]

    def __len__(self) -> int:
        return self.count


def sample_name(position: int) -> str:
    """The id of a made-up sample."""
    return f"sample/{position:08d}"


def first_window(shards: Sequence[np.ndarray]) -> np.ndarray:
    """Positions of the samples that the first window of an epoch reads, in their order, int64."""
    count = min(sum(map(len, shards)), WINDOW * SHARD)
    return ShardShuffle(shards=shards, seed=0, window=WINDOW).take(0, count)


def make_cache(folder: Path, like: Plan, records: Sequence[Record], samples: int) -> Path:
    """Write a cache of which the first window of an epoch can be read.

    Args:
        folder: To write.
        like: Its signals are the new cache's.
        records: Of such a cache, used over and over.
        samples: Of the new cache, in whole shards.
    """
    plan = replace(like, store="zarr", sample_count=samples, shard_size=SHARD)
    write_plan(folder, plan)
    ranges = [plan.shard_range(index) for index in range(plan.shard_count)]
    read = set((first_window([np.arange(part.start, part.stop) for part in ranges]) // SHARD).tolist())
    sizes = {entry.name: 1 << 20 for entry in plan.all_fields}
    for shard, places in enumerate(ranges):
        if shard in read:
            writer = open_writer(plan.store, folder, shard, plan.all_fields)
            for place in places:
                writer.append(sample_name(place), records[place % len(records)])
            finish_shard(writer)
            continue
        sidecar = ShardSidecar(
            index=shard, sample_ids=tuple(map(sample_name, places)), rows=100 * len(places), field_bytes=sizes,
            files={f"{shard_stem(shard, plan.shard_count)}zarr/zarr.json": FileEntry.of_bytes(str(shard).encode())},
        )  # fmt: skip
        sidecar_path(folder, shard).write_bytes(document_bytes(sidecar.to_dict()))
    seal(folder)
    return folder


def read_epoch(folder: Path, data: MadeUpData) -> tuple[float, float]:
    """Begin an epoch and read its first window, as training does.

    Returns:
        Seconds a sample: of opening the cache, joining it with the data and ordering the epoch, over all samples;
        and of reading, with the shards' checks and decoding, over those that were read.
    """
    started = time.perf_counter()
    cache = open_cache(folder, open_shards=2 * WINDOW)
    join = join_cache(cache, data)  # type: ignore[arg-type]
    order = first_window(join.shards).tolist()
    ordered = time.perf_counter()
    for position in order:
        cache.read(join.sample_ids[position])
    read = time.perf_counter()
    return (ordered - started) / len(data), (read - ordered) / len(order)


def bench_epoch(cache_dir: Path, folder: Path, *, rounds: int = 4) -> tuple[Values, Values]:
    """Cost a sample of caches of 1k to 1M records, in turn.

    Args:
        cache_dir: Gives signals and records.
        folder: Scratch; about 300 MB.
        rounds: Of each size, after one to warm up.

    Returns:
        Ratios, and figures.
    """
    source = open_cache(cache_dir)
    records = [source.read_stored(sample_id) for sample_id in source.shard_sample_ids(0)]
    caches = {
        name: (make_cache(folder / name, source.plan, records, samples), MadeUpData(samples))
        for name, samples in SIZES.items()
    }
    beginning: dict[str, list[float]] = {name: [] for name in SIZES}
    whole: dict[str, list[float]] = {name: [] for name in SIZES}
    for turn in range(rounds + 1):
        for name, (path, data) in caches.items():
            begins, reads = read_epoch(path, data)
            if turn:
                beginning[name].append(begins)
                whole[name].append(begins + reads)
    figures: Values = {}
    for name in SIZES:
        figures[f"epoch of {name} records, us a sample"] = Spread.of(1e6 * each for each in whole[name])
    figures["of which opening, joining, ordering 1M, us a sample"] = Spread.of(1e6 * each for each in beginning["1M"])
    return {"epoch of 1M records / of 1k, a sample": ratio(whole["1M"], whole["1k"])}, figures
