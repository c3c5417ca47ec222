"""Files are whole or absent, and leftovers of killed runs are told from files being written."""

import os
import tracemalloc

import pytest

from vlm_distill_cache.common.errors import CacheFormatError
from vlm_distill_cache.common.files import atomic
from vlm_distill_cache.common.files.atomic import (
    clean_stale,
    create_temporary,
    new_directory,
    publish_directory,
    publish_file,
    read_bounded,
    read_json,
    remove,
    try_lock,
    write_bytes_atomic,
    write_json_atomic,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_bytes_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes_atomic(path, b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_json_bytes_do_not_depend_on_key_order(tmp_path):
    write_json_atomic(tmp_path / "a", {"x": 1, "é": [1.5, None]})
    write_json_atomic(tmp_path / "b", {"é": [1.5, None], "x": 1})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_json(tmp_path / "a") == {"x": 1, "é": [1.5, None]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(tmp_path / "c", float("nan"))


def test_create_only_accepts_the_same_bytes_and_refuses_others(tmp_path):
    path = tmp_path / "file"
    for _ in range(2):
        write_bytes_atomic(path, b"same", create_only=True)
    with pytest.raises(FileExistsError):
        write_bytes_atomic(path, b"other", create_only=True)
    assert path.read_bytes() == b"same"
    assert len(list(tmp_path.iterdir())) == 1


def test_create_only_works_without_hard_links(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(atomic.os, "link", no_links)
    write_bytes_atomic(tmp_path / "file", b"one", create_only=True)
    with pytest.raises(FileExistsError):
        write_bytes_atomic(tmp_path / "file", b"two", create_only=True)
    assert (tmp_path / "file").read_bytes() == b"one"


def test_a_directory_is_published_once(tmp_path):
    for attempt in range(2):
        temporary, _ = create_temporary(tmp_path / "final", directory=True)
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(bytes([attempt]))
        if attempt == 0:
            publish_directory(temporary, tmp_path / "final")
        else:
            with pytest.raises(FileExistsError):
                publish_directory(temporary, tmp_path / "final")
            remove(temporary)
    assert (tmp_path / "final" / "inner" / "file").read_bytes() == b"\0"


def test_cleaning_removes_leftovers_and_spares_live_writers(tmp_path):
    live, lock = create_temporary(tmp_path / "00001.tar")
    dead, dead_lock = create_temporary(tmp_path / "00001.zarr", directory=True)
    (dead / "file").write_bytes(b"")
    other, other_lock = create_temporary(tmp_path / "00002.tar")
    for held in (dead_lock, other_lock):
        held.release()  # as the death of its process would
    assert clean_stale(tmp_path, "00001.") == [dead]
    assert live.exists()
    assert other.exists()
    lock.release()
    assert sorted(clean_stale(tmp_path)) == sorted([live, other])
    assert clean_stale(tmp_path / "missing") == []


def test_the_lock_survives_publishing(tmp_path):
    temporary, lock = create_temporary(tmp_path / "final")
    publish_file(temporary, tmp_path / "final")
    assert try_lock(tmp_path / "final") is None
    lock.release()
    lock.release()
    assert try_lock(tmp_path / "final") is not None
    assert try_lock(tmp_path / "missing") is None


def test_read_json_refuses_links_large_files_and_damage(tmp_path):
    (tmp_path / "file").write_text('{"a": 1}')
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nan").write_text("[NaN]")
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in ("link", "pipe"):
        with pytest.raises(CacheFormatError, match="not a regular file"):
            read_json(tmp_path / name)
    for name in ("nan", "deep", "bytes"):
        with pytest.raises(CacheFormatError, match="not valid JSON"):
            read_json(tmp_path / name)
    with pytest.raises(CacheFormatError, match="larger than 4 bytes"):
        read_json(tmp_path / "file", max_bytes=4)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "missing")


def test_a_new_directory_appears_whole_or_not_at_all(tmp_path):
    with new_directory(tmp_path / "deep" / "made") as temporary:
        (temporary / "a").write_text("a")
        assert not (tmp_path / "deep" / "made").exists()
    assert (tmp_path / "deep" / "made" / "a").read_text() == "a"

    def fail_half_way():
        with new_directory(tmp_path / "deep" / "other") as temporary:
            (temporary / "a").write_text("a")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["made"]
    with pytest.raises(FileExistsError), new_directory(tmp_path / "deep" / "made"):
        pass
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["made"]


def test_a_small_file_costs_its_size_and_not_its_bound(tmp_path):
    (tmp_path / "small").write_bytes(b"x" * 1000)
    tracemalloc.start()
    try:
        data = read_bounded(tmp_path / "small", max_bytes=1 << 28)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert data == b"x" * 1000
    assert most < 1 << 20
