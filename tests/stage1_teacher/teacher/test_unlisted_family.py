"""A model that the table of families does not know is a teacher of logits, and says what it cannot give."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf
from family_caches import build
from family_references import reference_output
from tiny_families import save_tiny

from vlm_distill_cache.common.attention.boxes import content_mask, tile_boxes
from vlm_distill_cache.common.attention.tiles import tiles_from_array
from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.codecs.live import as_tensors
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.families.inputs import library_inputs
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import Batch, collate
from vlm_distill_cache.stage1_teacher.loop.signals import requests_of
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


def test_its_logits_are_cached_and_are_the_librarys(unlisted_teacher: Path, family_data: Path, tmp_path: Path, caplog):
    with caplog.at_level(logging.WARNING):
        cache = build(unlisted_teacher, family_data, tmp_path / "cache", signals=("logits",), logits="exact")
    assert "'vipllava' is not in the table of families" in caplog.text
    assert "only its logits can be cached" in caplog.text
    assert verify(cache.path, deep=True) == []
    assert "vision_tower" not in cache.plan.fingerprints
    assert "not in the table of families" in cache.plan.teacher["no_projector"]
    record = cache.read("s3")
    assert not content_mask(tile_boxes(tiles_from_array(record["tiles"]))).any()  # nobody knows where they look
    teacher = Teacher(unlisted_teacher)
    encoder = build_encoder(teacher, template="auto", max_length=512)
    dataset = open_dataset(str(family_data))
    sample = encoder(dataset[dataset.sample_ids.index("s3")])
    batch = collate([sample], teacher.pad_token_id)
    inputs = {"input_ids": batch.input_ids, **batch.image_inputs}
    logits, _ = reference_output(unlisted_teacher, inputs)
    expected = logits[sample.supervised_rows].log_softmax(dim=-1)
    decoded = as_tensors(codec_from_dict(cache.plan.signals["logits"]).decode(record))
    found = torch.full_like(expected, -torch.inf).scatter(1, decoded.token_ids, decoded.log_probs)
    kept = torch.isfinite(found) & decoded.entry_mask.any()
    assert int(kept.sum()) > 100
    torch.testing.assert_close(found[kept], expected[kept], atol=1e-3, rtol=1e-3)


def test_asking_for_attention_says_why_there_is_none(unlisted_teacher: Path, family_data: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"'vipllava' is not in the table.*answer_attention.*--signals logits"):
        build(unlisted_teacher, family_data, tmp_path / "cache", signals=("logits", "answer_attention"))
    teacher = Teacher(unlisted_teacher)
    encoder = build_encoder(teacher, template="auto", max_length=512)
    batch = collate([encoder(open_dataset(str(family_data))[0])], teacher.pad_token_id)
    with pytest.raises(ModelError, match=r"attention cannot be captured .*'vipllava'.*--signals logits"):
        teacher.run(teacher.prepare(batch, requests_of(batch, {"answer_attention": None}, ((0,),))))


def test_its_pictures_are_what_the_librarys_processor_makes(unlisted_teacher: Path, family_data: Path):
    teacher = Teacher(unlisted_teacher)
    sample = build_encoder(teacher, template="auto", max_length=512)(open_dataset(str(family_data))[2])
    processor = hf.AutoProcessor.from_pretrained(unlisted_teacher)
    picture = open_dataset(str(family_data))[2].images[0].load()
    text = "USER: <image>\nWhat is it? ASSISTANT: A dog</s>"
    expected = processor(images=[picture], text=[text], return_tensors="np")
    assert sample.input_ids.tolist() == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(sample.image_inputs["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "smolvlm", "llava_onevision"])
def test_positions_and_masks_that_nobody_described_are_left_to_the_library(tmp_path: Path, family_data: Path, name):
    teacher = Teacher(save_tiny(name, tmp_path))
    encoder = build_encoder(teacher, template="auto", max_length=512)
    dataset = open_dataset(str(family_data))
    batch = collate([encoder(dataset[index]) for index in (0, 3)], teacher.pad_token_id)
    rows = batch.labels != IGNORE_INDEX
    known, unknown = (
        dict(inputs(teacher.config, batch, dtype=torch.float32))
        for inputs in (teacher.family.model_inputs, library_inputs)
    )
    if name == "smolvlm":  # whose processor pads tiles, which this encoder leaves to the family's inputs
        unknown["pixel_values"] = known["pixel_values"]
    with torch.no_grad():
        expected, found = (row_logits(teacher.model, inputs, rows) for inputs in (known, unknown))
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


def test_packed_conversations_are_refused_of_it(unlisted_teacher: Path, tmp_path: Path):
    with pytest.raises(ModelError, match=r"'vipllava' masks are not known.*one question a sample"):
        build(unlisted_teacher, Path("shapes:images=2"), tmp_path / "cache", signals=("logits",))
    config = Teacher(unlisted_teacher).config
    with pytest.raises(ModelError, match="only where masks and positions are known"):
        library_inputs(config, packed_batch(), dtype=torch.float32)


def packed_batch() -> Batch:
    """Only its mask matters."""
    ids = torch.zeros(1, 3, dtype=torch.int64)
    return Batch(
        sample_ids=("a",), input_ids=ids, labels=ids, attention_mask=torch.ones(1, 1, 3, 3, dtype=torch.bool),
        position_ids=ids, visual_mask=ids.bool(), image_inputs={}, tiles=((),), image_hashes=(bytes(16),),
        lengths=(3,),
    )  # fmt: skip
