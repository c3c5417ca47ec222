"""The fused losses are the unfused ones of the same logits: values, and gradients by hidden states, weight and bias."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_references import KINDS, bucketed, select
from loss_checks import normal
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.common.errors import TemperatureNotCachedError
from vlm_distill_cache.stage2_student.losses.fused import fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss

ROWS, WIDTH, VOCABULARY = 11, 8, 40
WEIGHTS = {"lm_weight": 0.7, "logit_weight": 1.3}


@dataclass(frozen=True)
class Layer:
    """What an output layer gets, as leaves of a graph; the teacher's vocabulary may be another one."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    teacher: SparseLogits

    @property
    def leaves(self) -> list[Tensor]:
        leaves = [self.hidden, self.weight, *([] if self.bias is None else [self.bias])]
        return [leaf for leaf in leaves if leaf.requires_grad]

    def logits(self, *, softcap: float | None = None, logit_scale: float | None = None) -> Tensor:
        logits = linear(self.hidden, self.weight, self.bias)
        logits = logits if logit_scale is None else logits * logit_scale
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def make_layer(
    *,
    rows: int = ROWS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    teachers: int = VOCABULARY,
    max_k: int = 6,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Layer:
    def leaf(*shape: int, offset: int) -> Tensor:
        return normal(*shape, seed=seed + offset).to(dtype).requires_grad_()

    generator = torch.Generator().manual_seed(seed)
    return Layer(
        hidden=leaf(rows, width, offset=1),
        weight=leaf(vocabulary, width, offset=2),
        bias=leaf(vocabulary, offset=3) if bias else None,
        labels=torch.randint(0, vocabulary, (rows,), generator=generator),
        teacher=select(normal(rows, teachers, seed=seed + 4, scale=3), max_k=max_k),
    )


def fused(layer: Layer, **options):
    return fused_losses(layer.hidden, layer.weight, layer.labels, layer.teacher, bias=layer.bias, **WEIGHTS, **options)


def unfused(layer: Layer, *, kind: str = "forward_kl", temperature: float = 1.0, **shape) -> tuple[Tensor, Tensor]:
    logits = layer.logits(**shape)
    return lm_loss(logits, layer.labels), tail_bucket_loss(logits, layer.teacher, kind=kind, temperature=temperature)


def weighted(lm: Tensor, logits: Tensor) -> Tensor:
    return WEIGHTS["lm_weight"] * lm + WEIGHTS["logit_weight"] * logits


def gradients(total: Tensor, layer: Layer) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, layer.leaves)


def assert_equal_to_unfused(
    layer: Layer, *, chunk_rows: int | None = None, rtol: float = 1e-5, atol: float = 1e-6, **options
) -> None:
    lm, logits = unfused(layer, **options)
    found = fused(layer, chunk_rows=chunk_rows, **options)
    assert found.logits is not None
    for value, expected in ((found.lm, lm), (found.logits, logits), (found.total, weighted(lm, logits))):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.detach(), expected.detach(), rtol=rtol, atol=atol)
    for gradient, expected, leaf in zip(
        gradients(found.total, layer), gradients(weighted(lm, logits), layer), layer.leaves, strict=True
    ):
        assert gradient.dtype == leaf.dtype
        torch.testing.assert_close(gradient, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 11, 100, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_unfused_losses(kind, temperature: float, chunk_rows):
    assert_equal_to_unfused(make_layer(), kind=kind, temperature=temperature, chunk_rows=chunk_rows)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    width=st.integers(1, 5),
    vocabulary=st.integers(2, 12),
    teachers=st.integers(2, 12),
    max_k=st.integers(2, 12),
    chunk_rows=st.integers(1, 7),
    kind=st.sampled_from(KINDS),
    temperature=st.sampled_from([1.0, 2.0]),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**16),
)
def test_they_are_for_any_shapes(
    rows, width, vocabulary, teachers, max_k, chunk_rows, kind, temperature, bias, softcap, seed
):
    """Student vocabularies smaller than the teacher's, and such that all tokens are listed, are among them."""
    layer = make_layer(
        rows=rows, width=width, vocabulary=vocabulary, teachers=teachers, max_k=max_k, bias=bias, seed=seed
    )
    assert_equal_to_unfused(
        layer, kind=kind, temperature=temperature, softcap=softcap, chunk_rows=chunk_rows, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_the_dense_reference_too(kind):
    """Without our unfused losses in between: float64, bucket by bucket."""
    layer = make_layer(bias=False)
    leaves = [leaf.detach().double().requires_grad_() for leaf in layer.leaves]
    logits = leaves[0] @ leaves[1].t()
    dense = normal(ROWS, VOCABULARY, seed=4, scale=3)
    lm, divergence = cross_entropy(logits, layer.labels), bucketed(logits, dense, layer.teacher, kind)
    found = fused(layer, kind=kind, chunk_rows=4)
    torch.testing.assert_close(found.total.detach().double(), weighted(lm, divergence).detach(), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(weighted(lm, divergence), leaves)
    for gradient, exact in zip(gradients(found.total, layer), expected, strict=True):
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("logit_scale", [None, 0.25])
@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
def test_soft_capping_and_scaling_follow_the_chain_rule(softcap, logit_scale, temperature: float):
    assert_equal_to_unfused(
        make_layer(), softcap=softcap, logit_scale=logit_scale, temperature=temperature, chunk_rows=4
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_rows", [1, 5, 63, 64])
@pytest.mark.parametrize(
    ("teachers", "options"),
    [
        (300, {}),
        (300, {"temperature": 2.0}),
        (300, {"softcap": 1.5, "temperature": 2.0}),
        (400, {"softcap": 5.0}),
    ],
)
def test_half_precision_differs_by_the_rounding_of_gradients_only(kind, chunk_rows: int, teachers: int, options):
    """The logits are the same bfloat16 numbers, so values agree as in float32; gradients within 2^-6 of the largest.

    With fewer rows at a time than there are, the weight's gradient comes in blocks of the vocabulary.
    """
    layer = make_layer(rows=64, width=32, vocabulary=300, teachers=teachers, dtype=torch.bfloat16)
    layer = replace(layer, weight=(layer.weight.detach() / 6).requires_grad_())
    rounded = {} if "softcap" in options else {"rtol": 1e-5, "atol": 1e-6}  # the unfused form caps in bfloat16
    lm, logits = unfused(layer, kind=kind, **options)
    found = fused(layer, kind=kind, chunk_rows=chunk_rows, **options)
    assert found.logits is not None
    torch.testing.assert_close(found.lm, lm.detach(), **(rounded or {"rtol": 2**-8, "atol": 2**-8}))
    torch.testing.assert_close(found.logits, logits.detach(), **(rounded or {"rtol": 2**-6, "atol": 2**-8}))
    exact = replace(
        layer,
        **{name: getattr(layer, name).detach().float().requires_grad_() for name in ("hidden", "weight", "bias")},
    )
    in_float = gradients(weighted(*unfused(exact, kind=kind, **options)), exact)
    for gradient, expected, leaf in zip(gradients(found.total, layer), in_float, layer.leaves, strict=True):
        assert gradient.dtype == leaf.dtype == torch.bfloat16
        assert float((gradient.float() - expected).abs().max()) < 2**-6 * float(expected.abs().max())


def test_the_gradient_of_the_weight_does_not_lose_small_parts_of_many_chunks():
    """A thousand chunks of bfloat16, each adding the same: a sum in bfloat16 would stand still at 256 parts."""
    rows, hidden = 1024, torch.ones(1024, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64)
    fused_losses(hidden, weight, labels, None, chunk_rows=1).total.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_rows_that_list_nothing_and_tokens_beyond_the_vocabulary_count_as_others(temperature: float):
    layer = make_layer(teachers=90)
    sparse = layer.teacher
    empty = torch.arange(ROWS)[:, None] % 3 == 0
    tail = torch.where(empty, 0.0, sparse.tail_log_mass)
    sparse = replace(
        sparse,
        entry_mask=sparse.entry_mask & ~empty,
        log_probs=sparse.log_probs.masked_fill(empty, -math.inf),
        tail_log_mass=tail,
    )
    assert bool((sparse.token_ids >= VOCABULARY).any())
    assert_equal_to_unfused(replace(layer, teacher=sparse), temperature=temperature, chunk_rows=4)


@pytest.mark.parametrize("kind", KINDS)
def test_masses_that_float32_cannot_hold_stay_exact(kind):
    """One logit a hundred nats above all others: on a listed token, and on one that is not."""
    layer = make_layer(bias=True)
    for token in (int(layer.teacher.token_ids[0, 0]), int((layer.labels[0] + 1) % VOCABULARY)):
        bias = torch.zeros(VOCABULARY).index_fill(0, torch.tensor([token]), 120.0).requires_grad_()
        assert_equal_to_unfused(replace(layer, bias=bias), kind=kind, chunk_rows=4, rtol=1e-4)


def test_without_a_teacher_it_is_the_cross_entropy():
    layer = make_layer()
    found = fused_losses(layer.hidden, layer.weight, layer.labels, None, bias=layer.bias, chunk_rows=3)
    expected = lm_loss(layer.logits(), layer.labels)
    assert found.logits is None
    torch.testing.assert_close(found.total.detach(), expected.detach())
    for gradient, exact in zip(gradients(found.total, layer), gradients(expected, layer), strict=True):
        torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_no_rows_give_zero_and_gradients_of_zero():
    layer = make_layer(rows=1)
    none = replace(
        layer,
        hidden=layer.hidden.detach()[:0].requires_grad_(),
        labels=layer.labels[:0],
        teacher=_no_rows(layer.teacher),
    )
    found = fused(none)
    assert (float(found.total.detach()), float(found.lm), float(found.logits)) == (0.0, 0.0, 0.0)
    assert [float(g.abs().sum()) for g in gradients(found.total, none)] == [0.0, 0.0, 0.0]


def _no_rows(sparse: SparseLogits) -> SparseLogits:
    return SparseLogits(
        sparse.token_ids[:0],
        sparse.log_probs[:0],
        sparse.entry_mask[:0],
        sparse.tail_log_mass[:0],
        sparse.temperatures,
    )


def test_what_does_not_fit_is_refused_with_its_shapes():
    layer = make_layer()
    with pytest.raises(ValueError, match=r"hidden \[A, D\].*got \[11, 8\], \[40, 8\] and \[10\]"):
        fused(replace(layer, labels=layer.labels[1:]))
    with pytest.raises(ValueError, match="student has 11 rows, teacher 0"):
        fused(replace(layer, teacher=_no_rows(layer.teacher)))
    with pytest.raises(ValueError, match=r"expected bias \[40\], got \[39\]"):
        fused(replace(layer, bias=torch.zeros(39)))
    with pytest.raises(ValueError, match="kind: expected one of"):
        fused(layer, kind="kl")
    for name in ("chunk_rows", "softcap"):
        with pytest.raises(ValueError, match=f"{name}: expected a positive number or None, got -1"):
            fused(layer, **{name: -1})
    with pytest.raises(TemperatureNotCachedError):
        fused(layer, temperature=3.0)
