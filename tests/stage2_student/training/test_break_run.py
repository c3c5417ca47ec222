"""Killed, or out of disk space, before any file operation, and run again: `distill run` leaves the same students and scores."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_distill_cache.common.files.atomic import TEMPORARY_PREFIX
from vlm_distill_cache.stage2_student.training.output_folder import claim_output


def break_run(folder: Path, how: str, stride: int, places=()) -> int:
    """Run `break_run.py`; returns the number of places."""
    here = Path(__file__).parents[1]
    paths = (here.parents[1], here, here.parent / "stage1_teacher")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", here / "break_run.py", how, str(stride), folder, *map(str, places)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return int(result.stdout.split()[-1])


@pytest.mark.slow
def test_killed_in_its_first_write_and_again_late_a_run_goes_on_to_the_same_end(tmp_path: Path):
    assert break_run(tmp_path, "kill", 1, places=(2, 120)) == 2


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path):
    left = tmp_path / f"{TEMPORARY_PREFIX}run.json-abc"
    left.write_text("{")
    (tmp_path / "run.json").write_text("{}")
    with claim_output(tmp_path):
        assert not left.exists()
        assert (tmp_path / "run.json").exists()


def test_a_disk_too_full_for_the_folder_itself_names_the_remedy(tmp_path: Path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match=r"make room, then run the same command again"):
        claim_output(tmp_path / "run").__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "full"])
def test_broken_everywhere_a_run_goes_on_to_the_same_end(tmp_path: Path, how: str):
    assert break_run(tmp_path, how, 3) > 40
