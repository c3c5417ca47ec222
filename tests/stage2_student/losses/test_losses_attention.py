"""Attention losses against slow, dense references: values and gradients, in float32 and bfloat16."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_checks import assert_agree, value_and_gradient
from torch import Tensor

from vlm_distill_cache.common.codecs.live import RowAttention, as_tensors
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec
from vlm_distill_cache.stage2_student.losses.attention import answer_attention_loss

KINDS = ("kl", "cosine", "relative", "kl_with_rest")


def cells_of(rows: int, groups: int, cells: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mass = 0.05 + 0.5 * torch.rand(rows, groups, 1, generator=generator)
    return mass * torch.randn(rows, groups, cells, generator=generator).mul(1.5).softmax(-1)


def answer_reference(student: Tensor, teacher: Tensor, kind: str, mask: Tensor, samples: list[int]) -> Tensor:
    """Row by row and group by group; rows without teacher mass are skipped."""
    teacher = teacher.double() * mask[:, None]
    student = student * mask[:, None]
    rows = [a for a in range(len(teacher)) if teacher[a].sum() > 0]
    groups = teacher.shape[1]
    total = student.new_zeros(())
    for a in rows:
        for g in range(groups):
            shares = []
            for side in (teacher, student):
                share = side[a, g] / side[a, g].sum()
                if kind == "relative":
                    mates = [b for b in rows if samples[b] == samples[a]]
                    mean = torch.stack([side[b, g] / side[b, g].sum() for b in mates]).mean(0)
                    share = torch.where(mean > 0, share / mean.clamp_min(1e-300), 0)
                    share = share / share.sum()
                shares.append(share)
            t, s = shares
            if kind == "kl_with_rest":
                t, s = (torch.cat([side, (1 - side.sum())[None]]) for side in (teacher[a, g], student[a, g]))
            if kind == "cosine":
                value = 1 - (t @ s) / (t.norm() * s.norm())
            else:
                seen = t > 0
                value = (t[seen] * (t[seen] / s[seen]).log()).sum()
            total = total + (1 if kind == "kl_with_rest" else teacher[a, g].sum()) * value
    return total / (len(rows) * groups)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_answer_attention_equals_the_row_by_row_reference(kind: str, masked: bool):
    teacher, student = cells_of(7, 2, 9, seed=0), cells_of(7, 2, 9, seed=1)
    teacher[2] = 0  # a text-only sample's row
    teacher[4] = 0  # a row that does not look, among others that do
    samples = [0, 0, 3, 5, 5, 5, 0]
    mask = torch.ones(7, 9, dtype=torch.bool)
    if masked:
        mask[:3, 6:] = False
    assert_agree(
        lambda s: answer_attention_loss(
            s,
            RowAttention.from_cells(teacher),
            kind=kind,  # type: ignore[arg-type]
            cell_mask=mask if masked else None,
            sample_index=torch.tensor(samples),
        ),
        lambda s: answer_reference(s, teacher, kind, mask, samples),
        student,
    )


@pytest.mark.parametrize("kind", ["kl", "cosine", "relative"])
def test_where_the_student_looks_matters_and_how_much_does_not(kind: str):
    teacher = cells_of(5, 1, 8, seed=0)
    value = answer_attention_loss(0.1 * teacher, RowAttention.from_cells(teacher), kind=kind)  # type: ignore[arg-type]
    assert abs(float(value)) < 1e-6


def test_text_only_rows_change_nothing():
    teacher, student = cells_of(4, 2, 9, seed=0), cells_of(4, 2, 9, seed=1)
    alone = answer_attention_loss(student, RowAttention.from_cells(teacher))
    joined = answer_attention_loss(
        torch.cat([student, torch.zeros(3, 2, 9)]),
        RowAttention.from_cells(torch.cat([teacher, torch.zeros(3, 2, 9)])),
    )
    torch.testing.assert_close(alone, joined)


def test_a_mask_of_cells_is_the_loss_on_the_others():
    teacher, student = cells_of(4, 1, 9, seed=0), cells_of(4, 1, 9, seed=1)
    keep = torch.tensor([True] * 6 + [False] * 3)
    masked = answer_attention_loss(student, RowAttention.from_cells(teacher), cell_mask=keep)
    cut = answer_attention_loss(student[..., :6], RowAttention.from_cells(teacher[..., :6]))
    torch.testing.assert_close(masked, cut)


def test_relative_forgets_cells_that_attract_every_row():
    """A sink added to all rows of both sides' maps hides the difference from `kl`, not from `relative`."""
    teacher, student = cells_of(6, 1, 9, seed=0), cells_of(6, 1, 9, seed=1)
    sink = torch.zeros(9)
    sink[4] = 20.0

    def ratio(kind: str) -> float:
        plain = answer_attention_loss(student, RowAttention.from_cells(teacher), kind=kind)  # type: ignore[arg-type]
        teacher_mass = teacher.sum(-1)
        covered = RowAttention(teacher + sink, teacher_mass)
        return float(answer_attention_loss(student + sink, covered, kind=kind) / plain)  # type: ignore[arg-type]

    assert ratio("relative") > 10 * ratio("kl")


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_does_not_look_gets_finite_values_and_gradients(kind: str):
    teacher, student = cells_of(3, 1, 9, seed=0), cells_of(3, 1, 9, seed=1)
    student[0], student[1, 0, :5] = 0, 0
    value, gradient = value_and_gradient(
        lambda s: answer_attention_loss(s, RowAttention.from_cells(teacher), kind=kind),  # type: ignore[arg-type]
        student,
    )
    assert bool(torch.isfinite(value))
    assert bool(torch.isfinite(gradient).all())


def test_eight_bits_barely_turn_the_gradient():
    teacher, student = cells_of(20, 1, 144, seed=0), cells_of(20, 1, 144, seed=1)
    codec = RowAttentionCodec(grid=(12, 12), groups=1)
    live = RowAttention.from_cells(teacher)
    gradients = [
        value_and_gradient(lambda s, t=side: answer_attention_loss(s, t), student)[1].flatten()
        for side in (live, as_tensors(codec.decode(codec.encode(live))))
    ]
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.9998


def test_unequal_shapes_and_unknown_kinds_are_refused():
    teacher = RowAttention.from_cells(torch.rand(2, 1, 4))
    with pytest.raises(ValueError, match=r"student has shape \[2, 1, 9\], teacher \[2, 1, 4\]"):
        answer_attention_loss(torch.rand(2, 1, 9), teacher)
    with pytest.raises(ValueError, match="kind: expected one of"):
        answer_attention_loss(torch.rand(2, 1, 4), teacher, kind="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: expected one of"):
        answer_attention_loss(torch.rand(2, 1, 4), teacher, reduction="max")  # type: ignore[arg-type]


def test_kl_with_rest_teaches_how_much_a_row_looks_and_kl_does_not():
    teacher, student = cells_of(5, 1, 8, seed=0), 0.1 * cells_of(5, 1, 8, seed=0)
    assert float(answer_attention_loss(student, RowAttention.from_cells(teacher), kind="kl_with_rest")) > 0.01
    whole = RowAttention.from_cells(teacher)
    assert abs(float(answer_attention_loss(teacher, whole, kind="kl_with_rest"))) < 1e-6


def test_rows_that_look_at_nothing_but_the_image_have_an_empty_rest():
    teacher, student = (cells_of(3, 1, 8, seed=seed) for seed in (0, 1))
    teacher, student = teacher / teacher.sum(-1, keepdim=True), student / student.sum(-1, keepdim=True)
    with_rest, without = (
        value_and_gradient(
            lambda s, k=kind: answer_attention_loss(s, RowAttention.from_cells(teacher), kind=k), student
        )
        for kind in ("kl_with_rest", "kl")
    )
    torch.testing.assert_close(with_rest[0], without[0], rtol=1e-4, atol=1e-5)
    assert bool(torch.isfinite(with_rest[1]).all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_over_layers_is_so_many_times_the_mean(kind: str):
    teacher, student = RowAttention.from_cells(cells_of(4, 3, 9, seed=0)), cells_of(4, 3, 9, seed=1)
    mean = answer_attention_loss(student, teacher, kind=kind)  # type: ignore[arg-type]
    summed = answer_attention_loss(student, teacher, kind=kind, reduction="sum")  # type: ignore[arg-type]
    torch.testing.assert_close(summed, 3 * mean)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_cells_are_computed_in_float32(kind: str):
    teacher, student = (
        RowAttention.from_cells(cells_of(4, 2, 9, seed=0)),
        cells_of(4, 2, 9, seed=1).bfloat16(),
    )
    loss = lambda s: answer_attention_loss(s, teacher, kind=kind)  # noqa: E731
    value, gradient = value_and_gradient(loss, student)
    exact, exact_gradient = value_and_gradient(loss, student.float())
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient.float(), exact_gradient, rtol=1e-2, atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 5),
    groups=st.integers(1, 3),
    cells=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
)
def test_any_shape_equals_the_row_by_row_reference(rows, groups, cells, kind, seed):
    teacher, student = cells_of(rows, groups, cells, seed=seed), cells_of(rows, groups, cells, seed=seed + 1)
    if not rows:
        value, gradient = value_and_gradient(
            lambda s: answer_attention_loss(s, RowAttention.from_cells(teacher), kind=kind), student
        )
        assert float(value) == 0
        assert gradient.shape == student.shape
        return
    samples = [index // 2 for index in range(rows)]
    everything = torch.ones(rows, cells, dtype=torch.bool)
    assert_agree(
        lambda s: answer_attention_loss(
            s, RowAttention.from_cells(teacher), kind=kind, sample_index=torch.tensor(samples)
        ),
        lambda s: answer_reference(s, teacher, kind, everything, samples),
        student,
        atol=5e-6,
    )
