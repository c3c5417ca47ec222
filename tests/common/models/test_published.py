"""Published checkpoints, built here by hand at tiny size, load strictly into our own classes."""

import json

import pytest
import torch
from published_factory import (
    COMPODISTILL_CONFIG,
    MOBILEVLM_CONFIG,
    TOWER,
    clip_shapes,
    compodistill_tensors,
    mobilevlm_tensors,
    random_tensors,
    write_compodistill,
    write_mobilevlm,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.convert import convert_published
from vlm_distill_cache.common.models.mobilevlm import MobileVLMForConditionalGeneration
from vlm_distill_cache.common.models.published import (
    default_image_processor,
    is_published,
    load_published,
)
from vlm_distill_cache.common.models.published_configs import KNOWN_TOWERS, mobilevlm_config

TYPES = {1: "ldpnet", 2: "ldpnetv2"}


def load_mobilevlm(folder, version=2, **options):
    tensors = mobilevlm_tensors(version)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(b"copied as it is")
    return load_published(write_mobilevlm(folder, tensors, mm_projector_type=TYPES[version]), **options), tensors


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.slow(quick=("2",))
def test_every_published_mobilevlm_tensor_lands_under_its_own_name_but_for_two_kinds_of_buffers(tmp_path, version):
    model, tensors = load_mobilevlm(tmp_path, version)
    state = model.state_dict()
    kept = {name for name in tensors if not name.endswith(("rotary_emb.inv_freq", "position_ids"))}
    assert state.keys() == kept
    assert all(torch.equal(state[name], tensors[name]) for name in kept)
    assert model.image_grid == (3, 3)
    assert (model.config.image_token_id, model.config.image_aspect_ratio) == (40, "pad")


def test_rotary_frequencies_and_positions_are_computed_not_left_empty(tmp_path):
    model, _ = load_mobilevlm(tmp_path)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, 10000.0 ** -(torch.arange(4) / 4))
    embeddings = model.model.vision_tower.vision_tower.vision_model.embeddings
    assert embeddings.position_ids.tolist() == [list(range(37))]


def test_the_language_model_inside_gives_the_librarys_llama_logits(tmp_path):
    model, tensors = load_mobilevlm(tmp_path)
    text = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=2048,
    )  # fmt: skip
    llama = LlamaForCausalLM(text)
    llama.load_state_dict({name: tensors[name] for name in llama.state_dict()})
    ids = torch.tensor([[1, 5, 9, 30]])
    torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits)


@pytest.mark.parametrize("bridged", [True, False])
def test_every_released_compodistill_tensor_is_used_once(tmp_path, bridged):
    tensors = compodistill_tensors(bridged=bridged)
    model = load_published(write_compodistill(tmp_path, tensors, post_connector_use=bridged))
    state = model.state_dict()
    assert sorted(float(value.double().sum()) for value in state.values()) == sorted(
        float(value.double().sum()) for value in tensors.values()
    )
    assert model.config.projector_type == ("taf" if bridged else "mlp")
    assert model.config.image_aspect_ratio == "square"
    assert torch.equal(state["lm_head.weight"], tensors["language_model.lm_head.weight"])


def test_a_release_may_store_the_whole_siglips_configuration(tmp_path):
    whole = {"model_type": "siglip", "vision_config": TOWER, "text_config": {"hidden_size": 8}}
    model = load_published(write_compodistill(tmp_path, compodistill_tensors(), vision_config=whole))
    assert model.config.vision_config.model_type == "siglip_vision_model"
    assert model.image_grid == (6, 6)


def test_compodistill_computes_what_its_released_code_does(tmp_path):
    """Tower's hidden state -2 without its first token, two layers with a GELU, one more, then Qwen2 over it all."""
    tensors = compodistill_tensors()
    model = load_published(write_compodistill(tmp_path, tensors))
    pixels = torch.randn(1, 3, 24, 24)
    hidden = model.vision_encoder(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    projected = torch.nn.functional.linear(
        hidden, tensors["connector._connector.0.weight"], tensors["connector._connector.0.bias"]
    )
    projected = torch.nn.functional.linear(
        torch.nn.functional.gelu(projected),
        tensors["connector._connector.2.weight"],
        tensors["connector._connector.2.bias"],
    )
    projected = torch.nn.functional.linear(
        projected, tensors["connector.post_connector.weight"], tensors["connector.post_connector.bias"]
    )
    qwen = Qwen2ForCausalLM(model.config.text_config)
    qwen.load_state_dict({name: tensors[f"language_model.{name}"] for name in qwen.state_dict()})
    embed = qwen.get_input_embeddings()
    embeds = torch.cat([embed(torch.tensor([[1, 2]])), projected, embed(torch.tensor([[7, 8]]))], dim=1)
    ids = torch.tensor([[1, 2] + [40] * 35 + [7, 8]])
    torch.testing.assert_close(model(input_ids=ids, pixel_values=pixels).logits, qwen(inputs_embeds=embeds).logits)
    assert (model.image_grid, model.dropped_tokens) == ((6, 6), 1)


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "sharded bin"])
@pytest.mark.slow(quick=1)
def test_all_four_layouts_of_files_give_the_same_model(tmp_path, layout):
    whole, tensors = load_mobilevlm(tmp_path / "bin")
    folder = write_mobilevlm(tmp_path / "other", {})
    (folder / "pytorch_model.bin").unlink()
    stem, end = ("model", "safetensors") if "safetensors" in layout else ("pytorch_model", "bin")

    def save(part, path):
        save_file(part, path) if end == "safetensors" else torch.save(part, path)

    if "sharded" not in layout:
        save(tensors, folder / f"{stem}.{end}")
    else:
        names = sorted(tensors)
        shards = {f"{stem}-0000{i + 1}-of-00002.{end}": names[i::2] for i in range(2)}
        for file, part in shards.items():
            save({name: tensors[name] for name in part}, folder / file)
        index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    loaded = load_published(folder).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in whole.state_dict().items())


def test_a_tower_outside_the_checkpoint_is_taken_from_its_directory(tmp_path):
    tensors = mobilevlm_tensors(tower=False, buffers=False)
    folder = write_mobilevlm(tmp_path / "m", tensors, mm_vision_tower="openai/another-clip")
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": TOWER}))
    tower = random_tensors(clip_shapes("vision_model."), seed=3)
    save_file(tower | {"text_model.x": torch.ones(2), "logit_scale": torch.ones(1)}, clip / "model.safetensors")
    model = load_published(folder, vision_tower=clip)
    found = model.vision_encoder.state_dict()
    assert all(torch.equal(found[name.removeprefix("vision_model.")], value) for name, value in tower.items())
    with pytest.raises(ModelError, match=r"'openai/another-clip'.*--vision-tower openai/another-clip"):
        load_published(folder)


def test_a_tower_that_is_given_replaces_the_one_inside_and_is_never_ignored(tmp_path):
    model, _ = load_mobilevlm(tmp_path / "m")
    clip = tmp_path / "clip"
    clip.mkdir()
    (clip / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **TOWER}))
    save_file(random_tensors(clip_shapes(""), seed=3), clip / "model.safetensors")
    other = load_published(tmp_path / "m", vision_tower=clip)
    name = "embeddings.class_embedding"
    assert not torch.equal(other.vision_encoder.state_dict()[name], model.vision_encoder.state_dict()[name])
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)
    folder = write_compodistill(tmp_path / "c", compodistill_tensors())
    with pytest.raises(ModelError, match="holds its own vision tower; leave vision_tower="):
        load_published(folder, vision_tower=clip)


def test_a_checkpoint_without_its_tower_says_what_to_download(tmp_path):
    folder = write_mobilevlm(tmp_path, mobilevlm_tensors(tower=False, buffers=False))
    (folder / "clip" / "config.json").unlink()
    changed = json.loads((folder / "config.json").read_text())
    changed |= {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 1024}
    (folder / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelError, match=r"hold no vision tower.*--vision-tower openai/clip-vit-large-patch14-336"):
        load_published(folder)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.slow(quick=("dtype2",))
def test_weights_come_in_the_precision_asked_for_or_as_stored(tmp_path, dtype):
    folder = write_mobilevlm(tmp_path, mobilevlm_tensors(dtype=torch.bfloat16))
    model = load_published(folder, dtype=dtype)
    assert {value.dtype for value in model.parameters()} == {dtype or torch.bfloat16}


@pytest.mark.slow
def test_a_converted_folder_is_written_once_and_loads_as_the_original(tmp_path):
    original, _ = load_mobilevlm(tmp_path / "m", 1)
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    for path in (tmp_path / "m").iterdir():
        path.chmod(0o555 if path.is_dir() else 0o444)
    (tmp_path / "m").chmod(0o555)
    target = tmp_path / "converted"
    loaded = load_published(convert_published(tmp_path / "m", target))
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in original.state_dict().items())
    files = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert {
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
    } <= files.keys()
    assert convert_published(tmp_path / "m", target) == target
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == files
    auto = AutoModelForImageTextToText.from_pretrained(target)
    assert torch.equal(auto.lm_head.weight, original.lm_head.weight)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "m"]


def test_a_checkpoint_without_its_tokenizer_is_not_converted(tmp_path):
    load_mobilevlm(tmp_path / "m")
    (tmp_path / "m" / "tokenizer.model").unlink()
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"m: no usable tokenizer: expected tokenizer\.json, tokenizer\.model.*copy its"
    ):
        convert_published(tmp_path / "m", tmp_path / "c")
    assert not (tmp_path / "c").exists()
    (tmp_path / "m" / "vocab.json").write_text("{}")
    convert_published(tmp_path / "m", tmp_path / "c")


def test_a_folder_converted_from_other_files_is_not_taken(tmp_path):
    load_mobilevlm(tmp_path / "m")
    convert_published(tmp_path / "m", tmp_path / "c")
    torch.save(mobilevlm_tensors() | {"model.norm.weight": torch.zeros(32)}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"was not converted from .* as it is now; delete it"):
        convert_published(tmp_path / "m", tmp_path / "c")


@pytest.mark.parametrize("family", ["mobilevlm", "compodistill"])
def test_a_saved_copy_loads_through_the_same_door(tmp_path, family):
    if family == "mobilevlm":
        model, _ = load_mobilevlm(tmp_path / "a")
    else:
        model = load_published(write_compodistill(tmp_path / "a", compodistill_tensors()))
    model.save_pretrained(tmp_path / "b")
    again = load_published(tmp_path / "b")
    assert type(again) is type(model)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert again.image_grid == model.image_grid
    assert again.dropped_tokens == model.dropped_tokens


def test_generation_and_attention_capture_work_on_a_released_teacher(tmp_path):
    config = {"post_connector_use": False}
    model = load_published(write_compodistill(tmp_path, compodistill_tensors(bridged=False), **config))
    ids = torch.tensor([[1] + [40] * 35 + [7, 8]])
    pixels = torch.randn(1, 3, 24, 24)
    generated = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, max_new_tokens=4, do_sample=False,
        eos_token_id=39, pad_token_id=0,
    )  # fmt: skip
    words = ids
    while words.shape[1] < generated.shape[1]:
        step = model(input_ids=words, pixel_values=pixels).logits[:, -1].argmax(-1, keepdim=True)
        words = torch.cat([words, step], dim=1)
    assert generated.tolist() == words.tolist()
    capture = AttentionCapture(model.language_model)
    request = AttentionRequest(torch.tensor([[36, 37]]), torch.arange(1, 36)[None], ((0,), (1,)))
    with torch.no_grad(), capture.record({"answer": request}) as maps:
        model(input_ids=ids, pixel_values=pixels)
    model.language_model.set_attn_implementation("eager")
    with torch.no_grad():
        eager = model.model(input_ids=ids, pixel_values=pixels, output_attentions=True).attentions
    expected = torch.stack([layer[:, :, 36:38, 1:36].mean(1) for layer in eager], dim=1)
    torch.testing.assert_close(maps["answer"], expected, atol=1e-6, rtol=1e-5)


def test_only_these_models_are_recognised(tmp_path):
    assert is_published(write_mobilevlm(tmp_path / "a", {}))
    assert is_published(write_mobilevlm(tmp_path / "b", {}, model_type="mobilellama"))
    assert is_published(write_compodistill(tmp_path / "c", {"x": torch.ones(1)}))
    assert not is_published(write_mobilevlm(tmp_path / "d", {}, model_type="llava", architectures=["Other"]))
    with pytest.raises(ModelError, match="model_type is 'llava', expected one of mobilevlm"):
        load_published(tmp_path / "d")


def test_the_image_processor_of_a_tower_is_the_one_it_was_published_with(tmp_path):
    model, _ = load_mobilevlm(tmp_path / "m")
    clip = default_image_processor(model.config)
    assert dict(clip.crop_size) == {"height": 24, "width": 24}
    assert clip.image_mean == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    siglip = default_image_processor(load_published(write_compodistill(tmp_path / "c", compodistill_tensors())).config)
    assert list(siglip.image_mean) == [0.5, 0.5, 0.5]
    assert dict(siglip.size) == {"height": 24, "width": 24}


def test_tied_embeddings_need_no_output_projection_of_their_own(tmp_path):
    tensors = compodistill_tensors()
    del tensors["language_model.lm_head.weight"]
    text = COMPODISTILL_CONFIG["text_config"] | {"tie_word_embeddings": True}
    model = load_published(write_compodistill(tmp_path, tensors, text_config=text))
    assert torch.equal(model.lm_head.weight, tensors["language_model.model.embed_tokens.weight"])
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_the_published_7b_teacher_has_its_published_size():
    """mtgv/MobileVLM_V2-7B's config.json: a Llama-7B (6.74 B), CLIP ViT-L/14 at 336 (0.30 B), LDPv2 of width 4096."""
    stored = MOBILEVLM_CONFIG | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32000,
        "mm_hidden_size": 1024, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }  # fmt: skip
    config = mobilevlm_config(stored, KNOWN_TOWERS[stored["mm_vision_tower"]], where="V2-7B")
    with torch.device("meta"):
        model = MobileVLMForConditionalGeneration(config)
    counts = {name: value.numel() for name, value in model.named_parameters()}
    language = sum(n for name, n in counts.items() if "vision_tower" not in name and "mm_projector" not in name)
    assert language == 6_738_415_616
    assert sum(n for name, n in counts.items() if "mm_projector" in name) == 1024 * 4096 + 4096**2 + 12 * 4096
    assert (model.image_grid, config.text_config.rms_norm_eps) == ((12, 12), 1e-5)
