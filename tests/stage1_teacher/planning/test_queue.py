"""Workers that take shards from a queue: each shard once, the bytes of one process, whoever joins, leaves or is killed."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.stage1_teacher import extract as extracting
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import BuildSummary, extract
from vlm_distill_cache.stage1_teacher.planning.leases import LEASES, Leases
from vlm_distill_cache.stage1_teacher.planning.parts import ANY, Part

COUNT = 5  # shards


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(autouse=True)
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def config(tiny_llava: Path):
    def options(cache: Path) -> BuildConfig:
        return BuildConfig(
            cache=str(cache), teacher=str(tiny_llava), template="short", limit=2 * COUNT, shard_size=2, batch_size=2,
            fidelity_samples=1, signals=("logits",), threads=1, store="webdataset",
        )  # fmt: skip

    return options


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory) -> dict[str, bytes]:
    """What one process makes."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    extract(config(cache))
    return tree(cache)


@pytest.fixture
def workers(config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts workers of one cache: threads here, which see each other as processes do. Returns their summaries to come.

    Before each shard a worker calls what it was given.
    """
    one_by_one, begin, run_shard = threading.Lock(), extracting.begin, extracting.run_shard
    befores: dict[int, Callable[[int], object]] = {}

    def begin_alone(*arguments, **options):  # the library loads one model at a time
        with one_by_one:
            return begin(*arguments, **options)

    def run_then(work, shard, batch_size):
        befores.get(threading.get_ident(), lambda index: None)(shard.index)
        yield from run_shard(work, shard, batch_size)

    monkeypatch.setattr(extracting, "begin", begin_alone)
    monkeypatch.setattr(extracting, "run_shard", run_then)
    pool = ThreadPoolExecutor(4)

    def work(before, part: Part) -> BuildSummary:
        befores[threading.get_ident()] = before
        return extract(config(tmp_path / "cache"), part=part)

    def start(before=lambda index: None, part: Part = ANY) -> Future[BuildSummary]:
        return pool.submit(work, before, part)

    yield start
    pool.shutdown()


def test_workers_of_unlike_speed_make_each_shard_once_and_the_bytes_of_one_process(tmp_path, workers, whole):
    slow_began, slow_may_go_on, joined = threading.Event(), threading.Event(), threading.Event()

    def slow(index: int) -> None:
        slow_began.set()
        slow_may_go_on.wait(600)

    def late(index: int) -> None:
        joined.set()

    first = workers(slow)
    assert slow_began.wait(600)
    second = workers(lambda index: joined.wait(600))
    third = workers(late)  # joins while both are at work
    assert wait_for(lambda: len(missing_shards(tmp_path / "cache", read_plan(tmp_path / "cache"))) == 2)
    assert not first.done()
    slow_may_go_on.set()
    summaries = [future.result() for future in (first, second, third)]
    built = [summary.built for summary in summaries]
    assert sum(built) == COUNT  # no shard twice
    assert built[0] == 2  # the one it stood before, and the one ahead
    assert min(built) > 0
    assert all(summary.manifest == summaries[0].manifest is not None for summary in summaries)
    assert tree(tmp_path / "cache") == whole
    assert not (tmp_path / "cache" / LEASES).exists()


def test_a_shard_is_taken_late_one_ahead_at_most(tmp_path, workers):
    cache, ahead = tmp_path / "cache", []

    def look(index: int) -> None:
        taken = [int(name) for name in Leases(cache).newest()]
        ahead.append([name for name in taken if name > index])

    assert workers(look).result().built == COUNT
    assert ahead == [[1], [2], [3], [4], []]


def test_a_worker_that_fails_leaves_its_shards_to_the_others(tmp_path, workers, whole):
    def fail(index: int) -> None:
        raise OSError(5, "Input/output error")

    failed = workers(fail)
    with pytest.raises(OSError, match="Input/output"):
        failed.result()
    assert workers().result().built == COUNT
    assert tree(tmp_path / "cache") == whole


@pytest.mark.slow
@pytest.mark.parametrize("store", ["webdataset", "zarr"])
def test_real_workers_of_which_one_is_killed_and_one_joins_make_each_shard_once(tmp_path, tiny_llava, store: str):
    script = Path(__file__).parents[1] / "queue_workers.py"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", script, tmp_path, tiny_llava, store],
        env={**os.environ, "PYTHONPATH": str(script.parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    assert told["codes"] == [0, 0], ran.stderr
    assert told["differing"] == []
    assert told["killed"] + sum(told["built"]) == told["all"]
    assert told["killed"] > 0


def wait_for(condition):
    """Whether something comes true in time."""
    end = time.monotonic() + 600
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
