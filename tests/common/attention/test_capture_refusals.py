"""What the capture refuses, and that a refusal leaves the model clean."""

import copy
import threading

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.errors import ModelError

GROUPS = ((0, 1, 2), (1, 2, 3), (3,))
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_key_value_heads=2, **SMALL)).eval()


def with_capture(model):
    other = copy.deepcopy(model)
    return other, AttentionCapture(other.model)


def test_an_exception_inside_the_block_leaves_the_model_clean(qwen):
    model, capture = with_capture(qwen)
    request = {"answer": AttentionRequest(torch.tensor([[3]]), torch.tensor([[0, 1]]), GROUPS)}
    ids = torch.tensor([[7, 8, 9, 10]])
    with pytest.raises(KeyError, match="mine"), capture.record(request):
        raise KeyError("mine")
    with capture.record(request) as maps:
        model(input_ids=ids)
    assert maps["answer"].shape == (1, 3, 1, 2)
    model(input_ids=ids)


def test_nested_and_concurrent_records_are_refused(qwen):
    model, capture = with_capture(qwen)
    other = AttentionCapture(model.model)
    request = {"answer": AttentionRequest(torch.tensor([[3]]), torch.tensor([[0, 1]]), GROUPS)}
    errors = []

    def from_another_thread():
        try:
            with other.record(request):
                pass
        except ModelError as error:
            errors.append(str(error))

    with capture.record(request):
        thread = threading.Thread(target=from_another_thread)
        thread.start()
        thread.join()
        with pytest.raises(ModelError, match="already active"), capture.record(request):
            pass
        model(input_ids=torch.tensor([[7, 8, 9, 10]]))
    assert len(errors) == 1
    assert "already active" in errors[0]


@pytest.mark.parametrize(
    ("passes", "batch", "row", "groups", "message"),
    [
        (1, 1, 3, ((3, 4),), r"layers \[4\].* 4 layers \(0 to 3\)"),
        (0, 1, 3, GROUPS, "run the model once"),
        (2, 1, 3, GROUPS, "run twice"),
        (1, 1, 4, GROUPS, "position 4, but the sequence has 4"),
        (1, 2, 3, GROUPS, "1 samples, but the model runs 2"),
    ],
)
def test_misuse_is_refused_and_leaves_the_model_clean(qwen, passes, batch, row, groups, message):
    model, capture = with_capture(qwen)
    ids = torch.tensor([[7, 8, 9, 10]]).repeat(batch, 1)
    keys = torch.tensor([[0, 1]])

    def misuse():
        with capture.record({"answer": AttentionRequest(torch.tensor([[row]]), keys, groups)}):
            for _ in range(passes):
                model(input_ids=ids)

    with pytest.raises(ModelError, match=message):
        misuse()
    with capture.record({"answer": AttentionRequest(torch.tensor([[3]]), keys, GROUPS)}) as maps:
        with pytest.raises(ModelError, match="no attention recorded"):
            maps["answer"]
        model(input_ids=ids[:1])
    assert maps["answer"].shape == (1, 3, 1, 2)


def test_chunks_of_no_rows_are_refused(qwen):
    with pytest.raises(ModelError, match="chunk_rows"):
        AttentionCapture(copy.deepcopy(qwen).model, chunk_rows=0)


def test_impossible_requests_are_refused():
    rows, keys = torch.tensor([[3]]), torch.tensor([[0, 1]])
    with pytest.raises(ModelError, match="int64"):
        AttentionRequest(rows.float(), keys, GROUPS)
    with pytest.raises(ModelError, match="-1 is padding"):
        AttentionRequest(rows - 5, keys, GROUPS)
    with pytest.raises(ModelError, match=r"`row_weights` \[1, 9\] must have the shape of `rows`"):
        AttentionRequest(rows, keys, GROUPS, torch.ones(1, 9))
    with pytest.raises(ModelError, match="1 samples but `keys` for 2"):
        AttentionRequest(rows, keys.repeat(2, 1), GROUPS)
    for groups in ((), ((),), ((1, 1),)):
        with pytest.raises(ModelError, match="distinct layer indices"):
            AttentionRequest(rows, keys, groups)


def test_models_that_cannot_be_captured_are_refused():
    text = LlamaConfig(vocab_size=64, num_key_value_heads=2, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=4, **SMALL)
    llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    with pytest.raises(ModelError, match="vision tower"):
        AttentionCapture(llava)

    class Odd(LlamaForCausalLM):
        def set_attn_implementation(self, attn_implementation):
            """A family outside the interface: the library warns and changes nothing."""

    with pytest.raises(ModelError, match="attention interface"):
        AttentionCapture(Odd(text))
    without_sdpa = LlamaForCausalLM(copy.deepcopy(text))
    without_sdpa._supports_sdpa = False
    with pytest.raises(ModelError, match="does not support SDPA"):
        AttentionCapture(without_sdpa)
    without_indices = LlamaForCausalLM(copy.deepcopy(text))
    del without_indices.model.layers[2].self_attn.layer_idx
    with pytest.raises(ModelError, match=r"carries the index \[2\]"):
        AttentionCapture(without_indices)


def test_unknown_terms_in_the_scores_are_refused(qwen):
    model, capture = with_capture(qwen)
    request = {"answer": AttentionRequest(torch.tensor([[3]]), torch.tensor([[0, 1]]), GROUPS)}
    with pytest.raises(ModelError, match="s_aux"), capture.record(request):
        model(input_ids=torch.tensor([[7, 8, 9, 10]]), s_aux=torch.zeros(4))


def test_gradient_checkpointing_is_refused_in_training_and_harmless_in_evaluation(qwen):
    model, capture = with_capture(qwen)
    # Renamed after transformers 5.17, where the new name is missing; later the old one warns.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    request = {"answer": AttentionRequest(torch.tensor([[3]]), torch.tensor([[0, 1]]), GROUPS)}
    model.train()
    with pytest.raises(ModelError, match="gradient checkpointing"), capture.record(request):
        pass
    model.eval()
    with capture.record(request) as maps:
        model(input_ids=torch.tensor([[7, 8, 9, 10]]))
    assert maps["answer"].shape == (1, 3, 1, 2)
