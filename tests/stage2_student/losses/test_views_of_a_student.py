"""A real student shows each picture's own attention: what is recorded by view are blocks of the whole map, gradients included."""

from types import SimpleNamespace

import pytest
import torch
from tiny_students import IMAGE_TOKEN_ID, mobilevlm_student

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.attention.tiles import View, grid_tile
from vlm_distill_cache.stage2_student.losses.attention_targets import Views, views_of_student

GROUPS = ((0,), (0, 1))


@pytest.fixture(scope="module")
def batch():
    """MobileVLM's way with several pictures, one behind the other or apart: a sample with two, one with one, a text."""
    model, _ = mobilevlm_student()
    torch.manual_seed(3)
    ids = torch.randint(1, 39, (3, 14))
    for row, places in ((0, (1, 2, 3, 4, 7, 8, 9, 10)), (1, (2, 3, 4, 5))):
        ids[row, list(places)] = IMAGE_TOKEN_ID
    keys = torch.full((3, 8), -1)
    keys[0], keys[1, :4] = torch.tensor([1, 2, 3, 4, 7, 8, 9, 10]), torch.tensor([2, 3, 4, 5])
    inputs = {"input_ids": ids, "pixel_values": torch.randn(3, 3, 24, 24)}
    two = (grid_tile(2, 2), grid_tile(2, 2, View((1.0, 2.0))))
    alone = Views(((0, 0, 4),), (0,), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    views = Views.joined([views_of_student(two), alone], [0, 1])
    return model, inputs, SimpleNamespace(keys=keys), views


def test_views_are_blocks_of_the_whole_map(batch):
    model, inputs, of, views = batch
    whole = {"whole": AttentionRequest(of.keys, of.keys, GROUPS)}
    weights = torch.rand(len(views.tokens), views.widest)
    requests = {**whole, **views.requests("visual", of, GROUPS), **views.requests("columns", of, GROUPS, weights)}
    with AttentionCapture(model.language_model).record(requests) as maps:
        model(**inputs)
    assert views.tokens == ((0, 0, 4), (0, 4, 8), (1, 0, 4))
    found, sums = views.seen("visual", maps), views.seen("columns", maps, summed=True)
    for view, (row, first, end) in enumerate(views.tokens):
        block = maps["whole"][row, :, first:end, first:end]
        torch.testing.assert_close(found[view], block)
        torch.testing.assert_close(sums[view, :, 0], (weights[view, None, :, None] * block).sum(dim=1))
    assert bool(found.detach().any())
    leaf = next(model.language_model.parameters())
    gradients = [
        torch.autograd.grad(loss, leaf, retain_graph=True)[0]
        for loss in (
            found.square().sum(),
            sum(maps["whole"][row, :, a:b, a:b].square().sum() for row, a, b in views.tokens),
        )
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
