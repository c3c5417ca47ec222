"""Attention of chosen rows and its gradients equal those through the dense map, however the work is cut."""

import pytest
import torch

from vlm_distill_cache.common.attention import rows as attention_rows
from vlm_distill_cache.common.attention.rows import SharedPlace, head_mean_attention
from vlm_distill_cache.common.errors import ModelError

B, H, T, D = 3, 8, 21, 4
ROWS = torch.tensor([[20, 3, 0, -1, 11], [7, 7, 19, 1, -1], [-1, -1, -1, -1, -1]])
KEYS = torch.tensor([[0, 5, -1, 19], [6, 6, 2, 18], [1, 2, 3, 4]])


def dense(query, key, *, mask=None, causal=False, scaling=None, softcap=None):
    """Slow and obvious: full maps in float32, then one number at a time."""
    query, key = query.float(), key.float().repeat_interleave(H // key.shape[1], 1)
    scores = query @ key.transpose(2, 3) * (D**-0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    if mask is not None:
        sees = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        scores = scores if mask.dtype == torch.bool else scores + mask.float().masked_fill(~sees, 0)
        scores = scores.masked_fill(~sees, torch.finfo(torch.float32).min)
    attention = scores.softmax(-1).mean(1)
    if mask is not None:
        attention = attention * sees.expand(B, -1, T, T).any(-1).any(1)[:, :, None]
    zero = attention.new_zeros(())
    cells = [
        attention[b, r, k] if r >= 0 and k >= 0 else zero
        for b in range(B)
        for r in ROWS[b].tolist()
        for k in KEYS[b].tolist()
    ]
    return torch.stack(cells).view(B, ROWS.shape[1], KEYS.shape[1])


def masks(kind):
    """A mask [B or 1, 1 or H, T, T]; row 7 sees nothing but in masks by head, where some heads see it."""
    generator = torch.Generator().manual_seed(5)
    shape = {"shared": (1, 1), "samples": (B, 1), "heads": (1, H), "both": (B, H)}[kind.split()[0]]
    sees = (torch.rand(*shape, T, T, generator=generator) < 0.6) | torch.eye(T, dtype=torch.bool)
    sees[:, :, 7] = False
    if kind.endswith("bool"):
        return sees
    dtype = {"float": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind.split()[1]]
    bias = torch.randn(sees.shape, generator=generator).to(dtype)
    return bias.masked_fill(~sees, torch.finfo(dtype).min)


def inputs(dtype, key_heads):
    """As a model gives them: heads behind positions in memory."""
    torch.manual_seed(0)
    query = (2 * torch.randn(B, T, H, D)).to(dtype).transpose(1, 2).requires_grad_()
    key = (2 * torch.randn(B, T, key_heads, D)).to(dtype).transpose(1, 2).requires_grad_()
    return query, key


def assert_equals_dense(dtype, key_heads, mask=None, **options):
    query, key = inputs(dtype, key_heads)
    weight = torch.randn(B, ROWS.shape[1], KEYS.shape[1])
    expected = dense(query, key, mask=mask, **options)
    if options.get("causal"):
        options["last_row"] = int(ROWS.max())
    got = head_mean_attention(query, key, rows=ROWS, keys=KEYS, attention_mask=mask, **options)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    wanted = torch.autograd.grad((expected * weight).sum(), (query, key))
    found = torch.autograd.grad((got * weight).sum(), (query, key))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-4}
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, **tolerance)


@pytest.fixture(params=["kept", "whole samples", "some heads", "one row of one head"])
def cut(request, monkeypatch):
    limit = {"some heads": 5 * T * 4, "one row of one head": 1}.get(request.param, 10**9)
    monkeypatch.setitem(attention_rows.CHUNK_ELEMENTS, "cpu", limit)
    monkeypatch.setattr(attention_rows, "KEPT_ELEMENTS", 10**9 if request.param == "kept" else 0)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("key_heads", [1, 2, 8])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 1.5, "causal": True}, {"scaling": 0.3}])
def test_values_and_gradients_without_a_mask(options, key_heads, dtype):
    assert_equals_dense(dtype, key_heads, **options)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(
    "kind", ["shared bool", "samples bool", "heads bool", "both float", "samples bf16", "shared fp16"]
)
def test_values_and_gradients_with_a_mask(kind, softcap, dtype):
    assert_equals_dense(dtype, 2, masks(kind), softcap=softcap)


@pytest.mark.parametrize("last", [20, 11])
def test_causal_rows_need_no_key_behind_the_last_row(last):
    query, key = inputs(torch.float32, 2)
    rows = ROWS.clamp_max(last)
    whole = head_mean_attention(query, key, rows=rows, keys=KEYS, causal=True)
    ruined = torch.where((torch.arange(T) > last)[:, None], float("nan"), key)
    got = head_mean_attention(query, ruined, rows=rows, keys=KEYS, causal=True, last_row=last)
    torch.testing.assert_close(got, whole)
    for gradient, other in zip(
        torch.autograd.grad(got.square().sum(), (query, key)),
        torch.autograd.grad(whole.square().sum(), (query, key)),
        strict=True,
    ):
        torch.testing.assert_close(gradient, other)


def test_gradients_of_several_uses_add_up_and_autocast_changes_nothing():
    query, key = inputs(torch.float32, 2)

    def both():
        one = head_mean_attention(query, key, rows=ROWS, keys=KEYS, causal=True)
        two = head_mean_attention(query, key, rows=KEYS, keys=KEYS, causal=True)
        return one.square().sum() + two.square().sum()

    plain = torch.autograd.grad(both(), (query, key))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = torch.autograd.grad(both(), (query, key))
    alone = torch.autograd.grad(
        head_mean_attention(query, key, rows=ROWS, keys=KEYS, causal=True).square().sum(), (query, key)
    )
    for one, two, three in zip(plain, autocast, alone, strict=True):
        assert torch.equal(one, two)
        assert not torch.allclose(one, three)


def test_a_frozen_side_costs_no_gradient():
    query, key = inputs(torch.float32, 2)
    for frozen, trained in ((query, key), (key, query)):
        expected = torch.autograd.grad(head_mean_attention(query, key, rows=ROWS, keys=KEYS).square().sum(), trained)
        frozen.requires_grad_(False)
        got = head_mean_attention(query, key, rows=ROWS, keys=KEYS)
        assert torch.equal(torch.autograd.grad(got.square().sum(), trained)[0], expected[0])
        frozen.requires_grad_(True)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("kind", ["shared bool", "both float"])
def test_a_weighted_sum_of_rows_is_that_of_the_rows(kind):
    weights = torch.tensor([[0.5, -2.0, 0.25, 7.0, 1.0], [1.0, 3.0, 0.0, 0.5, 9.0], [1.0] * 5])
    query, key = inputs(torch.float32, 2)
    options = {"rows": ROWS, "keys": KEYS, "attention_mask": masks(kind)}
    wanted = (head_mean_attention(query, key, **options) * weights[:, :, None]).sum(dim=1, keepdim=True)
    got = head_mean_attention(query, key, row_weights=weights, **options)
    torch.testing.assert_close(got, wanted)
    gradients = (torch.autograd.grad(values.square().sum(), (query, key)) for values in (got, wanted))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("cut")
def test_several_sums_of_rows_are_each_that_of_its_own_weights_and_have_no_gradient():
    weights = torch.rand(3, 4, 5)
    query, key = inputs(torch.float32, 2)
    options = {"rows": ROWS, "keys": KEYS, "attention_mask": masks("heads float")}
    wanted = [head_mean_attention(query, key, row_weights=one, **options) for one in weights.unbind(dim=1)]
    got = head_mean_attention(query, key, row_weights=weights, **options)
    torch.testing.assert_close(got, torch.cat(wanted, dim=1))
    with pytest.raises(ModelError, match="several sums of rows have no gradient"):
        got.sum().backward()


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("kind", ["shared bool", "samples bf16", "heads float"])
def test_layers_that_share_a_place_give_what_they_give_alone(kind):
    shared = SharedPlace()
    one = masks(kind)
    other = one & (torch.arange(T) > 2) if one.dtype == torch.bool else one + 1.5 * torch.randn(one.shape)
    # As layers with sliding windows beside full ones come; one has other key heads, some see the future.
    layers = [(one, 8, False), (one, 8, False), (other, 8, False), (one, 8, False), (one, 2, False)]
    layers += [(None, 8, True), (None, 8, False), (None, 8, True)]
    for layer, (mask, key_heads, causal) in enumerate(layers):
        options = {"attention_mask": mask, "causal": causal}
        found = []
        for place in (None, shared):
            query, key = inputs(torch.float32, key_heads)
            query = query * (1 + layer)
            got = head_mean_attention(query, key, rows=ROWS, keys=KEYS, shared=place, **options)
            found.append((got, *torch.autograd.grad(got.square().sum(), (query, key))))
        for alone, together in zip(*found, strict=True):
            torch.testing.assert_close(together, alone, rtol=0, atol=0)
