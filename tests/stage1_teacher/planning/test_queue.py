"""Workers that take shards from a queue: each shard once, the bytes of one process, whoever joins, leaves or is killed."""

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.tools.verify import split_unfinished, verify
from vlm_distill_cache.stage1_teacher import extract as extracting
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import BuildSummary, extract
from vlm_distill_cache.stage1_teacher.planning.leases import LEASES, LeaseHolder, Leases
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


@pytest.fixture
def hold(tmp_path: Path):
    """Takes leases in a process that then does nothing; returns what kills it."""
    children = []

    def take(*names: str) -> Callable[[], None]:
        here, there = os.pipe()
        child = os.fork()
        if not child:
            holder = LeaseHolder(tmp_path / "cache")
            for name in names:
                holder.take_first([name])
            os.write(there, b".")
            time.sleep(600)
        children.append(child)
        os.close(there)
        assert os.read(here, 1) == b"."
        os.close(here)
        return lambda: kill(child)

    def kill(child: int) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        children.remove(child)

    yield take
    for child in [*children]:
        kill(child)


def test_workers_of_unlike_speed_make_each_shard_once_and_the_bytes_of_one_process(tmp_path, workers, whole):
    slow_began, slow_may_go_on, joined = threading.Event(), threading.Event(), threading.Event()

    def slow(index: int) -> None:
        slow_began.set()
        slow_may_go_on.wait(60)

    def late(index: int) -> None:
        joined.set()

    first = workers(slow)
    assert slow_began.wait(60)
    second = workers(lambda index: joined.wait(60))
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


def test_who_finds_nothing_free_waits_and_takes_over_from_the_dead(tmp_path, workers, config, whole, hold, caplog):
    cache = tmp_path / "cache"
    extract(config(cache), part=Part(rank=0, of=2))  # 1 and 3 are missing
    kill = hold("00001", "00003")
    with caplog.at_level(logging.INFO):
        waiting = workers()
        assert wait_for(lambda: "other workers have all that is left (shards 1, 3)" in caplog.text)
        time.sleep(0.5)
        assert not waiting.done()
        kill()
        assert waiting.result().built == 2
    assert "00001: worker" in caplog.text
    assert tree(cache) == whole


def test_who_finds_all_shards_there_waits_for_the_one_that_seals_or_its_end(
    tmp_path, workers, config, whole, hold, caplog
):
    cache = tmp_path / "cache"
    extract(config(cache))
    (cache / "manifest.json").unlink()
    kill = hold("seal")
    with caplog.at_level(logging.INFO):
        waiting = [workers(), workers()]
        assert wait_for(lambda: caplog.text.count("another worker seals the cache: this one waits") == 2)
    assert not any(future.done() for future in waiting)
    assert not (cache / "manifest.json").exists()
    kill()
    assert [future.result().built for future in waiting] == [0, 0]
    assert tree(cache) == whole


def test_a_worker_that_fails_leaves_its_shards_to_the_others(tmp_path, workers, whole):
    def fail(index: int) -> None:
        raise OSError(5, "Input/output error")

    failed = workers(fail)
    with pytest.raises(OSError, match="Input/output"):
        failed.result()
    assert workers().result().built == COUNT
    assert tree(tmp_path / "cache") == whole


def test_workers_beside_a_part_make_the_same_bytes(tmp_path, workers, whole):
    both = [workers(part=Part(rank=1, of=2)), workers()]
    assert sum(future.result().built for future in both) >= COUNT
    assert {name: data for name, data in tree(tmp_path / "cache").items() if LEASES not in name} == whole
    assert not (tmp_path / "cache" / LEASES).exists()


def test_a_sealed_cache_that_lost_a_shard_is_sealed_anew(tmp_path, workers, whole, config):
    cache = tmp_path / "cache"
    extract(config(cache))
    for path in (cache / "shards").glob("00002.*"):
        path.unlink()
    assert workers().result().built == 1
    assert tree(cache) == whole


def test_a_worker_whose_leases_have_no_place_says_so(tmp_path, workers):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / LEASES).write_text("mine")
    with pytest.raises(ConfigError, match=f"{LEASES}: not a folder; .*remove .*; finished shards are kept"):
        workers().result()


def status(cache: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["status", str(cache), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_status_of_a_build_names_its_workers_and_of_a_cache_that_it_is_sealed(tmp_path, workers):
    cache, said = tmp_path / "cache", {}

    def look(index: int) -> None:
        if index == 3:
            said.update(text=status(cache), values=json.loads(status(cache, "--json")))
            said["damages"] = split_unfinished(verify(cache))[1]

    workers(look).result()
    values = said["values"]
    assert not values["sealed"]
    assert values["shards"]["all"] == COUNT
    assert values["shards"]["leased"] == 5 - values["shards"]["done"]
    assert values["shards"]["left"] == 0
    [worker] = values["workers"]
    assert worker["pid"] == os.getpid()
    assert (worker["state"], worker["shards"]) == ("works", values["shards"]["done"])
    assert set(worker["leased"]) >= {3, 4}
    assert said["damages"] == []
    assert (
        f"{cache}: {values['shards']['done']} of 5 shards done, {values['shards']['leased']} leased, 0 left"
        in said["text"]
    )
    assert f"process {os.getpid()}, since 2" in said["text"]
    assert status(cache) == f"{cache}: sealed, 5 shards, 10 samples\n"
    assert json.loads(status(cache, "--json"))["workers"] == []
    assert verify(cache) == []


def test_the_status_tells_the_killed_from_the_living_and_what_is_free(tmp_path, config, hold):
    cache = tmp_path / "cache"
    extract(config(cache), part=Part(rank=0, of=2))
    assert "3 of 5 shards done, 0 leased, 2 left; not sealed\n  no worker of a queue is at work" in status(cache)
    kill = hold("00001")
    values = json.loads(status(cache, "--json"))
    assert values["shards"] == {"all": 5, "done": 3, "leased": 1, "left": 1}
    kill()
    values = json.loads(status(cache, "--json"))
    assert values["shards"] == {"all": 5, "done": 3, "leased": 0, "left": 2}
    assert [entry["state"] for entry in values["workers"]] == ["gone"]
    assert "was killed; 1 will be taken over" in status(cache)


def test_the_status_of_what_is_no_cache_is_refused(tmp_path):
    for place, words in ((tmp_path / "none", "does not exist"), (tmp_path, "not a teacher cache")):
        done = CliRunner().invoke(main, ["status", str(place)])
        assert done.exit_code in (1, 2)
        assert words in done.output + done.stderr


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
    assert min(told["killed"], *told["built"]) > 0


def wait_for(condition):
    """Whether something comes true within a minute."""
    end = time.monotonic() + 60
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
