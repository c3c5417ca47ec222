import errno
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from vlm_distill_cache.stage1_teacher.cli import main


@pytest.fixture
def built(tmp_path: Path, tiny_llava: Path) -> tuple[Path, str]:
    result = CliRunner().invoke(
        main,
        ["build", "--teacher", str(tiny_llava), "--cache", str(tmp_path / "cache"), "--limit", "5",
         "--signals", "logits", "--set", "template=short", "--set", "fidelity_samples=0"],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return tmp_path / "cache", result.output


def test_build_ends_with_sizes_and_the_next_command(built: tuple[Path, str]):
    cache, output = built
    assert "Teacher cache written: 5 samples" in output
    assert "bytes/row" in output
    # No TEACHER: make would build again, with the default options, and be refused.
    off = "SET='dpt.losses.answer_attention=0 dft.losses.answer_attention=0'"
    assert f"Next: make distill STUDENT=mobilevlm DATA=shapes CACHE={cache} {off}" in output.splitlines()


def test_report_and_seal_read_a_finished_cache(built: tuple[Path, str]):
    cache, _ = built
    manifest = (cache / "manifest.json").read_bytes()
    (cache / "manifest.json").unlink()
    assert "Sealed" in CliRunner().invoke(main, ["seal", str(cache)], catch_exceptions=False).output
    assert (cache / "manifest.json").read_bytes() == manifest
    assert "5 samples" in CliRunner().invoke(main, ["report", str(cache)], catch_exceptions=False).output


def test_usage_errors_exit_with_2():
    assert CliRunner().invoke(main, ["build", "--store", "pickle"]).exit_code == 2
    assert CliRunner().invoke(main, ["build", "--limit", "0"]).exit_code == 2


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path, tiny_llava: Path, monkeypatch, store: str):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vlm_distill_cache.common.files.atomic.os.fsync", full)
    cache = tmp_path / "cache"
    result = CliRunner().invoke(
        main, ["build", "--teacher", str(tiny_llava), "--cache", str(cache), "--limit", "2", "--store", store]
    )
    assert result.exit_code == 1
    assert f"error: {cache / 'plan.json'}: No space left on device" in result.output
    assert "make room, then run the same command again" in result.output
