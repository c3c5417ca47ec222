"""Both stages on a device that does not exist: a tensor that was not moved to it is an error, as on a GPU."""

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from other_device import ELSEWHERE, MixedDevicesError, other_device
from tiny_cache import build_tiny_cache
from torch.utils._python_dispatch import _disable_current_modes
from train_runs import LOSSES, make_config

import vlm_distill_cache.stage1_teacher.teacher.teacher as teachers
import vlm_distill_cache.stage2_student.train as training
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.stage1_teacher.config import SIGNALS, BuildConfig
from vlm_distill_cache.stage1_teacher.loop.forward import run_shard
from vlm_distill_cache.stage1_teacher.loop.signals import encode_records, reduce_output, to_cpu
from vlm_distill_cache.stage1_teacher.loop.work import Build
from vlm_distill_cache.stage1_teacher.loop.writer import EncodedShard
from vlm_distill_cache.stage1_teacher.planning.open import open_build
from vlm_distill_cache.stage1_teacher.teacher.inputs import TeacherInputs
from vlm_distill_cache.stage2_student.batches.batch import TrainingBatch
from vlm_distill_cache.stage2_student.training.working import Working


def test_tensors_of_the_other_device_have_gradients_and_refuse_those_of_the_cpu():
    with other_device() as device:
        linear = torch.nn.Linear(3, 2).to(ELSEWHERE)
        inputs = torch.ones(4, 3)
        with pytest.raises(MixedDevicesError, match=r"\[4, 3\] lie on the CPU"):
            linear(inputs)
        loss = (linear(inputs.to(ELSEWHERE)) * torch.zeros(2, device=ELSEWHERE) + torch.tensor(1.0)).sum()
        loss.backward()
        assert linear.weight.grad.device == loss.device == ELSEWHERE
        assert device.waits == []
        assert float(loss.detach()) == 8.0
        assert loss.cpu().device.type == "cpu"
        assert len(device.waits) == 2


def build(tiny_llava: Path, folder: Path, **options) -> Build:
    settings = {"template": "short", "limit": 6, "signals": SIGNALS, "batch_size": 3, "dtype": "float32", "threads": 1}
    return open_build(BuildConfig(cache=str(folder), teacher=str(tiny_llava), **settings, **options))


def records(work: Build) -> dict[str, dict[str, np.ndarray]]:
    shard = EncodedShard(index=0, samples=[work.encoder(work.dataset[index]) for index in range(6)])
    found = {}
    for batch, signals in run_shard(work, shard, 3):
        found |= zip(batch.sample_ids, encode_records(signals, batch, work.codecs), strict=True)
    assert not shard.failed
    return found


@pytest.fixture
def elsewhere(monkeypatch):
    """`device=cuda` is the other device."""
    find = teachers.find_device

    def found(name: str, **how) -> torch.device:
        return ELSEWHERE if name == "cuda" else find(name, **how)

    monkeypatch.setattr(teachers, "find_device", found)
    with other_device() as device:
        yield device


def test_stage_one_moves_all_that_it_gives_the_teacher_and_gets_the_same_records(elsewhere, tiny_llava, tmp_path):
    work = build(tiny_llava, tmp_path / "none", device="cuda")
    assert work.teacher.device == ELSEWHERE
    found = records(work)
    # As it is, and quickly: the modes are for what lies elsewhere.
    with _disable_current_modes():
        expected = records(build(tiny_llava, tmp_path / "none", device="cpu"))
    assert found.keys() == expected.keys()
    for name, record in expected.items():
        for field, array in record.items():
            there = found[name][field]
            assert there.shape == array.shape
            # Rows are padded to another width there, so sums may end in another bit, and a code be the next one.
            assert np.isclose(there.astype("f8"), array.astype("f8"), rtol=2e-3, atol=0.02).mean() > 0.99


def test_a_move_that_stage_one_forgets_is_noticed(elsewhere, tiny_llava, tmp_path, monkeypatch):
    work = build(tiny_llava, tmp_path / "none", device="cuda")
    move = TeacherInputs.to

    def forgets(inputs: TeacherInputs, device: torch.device) -> TeacherInputs:
        return replace(move(inputs, device), model_inputs=inputs.model_inputs)

    monkeypatch.setattr(TeacherInputs, "to", forgets)
    with pytest.raises(ModelError, match="expected all tensors on lazy:0"):
        records(work)


def test_stage_one_waits_for_nothing_before_and_behind_the_librarys_own_pass(elsewhere, tiny_llava, tmp_path):
    work = build(tiny_llava, tmp_path / "none", device="cuda")
    batch = collate([work.encoder(work.dataset[index]) for index in range(3)], work.teacher.pad_token_id)
    inputs = work.prepare(batch)
    with torch.inference_mode():
        output = work.run(batch, inputs)  # where the library waits as it likes
        elsewhere.waits.clear()
        inputs.to(work.teacher.device)
        to_cpu(reduce_output(output, batch, work.codecs, checked=False), non_blocking=True)
    assert elsewhere.waits == []


def trained(cache: Path, output: Path, monkeypatch, device: torch.device) -> list[dict[str, float]]:
    """The log of a run of one phase; what it would save is not."""
    AcceleratorState._reset_state(reset_partial_state=True)
    losses = {"logits": 1.0, "answer_attention": 1.0, "visual_columns": 0.5, "visual_map": 0.5}
    phase = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "losses": losses}
    config = make_config(cache, output, phases=["dft"], dft=phase)
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "device", property(lambda self: device))
        fused = sys.modules["torch.optim.optimizer"]
        patch.setattr(fused, "_get_fused_kernels_supported_devices", lambda: ["cpu", ELSEWHERE.type])
        patch.setattr(Working, "save", lambda *_, **__: None)
        patch.setattr(training, "export", lambda *_: output)
        found = training.train(config)
    assert {parameter.device for parameter in found.model.parameters()} == {device}
    return [{name: record[name] for name in LOSSES} for record in found.log]


@pytest.mark.slow
def test_a_move_that_stage_two_forgets_is_noticed(tmp_path, monkeypatch):
    build_tiny_cache(tmp_path / "cache")
    move = TrainingBatch.to

    def forgets(batch: TrainingBatch, device: torch.device) -> TrainingBatch:
        return replace(move(batch, device), labels=batch.labels)

    monkeypatch.setattr(TrainingBatch, "to", forgets)
    with other_device(), pytest.raises(MixedDevicesError, match="lie on the CPU"):
        trained(tmp_path / "cache", tmp_path / "there", monkeypatch, ELSEWHERE)


def test_stage_two_moves_all_that_it_gives_the_student_and_learns_the_same(tmp_path, monkeypatch):
    build_tiny_cache(tmp_path / "cache")
    expected = trained(tmp_path / "cache", tmp_path / "cpu", monkeypatch, torch.device("cpu"))
    with other_device() as device:
        found = trained(tmp_path / "cache", tmp_path / "there", monkeypatch, ELSEWHERE)
    assert len(found) == 2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    # Of each micro-batch what three losses on attention and two shares of sinks are means over, and whether the pictures fit
    # the text; a step's finite check; the log.
    waits = Counter(place.partition(":")[0] for _, place in device.waits)
    del waits["stage2_student/training/parts.py"]  # at the end of a phase
    assert waits == {
        "common/models/llava.py": 2 * 2,
        "stage2_student/losses/attention.py": 2 * 2 * 5,
        "stage2_student/training/steps.py": 2,
        "stage2_student/training/log.py": 1,
    }
