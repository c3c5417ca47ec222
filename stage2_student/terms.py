"""Names of the loss terms that read a teacher cache, of their kinds, and of the cached signals each term reads."""

from collections.abc import Iterable
from typing import Literal

LogitKind = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
AnswerLossKind = Literal["kl", "cosine", "relative", "kl_with_rest"]
VisualMapKind = Literal["sink_filtered", "cosine", "kl", "mse"]
LayerReduction = Literal["mean", "sum"]
AttentionReduction = Literal["published", "sum", "mean"]
HiddenKind = Literal["relative_mse", "cosine", "relation"]

ATTENTION_SIGNALS = ("answer_attention", "visual_columns", "visual_map", "text_attention")
ROW_SIGNALS = ("answer_attention", "text_attention")
"""Those with a row per position of the text; the others have one map an image."""
ALL_ROWS = "all_attention"
"""The loss of visual and text rows together: the paper's A[:, :N_v]; it reads two signals."""
ATTENTION_TERMS = (*ATTENTION_SIGNALS, ALL_ROWS)
FEATURE_TERMS = ("hidden", "visual_hidden", "projector_output", "visual_logits")
"""Hidden states at supervised rows and at visual tokens, what enters the language model there, logits there."""


def cached_signals(terms: Iterable[str]) -> tuple[str, ...]:
    """The cache's signals that some loss terms read, without repetition; `lm` reads none."""
    read = [
        ("visual_map", "text_attention") if term == ALL_ROWS else (term,) for term in terms if term != "lm"
    ]
    return tuple(dict.fromkeys(signal for signals in read for signal in signals))
