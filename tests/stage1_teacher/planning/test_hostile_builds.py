"""Builds that meet pipes for pictures, addresses for folders, folders that vanish, and each other's --overwrite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import vlm_distill_cache.stage1_teacher.extract
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, DataError, SampleError
from vlm_distill_cache.common.pixels import decode_image
from vlm_distill_cache.data.images.load import ImageFile
from vlm_distill_cache.data.sources.pictures import open_picture
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.loop.writer import FailureBudget
from vlm_distill_cache.stage1_teacher.planning.cache_folder import in_use


def test_an_overwrite_beside_a_running_build_is_refused_and_deletes_nothing(tmp_path: Path, build_cache):
    cache = tmp_path / "cache"
    build_cache(cache, limit=2)
    before = sorted(cache.rglob("*"))
    with in_use(cache), pytest.raises(ConfigError, match="another `teacher-cache build` is running"):
        build_cache(cache, limit=2, logits="lean", overwrite=True)
    assert sorted(cache.rglob("*")) == before
    with in_use(cache):  # another build with the same options is welcome
        assert build_cache(cache, limit=2).manifest is not None
    assert build_cache(cache, limit=2, logits="lean", overwrite=True).built == 1


@pytest.mark.parametrize("loss", [shutil.rmtree, lambda cache: (cache / "plan.json").unlink()])
def test_a_build_whose_folder_is_removed_stops_at_the_next_shard(tmp_path: Path, build_cache, monkeypatch, loss):
    cache, ran = tmp_path / "cache", []
    run_shard = vlm_distill_cache.stage1_teacher.extract.run_shard

    def run_and_lose(work, shard, batch_size):
        if not ran:
            loss(cache)
        ran.append(shard.index)
        yield from run_shard(work, shard, batch_size)

    monkeypatch.setattr(vlm_distill_cache.stage1_teacher.extract, "run_shard", run_and_lose)
    with pytest.raises(CacheMismatchError, match="removed or replaced while this build ran"):
        build_cache(cache)
    assert ran == [0]


@pytest.mark.parametrize("address", ["s3://bucket/x", "https://host/x", "hf://datasets/a/b", "file:///x", ""])
def test_a_build_into_an_address_is_refused_and_makes_no_folder(tmp_path: Path, monkeypatch, address: str):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["build", "--cache", address])
    assert result.exit_code == 1
    assert "cache: " in result.output
    assert not address or f"cachectl push FOLDER {address}" in result.output
    assert not list(tmp_path.iterdir())


def test_a_pipe_or_a_device_is_a_failed_sample_and_is_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png"):
        with pytest.raises(SampleError, match=f"{name} is not a regular file"):
            ImageFile(tmp_path / name).load()


def test_reasons_of_failure_depend_neither_on_the_run_nor_on_the_folder(tmp_path: Path):
    reasons = []
    for folder in (tmp_path / "here", tmp_path / "there"):
        folder.mkdir()
        (folder / "text.png").write_text("no picture")
        for name in ("text.png", "missing.png"):
            with pytest.raises(SampleError) as caught:
                open_picture(name, folder).load()
            reasons.append(str(caught.value))
    assert reasons[:2] == reasons[2:]
    assert not any(str(tmp_path) in reason for reason in reasons)
    with pytest.raises(SampleError) as caught:
        decode_image(b"no picture", name="x")
    assert "0x" not in str(caught.value)


@pytest.mark.parametrize(("failed", "total"), [(29, 100), (7, 100), (57, 100), (1, 100)])
def test_exactly_the_tolerated_share_of_failures_is_tolerated(failed: int, total: int):
    budget = FailureBudget(total=total, share=float(f"0.{failed:02d}"))
    budget.spend([("a", "bad")] * failed)
    with pytest.raises(DataError, match=f"the tolerated {failed} %"):
        budget.spend([("b", "bad")])


def test_too_many_failures_are_told_with_the_first_reasons_and_what_goes_on_without_them():
    budget = FailureBudget(total=100, share=0.01)
    with pytest.raises(DataError) as caught:
        budget.spend([(f"s{i}", f"picture {i} is torn\x1b[2J") for i in range(7)])
    lines = str(caught.value).splitlines()
    assert lines[0] == "7 of 100 samples cannot be used, more than the tolerated 1 %:"
    assert lines[1:7] == [
        *(rf"  s{i}: picture {i} is torn\x1b[2J" for i in range(5)),
        "  ... and 2 more",
    ]
    assert "run the same command with max_failed_share=0.1, a share from 0 to 1" in lines[7]
    assert "--set max_failed_share=0.1)" in lines[7]


@pytest.mark.parametrize(
    "option",
    [
        *(f"--{name}={value}" for name in ("price", "epochs", "student-step") for value in ("nan", "inf")),
        f"--students={10**400}",
        "--json=nowhere/figures.json",
    ],
)
def test_an_estimate_of_nonsense_is_a_usage_error_before_anything_is_measured(option: str):
    result = CliRunner().invoke(main, ["estimate", option])
    assert result.exit_code == 2
    assert result.exception is None or isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    "module",
    ["vlm_distill_cache.stage1_teacher.cli", "vlm_distill_cache.common.cli", "vlm_distill_cache.stage2_student.cli"],
)
def test_the_module_is_a_command_as_torchrun_runs_it(module: str):
    ran = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True)
    assert "Usage" in ran.stdout


def test_a_folder_is_still_a_cache():
    assert BuildConfig(cache="a:b/c").cache == "a:b/c"
