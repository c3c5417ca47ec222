"""Checkpointed decoder layers: the same run to the bit, attention losses included, in less memory."""

from dataclasses import replace

import pytest
import torch
from lora_runs import equal_weights, losses, make_config
from tiny_students import library_student, mobilevlm_student
from torch import nn

from vlm_distill_cache.common.attention.capture import AttentionCapture, AttentionRequest
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.stage2_student.train import train
from vlm_distill_cache.stage2_student.training.parts import add_adapters, checkpoint_layers

ROWS, KEYS = torch.tensor([[9, 10, -1]]), torch.tensor([[1, 2, 3, -1]])


def run_once(student, inputs, *, kept=None):
    """Loss on logits, attention and hidden states; its gradients by name."""

    def count(tensor):
        if kept is not None:
            kept.append(tensor.numel())
        return tensor

    capture = AttentionCapture(student.language_model)
    student.train()
    request = {"a": AttentionRequest(ROWS, KEYS, ((0,), (0, 1)))}
    with (
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        capture.record(request) as maps,
    ):
        logits = student(**inputs, use_cache=False).logits
    loss = logits.square().mean() + maps["a"].square().sum()
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("make", [mobilevlm_student, library_student])
def test_loss_and_gradients_with_recorded_attention_are_those_without_checkpointing(make, adapters):
    found = []
    for checkpointed in (False, True):
        student, inputs = make()
        student.trainable_parameters("dft")
        if adapters:
            add_adapters(student, rank=2, alpha=4, dropout=0.0, seed=0)
        if checkpointed:
            checkpoint_layers(student)
        found.append(run_once(student, inputs))
    (loss, gradients), (other_loss, other_gradients) = found
    assert torch.equal(loss, other_loss)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(other_gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_much_less_is_kept_for_the_backward_pass():
    kept = {}
    for checkpointed in (False, True):
        student, inputs = mobilevlm_student()
        student.trainable_parameters("dft")
        if checkpointed:
            checkpoint_layers(student)
        run_once(student, inputs, kept=kept.setdefault(checkpointed, []))
    assert sum(kept[True]) < sum(kept[False]) / 4


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_and_goes_on_from_the_others_checkpoints(tiny_cache, tmp_path):
    config = make_config(tiny_cache[0], tmp_path / "plain")
    plain = train(config)
    other = replace(config, output=str(tmp_path / "checkpointed"), gradient_checkpointing=True)
    found = train(other)
    for one, two in zip(losses(plain.log), losses(found.log), strict=True):
        assert one == {key: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for key, v in two.items()}
    again = train(replace(config, gradient_checkpointing=True))  # finished: nothing is trained
    assert equal_weights(again.model, plain.model)


def test_layers_that_cannot_be_checkpointed_are_refused():
    student = nn.Module()
    student.language_model = nn.Module()
    student.language_model.layers = nn.ModuleList([nn.Linear(2, 2)])
    with pytest.raises(ModelError, match=r"Linear is no layer.*micro_batch_size"):
        checkpoint_layers(student)
