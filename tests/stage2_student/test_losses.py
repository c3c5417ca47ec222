"""Logit losses against slow, dense references: values and gradients, in float32 and half precision."""

import math

import pytest
import torch
from loss_checks import assert_agree, normal, value_and_gradient
from torch import Tensor

from common.codecs import LogitCodec, SparseLogits
from common.errors import TemperatureNotCachedError
from stage2_student.losses import lm_loss, tail_bucket_kl

INF = math.inf


def select(logits: Tensor, *, max_k: int = 6, floor: float = 0.0) -> SparseLogits:
    codec = LogitCodec(floor=floor, min_k=1, max_k=max_k)
    return codec.select(logits, torch.arange(len(logits)) % logits.shape[1])


def bucketed_kl(student: Tensor, dense: Tensor, sparse: SparseLogits, temperature: float) -> Tensor:
    """KL over the listed tokens and one bucket, row by row, from both dense distributions."""
    total = student.new_zeros(())
    for row in range(len(student)):
        ids = sparse.token_ids[row][sparse.entry_mask[row]]
        ids = ids[ids < student.shape[1]]
        p = (dense[row].double() / temperature).softmax(0)
        q = (student[row] / temperature).softmax(0)
        rest_p = torch.ones(len(p), dtype=torch.bool).index_fill(0, ids, False)
        rest_q = torch.ones(len(q), dtype=torch.bool).index_fill(0, ids, False)
        for j in ids.tolist():
            total = total + p[j] * (p[j] / q[j]).log()
        if rest_q.any() and p[rest_p].sum() > 0:
            total = total + p[rest_p].sum() * (p[rest_p].sum() / q[rest_q].sum()).log()
    return total * temperature**2 / len(student)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("max_k", [2, 6, 40])
def test_tail_bucket_kl_equals_the_dense_reference(temperature: float, max_k: int):
    dense, student = normal(7, 40, scale=3), normal(7, 40, seed=1, scale=2)
    sparse = select(dense, max_k=max_k)
    assert_agree(
        lambda z: tail_bucket_kl(z, sparse, temperature=temperature),
        lambda z: bucketed_kl(z, dense, sparse, temperature),
        student,
    )


def test_tail_bucket_kl_with_all_tokens_listed_is_the_plain_kl():
    dense, student = normal(5, 30, scale=3), normal(5, 30, seed=1)
    sparse = LogitCodec.from_preset("exact").select(dense, torch.arange(5))
    assert bool((sparse.tail_log_mass == -INF).all())
    assert_agree(
        lambda z: tail_bucket_kl(z, sparse),
        lambda z: torch.nn.functional.kl_div(
            z.log_softmax(1), dense.double().log_softmax(1), log_target=True, reduction="batchmean"
        ),
        student,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tail_bucket_kl_in_half_precision_differs_by_rounding_only(dtype: torch.dtype):
    dense, student = normal(6, 50, scale=3), normal(6, 50, seed=1).to(dtype)
    sparse = select(dense)
    value, gradient = value_and_gradient(lambda z: tail_bucket_kl(z, sparse), student)
    exact, exact_gradient = value_and_gradient(lambda z: tail_bucket_kl(z, sparse), student.float())
    assert gradient.dtype == dtype
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient.float(), exact_gradient, rtol=1e-2, atol=1e-4)


def test_the_gradient_is_the_closed_form():
    dense, student = normal(1, 12, scale=3), normal(1, 12, seed=1)
    sparse = select(dense, max_k=4)
    _, gradient = value_and_gradient(lambda z: tail_bucket_kl(z, sparse), student)
    p, q = dense.softmax(1)[0], student.softmax(1)[0]
    kept = torch.zeros(12, dtype=torch.bool).index_fill(0, sparse.token_ids[0], True)
    ratio = p[~kept].sum() / q[~kept].sum()
    torch.testing.assert_close(gradient[0], torch.where(kept, q - p, q * (1 - ratio)), atol=1e-6, rtol=1e-5)


def test_rows_of_unequal_length_do_not_touch_token_zero_through_their_padding():
    dense = torch.stack([normal(20, scale=1), 40 * torch.eye(20)[5]])  # a flat row, and one that lists few
    sparse = select(dense, floor=0.01, max_k=12)
    assert sparse.entry_mask.sum(1).tolist() != [sparse.entry_mask.shape[1]] * 2
    student = normal(2, 20, seed=2)
    assert_agree(lambda z: tail_bucket_kl(z, sparse), lambda z: bucketed_kl(z, dense, sparse, 1.0), student)


def test_teacher_tokens_beyond_the_students_vocabulary_go_to_the_tail():
    dense, student = normal(6, 48, scale=2), normal(6, 30, seed=1)
    sparse = select(dense, max_k=20)
    assert bool((sparse.token_ids >= 30).any())
    assert_agree(lambda z: tail_bucket_kl(z, sparse), lambda z: bucketed_kl(z, dense, sparse, 1.0), student)


@pytest.mark.parametrize("teacher_vocabulary", [8, 11])
def test_a_student_without_a_tail_has_no_bucket_and_no_nan(teacher_vocabulary: int):
    """With a larger teacher vocabulary the teacher has a tail that no student token could match."""
    dense, student = normal(4, teacher_vocabulary, scale=2), normal(4, 8, seed=1)
    sparse = select(dense, max_k=teacher_vocabulary)
    value, gradient = value_and_gradient(lambda z: tail_bucket_kl(z, sparse), student)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    assert_agree(lambda z: tail_bucket_kl(z, sparse), lambda z: bucketed_kl(z, dense, sparse, 1.0), student)


def test_a_student_sure_of_itself_keeps_finite_values_and_gradients():
    """Its tail mass underflows: log(1 - sum) would be -inf, the masked log-sum-exp is about -200."""
    dense, student = normal(3, 30, scale=1), normal(3, 30, seed=1)
    student[:, 0] += 200
    sparse = select(dense, max_k=4)
    assert_agree(lambda z: tail_bucket_kl(z, sparse), lambda z: bucketed_kl(z, dense, sparse, 1.0), student)


def test_a_listed_token_of_probability_zero_adds_nothing():
    dense = normal(2, 20, scale=2)
    dense[0, 0] = -INF  # the ground truth of row 0
    sparse, student = select(dense, max_k=3), normal(2, 20, seed=1)
    assert sparse.log_probs[0, 2] == -INF
    value, gradient = value_and_gradient(lambda z: tail_bucket_kl(z, sparse), student)
    q = student.softmax(1)
    assert bool(torch.isfinite(value))
    torch.testing.assert_close(gradient[0, 0], q[0, 0] / 2, atol=1e-6, rtol=1e-5)


def test_identical_teacher_and_student_give_zero_loss_and_gradient():
    dense = normal(5, 40, scale=3)
    sparse = select(dense)
    value, gradient = value_and_gradient(lambda z: tail_bucket_kl(z, sparse), dense)
    assert abs(float(value)) < 1e-6
    assert float(gradient.abs().max()) < 1e-6


def test_cached_and_live_teachers_give_the_same_loss():
    dense, student = normal(9, 300, scale=4), normal(9, 300, seed=1)
    codec = LogitCodec.from_preset("exact")
    live = codec.select(dense, torch.arange(9))
    cached = codec.decode(codec.encode(live))
    for temperature in (1.0, 2.0):
        one = value_and_gradient(lambda z, t=temperature: tail_bucket_kl(z, live, temperature=t), student)
        two = value_and_gradient(lambda z, t=temperature: tail_bucket_kl(z, cached, temperature=t), student)
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


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
        _, gradient = value_and_gradient(lambda z, t=teacher: tail_bucket_kl(z, t), student)
        errors.append(float((gradient - exact).square().sum() / exact.square().sum()))
    assert errors[0] < errors[1] / 4


def test_losses_without_rows_are_zero_with_a_graph():
    empty, no_labels = torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64)
    sparse = LogitCodec.from_preset("default").select(empty, no_labels)
    for loss in (lambda z: tail_bucket_kl(z, sparse), lambda z: lm_loss(z, no_labels)):
        value, gradient = value_and_gradient(loss, empty)
        assert float(value) == 0
        assert gradient.shape == empty.shape


def test_unequal_rows_and_uncached_temperatures_are_refused():
    sparse = select(normal(3, 20))
    with pytest.raises(ValueError, match="student has 2 rows, teacher 3"):
        tail_bucket_kl(normal(2, 20), sparse)
    with pytest.raises(TemperatureNotCachedError):
        tail_bucket_kl(normal(3, 20), sparse, temperature=4.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lm_loss_is_the_mean_negative_log_likelihood(dtype: torch.dtype):
    student, labels = normal(5, 30).to(dtype), torch.tensor([3, 0, 29, 7, 7])

    def reference(z: Tensor) -> Tensor:
        return sum((-z[i].log_softmax(0)[labels[i]] for i in range(5)), z.new_zeros(())) / 5

    tolerance = 1e-4 if dtype == torch.float32 else 1e-2
    assert_agree(lambda z: lm_loss(z, labels), reference, student, rtol=tolerance, atol=tolerance / 10)
