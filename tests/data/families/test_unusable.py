"""Checkpoint directories that no model can be opened from: what they are and what to do, before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.data.families.models import open_family_model
from vlm_distill_cache.stage1_teacher.cli import main as teacher_cache

ORIGINAL = {
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "hidden_size": 48,
}
ADAPTER = {"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf", "peft_type": "LORA"}
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def copied(tiny_llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llava, tmp_path / "teacher"))


def change(folder: Path, **settings) -> None:
    """Set or (None) remove settings of a folder's config.json."""
    path = folder / "config.json"
    stored = {name: value for name, value in (json.loads(path.read_text()) | settings).items() if value is not None}
    path.write_text(json.dumps(stored))


def refusal(folder: Path) -> str:
    """What stage one and a student's folder are both told, without a traceback."""
    with pytest.raises(ModelError) as caught:
        open_family_model(folder)  # as a student's folder is opened, too
    result = CliRunner().invoke(
        teacher_cache, ["build", "--data", "shapes", "--teacher", str(folder), "--cache", str(folder.parent / "cache")]
    )
    assert (result.exit_code, result.exception is None or isinstance(result.exception, SystemExit)) == (1, True)
    assert str(caught.value).splitlines()[0][:200] in result.output
    return str(caught.value)


def test_code_from_a_checkpoint_is_never_run_and_the_remedy_is_another_checkpoint(copied: Path):
    change(copied, model_type="internvl_chat", auto_map={"AutoModel": "modeling_internvl_chat.InternVLChatModel"})
    (copied / "modeling_internvl_chat.py").write_text("raise SystemExit('it ran')")
    told = refusal(copied)
    assert "never run here" in told
    assert "OpenGVLab/InternVL3-8B-hf" in told
    assert "qwen2_5_vl" in told
    assert "trust_remote_code" not in told


@pytest.mark.parametrize("kind", ["mystery_vlm", None, ["llava"], "bad\x1b[2J\nname"])
def test_an_unknown_model_type_names_the_families(copied: Path, kind):
    change(copied, model_type=kind)
    told = refusal(copied)
    assert "llava, llava_next, llava_onevision, qwen2_vl" in told
    assert "pip install" not in told
    assert "\x1b" not in told


@pytest.mark.parametrize("kind", ["llava_mistral", "llava_qwen", "llava_mpt"])
def test_an_original_llava_of_another_class_names_a_converted_checkpoint(copied: Path, kind: str):
    change(copied, model_type=kind, architectures=None, text_config=None, vision_config=None, **ORIGINAL)
    assert "only LLaVA-1 and 1.5 with a Llama are read (LlavaLlamaForCausalLM): take the same model" in refusal(copied)


@pytest.mark.parametrize("beside", ["nothing", "config", "weights"])
def test_an_adapter_alone_gives_the_lines_that_merge_it(copied: Path, beside: str):
    for name in {"nothing": ("config.json", "model.safetensors"), "config": ("model.safetensors",)}.get(beside, ()):
        (copied / name).unlink()
    (copied / "adapter_config.json").write_text(json.dumps(ADAPTER))
    told = refusal(copied)
    assert "AutoModelForImageTextToText.from_pretrained('llava-hf/llava-1.5-7b-hf')" in told
    assert f"PeftModel.from_pretrained(base, {str(copied)!r}).merge_and_unload().save_pretrained('MERGED')" in told


def test_a_language_model_or_a_tower_alone_is_told_what_it_is_good_for(tmp_path: Path):
    LlamaForCausalLM(LlamaConfig(vocab_size=20, **SMALL)).save_pretrained(tmp_path / "llama")
    CLIPModel(
        CLIPConfig(text_config={**SMALL, "vocab_size": 20}, vision_config={**SMALL, "image_size": 24, "patch_size": 12})
    ).save_pretrained(tmp_path / "clip")
    assert "a language model alone (model_type 'llama')" in refusal(tmp_path / "llama")
    assert f"--set language_model={tmp_path / 'llama'} with student mobilevlm" in refusal(tmp_path / "llama")
    assert f"--set vision_tower={tmp_path / 'clip'} with student mobilevlm" in refusal(tmp_path / "clip")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"\xef\xbb\xbf{}", "without a byte order mark"),
        ("{}".encode("utf-16"), "expected JSON in UTF-8"),
        (b"", "not valid JSON"),
        (b"[1]", "holds list"),
        (b"null", "holds NoneType"),
        (b"{}", "names no model_type"),
        (b'{"model_type": "llava", "vision_config": 3}', "vision_config in config.json is 3"),
        (b'{"model_type": "qwen2_vl"}', "vision_config in config.json is None"),
    ],
)
def test_a_broken_config_is_refused_before_a_model_is_made(copied: Path, content: bytes, told: str):
    (copied / "config.json").write_bytes(content)
    assert told in refusal(copied)


def test_missing_weights_are_named(copied: Path):
    (copied / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    assert "git lfs pull" in refusal(copied)
    (copied / "model.safetensors").unlink()
    assert "no weights; expected model.safetensors" in refusal(copied)
    index = copied / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: missing, but model.safetensors.index.json names it" in refusal(copied)
    index.unlink()
    (copied / "model-Q4.gguf").write_bytes(b"GGUF")
    assert "llama.cpp" in refusal(copied)
    (copied / "config.json").unlink()
    assert "llama.cpp" in refusal(copied)
    assert "llama.cpp" in refusal(copied / "model-Q4.gguf")


def test_places_without_a_checkpoint_are_told_where_one_is(copied: Path, tmp_path: Path):
    assert f"give one of them: {copied}" in refusal(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "no config.json there: it is empty" in refusal(tmp_path / "empty")
    assert "no folder; give the folder that holds config.json" in refusal(copied / "config.json")
    with pytest.raises(ModelError, match="there is no such folder; give one that is there, or a name on the hub"):
        open_family_model(Path("llava-hf/llava-1.5-7b-hf"))


@pytest.mark.parametrize("top", [True, False, None])
@pytest.mark.parametrize("inner", [True, False, None])
def test_tied_weights_are_what_the_files_say_or_refused(copied: Path, top, inner):
    stored = json.loads((copied / "config.json").read_text())
    stored["text_config"]["tie_word_embeddings"] = inner
    change(
        copied, tie_word_embeddings=top, text_config={k: v for k, v in stored["text_config"].items() if v is not None}
    )
    tensors = load_file(copied / "model.safetensors")
    head, embedding = (
        next(name for name in tensors if part in name) for part in ("lm_head.weight", "embed_tokens.weight")
    )
    model = open_family_model(copied).model
    assert torch.equal(model.get_output_embeddings().weight, tensors[head])
    save_file({k: v for k, v in tensors.items() if k != head}, copied / "model.safetensors", metadata={"format": "pt"})
    try:
        model = open_family_model(copied).model
    except ModelError as error:
        assert "set tie_word_embeddings to true there" in str(error)  # noqa: PT017
    else:
        assert torch.equal(model.get_output_embeddings().weight, tensors[embedding])


def test_weights_of_an_older_kind_are_read_and_never_run(copied: Path):
    tensors = load_file(copied / "model.safetensors")
    (copied / "model.safetensors").unlink()
    torch.save(tensors, copied / "pytorch_model.bin")
    assert open_family_model(copied).model is not None
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    assert "could run code" in refusal(copied)
    assert not Path("ran").exists()


def test_more_layers_than_any_model_has_are_refused_before_they_are_built(copied: Path):
    for section in ("text_config", "vision_config"):
        before = json.loads((copied / "config.json").read_text())[section]
        change(copied, **{section: before | {"num_hidden_layers": 10**9}})
        assert f"{section}.num_hidden_layers is 1000000000, expected at most 2000" in refusal(copied)
        change(copied, **{section: before})
