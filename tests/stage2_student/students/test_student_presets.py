"""Students by name: published sizes, what a name promises of a directory, what it needs."""

import json

import pytest
import torch
from transformers import Idefics3Config, LlamaForCausalLM, Qwen2ForCausalLM

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.models.compodistill import CompoDistillForConditionalGeneration
from vlm_distill_cache.common.models.mobilevlm import MobileVLMForConditionalGeneration
from vlm_distill_cache.stage2_student.students.build import build_config
from vlm_distill_cache.stage2_student.students.presets import (
    AUTO_SIZES,
    LARGEST,
    LIBRARY_STUDENTS,
    SIZES_OF,
    describe_students,
    fit_size,
    load_preset,
    split_student_name,
    student_folder,
)
from vlm_distill_cache.stage2_student.training.resolve import resolve_config

NAMES = [(name, size) for name, sizes in SIZES_OF.items() for size in sizes]


def make_on_meta(name, size, cache_dir, **options):
    preset = load_preset(size, name)
    config = build_config(
        preset, cache_dir=cache_dir, vocab_size=preset["language_model"].get("vocab_size", 100), image_token_id=99,
        special_token_ids={"bos": 1, "eos": 2, "pad": 0}, **options,
    )  # fmt: skip
    model_class = CompoDistillForConditionalGeneration if name == "compodistill" else MobileVLMForConditionalGeneration
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize(("name", "size"), NAMES)
def test_every_preset_names_its_source_and_can_be_built(tmp_path, name, size):
    preset = load_preset(size, name)
    assert preset["source"]
    assert preset["download"]
    student = make_on_meta(name, size, tmp_path, projector_type="mlp")
    assert student.config.text_config.hidden_size == preset["language_model"]["hidden_size"]


# Published as MobileLLaMA-1.4B and 2.7B, CLIP ViT-L/14 of 0.3 B, 1.7 B and 3 B in all; the digits behind these, and
# the projectors' millions, are arithmetic on the published widths.
@pytest.mark.parametrize(
    ("name", "size", "language", "projector"),
    [
        ("mobilevlm", "1.7b", 1.36, 6.32),
        ("mobilevlm", "3b", 2.70, 9.21),
        ("mobilevlm-v1", "1.7b", 1.36, 18.94),
        ("mobilevlm-v1", "3b", 2.70, 28.91),
    ],
)
def test_published_mobilevlm_sizes_have_the_published_number_of_parameters(tmp_path, name, size, language, projector):
    student = make_on_meta(name, size, tmp_path)
    counts = {"tower": 0, "projector": 0, "language": 0}
    for key, value in student.named_parameters():
        part = "tower" if ".vision_tower." in key else "projector" if ".mm_projector." in key else "language"
        counts[part] += value.numel()
    assert counts["language"] / 1e9 == pytest.approx(language, abs=0.006)
    assert counts["projector"] / 1e6 == pytest.approx(projector, abs=0.006)
    assert counts["tower"] / 1e6 == pytest.approx(303.5, abs=0.5)
    assert student.image_grid == (12, 12)


def test_the_language_models_of_presets_count_as_the_librarys_own(tmp_path):
    for name, size, library in (
        ("mobilevlm", "1.7b", LlamaForCausalLM),
        ("compodistill", "2b", Qwen2ForCausalLM),
    ):
        student = make_on_meta(name, size, tmp_path, projector_type="mlp")
        with torch.device("meta"):
            own = library(student.config.text_config)
        parts = (".vision_tower.", ".mm_projector.")
        found = sum(v.numel() for k, v in student.named_parameters() if not any(part in k for part in parts))
        assert found == sum(value.numel() for value in own.parameters())


def test_compodistill_2b_has_the_published_parts_and_728_tokens(tmp_path):
    """Qwen1.5-1.8B (1.84 B) behind SigLIP so400m (428 M with its head), projector of the 4B teacher, one layer more."""
    tower = load_preset("2b", "compodistill")["vision_tower"]
    (tmp_path / "vision_tower.json").write_text(json.dumps(tower))
    projector = {"act": "gelu", "in": 1152, "hidden": 2560, "out": 2560, "vision_feature_layer": -2}
    (tmp_path / "projector.json").write_text(json.dumps(projector | {"vision_feature_select_strategy": "patch"}))
    student = make_on_meta("compodistill", "2b", tmp_path)
    counts = {name: value.numel() for name, value in student.named_parameters()}
    language = sum(n for name, n in counts.items() if ".vision_tower." not in name and ".mm_projector." not in name)
    assert language / 1e9 == pytest.approx(1.837, abs=0.001)
    assert sum(n for name, n in counts.items() if ".vision_tower." in name) / 1e6 == pytest.approx(428.2, abs=0.1)
    # Two layers of about 9.5 M weights in all, 19 MB in half precision (docs/method.md, section 4); and 2560 x 2048.
    assert sum(n for name, n in counts.items() if ".mm_projector.teacher." in name) == 1152 * 2560 + 2560**2 + 5120
    assert sum(n for name, n in counts.items() if ".mm_projector.post." in name) == 2560 * 2048 + 2048
    assert student.image_grid == (27, 27)
    assert student.dropped_tokens == 1


@pytest.mark.parametrize(
    ("student", "expected"),
    [
        ("mobilevlm", ("mobilevlm", "auto")),
        ("mobilevlm-3b", ("mobilevlm", "3b")),
        ("mobilevlm-v1", ("mobilevlm-v1", "auto")),
        ("mobilevlm-v1-tiny", ("mobilevlm-v1", "tiny")),
        ("compodistill-2b", ("compodistill", "2b")),
        ("mobilevlm-7b", ("mobilevlm-7b", "auto")),
        ("smolvlm", ("smolvlm", "auto")),
        ("runs/mobilevlm-tiny/final", ("runs/mobilevlm-tiny/final", "auto")),
    ],
)
def test_a_name_is_split_into_student_and_size(student, expected):
    assert split_student_name(student) == expected


@pytest.mark.parametrize("name", SIZES_OF)
def test_every_automatic_size_is_one_of_the_students(name):
    for size in [LARGEST, *(size for _, size in AUTO_SIZES)]:
        assert fit_size(name, size) in SIZES_OF[name]
    assert fit_size(name, "tiny") == "tiny"


@pytest.mark.parametrize(
    ("student", "width", "steps"),
    [("mobilevlm-v1", 96, 60), ("mobilevlm-v1", 4096, None), ("mobilevlm-v1-tiny", 4096, 60)],
)
def test_a_students_budget_follows_its_size_not_the_letters_behind_a_dash(student, width, steps):
    config = resolve_config(None, [f"student={student}", "cache=c", "output=o"], teacher_width=width)
    assert config.dpt.steps == steps


@pytest.mark.parametrize("name", LIBRARY_STUDENTS)
def test_a_student_of_the_library_says_which_weights_to_download(name):
    with pytest.raises(ConfigError, match=rf"student {name} is \w+ of the model library.*student_weights=\w+/"):
        student_folder(name, None)
    assert name in describe_students()


def write_config(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


SMOL = {
    "model_type": "idefics3",
    "text_config": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}  # fmt: skip


def test_a_named_students_weights_must_be_that_students(tmp_path):
    assert student_folder("smolvlm", str(write_config(tmp_path / "a", SMOL))) == tmp_path / "a"
    other = SMOL | {"text_config": SMOL["text_config"] | {"num_hidden_layers": 32}}
    with pytest.raises(ConfigError, match=r"is no smolvlm: num_hidden_layers is 32, published 30.*SmolVLM-256M"):
        student_folder("smolvlm", str(write_config(tmp_path / "b", other)))
    with pytest.raises(ConfigError, match=r"model_type is 'idefics3', qwen2\.5-vl-3b is qwen2_5_vl"):
        student_folder("qwen2.5-vl-3b", str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"no readable config\.json"):
        student_folder("smolvlm", str(tmp_path / "nowhere"))
    assert Idefics3Config(**SMOL).text_config.num_hidden_layers == 30


def test_a_named_mobilevlm_takes_a_published_directory_of_any_of_its_sizes(tmp_path):
    published = {
        "model_type": "mobilevlm", "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "mm_projector_type": "ldpnetv2",
    }  # fmt: skip
    folder = write_config(tmp_path / "m", published)
    assert student_folder("mobilevlm", str(folder)) == student_folder("mobilevlm-3b", str(folder)) == folder
    with pytest.raises(ConfigError, match=r"is no mobilevlm-1\.7b: hidden_size is 2560, published 2048"):
        student_folder("mobilevlm-1.7b", str(folder))
    assert student_folder("mobilevlm-3b", None) is None
    with pytest.raises(ConfigError, match=r"is no mobilevlm-v1-3b: projector is ldpnetv2, not ldpnet"):
        student_folder("mobilevlm-v1-3b", str(folder))


def test_weights_go_with_a_name_only(tmp_path):
    with pytest.raises(ConfigError, match="goes with a student's name"):
        student_folder(str(tmp_path), str(tmp_path))
    assert student_folder(str(tmp_path), None) == tmp_path
    with pytest.raises(ConfigError, match="neither a known student"):
        student_folder("nobody", None)
