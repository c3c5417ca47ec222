import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common.cache import open_cache
from common.errors import DataError, ProcessFailedError
from data.threads import FEW_SAMPLES, encoding_processes
from stage1_teacher.encode_ahead import encode_shards
from tests.stage1_teacher.test_extract import tree, write_llava_json

THREES = SimpleNamespace(shard_range=lambda index: range(3 * index, 3 * index + 3))


@pytest.mark.parametrize("processes", [1, 2])
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


def test_a_process_that_is_killed_is_an_error_with_a_remedy():
    parent = os.getpid()

    def encoder(sample):
        assert os.getpid() != parent
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ProcessFailedError, match=r"num_workers=1"):
        next(encode_shards(range(3), encoder, THREES, [0], workers=1))
    assert not multiprocessing.active_children()


def test_processes_encode_beside_a_gpu_and_for_large_data_sets():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert encoding_processes(-1, cpu, FEW_SAMPLES) == 1
    assert encoding_processes(-1, cuda, FEW_SAMPLES) == min(4, len(os.sched_getaffinity(0)))
    assert encoding_processes(-1, cuda, FEW_SAMPLES - 1) == 0
    assert encoding_processes(0, cuda, 10**6) == 0
    assert encoding_processes(10**3, cpu, 1) == len(os.sched_getaffinity(0))


def test_a_fault_in_a_process_is_not_taken_for_its_end():
    def encoder(sample):
        raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match=r"a fault") as caught:
        next(encode_shards(range(3), encoder, THREES, [0], workers=1))
    assert not isinstance(caught.value, ProcessFailedError)
