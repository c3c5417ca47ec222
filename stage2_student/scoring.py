"""What scores need of a model: log-probabilities of answers, and greedy answers to prompts.

Only the model library's common signature is used (`base_model`, output embeddings, `generate`), so a LLaVA
teacher and our students go the same way.

Dims: B batch, T longest sequence, A supervised rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.schema import IGNORE_INDEX
from data.collate import collate, join_image_inputs
from data.encoding import EncodedSample, SampleEncoder


def device_of(model: Any) -> torch.device:
    """Where the model's first parameter lies."""
    device: torch.device = next(model.parameters()).device
    return device


def language_model_of(model: Any) -> Any:
    """The decoder whose attention can be captured: our students name it, LLaVA keeps it one level down."""
    inner = getattr(model, "language_model", None)
    return model.base_model.language_model if inner is None else inner


def pad_token_id(encoder: SampleEncoder) -> int:
    """The tokenizer's padding id, or its end token's where there is none (masked either way)."""
    tokenizer = encoder.tokenizer
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def supervised_logits(model: Any, inputs: dict[str, Any], supervised: Tensor) -> Tensor:
    """Logits of the rows that predict answer tokens; other rows never meet the output projection.

    Args:
        model: Any causal model with a ``base_model`` and output embeddings.
        inputs: Its keyword arguments.
        supervised: Bool ``[B, T]``.

    Returns:
        Float ``[A, V]``, batch-row order.
    """
    hidden = model.base_model(**inputs, use_cache=False).last_hidden_state  # [B, T, D]
    logits: Tensor = model.get_output_embeddings()(hidden[supervised])
    return logits


def answer_log_probs(
    model: Any, samples: Sequence[EncodedSample], pad_id: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Log-probability of every answer token, and which conversation it belongs to.

    Args:
        model: As for ``supervised_logits``.
        samples: At least one.
        pad_id: Fills shorter sequences.

    Returns:
        For each sample: nats, float64 ``[A_i]``; and the rows' segment ids, int64 ``[A_i]``.
    """
    batch = collate(samples, pad_id).to(device_of(model))
    supervised = batch.labels != IGNORE_INDEX  # [B, T]
    logits = supervised_logits(model, batch.model_inputs(), supervised)
    chosen = logits.gather(1, batch.labels[supervised][:, None])[:, 0].float()
    log_probs = (chosen - logits.float().logsumexp(1)).double().cpu().numpy()  # [A]
    counts = [len(sample.supervised_rows) for sample in samples]
    return [
        (part, sample.segment_ids[sample.supervised_rows])
        for part, sample in zip(np.split(log_probs, np.cumsum(counts)[:-1]), samples, strict=True)
    ]


def generate_answers(
    model: Any, encoder: SampleEncoder, prompts: Sequence[EncodedSample], *, max_new_tokens: int
) -> tuple[list[str], Tensor]:
    """Continue prompts greedily in one left-padded batch.

    Args:
        model: Any generating model of the library.
        encoder: Whose tokenizer made the prompts.
        prompts: Sequences without labels, from ``build_prompt``.
        max_new_tokens: Longest answer.

    Returns:
        The answers without special tokens, and the logits of each first answer token, float32 ``[B, V]`` on
        the CPU.
    """
    device, pad_id = device_of(model), pad_token_id(encoder)
    longest = max(len(prompt) for prompt in prompts)
    input_ids = np.full((len(prompts), longest), pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(prompts), longest), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt.input_ids
        attention_mask[row, longest - len(prompt) :] = 1
    pixels = {name: tensor.to(device) for name, tensor in join_image_inputs(prompts).items()}
    output = model.generate(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(attention_mask).to(device),
        **pixels,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad_id,
        eos_token_id=encoder.tokenizer.eos_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    answers = encoder.tokenizer.batch_decode(output.sequences[:, longest:], skip_special_tokens=True)
    return [answer.strip() for answer in answers], output.logits[0].float().cpu()
