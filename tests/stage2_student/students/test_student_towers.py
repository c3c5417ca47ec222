"""Which vision tower a student looks through: the cache's, one from a directory, a small one of its own; and from parts."""

import json
import logging

import pytest
import torch
from cache_factory import make_plan
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from vlm_distill_cache.common.cache.documents import write_document
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.models.compodistill import CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.projectors import TeacherProjector
from vlm_distill_cache.stage2_student.students.build import find_student, load_student, own_image_encoder

TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
KINDS = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
}


def make_tower(kind, seed=7):
    torch.manual_seed(seed)
    config_class, model_class = KINDS[kind]
    return model_class(config_class(**TOWER))


def write_cache(folder, kind=None, strategy="patch"):
    """What stage one exports of a teacher of width 20; without a tower if ``kind`` is None."""
    folder.mkdir()
    if kind is not None:
        tower = make_tower(kind)
        save_file(tower.state_dict(), folder / "vision_tower.safetensors")
        (folder / "vision_tower.json").write_text(json.dumps(tower.config.to_dict()))
        projector = TeacherProjector(in_features=16, hidden_features=20, out_features=20, act="gelu")
        save_file(projector.state_dict(), folder / "projector.safetensors")
        stored = {"act": "gelu", "bias": True, "in": 16, "hidden": 20, "out": 20, "vision_feature_layer": -2}
        (folder / "projector.json").write_text(json.dumps(stored | {"vision_feature_select_strategy": strategy}))
    write_document(folder / "plan.json", make_plan(teacher={"hidden_size": 20}).to_dict())
    return folder


def make_student(cache, name, **changes):
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return find_student(name, cache_dir=cache, vocab_size=50, image_token_id=60, **ids, **changes).load()


@pytest.mark.parametrize(("strategy", "dropped"), [("patch", 1), ("full", 0), ("default", 1)])
def test_compodistill_stands_behind_the_caches_siglip_and_its_teachers_projector(tmp_path, strategy, dropped):
    cache = write_cache(tmp_path / "c", "siglip", strategy)
    student = make_student(cache, "compodistill")
    assert isinstance(student, CompoDistillForConditionalGeneration)
    assert student.config.projector_type == "taf"
    assert (student.image_grid, student.dropped_tokens) == ((6, 6), dropped)
    tower = make_tower("siglip").state_dict()
    assert all(torch.equal(value, tower[name]) for name, value in student.vision_encoder.state_dict().items())
    ids = torch.tensor([[1] + [60] * (36 - dropped) + [5, 6]])
    logits = student(input_ids=ids, pixel_values=torch.randn(1, 3, 24, 24)).logits
    assert logits.shape == (1, 39 - dropped, 50)


def test_a_mobilevlm_behind_a_siglip_teacher_gets_a_small_tower_of_its_own(tmp_path, caplog):
    cache = write_cache(tmp_path / "c", "siglip")
    with caplog.at_level(logging.WARNING):
        student = make_student(cache, "mobilevlm")
    assert student.config.vision_config.model_type == "clip_vision_model"
    assert "a small, randomly initialised one, for trials only" in caplog.text
    again = make_student(cache, "mobilevlm")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("kind", [None, "siglip"])
def test_without_any_clip_tower_the_width_comes_from_the_plan_and_the_tower_is_its_own(tmp_path, kind):
    student = make_student(write_cache(tmp_path / "c", kind), "mobilevlm")
    assert student.config.text_config.hidden_size == 64
    assert student.image_grid == (3, 3)


@pytest.mark.parametrize(("name", "size"), [("mobilevlm", "1.7b"), ("mobilevlm-v1", "3b"), ("compodistill", "2b")])
def test_a_large_student_without_a_tower_names_the_weights_it_needs(tmp_path, name, size):
    cache = write_cache(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"holds no (clip|siglip) vision tower.*SET=vision_tower=\w+/"):
        make_student(cache, name, size=size)


def test_taf_behind_another_kind_of_tower_is_refused_by_name(tmp_path):
    cache = write_cache(tmp_path / "c", "siglip")
    message = "'taf' needs the teacher's own vision tower, a siglip_vision_model; .* clip_vision_model"
    with pytest.raises(ModelError, match=message):
        make_student(cache, "mobilevlm", projector_type="taf")
    with pytest.raises(CacheFormatError, match=r"vision_tower\.json: not found"):
        make_student(write_cache(tmp_path / "d"), "compodistill")


def test_taf_from_a_teacher_without_an_mlp_projector_repeats_the_plans_reason(tmp_path):
    cache = write_cache(tmp_path / "c")
    teacher = {
        "hidden_size": 20,
        "no_projector": "the projector of model_type 'qwen2_vl' is no two-layer MLP",
    }
    write_document(cache / "plan.json", make_plan(teacher=teacher).to_dict())
    with pytest.raises(ModelError, match="because the projector of model_type 'qwen2_vl' is no two-layer MLP"):
        make_student(cache, "mobilevlm", projector_type="taf")


def test_a_projector_that_pools_refuses_a_grid_without_its_first_patch(tmp_path):
    cache = write_cache(tmp_path / "c", "siglip")
    with pytest.raises(ModelError, match="pools a whole grid of patches"):
        make_student(cache, "compodistill", pool_teacher_tokens=True)
    assert make_student(cache, "compodistill", projector_type="ldpnetv2").image_grid == (3, 3)


@pytest.mark.parametrize(
    ("name", "kind", "model_class", "text_class"),
    [
        ("mobilevlm", "clip", LlamaForCausalLM, LlamaConfig),
        ("compodistill", "siglip", Qwen2ForCausalLM, Qwen2Config),
    ],
)
@pytest.mark.parametrize("projector", ["mlp", "ldpnet"])
def test_a_student_from_parts_has_exactly_their_weights(tmp_path, name, kind, model_class, text_class, projector):
    torch.manual_seed(3)
    text = text_class(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    language, tower = model_class(text), make_tower(kind)
    language.save_pretrained(tmp_path / "language")
    tower.save_pretrained(tmp_path / "tower")
    student = make_student(
        write_cache(tmp_path / "c"), name, size="tiny", projector_type=projector,
        language_model=tmp_path / "language", vision_tower=tmp_path / "tower",
    )  # fmt: skip
    state = student.state_dict()
    for key, value in language.state_dict().items():
        rows = state[key][:40] if key in ("lm_head.weight", "model.embed_tokens.weight") else state[key]
        assert torch.equal(rows, value), key
    encoder = student.vision_encoder.state_dict()
    assert all(torch.equal(encoder[key], value) for key, value in tower.state_dict().items())
    assert state["lm_head.weight"].shape[0] == student.config.text_config.vocab_size == 50
    pixels, visual = torch.randn(1, 3, 24, 24), student.image_grid[0] * student.image_grid[1]
    ids = torch.tensor([[1] + [60] * visual + [5]])
    assert student(input_ids=ids, pixel_values=pixels).logits.isfinite().all()


@pytest.mark.parametrize("pad", [None, 0, 39, 40, 49])
@pytest.mark.parametrize(
    ("name", "kind", "model_class", "text_class"),
    [
        ("mobilevlm", "clip", LlamaForCausalLM, LlamaConfig),
        ("compodistill", "siglip", Qwen2ForCausalLM, Qwen2Config),
    ],
)
def test_any_token_of_the_tokenizers_pads_a_student_whose_language_model_had_fewer_rows(
    tmp_path, name, kind, model_class, text_class, pad
):
    text = text_class(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4,
    )  # fmt: skip
    model_class(text).save_pretrained(tmp_path / "language")
    found = find_student(
        name, cache_dir=write_cache(tmp_path / "c", kind), vocab_size=50, image_token_id=48, bos_token_id=1, eos_token_id=2,
        pad_token_id=pad, size="tiny", projector_type="mlp", language_model=tmp_path / "language",
    )  # fmt: skip
    student = found.load()
    assert {key: value.shape for key, value in found.shell.state_dict().items()} == {
        key: value.shape for key, value in student.state_dict().items()
    }
    assert student.config.text_config.pad_token_id == pad
    student.save_pretrained(tmp_path / "saved")
    again = load_student(tmp_path / "saved")
    assert again.config.text_config.pad_token_id == pad
    assert all(torch.equal(again.state_dict()[key], value) for key, value in student.state_dict().items())
    ids = torch.tensor([[1, 5, 6, pad or 0], [1, 7, 8, 9]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert torch.equal(*(one(input_ids=ids, attention_mask=mask).logits for one in (student.eval(), again)))
    alone = student(input_ids=ids[:1, :3]).logits
    torch.testing.assert_close(student(input_ids=ids, attention_mask=mask).logits[:1, :3], alone)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_attention_heads": 0}, r"num_attention_heads in config\.json is 0, expected 1 or more"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "odd"}}, r"rope_scaling\.rope_type .* is 'odd'"),
    ],
)
def test_a_language_model_whose_configuration_cannot_be_is_told_by_its_setting(tmp_path, changes, told):
    text = {
        "vocab_size": 40,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(**text)).save_pretrained(tmp_path / "language")
    path = tmp_path / "language" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ModelError, match=rf"language cannot be loaded: {told}"):
        make_student(write_cache(tmp_path / "c"), "mobilevlm", size="tiny", language_model=tmp_path / "language")


def test_a_part_of_another_kind_is_refused(tmp_path):
    make_tower("siglip").save_pretrained(tmp_path / "siglip")
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=4,
        )
    ).save_pretrained(tmp_path / "qwen")  # fmt: skip
    cache = write_cache(tmp_path / "c")
    with pytest.raises(ModelError, match="its tower is a siglip_vision_model, this student needs a clip"):
        make_student(cache, "mobilevlm", size="tiny", vision_tower=tmp_path / "siglip")
    with pytest.raises(ModelError, match="model_type is 'qwen2', this student needs 'llama'"):
        make_student(cache, "mobilevlm", size="tiny", language_model=tmp_path / "qwen")
    (tmp_path / "qwen" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": TOWER}))
    with pytest.raises(ModelError, match=r"0 tensors are named \.\.\.embeddings\.patch_embedding\.weight"):
        make_student(cache, "mobilevlm", size="tiny", vision_tower=tmp_path / "qwen")


def geometry_of(student, **changes):
    own = own_image_encoder(student, {"kind": "dynamic"}, vision_tower=None)
    return {"layout": "crop", "patch_size": None, **own.to_dict(), **changes}


def test_pixels_are_the_caches_wherever_the_tower_can_read_them(tmp_path):
    student = make_student(write_cache(tmp_path / "c", "clip"), "mobilevlm")
    geometry = geometry_of(student)
    assert own_image_encoder(student, geometry, vision_tower=None) is None
    darker = geometry | {"processor": geometry["processor"] | {"image_mean": [0.0, 0.0, 0.0]}}
    assert own_image_encoder(student, darker, vision_tower=None) is None
    # A tower from a directory is used to its own normalisation.
    assert own_image_encoder(student, geometry, vision_tower=tmp_path) is None
    assert own_image_encoder(student, darker, vision_tower=tmp_path).layout == "pad"


def test_a_student_whose_tower_cannot_read_the_caches_pixels_prepares_its_own(tmp_path):
    student = make_student(write_cache(tmp_path / "c"), "mobilevlm")
    geometry = geometry_of(student)
    larger = geometry | {"processor": geometry["processor"] | {"crop_size": {"height": 96, "width": 96}}}
    for other in (larger, {"kind": "any_resolution"}):
        encoder = own_image_encoder(student, other, vision_tower=None)
        assert (encoder.layout, encoder.grid) == ("pad", (3, 3))
        assert dict(encoder.processor.crop_size) == {"height": 72, "width": 72}
