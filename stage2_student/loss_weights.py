"""Which losses a phase of training has: weights, and the kind of each. Part of a run's configuration."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from vlm_distill_cache.common.attention.layers import DepthPart, Matching
from vlm_distill_cache.common.cache.document_rules import TEMPERATURES
from vlm_distill_cache.common.errors import ConfigError

LogitKind = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]
AnswerLossKind = Literal["kl", "cosine", "relative", "kl_with_rest", "sink_suppressed"]
VisualColumnsKind = Literal["cosine", "sink_suppressed"]
SINK_SUPPRESSED = "sink_suppressed"
VisualMapKind = Literal["sink_filtered", "cosine", "kl", "mse"]
LayerReduction = Literal["mean", "sum"]
AttentionReduction = Literal["published", "sum", "mean"]
HiddenKind = Literal["relative_mse", "mse", "cosine", "relation"]


def require(ok: bool, name: str, value: object, need: str) -> None:
    """Refuse the value of an option with what it must be."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}; it must be {need}")


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weight of each loss term, and of which kind it is; 0 switches a term off, and its signal is not even read.

    Attributes:
        lm: Cross-entropy on the supervised rows.
        logits: Divergence from the teacher's cached logits.
        answer_attention: Where the answer rows look on the image.
        text_attention: Where all text rows after the image look on it, questions included.
        visual_columns: Mean attention each visual token receives from the visual rows.
        visual_map: The attention of visual tokens on visual tokens.
        all_attention: The paper's A[:, :N_v], visual and text rows as one vector; reads ``visual_map`` and
            ``text_attention``.
        hidden: Hidden states of the cached layers at supervised rows.
        visual_hidden: The same at visual tokens.
        projector_output: What enters the language model at visual tokens.
        visual_logits: Divergence from the teacher's logits at visual tokens.
        temperature: Temperature of ``logits`` and ``visual_logits``, dimensionless; must be cached.
        hidden_kind: Kind of the three losses on hidden states: ``relative_mse``, ``mse`` (plain; ``lm=1-A hidden=A`` is the
            published A * MSE + (1 - A) * CE) and ``cosine`` need the teacher's width, ``relation`` compares each row's
            similarities to the others.
        logit_kind: ``forward_kl``, ``reverse_kl``, ``jsd`` (Jensen-Shannon) or ``tvd`` (total variation).
        answer_kind: Kind of both row losses, answer and text: ``kl`` over the image, ``cosine``, ``relative``
            (rows divided by the sample's mean row), ``kl_with_rest`` (one more cell for the mass off the image), or
            ``sink_suppressed`` (``kl`` of cells times 1 - the cache's sink score: ``cachectl inspect CACHE --sinks``).
        visual_columns_kind: ``cosine``, or ``sink_suppressed`` (the same, of columns times 1 - their sink score).
        visual_map_kind: ``sink_filtered`` (the released code), ``cosine`` (the paper's formula), ``kl`` or ``mse``.
        attention_reduction: Reduction over layers: ``sum``, ``mean``, or ``published``: sum for ``sink_filtered``, else mean.
        matching: Matching of layers: ``group``, ``simple`` or ``adaptive``; the last two need a cache of single layers.
        attention_layers: ``early``, ``middle``, ``late`` or ``all``; none: those the cache was built for.
    """

    lm: float = 1.0
    logits: float = 0.0
    answer_attention: float = 0.0
    text_attention: float = 0.0
    visual_columns: float = 0.0
    visual_map: float = 0.0
    all_attention: float = 0.0
    hidden: float = 0.0
    visual_hidden: float = 0.0
    projector_output: float = 0.0
    visual_logits: float = 0.0
    temperature: float = 1.0
    logit_kind: LogitKind = "forward_kl"
    answer_kind: AnswerLossKind = "kl"
    visual_columns_kind: VisualColumnsKind = "cosine"
    visual_map_kind: VisualMapKind = "sink_filtered"
    hidden_kind: HiddenKind = "relative_mse"
    attention_reduction: AttentionReduction = "published"
    matching: Matching = "group"
    attention_layers: DepthPart | None = None

    def __post_init__(self) -> None:
        for name, value in self.active(everything=True).items():
            require(0 <= value < math.inf, name, value, "a finite weight of 0 or more")
        require(bool(self.active()), "weights", self.active(everything=True), "at least one above 0")
        least, most = TEMPERATURES
        require(
            least <= self.temperature <= most, "temperature", self.temperature, f"{least} to {most} (dimensionless)"
        )

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All terms: a term is a field that is a number, but for the temperature."""
        return tuple(entry.name for entry in fields(cls) if entry.type is float and entry.name != "temperature")

    def active(self, *, everything: bool = False) -> dict[str, float]:
        """Weights by term, those above 0 only unless ``everything``."""
        named = {name: getattr(self, name) for name in self.names()}
        return {name: float(value) for name, value in named.items() if everything or value != 0}

    @property
    def distilled(self) -> tuple[str, ...]:
        """The terms that read a cache, in a fixed order."""
        return tuple(name for name in self.active() if name != "lm")
