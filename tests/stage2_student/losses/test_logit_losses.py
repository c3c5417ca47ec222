"""Logit losses against slow, dense references: values and gradients, in float32 and half precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from logit_references import KINDS, bucketed, select
from loss_checks import assert_agree, normal, value_and_gradient
from torch import Tensor

from vlm_distill_cache.common.codecs.live import SparseLogits, as_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.errors import TemperatureNotCachedError
from vlm_distill_cache.stage2_student.losses.logits import (
    TeacherRows,
    diverge,
    lm_loss,
    logit_gradient,
    split_rows,
    tail_bucket_loss,
    teacher_rows,
    with_spare_column,
)

INF = math.inf


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("max_k", [2, 6, 40])
def test_a_divergence_equals_the_dense_reference(kind, temperature: float, max_k: int):
    dense, student = normal(7, 40, scale=3), normal(7, 40, seed=1, scale=2)
    sparse = select(dense, max_k=max_k)
    assert_agree(
        lambda z: tail_bucket_loss(z, sparse, kind=kind, temperature=temperature),
        lambda z: bucketed(z, dense, sparse, kind, temperature),
        student,
    )


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    vocabulary=st.integers(2, 12),
    own=st.integers(2, 12),
    max_k=st.integers(2, 12),
    sharpness=st.sampled_from([0.0, 1.0, 6.0]),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**16),
)
def test_a_divergence_equals_the_dense_reference_for_any_shapes(rows, vocabulary, own, max_k, sharpness, kind, seed):
    """Teacher and student vocabularies of any size: some students know fewer tokens, or more."""
    dense = normal(rows, vocabulary, seed=seed, scale=sharpness)
    student, sparse = normal(rows, own, seed=seed + 1, scale=2), select(dense, max_k=max_k)
    assert_agree(
        lambda z: tail_bucket_loss(z, sparse, kind=kind),
        lambda z: bucketed(z, dense, sparse, kind),
        student,
        atol=2e-6,
    )


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("forward_kl", lambda p, q: (p * (p.log() - q.log())).sum()),
        ("reverse_kl", lambda p, q: (q * (q.log() - p.log())).sum()),
        ("jsd", lambda p, q: (p * (2 * p / (p + q)).log() + q * (2 * q / (p + q)).log()).sum() / 2),
        ("tvd", lambda p, q: (p - q).abs().sum() / 2),
    ],
)
def test_with_all_tokens_listed_a_divergence_is_the_plain_dense_one(kind, reference):
    dense, student = normal(5, 30, scale=3), normal(5, 30, seed=1)
    sparse = select_entries(LogitCodec.from_preset("exact"), dense, torch.arange(5))
    assert bool((sparse.tail_log_mass == -INF).all())
    assert_agree(
        lambda z: tail_bucket_loss(z, sparse, kind=kind),
        lambda z: reference(dense.double().softmax(1), z.softmax(1)) / 5,
        student,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_differ_by_the_rounding_of_the_gradient_only(kind, dtype: torch.dtype):
    dense, student = normal(6, 50, scale=3), normal(6, 50, seed=1).to(dtype)
    sparse = select(dense)
    value, gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse, kind=kind), student)
    assert gradient.dtype == dtype
    leaf = student.double().requires_grad_()
    expected = bucketed(leaf, dense, sparse, kind)
    expected.backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-2, atol=1e-4)


def test_the_gradient_of_the_forward_kl_is_the_closed_form():
    dense, student = normal(1, 12, scale=3), normal(1, 12, seed=1)
    sparse = select(dense, max_k=4)
    _, gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse), student)
    p, q = dense.softmax(1)[0], student.softmax(1)[0]
    kept = torch.zeros(12, dtype=torch.bool).index_fill(0, sparse.token_ids[0], True)
    ratio = p[~kept].sum() / q[~kept].sum()
    torch.testing.assert_close(gradient[0], torch.where(kept, q - p, q * (1 - ratio)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_identical_teacher_and_student_give_zero_loss_and_gradient(kind):
    dense = normal(5, 40, scale=3)
    sparse = select(dense)
    value, gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse, kind=kind), dense)
    assert abs(float(value)) < 1e-6
    # Total variation has a kink there: any slope of at most a half per mass is right, and rounding picks one.
    assert float(gradient.abs().max()) < (0.2 if kind == "tvd" else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_cached_and_live_teachers_give_the_same_loss(kind):
    dense, student = normal(9, 300, scale=4), normal(9, 300, seed=1)
    codec = LogitCodec.from_preset("exact")
    live = select_entries(codec, dense, torch.arange(9))
    cached = as_tensors(codec.decode(codec.encode(live)))
    for temperature in (1.0, 2.0):
        one, two = (
            value_and_gradient(
                lambda z, s=side, t=temperature: tail_bucket_loss(z, s, kind=kind, temperature=t), student
            )
            for side in (live, cached)
        )
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_rows_worked_on_in_place_give_the_same_values_and_gradients(kind):
    """What a fused loss does: a chunk's logits become its gradient, in the same memory."""
    dense, student = normal(7, 40, scale=3), normal(7, 40, seed=1)
    sparse = select(dense)
    whole, gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse, kind=kind), student)
    rows = teacher_rows(sparse, vocabulary=40, temperature=1.0)
    values, gradients = [], []
    for chunk in (slice(0, 3), slice(3, 6), slice(6, 7)):
        buffer = with_spare_column(student[chunk], 1.0)
        part = TeacherRows(rows.slots[chunk], rows.log_probs[chunk], rows.log_tail[chunk])
        own = split_rows(buffer, part.slots)
        divergence = diverge(part, own, kind)
        found = logit_gradient(buffer, part.slots, own, divergence)
        assert found.data_ptr() == buffer.data_ptr()
        values.append(divergence.value)
        gradients.append(found)
    torch.testing.assert_close(torch.cat(values).mean(), whole)
    torch.testing.assert_close(torch.cat(gradients) / 7, gradient)


def test_jensen_shannon_and_total_variation_are_bounded():
    dense, student = 50 * torch.eye(9)[:1], 50 * torch.eye(9)[1:2]  # sure of different tokens
    sparse = select(dense, max_k=2)
    assert float(tail_bucket_loss(student, sparse, kind="jsd")) == pytest.approx(math.log(2), abs=1e-6)
    assert float(tail_bucket_loss(student, sparse, kind="tvd")) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_temperature_factor_keeps_the_size_of_the_gradient(kind):
    dense = normal(50, 30)
    student, norms = dense + normal(50, 30, seed=1, scale=0.3), []
    codec = LogitCodec(floor=0.0, min_k=1, max_k=30, temperatures=(1.0, 8.0, 16.0))
    sparse = select_entries(codec, dense, torch.arange(50) % 30)
    for temperature in (8.0, 16.0):
        _, gradient = value_and_gradient(
            lambda z, t=temperature: tail_bucket_loss(z, sparse, kind=kind, temperature=t), student
        )
        norms.append(float(gradient.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.15)


def test_the_bucket_brings_the_gradient_closer_to_the_dense_one_than_renormalising():
    dense = normal(40, 400, scale=2.5)
    student = dense + normal(40, 400, seed=1, scale=0.7)  # a student that has begun to follow
    sparse = select(dense, max_k=32)
    renormalised = SparseLogits(
        sparse.token_ids,
        sparse.log_probs.log_softmax(1),
        sparse.entry_mask,
        torch.full_like(sparse.tail_log_mass, -INF),
        sparse.temperatures,
    )
    exact = (student.softmax(1) - dense.softmax(1)) / 40
    errors = []
    for teacher in (sparse, renormalised):
        _, gradient = value_and_gradient(lambda z, t=teacher: tail_bucket_loss(z, t), student)
        errors.append(float((gradient - exact).square().sum() / exact.square().sum()))
    assert errors[0] < errors[1] / 4


@pytest.mark.parametrize("kind", KINDS)
def test_losses_without_rows_are_zero_with_a_graph(kind):
    empty, no_labels = torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)
    sparse = select_entries(LogitCodec.from_preset("default"), empty, no_labels)
    for loss in (lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: lm_loss(z, no_labels)):
        value, gradient = value_and_gradient(loss, empty)
        assert float(value) == 0
        assert gradient.shape == empty.shape


def test_unequal_rows_unknown_kinds_and_uncached_temperatures_are_refused():
    sparse = select(normal(3, 20))
    with pytest.raises(ValueError, match="student has 2 rows, teacher 3"):
        tail_bucket_loss(normal(2, 20), sparse)
    with pytest.raises(ValueError, match="kind: expected one of"):
        tail_bucket_loss(normal(3, 20), sparse, kind="mse")  # type: ignore[arg-type]
    with pytest.raises(TemperatureNotCachedError):
        tail_bucket_loss(normal(3, 20), sparse, temperature=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_loss_is_the_mean_negative_log_likelihood(dtype: torch.dtype):
    student, labels = normal(5, 30).to(dtype), torch.tensor([3, 0, 29, 7, 7])

    def reference(z: Tensor) -> Tensor:
        return sum((-z[i].log_softmax(0)[labels[i]] for i in range(5)), z.new_zeros(())) / 5

    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert_agree(lambda z: lm_loss(z, labels), reference, student, rtol=tolerance, atol=tolerance / 10)
