"""An original LLaVA from end to end: as a teacher, imported, and as a student."""

import json
import shutil

import pytest
import torch
from click.testing import CliRunner
from family_caches import build, write_data
from safetensors.torch import load_file, save_file
from tiny_families import save_tiny
from transformers import LlavaForConditionalGeneration

from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.common.models.checkpoint import Checkpoint
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.trained_student import open_student
from vlm_distill_cache.stage2_student.training.resolve import resolve_config


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """An original LLaVA, and a cache of it as a teacher; the data lie beside them."""
    folder = save_tiny("llava_original", tmp_path_factory.mktemp("llava") / "original")
    return folder, build(folder, write_data(folder.parent), folder.parent / "cache")


@pytest.mark.slow
def test_an_original_llava_is_a_teacher_a_student_and_imported_the_same(original, tmp_path):
    folder, cache = original
    assert cache.plan.geometry["layout"] == "pad"
    arguments = ["import", str(folder), "--output", str(tmp_path / "own")]
    for _ in range(2):  # the second time there is nothing to do
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
    direct, imported = open_family_model(folder), open_family_model(tmp_path / "own")
    assert direct.image_encoder.to_dict() == imported.image_encoder.to_dict()
    assert direct.model.config.image_token_id == imported.model.config.image_token_id
    for name, value in imported.model.state_dict().items():
        assert torch.equal(direct.model.state_dict()[name], value)
    ids = torch.tensor([[1, 5] + [direct.model.config.image_token_id] * 9 + [9]])
    pixels = torch.randn(1, 3, 24, 24)
    assert torch.equal(*(one.model(input_ids=ids, pixel_values=pixels).logits for one in (direct, imported)))


@pytest.mark.slow
def test_every_file_that_weights_are_read_from_is_part_of_what_an_original_llava_is(original, tmp_path):
    folder = shutil.copytree(original[0], tmp_path / "teacher")
    before = Teacher(folder).fingerprints()["teacher"]
    assert before == Teacher(original[0]).fingerprints()["teacher"]
    tower = torch.load(folder / "clip" / "pytorch_model.bin")
    torch.save({name: value + 1 for name, value in tower.items()}, folder / "clip" / "pytorch_model.bin")
    changed = Teacher(folder).fingerprints()["teacher"]
    weights = torch.load(folder / "pytorch_model.bin")
    projector = {name: weights.pop(name) for name in list(weights) if "mm_projector" in name}
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save(projector, folder / "mm_projector.bin")
    moved = Teacher(folder).fingerprints()["teacher"]
    torch.save({name: value + 1 for name, value in projector.items()}, folder / "mm_projector.bin")
    assert len({before, changed, moved, Teacher(folder).fingerprints()["teacher"]}) == 4


@pytest.mark.slow
def test_an_original_llava_goes_on_training_and_opens_again(original, tmp_path):
    folder, cache = original
    steps = [f"{phase}.{key}={n}" for phase in ("dpt", "dft") for key, n in (("steps", 1), ("batch_size", 4))]
    options = [f"student={folder}", f"cache={cache.path}", f"output={tmp_path}", f"data={folder.parent / 'data.json'}"]
    options += [f"vision_tower={folder / 'clip'}", "phases=[dpt, dft]", "device=cpu", *steps]
    train(resolve_config(None, options, teacher_width=32))
    opened = open_student(tmp_path / "final")
    assert opened.encoder.image_encoder.to_dict()["layout"] == "pad"
    before = open_family_model(folder).model
    assert not torch.equal(opened.model.model.lm_head.weight, before.lm_head.weight)
    assert opened.model.model.lm_head.weight.shape == before.lm_head.weight.shape
    assert torch.equal(
        opened.model.model.model.vision_tower.state_dict().popitem()[1],
        before.model.vision_tower.state_dict().popitem()[1],
    )


def test_parts_that_a_model_of_the_library_has_are_refused_not_ignored(tiny_llava, original, tmp_path):
    folder, cache = original
    options = [
        f"student={tiny_llava}",
        f"cache={cache.path}",
        f"output={tmp_path}",
        f"data={folder.parent / 'data.json'}",
    ]
    with pytest.raises(ConfigError, match=r"holds its own vision tower; leave vision_tower out"):
        train(resolve_config(None, [*options, f"vision_tower={folder / 'clip'}"], teacher_width=32))
    with pytest.raises(ConfigError, match="has a language model of its own"):
        train(resolve_config(None, [*options, f"language_model={folder}"], teacher_width=32))


def test_a_missing_tokenizer_or_a_bad_image_processor_is_noticed_before_weights_are_read(
    original, tmp_path, monkeypatch
):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(Checkpoint, "load", read)
    folder = shutil.copytree(original[0], tmp_path / "teacher")
    (folder / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ModelError, match="image_processor_type"):
        open_family_model(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        open_family_model(folder)


def test_a_librarys_weights_are_checked_by_name_and_shape_on_no_device(tiny_llava, tmp_path, monkeypatch):
    """Nothing but the check on the meta device may be asked of the library before the error."""
    folder = shutil.copytree(tiny_llava, tmp_path / "teacher")
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if "mlp" in name)
    save_file({name: value for name, value in tensors.items() if name != gone}, folder / "model.safetensors")
    loads, asked = LlavaForConditionalGeneration.from_pretrained, []

    def record(model_class, directory, **options):
        asked.append(options.get("device_map"))
        return loads(directory, **options)

    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", classmethod(record))
    with pytest.raises(ModelError, match="1 weights are missing"):
        open_family_model(folder)
    assert asked == ["meta"]


@pytest.mark.slow
def test_a_projector_alone_reads_with_the_tokenizer_of_its_language_model_and_is_imported_whole(original, tmp_path):
    """The folder of a pre-training: what it does not hold comes from the base that it names."""
    folder, alone, base = original[0], tmp_path / "alone", tmp_path / "base"
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("tokenizer*", "pytorch_model*"))
    shutil.copytree(folder / "clip", alone / "clip", dirs_exist_ok=True)
    shutil.copytree(folder, base, ignore=shutil.ignore_patterns("clip"))
    weights = torch.load(base / "pytorch_model.bin")
    torch.save(
        {name: weights.pop(name) for name in list(weights) if "mm_projector" in name}, alone / "mm_projector.bin"
    )
    torch.save(weights, base / "pytorch_model.bin")
    stored = json.loads((alone / "config.json").read_text())
    (alone / "config.json").write_text(json.dumps(stored | {"_name_or_path": "../base"}))
    result = CliRunner().invoke(main, ["import", str(alone), "--output", str(tmp_path / "own")])
    assert result.exit_code == 0, result.output
    whole, read, imported = (open_family_model(path) for path in (folder, alone, tmp_path / "own"))
    for other in (read, imported):
        assert other.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
        for name, value in whole.model.state_dict().items():
            assert torch.equal(other.model.state_dict()[name], value)
