"""Published checkpoints from end to end: imported, as a teacher, and as a student with the teacher's projector."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from vlm_distill_cache.common.errors import CacheMismatchError, ModelError
from vlm_distill_cache.common.models.published import load_published
from vlm_distill_cache.data import builtin
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import open_student
from vlm_distill_cache.stage2_student.training.resolve import resolve_config

TOWER = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 72,
    "patch_size": 12,
}  # fmt: skip


def write_teacher(folder):
    """A CompoDistill teacher under its released names, with the built-in tokenizer."""
    from transformers import (
        Qwen2Config,
        Qwen2ForCausalLM,
        SiglipImageProcessorPil,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    torch.manual_seed(0)
    tokenizer = builtin.load_tokenizer()
    text = {
        "vocab_size": len(tokenizer) + 3, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    parts = {
        "language_model.": Qwen2ForCausalLM(Qwen2Config(**text)),
        "vision_tower._vision_tower.vision_model.": SiglipVisionModel(SiglipVisionConfig(**TOWER)),
        "connector._connector.": torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 48)),
    }
    tensors = {
        prefix + name: (value * 4 if value.dim() == 2 else value).contiguous()
        for prefix, module in parts.items()
        for name, value in module.state_dict().items()
    }
    config = {
        "model_type": "compodistill", "text_config": {"model_type": "qwen2", **text},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER}, "connector_type": "mlp2x_gelu",
        "vision_feature_layer": -2, "vision_feature_select_strategy": "patch", "image_aspect_ratio": "square",
    }  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 72, "width": 72}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("teachers") / "compodistill")


@pytest.fixture(scope="module")
def cache(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches") / "c"
    settings = {"template": "vicuna_v1", "limit": 8, "shard_size": 4, "batch_size": 4, "fidelity_samples": 0}
    extract(BuildConfig(cache=str(folder), teacher=str(teacher), **settings))
    return folder


def run(cache, output, student, *options):
    steps = [f"{phase}.{key}={n}" for phase in ("dpt", "dft") for key, n in (("steps", 1), ("batch_size", 4))]
    config = resolve_config(
        None,
        [
            f"student={student}",
            f"cache={cache}",
            f"output={output}",
            "phases=[dpt, dft]",
            "device=cpu",
            *steps,
            *options,
        ],
        teacher_width=48,
    )
    train(config)
    return open_student(output / "final")


def test_a_released_teacher_gives_35_tokens_and_its_projector_to_a_student(cache, teacher, tmp_path):
    plan = json.loads((cache / "plan.json").read_text())
    assert plan["geometry"]["drops_first"]
    student = run(cache, tmp_path / "run", "compodistill-tiny").model
    released = load_file(teacher / "model.safetensors")
    frozen = student.model.mm_projector.teacher
    assert torch.equal(frozen.linear_1.weight, released["connector._connector.0.weight"])
    assert torch.equal(frozen.linear_2.bias, released["connector._connector.2.bias"])
    assert student.dropped_tokens == 1


def test_a_student_that_pools_looks_through_the_whole_grid_of_the_same_teacher(cache, tmp_path):
    opened = run(cache, tmp_path / "run", "compodistill-tiny", "projector=ldpnet")
    assert opened.model.image_grid == (3, 3)
    assert not opened.encoder.image_encoder.drops_first


def test_a_mobilevlm_v1_learns_from_a_released_teacher_through_a_tower_of_its_own(cache, tmp_path):
    opened = run(cache, tmp_path / "run", "mobilevlm-v1-tiny")
    assert opened.model.config.projector_type == "ldpnet"
    assert opened.model.config.vision_config.model_type == "clip_vision_model"


def test_a_released_checkpoint_goes_on_training_as_a_student(cache, teacher, tmp_path):
    opened = run(cache, tmp_path / "run", str(teacher))
    before, after = load_published(teacher), opened.model
    assert torch.equal(
        before.model.vision_tower.state_dict().popitem()[1],
        after.model.vision_tower.state_dict().popitem()[1],
    )
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)


def test_taf_behind_another_tower_of_the_same_kind_is_refused_by_name(cache, tmp_path):
    from transformers import SiglipVisionConfig, SiglipVisionModel

    SiglipVisionModel(SiglipVisionConfig(**TOWER)).save_pretrained(tmp_path / "tower")
    with pytest.raises(CacheMismatchError, match=r"vision tower"):
        run(cache, tmp_path / "run", "compodistill-tiny", f"vision_tower={tmp_path / 'tower'}")


def test_the_teachers_own_directory_serves_as_the_tower(cache, teacher, tmp_path):
    student = run(cache, tmp_path / "run", "compodistill-tiny", f"vision_tower={teacher}").model
    released = load_file(teacher / "model.safetensors")
    prefix = "vision_tower._vision_tower.vision_model."
    state = student.vision_encoder.state_dict()
    assert all(torch.equal(value, released[prefix + name]) for name, value in state.items())


@pytest.mark.parametrize("lost", [["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]])
@pytest.mark.slow(quick=("lost0",))
def test_a_published_folder_without_its_tokenizer_is_no_student_and_one_that_we_saved_has_the_caches(
    cache, teacher, tmp_path, lost
):
    shutil.copytree(teacher, tmp_path / "published")
    for name in lost:
        (tmp_path / "published" / name).unlink()
    with pytest.raises(ModelError, match=r"published: no usable tokenizer: .*download the checkpoint again"):
        run(cache, tmp_path / "run", str(tmp_path / "published"))
    result = CliRunner().invoke(main, ["import", str(tmp_path / "published"), "--output", str(tmp_path / "own")])
    assert result.exit_code == 1
    assert "no usable tokenizer" in result.output
    load_published(teacher).save_pretrained(tmp_path / "saved")
    assert (
        run(cache, tmp_path / "run", str(tmp_path / "saved")).tokenizer.get_vocab()
        == builtin.load_tokenizer().get_vocab()
    )


def test_an_imported_checkpoint_is_one_folder_that_loads_as_the_original(teacher, tmp_path):
    arguments = ["import", str(teacher), "--output", str(tmp_path / "own")]
    for _ in range(2):  # the second time there is nothing to do
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        assert "make distill STUDENT=" in result.output
    own, original = load_published(tmp_path / "own"), load_published(teacher)
    assert all(torch.equal(own.state_dict()[name], value) for name, value in original.state_dict().items())
    assert (tmp_path / "own" / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()


def test_importing_something_else_says_what_is_expected(tmp_path):
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(main, ["import", str(tmp_path / "empty"), "--output", str(tmp_path / "own")])
    assert result.exit_code == 1
    assert "no config.json" in result.output
    assert not (tmp_path / "own").exists()
