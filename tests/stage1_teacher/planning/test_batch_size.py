from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import vlm_distill_cache.stage1_teacher.planning.batch_size as batch_sizes
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, ModelError
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract, recompute_fidelity
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard
from vlm_distill_cache.stage1_teacher.planning import open as opening
from vlm_distill_cache.stage1_teacher.planning.batch_size import (
    automatic_batch_size,
    largest_batch,
    lengthen,
    longest_input,
)
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.planning.parts import Part


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture
def config(tiny_llava: Path):
    """Options of a cache of four shards, batch size automatic; keyword arguments are further ones."""

    def build(cache: Path, **options) -> BuildConfig:
        settings = {
            "template": "short",
            "limit": 10,
            "shard_size": 3,
            "fidelity_samples": 1,
            "threads": 1,
        } | options
        return BuildConfig(cache=str(cache), teacher=str(tiny_llava), **settings)

    return build


@pytest.mark.parametrize("most", [1, 16, 64])
@pytest.mark.parametrize("room", [1, 2, 3, 7, 8, 63, 64, 100])
@pytest.mark.parametrize("refusal", ["reported", "by the second device", "raised"])
def test_the_largest_power_of_two_that_fits_is_found_in_growing_steps(room: int, most: int, refusal: str):
    asked = []

    def measure(batch_size: int) -> list[int]:
        asked.append(batch_size)
        if refusal == "raised" and batch_size > room:
            raise torch.OutOfMemoryError
        return [100 * batch_size, 100 * batch_size]

    budget = [10**9 if refusal != "reported" else 100 * room, 10**9 if refusal == "raised" else 100 * room]
    found = largest_batch(measure, budget=budget, most=most)
    powers = [2**power for power in range(12)]
    assert found == max(size for size in powers if size <= min(room, most))
    assert asked == [size for size in powers if size <= min(2 * found, most)]


@pytest.mark.parametrize("refusal", ["reported", "raised"])
def test_a_sample_that_does_not_fit_is_an_error_that_names_the_remedies(refusal: str):
    def measure(_: int) -> list[int]:
        if refusal == "raised":
            raise torch.OutOfMemoryError
        return [99, 101]

    with pytest.raises(ModelError, match=r"smaller max_length.*device_map=auto.*quantisation=8bit"):
        largest_batch(measure, budget=[100, 100])


def test_the_longest_input_fills_the_encoder_and_runs(tmp_path: Path, config):
    work = open_build(config(tmp_path / "none", max_length=200))
    sample = longest_input(work)
    real = work.encoder(work.dataset[0])
    assert len(sample) == 200
    assert sample.visual_mask.sum() == real.visual_mask.sum()
    last = int(np.flatnonzero(sample.visual_mask)[-1])
    np.testing.assert_array_equal(sample.labels[last:-1], sample.input_ids[last + 1 :])
    assert (sample.labels[:last] == IGNORE_INDEX).all()
    assert len(list(run_shard(work, EncodedShard(index=0, samples=[sample, sample]), 2))) == 1
    assert len(lengthen(real, 1)) == len(real)


def test_a_cpu_takes_sixteen_or_what_its_memory_allows(tmp_path: Path, config, monkeypatch):
    work = open_build(config(tmp_path / "none"))
    assert work.plan.batch_size == 16
    one = batch_sizes._activation_bytes(work)
    for room, expected in ((1.5, 1), (4.2, 4), (1000, 16)):
        monkeypatch.setattr(batch_sizes, "free_memory", lambda _, room=room: int(2 * room * one))
        assert automatic_batch_size(work) == expected
    monkeypatch.setattr(batch_sizes, "free_memory", lambda _: one)
    with pytest.raises(ModelError, match="does not fit beside the teacher"):
        automatic_batch_size(work)


def test_the_probe_of_a_teacher_on_several_gpus_looks_at_each_of_them(tmp_path: Path, config, monkeypatch):
    """The second GPU has room for two samples, the first for all."""
    work = open_build(config(tmp_path / "none", batch_size=1))
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    size, most = [0], 4
    part = SimpleNamespace(device=gpus[1])
    model = SimpleNamespace(parameters=lambda: [SimpleNamespace(device=gpu) for gpu in gpus], buffers=lambda: [part])
    monkeypatch.setattr(work.teacher, "model", model)
    monkeypatch.setattr(work.teacher, "device", gpus[0])

    def run(work, samples, *, checked):
        size[0] = len(samples)
        if len(samples) > most:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(batch_sizes, "run_once", run)
    monkeypatch.setattr(batch_sizes, "free_memory", lambda gpu: 1000 if gpu == gpus[0] else 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 50)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda gpu: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 50 + 100 * size[0])
    assert work.teacher.gpus == tuple(gpus)
    assert automatic_batch_size(work) == 2
    monkeypatch.setattr(batch_sizes, "free_memory", lambda gpu: 10**6)
    assert automatic_batch_size(work) == 4


@pytest.mark.slow
def test_who_resumes_takes_the_batch_size_of_the_plan_and_measures_nothing(tmp_path: Path, config, monkeypatch):
    monkeypatch.setattr(opening, "automatic_batch_size", lambda *_: 2)
    extract(config(tmp_path / "whole"))
    extract(config(tmp_path / "cache"), part=Part(rank=0, of=2))
    assert read_plan(tmp_path / "cache").batch_size == 2

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(opening, "automatic_batch_size", refuse)
    extract(config(tmp_path / "cache"), part=Part(rank=1, of=2))
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")
    recompute_fidelity(config(tmp_path / "cache"), samples=1)
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")
    with pytest.raises(CacheMismatchError, match=r"batch_size: the cache has 2, this run has 4"):
        extract(config(tmp_path / "cache", batch_size=4))


@pytest.mark.slow
def test_a_plan_that_another_machine_wrote_meanwhile_is_adopted(tmp_path: Path, config, monkeypatch):
    extract(config(tmp_path / "whole", batch_size=2))

    def other_first(*_):
        extract(config(tmp_path / "cache", batch_size=2), part=Part(rank=0, of=2))
        return 8

    monkeypatch.setattr(opening, "automatic_batch_size", other_first)
    extract(config(tmp_path / "cache"), part=Part(rank=1, of=2))
    assert tree(tmp_path / "cache") == tree(tmp_path / "whole")


def test_other_settings_of_a_plan_written_meanwhile_are_still_refused(tmp_path: Path, config, monkeypatch):
    def other_first(*_):
        extract(config(tmp_path / "cache", batch_size=2, logits="full"), part=Part(rank=0, of=2))
        return 8

    monkeypatch.setattr(opening, "automatic_batch_size", other_first)
    with pytest.raises(CacheMismatchError, match=r"max_k") as caught:
        extract(config(tmp_path / "cache"))
    assert "batch_size" not in str(caught.value)


def test_starting_again_finds_a_batch_size_of_its_own(tmp_path: Path, config, monkeypatch):
    extract(config(tmp_path / "cache", batch_size=2))
    monkeypatch.setattr(opening, "automatic_batch_size", lambda *_: 4)
    extract(config(tmp_path / "cache"), overwrite=True)
    assert read_plan(tmp_path / "cache").batch_size == 4


def test_a_negative_batch_size_is_refused(tmp_path: Path, config):
    with pytest.raises(ConfigError, match=r"batch_size: expected a whole number of at least 0"):
        replace(config(tmp_path), batch_size=-1)


def test_a_number_that_is_none_is_refused_by_name(tmp_path: Path, config):
    with pytest.raises(ConfigError, match=r"num_workers: expected a whole number of at least -1.*got 'abc'"):
        replace(config(tmp_path), num_workers="abc")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured_with_the_teachers_own_pass(tmp_path: Path, config):
    work = open_build(config(tmp_path / "none", device="cuda", batch_size=1))
    assert automatic_batch_size(work) == batch_sizes.LARGEST
