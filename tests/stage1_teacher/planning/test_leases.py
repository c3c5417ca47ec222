"""Leases on shards: one living worker each, free once it is dead, on machines that share locks and on those that do not."""

import itertools
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.stage1_teacher.planning import leases
from vlm_distill_cache.stage1_teacher.planning.leases import LEASES, SEAL, LeaseHolder, Leases

SHARDS = [f"{index:05d}" for index in range(40)]


@pytest.fixture
def worker(tmp_path: Path):
    """Makes workers of one cache, which end with the test."""
    made: list[LeaseHolder] = []

    def make() -> LeaseHolder:
        made.append(LeaseHolder(tmp_path))
        return made[-1]

    yield make
    for holder in made:
        holder.close()


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch):
    """Each worker is on a machine of its own, whose locks tell others nothing; time passes fifty times as fast."""
    machines = itertools.count()
    monkeypatch.setattr(leases, "_machine", lambda folder: str(next(machines)))
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "SILENT_S", 0.6)


def in_a_process(work) -> int:
    """Run something in a process, which then waits to be killed; returns once it has been done."""
    here, there = os.pipe()
    child = os.fork()
    if not child:
        work()
        os.write(there, b"done")
        time.sleep(600)
    os.close(there)
    assert os.read(here, 4) == b"done"
    os.close(here)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_of_workers_that_take_at_the_same_time_each_lease_has_one(worker):
    begun = threading.Barrier(8)

    def take_all() -> list[str]:
        holder = worker()
        begun.wait()
        return list(iter(lambda: holder.take_first(SHARDS), None))

    with ThreadPoolExecutor(8) as pool:
        taken = list(itertools.chain.from_iterable(pool.map(lambda _: take_all(), range(8))))
    assert sorted(taken) == SHARDS


def test_one_of_many_takes_over_from_the_dead(worker, tmp_path: Path):
    first = worker()
    assert [first.take_first(SHARDS) for _ in range(3)] == SHARDS[:3]
    first.close()
    others = [worker() for _ in range(3)]
    taken = [holder.take_first(SHARDS[:3]) for holder in itertools.islice(itertools.cycle(others), 9)]
    assert sorted(filter(None, taken)) == SHARDS[:3]
    assert Leases(tmp_path).newest() == {name: f"{name}.1" for name in SHARDS[:3]}


def test_the_dead_are_known_at_once_where_locks_are_seen(worker, tmp_path: Path):
    child = in_a_process(lambda: LeaseHolder(tmp_path).take_first([SEAL, *SHARDS]))
    holder = worker()
    assert holder.take_first([SEAL]) is None
    kill(child)
    assert holder.take_first([SEAL]) == SEAL


def test_a_worker_that_stands_still_is_dead_in_the_end_though_its_lock_is_held(worker, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(leases, "SILENT_S", 0.3)
    child = in_a_process(lambda: LeaseHolder(tmp_path).take_first(SHARDS))
    os.kill(child, signal.SIGSTOP)
    holder = worker()
    assert holder.take_first(SHARDS[:1]) is None
    assert wait_for(lambda: holder.take_first(SHARDS[:1]))
    kill(child)


@pytest.mark.parametrize(("locks", "skew"), [(True, 0.0), (False, 1e9), (False, -1e9)])
@pytest.mark.usefixtures("apart")
def test_without_common_locks_life_is_told_by_changes_whatever_the_clocks_say(worker, monkeypatch, locks, skew):
    now = time.time
    clocks = itertools.cycle([0.0, skew])
    monkeypatch.setattr(time, "time", lambda: now() + next(clocks))
    if not locks:
        monkeypatch.setattr(leases, "_lock", lambda descriptor: False)
    first, second = worker(), worker()
    assert first.take_first(SHARDS) == SHARDS[0]
    until = time.monotonic() + 2 * leases.SILENT_S
    while time.monotonic() < until:
        assert second.take_first(SHARDS[:1]) is None
        time.sleep(0.05)
    first._stop.set()  # as if killed
    began = time.monotonic()
    assert wait_for(lambda: second.take_first(SHARDS[:1]))
    assert time.monotonic() - began > leases.SILENT_S / 2


@pytest.mark.usefixtures("apart")
def test_who_says_that_it_ends_is_dead_at_once_on_any_machine(worker):
    first, second = worker(), worker()
    first.take_first(SHARDS)
    first.close()
    assert second.take_first(SHARDS[:1]) == SHARDS[0]


@pytest.mark.usefixtures("apart")
def test_time_in_which_nobody_looked_proves_nothing(worker, monkeypatch):
    first, second = worker(), worker()
    first.take_first(SHARDS)
    first._stop.set()
    assert second.take_first(SHARDS[:1]) is None
    later = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: later() + 3600)
    assert second.take_first(SHARDS[:1]) is None


def test_what_is_in_the_making_is_not_taken_twice_and_may_be_once_that_has_failed(worker, tmp_path: Path):
    holder = worker()
    assert holder.take_first(SHARDS[:1]) == SHARDS[0]
    assert holder.take_first(SHARDS[:1]) is None
    holder.finish_all()
    assert holder.take_first(SHARDS[:1]) == SHARDS[0]
    assert Leases(tmp_path).newest() == {SHARDS[0]: f"{SHARDS[0]}.0"}


def test_a_lease_without_a_worker_is_taken_after_a_while_and_names_of_others_are_ignored(worker, tmp_path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "SILENT_S", 0.3)
    folder = tmp_path / LEASES
    folder.mkdir()
    for name, content in {
        "00000.0": b"", "00001.0": b"../../plan.json", "00002.7": b"nobody\n", "00003.0": b"\xff" * 5000,
        "00004.0": b"liar\n", "liar.worker": b'{"name": "liar", "host": 3}', "0": b"", "00005.x": b"", "notes.txt": b"mine",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    holder = worker()
    assert holder.take_first(SHARDS[:5]) is None
    assert holder.take_first(SHARDS) == SHARDS[5]
    taken = []
    assert wait_for(lambda: taken.append(holder.take_first(SHARDS[:5])) or len(set(taken) - {None}) == 5)
    assert Leases(tmp_path).newest()["00002"] == "00002.8"


def test_leases_that_are_removed_under_a_worker_are_written_again(worker, tmp_path: Path):
    first = worker()
    first.take_first(SHARDS)
    first.remove()
    assert first.take_first(SHARDS) is None  # as of a cache that is sealed
    assert first.take_first(SHARDS) == SHARDS[1]
    assert worker().take_first(SHARDS[1:]) == SHARDS[2]


def test_a_cache_that_is_gone_is_said_and_not_waited_for(worker, tmp_path: Path):
    holder = worker()
    tmp_path.rename(tmp_path.with_name("moved"))
    with pytest.raises(
        ConfigError, match=r"was moved or removed while this build ran; give its place now \(cache=FOLDER\)"
    ):
        holder.take_first(SHARDS)


def make_hostile(place: Path, what: str) -> None:
    place.parent.mkdir(exist_ok=True)
    if what == "link":
        place.symlink_to("/etc/passwd")
    elif what == "link to a folder":
        place.symlink_to("/tmp")
    elif what == "folder":
        place.mkdir()
    elif what == "pipe":
        os.mkfifo(place)
    else:
        place.write_text(what)


@pytest.mark.parametrize(
    ("where", "what"),
    [
        (LEASES, "file"), (LEASES, "link"), (LEASES, "link to a folder"), (LEASES, "pipe"),
        *((f"{LEASES}/{name}", what) for name in ("00000.0", "one.worker") for what in ("link", "folder", "pipe")),
    ],
)  # fmt: skip
def test_what_is_in_the_place_of_leases_is_refused_in_words(worker, tmp_path: Path, where: str, what: str):
    make_hostile(tmp_path / where, what)
    if where.endswith(".worker"):
        (tmp_path / LEASES / "00000.0").write_text("one\n")
    with pytest.raises(ConfigError, match=rf"{LEASES}.*: .*remove .*{LEASES}, then start them again"):
        worker().take_first(SHARDS[:1])


def wait_for(condition):
    """Whether something comes true in time."""
    end = time.monotonic() + 600
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return found
