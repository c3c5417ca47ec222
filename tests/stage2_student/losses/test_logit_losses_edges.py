"""Logit losses at the edges: no tail, no mass, one entry, tokens that one side does not know."""

import math

import pytest
import torch
from logit_references import KINDS, bucketed, select
from loss_checks import assert_agree, normal, value_and_gradient

from vlm_distill_cache.common.codecs.live import SparseLogits
from vlm_distill_cache.stage2_student.losses.logits import tail_bucket_loss

INF = math.inf


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unequal_length_do_not_touch_token_zero_through_their_padding(kind):
    dense = torch.stack([normal(20, scale=1), 40 * torch.eye(20)[5]])  # a flat row, and one that lists few
    sparse = select(dense, floor=0.01, max_k=12)
    assert sparse.entry_mask.sum(1).tolist() != [sparse.entry_mask.shape[1]] * 2
    student = normal(2, 20, seed=2)
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_tokens_beyond_the_students_vocabulary_go_to_the_tail(kind):
    dense, student = normal(6, 48, scale=2), normal(6, 30, seed=1)
    sparse = select(dense, max_k=20)
    assert bool((sparse.token_ids >= 30).any())
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher_vocabulary", [8, 11])
def test_a_student_without_a_tail_gets_finite_values_and_gradients(kind, teacher_vocabulary: int):
    """With a larger teacher vocabulary the teacher has a tail that no student token could match."""
    dense, student = normal(4, teacher_vocabulary, scale=2), normal(4, 8, seed=1)
    sparse = select(dense, max_k=teacher_vocabulary)
    value, gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse, kind=kind), student)
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_without_a_tail_meets_a_student_who_has_one(kind):
    """Its whole vocabulary is listed, the student's is larger: only reverse KL needs its floor for that."""
    dense, student = normal(3, 6, scale=2), normal(3, 9, seed=1)
    sparse = select(dense, max_k=6)
    assert bool((sparse.tail_log_mass == -INF).all())
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_sure_of_itself_keeps_finite_values_and_gradients(kind):
    """Its tail mass underflows: log(1 - sum) would be -inf, the masked log-sum-exp is about -200."""
    dense, student = normal(3, 30, scale=1), normal(3, 30, seed=1)
    student[:, 0] += 200
    sparse = select(dense, max_k=4)
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_sure_of_one_token_keeps_finite_values_and_gradients(kind):
    dense, student = 300 * torch.eye(12)[:3], normal(3, 12, seed=1)
    for floor in (0.0, 0.5):  # entries of probability zero beside the one, or that one alone
        sparse = select(dense, floor=floor, max_k=5)
        assert_agree(
            lambda z, s=sparse: tail_bucket_loss(z, s, kind=kind),
            lambda z, s=sparse: bucketed(z, dense, s, kind),
            student,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_one_entry_a_row_is_enough(kind):
    dense, student = normal(4, 10, scale=2), normal(4, 10, seed=1)
    best = dense.log_softmax(1).max(dim=1)
    sparse = SparseLogits(
        best.indices[:, None],
        best.values[:, None],
        torch.ones(4, 1, dtype=torch.bool),
        torch.log1p(-best.values.exp())[:, None],
        (1.0,),
    )
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
def test_a_listed_token_that_the_teacher_rules_out_gives_no_nan(kind):
    dense = normal(2, 20, scale=2)
    dense[0, 0] = -INF  # the ground truth of row 0
    sparse, student = select(dense, max_k=3), normal(2, 20, seed=1)
    assert sparse.log_probs[0, 2] == -INF
    assert_agree(lambda z: tail_bucket_loss(z, sparse, kind=kind), lambda z: bucketed(z, dense, sparse, kind), student)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_k", [4, 15])
def test_tokens_that_the_student_rules_out_get_no_gradient(kind, max_k):
    """Masked rows of a padded vocabulary: outside the listed tokens they are no part of anything."""
    dense, student = normal(3, 20, scale=2), normal(3, 20, seed=1)
    dense[:, 15:], student[:, 15:] = -INF, -INF
    sparse = select(dense, max_k=max_k)
    value, gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse, kind=kind), student)
    short, short_gradient = value_and_gradient(lambda z: tail_bucket_loss(z, sparse, kind=kind), student[:, :15])
    torch.testing.assert_close(value, short)
    torch.testing.assert_close(gradient, torch.nn.functional.pad(short_gradient, (0, 5)))
