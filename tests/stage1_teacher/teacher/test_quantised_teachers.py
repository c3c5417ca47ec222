"""Teachers in 8 and 4 bits: the library's own model, but a tower and a projector that students can be compared with."""

from pathlib import Path

import pytest
import torch
import transformers
from family_caches import build
from tiny_families import LAYERS, TEXT, save_tiny

from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError
from vlm_distill_cache.common.tools.verify import verify
from vlm_distill_cache.data.text.processors import weights_fingerprint
from vlm_distill_cache.stage1_teacher.teacher.teacher import Teacher

LIBRARY_FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "internvl")


def layer_names(model, kinds: tuple[type, ...]) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
@pytest.mark.parametrize("name", LIBRARY_FAMILIES)
@pytest.mark.slow(quick=1)
def test_only_the_language_model_is_quantised_and_a_cache_is_built(
    tmp_path: Path, family_data: Path, name: str, bits: str, caplog
):
    nn = pytest.importorskip("bitsandbytes").nn
    folder = save_tiny(name, tmp_path / "teacher", wide=True)
    plain, quantised = Teacher(folder), Teacher(folder, quantisation=bits)
    layers = layer_names(quantised.model, (nn.Linear8bitLt, nn.Linear4bit))
    inside = layer_names(plain.language_model, (torch.nn.Linear,))
    assert {layer.removeprefix(f"{plain.family.language_model}.") for layer in layers} == inside
    assert quantised.fingerprints()["vision_tower"] == plain.fingerprints()["vision_tower"]
    assert quantised.fingerprints()["teacher"] == weights_fingerprint(folder, "float32", quantisation=bits)

    cache = build(folder, family_data, tmp_path / "cache", quantisation=bits, logits="exact")
    assert "MatMul8bitLt" not in caplog.text  # a line for every layer and batch
    assert cache.plan.teacher["quantisation"] == bits
    assert not cache.failed
    assert verify(cache.path, deep=True) == []
    with pytest.raises(CacheMismatchError, match="teacher"):
        build(folder, family_data, tmp_path / "cache", logits="exact")


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_its_logits_are_those_of_the_librarys_quantised_model_and_near_the_plain_ones(tmp_path: Path, bits: str):
    pytest.importorskip("bitsandbytes")
    folder = save_tiny("llava", tmp_path / "teacher", wide=True)
    settings = transformers.BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        llm_int8_skip_modules=["model.vision_tower", "model.multi_modal_projector", "lm_head"],
    )
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    ids = torch.arange(5, 35)[None]
    with torch.inference_mode():
        ours, plain = (Teacher(folder, quantisation=kind).model(ids).logits for kind in (bits, "none"))
        assert torch.equal(ours, theirs(ids).logits)
    error = float((ours - plain).std() / plain.std())
    assert 0 < error < (0.05 if bits == "8bit" else 0.4)


@pytest.mark.parametrize("simulated", [False, True])
def test_widths_that_a_processors_own_kernel_does_not_take_are_computed_without_it(
    tmp_path: Path, simulated: bool, monkeypatch, caplog
):
    """An MLP of 80 rows, and back from 80 columns; simulated, the processor has AVX-512 BF16 whichever runs the test."""
    nn, functional = (getattr(pytest.importorskip("bitsandbytes"), part) for part in ("nn", "functional"))
    monkeypatch.setitem(TEXT, "intermediate_size", 80)
    folder = save_tiny("llava", tmp_path / "teacher", wide=True)
    if simulated:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    quantised = Teacher(folder, quantisation="4bit")
    assert f"{LAYERS} layers stay in float32, because their columns are no multiple of 64" in caplog.text
    layers = {name: m for name, m in quantised.model.named_modules() if isinstance(m, nn.Linear4bit)}
    assert len(layers) == 6 * LAYERS
    odd = {name for name, m in layers.items() if name.endswith(("gate_proj", "up_proj"))}
    packed = {name for name, m in layers.items() if m.support_avx512bf16_for_cpu}
    assert packed == {*layers} - odd if simulated else packed in ({*layers} - odd, set())
    if simulated:  # its kernel may not be there
        return
    reference = Teacher(folder)
    codes = functional.get_4bit_type("nf4", device="cpu")
    with torch.inference_mode():
        for name in layers:
            weight = reference.model.get_submodule(name).weight
            blocks = weight.reshape(-1, 64)
            largest = blocks.abs().amax(dim=1, keepdim=True)
            nearest = (blocks[..., None] / largest[..., None] - codes).abs().argmin(dim=-1)
            weight.copy_((codes[nearest] * largest).reshape(weight.shape))
        ids = torch.arange(5, 35)[None]
        ours, exact = quantised.model(ids).logits, reference.model(ids).logits
    assert float((ours - exact).std() / exact.std()) < 0.05  # bfloat16 where the weights are packed


@pytest.mark.parametrize("name", ["llava", "mobilevlm_v2"])
def test_without_bitsandbytes_the_extra_is_named(tmp_path: Path, family_data: Path, name: str, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    teacher = save_tiny(name, tmp_path / "teacher")
    expected = "authors' own layout" if name == "mobilevlm_v2" else r"vlm-distill-cache\[quantised\]"
    with pytest.raises(ConfigError, match=expected):
        build(teacher, family_data, tmp_path / "cache", quantisation="4bit")
