"""Attention losses against slow, dense references: values and gradients, in float32 and bfloat16."""

import math

import pytest
import torch
from loss_checks import assert_agree, normal, value_and_gradient
from torch import Tensor

from common.codecs import RowAttention, RowAttentionCodec
from common.codecs.teacher_map import TeacherMap
from stage2_student.losses import (
    answer_attention_loss,
    column_means,
    sink_filtered_cosine_loss,
    visual_columns_loss,
    visual_map_cosine_loss,
)

INF = math.inf


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
            if kind == "cosine":
                value = 1 - (t @ s) / (t.norm() * s.norm())
            else:
                seen = t > 0
                value = (t[seen] * (t[seen] / s[seen]).log()).sum()
            total = total + teacher[a, g].sum() * value
    return total / (len(rows) * groups)


@pytest.mark.parametrize("kind", ["kl", "cosine", "relative"])
@pytest.mark.parametrize("masked", [False, True])
def test_answer_attention_equals_the_row_by_row_reference(kind: str, masked: bool):
    teacher, student = cells_of(7, 2, 9, seed=0), cells_of(7, 2, 9, seed=1)
    teacher[2] = 0  # a text-only sample's row
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


@pytest.mark.parametrize("kind", ["kl", "cosine", "relative"])
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
        for side in (live, codec.decode(codec.encode(live)))
    ]
    assert float(torch.cosine_similarity(*gradients, dim=0)) > 0.9998


def test_unequal_shapes_and_unknown_kinds_are_refused():
    teacher = RowAttention.from_cells(torch.rand(2, 1, 4))
    with pytest.raises(ValueError, match=r"student has shape \[2, 1, 9\], teacher \[2, 1, 4\]"):
        answer_attention_loss(torch.rand(2, 1, 9), teacher)
    with pytest.raises(ValueError, match="kind: expected one of"):
        answer_attention_loss(torch.rand(2, 1, 4), teacher, kind="mse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reduction: expected one of"):
        visual_map_cosine_loss(
            torch.rand(1, 1, 2, 2),
            TeacherMap.from_maps(torch.rand(1, 1, 2, 2)),
            reduction="max",  # type: ignore[arg-type]
        )


def maps_of(samples: int, groups: int, tokens: int, *, seed: int) -> Tensor:
    scores = normal(samples, groups, tokens, tokens, seed=seed, scale=2)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return 0.4 * scores.masked_fill(future, -INF).softmax(-1)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right) / (left.norm() * right.norm())


def sink_filtered_reference(student: Tensor, teacher: Tensor, reduction: str) -> Tensor:
    """The released code's loss, number by number; samples whose teacher map is empty are skipped."""
    teacher = teacher.double()
    samples, groups, tokens = teacher.shape[:3]
    losses = []
    for b in range(samples):
        if not teacher[b].any():
            continue
        per_layer = []
        for g in range(groups):
            limits = []
            for side in (student.detach()[b, g], teacher[b, g]):
                flat = side.flatten().tolist()  # causal zeros included
                mean = sum(flat) / len(flat)
                variance = sum((x - mean) ** 2 for x in flat) / (len(flat) - 1)  # unbiased
                limits.append(mean + variance**0.5)
            s = [student.new_zeros(()) for _ in range(tokens)]
            t = [student.new_zeros(()) for _ in range(tokens)]
            for k in range(tokens):
                count = 0
                for q in range(tokens):
                    is_low = student[b, g, q, k] <= limits[0] and teacher[b, g, q, k] <= limits[1]
                    if is_low and teacher[b, g, q, k] != 0:
                        s[k], t[k], count = s[k] + student[b, g, q, k], t[k] + teacher[b, g, q, k], count + 1
                s[k], t[k] = s[k] / max(count, 1), t[k] / max(count, 1)
            per_layer.append(1 - cosine(torch.stack(s), torch.stack(t)))
        layers = torch.stack(per_layer)
        losses.append(layers.sum() if reduction == "sum" else layers.mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_sink_filtered_cosine_equals_the_released_formula(reduction: str):
    teacher, student = maps_of(3, 2, 7, seed=0), maps_of(3, 2, 7, seed=1)
    teacher[1] = 0  # a text-only sample
    assert_agree(
        lambda s: sink_filtered_cosine_loss(s, TeacherMap.from_maps(teacher), reduction=reduction),  # type: ignore[arg-type]
        lambda s: sink_filtered_reference(s, teacher, reduction),
        student,
    )


def test_published_reduction_is_the_sum_over_layers():
    teacher, student = maps_of(2, 7, 6, seed=0), maps_of(2, 7, 6, seed=1)
    target = TeacherMap.from_maps(teacher)
    summed = sink_filtered_cosine_loss(student, target)
    torch.testing.assert_close(summed, 7 * sink_filtered_cosine_loss(student, target, reduction="mean"))


def test_the_filter_follows_the_student():
    """A sink of the student leaves its pair out on both sides, so it gets no gradient."""
    teacher, student = maps_of(1, 1, 8, seed=0), maps_of(1, 1, 8, seed=1)
    student[0, 0, 7, 2] = 5.0
    _, gradient = value_and_gradient(
        lambda s: sink_filtered_cosine_loss(s, TeacherMap.from_maps(teacher)), student
    )
    assert float(gradient[0, 0, 7, 2]) == 0
    assert bool(gradient.any())


def test_bfloat16_maps_are_computed_in_float32():
    teacher = TeacherMap.from_maps(maps_of(2, 2, 9, seed=0))
    student = maps_of(2, 2, 9, seed=1).bfloat16()
    for loss in (sink_filtered_cosine_loss, visual_map_cosine_loss):
        value, gradient = value_and_gradient(lambda s, f=loss: f(s, teacher), student)
        exact, exact_gradient = value_and_gradient(lambda s, f=loss: f(s, teacher), student.float())
        torch.testing.assert_close(value, exact)
        torch.testing.assert_close(gradient.float(), exact_gradient, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_visual_map_cosine_equals_the_papers_formula(reduction: str):
    teacher, student = maps_of(3, 2, 6, seed=0), maps_of(3, 2, 6, seed=1)
    teacher[2] = 0

    def reference(s: Tensor) -> Tensor:
        layers = [
            [1 - cosine(s[b, g].flatten(), teacher[b, g].double().flatten()) for g in (0, 1)] for b in (0, 1)
        ]
        return sum(((x + y) for x, y in layers), s.new_zeros(())) / (2 if reduction == "sum" else 4)

    target = TeacherMap.from_maps(teacher)
    assert_agree(lambda s: visual_map_cosine_loss(s, target, reduction=reduction), reference, student)  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_visual_columns_equals_the_dense_reference(masked: bool):
    teacher, student = column_means(maps_of(3, 2, 6, seed=0)), column_means(maps_of(3, 2, 6, seed=1))
    mask = torch.ones(3, 6, dtype=torch.bool)
    if masked:
        mask[0, 4:] = False

    def reference(s: Tensor) -> Tensor:
        terms = [
            1 - cosine(s[b, g][mask[b]], teacher[b, g].double()[mask[b]]) for b in range(3) for g in range(2)
        ]
        return torch.stack(terms).mean()

    assert_agree(
        lambda s: visual_columns_loss(s, teacher, token_mask=mask if masked else None), reference, student
    )


def test_column_means_average_over_query_rows():
    maps = maps_of(1, 1, 5, seed=0)
    expected = [sum(maps[0, 0, q, k] for q in range(5)) / 5 for k in range(5)]
    torch.testing.assert_close(column_means(maps)[0, 0], torch.stack(expected))


def test_one_visual_token_gives_a_finite_loss():
    student, teacher = torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 1, 1), 0.7)
    value, gradient = value_and_gradient(
        lambda s: sink_filtered_cosine_loss(s, TeacherMap.from_maps(teacher)), student
    )
    assert abs(float(value)) < 1e-6
    assert bool(torch.isfinite(gradient).all())


def test_samples_without_an_image_give_zero_with_a_graph():
    nowhere = RowAttention.from_cells(torch.zeros(3, 1, 4))

    def no_map(samples: int, groups: int, tokens: int) -> TeacherMap:
        return TeacherMap.from_maps(torch.zeros(samples, groups, tokens, tokens))

    for loss, student in (
        (lambda z: answer_attention_loss(z, nowhere), torch.rand(3, 1, 4)),
        (lambda z: visual_columns_loss(z, torch.zeros(2, 1, 4)), torch.rand(2, 1, 4)),
        (lambda z: sink_filtered_cosine_loss(z, no_map(2, 1, 4)), torch.rand(2, 1, 4, 4)),
        (lambda z: visual_map_cosine_loss(z, no_map(2, 1, 0)), torch.rand(2, 1, 0, 0)),
    ):
        value, gradient = value_and_gradient(loss, student)
        assert float(value) == 0
        assert not bool(gradient.any())


def test_padding_tokens_change_nothing_of_the_sink_filtered_loss():
    torch.manual_seed(0)
    small = [torch.tril(torch.rand(1, 2, 6, 6)).softmax(-1).tril() for _ in range(2)]
    padded = [torch.nn.functional.pad(maps, (3, 3, 3, 3)) for maps in small]
    mask = torch.zeros(1, 12, dtype=torch.bool)
    mask[:, 3:9] = True
    expected = sink_filtered_cosine_loss(small[0], TeacherMap.from_maps(small[1]))
    teacher, equal = (TeacherMap.from_maps(maps, token_mask=mask) for maps in (padded[1], padded[0]))
    torch.testing.assert_close(sink_filtered_cosine_loss(padded[0], teacher, token_mask=mask), expected)
    assert abs(float(sink_filtered_cosine_loss(padded[0], equal, token_mask=mask))) < 1e-6


def test_attention_of_padding_tokens_changes_nothing_of_the_map_cosine():
    student, teacher = maps_of(2, 2, 6, seed=0), maps_of(2, 2, 6, seed=1)
    mask = torch.tensor([[True] * 4 + [False] * 2] * 2)
    found = visual_map_cosine_loss(student, TeacherMap.from_maps(teacher), token_mask=mask)
    cut = TeacherMap.from_maps(teacher[..., :4, :4])
    torch.testing.assert_close(found, visual_map_cosine_loss(student[..., :4, :4], cut))
