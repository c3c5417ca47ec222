"""Projectors: grids, published formulas, published key names, and what stays frozen."""

import pytest
import torch
from torch import nn

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.projectors import (
    LDPv2Projector,
    MlpProjector,
    TeacherAdapter,
    build_projector,
    half_grid,
    pool_grid,
)

TEACHER = {"act": "gelu", "in": 8, "hidden": 12, "out": 12}


@pytest.mark.parametrize(("grid", "half"), [((24, 24), (12, 12)), ((6, 6), (3, 3)), ((27, 27), (14, 14))])
def test_half_grid_quarters_the_tokens_and_rounds_odd_sides_up(grid, half):
    assert half_grid(grid) == half


def test_pool_grid_equals_a_loop_over_2x2_blocks():
    tokens = torch.randn(2, 24, 5)
    pooled = pool_grid(tokens, (4, 6), (2, 3))
    for row in range(2):
        for column in range(3):
            block = [(2 * row + i) * 6 + 2 * column + j for i in range(2) for j in range(2)]
            torch.testing.assert_close(pooled[:, row * 3 + column], tokens[:, block].mean(1))


def test_ldpv2_equals_the_published_formula_written_out_for_each_token():
    torch.manual_seed(0)
    projector = LDPv2Projector(in_features=8, out_features=10, grid=(6, 6))
    features = torch.randn(2, 36, 8)
    first, second = projector.mlp.mlp[0], projector.mlp.mlp[2]
    conv = projector.peg.peg[0]
    hidden = nn.functional.gelu(features @ first.weight.T + first.bias) @ second.weight.T + second.bias
    cells = torch.stack(
        [
            hidden.reshape(2, 6, 6, 10)[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((1, 2))
            for r in range(3)
            for c in range(3)
        ],
        1,
    )
    plane = cells.reshape(2, 3, 3, 10)
    expected = torch.empty_like(plane)
    for row in range(3):
        for column in range(3):
            total = plane[:, row, column] + conv.bias
            for i in (-1, 0, 1):
                for j in (-1, 0, 1):
                    if 0 <= row + i < 3 and 0 <= column + j < 3:
                        total = total + plane[:, row + i, column + j] * conv.weight[:, 0, i + 1, j + 1]
            expected[:, row, column] = total
    torch.testing.assert_close(projector(features), expected.reshape(2, 9, 10))
    assert projector.out_grid == (3, 3)


def test_ldpv2_of_the_published_size_gives_144_tokens_under_the_published_keys():
    with torch.device("meta"):
        projector = LDPv2Projector(in_features=1024, out_features=2048, grid=(24, 24))
        assert projector(torch.empty(1, 576, 1024)).shape == (1, 144, 2048)
    shapes = {name: tuple(value.shape) for name, value in projector.state_dict().items()}
    assert shapes == {
        "mlp.mlp.0.weight": (2048, 1024),
        "mlp.mlp.0.bias": (2048,),
        "mlp.mlp.2.weight": (2048, 2048),
        "mlp.mlp.2.bias": (2048,),
        "peg.peg.0.weight": (2048, 1, 3, 3),
        "peg.peg.0.bias": (2048,),
    }


def test_mlp_keeps_the_grid():
    projector = build_projector("mlp", in_features=8, out_features=10, grid=(6, 6))
    assert isinstance(projector, MlpProjector)
    assert projector.out_grid == (6, 6)
    assert projector(torch.randn(2, 36, 8)).shape == (2, 36, 10)
    assert set(projector.state_dict()) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize(("pool", "grid"), [(False, (6, 6)), (True, (3, 3))])
def test_taf_is_the_teachers_projector_then_one_linear_layer(pool, grid):
    projector = build_projector(
        "taf",
        in_features=8,
        out_features=10,
        grid=(6, 6),
        teacher_projector=TEACHER,
        pool_teacher_tokens=pool,
    )
    assert isinstance(projector, TeacherAdapter)
    features = torch.randn(2, 36, 8)
    teacher = projector.teacher
    tokens = teacher.linear_2(nn.functional.gelu(teacher.linear_1(features)))
    if pool:
        tokens = tokens.reshape(2, 3, 2, 3, 2, 12).mean((2, 4)).reshape(2, 9, 12)
    torch.testing.assert_close(projector(features), projector.post(tokens))
    assert projector.out_grid == grid


def test_a_teachers_projector_without_biases_is_rebuilt_without_them():
    projector = build_projector(
        "taf", in_features=8, out_features=10, grid=(2, 2), teacher_projector=TEACHER | {"bias": False}
    )
    assert set(projector.state_dict()) == {
        "teacher.linear_1.weight",
        "teacher.linear_2.weight",
        "post.weight",
        "post.bias",
    }


def test_taf_sends_no_gradient_into_the_teachers_projector():
    projector = build_projector("taf", in_features=8, out_features=10, grid=(2, 2), teacher_projector=TEACHER)
    projector(torch.randn(1, 4, 8)).sum().backward()
    assert {name for name, value in projector.named_parameters() if value.grad is not None} == {
        "post.weight",
        "post.bias",
    }


@pytest.mark.parametrize(
    ("projector_type", "teacher", "message"),
    [
        ("qformer", None, "choose one of ldpnet, ldpnetv2, mlp, taf"),
        ("taf", None, "needs the teacher's projector"),
        ("taf", {**TEACHER, "in": 9}, "reads width 9"),
        ("taf", {**TEACHER, "act": "wavy"}, "unknown activation 'wavy'"),
    ],
)
def test_unusable_projectors_are_refused_with_the_choices(projector_type, teacher, message):
    with pytest.raises(ModelError, match=message):
        build_projector(projector_type, in_features=8, out_features=10, grid=(2, 2), teacher_projector=teacher)
