"""LLaVA-1.5 teaches the published MobileVLM: one sentencepiece model, as tokenizer.json there, as tokenizer.model here."""

import json
import shutil
import sys

import numpy as np
import published_factory
import pytest
import torch
from PIL import Image
from sentencepiece_factory import own, write_converted, write_model
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from vlm_distill_cache.common.errors import CacheMismatchError, ModelError
from vlm_distill_cache.common.models.checkpoint import Checkpoint
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.text.processors import load_tokenizer
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.report import summary_text
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import open_student
from vlm_distill_cache.stage2_student.training.log import read_log
from vlm_distill_cache.stage2_student.training.resolve import resolve_config

ANSWERS = ["in  it", "if  (a):\n    return  b", "a   b    c", "- one\n  - two", "a red square", "4  px"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data whose texts hold runs of blanks, a teacher as llava-hf publishes it, and a student as mtgv does."""
    folder = tmp_path_factory.mktemp("pairing")
    generator = np.random.default_rng(0)
    entries = []
    for index, answer in enumerate(ANSWERS):
        Image.fromarray(generator.integers(0, 255, (20, 30, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        turns = [
            {"from": "human", "value": "<image>\nwhat  is it?"}, {"from": "gpt", "value": answer},
            {"from": "human", "value": "what is  in  it?"}, {"from": "gpt", "value": "a  " + answer},
        ]  # fmt: skip
        entries.append({"id": str(index), "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(entries))

    student = folder / "student"
    student.mkdir()
    write_model(student)
    rows = len(own(student))
    described = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (student / "special_tokens_map.json").write_text(
        json.dumps(
            {name: {"content": content, **described} for name, content in named.items()} | {"pad_token": "<unk>"}
        )
    )
    tensors = published_factory.mobilevlm_tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(rows, published_factory.WIDTH, generator=torch.Generator().manual_seed(1)) * 0.2
    published_factory.write_mobilevlm(student, tensors, vocab_size=rows, mm_vision_tower="./clip")

    teacher = folder / "teacher"
    write_converted(teacher, student, tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=True)
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=rows + 64, max_position_embeddings=512, pad_token_id=rows + 1,
    )  # fmt: skip
    tower = CLIPVisionConfig(**published_factory.TOWER, projection_dim=32)
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=tower, text_config=text, image_token_index=rows, image_seq_length=36)
    )
    model.save_pretrained(teacher)
    square = {"height": 24, "width": 24}
    CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=square).save_pretrained(teacher)
    return folder


@pytest.fixture(scope="module")
def cache(places, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "c"
    settings = {"shard_size": 4, "batch_size": 2, "fidelity_samples": 0, "template": "vicuna_v1"}
    data = {"data": str(places / "data.json"), "images": str(places)}
    extract(BuildConfig(cache=str(folder), teacher=str(places / "teacher"), **data, **settings))
    return folder


def run(places, cache, output, *options):
    config = resolve_config(
        None,
        [
            f"student={places / 'student'}", f"cache={cache}", f"data={places / 'data.json'}", f"images={places}",
            f"output={output}", "phases=[dft]", "dft.steps=2", "dft.batch_size=2", "dft.losses.logits=1",
            "dft.losses.answer_attention=1", "device=cpu", *options,
        ],
        teacher_width=32,
    )  # fmt: skip
    train(config)
    return read_log(output)


@pytest.mark.slow
def test_the_student_learns_logits_and_attention_from_the_teacher(places, cache, tmp_path):
    opened = open_cache(cache)
    assert (len(opened), len(opened.failed)) == (len(ANSWERS), 0)
    log = run(places, cache, tmp_path / "run")
    assert [record["step"] for record in log] == [1, 2]
    assert all(record["logits"] > 0 and record["answer_attention"] > 0 for record in log)
    assert open_student(tmp_path / "run" / "final").tokenizer("in  it")["input_ids"] == [
        1, *own(places / "student").encode("in  it")
    ]  # fmt: skip


def test_both_read_an_answer_as_sentencepiece_does(places):
    teacher, student = load_tokenizer(places / "teacher"), load_tokenizer(places / "student")
    for text in ANSWERS:
        expected = own(places / "student").encode(text)
        assert teacher(text, add_special_tokens=False)["input_ids"] == expected
        assert student(text, add_special_tokens=False)["input_ids"] == expected


@pytest.mark.slow
def test_long_samples_are_cut_at_the_same_word_for_teacher_and_student(places, cache, tmp_path):
    whole = open_cache(cache)
    assert "long_samples" not in whole.plan.extra
    settings = {"shard_size": 4, "batch_size": 2, "fidelity_samples": 2, "max_failed_share": 0.5}
    data = {"data": str(places / "data.json"), "images": str(places), "teacher": str(places / "teacher")}
    folder = tmp_path / "cut"
    # 36 visual tokens, and text up to somewhere in the second answer of most.
    summary = extract(BuildConfig(cache=str(folder), max_length=145, long_samples="truncate", **data, **settings))
    opened = open_cache(folder)
    assert opened.plan.extra["long_samples"] == "truncate"
    assert "samples of more than 145 tokens were cut at their end" in summary_text(summary)
    assert "samples of more than 145 tokens were cut at their end" in (folder / "README.md").read_text()
    rows = {name: (len(opened.read(name)["labels"]), len(whole.read(name)["labels"])) for name in opened.sample_ids}
    assert any(cut < all_ for cut, all_ in rows.values()), rows
    for name, (cut, _) in rows.items():
        assert opened.read(name)["labels"].tolist() == whole.read(name)["labels"][:cut].tolist()
    assert all(record["logits"] > 0 for record in run(places, folder, tmp_path / "run"))
    with pytest.raises(CacheMismatchError, match="leave max_length unset, or raise it"):
        run(places, folder, tmp_path / "short", "max_length=60")


def test_a_missing_package_is_noticed_before_weights_are_read(places, cache, tmp_path, monkeypatch):
    bare = tmp_path / "bare"
    shutil.copytree(places / "student", bare)
    monkeypatch.setattr(Checkpoint, "load", lambda *args, **options: pytest.fail("weights were read"))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    told = r"tokenizer\.model, which needs sentencepiece .*`make setup`"
    with pytest.raises(ModelError, match=told):
        run(places, cache, tmp_path / "run", f"student={bare}")
    data = {"data": str(places / "data.json"), "images": str(places)}
    with pytest.raises(ModelError, match=told):
        extract(BuildConfig(cache=str(tmp_path / "c"), teacher=str(bare), **data))
