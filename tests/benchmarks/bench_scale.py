"""A cache of a million records: opening it, finding samples, what memory it takes. Part of ``make bench``.

The caches are described, not filled: sidecars, manifest and index are real, shard files are never opened. Each
figure is a median with a warm page cache; memory is read from ``/proc`` in fresh processes.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.benchmarks.bench_measure import Spread, Values, median_seconds, scaled
from vlm_distill_cache.common.cache.documents import document_bytes
from vlm_distill_cache.common.cache.layout import shard_stem
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.sidecar import FileEntry, ShardSidecar, sidecar_path
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.opening import open_cache

MILLION = 1_000_000
LOOKUPS = (1_000, 10_000, 100_000, 1_000_000)

_MEMORY = """
import json, sys, time
from pathlib import Path
def status(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name + ":"))
    return int(line.split()[1]) / 1000
"""
_OPEN_AND_LOOK_UP = """
from vlm_distill_cache.common.opening import open_cache
cache = open_cache(Path(sys.argv[1]))
found = [cache.shard_of(f"sample/{i * (len(cache) // 1000):08d}") for i in range(1000)]
print(json.dumps({"private": status("RssAnon"), "all": status("VmRSS")}))
"""
_JOIN = """
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.stage2_student.batches.dataset import join_cache
cache = open_cache(Path(sys.argv[1]))
class Data:
    name = "made up"
    sample_ids = [f"sample/{i:08d}" for i in reversed(range(len(cache)))]
    __len__ = lambda self: len(self.sample_ids)
before, started = status("VmHWM"), time.perf_counter()
join = join_cache(cache, Data())
seconds = time.perf_counter() - started
assert join.sample_ids[0] == "sample/00000000" and len(join.places) == len(cache)
print(json.dumps({"seconds": seconds, "peak": status("VmHWM") - before}))
"""
_SEAL = """
from vlm_distill_cache.common.cache.layout import shard_stem
from vlm_distill_cache.common.cache.manifest import seal
before, started = status("VmHWM"), time.perf_counter()
seal(Path(sys.argv[1]))
print(json.dumps({"seconds": time.perf_counter() - started, "peak": status("VmHWM") - before}))
"""


def describe_cache(folder: Path, samples: int, shard_size: int) -> Path:
    """Write plan and sidecars of a cache without records, and seal it."""
    codec = LogitCodec.from_preset("default")
    plan = Plan(
        store="webdataset",
        sample_count=samples,
        shard_size=shard_size,
        signals={"logits": codec.to_dict()},
        fields={"logits": codec.fields()},
        fingerprints={"data": "0" * 32},
    )
    write_plan(folder, plan)
    sizes = {field.name: 1 << 20 for field in plan.all_fields}
    for shard in range(plan.shard_count):
        sidecar = ShardSidecar(
            index=shard,
            sample_ids=tuple(f"sample/{position:08d}" for position in plan.shard_range(shard)),
            rows=100 * len(plan.shard_range(shard)),
            field_bytes=sizes,
            files={f"{shard_stem(shard, plan.shard_count)}tar": FileEntry.of_bytes(str(shard).encode())},
        )
        path = sidecar_path(folder, shard)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(document_bytes(sidecar.to_dict()))
    seal(folder)
    return folder


def in_fresh_processes(script: str, folder: Path, rounds: int) -> dict[str, list[float]]:
    """What several runs of a script that prints a JSON object of numbers say, by name."""
    command = [sys.executable, "-c", _MEMORY + script, str(folder)]
    runs = [
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(rounds)
    ]
    return {name: [float(run[name]) for run in runs] for name in runs[0]}


def bench_scale(folder: Path, *, rounds: int = 3) -> tuple[Values, Values]:
    """Measure opening, finding, joining, sealing, and the memory they take.

    Args:
        folder: Scratch; about 250 MB.
        rounds: Fresh processes of each sort.

    Returns:
        Ratios and figures.
    """
    small = describe_cache(folder / "small", MILLION // 100, 256)
    many = describe_cache(folder / "many", MILLION, 256)
    few = describe_cache(folder / "few", MILLION, 4096)
    figures: Values = {
        "open 1M records, 3,907 shards, ms": scaled(1e3, median_seconds(lambda: open_cache(many), 21)),
        "open 1M records, 245 shards, ms": scaled(1e3, median_seconds(lambda: open_cache(few), 21)),
        "open 10k records, 40 shards, ms": scaled(1e3, median_seconds(lambda: open_cache(small), 21)),
    }
    look_ups = bench_look_ups(many)
    figures |= look_ups
    memory = {path: in_fresh_processes(_OPEN_AND_LOOK_UP, path, rounds) for path in (small, many)}
    join, sealing = in_fresh_processes(_JOIN, many, rounds), in_fresh_processes(_SEAL, many, rounds)
    for kind in ("private", "all"):
        figures[f"{kind} memory, 1M against 10k records, MB more"] = Spread.of(
            large - little for large, little in zip(memory[many][kind], memory[small][kind], strict=True)
        )
    for name, seen in (("join 1M ids with a data set", join), ("seal 1M records", sealing)):
        figures[f"{name}, s"] = Spread.of(seen["seconds"])
        figures[f"{name}, peak MB"] = Spread.of(seen["peak"])
    once, often = (look_ups[f"find one of 1M samples, {count:,} times, us each"] for count in (LOOKUPS[0], LOOKUPS[-1]))
    return {"look-up: 1M times / 1k times, each": often.median / once.median}, figures


def bench_look_ups(folder: Path) -> dict[str, Spread]:
    """Microseconds a sample, in random order, one at a time and all at once."""
    cache = open_cache(folder)
    order = [f"sample/{i:08d}" for i in np.random.default_rng(0).permutation(MILLION).tolist()]
    figures = {}
    for count in LOOKUPS:
        chosen = order[:count]

        def look_up(chosen: list[str] = chosen) -> None:
            for sample_id in chosen:
                cache.shard_of(sample_id)

        seconds = median_seconds(look_up, max(3, min(21, 100_000 // count)))
        figures[f"find one of 1M samples, {count:,} times, us each"] = scaled(1e6 / count, seconds)
    seconds = median_seconds(lambda: cache.positions(order), 3)
    return {**figures, "find 1M samples at once, us each": scaled(1e6 / MILLION, seconds)}
