"""Recorded attention takes memory for its result: not for heads, nor for layers, nor, if large, between both passes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.rows import CHUNK_ELEMENTS, KEPT_ELEMENTS, SharedPlace, head_mean_attention
from vlm_distill_cache.stage2_student.training.live_bytes import LiveBytes

BATCH, WIDTH, LENGTH = 2, 256, 900
CHUNK_BYTES = 4 * CHUNK_ELEMENTS["cpu"]


def attention_bytes(heads, *, softcap, mask_heads, dtype):
    """Extra bytes at the peak of the forward pass, between both passes, and at the peak of the backward pass."""
    query, key = (
        torch.empty(
            BATCH, heads, LENGTH, WIDTH // heads, device="meta", dtype=dtype, requires_grad=True
        )
        for _ in range(2)
    )  # fmt: skip
    rows, keys = (torch.empty(BATCH, n, dtype=torch.int64, device="meta") for n in (200, 576))
    mask = torch.empty(1, mask_heads or heads, LENGTH, LENGTH, dtype=torch.bool, device="meta")
    with LiveBytes(query, key, rows, keys, mask) as live:
        result = head_mean_attention(query, key, rows=rows, keys=keys, attention_mask=mask, softcap=softcap)
        size = result.untyped_storage().nbytes()
        forward, between = live.peak - size, live.now - size
        live.peak = live.now
        loss = result.sum()
        grads = torch.autograd.grad(loss, (query, key))
        backward = live.peak - size - sum(grad.untyped_storage().nbytes() for grad in grads)
    return forward, between, backward


@pytest.mark.parametrize(
    ("mask_heads", "softcap", "dtype"),
    [
        (1, None, torch.float32),
        (1, None, torch.bfloat16),
        (1, 30.0, torch.bfloat16),
        (None, 30.0, torch.float32),
    ],
)
@pytest.mark.slow(quick=1)
def test_extra_memory_does_not_grow_with_heads(mask_heads, softcap, dtype):
    found = {
        heads: attention_bytes(heads, softcap=softcap, mask_heads=mask_heads, dtype=dtype) for heads in (4, 16, 64)
    }
    for forward, between, backward in found.values():
        assert between == 0
        assert CHUNK_BYTES / 2 < forward < 5 * CHUNK_BYTES
        assert CHUNK_BYTES / 2 < backward < 7 * CHUNK_BYTES
    few, _, many = found.values()
    assert all(b <= a + CHUNK_BYTES for a, b in zip(few, many, strict=True))


def model_bytes(depth, *, groups):
    """Bytes that a forward pass leaves, with recorded attention and without, and the size of what is recorded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=depth, num_attention_heads=8, vocab_size=50
    )  # fmt: skip
    model = LlamaModel._from_config(config, attn_implementation="sdpa")
    ids = torch.randint(0, 50, (2, 120))
    padding = torch.ones_like(ids)
    padding[1, :20] = 0
    requests = {"a": AttentionRequest(torch.arange(60, 90).repeat(2, 1), torch.arange(10, 50).repeat(2, 1), groups)}
    capture = AttentionCapture(model)
    with LiveBytes(*model.parameters(), ids, padding) as live:
        plain = model(ids, attention_mask=padding, use_cache=False)
    plain_bytes = live.now
    del plain
    with LiveBytes(*model.parameters(), ids, padding) as live, capture.record(requests) as maps:
        output = model(ids, attention_mask=padding, use_cache=False)
    assert output.last_hidden_state.requires_grad
    return plain_bytes, live.now, maps["a"].untyped_storage().nbytes()


@pytest.mark.parametrize("kept", [0, KEPT_ELEMENTS])
def test_between_both_passes_layers_keep_their_share_of_the_result_and_little_attention(kept, monkeypatch):
    monkeypatch.setattr("vlm_distill_cache.common.attention.rows.KEPT_ELEMENTS", kept)
    few = 4 * 2 * 8 * 30 * 120 if kept else 0  # attention of all heads
    mask = 2 * 120 * 120  # all layers share it, and what it adds to scores, and the weights of rows and keys
    shared = mask + 4 * 2 * 30 * (120 + 40)
    for depth in (1, 2, 6):
        for groups in ((tuple(range(depth)),), tuple((layer,) for layer in range(depth))):
            plain, recorded, result = model_bytes(depth, groups=groups)
            found = recorded - plain - result
            assert depth * few <= found <= depth * few + shared + 2500  # and positions of rows and keys


@pytest.mark.parametrize("rows", [30, 31])
def test_attention_is_kept_up_to_a_limit(rows: int, monkeypatch):
    monkeypatch.setattr("vlm_distill_cache.common.attention.rows.KEPT_ELEMENTS", 2 * 8 * 30 * 120)
    query, key = (torch.randn(2, 8, 120, 8, requires_grad=True) for _ in range(2))
    chosen = torch.arange(rows).repeat(2, 1)
    with LiveBytes(query, key) as live:
        result = head_mean_attention(query, key, rows=chosen, keys=chosen)
    kept = 4 * 2 * rows * (8 * 120 + rows) if rows == 30 else 0  # attention, and the weights of rows and keys
    assert kept <= live.now - result.untyped_storage().nbytes() <= kept + 2000


def test_a_sum_of_rows_takes_no_memory_for_the_rows():
    length = 4000
    query, key = (torch.empty(2, 4, length, 16, device="meta", requires_grad=True) for _ in range(2))
    tokens = torch.empty(2, length, dtype=torch.int64, device="meta")
    weights = torch.empty(2, length, device="meta")
    with LiveBytes(query, key, tokens, weights) as live:
        result = head_mean_attention(query, key, rows=tokens, keys=tokens, row_weights=weights, causal=True)
        size = result.untyped_storage().nbytes()
        assert size == 4 * 2 * length
        assert live.now == size
        gradients = torch.autograd.grad(result.sum(), (query, key))
    known = size + sum(gradient.untyped_storage().nbytes() for gradient in gradients)
    assert live.peak < known + 9 * CHUNK_BYTES < 4 * 2 * length * length / 4  # of all rows: 128 MB


@pytest.mark.parametrize("kept", [0, 10**9])
def test_layers_with_masks_in_turn_share_two_places_which_the_backward_pass_frees(kept, monkeypatch):
    monkeypatch.setattr("vlm_distill_cache.common.attention.rows.KEPT_ELEMENTS", kept)
    query, key = (torch.randn(2, 4, 200, 4, requires_grad=True) for _ in range(2))
    tokens = torch.arange(150).repeat(2, 1)
    whole = torch.ones(1, 1, 200, 200, dtype=torch.bool).tril()
    masks = (whole, whole.triu(-20))
    between = []
    for layers in (2, 8):
        shared = SharedPlace()
        with LiveBytes(query, key, tokens, *masks) as live:
            results = [
                head_mean_attention(
                    query, key, rows=tokens, keys=tokens, attention_mask=masks[layer % 2], shared=shared
                )
                for layer in range(layers)
            ]
            of_results = sum(result.untyped_storage().nbytes() for result in results)
            of_attention = layers * 4 * 2 * 4 * 150 * 200 if kept else 0
            between.append(live.now - of_results - of_attention)
            del shared
            loss = torch.stack([result.square().sum() for result in results]).sum()
            gradients = torch.autograd.grad(loss, (query, key))
        known = of_results + sum(gradient.untyped_storage().nbytes() for gradient in gradients)
        assert live.now <= known + 2000  # the loss is alive
    one_place = 4 * 2 * 150 * (200 + 150)
    assert between[0] <= 2 * one_place + 20_000
    assert between[1] <= between[0] + 2000
