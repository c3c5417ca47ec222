"""Teachers put together of files of two checkpoints, or cut ones, are refused in words before anything is cached."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.stage1_teacher.extract import recompute_fidelity, refuse_missing_shards
from vlm_distill_cache.stage1_teacher.quality import fidelity
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


@pytest.fixture
def copy_of(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "teacher"))


def change(path: Path, **changes) -> None:
    stored = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, key = name.rpartition("__")
        (stored[part] if part else stored)[key] = value
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_a_config_with_fewer_layers_than_the_weights_is_refused(copy_of: Path, part: str):
    change(copy_of / "config.json", **{f"{part}__num_hidden_layers": 2})
    with pytest.raises(ModelError, match=r"layers that config\.json does not name"):
        Teacher(copy_of)


def test_cut_weights_and_pickles_are_refused_without_a_traceback(copy_of: Path):
    weights = copy_of / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ModelError, match="cannot be loaded"):
        Teacher(copy_of)
    weights.unlink()
    (copy_of / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo no'\ntR.")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Teacher(copy_of)


@pytest.mark.parametrize("value", ["[]", '{"model_type": ["llava"]}', '{"model_type": "llava", "text_config": 3}'])
def test_configs_that_are_none_are_refused(copy_of: Path, value: str):
    (copy_of / "config.json").write_text(value)
    with pytest.raises(ModelError, match=r"cannot be loaded|no config"):
        Teacher(copy_of)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(copy_of: Path, tmp_path: Path, build_cache):
    from vlm_distill_cache.data.text.processors import load_tokenizer

    tokenizer = load_tokenizer(copy_of)
    tokenizer.add_tokens(["what", "color"])
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"id": "a", "conversations": [
        {"from": "human", "value": "what is <extra2> ?"}, {"from": "gpt", "value": "red"}]}]))  # fmt: skip
    tokenizer.save_pretrained(copy_of)
    with pytest.raises(ModelError, match="tokenizer and weights are of different checkpoints"):
        build_cache(tmp_path / "cache", teacher=str(copy_of), data=str(path), limit=0)


def test_a_processor_of_another_size_than_the_tower_is_refused(copy_of: Path, tmp_path: Path, build_cache):
    change(
        copy_of / "preprocessor_config.json",
        size={"height": 48, "width": 48},
        crop_size={"height": 48, "width": 48},
    )
    with pytest.raises(ModelError, match=r"cannot read sample .* files of one checkpoint"):
        build_cache(tmp_path / "cache", teacher=str(copy_of))


@pytest.mark.parametrize(("device", "said"), [("tpu9", "choose auto"), ("cuda:77", "CUDA devices are here")])
def test_devices_that_are_not_here_are_refused(tiny_llava: Path, device: str, said: str):
    with pytest.raises(ConfigError, match=said):
        Teacher(tiny_llava, device=device)


def test_a_damaged_or_missing_shard_has_no_fidelity(tiny_llava: Path, tmp_path: Path, build_cache):
    from vlm_distill_cache.stage1_teacher.config import BuildConfig

    build_cache(tmp_path / "cache")
    options = {"teacher": str(tiny_llava), "template": "short", "limit": 10, "shard_size": 4, "batch_size": 3}
    config = BuildConfig(cache=str(tmp_path / "cache"), **options)
    card = (tmp_path / "cache" / "README.md").read_bytes()
    sidecar = json.loads((tmp_path / "cache" / "shards" / "00001.json").read_text())
    name = next(name for name in sidecar["files"] if "log_gap/c" in name)
    data = bytearray((tmp_path / "cache" / name).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "cache" / name).write_bytes(data)
    with pytest.raises(CacheFormatError, match=r"damaged.*cachectl repair"):
        recompute_fidelity(config, samples=10)
    assert (tmp_path / "cache" / "README.md").read_bytes() == card
    (tmp_path / "cache" / "shards" / "00001.json").unlink()
    with pytest.raises(CacheFormatError, match="shards 1 are missing; run `teacher-cache build`"):
        recompute_fidelity(config, samples=10)
    with pytest.raises(CacheFormatError, match="shards 1 are missing"):
        refuse_missing_shards(tmp_path / "cache")


@pytest.mark.parametrize(
    "signals", [("hidden",), ("visual_logits", "visual_hidden"), ("logits", "projector_output", "hidden")]
)
@pytest.mark.slow(quick=("signals0",))
def test_an_estimate_knows_every_signal(signals, tiny_llava: Path, tmp_path: Path):
    from vlm_distill_cache.stage1_teacher.config import BuildConfig
    from vlm_distill_cache.stage1_teacher.estimate.probe import measure_probe
    from vlm_distill_cache.stage1_teacher.planning.open import open_build

    config = BuildConfig(
        teacher=str(tiny_llava),
        template="short",
        limit=6,
        signals=signals,
        cache=str(tmp_path / "c"),
        batch_size=3,
    )
    probe = measure_probe(open_build(config), samples=4, load=0.1)
    assert set(signals) <= set(probe.signals)
    assert all(probe.signals[name].decoded > 0 for name in signals)


def test_the_fidelity_control_carries_the_noise_of_batches(build_cache, tmp_path: Path, monkeypatch):
    """Run alone twice it would be exact whatever a batch does to the sums."""
    sizes, run = [], fidelity._run

    def counted(work, batch, rows):
        sizes.append(len(batch))
        found = run(work, batch, rows)
        if len(batch) > 1:  # as if sums came out otherwise in a batch
            noisy = {name: logits + 0.1 * torch.randn(logits.shape) for name, logits in found.dense.items()}
            found = replace(found, dense=noisy)
        return found

    monkeypatch.setattr(fidelity, "_run", counted)
    found = build_cache(tmp_path / "cache", batch_size=3, fidelity_samples=2).manifest.fidelity
    assert sizes == [1, 3, 1, 3]
    assert found["control_logits_gradient_error"] > 0.01
