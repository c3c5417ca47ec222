"""Reading a finished cache: by sample id, from threads, forks and pickled copies; damage never passes."""

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cache_factory import FAILED, assert_equal_records, build_cache, make_plan, make_record, sample_id, tree

from vlm_distill_cache.common.cache.documents import document_bytes
from vlm_distill_cache.common.cache.manifest import seal
from vlm_distill_cache.common.cache.sidecar import read_sidecar, sidecar_path
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError
from vlm_distill_cache.common.opening import open_cache

POSITIONS = [p for p in range(10) if p != FAILED]


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def sealed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / request.param
    build_cache(folder, make_plan(request.param), fidelity={"kl": 0.25})
    return folder


@pytest.fixture
def broken(tmp_path):
    """A cache of its own, for tests that damage it."""
    build_cache(tmp_path / "cache", make_plan("webdataset"))
    return tmp_path / "cache"


def test_every_sample_is_found_by_its_id(sealed):
    cache = open_cache(sealed, open_shards=1)
    assert len(cache) == len(POSITIONS)
    assert cache.sample_ids == tuple(sample_id(p) for p in POSITIONS)
    for position in [*POSITIONS, *reversed(POSITIONS)]:  # shards open and close on the way
        assert sample_id(position) in cache
        assert_equal_records(cache.read(sample_id(position)), make_record(position))
        assert cache.shard_of(sample_id(position)) == position // 4
    assert cache.shard_sample_ids(0) == (sample_id(0), sample_id(1), sample_id(2))
    assert cache.read(sample_id(0), ["labels"]).keys() == {"labels"}


def test_a_cache_describes_itself(sealed):
    cache = open_cache(sealed)
    assert cache.signals == ("logits", "visual_map")
    assert {f.name for f in cache.fields} == make_record(0).keys()
    assert cache.failed == {sample_id(FAILED): "image is truncated"}
    assert cache.manifest_hash == open_cache(sealed).manifest_hash
    assert cache.manifest.fidelity == {"kl": 0.25}


def test_missing_samples_are_explained(sealed):
    cache = open_cache(sealed)
    assert sample_id(FAILED) not in cache
    with pytest.raises(CacheMismatchError, match=r"failed when the cache was built: image is truncated"):
        cache.read(sample_id(FAILED))
    with pytest.raises(CacheMismatchError, match=r"no sample 'other' among its 9; use the data set"):
        cache.read("other")


def test_pickled_copies_read_on_their_own(sealed):
    cache = open_cache(sealed)
    cache.read(sample_id(0))
    copy = pickle.loads(pickle.dumps(cache))  # noqa: S301 - as a data loader's worker gets it
    cache.close()
    assert_equal_records(copy.read(sample_id(9)), make_record(9))
    assert_equal_records(cache.read(sample_id(9)), make_record(9))


def test_threads_share_a_cache(sealed):
    cache = open_cache(sealed, open_shards=1)
    failures = []

    def run(start):
        for position in POSITIONS[start:] + POSITIONS[:start]:
            try:
                assert_equal_records(cache.read(sample_id(position)), make_record(position))
            except (AssertionError, CacheFormatError, OSError, ValueError) as error:
                failures.append(error)

    threads = [threading.Thread(target=run, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_fork_reads_even_if_the_parent_was_reading(sealed):
    script = """
import os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from cache_factory import assert_equal_records, make_record, sample_id
from vlm_distill_cache.common.opening import open_cache
cache = open_cache(Path(sys.argv[1]))
cache.read(sample_id(0))
cache._shards._lock.acquire()  # as if another thread were opening a shard at the fork
child = os.fork()
if child:
    cache._shards._lock.release()
assert_equal_records(cache.read(sample_id(9)), make_record(9))
assert_equal_records(cache.read(sample_id(0)), make_record(0))
if child == 0:
    os._exit(0)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-c", script, str(sealed), str(Path(__file__).parents[1])],
        env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


def test_reading_writes_nothing(sealed):
    """Root may write anywhere, so that a read-only folder alone would prove nothing."""
    before = {p: p.stat(follow_symlinks=False).st_mtime_ns for p in [sealed, *sealed.rglob("*")]}
    for path in before:
        path.chmod(0o555 if path.is_dir() else 0o444)
    writes = []

    def hook(event, arguments):
        if recording and event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove"):
            writing = event != "open" or (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writing and str(sealed) in str(arguments[0]):
                writes.append((event, arguments))

    recording = True
    sys.addaudithook(hook)
    cache = open_cache(sealed)
    for position in POSITIONS:
        cache.read(sample_id(position))
    recording = False
    assert not writes
    assert before == {p: p.stat(follow_symlinks=False).st_mtime_ns for p in before}


def test_every_flipped_byte_of_a_shard_is_noticed_before_it_is_read(broken):
    path = broken / "shards" / "00001.tar"
    data = path.read_bytes()
    for place in range(0, len(data), len(data) // 60):
        flipped = bytearray(data)
        flipped[place] ^= 4
        path.write_bytes(flipped)
        with pytest.raises(CacheFormatError, match=r"00001\.tar: damaged: expected .*`cachectl verify`"):
            open_cache(broken).read(sample_id(5))
    path.write_bytes(data[:-1])
    with pytest.raises(CacheFormatError, match="expected 10240 bytes, found 10239 bytes"):
        open_cache(broken).read(sample_id(5))
    assert_equal_records(open_cache(broken).read(sample_id(0)), make_record(0))
    path.unlink()
    with pytest.raises(CacheFormatError, match=r"lost, or cannot be read \(No such file"):
        open_cache(broken).read(sample_id(5))


def test_folders_that_are_no_finished_cache_are_refused(broken, tmp_path):
    with pytest.raises(CacheFormatError, match="not a teacher cache"):
        open_cache(tmp_path)
    with pytest.raises(ValueError, match="open_shards is 0"):
        open_cache(broken, open_shards=0)
    manifest = (broken / "manifest.json").read_bytes()
    (broken / "manifest.json").unlink()
    with pytest.raises(CacheFormatError, match="not sealed"):
        open_cache(broken)
    other = broken.parent / "other"
    build_cache(other, make_plan("webdataset", shard_size=5))
    (other / "manifest.json").write_bytes(manifest)
    with pytest.raises(CacheFormatError, match=r"manifest\.json belongs to another plan\.json"):
        open_cache(other)


def test_sidecars_that_are_not_the_manifests_are_refused(broken):
    path = sidecar_path(broken, 1)
    sidecar = read_sidecar(broken, 1)
    body = sidecar.to_dict()
    body["sample_ids"] = [f"x{i}" for i in range(4)]
    path.write_bytes(document_bytes(body))
    with pytest.raises(CacheFormatError, match=r"sidecar of shard 1 is not the one in manifest\.json"):
        open_cache(broken).read(sample_id(5))
    assert_equal_records(open_cache(broken).read(sample_id(0)), make_record(0))  # whose shard is intact
    seal(broken)  # sealed by whoever changed it: the shard itself tells
    with pytest.raises(CacheFormatError, match="shard 1 holds other samples"):
        open_cache(broken).read("x0")
    path.unlink()
    with pytest.raises(CacheFormatError, match="sidecar of shard 1 is missing"):
        open_cache(broken).read("x0")


def test_copies_elsewhere_have_the_same_hash(broken, tmp_path):
    build_cache(tmp_path / "again", make_plan("webdataset"))
    assert open_cache(tmp_path / "again").manifest_hash == open_cache(broken).manifest_hash
    assert tree(tmp_path / "again") == tree(broken)
