"""How the loss tests compare: value and gradient against a float64 reference differentiated by autograd."""

import torch
from torch import Tensor

from vlm_distill_cache.stage2_student.loss_weights import LossWeights
from vlm_distill_cache.stage2_student.losses.objective import Objective


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(loss, student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    assert value.dtype == torch.float32
    return value.detach(), leaf.grad


def assert_agree(loss, reference, student: Tensor, *, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    """Same value and gradient as a float64 reference differentiated by autograd."""
    value, gradient = value_and_gradient(loss, student)
    leaf = student.detach().double().requires_grad_()
    expected = reference(leaf)
    expected.backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=rtol, atol=atol)


def maps_of(samples: int, groups: int, tokens: int, *, seed: int) -> Tensor:
    scores = normal(samples, groups, tokens, tokens, seed=seed, scale=2)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return 0.4 * scores.masked_fill(future, -torch.inf).softmax(-1)


def cosine(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right) / (left.norm() * right.norm())


def make_objective(weights, *, groups=(), complete=True, **kinds) -> Objective:
    """An objective of these weights and no others; `complete`: whether cached maps hold each pair's own value."""
    losses = LossWeights(**{"lm": 0.0, **weights}, **kinds)
    return Objective(losses=losses, groups=groups, fits={"visual_map": complete})
