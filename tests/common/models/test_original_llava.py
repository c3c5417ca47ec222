"""The original LLaVA layout, built by hand at tiny size, gives what the library's class gives with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from original_llava_factory import (
    ALPHA,
    LLAVA_CONFIG,
    RANK,
    VOCABULARY,
    adapter_tensors,
    in_the_library,
    llava_tensors,
    write_base,
    write_llava,
    write_lora,
    write_shards,
    write_tower,
)
from published_factory import clip_shapes, random_tensors
from test_mobilevlm import make_student
from torch.nn import functional as F

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.hub import HubFolder
from vlm_distill_cache.common.models import towers
from vlm_distill_cache.common.models.llava import take_image_tokens
from vlm_distill_cache.common.models.original_llava import is_original_llava, open_original_llava, original_config

IDS = torch.tensor([[1, 5] + [VOCABULARY] * 36 + [9, 30, 2]])


def load(folder, **options):
    model = open_original_llava(folder, **options).load(dtype=torch.float32)
    take_image_tokens(model)
    return model


def pixels():
    return torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=pixels()).logits[..., :VOCABULARY]


def check_same(model, parts):
    torch.testing.assert_close(logits(model), logits(in_the_library(*parts)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("tower", ["inside", "beside"])
@pytest.mark.parametrize("projector", ["inside", "beside", "both"])
@pytest.mark.slow(quick=1)
def test_wherever_its_parts_lie_it_gives_the_librarys_logits(tmp_path, tower, projector):
    parts = llava_tensors()
    folder = write_llava(tmp_path / "m", parts, tower=tower, projector=projector)
    assert is_original_llava(folder)
    model = load(folder)
    check_same(model, parts)
    assert type(model).__module__.startswith("transformers.")
    assert model.lm_head.weight.shape[0] == VOCABULARY  # no row is added that the softmax would see


def original(folder):
    return load(write_llava(folder / "m", llava_tensors())).eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_embeddings_of_a_padded_batch_get_their_pictures_as_its_ids_do(tmp_path, side):
    model = load(write_llava(tmp_path / "m", llava_tensors())).eval()
    padding = torch.zeros_like(IDS[:, :2])
    short = torch.cat([padding, IDS[:, 2:]] if side == "left" else [IDS[:, :-2], padding], dim=1)
    ids = torch.cat([IDS, short])
    given = {"attention_mask": (ids != 0).long(), "pixel_values": torch.cat([pixels(), -pixels()])}
    embeds = model.get_input_embeddings()(ids)
    there = ids != 0
    expected = model(input_ids=ids, **given).logits
    torch.testing.assert_close(model(inputs_embeds=embeds, **given).logits[there], expected[there])
    if side == "left":
        asked = {"max_new_tokens": 3, "do_sample": False}
        said = model.generate(input_ids=ids, **given, **asked)[:, ids.shape[1] :]
        assert torch.equal(model.generate(inputs_embeds=embeds, **given, **asked), said)
    with pytest.raises(ModelError, match="give input_ids"):
        model(inputs_embeds=embeds, pixel_values=given["pixel_values"])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it by its name of old
@pytest.mark.parametrize("changed", ["adapters", "tokens", "set"])
@pytest.mark.parametrize("is_ours", [True, False])
def test_an_embedding_in_another_ones_place_needs_no_row_for_pictures_either(tmp_path, is_ours, changed):
    peft = pytest.importorskip("peft")
    model = make_student() if is_ours else original(tmp_path)
    image = model.config.image_token_id
    ids = torch.tensor([[1, 5] + [image] * (9 if is_ours else 36) + [9, 2]])
    given = {"input_ids": ids, "pixel_values": pixels()}
    expected = model(**given).logits.detach()
    if changed == "set":
        model.set_input_embeddings(torch.nn.Embedding.from_pretrained(model.get_input_embeddings().weight.data.clone()))
    else:
        to = {"target_modules": ["embed_tokens"]} if changed == "adapters" else {"trainable_token_indices": [5, 9]}
        model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["q_proj"]} | to)).eval()
    torch.testing.assert_close(model(**given).logits, expected)
    assert torch.isfinite(model(**given, labels=ids).loss)


def test_safetensors_do_as_well_as_pickles(tmp_path):
    from safetensors.torch import save_file

    parts = llava_tensors()
    folder = write_llava(tmp_path / "m", parts, model_type="llava_llama")
    for path in [*folder.glob("pytorch_model*")]:
        path.unlink()
    save_file(parts[0] | parts[1], folder / "model.safetensors")
    check_same(load(folder), parts)


@pytest.mark.parametrize("depth", [1, 3])
def test_projectors_of_one_layer_and_of_three_are_computed_as_written(tmp_path, depth):
    parts = llava_tensors(depth=depth)
    model = load(write_llava(tmp_path / "m", parts, depth=depth))
    features = torch.randn(1, 36, 16)
    expected, layers = features, sorted({name.rpartition(".")[0] for name in parts[1]})
    for index, layer in enumerate(layers):
        expected = F.gelu(expected) if index else expected
        expected = F.linear(expected, parts[1][f"{layer}.weight"], parts[1][f"{layer}.bias"])
    torch.testing.assert_close(model.model.multi_modal_projector(features), expected)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    take_image_tokens(again)
    assert torch.equal(logits(again), logits(model))


def test_a_projector_without_a_type_is_one_layer(tmp_path):
    """As the original code takes it; the first releases do not name theirs."""
    folder = write_llava(tmp_path / "m", depth=1)
    stored = json.loads((folder / "config.json").read_text())
    del stored["mm_projector_type"]
    (folder / "config.json").write_text(json.dumps(stored))
    assert len(load(folder).model.multi_modal_projector) == 1


@pytest.mark.parametrize("named", ["a folder beside it", "a path"])
def test_a_projector_alone_is_read_into_the_language_model_that_it_names(tmp_path, named):
    parts = llava_tensors()
    base = write_base(tmp_path / "vicuna", parts[0])
    shown = "../vicuna" if named == "a folder beside it" else str(base)
    folder = write_llava(tmp_path / "m", parts, projector="beside", _name_or_path=shown)
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    opened = open_original_llava(folder)
    assert opened.tokenizer_folder.resolve() == base.resolve()
    assert {"base/pytorch_model-00001-of-00002.bin", "mm_projector.bin"} <= opened.files.keys()
    check_same(load(folder), parts)


def test_a_projector_alone_whose_language_model_cannot_be_had_says_what_to_write_where(tmp_path):
    folder = write_llava(tmp_path / "m", projector="beside", _name_or_path="lmsys/vicuna-7b-v1.5")
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    with pytest.raises(
        ModelError, match=r"'lmsys/vicuna-7b-v1\.5', cannot be found.*write its folder as _name_or_path"
    ):
        open_original_llava(folder)


@pytest.mark.parametrize("base_is", ["language model", "llava"])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.slow(quick=1)
def test_adapters_are_merged_as_peft_merges_them(tmp_path, base_is, rslora):
    parts, adapters = llava_tensors(), adapter_tensors()
    # A LLaVA that was trained further has a projector, which the trained one replaces.
    base = (write_llava if base_is == "llava" else write_base)(
        tmp_path / "base", parts if base_is == "llava" else parts[0]
    )
    trained = (parts[0], {name: value + 1 for name, value in parts[1].items()}, parts[2])
    folder = write_lora(tmp_path / "lora", trained, base, adapters, settings={"use_rslora": rslora})
    merged = dict(parts[0])
    for name in parts[0]:
        a = adapters.get(f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight")
        if a is not None:
            b = adapters[f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight"]
            merged[name] = merged[name] + ALPHA / (RANK**0.5 if rslora else RANK) * (b @ a)
    assert sum(not torch.equal(merged[name], parts[0][name]) for name in merged) == 4
    check_same(load(folder), (merged, *trained[1:]))


@pytest.mark.filterwarnings("ignore")  # what peft says of the library
def test_merged_adapters_are_pefts_own(tmp_path):
    """Peft itself, on the language model's class."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    parts, adapters = llava_tensors(), adapter_tensors()
    base = write_base(tmp_path / "base", parts[0])
    folder = write_lora(tmp_path / "lora", parts, base, adapters)
    language = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder
    ).merge_and_unload()
    ours = load(folder).state_dict()
    for name, value in language.state_dict().items():
        renamed = name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)
        torch.testing.assert_close(ours[renamed], value)


def test_a_merged_weight_has_the_precision_of_the_base(tmp_path):
    parts, adapters = llava_tensors(dtype=torch.bfloat16), adapter_tensors()
    base = write_base(tmp_path / "base", parts[0])
    model = open_original_llava(write_lora(tmp_path / "lora", parts, base, adapters)).load()
    name = "model.layers.0.self_attn.q_proj"
    a, b = (adapters[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    exact = parts[0][f"{name}.weight"].float() + ALPHA / RANK * (b @ a)
    assert torch.equal(model.model.language_model.layers[0].self_attn.q_proj.weight, exact.bfloat16())


@pytest.mark.parametrize(
    ("change", "settings", "told"),
    [
        (lambda t: None, {"r": 8}, r"has shapes .*expected .*\(r=8 in adapter_config\.json"),
        (lambda t: t.pop(next(n for n in t if "lora_B" in n)), {}, r"has shapes .*'A'.*expected"),
        (
            lambda t: [t.pop(n) for n in list(t) if "layers.1.mlp" in n],
            {},
            r"1 adapters that target_modules .*are missing",
        ),
        (lambda t: t.update({"base_model.model.model.layers.0.x.weight": torch.ones(1)}), {}, "is no low-rank A or B"),
        (
            lambda t: t.update({f"base_model.model.model.odd.lora_{s}.weight": torch.ones(4, 4) for s in "AB"}),
            {},
            "fits no weight of",
        ),
        (lambda t: t.clear(), {}, "holds no tensors"),
        (lambda t: None, {"use_dora": True}, r"use_dora=True: not a plain low-rank adapter.*merge it"),
        (lambda t: None, {"peft_type": "IA3"}, "peft_type='IA3'"),
        (lambda t: None, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        (lambda t: None, {"r": 0}, "expected two numbers"),
        (
            lambda t: None,
            {"base_model_name_or_path": None},
            "is not named.*write its folder as base_model_name_or_path",
        ),
        (lambda t: None, {"base_model_name_or_path": "nobody/base"}, "'nobody/base', cannot be found"),
        (
            lambda t: None,
            {"base_model_name_or_path": "/home/someone/vicuna"},
            "'/home/someone/vicuna', cannot be found",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_before_a_weight_is_read(tmp_path, change, settings, told):
    parts, adapters = llava_tensors(), adapter_tensors()
    change(adapters)
    base = write_base(tmp_path / "base", parts[0])
    with pytest.raises(ModelError, match=told):
        open_original_llava(write_lora(tmp_path / "lora", parts, base, adapters, settings=settings))


@pytest.mark.parametrize(
    ("part", "change", "told"),
    [
        (1, lambda t: t.pop("model.mm_projector.0.bias"), r"1 missing: model\.multi_modal_projector\.linear_1\.bias"),
        (1, lambda t: t.update({"model.mm_projector.4.bias": torch.ones(3)}), r"1 unexpected: .*projector\.4\.bias"),
        (0, lambda t: t.update({"model.image_newline": torch.ones(32)}), r"1 unexpected: model\.image_newline"),
        (0, lambda t: t.pop("lm_head.weight"), r"1 missing: lm_head\.weight"),
        (
            0,
            lambda t: t.update({"lm_head.weight": torch.ones(41, 32)}),
            r"lm_head\.weight \[41, 32\] instead of \[40, 32\]",
        ),
        (2, lambda t: t.pop(next(n for n in t if "layers.1.mlp" in n)), r"1 missing: model\.vision_tower\.encoder"),
    ],
)
@pytest.mark.parametrize("tower", ["inside", "beside"])
def test_a_missing_or_left_over_tensor_is_named(tmp_path, part, change, told, tower):
    parts = llava_tensors()
    change(parts[part])
    with pytest.raises(ModelError, match=f"weights do not fit config.json .*{told}"):
        open_original_llava(write_llava(tmp_path / "m", parts, tower=tower))


def test_two_projectors_that_differ_are_refused(tmp_path):
    folder = write_llava(tmp_path / "m", projector="both")
    other = {name: value + 1 for name, value in llava_tensors()[1].items()}
    torch.save(other, folder / "mm_projector.bin")
    with pytest.raises(ModelError, match=r"mm_projector\.0\.bias differs between mm_projector\.bin and .*delete"):
        open_original_llava(folder)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"mm_projector_type": "resampler"},
            "mm_projector_type in config.json is 'resampler', expected linear or mlp2x",
        ),
        ({"mm_projector_type": "mlp0x_gelu"}, "mm_projector_type"),
        ({"mm_projector_type": 3}, "mm_projector_type in config.json is 3, .*for example llava-hf/llava-1.5-7b-hf"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end in config.json is True, expected False"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature"),
        ({"mm_vision_select_layer": -9}, "mm_vision_select_layer in config.json is -9, the tower has 3 layers"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size in config.json is 1024, the vision tower's width is 16"),
        ({"s2": True}, "s2 in config.json is True"),
        (
            {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
            r"LLaVA-1\.6.*llava-v1\.6-vicuna-7b-hf",
        ),
        ({"model_type": "llava_mistral", "architectures": ["LlavaMistralForCausalLM"]}, "llava-v1.6-mistral-7b-hf"),
        ({"model_type": "llava_qwen", "architectures": None}, "llava-onevision-qwen2-7b-ov-hf"),
        ({"model_type": "llava_mpt"}, "only LLaVA-1 and 1.5 with a Llama"),
    ],
)
def test_another_llava_is_refused_by_its_configuration_alone(tmp_path, changes, told):
    folder = write_llava(tmp_path / "m", **changes)
    refused_early = "select_layer" not in told and "hidden_size" not in told
    if refused_early:
        for path in folder.glob("*.bin*"):
            path.unlink()
    with pytest.raises(ModelError, match=told):
        open_original_llava(folder)


def test_a_tower_that_is_given_replaces_the_one_inside(tmp_path):
    parts = llava_tensors()
    other = random_tensors(clip_shapes("model.vision_tower.vision_tower.vision_model."), seed=9)
    write_tower(tmp_path / "clip", other)
    for tower in ("inside", "beside"):
        folder = write_llava(tmp_path / tower, parts, tower=tower)
        check_same(load(folder, vision_tower=tmp_path / "clip"), (*parts[:2], other))


def test_a_tower_by_name_is_looked_for_by_that_name(tmp_path, monkeypatch):
    parts, asked = llava_tensors(), []
    write_tower(tmp_path / "cache", parts[2])

    def find(given, *, what):
        asked.append(given)
        return HubFolder(tmp_path / "cache", given, "0" * 40)

    monkeypatch.setattr(towers, "model_folder", find)
    folder = write_llava(tmp_path / "m", parts, mm_vision_tower="openai/clip-vit-large-patch14-336")
    check_same(load(folder), parts)
    assert asked[0] == "openai/clip-vit-large-patch14-336"


def test_a_tower_that_cannot_be_had_says_what_to_type(tmp_path):
    folder = write_llava(tmp_path / "m", mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024)
    with pytest.raises(ModelError, match=r"hold no vision tower.*give openai/clip-vit.*--vision-tower openai/clip"):
        open_original_llava(folder)
    folder = write_llava(tmp_path / "n", mm_vision_tower="/home/someone/clip")
    with pytest.raises(ModelError, match=r"'/home/someone/clip', and there is no such folder; give"):
        open_original_llava(folder)


@pytest.mark.parametrize("named", [["a"], {"a": "b"}, 3, True, "a\0b", "a\nb", "a" * 5000, "a/" * 600])
def test_a_tower_whose_name_is_none_is_told_by_its_setting(tmp_path, named):
    for name, folder in (("mm_vision_tower", "m"), ("vision_tower", "n")):
        folder = write_llava(tmp_path / folder, **{"mm_vision_tower": None, name: named})
        with pytest.raises(ModelError, match=rf" {name} in config\.json is .*--vision-tower DIR") as told:
            open_original_llava(folder)
        assert len(str(told.value)) < 600
        with pytest.raises(ModelError, match=f" {name} in config.json is "):
            original_config(folder)


@pytest.mark.parametrize("named", ["a" * 300, "x/" + "b" * 300])
def test_a_tower_whose_name_is_longer_than_any_files_is_looked_for_in_vain(tmp_path, named):
    with pytest.raises(ModelError, match=r"weights hold no vision tower, config.json names"):
        open_original_llava(write_llava(tmp_path / "m", mm_vision_tower=named))


def test_files_that_hold_no_weights_are_told(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    folder = write_llava(tmp_path / "m", projector="beside")
    (folder / "mm_projector.bin").write_bytes(pointer)
    with pytest.raises(ModelError, match="git lfs pull"):
        open_original_llava(folder)
    folder = write_llava(tmp_path / "n")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model-00002-of-00002\.bin: missing, but .*names it; download it"):
        open_original_llava(folder)
    folder = write_llava(tmp_path / "o", projector="beside")
    torch.save({"model.mm_projector.0.weight": Path("code")}, folder / "mm_projector.bin")
    with pytest.raises(ModelError, match="could run code"):
        open_original_llava(folder)
    folder = write_llava(tmp_path / "p")
    for path in folder.glob("*.bin*"):
        path.unlink()
    with pytest.raises(ModelError, match="no weights; expected"):
        open_original_llava(folder)


def test_nothing_is_original_that_the_library_or_another_reader_reads(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "vision_config": {}, "mm_hidden_size": 3}))
    assert not is_original_llava(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    assert not is_original_llava(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAVA_CONFIG))
    assert is_original_llava(tmp_path)


def test_an_index_of_one_shard_is_read(tmp_path):
    parts = llava_tensors()
    folder = write_llava(tmp_path / "m", parts)
    for path in folder.glob("*.bin*"):
        path.unlink()
    write_shards(folder, parts[0] | parts[1], count=1)
    check_same(load(folder), parts)
