"""Rows handed on inside a student's pass, with what it says of its logits, give the logits it would have held."""

import pytest
import torch
from test_library_student import make_batch, opened  # noqa: F401  (a fixture)
from tiny_families import TINY
from torch import nn

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.stage2_student.losses.fused import fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss


@pytest.mark.parametrize("name", TINY)
@pytest.mark.slow(quick=("llava", "qwen2_vl", "paligemma"))
def test_every_familys_fused_loss_is_that_of_its_own_logits(opened, name):  # noqa: F811
    student, encoder = opened(name)
    batch = make_batch(encoder)
    supervised = batch.labels != IGNORE_INDEX
    labels = batch.labels[supervised]
    inputs = student.model.model_inputs(batch)
    settings = student.model.fused_settings
    assert settings is not None
    calls = []

    def on_rows(hidden, head):
        calls.append(hidden.shape[0])
        return fused_losses(hidden, head.weight, labels, None, bias=head.bias, **settings)

    found, gradients = [], []
    for total in (
        lambda: student.model(**inputs, supervised=supervised, on_rows=on_rows, use_cache=False).total,
        lambda: lm_loss(student.model(**inputs, supervised=supervised, use_cache=False).logits, labels),
    ):
        student.model.zero_grad()
        loss = total()
        loss.backward()
        found.append(loss.detach())
        gradients.append({n: p.grad.clone() for n, p in student.model.named_parameters() if p.grad is not None})
    student.model.zero_grad()
    assert calls == [len(labels)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)
    assert gradients[0].keys() == gradients[1].keys()
    for key, wanted in gradients[1].items():
        torch.testing.assert_close(gradients[0][key], wanted, atol=1e-5 + 1e-4 * float(wanted.abs().max()), rtol=1e-3)


def test_a_projection_that_is_no_plain_linear_layer_is_not_fused(opened):  # noqa: F811
    student, _ = opened("llava_next")

    class Quantised(nn.Linear):
        """As bitsandbytes' layers are."""

    head = student.model.get_output_embeddings()
    student.model.model.lm_head = Quantised(head.in_features, head.out_features, bias=False)
    try:
        assert student.model.fused_settings is None
    finally:
        student.model.model.lm_head = head
