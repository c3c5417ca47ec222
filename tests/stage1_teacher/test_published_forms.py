"""Data in every published form are built into a cache, system prompts are what the teacher reads, never what it teaches."""

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from published_forms import KIND, PUBLISHED
from tiny_families import save_tiny

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.cache.sidecar import read_sidecar
from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.encoding import build_prompt
from vlm_distill_cache.data.text.generation import generate_answers
from vlm_distill_cache.data.text.processors import load_tokenizer
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.demo.teacher import builtin_teacher_directory
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A file with an entry of each form, by its name."""
    folder = tmp_path_factory.mktemp("forms")
    pixels = np.random.default_rng(0).integers(0, 256, (72, 72, 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "a.png")
    entries = [entry | {"id": name} for name, (_, entry) in PUBLISHED.items()]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder / "data.jsonl"


def build(cache: Path, data: Path, **options):
    settings = {"teacher": str(builtin_teacher_directory()), "fidelity_samples": 2, "batch_size": 8, "threads": 1,
                "num_workers": 0} | options  # fmt: skip
    extract(BuildConfig(cache=str(cache), data=str(data), **settings))
    return open_cache(cache)


def reasons(cache) -> dict[str, str]:
    shards = range(len(cache.manifest.shards))
    return {name: reason for shard in shards for name, reason in read_sidecar(Path(cache.path), shard).failed}


def test_every_form_is_cached_with_its_answers(tmp_path, data):
    cache = build(tmp_path / "cache", data, template="vicuna_v1")
    tokenizer = load_tokenizer(builtin_teacher_directory())
    assert sorted(cache.sample_ids) == sorted(PUBLISHED)
    for name, ((_, pairs), _) in PUBLISHED.items():
        labels = cache.read(name)["labels"]
        taught = tokenizer.decode(labels[labels != IGNORE_INDEX])
        assert taught.split() == " ".join(f"{answer}</s>" for _, answer in pairs).replace("</s>", " </s>").split(), name


def test_where_the_template_has_no_place_for_a_system_prompt_those_samples_alone_fail(tmp_path, data):
    cache = build(tmp_path / "cache", data, template="short", max_failed_share=1.0)
    failed = reasons(cache)
    assert set(failed) == {name for name, ((system, _), _) in PUBLISHED.items() if system}
    assert all("'short' has no place for a system prompt" in reason for reason in failed.values())
    assert set(cache.sample_ids) == set(PUBLISHED) - set(failed)


@pytest.fixture(scope="module")
def asking(tmp_path_factory) -> Path:
    """The same question under three system prompts."""
    folder = tmp_path_factory.mktemp("systems")
    PIL.Image.new("RGB", (40, 30), (200, 20, 20)).save(folder / "a.png")
    talk = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]
    entries = [
        {"id": f"s{number}", "image": "a.png", "messages": talk, "system": system}
        for number, system in enumerate(("", "Be kind.", "Answer in one word, and be brief."))
    ]
    (folder / "data.json").write_text(json.dumps(entries))
    return folder / "data.json"


@pytest.fixture(scope="module")
def chatting(tmp_path_factory) -> Path:
    return save_tiny("internvl", tmp_path_factory.mktemp("internvl") / "teacher")


def test_a_chat_teacher_reads_the_system_prompt(tmp_path, asking, chatting):
    cache = build(
        tmp_path / "cache", asking, teacher=str(chatting), dtype="float32", logits="exact", signals=("logits",)
    )
    teacher = Teacher(chatting, dtype="float32")
    encoder = build_encoder(teacher, template="auto", max_length=2048)
    dataset = open_dataset(str(asking))
    seen = []
    for index, name in enumerate(cache.sample_ids):
        sample = dataset[index]
        encoded = encoder(sample)
        text = encoder.tokenizer.decode(encoded.input_ids)
        assert (f"<|im_start|>system\n{sample.system}<|im_end|>" in text) == bool(sample.system)
        inputs = {key: torch.from_numpy(value) for key, value in encoded.image_inputs.items()}
        with torch.inference_mode():
            logits = teacher.model(input_ids=torch.from_numpy(encoded.input_ids)[None], **inputs).logits[0]
        expected = logits[encoded.supervised_rows].log_softmax(-1)
        found = codec_from_dict(cache.plan.signals["logits"]).decode(cache.read(name))
        ids = torch.from_numpy(found.token_ids.astype(np.int64))
        torch.testing.assert_close(
            torch.from_numpy(found.log_probs).float(), expected.gather(1, ids), atol=1e-3, rtol=1e-3
        )
        seen.append(expected)
    assert not torch.allclose(seen[0], seen[1], atol=1e-4)


def test_answers_that_the_teacher_writes_answer_the_system_prompt_too(tmp_path, data):
    cache = build(
        tmp_path / "cache", data, template="vicuna_v1", answers="generate", max_new_tokens=20, max_failed_share=1.0
    )
    teacher = Teacher(builtin_teacher_directory())
    encoder = build_encoder(teacher, template="vicuna_v1", max_length=2048)
    dataset = open_dataset(str(data))
    codec = codec_from_dict(cache.plan.signals[AnswersCodec.signal])
    compared = 0
    for index, name in enumerate(dataset.sample_ids):
        sample = dataset[index]
        if name in cache.sample_ids and sample.system:
            prompt = build_prompt(encoder, sample.images[0], sample.turns[0].question, KIND[0])
            alone = generate_answers(teacher.model, encoder, [prompt], max_new_tokens=20)
            assert codec.decode(cache.read(name))[0] == alone.texts[0]
            compared += 1
    assert compared > 2


def test_a_pictures_signals_are_shared_only_under_one_system_prompt(tmp_path, asking, chatting):
    """What visual tokens see in front of the picture differs: its columns are each sample's own."""
    cache = build(
        tmp_path / "cache", asking, teacher=str(chatting), dtype="float32", signals=("logits", "visual_columns")
    )
    holders = [int(cache.read(name)["visual_source"][0]) for name in cache.sample_ids]
    assert holders == [0, 1, 2]
