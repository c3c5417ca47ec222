"""MobileVLM V1's projector against plain array arithmetic, and under its published names."""

import numpy as np
import pytest
import torch
from published_factory import LDP_SHAPES

from vlm_distill_cache.common.models.projectors import (
    InvertedResidual,
    LDPProjector,
    build_projector,
    half_grid,
    squeeze_width,
)


def make_projector(width=16, *, dtype=torch.float32):
    torch.manual_seed(0)
    projector = LDPProjector(in_features=8, out_features=width, grid=(6, 6))
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.normal_(std=0.4)
    return projector.to(dtype)


def weights_of(module):
    return {name: value.detach().double().numpy() for name, value in module.state_dict().items()}


def layer_norm(vector, weight, bias):
    return (vector - vector.mean()) / np.sqrt(vector.var() + 1e-5) * weight + bias


def hard_swish(values):
    return values * np.clip(values + 3, 0, 6) / 6


def inverted_residual(plane, weights, *, stride):
    """Channels, rows, columns; one output position at a time."""
    channels, rows, cols = plane.shape
    padded = np.zeros((channels, rows + 2, cols + 2))
    padded[:, 1:-1, 1:-1] = plane
    mixed = np.zeros((channels, -(-rows // stride), -(-cols // stride)))
    for row in range(mixed.shape[1]):
        for col in range(mixed.shape[2]):
            window = padded[:, row * stride : row * stride + 3, col * stride : col * stride + 3]
            position = (window * weights["block.0.0.weight"][:, 0]).sum((1, 2))
            position = layer_norm(position, weights["block.0.1.weight"], weights["block.0.1.bias"])
            mixed[:, row, col] = hard_swish(position)
    mean = mixed.mean((1, 2))
    narrow = np.maximum(weights["block.1.fc1.weight"][:, :, 0, 0] @ mean + weights["block.1.fc1.bias"], 0)
    scale = weights["block.1.fc2.weight"][:, :, 0, 0] @ narrow + weights["block.1.fc2.bias"]
    mixed *= (np.clip(scale + 3, 0, 6) / 6)[:, None, None]
    out = np.zeros_like(mixed)
    for row in range(mixed.shape[1]):
        for col in range(mixed.shape[2]):
            position = weights["block.2.0.weight"][:, :, 0, 0] @ mixed[:, row, col]
            out[:, row, col] = layer_norm(position, weights["block.2.1.weight"], weights["block.2.1.bias"])
    return plane + out if stride == 1 else out


def reference(features, weights):
    """One image, ``[36, 8]``."""
    from math import erf, sqrt

    hidden = features @ weights["model.mlp.1.weight"].T + weights["model.mlp.1.bias"]
    hidden = hidden * np.vectorize(lambda value: 0.5 * (1 + erf(value / sqrt(2))))(hidden)
    hidden = hidden @ weights["model.mlp.3.weight"].T + weights["model.mlp.3.bias"]
    plane = hidden.T.reshape(-1, 6, 6)
    for block, stride in ((1, 1), (2, 2)):
        prefix = f"model.mb_block.{block}."
        plane = inverted_residual(
            plane,
            {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)},
            stride=stride,
        )
    return plane.reshape(plane.shape[0], -1).T


def test_ldp_equals_the_published_formula_written_out_for_each_token():
    projector = make_projector()
    features = torch.randn(2, 36, 8)
    expected = np.stack([reference(one.double().numpy(), weights_of(projector)) for one in features])
    np.testing.assert_allclose(projector(features).detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert projector.out_grid == (3, 3)


def test_ldp_in_half_precision_follows_the_same_formula():
    projector = make_projector(dtype=torch.bfloat16)
    features = torch.randn(1, 36, 8).bfloat16()
    expected = reference(features[0].double().numpy(), weights_of(projector))
    found = projector(features)[0].detach().double().numpy()
    assert np.abs(found - expected).max() < 0.08 * np.abs(expected).max()


def test_gradients_reach_every_weight():
    projector = make_projector()
    projector(torch.randn(2, 36, 8)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in projector.parameters())


def test_names_and_shapes_are_the_published_ones():
    projector = build_projector("ldpnet", in_features=16, out_features=32, grid=(6, 6))
    found = {f"model.mm_projector.{name}": tuple(value.shape) for name, value in projector.state_dict().items()}
    assert found == LDP_SHAPES


def test_ldp_of_the_published_size_gives_144_tokens_and_18_94_million_weights():
    with torch.device("meta"):
        projector = LDPProjector(in_features=1024, out_features=2048, grid=(24, 24))
        assert projector(torch.empty(1, 576, 1024)).shape == (1, 144, 2048)
    # mlp 2.1 + 4.2 M; a block: 9 x 2048 + 4 x 2048 of norms + 2 x 2048 x 512 + 2560 + 2048 x 2048
    block = 9 * 2048 + 4 * 2048 + 2 * 2048 * 512 + 2560 + 2048 * 2048
    mlp = 1024 * 2048 + 2048 + 2048 * 2048 + 2048
    assert sum(value.numel() for value in projector.parameters()) == mlp + 2 * block == 18_936_832


@pytest.mark.parametrize(("width", "narrow"), [(2048, 512), (2560, 640), (32, 8), (16, 8), (100, 24), (88, 24)])
def test_the_squeeze_is_a_quarter_in_steps_of_eight(width, narrow):
    assert squeeze_width(width) == narrow


def test_an_odd_side_is_rounded_up_at_stride_two():
    block = InvertedResidual(8, stride=2)
    assert block(torch.randn(1, 8, 5, 7)).shape[2:] == half_grid((5, 7)) == (3, 4)
