"""What the library's models do to their logits is what the fused losses can do: soft-capping, scales, tied weights."""

import pytest
import torch
from logit_references import select
from loss_checks import normal
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from vlm_distill_cache.stage2_student.losses.fused import fused_losses
from vlm_distill_cache.stage2_student.losses.logits import lm_loss, tail_bucket_loss

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
MODELS = {
    "soft-capped": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.1), {"softcap": 0.1}),
    "multiplied": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.0625), {"logit_scale": 0.0625}),
    "divided": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=8.0), {"logit_scale": 0.125}),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_all_gradients_are_those_of_the_librarys_logits(name):
    model_class, config, options = MODELS[name]
    torch.manual_seed(0)
    model = model_class(config)
    ids = torch.randint(3, 60, (2, 5))
    supervised = torch.tensor([[False, True, True, False, True], [False, False, False, True, True]])
    labels, teacher = torch.randint(0, 60, (5,)), select(normal(5, 60, scale=3))
    logits = model(ids, use_cache=False).logits[supervised]
    (lm_loss(logits, labels) + tail_bucket_loss(logits, teacher)).backward()
    expected = {key: parameter.grad for key, parameter in model.named_parameters()}
    model.zero_grad()
    hidden = model.model(ids, use_cache=False).last_hidden_state[supervised]
    found = fused_losses(hidden, model.get_output_embeddings().weight, labels, teacher, chunk_rows=2, **options)
    found.total.backward()
    torch.testing.assert_close(found.lm, lm_loss(logits, labels).detach())
    assert any(bool(gradient.any()) for gradient in expected.values())
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-4, atol=1e-6, msg=key)
    plain = fused_losses(hidden, model.get_output_embeddings().weight, labels, teacher)
    assert abs(float(plain.lm - found.lm)) > 1e-4  # the option is not without effect here
