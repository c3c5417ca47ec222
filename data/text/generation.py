"""A model's own answers to prompts, in one left-padded batch: for scores, and for answers that a teacher writes.

Dims: B batch, T longest prompt, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vlm_distill_cache.data.sample import Question
from vlm_distill_cache.data.text.collate import Batch, collate
from vlm_distill_cache.data.text.encoding import EncodedSample, SampleEncoder, build_prompt

GenerationInputs = Callable[[Sequence[EncodedSample], int, torch.device], Mapping[str, Any]]
"""From prompts, padding id and device to the keyword arguments of ``generate``."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn; greedy without it.

    Attributes:
        temperature: Above 0, dimensionless.
        top_p: Smallest set of tokens with this share of the mass, in (0, 1].
        seed: Of this batch alone: the numbers do not depend on what ran before.
    """

    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Answers of one batch.

    Attributes:
        texts: Without special tokens, stripped.
        finished: Whether each ended by itself, rather than at the longest length.
        finite: Whether the model's logits were numbers throughout.
        first_logits: Of each first answer token, float32 ``[B, V]`` on the CPU.
    """

    texts: tuple[str, ...]
    finished: tuple[bool, ...]
    finite: tuple[bool, ...]
    first_logits: Tensor


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter lies."""
    device: torch.device = next(model.parameters()).device
    return device


def pad_token_id(encoder: SampleEncoder) -> int:
    """The tokenizer's padding id, or its end token's where there is none (masked either way)."""
    tokenizer = encoder.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def left_padded(batch: Batch, pad_id: int) -> Batch:
    """The same prompts with their padding in front, as generation needs it.

    Args:
        batch: As ``collate`` pads it, on the right; not packed, without labels.
        pad_id: Fills the front of shorter prompts.
    """
    longest = batch.input_ids.shape[1]

    def roll(rows: Tensor, fill: int) -> Tensor:
        moved = torch.full_like(rows, fill)
        for index, length in enumerate(batch.lengths):
            moved[index, longest - length :] = rows[index, :length]
        return moved

    return replace(
        batch,
        input_ids=roll(batch.input_ids, pad_id),
        attention_mask=roll(batch.attention_mask, 0),
        position_ids=roll(batch.position_ids, 0),
        visual_mask=roll(batch.visual_mask, 0),
    )


def left_padded_inputs(prompts: Sequence[EncodedSample], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Arguments of ``generate`` for a model without peculiarities: ids and mask ``[B, T]``, and the pictures."""
    batch = left_padded(collate(prompts, pad_id), pad_id).to(device)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long(), **batch.image_inputs}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Tokens that continue prompts, int64 ``[B, new]`` on the CPU; ``finite`` and ``first_logits`` as of `Generated`."""

    tokens: Tensor
    finite: tuple[bool, ...]
    first_logits: Tensor


def draw_tokens(
    model: Any,
    arguments: Mapping[str, Any],
    *,
    max_new_tokens: int,
    sampling: Sampling | None,
    pad_id: int,
    end: Sequence[int],
) -> Drawn:
    """Continue prompts in one batch, token by token.

    Args:
        model: Any generating model of the library.
        arguments: Of its ``generate``, on its device.
        max_new_tokens: Longest continuation, its end token included.
        sampling: None: greedy.
        pad_id: Behind the end of those that are shorter.
        end: Tokens that end one.
    """
    device, watch = device_of(model), _Watch(len(arguments["input_ids"]))
    with own_settings(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        if sampling is not None:
            torch.manual_seed(sampling.seed)
        output = model.generate(
            **arguments,
            **how_to_draw(sampling),
            max_new_tokens=max_new_tokens,
            num_beams=1,
            pad_token_id=pad_id,
            eos_token_id=list(end),
            logits_processor=LogitsProcessorList([watch]),
        )
    made = output[:, arguments["input_ids"].shape[1] :].cpu()  # [B, new]
    return Drawn(tokens=made, finite=tuple(watch.finite.tolist()), first_logits=watch.first)


def generate_answers(
    model: Any,
    encoder: SampleEncoder,
    prompts: Sequence[EncodedSample],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    inputs: GenerationInputs = left_padded_inputs,
    draw: Callable[..., Drawn] | None = None,
) -> Generated:
    """Continue prompts in one batch.

    Args:
        model: Any generating model of the library.
        encoder: Whose tokenizer made the prompts.
        prompts: Sequences without labels, from ``build_prompt``.
        max_new_tokens: Longest answer, its end token included.
        sampling: None: greedy.
        inputs: Makes the model's arguments.
        draw: Of those, what `draw_tokens` gives; None: the model, by itself.
    """
    device, pad_id = device_of(model), pad_token_id(encoder)
    arguments, end = inputs(prompts, pad_id, device), encoder.end_token_ids
    draw = draw or partial(draw_tokens, model)
    drawn = draw(arguments, max_new_tokens=max_new_tokens, sampling=sampling, pad_id=pad_id, end=end)
    texts = encoder.tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)
    return Generated(
        texts=tuple(text.strip() for text in texts),
        finished=tuple(bool(row) for row in torch.isin(drawn.tokens, torch.tensor(end)).any(dim=1)),
        finite=drawn.finite,
        first_logits=drawn.first_logits,
    )


class _Watch(LogitsProcessor):
    """Keeps the first step's logits, not those of all steps, and lets the others go on when one prompt fails."""

    def __init__(self, rows: int) -> None:
        self.first = torch.zeros(rows, 0)
        self.finite = torch.ones(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at one step's scores ``[B, V]``; those of a prompt that has NaN or +inf become 0."""
        if not self.first.shape[1]:
            self.first = scores.float().cpu()
        bad = scores.isnan().any(dim=1) | scores.isposinf().any(dim=1)
        self.finite &= ~bad.cpu()
        return scores.masked_fill(bad[:, None], 0.0)


@contextmanager
def own_settings(model: Any) -> Iterator[None]:
    """Generate by what is asked for here alone: a checkpoint's generation_config.json would suppress or favour tokens."""
    # A student of the library's is a wrapper around its model.
    holder: Any = model if hasattr(model, "generation_config") else getattr(model, "model", model)
    kept = getattr(holder, "generation_config", None)
    holder.generation_config = GenerationConfig()
    try:
        yield
    finally:
        holder.generation_config = kept


def how_to_draw(sampling: Sampling | None) -> dict[str, Any]:
    """Arguments of ``generate``; None: greedy."""
    if sampling is None:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {
        "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0,
    }  # fmt: skip


def prompt_of(encoder: SampleEncoder, item: Question) -> EncodedSample:
    """`build_prompt` of an item, with all of its pictures and videos."""
    return build_prompt(encoder, item.image, item.question, item.system, further=item.further, places=item.places)
