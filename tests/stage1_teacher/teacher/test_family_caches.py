"""`teacher-cache build` with a teacher of every family, and what it refuses of whom."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from family_caches import build
from tiny_families import TINY, save_tiny

from vlm_distill_cache.common.cache.shared_images import VISUAL_SOURCE
from vlm_distill_cache.common.errors import CacheMismatchError, ModelError
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.families.inputs import text_config
from vlm_distill_cache.data.families.table import family_of
from vlm_distill_cache.data.images.layouts.any_resolution import AnyResolutionEncoder
from vlm_distill_cache.data.text.processors import weights_fingerprint
from vlm_distill_cache.stage1_teacher.cli import main
from vlm_distill_cache.stage1_teacher.planning.plan import build_encoder
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher


@pytest.mark.parametrize("name", list(TINY))
@pytest.mark.slow(quick=("gemma3",))
def test_a_cache_of_every_family_is_built_and_found_sound(family_cache, name: str):
    cache, sees_ahead = family_cache(name), name.startswith("paligemma")
    assert len(cache) == 10
    assert not cache.failed
    assert verify(cache.path, deep=True) == []
    record = cache.read("s3")
    words = "A dog" if cache.plan.template["name"] in ("chat", "paligemma") else " A dog"
    assert len(record["labels"]) == len(words) + 1  # of single bytes; the end token
    assert record["answer_image_mass"].any()
    assert not cache.read("text")["answer_image_mass"].any()
    assert cache.plan.fingerprints["vision_tower"]
    has_projector = (cache.path / "projector.safetensors").is_file()
    assert has_projector == (name in ("llava", "llava_original", "llava_next", "llava_onevision", "compodistill"))
    assert has_projector == ("no_projector" not in cache.plan.teacher)
    # Two questions about one picture: its own signals are kept once unless visual tokens see the question.
    assert (VISUAL_SOURCE in cache.plan.all_fields) == (not sees_ahead)
    held = [len(cache.read_stored(sample)["visual_columns"]) > 0 for sample in ("s0", "again")]
    assert held == [True, sees_ahead]


@pytest.mark.parametrize(("name", "sees"), [("paligemma", "the whole prompt"), ("gemma3", "their whole image")])
def test_a_map_that_is_no_triangle_is_refused(tmp_path: Path, family_data: Path, name: str, sees: str):
    teacher = save_tiny(name, tmp_path / "teacher")
    with pytest.raises(ModelError, match=rf"'{name}' visual tokens see {sees}.*leave visual_map out"):
        build(teacher, family_data, tmp_path / "cache", signals=("logits", "visual_map"))


def test_placement_is_part_of_what_a_teacher_is(tmp_path: Path, family_data: Path):
    folder = save_tiny("qwen3_vl", tmp_path / "teacher")
    plain, spread = Teacher(folder), Teacher(folder, device_map="cpu")
    assert plain.fingerprints()["teacher"] != spread.fingerprints()["teacher"]
    assert plain.fingerprints()["teacher"] == weights_fingerprint(folder, "float32")
    assert plain.fingerprints()["teacher"] != weights_fingerprint(folder, "float32", quantisation="8bit")
    cache = build(folder, family_data, tmp_path / "cache", device_map="cpu")
    assert cache.plan.teacher["device_map"] == "cpu"
    assert cache.plan.fingerprints["teacher"] == spread.fingerprints()["teacher"]
    with pytest.raises(CacheMismatchError, match="teacher"):
        build(folder, family_data, tmp_path / "cache")


def test_sequences_have_room_for_the_largest_picture_and_an_answer(tmp_path: Path, monkeypatch):
    teacher = Teacher(save_tiny("llava_next", tmp_path / "teacher"))
    assert build_encoder(teacher, template="auto", max_length=0).max_length == 2048
    text = text_config(teacher.config)
    monkeypatch.setattr(AnyResolutionEncoder, "token_count", 2880)
    monkeypatch.setattr(text, "max_position_embeddings", 32768)
    assert build_encoder(teacher, template="auto", max_length=0).max_length == 2880 + 1024
    monkeypatch.setattr(text, "max_position_embeddings", 3000)
    assert build_encoder(teacher, template="auto", max_length=0).max_length == 3000
    assert build_encoder(teacher, template="auto", max_length=77).max_length == 77


def test_several_processes_do_not_share_the_devices_of_one_spread_teacher():
    result = CliRunner().invoke(main, ["build", "--nproc", "2", "--set", "device_map=auto"])
    assert result.exit_code == 2
    assert "would spread the teacher over the same devices" in " ".join(result.output.split())


def test_a_teacher_whose_attention_cannot_be_captured_still_gives_logits(
    tmp_path: Path, family_data: Path, monkeypatch
):
    def refuse(*_):
        raise ModelError("not in this version")

    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.teacher.teacher.AttentionCapture", refuse)
    folder = save_tiny("smolvlm", tmp_path / "teacher")
    with pytest.raises(ModelError, match=r"answer_attention cannot be had: not in this version.*--signals logits"):
        build(folder, family_data, tmp_path / "cache")
    assert len(build(folder, family_data, tmp_path / "cache", signals=("logits",))) == 10
    # Of visual tokens that do not run there is nothing to keep.
    stored = json.loads((folder / "config.json").read_text())
    stored["distilled"] = {"parts": family_of("smolvlm").parts, "visual_tokens": {"keep": 0.5, "by": "random"}}
    (folder / "config.json").write_text(json.dumps(stored))
    with pytest.raises(ModelError, match=r"feeds only some of .*, so visual_logits cannot be had: leave them out"):
        build(folder, family_data, tmp_path / "fewer", signals=("logits", "visual_logits"))


def test_questions_that_share_a_picture_are_refused_where_it_sees_them(tmp_path: Path):
    teacher = save_tiny("paligemma", tmp_path / "teacher")
    with pytest.raises(ModelError, match=r"visual tokens see the question.*'shapes.*one question a sample"):
        build(teacher, Path("shapes:images=2"), tmp_path / "cache")


def test_an_incomplete_checkpoint_is_refused_rather_than_filled_with_noise(tmp_path: Path, family_data: Path):
    from safetensors.torch import load_file, save_file

    teacher = save_tiny("qwen2_vl", tmp_path / "teacher")
    tensors = load_file(teacher / "model.safetensors")
    del tensors[next(name for name in tensors if "layers.1.self_attn.q_proj" in name)]
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"weights are missing.*would be random"):
        build(teacher, family_data, tmp_path / "cache")
