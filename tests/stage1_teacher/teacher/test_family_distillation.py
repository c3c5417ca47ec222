"""One step of distilling a tiny MobileVLM from a cache of every family, with the teacher's tokenizer."""

from pathlib import Path

import pytest
import torch
import transformers as hf
from family_caches import build
from tiny_families import TEXT, TINY, VISION, make_lively, square

from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.data.text.processors import load_tokenizer
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.log import read_log


def save_student(folder: Path, cache) -> Path:
    """A MobileVLM of 9 visual tokens that speaks the teacher's tokens and has pictures of its own (padded)."""
    tokenizer = load_tokenizer(cache.path / "processor")
    # What the teacher's prompt template writes for a picture is one token of this student.
    image_token_id = cache.plan.teacher["image_token_id"]
    marker = cache.plan.geometry.get("marker")
    if marker:
        image_token_id = tokenizer.convert_tokens_to_ids(marker)
    config = MobileVLMConfig(
        text_config=hf.LlamaConfig(**TEXT, vocab_size=len(tokenizer)),
        vision_config=hf.CLIPVisionConfig(**{**VISION, "patch_size": 4, "num_hidden_layers": 3}),
        image_token_id=image_token_id,
    )
    torch.manual_seed(1)
    model = MobileVLMForConditionalGeneration(config)
    make_lively(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    hf.CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square()).save_pretrained(folder)
    return folder


def config_of(folder: Path, cache, data: Path, losses: dict[str, float]) -> TrainConfig:
    options = {
        "student": str(save_student(folder / "student", cache)),
        "data": str(data), "cache": str(cache.path), "output": str(folder / "run"), "device": "cpu",
        "dpt": {"steps": 0}, "sft": {"steps": 0}, "dft": {"steps": 1, "batch_size": 10, "losses": losses},
    }  # fmt: skip
    return config_from_dict(TrainConfig, options)


def test_a_teacher_that_nobody_described_teaches_by_its_logits(
    tmp_path: Path, family_data: Path, unlisted_teacher: Path
):
    cache = build(unlisted_teacher, family_data, tmp_path / "cache", signals=("logits",))
    train(config_of(tmp_path, cache, family_data, {"logits": 1.0}))
    assert read_log(tmp_path / "run")[-1]["logits"] > 1e-3


@pytest.mark.parametrize("name", ["gemma3", "qwen2_vl", "smolvlm", "llava_next"])
def test_a_student_made_from_nothing_learns_from_caches_of_other_layouts(
    tmp_path: Path, family_data: Path, family_cache, name: str
):
    cache = family_cache(name)
    options = {
        "student": "mobilevlm-tiny", "data": str(family_data), "cache": str(cache.path), "output": str(tmp_path / "run"),
        "device": "cpu", "dpt": {"steps": 0}, "sft": {"steps": 0},
        "dft": {"steps": 1, "batch_size": 10, "losses": {"logits": 1.0, "answer_attention": 1.0}},
    }  # fmt: skip
    train(config_from_dict(TrainConfig, options))
    record = read_log(tmp_path / "run")[-1]
    assert record["logits"] > 1e-3
    assert record["answer_attention"] > 1e-5


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.slow(quick=("llava_next",))
def test_a_student_takes_a_step_from_its_cache(tmp_path: Path, family_data: Path, family_cache, name: str):
    cache = family_cache(name)
    train(config_of(tmp_path, cache, family_data, {"logits": 1.0, "answer_attention": 1.0}))
    record = read_log(tmp_path / "run")[-1]
    assert record["step"] == 1
    assert record["logits"] > 1e-3
    assert record["answer_attention"] > 1e-5
    before, after = (
        MobileVLMForConditionalGeneration.from_pretrained(folder).lm_head.weight
        for folder in (tmp_path / "student", tmp_path / "run" / "final")
    )
    assert not torch.equal(before, after)
