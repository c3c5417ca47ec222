"""Capture equals eager attention, and leaves the model's own output bit-identical to plain SDPA."""

import copy

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlm_distill_cache.common.attention.capture import IMPLEMENTATION, AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.rows import head_mean_attention
from vlm_distill_cache.common.models.vision_language import PAST

VOCABULARY, IMAGE, PATCHES, DEPTH = 64, 5, 16, 4
GROUPS = ((0, 1, 2), (1, 2, 3), (3,))


def tiny_text_config(kind=LlamaConfig, **changes):
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=changes.pop("num_key_value_heads", 2),
        initializer_range=0.5,  # the library's 0.02 gives flat attention, which would hide errors
        pad_token_id=0,
        **changes,
    )


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_text_config(), image_token_id=IMAGE)
    return LlavaForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def qwen():
    torch.manual_seed(1)
    return Qwen2ForCausalLM(tiny_text_config(Qwen2Config)).eval()


def with_implementation(model, name):
    other = copy.deepcopy(model)
    other.set_attn_implementation(name)
    return other


def with_capture(model, **options):
    other = copy.deepcopy(model)
    other.set_attn_implementation("sdpa")
    language_model = other.model.language_model if hasattr(other.model, "language_model") else other.model
    return other, AttentionCapture(language_model, **options)


def additive(mask):
    """The eager reference needs a float mask: True becomes 0, False the smallest float."""
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def llava_batch(padding, lengths=(30, 24, 19)):
    """Three prompts with an image each; ``padding`` is "left", "right", "none" or "packed"."""
    generator = torch.Generator().manual_seed(3)
    if padding == "none":
        lengths = (30,) * len(lengths)
    length = max(lengths)
    ids = torch.zeros(len(lengths), length, dtype=torch.int64)
    real = torch.zeros(len(lengths), length, dtype=torch.bool)
    for i, n in enumerate(lengths):
        start = length - n if padding == "left" else 0
        text = torch.randint(6, VOCABULARY, (n,), generator=generator)
        text[2 : 2 + PATCHES] = IMAGE
        ids[i, start : start + n] = text
        real[i, start : start + n] = True
    batch = {
        "input_ids": ids,
        "pixel_values": torch.randn(len(lengths), 3, 16, 16, generator=generator),
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(1) - 1).clamp_min(0),
    }
    if padding == "packed":
        # A shared prefix, then two conversations that cannot see each other; padding sees nothing at all.
        segment = torch.zeros(length, dtype=torch.int64)
        segment[20:] = 1
        segment[22:] = 2
        sees = (segment[:, None] == segment) | (segment == 0)[None, :]
        sees = sees & torch.ones(length, length, dtype=torch.bool).tril()
        batch["attention_mask"] = sees & real[:, None, :, None] & real[:, None, None, :]
    rows, keys = torch.full((len(lengths), 9), -1), torch.full((len(lengths), PATCHES + 2), -1)
    for i, n in enumerate(lengths):
        start = length - n if padding == "left" else 0
        count = 9 - i
        rows[i, :count] = torch.arange(start + n - count, start + n)
        keys[i, :PATCHES] = torch.arange(start + 2, start + 2 + PATCHES)
    return batch, rows, keys


def reference(attentions, rows, keys, groups):
    """Slow and obvious: full eager maps, one number at a time."""
    means = torch.stack([a.mean(1) for a in attentions])  # [L, B, T, T]
    out = torch.zeros(rows.shape[0], len(groups), rows.shape[1], keys.shape[1])
    for b, r, m in torch.cartesian_prod(*(torch.arange(n) for n in (*rows.shape, keys.shape[1]))).tolist():
        if rows[b, r] >= 0 and keys[b, m] >= 0:
            for g, group in enumerate(groups):
                out[b, g, r, m] = means[list(group), b, rows[b, r], keys[b, m]].mean()
    return out


def run_eager(model, batch):
    eager = with_implementation(model, "eager")
    if batch["attention_mask"].ndim == 4:
        batch = {**batch, "attention_mask": additive(batch["attention_mask"])}
    return eager, eager(**batch, output_attentions=True)


@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
@pytest.mark.slow(quick=3)
def test_llava_logits_are_bit_identical_and_attention_equals_eager(llava, padding, chunk_rows):
    batch, rows, keys = llava_batch(padding)
    captured, capture = with_capture(llava, chunk_rows=chunk_rows)
    visual = AttentionRequest(rows=keys, keys=keys, groups=((2,),))
    with torch.no_grad():
        plain = with_implementation(llava, "sdpa")(**batch).logits
        with capture.record({"answer": AttentionRequest(rows, keys, GROUPS), "visual": visual}) as maps:
            logits = captured(**batch).logits
        _, eager = run_eager(llava, batch)
    assert torch.equal(logits, plain)
    assert set(maps) == {"answer", "visual"}
    torch.testing.assert_close(maps["answer"], reference(eager.attentions, rows, keys, GROUPS), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps["visual"], reference(eager.attentions, keys, keys, ((2,),)), atol=1e-5, rtol=0)
    assert maps["answer"].dtype == torch.float32
    assert maps["answer"].std() > 0.01  # not flat: the comparison means something


def test_qwen2_attention_equals_eager(qwen):
    ids = torch.randint(6, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    rows, keys = torch.tensor([[20, 12, -1], [20, 9, 8]]), torch.arange(7, 15).expand(2, -1)
    model, capture = with_capture(qwen)
    with torch.no_grad():
        with capture.record({"answer": AttentionRequest(rows, keys, GROUPS)}) as maps:
            logits = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(logits, with_implementation(qwen, "sdpa")(input_ids=ids, attention_mask=mask).logits)
        eager = with_implementation(qwen, "eager")
        full = eager(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    torch.testing.assert_close(maps["answer"], reference(full, rows, keys, GROUPS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_sliding_windows_and_grouped_heads_equal_eager(kv_heads):
    config = tiny_text_config(
        Qwen2Config,
        num_key_value_heads=kv_heads,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
    )
    torch.manual_seed(kv_heads)
    base = Qwen2ForCausalLM(config).eval()
    ids = torch.randint(6, VOCABULARY, (1, 18))
    rows, keys = torch.arange(18)[None], torch.arange(18)[None]
    model, capture = with_capture(base)
    groups = tuple((layer,) for layer in range(DEPTH))
    with torch.no_grad():
        with capture.record({"all": AttentionRequest(rows, keys, groups)}) as maps:
            model(input_ids=ids)
        full = with_implementation(base, "eager")(input_ids=ids, output_attentions=True).attentions
    torch.testing.assert_close(maps["all"], reference(full, rows, keys, groups), atol=1e-5, rtol=0)
    assert (maps["all"][0, 3, 17, :10] == 0).all()  # a layer with a window, so the mask did arrive


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize("padding", ["left", "packed"])
def test_gradients_through_captured_attention_equal_those_through_eager(llava, padding, chunk_rows):
    torch.manual_seed(0)
    batch, rows, keys = llava_batch(padding)
    weight = torch.randn(rows.shape[0], len(GROUPS), rows.shape[1], keys.shape[1])
    captured, capture = with_capture(llava, chunk_rows=chunk_rows)
    with capture.record({"answer": AttentionRequest(rows, keys, GROUPS)}) as maps:
        captured(**batch)
    (maps["answer"] * weight).sum().backward()
    eager, output = run_eager(llava, batch)
    (reference(output.attentions, rows, keys, GROUPS) * weight).sum().backward()
    compared = 0
    for (name, got), expected in zip(captured.named_parameters(), eager.parameters(), strict=True):
        assert (got.grad is None) == (expected.grad is None), name
        if expected.grad is None or name.endswith("k_proj.bias"):  # its gradient is 0 but for rounding
            continue
        # Either side is within 3e-5 of a float64 run; the bound allows for both.
        assert (got.grad - expected.grad).norm() <= 2e-4 * expected.grad.norm(), name
        compared += 1
    assert compared > 30


def test_grad_flows_only_when_enabled(llava):
    batch, rows, keys = llava_batch("right")
    captured, capture = with_capture(llava)
    request = {"answer": AttentionRequest(rows, keys, GROUPS)}
    with torch.inference_mode(), capture.record(request) as maps:
        captured(**batch)
    assert not maps["answer"].requires_grad
    with capture.record(request) as maps:
        captured(**batch)
    assert maps["answer"].requires_grad


def test_vision_tower_keeps_sdpa_and_sees_both_ways(llava):
    batch, rows, keys = llava_batch("none")
    captured, capture = with_capture(llava)
    tower = captured.model.vision_tower
    assert tower.config._attn_implementation == "sdpa"
    assert captured.model.language_model.config._attn_implementation == IMPLEMENTATION
    pixels = batch["pixel_values"]
    with torch.no_grad(), capture.record({"answer": AttentionRequest(rows, keys, GROUPS)}):
        captured(**batch)
        seen = tower(pixels).last_hidden_state
        expected = with_implementation(llava, "sdpa").model.vision_tower(pixels).last_hidden_state
        changed = pixels.clone()
        changed[:, :, 12:, 12:] += 1.0  # the last patch only
        moved = tower(changed).last_hidden_state
    assert torch.equal(seen, expected)
    assert (moved[:, 1] - seen[:, 1]).abs().max() > 1e-3  # the first patch saw the last one change


def test_generation_outside_a_record_is_plain_sdpa(llava):
    batch, rows, keys = llava_batch("left")
    captured, capture = with_capture(llava)
    plain = with_implementation(llava, "sdpa")
    prompt = {k: v for k, v in batch.items() if k != "position_ids"}
    options = {
        "max_new_tokens": 5,
        "do_sample": False,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    with capture.record({"answer": AttentionRequest(rows, keys, GROUPS)}):
        captured(**batch)
    got, expected = captured.generate(**prompt, **options), plain.generate(**prompt, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.scores, expected.scores, strict=True))


def test_rows_behind_a_key_value_cache_are_query_positions_of_this_pass(qwen):
    ids = torch.randint(6, VOCABULARY, (1, 14), generator=torch.Generator().manual_seed(2))
    model, capture = with_capture(qwen)
    with torch.no_grad():
        past = model(input_ids=ids[:, :10], use_cache=True)[PAST]
        rows, keys = torch.tensor([[0, 3]]), torch.tensor([[0, 5, 9, 13]])
        with capture.record({"tail": AttentionRequest(rows, keys, GROUPS)}) as maps:
            model(input_ids=ids[:, 10:], **{PAST: past})
        full = with_implementation(qwen, "eager")(input_ids=ids, output_attentions=True).attentions
    torch.testing.assert_close(maps["tail"], reference(full, rows + 10, keys, GROUPS), atol=1e-5, rtol=0)


def test_only_requested_layers_are_computed(llava, monkeypatch):
    from vlm_distill_cache.common.attention import capture as visual_attention

    calls = []
    monkeypatch.setattr(
        visual_attention,
        "head_mean_attention",
        lambda *a, **k: calls.append(1) or head_mean_attention(*a, **k),
    )
    batch, rows, keys = llava_batch("right")
    captured, capture = with_capture(llava)
    with torch.no_grad(), capture.record({"answer": AttentionRequest(rows, keys, ((1, 2), (2,)))}):
        captured(**batch)
    assert len(calls) == 2  # layers 1 and 2, though layer 2 is in both groups
    captured(**batch)
    assert len(calls) == 2


def test_a_sum_of_rows_that_are_recorded_too_is_taken_from_them(llava, monkeypatch):
    calls = []
    monkeypatch.setattr(
        "vlm_distill_cache.common.attention.capture.head_mean_attention",
        lambda *a, **k: calls.append(1) or head_mean_attention(*a, **k),
    )
    batch, rows, keys = llava_batch("right")
    weights = torch.rand(rows.shape)
    summed = AttentionRequest(rows, keys, GROUPS, weights)
    captured, capture = with_capture(llava)
    found = []
    for requests in ({"sum": summed}, {"rows": AttentionRequest(rows, keys, GROUPS), "sum": summed}):
        calls.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16), capture.record(requests) as maps:
            captured(**batch)
        assert len(calls) == len({layer for group in GROUPS for layer in group})
        found.append(maps["sum"])
    assert found[0].shape[2] == 1
    torch.testing.assert_close(found[1], found[0])


def test_two_models_record_at_once_without_seeing_each_other(llava, qwen):
    batch, rows, keys = llava_batch("right")
    teacher, teacher_capture = with_capture(llava)
    student, student_capture = with_capture(qwen)
    ids = torch.randint(6, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    mine = {"answer": AttentionRequest(torch.tensor([[8]]), torch.arange(9)[None], ((0,),))}
    theirs = {"answer": AttentionRequest(rows, keys, GROUPS)}
    with teacher_capture.record(theirs) as alone:
        teacher(**batch)
    with teacher_capture.record(theirs) as first, student_capture.record(mine) as second:
        student(input_ids=ids)
        teacher(**batch)
    torch.testing.assert_close(first["answer"], alone["answer"])
    torch.testing.assert_close(second["answer"].sum(-1), torch.ones(1, 1, 1))


def test_text_only_batches_give_empty_maps(qwen):
    model, capture = with_capture(qwen)
    request = AttentionRequest(torch.tensor([[3]]), torch.empty(1, 0, dtype=torch.int64), GROUPS)
    with capture.record({"answer": request}) as maps:
        model(input_ids=torch.tensor([[7, 8, 9, 10]]))
    assert maps["answer"].shape == (1, 3, 1, 0)


def test_saved_models_do_not_name_the_capture(qwen, tmp_path):
    model, _ = with_capture(qwen)
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    assert Qwen2ForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_request_is_copied_to_a_device_once_and_serves_passes_with_gradients_after_those_without():
    request = AttentionRequest(torch.tensor([[3, -1]]), torch.arange(2)[None], GROUPS, torch.ones(1, 2))
    with torch.inference_mode():
        rows, keys, weights = request.on(torch.device("meta"))
    assert not rows.is_inference()
    assert not keys.is_inference()
    assert weights is not None
    assert not weights.is_inference()
    assert request.on(torch.device("meta"))[0] is rows
    assert request.on(torch.device("cpu"))[1] is request.keys
