"""The queue that workers take shards from, with real processes that are killed and join; shards are written without a teacher."""

import json
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cache_factory import build_shard, make_plan, tree
from click.testing import CliRunner

from vlm_distill_cache.common.cache import layout
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.plan import Plan, write_plan
from vlm_distill_cache.common.cache.sidecar import missing_shards
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.tools.verify import split_unfinished, verify
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.planning import leases, turns
from vlm_distill_cache.stage1_teacher.planning.leases import LEASES, SEAL, LeaseHolder
from vlm_distill_cache.stage1_teacher.planning.parts import ANY, WHOLE, Part
from vlm_distill_cache.stage1_teacher.planning.turns import take_turns

COUNT = 12  # shards


class Workers:
    """Processes that build one cache; what each did stands in a file of its own.

    Attributes:
        children: Their numbers, in the order they were started; None: it has ended.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.cache, self.plan, self._said = folder / "cache", plan, folder
        write_plan(self.cache, plan)
        self.children: list[int | None] = []

    def start(self, seconds: float = 0.0, *, part: Part = ANY, until: tuple[str, int] | None = None) -> int:
        """Start one that takes so long for a shard; returns which it is.

        With ``until``, once it has said such a thing so many times, it stands still; returns when it does.
        """
        child, number = os.fork(), len(self.children)
        if child == 0:

            def say(what: str) -> None:
                with (self._said / f"said-{number}").open("a") as file:
                    file.write(f"{what}\n")
                if until is not None and what.startswith(until[0]) and self._count(number, until[0]) == until[1]:
                    os.kill(os.getpid(), signal.SIGSTOP)

            try:
                work(self.cache, self.plan, part, seconds, say)
                os._exit(0)
            finally:
                os._exit(1)
        self.children.append(child)
        if until is not None:
            assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        return number

    def go_on(self, number: int) -> None:
        os.kill(self.children[number] or 0, signal.SIGCONT)

    def _count(self, number: int, word: str) -> int:
        return sum(said.startswith(word) for said in self.said(number))

    def said(self, number: int) -> list[str]:
        """What one has done: begun and finished shards, and the sealing."""
        path = self._said / f"said-{number}"
        return path.read_text().splitlines() if path.exists() else []

    def made(self, number: int) -> list[int]:
        return [int(word.removeprefix("made ")) for word in self.said(number) if word.startswith("made ")]

    def kill(self, number: int, how: signal.Signals = signal.SIGKILL) -> int:
        os.kill(self.children[number] or 0, how)
        return self.wait(number)

    def wait(self, number: int) -> int:
        code = os.waitstatus_to_exitcode(os.waitpid(self.children[number] or 0, 0)[1])
        self.children[number] = None
        return code

    def wait_for_all(self) -> None:
        assert [self.wait(number) for number, child in enumerate(self.children) if child is not None].count(0) > 0


def work(cache: Path, plan: Plan, part: Part, seconds: float, say: Callable[[str], object] = lambda what: None) -> None:
    """As a build does it, without a teacher."""
    with take_turns(cache, plan, part) as own:
        for some in own.rounds(lambda index: None):
            for index in some:
                say(f"begun {index}")
                time.sleep(seconds)
                build_shard(cache, plan, index)
                own.count(len(plan.shard_range(index)))
                say(f"made {index}")
        if not missing_shards(cache, plan) and own.sealed_by_others() is None:
            say("seals")
            time.sleep(seconds)
            seal(cache)


@pytest.fixture
def plan() -> Plan:
    return make_plan("webdataset", samples=COUNT, shard_size=1)


@pytest.fixture
def workers(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(turns, "LOOK_S", (0.02, 0.1))
    monkeypatch.setattr(turns, "LOOK_EACH_S", 0.0)
    started = Workers(tmp_path, plan)
    yield started
    for number, child in enumerate(started.children):
        if child is not None:
            started.kill(number)


@pytest.fixture
def whole(tmp_path: Path, plan: Plan) -> dict[str, bytes]:
    """What one process makes."""
    cache = tmp_path / "whole"
    write_plan(cache, plan)
    work(cache, plan, WHOLE, 0.0)
    return tree(cache)


def check(workers: Workers, whole: dict[str, bytes]) -> None:
    """The bytes of one process, no lease left, sealed by one."""
    assert tree(workers.cache) == whole
    assert not (workers.cache / LEASES).exists()
    assert verify(workers.cache) == []
    assert sum(workers.said(number).count("seals") for number in range(len(workers.children))) == 1


def test_workers_of_unlike_speed_make_each_shard_once(workers, whole):
    slow = workers.start(until=("begun", 2))
    fast = [workers.start(), workers.start()]
    assert wait_for(lambda: len(missing_shards(workers.cache, workers.plan)) == 1)  # all but what the slow one has
    workers.go_on(slow)
    workers.wait_for_all()
    check(workers, whole)
    assert workers.made(slow) == [0, 1]
    assert sorted(workers.made(fast[0]) + workers.made(fast[1])) == list(range(2, COUNT))


def test_what_a_killed_worker_had_is_free_and_one_that_joins_takes_part(workers, whole):
    killed = workers.start(until=("begun", 3))
    other = workers.start(until=("begun", 2))
    workers.kill(killed)
    joined = workers.start(until=("begun", 4))
    workers.go_on(other)
    assert wait_for(lambda: len(missing_shards(workers.cache, workers.plan)) == 1)
    workers.go_on(joined)
    workers.wait_for_all()
    check(workers, whole)
    begun = Counter(word for number in range(3) for word in workers.said(number) if word.startswith("begun"))
    assert [word for word, count in begun.items() if count > 1] == ["begun 2"]  # what it had in hand


def test_whoever_comes_after_all_were_killed_makes_what_is_missing(workers, whole):
    for _ in range(3):
        workers.start(until=("begun", 2))
    for number in range(3):
        workers.kill(number)
    assert workers.wait(workers.start()) == 0
    check(workers, whole)
    assert sorted(index for number in range(4) for index in workers.made(number)) == list(range(COUNT))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_workers_of_other_machines_take_over_what_shows_no_life(workers, whole, monkeypatch, how: signal.Signals):
    """Locks tell nothing there, or the worker stands still and has its lock."""
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr(leases, "SILENT_S", 0.5)
    if how == signal.SIGKILL:
        monkeypatch.setattr(leases, "_machine", lambda folder: str(os.getpid()))
    first = workers.start(until=("begun", 3))
    if how == signal.SIGKILL:
        workers.kill(first)
    second = workers.start()
    assert workers.wait(second) == 0
    check(workers, whole)
    assert workers.made(second) == [*range(3, COUNT), 2]


def test_who_finds_nothing_free_waits_for_the_others_and_all_end_sealed(workers, whole, caplog):
    slow = workers.start(until=("begun", 1))
    with caplog.at_level(logging.INFO), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work, workers.cache, workers.plan, ANY, 0.0)
        assert wait_for(lambda: "other workers have all that is left (shards 0): this one waits" in caplog.text)
        assert not waiting.done()
        workers.go_on(slow)
        waiting.result()
    assert workers.wait(slow) == 0
    assert workers.made(slow) == [0]
    assert tree(workers.cache) == whole
    assert not (workers.cache / LEASES).exists()


def test_the_one_that_seals_is_waited_for_and_replaced_if_it_is_killed(workers, whole):
    first = workers.start(until=("seals", 1))
    second = workers.start()
    time.sleep(0.3)
    assert workers.said(second) == []
    workers.kill(first)
    assert workers.wait(second) == 0
    assert workers.said(second) == ["seals"]
    assert tree(workers.cache) == whole


def test_workers_beside_parts_make_the_same_bytes(workers, whole):
    for part in (Part(rank=1, of=2), ANY, Part(rank=0, of=2)):
        workers.start(0.02, part=part)
    workers.wait_for_all()
    assert workers.wait(workers.start()) == 0
    assert tree(workers.cache) == whole


@pytest.fixture
def folders(monkeypatch):
    """A cache of so many shards keeps them in folders."""
    monkeypatch.setattr(layout, "FLAT_SHARDS", COUNT - 1)
    monkeypatch.setattr(layout, "FOLDER_SHARDS", 5)


def test_workers_of_a_cache_with_folders_are_killed_and_join_as_ever(folders, workers, whole):
    killed = workers.start(until=("begun", 4))
    helper = workers.start(until=("made", 2))
    workers.kill(killed)
    workers.go_on(helper)
    assert workers.wait(helper) == 0
    assert workers.wait(workers.start()) == 0  # finds nothing to do
    assert tree(workers.cache) == whole
    assert {"shards/00/00004.tar", "shards/01/00005.json", "shards/02/00011.tar"} <= whole.keys()
    assert status(workers.cache) == f"{workers.cache}: sealed, {COUNT} shards, {COUNT} samples\n"
    assert verify(workers.cache) == []


def test_a_cache_that_lost_a_shard_is_sealed_anew(workers, whole):
    workers.wait(workers.start())
    build_anew = (workers.cache / "shards" / "00002.json", workers.cache / "shards" / "00002.tar")
    for path in build_anew:
        path.unlink()
    (workers.cache / "manifest.json").write_bytes(b"not what there is now")
    second = workers.start()
    assert workers.wait(second) == 0
    assert workers.said(second) == ["begun 2", "made 2", "seals"]
    assert tree(workers.cache) == whole


def test_a_worker_whose_cache_was_removed_or_whose_leases_have_no_place_says_so(workers, plan, monkeypatch):
    monkeypatch.setattr(turns, "LOOK_S", (0.0, 0.0))
    holder = LeaseHolder(workers.cache)
    taken = [holder.take_first([f"{index:05d}"]) for index in range(COUNT)]
    assert all(taken)
    with take_turns(workers.cache, plan, ANY) as own:
        (workers.cache / "plan.json").unlink()
        with pytest.raises(CacheMismatchError, match=r"plan.json was removed or replaced while this build ran"):
            next(own.rounds(lambda index: None))
    holder.close()
    holder.remove()
    (workers.cache / LEASES).write_text("mine")
    with (
        take_turns(workers.cache, plan, ANY) as own,
        pytest.raises(ConfigError, match=f"{LEASES}: not a folder; .*remove .*; finished shards are kept"),
    ):
        next(own.rounds(lambda index: None))


def status(cache: Path, *options: str) -> str:
    done = CliRunner().invoke(main, ["status", str(cache), *options])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_status_counts_shards_and_names_those_who_make_them(workers):
    cache = workers.cache
    assert "0 of 12 shards done, 0 leased, 12 left; not sealed\n  no worker of a queue is at work" in status(cache)
    workers.start(until=("begun", 3))
    workers.start(until=("begun", 1))
    values = json.loads(status(cache, "--json"))
    done = COUNT - len(missing_shards(cache, workers.plan))
    assert not values["sealed"]
    assert values["shards"] == {"all": COUNT, "done": done, "leased": 2, "left": COUNT - done - 2}
    assert values["samples"] == {"all": COUNT, "done": done}
    by_pid = {entry["pid"]: entry for entry in values["workers"]}
    assert [by_pid[child]["state"] for child in workers.children] == ["works", "works"]
    assert [by_pid[child]["shards"] for child in workers.children] == [done, 0]
    assert [len(by_pid[child]["leased"]) for child in workers.children] == [1, 1]
    assert f"{cache}: {done} of 12 shards done, 2 leased, {COUNT - done - 2} left" in status(cache)
    assert f"process {workers.children[1]}, since 2" in status(cache)
    assert split_unfinished(verify(cache))[1] == []  # leases are no damage
    [had] = by_pid[workers.children[1]]["leased"]
    workers.kill(1)
    assert f"was killed; {had} will be taken over" in status(cache)
    assert json.loads(status(cache, "--json"))["shards"]["leased"] == 1
    workers.go_on(0)
    assert workers.wait(0) == 0
    assert status(cache) == f"{cache}: sealed, {COUNT} shards, {COUNT} samples\n"
    assert json.loads(status(cache, "--json"))["workers"] == []


def test_the_status_of_workers_elsewhere_is_told_by_signs_of_life(workers, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.05)
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.planning.status.BEAT_S", 0.05)
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.planning.status.SIGNS_S", 1.0)
    monkeypatch.setattr(leases, "_machine", lambda folder: str(os.getpid()))
    for _ in range(2):
        workers.start(600)
    assert wait_for(lambda: workers.said(0) and workers.said(1))
    workers.kill(0)
    states = Counter(entry["state"] for entry in json.loads(status(workers.cache, "--json"))["workers"])
    assert states == {"works": 1, "silent": 1}
    assert "gave no sign of life for 1 s; " in status(workers.cache)


def test_the_rate_and_the_time_that_is_left_are_those_of_the_living(workers):
    holder = LeaseHolder(workers.cache)
    holder.take_first(["00000"])
    holder._samples, holder._seconds = 6, 3.0
    holder._renew()
    values = json.loads(status(workers.cache, "--json"))
    assert (values["samples_per_second"], values["seconds_left"]) == (2.0, COUNT / 2.0)
    assert "0 of 12 shards done, 1 leased, 11 left, 2 samples/s, 6 s left; not sealed" in status(workers.cache)
    holder.close()
    values = json.loads(status(workers.cache, "--json"))
    assert (values["samples_per_second"], values["seconds_left"]) == (0.0, None)
    assert "has ended; 0 will be taken over" in status(workers.cache)


def test_a_worker_that_seals_is_shown(workers):
    holder = LeaseHolder(workers.cache)
    holder.take_first([SEAL])
    assert "seals the cache" in status(workers.cache)
    holder.close()


def test_the_status_of_what_is_no_cache_is_refused(tmp_path):
    for place, words in ((tmp_path / "none", "does not exist"), (tmp_path, "not a teacher cache")):
        done = CliRunner().invoke(main, ["status", str(place)])
        assert done.exit_code in (1, 2)
        assert words in done.output


def wait_for(condition):
    """Whether something comes true in time."""
    end = time.monotonic() + 600
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
