"""Losses of visual maps against slow references: values and gradients, float32 and bfloat16."""

import pytest
import torch
from loss_checks import assert_agree, cosine, maps_of, value_and_gradient
from torch import Tensor

from vlm_distill_cache.common.codecs.live import RowAttention, TeacherMap
from vlm_distill_cache.common.errors import CacheMismatchError
from vlm_distill_cache.stage2_student.losses.attention import (
    answer_attention_loss,
    sink_filtered_cosine_loss,
    sink_shares,
    visual_columns_loss,
    visual_map_loss,
)


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
    _, gradient = value_and_gradient(lambda s: sink_filtered_cosine_loss(s, TeacherMap.from_maps(teacher)), student)
    assert float(gradient[0, 0, 7, 2]) == 0
    assert bool(gradient.any())


def test_bfloat16_maps_are_computed_in_float32():
    teacher = TeacherMap.from_maps(maps_of(2, 2, 9, seed=0))
    student = maps_of(2, 2, 9, seed=1).bfloat16()
    for loss in (sink_filtered_cosine_loss, visual_map_loss):
        value, gradient = value_and_gradient(lambda s, f=loss: f(s, teacher), student)
        exact, exact_gradient = value_and_gradient(lambda s, f=loss: f(s, teacher), student.float())
        torch.testing.assert_close(value, exact)
        torch.testing.assert_close(gradient.float(), exact_gradient, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_visual_map_cosine_equals_the_papers_formula(reduction: str):
    teacher, student = maps_of(3, 2, 6, seed=0), maps_of(3, 2, 6, seed=1)
    teacher[2] = 0

    def reference(s: Tensor) -> Tensor:
        layers = [[1 - cosine(s[b, g].flatten(), teacher[b, g].double().flatten()) for g in (0, 1)] for b in (0, 1)]
        return sum(((x + y) for x, y in layers), s.new_zeros(())) / (2 if reduction == "sum" else 4)

    target = TeacherMap.from_maps(teacher)
    assert_agree(lambda s: visual_map_loss(s, target, reduction=reduction), reference, student)  # type: ignore[arg-type]


@pytest.mark.parametrize("masked", [False, True])
def test_visual_columns_equals_the_dense_reference(masked: bool):
    teacher, student = (maps_of(3, 2, 6, seed=seed).mean(dim=-2) for seed in (0, 1))
    mask = torch.ones(3, 6, dtype=torch.bool)
    if masked:
        mask[0, 4:] = False

    def reference(s: Tensor) -> Tensor:
        terms = [1 - cosine(s[b, g][mask[b]], teacher[b, g].double()[mask[b]]) for b in range(3) for g in range(2)]
        return torch.stack(terms).mean()

    assert_agree(lambda s: visual_columns_loss(s, teacher, token_mask=mask if masked else None), reference, student)


def test_one_visual_token_gives_a_finite_loss():
    student, teacher = torch.full((1, 1, 1, 1), 0.2), torch.full((1, 1, 1, 1), 0.7)
    value, gradient = value_and_gradient(lambda s: sink_filtered_cosine_loss(s, TeacherMap.from_maps(teacher)), student)
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
        (lambda z: visual_map_loss(z, no_map(2, 1, 0)), torch.rand(2, 1, 0, 0)),
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
    found = visual_map_loss(student, TeacherMap.from_maps(teacher), token_mask=mask)
    cut = TeacherMap.from_maps(teacher[..., :4, :4])
    torch.testing.assert_close(found, visual_map_loss(student[..., :4, :4], cut))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "kl", "mse"])
def test_a_whole_map_loss_equals_the_pair_by_pair_reference(kind: str, masked: bool):
    teacher, student = maps_of(3, 2, 6, seed=0), maps_of(3, 2, 6, seed=1)
    teacher[1] = 0
    mask = torch.ones(3, 6, dtype=torch.bool)
    if masked:
        mask[0, :2], mask[2, 5:] = False, False

    def of_one(s: Tensor, t: Tensor) -> Tensor:
        tokens = len(t)
        if kind == "mse":
            return sum((s[q, k] - t[q, k]) ** 2 for q in range(tokens) for k in range(tokens)) / tokens**2
        if kind == "cosine":
            return 1 - cosine(s.flatten(), t.flatten())
        total = s.new_zeros(())
        for q in range(tokens):
            p, r = t[q, : q + 1] / t[q].sum(), s[q, : q + 1] / s[q].sum()  # causal keys
            total = total + t[q].sum() * (p * (p / r).log()).sum()
        return total / tokens

    def reference(s: Tensor) -> Tensor:
        terms = []
        for b in (0, 2):
            for g in (0, 1):
                one, two = (side[b, g][mask[b]][:, mask[b]] for side in (s, teacher.double()))
                terms.append(of_one(one, two))
        return torch.stack(terms).mean()

    assert_agree(
        lambda s: visual_map_loss(
            s,
            TeacherMap.from_maps(teacher, token_mask=mask),
            kind=kind,  # type: ignore[arg-type]
            token_mask=mask if masked else None,
        ),
        reference,
        student,
    )


@pytest.mark.parametrize("kind", ["sink_filtered", "cosine", "kl", "mse"])
def test_an_equal_map_has_no_loss_and_a_sum_over_layers_is_so_many_means(kind):
    maps, student = maps_of(2, 3, 6, seed=0), maps_of(2, 3, 6, seed=1)
    teacher = TeacherMap.from_maps(maps)
    assert abs(float(visual_map_loss(maps, teacher, kind=kind))) < 1e-6
    mean = visual_map_loss(student, teacher, kind=kind, reduction="mean")
    torch.testing.assert_close(visual_map_loss(student, teacher, kind=kind, reduction="sum"), 3 * mean)


@pytest.mark.parametrize("kind", ["sink_filtered", "cosine", "kl", "mse"])
def test_bfloat16_maps_of_any_kind_are_computed_in_float32(kind):
    teacher, student = TeacherMap.from_maps(maps_of(2, 2, 9, seed=0)), maps_of(2, 2, 9, seed=1).bfloat16()
    value, gradient = value_and_gradient(lambda s: visual_map_loss(s, teacher, kind=kind), student)
    exact, wanted = value_and_gradient(lambda s: visual_map_loss(s, teacher, kind=kind), student.float())
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient.float(), wanted, rtol=1e-2, atol=1e-3)


def test_maps_of_means_serve_the_sink_filtered_loss_alone():
    maps = maps_of(1, 1, 4, seed=0)
    whole = TeacherMap.from_maps(maps)
    means = TeacherMap(whole.values, whole.kept, complete=False)
    assert float(visual_map_loss(maps, means, kind="sink_filtered")) < 1e-6
    for kind in ("cosine", "kl", "mse"):
        with pytest.raises(CacheMismatchError, match=f"visual_map_kind={kind}"):
            visual_map_loss(maps, means, kind=kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="kind: expected one of"):
        visual_map_loss(maps, whole, kind="all")  # type: ignore[arg-type]


def test_the_released_loss_is_its_formula():
    """Transcribed line by line from docs/method.md, section 3, with torch's own mean and unbiased std."""
    teacher, student = maps_of(4, 7, 9, seed=0), maps_of(4, 7, 9, seed=1)

    def formula(batch: Tensor) -> Tensor:
        of_samples = []
        for b in range(4):
            of_layers = []
            for layer in range(7):
                s, t = batch[b, layer], teacher[b, layer].double()
                f = (s <= s.mean() + s.std()) & (t <= t.mean() + t.std())
                m = (f & (t != 0)).double()
                s_k = (s * m).sum(0) / m.sum(0).clamp(min=1)
                t_k = (t * m).sum(0) / m.sum(0).clamp(min=1)
                of_layers.append(1 - cosine(s_k, t_k))
            of_samples.append(torch.stack(of_layers).sum())
        return torch.stack(of_samples).mean()

    target = TeacherMap.from_maps(teacher)
    assert_agree(lambda s: sink_filtered_cosine_loss(s, target), formula, student)


@pytest.mark.parametrize("masked", [False, True])
def test_sink_shares_are_the_counted_shares(masked: bool):
    teacher, student = maps_of(3, 2, 7, seed=0), maps_of(3, 2, 7, seed=1)
    teacher[1] = 0
    mask = torch.ones(3, 7, dtype=torch.bool)
    if masked:
        mask[0, 5:] = False
    target = TeacherMap.from_maps(teacher, token_mask=mask)
    pairs, mass = [], []
    for b in (0, 2):
        for g in (0, 1):
            s, t = (side[b, g][mask[b]][:, mask[b]].double() for side in (student, teacher))
            sink = (s > s.mean() + s.std()) | (t > t.mean() + t.std())
            pairs.append(float((sink & (t > 0)).sum() / (t > 0).sum()))
            mass.append(float(t[sink].sum() / t.sum()))
    found = sink_shares(student, target, token_mask=mask if masked else None)
    assert float(found[0]) == pytest.approx(sum(pairs) / 4)
    assert float(found[1]) == pytest.approx(sum(mass) / 4)
    assert 0 < float(found[0]) < float(found[1]) < 1
    nothing = sink_shares(torch.zeros(1, 1, 3, 3), TeacherMap.from_maps(torch.zeros(1, 1, 3, 3)))
    assert [float(value) for value in nothing] == [0, 0]
