"""A student learns the same from a cache whose shards lie in folders."""

import shutil

import pytest
from tiny_cache import DATA

from vlm_distill_cache.common.cache import layout
from vlm_distill_cache.common.cache.documents import document_bytes, read_document
from vlm_distill_cache.common.cache.layout import shard_stem
from vlm_distill_cache.common.cache.manifest import read_manifest, seal
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.train import train


def put_into_folders(flat, target, monkeypatch):
    """Copy a flat cache, and lay its shards as one of many has them; from now on as few as it has are many."""
    shutil.copytree(flat, target, ignore=shutil.ignore_patterns("manifest.json"))
    count = read_plan(flat).shard_count
    monkeypatch.setattr(layout, "FLAT_SHARDS", 1)
    monkeypatch.setattr(layout, "FOLDER_SHARDS", 2)
    for index in range(count):
        old, new = f"shards/{index:05d}.", shard_stem(index, count)
        body = read_document(flat / f"{old}json")
        body["files"] = {name.replace(old, new): entry for name, entry in body["files"].items()}
        (target / new).parent.mkdir(exist_ok=True)
        for path in (target / "shards").glob(f"{index:05d}.*"):
            path.rename((target / new).parent / path.name)
        (target / f"{new}json").write_bytes(document_bytes(body))
    seal(target, fidelity=read_manifest(flat).fidelity)


@pytest.mark.slow
def test_a_student_of_a_cache_with_folders_is_that_of_a_flat_one(tiny_cache, tmp_path, monkeypatch):
    def learn(cache, output):
        options = {
            "student": "mobilevlm-tiny", "data": DATA, "cache": str(cache), "output": str(output), "device": "cpu",
            "memory_gib": 0, "phases": ("dft",),
            "dft": {"steps": 3, "batch_size": 6, "losses": {"logits": 1.0, "answer_attention": 1.0}},
        }  # fmt: skip
        return (train(config_from_dict(TrainConfig, options)).final / "model.safetensors").read_bytes()

    expected = learn(tiny_cache[0], tmp_path / "a")
    put_into_folders(tiny_cache[0], tmp_path / "cache", monkeypatch)
    assert (tmp_path / "cache/shards/00/00000.json").is_file()
    assert learn(tmp_path / "cache", tmp_path / "b") == expected
