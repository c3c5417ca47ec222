"""A student from a preset and a cache's parts, or from a directory."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.models.projectors import TeacherProjector
from vlm_distill_cache.stage2_student.students.build import build_config, find_student, load_student
from vlm_distill_cache.stage2_student.students.presets import choose_size, load_preset

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@pytest.fixture
def cache(tmp_path):
    """A folder with what stage one exports for students: tower and projector."""
    torch.manual_seed(7)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=4,
    )
    folder = tmp_path / "cache"
    folder.mkdir()
    save_file(CLIPVisionModel(config).state_dict(), folder / "vision_tower.safetensors")
    (folder / "vision_tower.json").write_text(json.dumps(config.to_dict()))
    projector = TeacherProjector(in_features=16, hidden_features=20, out_features=20, act="gelu")
    save_file(projector.state_dict(), folder / "projector.safetensors")
    write_projector_config(folder)
    return folder


def write_projector_config(folder, **changes):
    config = {
        "act": "gelu",
        "in": 16,
        "hidden": 20,
        "out": 20,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        **changes,
    }
    (folder / "projector.json").write_text(json.dumps(config))


def make_student(cache, name="mobilevlm", **changes):
    return find_student(name, cache_dir=cache, vocab_size=50, image_token_id=4, **TOKENS, **changes).load()


def test_tiny_student_takes_tower_and_vocabulary_from_the_cache(cache):
    student = make_student(cache, size="tiny")
    cached = load_file(cache / "vision_tower.safetensors")
    own = student.model.vision_tower.vision_tower.vision_model.state_dict()
    assert own.keys() == cached.keys()
    assert all(torch.equal(own[name], value) for name, value in cached.items())
    text = student.config.text_config
    assert (text.hidden_size, text.num_hidden_layers, text.vocab_size) == (64, 3, 50)
    assert (text.bos_token_id, text.eos_token_id, text.pad_token_id) == (1, 2, 0)
    assert student.image_grid == (3, 3)


def test_all_but_the_frozen_parts_is_trainable(cache):
    student = make_student(cache, size="tiny", projector_type="taf")
    frozen = {name for name, parameter in student.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name, _ in student.named_parameters() if ".vision_tower." in name or ".teacher." in name}


def test_tower_exported_under_the_prefix_of_older_libraries_loads_too(cache):
    path = cache / "vision_tower.safetensors"
    plain = load_file(path)
    save_file({f"vision_model.{name}": value for name, value in plain.items()}, path)
    student = make_student(cache, size="tiny")
    own = student.model.vision_tower.vision_tower.vision_model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.items())


def test_tiny_weights_have_a_deviation_of_one_over_the_root_of_fan_in(cache):
    student = make_student(cache, size="tiny")
    for name, parameter in student.named_parameters():
        if parameter.dim() >= 2 and ".vision_tower." not in name:
            fan_in = parameter[0].numel()
            assert float(parameter.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.15), name


def test_weights_are_a_function_of_the_seed_and_leave_the_global_generator_alone(cache):
    torch.manual_seed(123)
    expected = torch.rand(3)
    torch.manual_seed(123)
    first = make_student(cache, size="tiny", seed=1).state_dict()
    assert torch.equal(torch.rand(3), expected)
    again = make_student(cache, size="tiny", seed=1).state_dict()
    other = make_student(cache, size="tiny", seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


@pytest.mark.parametrize(("width", "size"), [(96, "tiny"), (512, "tiny"), (2048, "1.7b"), (4096, "1.7b"), (5120, "3b")])
def test_auto_gives_a_wider_teacher_no_smaller_student(width, size):
    assert choose_size(width) == size


def test_auto_says_what_it_chose_and_why(cache, caplog):
    with caplog.at_level(logging.INFO, logger="vlm_distill_cache.stage2_student.students.build"):
        student = make_student(cache)
    assert student.config.text_config.hidden_size == 64
    assert "student size auto: tiny, because the cache's teacher has width 20" in caplog.text


def test_a_tokenizer_larger_than_the_published_vocabulary_widens_the_embedding(tmp_path):
    config = build_config(
        load_preset("1.7b"),
        cache_dir=tmp_path,
        vocab_size=32002,
        image_token_id=32000,
        special_token_ids={"bos": 1, "eos": 2, "pad": 32001},
    )
    assert config.text_config.vocab_size == 32002


def test_pooling_the_teachers_tokens_is_refused_without_the_teachers_projector(cache):
    with pytest.raises(ConfigError, match=r"pool_teacher_tokens=true .* set projector=taf"):
        make_student(cache, size="tiny", pool_teacher_tokens=True)


def test_taf_carries_the_teachers_projector(cache):
    student = make_student(cache, size="tiny", projector_type="taf")
    teacher = student.model.mm_projector.teacher.state_dict()
    for name, value in load_file(cache / "projector.safetensors").items():
        assert torch.equal(teacher[name], value)
    assert student.image_grid == (6, 6)
    pooled = make_student(cache, size="tiny", projector_type="taf", pool_teacher_tokens=True)
    assert pooled.image_grid == (3, 3)


@pytest.mark.parametrize("change", [{"vision_feature_select_strategy": "full"}, {"vision_feature_layer": [-2, -5]}])
def test_taf_of_a_projector_that_reads_other_features_is_refused(cache, change):
    write_projector_config(cache, **change)
    with pytest.raises(ModelError, match="gives patch tokens of one layer"):
        make_student(cache, size="tiny", projector_type="taf")


def test_taf_reads_the_layer_that_the_teacher_reads(cache):
    write_projector_config(cache, vision_feature_layer=-1)
    student = make_student(cache, size="tiny", projector_type="taf")
    assert student.config.vision_feature_layer == -1


@pytest.mark.parametrize("projector_type", ["ldpnet", "ldpnetv2", "mlp", "taf"])
def test_a_saved_student_loads_by_its_directory_and_goes_on_training(cache, tmp_path, projector_type):
    student = make_student(cache, size="tiny", projector_type=projector_type)
    student.save_pretrained(tmp_path / "saved")
    loaded = make_student(cache, name=str(tmp_path / "saved"))
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    trainable = {name for name, value in student.named_parameters() if value.requires_grad}
    assert {name for name, value in loaded.named_parameters() if value.requires_grad} == trainable


def test_a_directory_saved_in_half_precision_loads_in_single(cache, tmp_path):
    make_student(cache, size="tiny").half().save_pretrained(tmp_path / "saved")
    assert make_student(cache, name=str(tmp_path / "saved")).dtype == torch.float32


def test_a_directory_with_a_smaller_vocabulary_grows_to_the_tokenizer(cache, tmp_path):
    make_student(cache, size="tiny").save_pretrained(tmp_path / "saved")
    grown = find_student(str(tmp_path / "saved"), cache_dir=cache, vocab_size=53, image_token_id=4, **TOKENS).load()
    assert grown.lm_head.weight.shape == grown.model.embed_tokens.weight.shape == (53, 64)
    assert grown.config.text_config.vocab_size == 53


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "mobilellm"},
            r"neither a known student \(mobilevlm\[-tiny\|1\.7b\|3b\], .* nor a directory",
        ),
        ({"size": "7b"}, "choose auto, tiny, 1.7b, 3b"),
        ({"projector_type": "qformer"}, "choose one of ldpnet, ldpnetv2, mlp, taf"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(cache, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_student(cache, **changes)


@pytest.mark.parametrize("missing", ["vision_tower.json", "vision_tower.safetensors", "projector.safetensors"])
def test_a_cache_without_a_needed_part_is_refused_by_the_files_name(cache, missing):
    (cache / missing).unlink()
    with pytest.raises(CacheFormatError, match=missing):
        make_student(cache, size="tiny", projector_type="taf")


def test_a_tower_that_does_not_fit_its_own_configuration_is_refused(cache):
    path = cache / "vision_tower.safetensors"
    tensors = load_file(path)
    tensors["pre_layrnorm.weight"] = torch.ones(17)
    save_file(tensors, path)
    with pytest.raises(CacheFormatError, match=r"pre_layrnorm\.weight"):
        make_student(cache, size="tiny")


def test_a_directory_of_another_model_or_without_a_weight_is_refused(cache, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_student(tmp_path)
    folder = tmp_path / "saved"
    make_student(cache, size="tiny").save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing: model\.norm\.weight"):
        load_student(folder)
    (folder / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ModelError, match="model_type is 'llava'"):
        load_student(folder)


def test_a_directory_that_contradicts_the_request_is_refused(cache, tmp_path):
    folder = tmp_path / "saved"
    make_student(cache, size="tiny", projector_type="mlp").save_pretrained(folder)
    with pytest.raises(ModelError, match="its projector is 'mlp', asked for 'taf'"):
        make_student(cache, name=str(folder), projector_type="taf")
    with pytest.raises(ModelError, match="image_token_id is 4"):
        find_student(str(folder), cache_dir=cache, vocab_size=50, image_token_id=9, **TOKENS).load()


@pytest.mark.parametrize("name", ["mobilevlm-v1", "mobilevlm"])
def test_each_mobilevlm_has_the_projector_of_its_version(cache, name):
    student = make_student(cache, name=name, size="tiny")
    assert student.config.projector_type == {"mobilevlm-v1": "ldpnet", "mobilevlm": "ldpnetv2"}[name]
    assert student.image_grid == (3, 3)
