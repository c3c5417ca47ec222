"""The folder of a cache: strangers in it, damaged manifests, disks that are full or cannot be written."""

import errno
import logging
import os
import re
import resource
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

import vlm_distill_cache.stage1_teacher.planning.cache_folder
from vlm_distill_cache.common.config import load_config, save_replay
from vlm_distill_cache.common.errors import CacheFormatError, CacheMismatchError, ConfigError, DataError
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import recompute_fidelity
from vlm_distill_cache.stage1_teacher.planning.cache_folder import explain_disk_errors, refuse_unwritable
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def cache(tmp_path: Path, build_cache) -> Path:
    build_cache(tmp_path / "cache", store="webdataset")
    return tmp_path / "cache"


def rebuild(build_cache, cache: Path):
    return build_cache(cache, store="webdataset")


def test_a_build_that_finished_no_shard_gives_way_to_other_settings(tmp_path: Path, build_cache):
    cache = tmp_path / "cache"
    replay = save_replay(BuildConfig(max_length=9), cache)  # of a cache that was here before
    with pytest.raises(DataError, match="max_length=40"):
        build_cache(cache, max_length=40)
    assert (cache / "plan.json").is_file()
    assert load_config(BuildConfig, replay).max_length == 40
    assert build_cache(cache, max_length=512).manifest.totals["samples"] == 10
    # One that finished a shard does not.
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheMismatchError, match="max_length"):
        build_cache(cache, max_length=511)


@pytest.mark.parametrize("name", ["thesis.tex", ".git/config", "processor/notes.txt"])
def test_a_strangers_file_is_never_sealed_in(cache: Path, build_cache, name: str):
    (cache / "manifest.json").unlink()
    (cache / name).parent.mkdir(exist_ok=True)
    (cache / name).write_text("not of the cache")
    with pytest.raises(ConfigError, match=rf"{name.split('/')[0]}.*not part of the cache"):
        rebuild(build_cache, cache)
    assert not (cache / "manifest.json").exists()
    assert (cache / name).read_text() == "not of the cache"


def test_sealing_by_hand_refuses_a_strangers_file(cache: Path):
    (cache / "thesis.tex").write_text("not of the cache")
    for manifest in (True, False):
        if not manifest:
            (cache / "manifest.json").unlink()
        result = CliRunner().invoke(main, ["seal", str(cache)])
        assert result.exit_code == 1
        assert "thesis.tex" in result.output


def test_a_complete_cache_only_mentions_a_strangers_file(cache: Path, build_cache, caplog):
    before = tree(cache)
    (cache / "thesis.tex").write_text("not of the cache")
    with caplog.at_level(logging.WARNING):
        assert rebuild(build_cache, cache).built == 0
    assert "thesis.tex" in caplog.text
    assert tree(cache) == before | {"thesis.tex": b"not of the cache"}


@pytest.mark.parametrize("damage", [b"", b"{", b'{"format_version": 1, "checksum": "0"}'])
def test_a_damaged_manifest_is_derived_again_from_the_sidecars(cache: Path, build_cache, caplog, damage: bytes):
    before = tree(cache)
    (cache / "manifest.json").write_bytes(damage)
    told = CliRunner().invoke(main, ["status", str(cache)]).output
    assert "shards done, 0 leased, 0 left; not sealed" in told
    assert re.search(r"manifest\.json: .*damaged.*; copy the cache again .*or build it again", told)
    with caplog.at_level(logging.WARNING):
        assert rebuild(build_cache, cache).built == 0
    assert ": sealed, " in CliRunner().invoke(main, ["status", str(cache)]).output
    assert "written again from the shards" in caplog.text
    assert tree(cache) == before


def test_what_a_killed_refill_left_in_a_sealed_cache_is_removed(cache: Path, build_cache):
    before = tree(cache)
    (cache / "shards" / ".tmp-00000.json-1-ab").write_bytes(b"half")
    rebuild(build_cache, cache)
    assert tree(cache) == before


def test_a_folder_that_cannot_be_written_is_named_before_the_teacher_is_loaded(
    tmp_path: Path, build_cache, monkeypatch
):
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.planning.cache_folder.os.access", lambda *_: False)

    def load(*_, **__):
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(Teacher, "__init__", load)
    with pytest.raises(OSError, match=r"cannot be written.*another folder") as caught:
        build_cache(tmp_path / "deep" / "cache")
    assert caught.value.filename == str(tmp_path)


def test_a_complete_cache_on_a_read_only_disk_is_up_to_date_but_not_measured_again(
    cache: Path, build_cache, tiny_llava: Path, monkeypatch
):
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.planning.cache_folder.os.access", lambda *_: False)
    assert rebuild(build_cache, cache).built == 0
    with pytest.raises(OSError, match="cannot be written"):
        recompute_fidelity(BuildConfig(cache=str(cache), teacher=str(tiny_llava)), samples=2)


def test_an_incomplete_sealed_cache_on_a_read_only_disk_stops_before_the_teacher_runs(
    cache: Path, tiny_llava: Path, monkeypatch
):
    for path in (cache / "shards").glob("00001.*"):
        path.unlink()

    def run(*_, **__):
        raise AssertionError("the teacher ran")

    def refuse(path: Path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Teacher, "run", run)
    monkeypatch.setattr("pathlib.Path.touch", refuse)
    options = ["--limit", "10", "--store", "webdataset", "--set", "shard_size=4", "--set", "batch_size=3"]
    result = CliRunner().invoke(
        main,
        ["build", "--teacher", str(tiny_llava), "--cache", str(cache), "--set", "template=short", *options],
    )
    assert result.exit_code == 1
    assert f"error: {cache}: cannot be written (Read-only file system)" in result.output


def test_sealing_on_a_read_only_disk_is_a_clear_error(cache: Path, monkeypatch):
    before = tree(cache)

    def refuse(path: Path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("pathlib.Path.touch", refuse)
    result = CliRunner().invoke(main, ["seal", str(cache)])
    assert result.exit_code == 1
    assert f"error: {cache}: cannot be written (Read-only file system); make it writable" in result.output
    assert tree(cache) == before


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
@pytest.mark.slow(quick=("webdataset",))
def test_a_write_that_really_fails_half_way_loses_nothing(tmp_path: Path, build_cache, store: str):
    options = {"store": store, "shard_size": 8}
    build_cache(tmp_path / "whole", **options)
    sizes = [p.stat().st_size for p in (tmp_path / "whole" / "shards").rglob("*") if p.is_file()]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The kernel itself refuses the byte behind the limit, in the middle of a file; Python ignores the signal.
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 100, limit[1]))
    try:
        with (
            pytest.raises(OSError, match=r"File too large; raise `ulimit -f`, then run the same command again"),
            explain_disk_errors(tmp_path / "cache"),
        ):
            build_cache(tmp_path / "cache", **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    build_cache(tmp_path / "cache", **options)
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_only_errors_of_the_cache_are_explained_as_such(tmp_path: Path):
    image = tmp_path / "images" / "1.png"
    with pytest.raises(PermissionError) as caught, explain_disk_errors(tmp_path / "cache"):
        raise PermissionError(errno.EACCES, "Permission denied", str(image))
    assert caught.value.filename == str(image)
    assert caught.value.strerror == "Permission denied"


def test_a_folder_that_is_still_to_be_made_is_writable_where_its_parent_is(tmp_path: Path):
    refuse_unwritable(tmp_path / "a" / "b" / "cache")
    assert not (tmp_path / "a").exists()


def test_a_cache_that_was_begun_before_plans_kept_the_threads_resumes(tmp_path: Path, build_cache, monkeypatch):
    plain = tmp_path / "old"
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.extract.fix_threads", lambda config, **_: config)
    build_cache(plain)
    monkeypatch.undo()
    before = tree(plain)
    assert b'"threads"' not in before["plan.json"]
    shutil.rmtree(plain / "processor")
    assert build_cache(plain).built == 0
    assert tree(plain) == before


def test_overwriting_a_cache_never_deletes_what_is_not_ours(tmp_path: Path, build_cache):
    build_cache(tmp_path / "cache")
    (tmp_path / "cache" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        build_cache(tmp_path / "cache", overwrite=True)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text("{}")
    (tmp_path / "hidden" / ".git").mkdir(parents=True)
    for name in ("foreign", "hidden"):
        with pytest.raises(ConfigError, match="not a teacher cache"):
            build_cache(tmp_path / name, overwrite=True)
    assert (tmp_path / "cache" / "thesis.tex").exists()
    assert (tmp_path / "hidden" / ".git").exists()


@pytest.mark.parametrize("survivors", [1, 4])
@pytest.mark.slow(quick=("1",))
def test_overwriting_goes_on_after_it_was_killed_half_way(tmp_path: Path, build_cache, monkeypatch, survivors: int):
    build_cache(tmp_path / "cache")
    remove, calls = vlm_distill_cache.stage1_teacher.planning.cache_folder.remove, []

    def killed(path: Path):
        if len(list((tmp_path / "cache").iterdir())) == survivors:
            raise KeyboardInterrupt
        calls.append(path)
        remove(path)

    monkeypatch.setattr(vlm_distill_cache.stage1_teacher.planning.cache_folder, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        build_cache(tmp_path / "cache", logits="full", overwrite=True)
    monkeypatch.setattr(vlm_distill_cache.stage1_teacher.planning.cache_folder, "remove", remove)
    assert calls
    assert build_cache(tmp_path / "cache", logits="full", overwrite=True).built == 3


def test_overwriting_replaces_a_damaged_and_a_newer_cache(tmp_path: Path, build_cache):
    for plan in (
        '{"format_version": 99, "checksum": "0", "new": 1}',
        '{"format_version": 1, "checksum": "0"}',
    ):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "plan.json").write_text(plan)
        (tmp_path / "cache" / ".tmp-plan.json-1-00").write_text("left behind")
        with pytest.raises(CacheFormatError, match=r"plan\.json"):
            build_cache(tmp_path / "cache")
        assert build_cache(tmp_path / "cache", overwrite=True).built == 3
        shutil.rmtree(tmp_path / "cache")
