import dataclasses
import errno
import multiprocessing
import os
import signal
import struct
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.stage1_teacher.test_extract import tree, write_llava_json
from vlm_distill_cache.common.errors import DataError, ProcessFailedError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.stage1_teacher.loop.encode_ahead import FEW_SAMPLES, count_workers, encode_shards

THREES = SimpleNamespace(shard_range=lambda index: range(3 * index, 3 * index + 3))


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow(quick=("1",))
def test_no_byte_depends_on_the_number_of_encoding_processes(tmp_path: Path, build_cache, processes: int):
    path = write_llava_json(tmp_path / "data", 40)
    (tmp_path / "data" / "4.png").unlink()  # failures keep their order too
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    options = {"data": str(path), "limit": 0, "max_failed_share": 0.5, "shard_size": 20}
    build_cache(tmp_path / "thread", num_workers=0, **options)
    build_cache(tmp_path / "processes", num_workers=processes, **options)
    assert tree(tmp_path / "processes") == tree(tmp_path / "thread")
    assert list(open_cache(tmp_path / "processes").failed) == ["s4", "s7"]


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_an_error_of_the_data_set_is_raised_as_it_is_and_no_process_stays(processes: int):
    def encoder(sample):
        if sample == 40:
            raise DataError("the file has changed")
        raise OSError(5, "Input/output error", f"{sample}.png")

    shards = encode_shards(range(300), encoder, THREES, range(13, 100), workers=processes)
    with pytest.raises(OSError, match=r"Input/output error: '39.png'"):
        next(shards)
    assert not multiprocessing.active_children()
    shards = encode_shards(range(40, 300), encoder, THREES, [0], workers=processes)
    with pytest.raises(DataError, match=r"^the file has changed$"):
        next(shards)
    assert not multiprocessing.active_children()


def test_a_process_that_is_killed_while_it_hands_over_is_an_error_with_a_remedy():
    parent = os.getpid()

    def send_half(connection, message):
        os.write(connection.fileno(), struct.pack("!i", len(message)) + bytes(message[: len(message) // 2]))
        os.kill(os.getpid(), signal.SIGKILL)

    def encoder(sample):
        assert os.getpid() != parent
        Connection._send_bytes = send_half
        return sample

    with pytest.raises(ProcessFailedError, match=r"SIGKILL.*num_workers=1"):
        next(encode_shards(range(3), encoder, THREES, [0], workers=1))
    assert not multiprocessing.active_children()


def test_processes_encode_beside_a_gpu_and_for_large_data_sets():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert count_workers(-1, cpu, FEW_SAMPLES) == 1
    assert count_workers(-1, cuda, FEW_SAMPLES) == min(4, len(os.sched_getaffinity(0)))
    assert count_workers(-1, cuda, FEW_SAMPLES - 1) == 0
    assert count_workers(0, cuda, 10**6) == 0
    assert count_workers(10**3, cpu, 1) == len(os.sched_getaffinity(0))


def test_a_fault_in_a_process_ends_the_build(capfd):
    def encoder(sample):
        raise RuntimeError("a fault")

    with pytest.raises(ProcessFailedError, match=r"exit code 1"):
        next(encode_shards(range(3), encoder, THREES, [0], workers=1))
    assert "RuntimeError: a fault" in capfd.readouterr().err


def forked(work, **options):
    """Run something in a process of its own; started, but not waited for."""
    process = multiprocessing.get_context("fork").Process(target=work, **options)
    process.start()
    return process


def test_no_process_stays_when_the_one_it_encodes_for_is_killed(tmp_path: Path):
    """SIGKILL leaves no time to stop anybody, and whoever encodes a slow sample sends nothing for long."""

    def encoder(sample):
        (tmp_path / f"{os.getpid()}").touch()
        time.sleep(600)

    reader = forked(lambda: next(encode_shards(range(300), encoder, THREES, range(100), workers=2)))
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    reader.kill()
    reader.join()
    assert wait_for(lambda: not any(Path("/proc", place.name).exists() for place in tmp_path.iterdir()))


@pytest.mark.parametrize("how", ["hangs", "is stopped"])
def test_a_consumer_that_stops_waits_for_no_process(tmp_path: Path, encoded_as_is, how: str):
    def encoder(sample):
        if sample >= 32:  # the next chunk
            (tmp_path / f"{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGSTOP) if how == "is stopped" else time.sleep(600)
        return encoded_as_is(sample)

    plan = SimpleNamespace(shard_range=lambda index: range(32 * index, 32 * index + 32))
    shards = encode_shards(range(320), encoder, plan, range(10), workers=2)
    assert len(next(shards).samples) == 32
    assert wait_for(lambda: len(list(tmp_path.iterdir())) == 2)
    shards.close()
    assert not multiprocessing.active_children()


def test_a_consumer_that_stops_waits_for_one_sample_of_a_thread(encoded_as_is):
    seen, working, released = [], threading.Event(), threading.Event()

    def encoder(sample):
        seen.append(sample)
        if sample == 40:
            working.set()
            released.wait(60)
        return encoded_as_is(sample)

    plan = SimpleNamespace(shard_range=lambda index: range(32 * index, 32 * index + 32))
    shards = encode_shards(range(320), encoder, plan, range(10), workers=0)
    next(shards)
    assert working.wait(60)
    threading.Timer(0.5, released.set).start()
    shards.close()
    assert seen == list(range(41))


def test_an_error_while_processes_are_started_is_told_and_those_that_run_are_ended(monkeypatch):
    fork, started = os.fork, []

    def forks_once():
        started.append(True)
        if len(started) > 1:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return fork()

    monkeypatch.setattr(os, "fork", forks_once)
    with pytest.raises(OSError, match=r"Cannot allocate memory"):
        next(encode_shards(range(300), str, SimpleNamespace(shard_range=lambda index: range(32)), [0], workers=2))
    assert not multiprocessing.active_children()


def test_a_daemon_has_no_processes():
    daemon = forked(lambda: os._exit(40 + count_workers(2, torch.device("cpu"), 10**6)), daemon=True)
    daemon.join()
    assert daemon.exitcode == 40


@pytest.fixture
def encoded_as_is():
    """An encoded sample that says which one it is."""

    def encode(sample: int) -> EncodedSample:
        nothing = dict.fromkeys(field.name for field in dataclasses.fields(EncodedSample))
        return EncodedSample(**nothing | {"sample_id": str(sample)})

    return encode


def wait_for(condition):
    """Whether something comes true within a minute."""
    end = time.monotonic() + 60
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("processes", [0, 1])
def test_what_ends_a_build_is_told_with_the_sample_it_came_with(processes: int, caplog, capfd):
    class Data(list):
        sample_ids = ("first", "second", "third")

    def faulty(error):
        def encoder(sample):
            raise error

        return encoder

    with pytest.raises(DataError, match="the file has changed"):
        next(encode_shards(Data(range(3)), faulty(DataError("the file has changed")), THREES, [0], workers=processes))
    assert "the build ends at sample 'first'" in caplog.text
    with pytest.raises((ProcessFailedError, ZeroDivisionError)) as caught:
        next(encode_shards(Data(range(3)), faulty(ZeroDivisionError("x")), THREES, [0], workers=processes))
    told = capfd.readouterr().err if processes else "".join(caught.value.__notes__)
    assert "at sample 'first'" in told
