"""Attention of chosen rows: equal to the full map, float32, finite, and small in memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlm_distill_cache.common.attention import rows as attention_rows
from vlm_distill_cache.common.attention.rows import head_mean_attention, last_row_attention


def test_without_a_mask_attention_goes_both_ways_unless_causal():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    everything = torch.arange(6)[None]
    both_ways = head_mean_attention(query, key, rows=everything, keys=everything, causal=False)
    expected = (query @ key.transpose(2, 3) / 8**0.5).softmax(-1).mean(1)
    torch.testing.assert_close(both_ways, expected)


def test_rows_that_see_nothing_give_zero_and_finite_gradients():
    torch.manual_seed(0)
    query, key = (torch.randn(1, 2, 4, 8, requires_grad=True) for _ in range(2))
    everything = torch.arange(4)[None]
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 2, :] = False
    low = torch.finfo(torch.float32).min
    additive = torch.zeros(mask.shape).masked_fill(~mask, low)
    masks = [mask, additive, torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))]
    for variant in (*masks, (additive + 0.5).clamp_min(low)):
        got = head_mean_attention(query, key, rows=everything, keys=everything, attention_mask=variant)
        assert (got[0, 2] == 0).all()
        torch.testing.assert_close(got.sum(-1), torch.tensor([[1.0, 1.0, 0.0, 1.0]]))
        grads = torch.autograd.grad(got.square().sum(), (query, key))
        assert all(g.isfinite().all() for g in grads)


def test_masks_may_differ_by_head_and_carry_biases():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8)
    bias = torch.randn(1, 4, 5, 5).masked_fill(torch.rand(1, 4, 5, 5) < 0.3, float("-inf"))
    bias[..., 0] = 0.0
    rows, keys = torch.tensor([[4, 1], [0, -1]]), torch.tensor([[0, 3], [2, 2]])
    got = head_mean_attention(query, key, rows=rows, keys=keys, attention_mask=bias, scaling=0.7)
    full = (query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.7 + bias).softmax(-1).mean(1)
    expected = torch.stack([full[0][[4, 1]][:, [0, 3]], full[1][[0, 0]][:, [2, 2]]])
    expected[1, 1] = 0.0  # a padding row
    torch.testing.assert_close(got, expected)


def test_softmax_is_float32_even_in_bf16_and_under_autocast():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 64, 16).bfloat16() * 3, torch.randn(1, 2, 64, 16).bfloat16()
    everything = torch.arange(64)[None]
    exact = head_mean_attention(query.double(), key.double(), rows=everything, keys=everything)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head_mean_attention(query, key, rows=everything, keys=everything)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact, atol=1e-6, rtol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements any operation returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("grad", [False, True])
def test_no_intermediate_exceeds_the_chunk_limit_however_many_heads(monkeypatch, grad):
    B, H, T, D = 2, 16, 96, 4
    limit = B * H * T * 8  # eight rows at a time; all rows would be 12 times as many
    monkeypatch.setattr(attention_rows, "CHUNK_ELEMENTS", {"cpu": limit})
    query, key = (torch.randn(B, H, T, D, requires_grad=grad) for _ in range(2))
    everything = torch.arange(T).expand(B, -1)
    with LargestTensor() as largest:
        got = head_mean_attention(query, key, rows=everything, keys=everything, causal=True)
        if grad:
            got.square().sum().backward()
    assert largest.elements <= limit
    unchunked = head_mean_attention(query, key, rows=everything, keys=everything, causal=True, chunk_rows=T)
    torch.testing.assert_close(got, unchunked, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, None), (torch.bfloat16, 2.0)])
def test_keys_of_one_row_may_lie_in_several_tensors(dtype, softcap):
    torch.manual_seed(0)
    query = (3 * torch.randn(2, 4, 1, 8)).to(dtype)
    keys = torch.randn(2, 2, 7, 8).to(dtype)
    seen = torch.rand(2, 4, 1, 7) > 0.3
    bias = torch.randn(2, 1, 1, 7).masked_fill(torch.rand(2, 1, 1, 7) > 0.7, torch.finfo(torch.float32).min)
    rows, every = torch.zeros(2, 1, dtype=torch.int64), torch.arange(7).expand(2, -1)
    for mask in (seen, bias):
        parts = [(keys[:, :, part], mask[..., part]) for part in (slice(0, 3), slice(3, 3), slice(3, 7))]
        with torch.autocast("cpu", torch.bfloat16):
            found = last_row_attention(query, parts, scaling=0.7, softcap=softcap)
        expected = head_mean_attention(
            query, keys, rows=rows, keys=every, attention_mask=mask, scaling=0.7, softcap=softcap
        )
        assert [part.shape[1] for part in found] == [3, 0, 4]
        torch.testing.assert_close(torch.cat(found, dim=1), expected[:, 0])
