"""What scores need of a model: log-probabilities of answers.

Students of any family go through their own interface, other models of the library through their own forward pass.

Dims: B batch, T longest sequence, A supervised rows, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from vlm_distill_cache.common.cache.schema import IGNORE_INDEX
from vlm_distill_cache.data.families.models import row_logits
from vlm_distill_cache.data.text.collate import collate
from vlm_distill_cache.data.text.encoding import EncodedSample
from vlm_distill_cache.data.text.generation import device_of
from vlm_distill_cache.stage2_student.students.library import LibraryStudent
from vlm_distill_cache.stage2_student.students.model import model_inputs_of


def language_model_of(model: Any) -> Any:
    """The decoder whose attention can be captured: our students name it, LLaVA keeps it one level down."""
    inner = getattr(model, "language_model", None)
    return model.base_model.language_model if inner is None else inner


def supervised_logits(model: Any, inputs: Mapping[str, Any], supervised: Tensor) -> Tensor:
    """Logits of the rows that predict answer tokens; other rows never meet the output projection.

    Args:
        model: A student, or any causal model of the library.
        inputs: Its keyword arguments.
        supervised: Bool ``[B, T]``.

    Returns:
        Float ``[A, V]``, batch-row order.
    """
    if isinstance(model, LibraryStudent):
        logits: Tensor = model(**inputs, supervised=supervised, use_cache=False).logits
        return logits
    return row_logits(model, inputs, supervised)


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
    logits = supervised_logits(model, model_inputs_of(model, batch), supervised)
    chosen = logits.gather(1, batch.labels[supervised][:, None])[:, 0].float()
    log_probs = (chosen - logits.float().logsumexp(1)).double().cpu().numpy()  # [A]
    counts = [len(sample.supervised_rows) for sample in samples]
    return [
        (part, sample.segment_ids[sample.supervised_rows])
        for part, sample in zip(np.split(log_probs, np.cumsum(counts)[:-1]), samples, strict=True)
    ]
