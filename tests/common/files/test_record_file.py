"""A record is the one that was written, whole, or it is not there; nothing that goes wrong is more than that."""

import errno
import fcntl
import logging
import multiprocessing
import os
import pickle
import signal
import time

import numpy as np
import pytest

from vlm_distill_cache.common.files.record_file import RecordFile

BIG = 1 << 40


def key(number: int) -> bytes:
    return number.to_bytes(16, "little")


def data(number: int, size: int = 1000) -> bytes:
    return np.random.default_rng(number).bytes(size + number)


def held(path, numbers) -> list[int]:
    """Which of the records a new reader finds; all of them whole."""
    file = RecordFile(path, BIG)
    found = {number: file.get(key(number)) for number in numbers}
    assert all(read in (None, data(number)) for number, read in found.items())
    return [number for number, read in found.items() if read is not None]


def test_records_are_read_as_they_were_written_by_whoever_opens_the_file(tmp_path):
    path = tmp_path / "records"
    one, other = RecordFile(path, BIG), RecordFile(path, BIG)
    assert one.get(key(0)) is None
    assert not path.exists()
    one.put(key(0), [data(0)[:10], memoryview(data(0)[10:])])
    other.put(key(1), [data(1)])
    one.put(key(2), [])
    for file in (one, other, RecordFile(path, BIG), pickle.loads(pickle.dumps(one))):  # noqa: S301
        assert [file.get(key(number)) for number in range(4)] == [data(0), data(1), b"", None]


def test_a_key_is_written_once(tmp_path):
    one, other = RecordFile(tmp_path / "records", BIG), RecordFile(tmp_path / "records", BIG)
    one.put(key(0), [data(0)])
    size = (tmp_path / "records").stat().st_size
    other.put(key(0), [data(0)])
    one.put(key(0), [data(0)])
    assert (tmp_path / "records").stat().st_size == size


def test_a_file_cut_anywhere_keeps_the_records_in_front_and_takes_new_ones(tmp_path):
    path = tmp_path / "records"
    file = RecordFile(path, BIG)
    ends = []
    for number in range(3):
        file.put(key(number), [data(number, 20)])
        ends.append(path.stat().st_size)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        left = RecordFile(path, BIG)
        assert [left.get(key(number)) is not None for number in range(3)] == [end <= cut for end in ends]
        left.put(key(9), [data(9)])
        again = RecordFile(path, BIG)
        assert again.get(key(9)) == data(9)
        assert [again.get(key(number)) is not None for number in range(3)] == [end <= cut for end in ends]


def test_no_changed_byte_makes_a_wrong_record(tmp_path):
    path = tmp_path / "records"
    file = RecordFile(path, BIG)
    for number in range(2):
        file.put(key(number), [data(number, 20)])
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        read = RecordFile(path, BIG)
        assert [read.get(key(number)) in (None, data(number, 20)) for number in range(2)] == [True] * 2
        assert None in [read.get(key(number)) for number in range(2)]


def test_the_file_never_exceeds_its_limit(tmp_path, caplog):
    path, limit = tmp_path / "records", 10_000
    files = [RecordFile(path, limit) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        for number in range(40):
            files[number % 2].put(key(number), [data(number)])
    assert 8_000 < path.stat().st_size <= limit
    assert len(caplog.records) == 2  # each says so once
    assert "it may have 10000 bytes" in caplog.text
    assert held(path, range(40)) == list(range(9))


@pytest.mark.parametrize("fault", ["full", "short"])
def test_a_full_disk_is_no_error_and_spoils_nothing(tmp_path, monkeypatch, caplog, fault):
    path = tmp_path / "records"
    file = RecordFile(path, BIG)
    file.put(key(0), [data(0)])

    def fill(descriptor, pieces, offset, *, write=os.pwritev):
        written = write(descriptor, [b"".join(map(bytes, pieces))[:100]], offset)
        if fault == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    size = path.stat().st_size
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(os, "pwritev", fill)
        file.put(key(1), [data(1)])
    file.put(key(2), [data(2)])  # it tries no more
    assert path.stat().st_size == size
    assert [file.get(key(number)) for number in range(3)] == [data(0), None, None]
    assert "takes no more" in caplog.text


def test_a_folder_that_is_gone_or_another_file_in_its_place_is_no_error(tmp_path):
    path = tmp_path / "folder" / "records"
    RecordFile(path, BIG).put(key(0), [data(0)])
    path.parent.mkdir()
    file = RecordFile(path, BIG)
    file.put(key(0), [data(0)])
    path.unlink()
    assert file.get(key(0)) == data(0)  # it is still open
    file.put(key(1), [data(1)])
    assert held(path, range(2)) == [1]
    assert [file.get(key(number)) for number in range(2)] == [None, data(1)]
    file.close()
    file.put(key(2), [data(2)])
    assert held(path, range(3)) == [1]


def test_nobody_waits_for_a_process_that_stopped_while_it_wrote(tmp_path):
    path = tmp_path / "records"
    file = RecordFile(path, BIG)
    file.put(key(0), [data(0)])
    with path.open("rb+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        began = time.monotonic()
        file.put(key(1), [data(1)])
        assert time.monotonic() - began < 2
        assert file.get(key(0)) == data(0)
    file.put(key(2), [data(2)])
    assert held(path, range(3)) == [0, 2]


def _write(path, numbers):
    file = RecordFile(path, BIG)
    for number in numbers:
        file.put(key(number), [data(number, 50_000)])
    time.sleep(60)


def test_processes_share_it_and_one_that_is_killed_makes_no_wrong_record(tmp_path):
    path = tmp_path / "records"
    fork = multiprocessing.get_context("fork")
    for number in range(6):
        process = fork.Process(target=_write, args=(path, range(1000)), daemon=True)
        other = fork.Process(target=_write, args=(path, range(1000, 2000)), daemon=True)
        for started in (process, other):
            started.start()
        time.sleep(0.03 + 0.02 * number)
        for started in (process, other):
            os.kill(started.pid, signal.SIGKILL)
            started.join()
    file = RecordFile(path, BIG)
    found = {number: file.get(key(number)) for number in range(2000)}
    assert all(read is None or read == data(number, 50_000) for number, read in found.items())
    for part in (range(1000), range(1000, 2000)):
        there = [number for number in part if found[number] is not None]
        assert there
    file.put(key(5000), [data(5000)])
    assert RecordFile(path, BIG).get(key(5000)) == data(5000)


@pytest.mark.parametrize("theirs", [b"V", b"somebody's picture", b"\0" * 100])
def test_a_file_that_somebody_else_wrote_is_neither_read_nor_written(tmp_path, theirs):
    path = tmp_path / "records"
    path.write_bytes(theirs)
    file = RecordFile(path, BIG)
    assert file.get(key(0)) is None
    file.put(key(0), [data(0)])
    begins_as_ours = theirs == b"V"
    assert (path.read_bytes() == theirs) != begins_as_ours
    assert (file.get(key(0)) is None) != begins_as_ours


def test_a_pipe_in_its_place_is_not_waited_for(tmp_path):
    path = tmp_path / "records"
    os.mkfifo(path)
    reading = multiprocessing.Process(target=RecordFile(path, BIG).get, args=(key(0),))
    reading.start()
    reading.join(30)
    waits = reading.is_alive()
    reading.kill()
    reading.join()
    assert not waits
