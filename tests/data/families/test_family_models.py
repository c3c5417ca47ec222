"""Loading a checkpoint of any family: what is refused, and logits of chosen rows by the model's own forward pass."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel, LlavaForConditionalGeneration

import vlm_distill_cache.data.families.models as models
from vlm_distill_cache.common.errors import ConfigError, ModelError
from vlm_distill_cache.data.families.models import (
    input_device,
    open_family_model,
    refuse_offloaded,
    row_logits,
    rows_only,
)
from vlm_distill_cache.data.families.table import FAMILIES, family_of


@pytest.fixture(scope="module")
def opened(tiny_llava: Path):
    return open_family_model(tiny_llava)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {"input_ids": torch.randint(5, 40, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.bool)}


def test_logits_of_chosen_rows_are_those_of_the_whole_pass_in_order(opened, inputs):
    rows = torch.zeros(2, 7, dtype=torch.bool)
    rows[0, 5] = rows[1, 0] = rows[1, 3] = True
    with torch.no_grad():
        found = row_logits(opened.model, inputs, rows)
        whole = opened.model(**inputs).logits
        again = opened.model(**inputs).logits
    assert found.shape == (3, whole.shape[-1])
    torch.testing.assert_close(found, whole[rows], atol=1e-6, rtol=1e-5)
    assert torch.equal(whole, again)  # nothing stays behind on the model


def test_a_model_in_half_precision_is_projected_in_float32_whatever_the_block(opened, inputs, monkeypatch):
    rows = torch.zeros(2, 7, dtype=torch.bool)
    rows[0, 5] = rows[1, 0] = rows[1, 3] = True
    seen: list[torch.Tensor] = []
    for dtype in (torch.bfloat16, torch.float16):
        model = copy.deepcopy(opened.model).to(dtype)
        with torch.no_grad(), model.lm_head.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0])):
            rounded = model(**inputs).logits
        exact = seen.pop()[rows].double() @ model.lm_head.weight.detach().double().t()
        for elements in (1, 1000, 2**24):
            monkeypatch.setattr(models, "_CAST_ELEMENTS", elements)
            with torch.no_grad():
                found = row_logits(model, inputs, rows)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
        # What this is for: the gradient of a student, softmax minus the teacher's probabilities.
        noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        student, teacher = (exact + noise).softmax(dim=1), exact.softmax(dim=1)
        of_rounded, of_found = (
            float((some.double().softmax(dim=1) - teacher).norm() / (student - teacher).norm())
            for some in (rounded[rows], found)
        )
        assert of_found < of_rounded / 100
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, rounded)  # nothing stays behind on the model


def test_bias_and_what_follows_a_projection_in_half_precision_are_in_float32():
    head = torch.nn.Linear(8, 5, bias=True, dtype=torch.bfloat16)
    hidden = torch.randn(1, 3, 8, dtype=torch.bfloat16)
    with models._float32_projection(head):
        found = head(hidden) * 0.5
    expected = 0.5 * (hidden.double() @ head.weight.double().t() + head.bias.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-6)


def test_a_gradient_passes_through_chosen_rows(opened, inputs):
    rows = torch.zeros(2, 7, dtype=torch.bool)
    rows[1, 4] = True
    weight = opened.model.lm_head.weight
    (gradient,) = torch.autograd.grad(row_logits(opened.model, inputs, rows).square().sum(), weight)
    whole = opened.model(**inputs, use_cache=False).logits[rows].square().sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(whole, weight)[0], atol=1e-5, rtol=1e-4)


def test_a_model_that_projects_other_rows_is_refused(opened, inputs):
    with pytest.raises(ModelError, match=r"given \[2, 7\] rows, expected \[2, 6\]"):
        row_logits(opened.model, inputs, torch.ones(2, 6, dtype=torch.bool))
    text = LlamaModel(
        LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    )
    with pytest.raises(ModelError, match="no output projection"):
        rows_only(text, torch.ones(1, 1, dtype=torch.bool))


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"no config\.json there"):
        open_family_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(ModelError, match=r"cannot be loaded.*needs config\.json, weights, tokenizer"):
        open_family_model(tmp_path)


def test_a_text_model_is_no_teacher(tmp_path: Path, tiny_llava: Path):
    shutil.copytree(tiny_llava, tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        open_family_model(tmp_path / "text")


def test_quantisation_says_what_is_missing(tiny_llava: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'vlm-distill-cache\[quantised\]'"):
        open_family_model(tiny_llava, quantisation="8bit")


def test_only_the_language_model_is_quantised(tiny_llava: Path, monkeypatch):
    given = {}

    def record(model_class, directory, **options):
        if "quantization_config" not in options:
            return loads(directory, **options)
        given.update(options)
        raise ValueError("enough seen")

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    loads = LlavaForConditionalGeneration.from_pretrained
    monkeypatch.setattr(LlavaForConditionalGeneration, "from_pretrained", classmethod(record))
    with pytest.raises(ModelError, match="enough seen"):
        open_family_model(tiny_llava, quantisation="4bit", dtype="bfloat16")
    quantisation = given["quantization_config"]
    assert quantisation.load_in_4bit
    assert quantisation.bnb_4bit_compute_dtype == torch.bfloat16
    kept = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    assert quantisation.llm_int8_skip_modules == kept
    assert given["device_map"] == "cuda:0"


def test_a_placement_that_leaves_the_tower_without_weights_is_refused(tiny_llava: Path):
    model, family, *_ = open_family_model(tiny_llava, device_map="cpu")
    model.model.vision_tower.to("meta")
    with pytest.raises(ConfigError, match=r"device_map='auto' leaves no room.*vision tower; use quantisation"):
        refuse_offloaded(model, family, "auto")


def test_inputs_go_where_the_embedding_is(opened):
    assert input_device(opened.model) == opened.model.get_input_embeddings().weight.device


def test_every_listed_family_has_all_parts_and_an_unlisted_one_logits_only():
    for name, family in FAMILIES.items():
        assert family.is_listed, name
        assert family.vision_tower, name
        assert family.projector, name
    assert not family_of("somebody_elses").is_listed
    assert family_of("llava") is FAMILIES["llava"]
