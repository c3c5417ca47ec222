"""Reading from afar: the same records, within bounds, shared, and never a byte nobody checked."""

from __future__ import annotations

import errno
import logging
import shutil
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from cache_factory import assert_equal_records, build_cache, make_plan, make_record, sample_id
from click.testing import CliRunner
from servers import s3_environment, serve_nginx, serve_s3

from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.cache.side_files import SINKS
from vlm_distill_cache.common.cli import main
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, TransferError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.common.remotes import mirror as mirror_module
from vlm_distill_cache.common.remotes.directory import DirectoryRemote
from vlm_distill_cache.common.remotes.mirror import Mirror, find_mirror, local_folder
from vlm_distill_cache.common.remotes.push import push

SAMPLES = 24  # 6 shards of 4; one sample of shard 0 failed


class CountingRemote(DirectoryRemote):
    """A folder that counts what is fetched from it, and can be switched off."""

    fetched: Counter[str]
    reachable: bool = True

    def download(self, name, target, *, size, on_bytes=None):
        self._check()
        self.fetched[name] += 1
        super().download(name, target, size=size, on_bytes=on_bytes)

    def read(self, name, **options):
        self._check()
        return super().read(name, **options)

    def _check(self):
        if not CountingRemote.reachable:
            raise TransferError(f"{self.location}: no answer; try again")

    @property
    def shards(self) -> set[int]:
        return {int(name[7:12]) for name in self.fetched if name.startswith("shards/") and name[12:] != ".json"}


@pytest.fixture(scope="module", params=["zarr", "webdataset"])
def built(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("built") / "cache"
    build_cache(path, make_plan(request.param, samples=SAMPLES))
    return path


@pytest.fixture
def remote(built: Path, tmp_path: Path, monkeypatch) -> CountingRemote:
    shutil.copytree(built, tmp_path / "far")
    remote = CountingRemote(tmp_path / "far")
    remote.fetched = Counter()
    monkeypatch.setattr(CountingRemote, "reachable", True)
    monkeypatch.setattr(mirror_module, "open_remote", lambda _: remote)
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    mirror_module._pinned.clear()
    return remote


def set_limit(monkeypatch, remote: CountingRemote, shards: float) -> int:
    """Let so many of the largest shards fit; returns the limit."""
    limit = int(shards * max(shard.bytes for shard in read_manifest(remote.root).shards))
    monkeypatch.setenv("VLM_DISTILL_CACHE_BYTES", str(limit))
    return limit


def present(cache: TeacherCache) -> set[int]:
    return {
        int(path.name[:5])
        for path in (cache.path / "shards").iterdir()
        if path.suffix in (".zarr", ".tar") and not path.name.startswith(".")
    }


def open_mirror(location: str, *, open_shards: int) -> TeacherCache:
    """What ``open_cache`` does for an address, here also for a path whose remote is a ``CountingRemote``."""
    mirror = find_mirror(location)
    return TeacherCache(mirror.folder, open_shards=open_shards, before_open=mirror.hold)


def first_of(shard: int) -> str:
    return sample_id(4 * shard)


def test_records_are_the_folders_and_only_shards_that_are_read_come(remote: CountingRemote):
    cache = open_mirror(remote.location, open_shards=2)
    assert remote.shards == set()
    assert cache.manifest_hash == read_manifest(remote.root).hash
    for position in (9, 10, 21):
        assert_equal_records(cache.read(sample_id(position)), make_record(position))
    assert remote.shards == {2, 5}
    assert (cache.path / "processor" / "note.json").is_file()
    mirror_module._pinned.clear()  # as another process would
    again = open_mirror(remote.location, open_shards=2)
    assert_equal_records(again.read(sample_id(9)), make_record(9))
    assert max(remote.fetched.values()) == 1


def test_an_address_goes_through_open_cache(remote: CountingRemote):
    cache = open_cache("https://example.org/a cache")
    assert_equal_records(cache.read(sample_id(9)), make_record(9))
    assert local_folder("https://example.org/a cache") == cache.path
    assert local_folder(remote.root) == remote.root


def test_all_shards_pass_through_a_space_for_two(remote: CountingRemote, monkeypatch):
    limit = set_limit(monkeypatch, remote, 2)
    cache = open_mirror(remote.location, open_shards=1)
    for position in range(SAMPLES):
        if position != 3:
            assert_equal_records(cache.read(sample_id(position)), make_record(position))
            files = [path for path in (cache.path / "shards").rglob("*") if path.is_file()]
            here = [f"/{shard:05d}." for shard in present(cache)]
            sizes = [f.stat().st_size for f in files if any(mark in str(f) for mark in here)
                     and not any(f.name == f"{mark[1:]}json" for mark in here)]  # fmt: skip
            assert sum(sizes) <= limit
    assert max(remote.fetched.values()) == 1
    assert 5 in present(cache)


def test_the_one_used_longest_ago_leaves_first(remote: CountingRemote, monkeypatch):
    set_limit(monkeypatch, remote, 3)
    cache = open_mirror(remote.location, open_shards=1)
    for shard in (1, 2, 1, 3, 4, 5):
        if {1, 2, 3} <= present(cache) or shard < 4:
            cache.read(first_of(shard))
            time.sleep(0.02)  # the file system's clock has ticked
    gone = {1, 2, 3} - present(cache)
    assert 2 in gone
    assert 3 not in gone


def test_open_shards_stay_beyond_the_limit_and_leave_once_closed(
    remote: CountingRemote, monkeypatch, caplog: pytest.LogCaptureFixture
):
    limit = set_limit(monkeypatch, remote, 1)
    cache = open_mirror(remote.location, open_shards=4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            for shard in (1, 2, 3, 4):
                cache.read(first_of(shard))
    assert present(cache) == {1, 2, 3, 4}
    assert max(remote.fetched.values()) == 1  # no thrashing
    assert caplog.text.count(f"above its limit of {limit}") == 1
    cache.close()
    cache.read(first_of(5))
    assert present(cache) == {5}


@pytest.mark.slow(quick=("webdataset",))
def test_many_readers_of_one_small_space_all_read_right(remote: CountingRemote, monkeypatch):
    set_limit(monkeypatch, remote, 2)
    manifest = read_manifest(remote.root)
    find_mirror(remote.location)
    root, limit = mirror_module.mirror_settings()

    def work(seed: int) -> None:
        own = Mirror(remote.location, manifest, root, limit)  # as another process has
        cache = TeacherCache(own.folder, open_shards=1, before_open=own.hold)
        for position in np.random.default_rng(seed).permutation(SAMPLES).tolist():
            if position != 3:
                assert_equal_records(cache.read(sample_id(position)), make_record(position))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, seed) for seed in range(4)]:
            done.result()


def test_readers_that_want_one_shard_at_once_fetch_it_once(remote: CountingRemote):
    manifest = read_manifest(remote.root)
    find_mirror(remote.location)
    root, limit = mirror_module.mirror_settings()
    start = threading.Barrier(4)

    def work(_: int) -> None:
        own = Mirror(remote.location, manifest, root, limit)
        start.wait()
        own.hold(2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert remote.shards == {2}
    assert max(remote.fetched.values()) == 1


def test_a_shard_in_use_by_another_reader_stays(remote: CountingRemote, monkeypatch):
    set_limit(monkeypatch, remote, 1)
    first = open_mirror(remote.location, open_shards=1)
    first.read(first_of(1))
    second = open_mirror(remote.location, open_shards=1)
    second.read(first_of(2))
    assert present(second) == {1, 2}
    first.close()
    second.read(first_of(3))
    assert 1 not in present(second)


def test_a_cache_that_changes_under_a_run_is_an_error(remote: CountingRemote, tmp_path: Path):
    cache = open_mirror(remote.location, open_shards=2)
    old = cache.manifest_hash
    cache.read(first_of(1))
    store = cache.plan.store
    shutil.rmtree(remote.root)
    build_cache(remote.root, make_plan(store, samples=SAMPLES + 8, shard_size=5))
    assert_equal_records(cache.read(first_of(1)), make_record(4))  # what is here is the pinned one
    with pytest.raises(CacheMismatchError, match=f"changed during this run: its manifest was {old}"):
        cache.read(first_of(4))


def test_without_its_remote_a_complete_mirror_still_reads(remote: CountingRemote, monkeypatch, caplog):
    cache = open_mirror(remote.location, open_shards=2)
    for shard in range(5):
        cache.read(first_of(shard))
    monkeypatch.setattr(CountingRemote, "reachable", False)
    assert_equal_records(cache.read(first_of(1)), make_record(4))
    with pytest.raises(TransferError, match="no answer"):
        cache.read(first_of(5))
    mirror_module._pinned.clear()
    with pytest.raises(TransferError, match="no answer"):
        open_mirror(remote.location, open_shards=2)  # a shard is not here
    monkeypatch.setattr(CountingRemote, "reachable", True)
    open_mirror(remote.location, open_shards=2).read(first_of(5))
    monkeypatch.setattr(CountingRemote, "reachable", False)
    mirror_module._pinned.clear()
    again = open_mirror(remote.location, open_shards=2)
    assert_equal_records(again.read(first_of(5)), make_record(20))
    assert ": no answer; all of the cache is in " in caplog.text  # and no remedy: nothing is to be done


def test_damage_in_the_mirror_is_mended_and_damage_at_the_source_refused(remote: CountingRemote, caplog):
    cache = open_mirror(remote.location, open_shards=1)
    cache.read(first_of(1))
    cache.read(first_of(2))
    path = max((p for p in (cache.path / "shards").rglob("*") if "/00001." in str(p) and p.is_file()
                and p.suffix != ".json"), key=lambda p: p.stat().st_size)  # fmt: skip
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_equal_records(cache.read(first_of(1)), make_record(4))
    assert "damaged; it is fetched again" in caplog.text
    far = remote.root / path.relative_to(cache.path).as_posix().replace("/00001.", "/00003.")
    far.write_bytes(far.read_bytes()[::-1])
    with pytest.raises(TransferError, match="damaged or changed"):
        cache.read(first_of(3))


def test_a_killed_fetch_goes_on(remote: CountingRemote, monkeypatch):
    set_limit(monkeypatch, remote, 1)
    cache = open_mirror(remote.location, open_shards=1)

    class KilledError(Exception):
        pass

    def killed(name, target, *, size, on_bytes=None):
        target.write_bytes(b"half")
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(remote, "download", killed)
        with pytest.raises(KilledError):
            cache.read(first_of(2))
    assert_equal_records(cache.read(first_of(2)), make_record(8))
    cache.read(first_of(3))
    assert present(cache) <= {3, 2}
    cache.read(first_of(4))
    assert 2 not in present(cache)


def test_what_is_expected_is_fetched_ahead_as_far_as_it_fits(remote: CountingRemote, monkeypatch):
    set_limit(monkeypatch, remote, 2.5)
    mirror = find_mirror(remote.location)
    cache = TeacherCache(mirror.folder, open_shards=1, before_open=mirror.hold)
    cache.read(first_of(1))
    mirror.expect([2])
    mirror.wait()
    assert remote.shards == {1, 2}
    held = [mirror.hold(2), mirror.hold(1)]
    mirror.expect([3, 4])
    mirror.wait()
    assert remote.shards == {1, 2}  # both places are in use
    assert len(held) == 2
    mirror.expect(())
    monkeypatch.setattr(CountingRemote, "reachable", False)
    held.clear()
    mirror.expect([5])
    mirror.wait()  # whoever reads it is told
    with pytest.raises(TransferError, match="no answer"):
        cache.read(first_of(5))


def test_what_is_expected_never_displaces_what_is_expected_before_it(remote: CountingRemote, monkeypatch):
    set_limit(monkeypatch, remote, 3.2)
    mirror = find_mirror(remote.location)
    held = mirror.hold(1)
    mirror.expect([2, 3, 4, 5])
    mirror.wait()
    assert remote.shards >= {1, 2, 3}
    sizes = {shard.index: shard.bytes for shard in mirror.manifest.shards}
    assert sum(sizes[shard] for shard in remote.shards) <= int(3.2 * max(sizes.values()))
    assert max(remote.fetched.values()) == 1
    assert held is not None


def test_a_copy_in_another_process_brings_its_own_connection(remote: CountingRemote):
    cache = open_mirror(remote.location, open_shards=1)
    cache.read(first_of(1))
    copy = deepcopy(cache)  # through __getstate__, as pickling does
    assert_equal_records(copy.read(first_of(2)), make_record(8))


def test_a_forged_cache_of_the_same_hash_does_not_pass_for_the_real_one(
    remote: CountingRemote, tmp_path: Path, monkeypatch
):
    build_cache(tmp_path / "forged", make_plan(samples=8))
    real = read_manifest(remote.root)
    forged = CountingRemote(tmp_path / "forged")
    forged.fetched = Counter()
    with monkeypatch.context() as patch:  # somebody found a second manifest with this fast hash
        patch.setattr("vlm_distill_cache.common.cache.manifest.Manifest.hash", real.hash)
        patch.setattr(mirror_module, "open_remote", lambda _: forged)
        open_mirror(forged.location, open_shards=1)
    with pytest.raises(CacheFormatError, match="one of the two is forged"):
        open_mirror(remote.location, open_shards=1)


def test_sinks_that_were_found_since_are_those_of_the_address_and_its_shards_stay(remote: CountingRemote):
    cache = open_mirror(remote.location, open_shards=1)
    cache.read(first_of(1))
    for text in ("{}", "[]", None):  # none before, others of this size, none again
        (remote.root / SINKS).unlink(missing_ok=True)
        if text is not None:
            (remote.root / SINKS).write_text(text)
        made = seal(remote.root, rewritten=True)
        mirror_module._pinned.clear()  # as another process would
        again = open_mirror(remote.location, open_shards=1)
        assert again.manifest.files == made.files
        assert again.manifest_hash == cache.manifest_hash
        if text is not None:
            again.check_side_files([SINKS])
            assert (again.path / SINKS).read_text() == text
        assert_equal_records(again.read(first_of(1)), make_record(4))
    assert {name: count for name, count in remote.fetched.items() if count > 1} == {SINKS: 2}


@pytest.mark.parametrize("limit", ["0", "10 GB", "-1", "\u00b2"])
def test_a_limit_that_is_no_size_is_refused(monkeypatch, limit: str):
    monkeypatch.setenv("VLM_DISTILL_CACHE_BYTES", limit)
    with pytest.raises(ConfigError, match="VLM_DISTILL_CACHE_BYTES"):
        find_mirror("https://example.org")


def test_a_folder_that_may_not_be_written_is_named_with_the_variable(remote: CountingRemote, monkeypatch):
    def refuse(path: Path, **_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(mirror_module, "locked", refuse)
    with pytest.raises(ConfigError, match="lock: Permission denied; set VLM_DISTILL_CACHE_DIR"):
        open_mirror(remote.location, open_shards=1)


def test_somebody_elses_lock_file_serves_whoever_may_write_it(remote: CountingRemote, monkeypatch):
    monkeypatch.setattr("os.utime", lambda path: None)  # with a time, only the owner may call it
    cache = open_mirror(remote.location, open_shards=1)
    assert_equal_records(cache.read(sample_id(9)), make_record(9))


def test_what_is_no_sealed_cache_is_refused(remote: CountingRemote):
    (remote.root / "manifest.json").unlink()
    with pytest.raises(CacheFormatError, match=r"manifest\.json"):
        open_mirror(remote.location, open_shards=1)
    seal(remote.root)
    assert len(open_mirror(remote.location, open_shards=1)) == SAMPLES - 1


def assert_reads_all(location: str) -> None:
    cache = open_cache(location)
    assert_equal_records(cache.read(sample_id(9)), make_record(9))
    assert len(present(cache)) == 1
    for position in range(SAMPLES):
        if position != 3:
            assert_equal_records(cache.read(sample_id(position)), make_record(position))


def test_a_web_servers_cache_is_read_in_place(built: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    with serve_nginx(built.parent, tmp_path / "nginx") as url:
        assert_reads_all(f"{url}/{built.name}")
        shown = CliRunner().invoke(main, ["inspect", f"{url}/{built.name}"]).output
        assert f"teacher cache   {url}/{built.name}: " in shown
        assert f"cachectl pull {url}/{built.name} FOLDER" in shown
        assert "cachectl verify" not in shown  # which takes no address
        record = CliRunner().invoke(main, ["inspect", f"{url}/{built.name}", sample_id(9)])
        assert record.exit_code == 0, record.output
        assert sample_id(9) in record.output


def test_a_cache_pushed_to_s3_is_read_in_place(tmp_path: Path, monkeypatch):
    build_cache(tmp_path / "cache", make_plan("webdataset", samples=SAMPLES))
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "near"))
    with serve_s3() as url:
        for name, value in s3_environment(url).items():
            monkeypatch.setenv(name, value)
        push(tmp_path / "cache", "s3://caches/mirror/cache")
        assert_reads_all("s3://caches/mirror/cache")
