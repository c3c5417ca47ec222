"""Every loss on cached signals, by the name that options, logs and weights give it."""

from collections.abc import Iterable

from vlm_distill_cache.stage2_student.batches.signals import LossTerm
from vlm_distill_cache.stage2_student.losses.attention_terms import AllRowsTerm, ColumnsTerm, MapTerm, RowTerm
from vlm_distill_cache.stage2_student.losses.feature_terms import HiddenTerm, LogitTerm, VisualLogitTerm

TERMS: dict[str, LossTerm] = {
    "logits": LogitTerm(reads=("logits",), at_images=False),
    "answer_attention": RowTerm(reads=("answer_attention",), of="answer"),
    "visual_columns": ColumnsTerm(reads=("visual_columns",), of_picture=True),
    "visual_map": MapTerm(reads=("visual_map",), of_picture=True),
    "text_attention": RowTerm(reads=("text_attention",), of="text"),
    "all_attention": AllRowsTerm(reads=("visual_map", "text_attention")),
    "hidden": HiddenTerm(reads=("hidden",), at_images=False),
    "visual_hidden": HiddenTerm(reads=("visual_hidden",), of_picture=True),
    "projector_output": HiddenTerm(reads=("projector_output",), of_picture=True),
    "visual_logits": VisualLogitTerm(reads=("visual_logits",)),
}
"""In the order of computation and of the log."""


def choose_terms(names: Iterable[str]) -> dict[str, LossTerm]:
    """The terms of some names, in the order of `TERMS`; ``lm``, which reads no cache, is passed over."""
    wanted = {*names}
    return {name: term for name, term in TERMS.items() if name in wanted}
