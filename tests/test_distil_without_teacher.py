"""Both stages, end to end: the teacher runs once, is deleted, and a student learns from a read-only cache."""

import json
import shutil
from pathlib import Path

import pytest

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.files.hashing import file_checksum
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage2_student.run import load_run_config, run

DATA = "shapes:images=12,seed=3"


def snapshot(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_checksum(path) for path in files}


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow
def test_a_student_is_distilled_with_the_teacher_deleted_and_the_cache_read_only(tmp_path, tiny_llava, store):
    teacher, cache = tmp_path / "teacher", tmp_path / "cache"
    shutil.copytree(tiny_llava, teacher)
    options = {"data": DATA, "teacher": str(teacher), "cache": str(cache), "store": store, "device": "cpu"}
    extract(config_from_dict(BuildConfig, options | {"shard_size": 4, "fidelity_samples": 2, "template": "short"}))
    shutil.rmtree(teacher)
    before = snapshot(cache)
    for path in [cache, *cache.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        overrides = ["student=mobilevlm", f"data='{DATA}'", f"output={tmp_path / 'run'}", "device=cpu"]
        overrides += ["dpt.steps=1", "dft.steps=2", "sft.steps=1"]
        overrides += [f"{phase}.batch_size=4" for phase in ("dpt", "dft", "sft")]
        overrides += ["evaluation.limit=2", "evaluation.letters=false", "evaluation.overlays=1"]
        overrides += ["evaluation.agreement_samples=4"]
        summary = run(load_run_config(None, overrides, cache=cache))
    finally:
        for path in [cache, *cache.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
    assert summary.fresh
    assert summary.report.is_file()
    assert "distilled" in summary.table
    assert snapshot(cache) == before


@pytest.mark.slow
def test_a_users_file_with_a_broken_image_and_long_answers_runs_to_the_report(tmp_path: Path, build_cache):
    from PIL import Image

    entries = []
    for index in range(12):
        Image.new("RGB", (50, 30), (20 * index, 90, 10)).save(tmp_path / f"{index}.png")
        turns = ["describe the image", "a red circle left of a blue square"]
        pair = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), turns, strict=True)]
        entries.append({"id": str(index), "image": f"{index}.png", "conversations": pair})
    (tmp_path / "3.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "d.json").write_text(json.dumps(entries))
    build_cache(tmp_path / "cache", data=str(tmp_path / "d.json"), limit=0, max_failed_share=0.2)
    steps = [f"{phase}.{option}" for phase in ("dpt", "dft", "sft") for option in ("steps=2", "batch_size=4")]
    overrides = [*steps, f"data={json.dumps(str(tmp_path / 'd.json'))}", f"output={tmp_path / 'run'}"]
    summary = run(load_run_config(None, overrides, cache=tmp_path / "cache"))
    assert summary.report.is_file()
    assert "top-1 agrees with teacher" in summary.table
