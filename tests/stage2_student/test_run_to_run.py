"""A run is a function of its configuration: no dropout but LoRA's, whose numbers belong to the step."""

import errno

import pytest
import torch
from image_array import ImageArray
from tiny_cache import DATA
from tiny_students import library_student
from train_runs import make_config

from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.common.files.hashing import file_checksum
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.sample import Dataset
from vlm_distill_cache.stage2_student.train import switch_dropout_off, train
from vlm_distill_cache.stage2_student.training import checkpoint as checkpoint_module
from vlm_distill_cache.stage2_student.training.checkpoint import Position, write_checkpoint
from vlm_distill_cache.stage2_student.training.optimizers import step_seed


def test_a_students_own_dropout_is_off_in_training():
    student, inputs = library_student()
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    student.train()
    noisy = [student(**inputs).logits for _ in range(2)]
    assert not torch.equal(*noisy)
    switch_dropout_off(student)
    still = [student(**inputs).logits for _ in range(2)]
    assert torch.equal(*still)
    assert torch.equal(still[0], student.eval()(**inputs).logits)


def test_lora_with_dropout_is_the_same_run_twice_and_others_by_seed(tiny_cache, tmp_path):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(len(hashes))  # whatever was drawn before
        phase = {"steps": 3, "batch_size": 4, "trainable": "lora"}
        config = make_config(
            tiny_cache[0],
            tmp_path / name,
            dft=phase,
            phases=("dft",),
            seed=seed,
            lora={"rank": 2, "alpha": 4, "dropout": 0.3},
        )
        train(config)
        hashes.append(file_checksum(tmp_path / name / "final" / "model.safetensors"))
    assert hashes[0] == hashes[1] != hashes[2]


def test_each_step_and_process_draws_its_own_numbers():
    seeds = {step_seed(0, phase, step, rank) for phase in ("dpt", "dft") for step in range(5) for rank in range(3)}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_baseline_without_signals_is_refused_other_pictures_too(tiny_cache, tmp_path, monkeypatch):
    class Changed(Dataset):
        def __init__(self, dataset):
            self.dataset = dataset
            self.name, self.sample_ids = dataset.name, dataset.sample_ids

        def __len__(self):
            return len(self.dataset)

        def __getitem__(self, index):
            from dataclasses import replace

            sample = self.dataset[index]
            if index != 7:
                return sample
            import numpy as np

            pixels = np.array(sample.images[0].load())
            pixels[0, 0] ^= 1
            return replace(sample, images=(ImageArray(pixels, "changed"),))

        def fingerprint(self):
            return self.dataset.fingerprint()

    monkeypatch.setattr(
        "vlm_distill_cache.stage2_student.training.preparation.open_cached_data",
        lambda *_, **__: Changed(open_dataset(DATA)),
    )
    phase = {"steps": 8, "batch_size": 4, "losses": {"lm": 1.0}}
    with pytest.raises(CacheMismatchError, match="picture's hash"):
        train(make_config(tiny_cache[0], tmp_path / "run", sft=phase, phases=("sft",)))


def test_a_full_disk_is_reported_as_such(tmp_path, monkeypatch):
    def full(*_):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")  # noqa: TRY301
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc] . unexpected pos 1 vs 0")  # noqa: B904

    def silent(*_):
        raise RuntimeError("unexpected pos")

    model = torch.nn.Linear(2, 2)
    for save, said in ((full, "No space left"), (silent, "disk may be full")):
        monkeypatch.setattr(checkpoint_module.torch, "save", save)
        with pytest.raises(OSError, match=said):
            write_checkpoint(
                tmp_path / "run", Position(), student=model.state_dict(), optimizer=torch.optim.AdamW(model.parameters()),
                fingerprint="f", keep=1,
            )  # fmt: skip
