"""Both stages, end to end: the teacher runs once, is deleted, and a student learns from a read-only cache."""

import shutil
from pathlib import Path

import pytest

from common.config import config_from_dict
from common.hashing import file_checksum
from stage1_teacher.config import BuildConfig
from stage1_teacher.extract import extract
from stage2_student.run import load_run_config, run

DATA = "shapes:images=24,seed=3"


def snapshot(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_checksum(path) for path in files}


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
def test_a_student_is_distilled_with_the_teacher_deleted_and_the_cache_read_only(tmp_path, tiny_llava, store):
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    shutil.copytree(tiny_llava, teacher)
    options = {"data": DATA, "teacher": str(teacher), "cache": str(cache), "store": store, "device": "cpu"}
    extract(
        config_from_dict(BuildConfig, options | {"shard_size": 8, "fidelity_samples": 2, "template": "short"})
    )
    shutil.rmtree(teacher)
    before = snapshot(cache)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        overrides = ["student=mobilevlm", f"data='{DATA}'", f"output={tmp_path / 'run'}", "device=cpu"]
        overrides += ["dpt.steps=1", "dft.steps=2", "sft.steps=1"]
        overrides += ["evaluation.limit=2", "evaluation.letters=false", "evaluation.overlays=1"]
        summary = run(load_run_config(None, overrides, cache=cache))
    finally:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert summary.fresh
    assert summary.report.is_file()
    assert "distilled" in summary.table
    assert snapshot(cache) == before
