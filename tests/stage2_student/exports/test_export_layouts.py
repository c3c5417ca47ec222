"""Every layout of an export computes what the student computes, or is refused in words; what it says travels along."""

from dataclasses import replace

import pytest
import torch
from tiny_cache import make_teacher
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_distill_cache.common.config import config_to_dict
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.llava import LlavaOfAnyDepth
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE
from vlm_distill_cache.stage2_student.students.encoder import describe_encoder
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.trained_student import export_student, open_student

WIDTH = 64
TEXT = {
    "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": 0,
}  # fmt: skip
TOWER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 72,
    "patch_size": 12, "initializer_range": 0.2,
}  # fmt: skip
WIDE = {"act": "gelu", "in": 32, "hidden": 80, "out": 80}
SAME = {"act": "gelu", "in": 32, "hidden": 48, "out": 48}
OTHER = {"act": "silu", "in": 32, "hidden": 48, "out": 40, "bias": False}


def clip_llama(**settings):
    text = LlamaConfig(vocab_size=settings.pop("rows", len(load_tokenizer())), **TEXT)
    config = MobileVLMConfig(text_config=text, vision_config=CLIPVisionConfig(**TOWER), **settings)
    return MobileVLMForConditionalGeneration(config)


def siglip_qwen(**settings):
    text = Qwen2Config(vocab_size=len(load_tokenizer()) + 3, **TEXT)
    config = CompoDistillConfig(text_config=text, vision_config=SiglipVisionConfig(**TOWER), **settings)
    return CompoDistillForConditionalGeneration(config)


def llava(**changes):
    config = make_teacher().model.config
    for name, value in changes.items():
        setattr(config, name, value)
    return (LlavaOfAnyDepth if "projector_depth" in changes else LlavaForConditionalGeneration)(config)


DRAWN = open_dataset("shapes:images=2,seed=3")[0]
SAMPLE = replace(DRAWN, turns=DRAWN.turns[:1])
BEYOND = {"beyond": True}  # the picture's place holder is no token
# What makes a student, and the layouts that can hold it beside `auto`.
STUDENTS = {
    "mobilevlm v1": (lambda: clip_llama(projector_type="ldpnet"), {}, "published"),
    "mobilevlm v2": (lambda: clip_llama(projector_type="ldpnetv2"), {"layout": "pad"}, "published"),
    "mobilevlm v2 as published": (lambda: clip_llama(projector_type="ldpnetv2"), BEYOND, "published"),
    "mlp": (lambda: clip_llama(projector_type="mlp"), {"layout": "pad"}, "published llava-hf"),
    "mlp with a place holder": (lambda: clip_llama(projector_type="mlp"), BEYOND, "published llava-hf"),
    "tied": (lambda: clip_llama(projector_type="mlp", tie_word_embeddings=True), BEYOND, "published llava-hf"),
    "taf": (lambda: clip_llama(projector_type="taf", teacher_projector=SAME), {}, "published llava-hf"),
    "taf of another act": (lambda: clip_llama(projector_type="taf", teacher_projector=OTHER), {}, "llava-hf"),
    "taf of a wide teacher": (lambda: clip_llama(projector_type="taf", teacher_projector=WIDE), {}, ""),
    "taf that pools": (
        lambda: clip_llama(projector_type="taf", teacher_projector=SAME, pool_teacher_tokens=True), {}, "",
    ),
    "compodistill student": (
        lambda: siglip_qwen(projector_type="taf", teacher_projector=WIDE, vision_feature_select_strategy="full"),
        {}, "published",
    ),
    "compodistill teacher": (
        lambda: siglip_qwen(projector_type="mlp", vision_feature_select_strategy="full"), BEYOND, "published llava-hf",
    ),
    "compodistill as released": (
        lambda: siglip_qwen(projector_type="taf", teacher_projector=SAME), BEYOND, "published",
    ),
    "siglip that pools": (
        lambda: siglip_qwen(projector_type="ldpnetv2", vision_feature_select_strategy="full"), {}, "",
    ),
    "llava": (llava, {}, "published llava-hf"),
    "llava of one layer": (lambda: llava(projector_depth=1), {}, "published"),
    "llava of three layers": (lambda: llava(projector_depth=3), {}, "published"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _trusted_tokenizers(monkeypatch):
    """Files of ours need no trial in a process of its own, which takes a second."""
    monkeypatch.setattr("vlm_distill_cache.data.text.processors.try_tokenizers", lambda folder: None)


def save_final(folder, make, *, beyond=False, layout="square"):
    """A student's folder as training saves it, with random weights."""
    torch.manual_seed(0)
    tokenizer, processor = load_tokenizer(), load_image_processor()
    if beyond:  # a tokenizer that knows no picture
        tokenizer.save_pretrained(folder.parent / "t")
        for path in (folder.parent / "t").iterdir():
            path.write_text(path.read_text().replace("<image>", "<other>"))
        tokenizer = AutoTokenizer.from_pretrained(folder.parent / "t")
    model = make().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_(std=0.2)
    rows = model.get_input_embeddings().num_embeddings
    model.config.image_token_id = rows if beyond else tokenizer.convert_tokens_to_ids("<image>")
    own = hasattr(model.model, "mm_projector")
    if own:
        model.model.image_token_id = model.config.image_token_id
    grid = model.image_grid if own else (6, 6)
    images = ImageEncoder(processor=processor, layout=layout, grid=grid, drops_first=bool(own and model.dropped_tokens))
    encoder = SampleEncoder(
        tokenizer=tokenizer,
        image_encoder=images,
        template=get_template("vicuna_v1"),
        image_token_id=model.config.image_token_id,
        max_length=512,
    )
    folder.mkdir(parents=True)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    said = {
        "fingerprint": "0" * 32,
        "caches": {"c": "1" * 32},
        "config": config_to_dict(TrainConfig(student="mobilevlm-tiny", cache="c", output="o")),
        "encoder": describe_encoder(encoder),
        "vocabulary": {"entries_read": 1, "entries_beyond": 0},
        "files": list_files(folder),
    }
    write_signed(folder / PROVENANCE, said)
    return folder


def logits(model, encoder):
    """Of one conversation about a picture, float ``[T, V]``, and which rows are of text."""
    batch = collate([encoder(SAMPLE)], 0)
    with torch.no_grad():
        found = model(**model_inputs_of(model, batch)).logits[0].float()
    return found, ~batch.visual_mask[0]


def check_same(folder, exported, *, atol=2e-5):
    before, after = open_student(folder), open_student(exported)
    (expected, rows), (found, _) = (logits(one.model, one.encoder) for one in (before, after))
    assert expected.std() > 0.1
    torch.testing.assert_close(found[rows, : expected.shape[1]], expected[rows], atol=atol, rtol=1e-4)
    return expected, after


@pytest.mark.parametrize("name", STUDENTS)
def test_each_layout_computes_what_the_student_does_or_says_why_it_cannot(name, tmp_path):
    make, how, fitting = STUDENTS[name]
    folder = save_final(tmp_path / "final", make, **how)
    for layout in ("auto", "published", "llava-hf"):
        target = tmp_path / layout
        if layout != "auto" and layout not in fitting.split():
            with pytest.raises(ModelError, match=f"{folder}: cannot be written in layout {layout}: .*--layout auto"):
                export_student(folder, target, layout=layout)
            assert not list(tmp_path.glob(f"*{layout}*"))
            continue
        assert export_student(folder, target, layout=layout) == "float32"
        expected, after = check_same(folder, target)
        if layout == "llava-hf":
            check_library(target, expected, after)


def check_library(folder, expected, ours):
    """The library alone reads pixels and text as we do, and gives the logits; nobody has to trust code."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert type(model) is LlavaForConditionalGeneration
    encoder = ours.encoder
    text = encoder.template.render(SAMPLE.turns, ours.tokenizer, has_image=True, image_token="<image>").text
    inputs = processor(text=text, images=SAMPLE.images[0].load(), return_tensors="pt")
    assert inputs["input_ids"][0].tolist() == list(encoder(SAMPLE).input_ids)
    with torch.no_grad():
        found = model(**inputs).logits[0]
    rows = inputs["input_ids"][0] != model.config.image_token_id
    torch.testing.assert_close(found[rows, : expected.shape[1]], expected[rows], atol=2e-5, rtol=1e-4)
    said = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.max() < expected.shape[1]  # rows that were added are never said
