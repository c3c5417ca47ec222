"""Both stages on a real GPU give what they give on a CPU; run where there is one, by `make gpu-check` among others."""

import numpy as np
import pytest
import torch
from tiny_cache import build_tiny_cache
from train_runs import LOSSES, make_config

from vlm_distill_cache.common.codecs.live import _top_by_lowest_id
from vlm_distill_cache.stage1_teacher.config import SIGNALS, BuildConfig
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.signals import encode_records
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage2_student.train import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_stage_one_gives_the_records_of_a_cpu(tiny_llava, tmp_path):
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for device in ("cpu", "cuda"):
        config = BuildConfig(
            cache=str(tmp_path / "none"), teacher=str(tiny_llava), template="short", limit=6, signals=SIGNALS, batch_size=3,
            dtype="float32", device=device,
        )  # fmt: skip
        work = open_build(config)
        shard = EncodedShard(index=0, samples=[work.encoder(work.dataset[index]) for index in range(6)])
        found[device] = {}
        for batch, signals in run_shard(work, shard, 3):
            found[device] |= zip(batch.sample_ids, encode_records(signals, batch, work.codecs), strict=True)
        assert not shard.failed
    for name, record in found["cpu"].items():
        for field, array in record.items():
            there = found["cuda"][name][field]
            assert there.shape == array.shape
            close = np.isclose(there.astype("f8"), array.astype("f8"), rtol=1e-2, atol=1.01)  # a code apart, at most
            assert close.mean() > 0.98


def test_stage_two_learns_what_it_learns_on_a_cpu(tmp_path):
    build_tiny_cache(tmp_path / "cache")
    logs = [train(make_config(tmp_path / "cache", tmp_path / device, device=device)).log for device in ("cpu", "cuda")]
    for ours, theirs in zip(*logs, strict=True):
        assert {name: ours[name] for name in LOSSES} == pytest.approx({name: theirs[name] for name in LOSSES}, rel=1e-2)


def test_the_selection_is_that_of_a_cpu():
    dense = torch.randint(0, 30, (10_000, 4_000), generator=torch.Generator().manual_seed(0)).float()
    for rows in (dense, torch.randn(10_000, 4_000).bfloat16().float()):
        assert torch.equal(_top_by_lowest_id(rows.cuda(), 64).cpu(), _top_by_lowest_id(rows, 64))
