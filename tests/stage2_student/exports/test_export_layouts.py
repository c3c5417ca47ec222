"""Every layout of an export computes what the student computes, or is refused in words; what it says travels along."""

import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
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
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.files.signed import list_files, write_signed
from vlm_distill_cache.common.models.compodistill import CompoDistillConfig, CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.llava import LlavaOfAnyDepth
from vlm_distill_cache.common.models.mobilevlm import MobileVLMConfig, MobileVLMForConditionalGeneration
from vlm_distill_cache.data.builtin import load_image_processor, load_tokenizer
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.encoder import ImageEncoder
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import SampleEncoder
from vlm_distill_cache.data.text.templates import get_template
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.config import TrainConfig
from vlm_distill_cache.stage2_student.exports.folder import save_student_folder
from vlm_distill_cache.stage2_student.exports.layouts import LAYOUTS
from vlm_distill_cache.stage2_student.exports.source import exported_model
from vlm_distill_cache.stage2_student.final_folder import PROVENANCE, read_final
from vlm_distill_cache.stage2_student.students.encoder import describe_encoder
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import model_inputs_of
from vlm_distill_cache.stage2_student.trained_student import _write_export, export_student, open_student

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
    "llava with a place holder": (llava, BEYOND, "published llava-hf"),
    "llava of one layer": (lambda: llava(projector_depth=1), {}, "published"),
    "llava of three layers": (lambda: llava(projector_depth=3), {}, "published"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _trusted_tokenizers(monkeypatch):
    """Files of ours need no trial in a process of its own, which takes a second."""
    monkeypatch.setattr("vlm_distill_cache.data.text.processors.try_tokenizers", lambda folder: None)


def as_trained(folder, model, encoder):
    """As training saves it: with code of ours where the library's class does not read what the encoder gives."""
    student = model if hasattr(model.model, "mm_projector") else LibraryStudent(model, family_of("llava"))
    save_student_folder(
        folder, model=student, encoder=encoder, image_processor=encoder.image_encoder.processor, source=None
    )


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
    as_trained(folder, model, encoder)
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


def check_same(expected, rows, exported):
    after = open_student(exported)
    found, _ = logits(after.model, after.encoder)
    torch.testing.assert_close(found[rows, : expected.shape[1]], expected[rows], atol=2e-5, rtol=1e-4)
    return after


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.slow(quick=1)
def test_each_layout_computes_what_the_student_does_or_says_why_it_cannot(name, tmp_path):
    make, how, fitting = STUDENTS[name]
    folder = save_final(tmp_path / "final", make, **how)
    student = open_student(folder)
    expected, rows = logits(student.model, student.encoder)
    assert expected[rows].std() > 0.1
    for layout in ("auto", "published", "llava-hf"):
        target = tmp_path / layout
        if layout != "auto" and layout not in fitting.split():
            with pytest.raises(ModelError, match=f"{folder}: cannot be written in layout {layout}: .*--layout auto"):
                export_student(folder, target, layout=layout)
            assert not list(tmp_path.glob(f"*{layout}*"))
            continue
        assert export_student(folder, target, layout=layout) == "float32"
        after = check_same(expected, rows, target)
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


def test_the_dtype_is_the_students_own_and_what_does_not_fit_is_refused_by_name(tmp_path):
    folder = save_final(tmp_path / "final", lambda: clip_llama(projector_type="ldpnetv2"))
    for layout in ("auto", "published"):
        for dtype in ("float16", "bfloat16"):
            target = tmp_path / f"{layout}-{dtype}"
            export_student(folder, target, layout=layout, dtype=dtype)
            stored = json.loads((target / "config.json").read_text())
            assert dtype in (stored.get("dtype"), stored.get("torch_dtype"))
            kinds = {value.dtype for value in load_file(target / "model.safetensors").values()}
            assert kinds == {getattr(torch, dtype)}
        assert export_student(tmp_path / f"{layout}-float16", tmp_path / f"{layout}-again") == "float16"
        assert {value.dtype for value in load_file(tmp_path / f"{layout}-again" / "model.safetensors").values()} == {
            torch.float16
        }
    model = clip_llama(projector_type="ldpnetv2")
    with torch.no_grad():
        model.model.norm.weight[3] = -7e4
    large = save_final(tmp_path / "large", lambda: model)
    for layout, quantise in (("auto", None), ("auto", "8bit"), ("published", None)):
        with pytest.raises(
            ModelError, match=r"large: model.norm.weight holds 70000, and float16 ends at 65504.*bfloat16"
        ):
            export_student(large, tmp_path / "no", layout=layout, dtype="float16", quantise=quantise)
    export_student(large, tmp_path / "yes", dtype="bfloat16")
    written = open_student(tmp_path / "yes").model.model.norm.weight[3]
    assert written == torch.tensor(-7e4).bfloat16()


def test_what_a_student_says_of_itself_travels_through_exports_of_exports(tmp_path):
    folder = save_final(tmp_path / "final", *STUDENTS["mlp with a place holder"][:1], **BEYOND)
    said = read_final(folder)
    export_student(folder, tmp_path / "one", layout="published")
    export_student(tmp_path / "one", tmp_path / "two", layout="llava-hf", dtype="bfloat16")
    one, two = (read_final(tmp_path / name) for name in ("one", "two"))
    for found in (one, two):
        assert all(found[key] == said[key] for key in ("fingerprint", "caches", "config", "vocabulary"))
        assert found["encoder"]["template"] == said["encoder"]["template"]
    origin = {"files": said["files"], "export": None}
    assert one["export"] == {"layout": "published", "dtype": "float32", "quantise": None, "made_from": origin}
    assert two["export"]["made_from"] == {"files": one["files"], "export": one["export"]}
    assert {path.relative_to(tmp_path / "one").as_posix() for path in (tmp_path / "one").rglob("*") if path.is_file()} == {
        *one["files"], PROVENANCE, "README.md",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        export_student(folder, tmp_path / "one")
    for path in (tmp_path / "two").rglob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"two.*damaged or changed.*export the student again"):
        export_student(tmp_path / "two", tmp_path / "three")
    with pytest.raises(ModelError, match=r"final: its adapters|random weights"):
        export_student(folder, tmp_path / "three", layout="adapter")
    assert not (tmp_path / "three").exists()


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    folder = save_final(tmp_path / "final", lambda: clip_llama(projector_type="ldpnetv2"))

    class KilledError(BaseException):
        pass

    def kill(*_, **__):
        raise KilledError

    monkeypatch.setattr("vlm_distill_cache.stage2_student.trained_student.write_signed", kill)
    for layout in ("auto", "published"):
        with pytest.raises(KilledError):
            export_student(folder, tmp_path / "out", layout=layout)
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


@pytest.mark.parametrize(("name", "quantise"), [("mobilevlm v2", "8bit"), ("mlp", "4bit")])
@pytest.mark.slow(quick=1)
def test_a_quantised_student_loads_back_and_computes_the_same(name, quantise, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    folder = save_final(tmp_path / "final", STUDENTS[name][0], **STUDENTS[name][1])
    kept = []
    monkeypatch.setattr(
        "vlm_distill_cache.stage2_student.exports.layouts.exported_model",
        lambda source: kept.append(exported_model(source)) or kept[0],
    )
    export_student(folder, tmp_path / "out", quantise=quantise)
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored[f"load_in_{quantise}"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    core = model.model.language_model if name == "mlp" else model.model
    assert core.layers[0].mlp.up_proj.weight.dtype in (torch.int8, torch.uint8)
    student = open_student(tmp_path / "out", device="cpu")
    wrapped, saved = (one if name != "mlp" else LibraryStudent(one, student.model.family) for one in (model, kept[0]))
    found = [logits(one, student.encoder)[0] for one in (saved, wrapped, student.model)]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    expected, rows = logits(*(getattr(open_student(folder), part) for part in ("model", "encoder")))

    def error(other):
        difference = other[rows, : expected.shape[1]] - expected[rows]
        return difference.square().mean() / expected[rows].square().mean()

    assert 0 < error(found[0]) < 0.5
    with pytest.raises(ModelError, match="its weights are quantised"):
        export_student(tmp_path / "out", tmp_path / "more")
    export_student(folder, tmp_path / "half", quantise=quantise, dtype="bfloat16")
    half = open_student(tmp_path / "half", device="cpu")  # in float32, but for what is quantised
    assert error(logits(half.model, half.encoder)[0]) < 1.5 * error(found[0]) + 0.01


def test_four_bit_layers_that_are_no_whole_blocks_are_scored_as_the_formula_says(tmp_path):
    """Blocks of 64 values, whatever the rows: the nearest of 16 numbers times the block's largest value."""
    functional = pytest.importorskip("bitsandbytes.functional")
    folder = save_final(tmp_path / "final", llava)  # 32 wide
    _write_export(folder, tmp_path / "out", layout="auto", dtype=None, quantise="4bit", portable=False)
    plain, packed = (open_student(path, device="cpu").model for path in (folder, tmp_path / "out"))
    code, changed = functional.get_4bit_type("nf4", device="cpu"), 0
    for name, expected in plain.state_dict().items():
        if name.endswith("down_proj.weight"):  # 32 rows of 64 values, which the library computes with
            continue
        if re.search(r"language_model\.layers\..*_proj\.weight", name):
            blocks = F.pad(expected.float().flatten(), (0, -expected.numel() % 64)).reshape(-1, 64)
            scale = blocks.abs().amax(1, keepdim=True)
            nearest = code[((blocks / scale)[:, :, None] - code).abs().argmin(-1)] * scale
            expected, changed = nearest.flatten()[: expected.numel()].reshape(expected.shape), changed + 1
        torch.testing.assert_close(packed.state_dict()[name].float(), expected.float(), atol=1e-6, rtol=1e-5)
    assert changed == 6 * plain.model.config.text_config.num_hidden_layers
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert (
        sum(value.dtype == torch.uint8 for name, value in stored.items() if name.endswith("_proj.weight"))
        == changed * 7 / 6
    )


def test_what_cannot_be_quantised_is_refused_in_words(tmp_path, monkeypatch):
    folder = save_final(tmp_path / "final", llava)  # 32 wide
    with pytest.raises(
        ModelError, match=r"q_proj reads 32 values and writes 32, .* blocks of 64 values and 32 rows.*8bit"
    ):
        export_student(folder, tmp_path / "out", quantise="4bit")
    with pytest.raises(ModelError, match=r"layout published: its authors' code quantises what it loads"):
        export_student(folder, tmp_path / "out", layout="published", quantise="8bit")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"bitsandbytes is not installed; run `pip install 'vlm-distill-cache\[quantised"
    ):
        export_student(folder, tmp_path / "out", quantise="8bit")
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_each_layout_can_be_asked_for(tmp_path):
    layout = next(option for option in main.commands["export"].params if option.name == "layout")
    assert list(layout.type.choices) == list(LAYOUTS)
