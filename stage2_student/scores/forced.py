"""How likely a given answer is when it is decoded token by token, as a model decodes: with fewer visual tokens, for one.

A pass over prompt and answer at once, by which answers are scored elsewhere, sees all visual tokens at every token. Here
``generate`` runs and is made to say the answer, so budgets of visual tokens in decoding (`common.models.tokens.decoding_tokens`)
can be compared by likelihood, and by how often they say what the full student would.

Dims: B batch, A longest answer in tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.tokens.decoding_tokens import decoding_counts
from vlm_distill_cache.data.sample import Sample
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder
from vlm_distill_cache.data.text.generation import (
    GenerationInputs,
    device_of,
    how_to_draw,
    left_padded_inputs,
    own_settings,
    pad_token_id,
)


@dataclass(frozen=True, kw_only=True)
class ForcedDecoding:
    """What a model thought of given answers, on the CPU.

    Attributes:
        log_probs: Of each answer token, nats, float32 ``[B, A]``; 0 behind an answer.
        best: What greedy decoding would have said in its place, int64 ``[B, A]``; -1 behind an answer.
        real: Which are tokens of an answer, bool ``[B, A]``.
        events: At which tokens visual tokens were swapped before it was decided, bool ``[B, A]``.
        swapped: How many came in, int64 ``[B, A]``.
    """

    log_probs: Tensor
    best: Tensor
    real: Tensor
    events: Tensor
    swapped: Tensor

    @property
    def means(self) -> Tensor:
        """Mean log-probability of each answer's tokens, nats, float32 ``[B]``."""
        return self.log_probs.sum(dim=1) / self.real.sum(dim=1)

    def agreement(self, other: "ForcedDecoding") -> Tensor:
        """Share of each answer's tokens at which another decoding of the same answers says the same, float32 ``[B]``."""
        return ((self.best == other.best) & self.real).sum(dim=1) / self.real.sum(dim=1)


def prompt_and_answer(encoder: SampleEncoder, sample: Sample) -> tuple[EncodedSample, list[int]]:
    """A sample's last answer as tokens, its end token included, and the prompt in front of it.

    Raises:
        ModelError: If the sample's turns are independent of each other: it has several prompts.
        SampleError: As of the encoder.
    """
    if sample.independent_turns and len(sample.turns) > 1:
        raise ModelError(
            f"sample {sample.sample_id!r} has {len(sample.turns)} independent turns; give each as a sample"
        )
    prompt, whole = encoder(sample, prompt_only=True), encoder(sample)
    targets = whole.labels[len(prompt.input_ids) - 1 :]
    return prompt, [int(token) for token in targets[targets != IGNORE_INDEX]]


class _Dictated(LogitsProcessor):
    """Lets each step say the next token of each answer, and keeps what the model thought of it."""

    def __init__(self, answers: Tensor) -> None:
        self._answers, self.log_probs, self.best = answers, [], []  # type: tuple[Tensor, list[Tensor], list[Tensor]]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at one step's logits ``[B, V]``, and leave one token possible."""
        token = self._answers[:, len(self.log_probs), None].to(scores.device)
        self.log_probs.append(scores.float().log_softmax(dim=1).gather(1, token)[:, 0].cpu())
        self.best.append(scores.argmax(dim=1).cpu())
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


@torch.inference_mode()
def forced_decoding(
    model: Any,
    encoder: SampleEncoder,
    prompts: Sequence[EncodedSample],
    answers: Sequence[Sequence[int]],
    *,
    inputs: GenerationInputs = left_padded_inputs,
) -> ForcedDecoding:
    """Decode given answers to prompts, in one left-padded batch.

    Args:
        model: Any generating model of the library, or a student.
        encoder: Whose tokenizer made the prompts.
        prompts: Sequences without labels.
        answers: Token ids, at least one each; see `prompt_and_answer`.
        inputs: Makes the model's arguments (`generation_inputs_of` a student).

    Raises:
        ModelError: If an answer is empty, answers and prompts differ in number, or a logit is not a number.
    """
    if len(prompts) != len(answers) or not all(answers):
        raise ModelError(
            f"{len(prompts)} prompts and answers of {[len(one) for one in answers]} tokens; give each prompt one"
        )
    pad_id, lengths = pad_token_id(encoder), torch.tensor([len(one) for one in answers])
    longest = int(lengths.max())
    dictated = _Dictated(torch.tensor([[*one, *[pad_id] * (longest - len(one))] for one in answers]))
    with own_settings(model):
        model.generate(
            **inputs(prompts, pad_id, device_of(model)),
            **how_to_draw(None),
            max_new_tokens=longest,
            num_beams=1,
            pad_token_id=pad_id,
            eos_token_id=None,
            logits_processor=LogitsProcessorList([dictated]),
        )
    real = torch.arange(longest) < lengths[:, None]
    log_probs = torch.stack(dictated.log_probs, dim=1).masked_fill(~real, 0.0)
    if log_probs.isnan().any():
        raise ModelError("the model's logits are not numbers (NaN), so nothing can be scored; train it again")
    counts, swapped = decoding_counts(model), torch.zeros(real.shape, dtype=torch.int64)
    if counts is not None and counts.steps:
        swapped[:, 1:] = torch.stack(counts.swapped, dim=1)
    swapped *= real
    best = torch.stack(dictated.best, dim=1).masked_fill(~real, -1)
    return ForcedDecoding(log_probs=log_probs, best=best, real=real, events=swapped > 0, swapped=swapped)
