import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from common.cache import open_cache
from common.errors import DataError
from stage1_teacher.pipeline import encode_shards
from tests.stage1_teacher.test_extract import write_llava_json


def test_no_byte_depends_on_the_number_of_encoding_threads(tmp_path: Path, build_cache):
    path = write_llava_json(tmp_path / "data", 12)
    (tmp_path / "data" / "4.png").unlink()  # failures keep their order too
    (tmp_path / "data" / "7.png").write_bytes(b"no picture")
    shards = []
    for workers in (1, 5):
        folder = tmp_path / f"with-{workers}"
        build_cache(folder, data=str(path), limit=0, max_failed_share=0.5, workers=workers)
        shards.append(
            {place.name: place.read_bytes() for place in (folder / "shards").rglob("*") if place.is_file()}
        )
    assert shards[0] == shards[1]
    assert len(open_cache(tmp_path / "with-5").failed) == 2


def test_several_threads_encode_one_shard():
    together = threading.Barrier(3, timeout=60)

    def encoder(sample):
        together.wait()  # three at a time, or nobody goes on
        return 10 * sample

    plan = SimpleNamespace(shard_range=lambda index: range(3 * index, 3 * index + 3))
    shards = list(encode_shards(range(6), encoder, plan, [1, 0], workers=3))
    assert [(shard.index, shard.samples) for shard in shards] == [(1, [30, 40, 50]), (0, [0, 10, 20])]


def test_an_error_of_the_data_set_ends_all_threads():
    def encoder(sample):
        if sample == 4:
            raise DataError("the file has changed")
        return sample

    plan = SimpleNamespace(shard_range=lambda index: range(3 * index, 3 * index + 3))
    shards = encode_shards(range(300), encoder, plan, range(100), workers=3)
    assert next(shards).samples == [0, 1, 2]
    with pytest.raises(DataError, match="has changed"):
        next(shards)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("encode", "shards"))]
