"""Codecs: what of a teacher's signal is kept, encode beside decode, described by their own JSON.

`logits` and `answer_attention` are what a supervised row holds by default; `text_attention`, `visual_columns`
and `visual_map` are optional. A cache's plan stores each codec's dictionary, and `codec_from_dict` rebuilds it.

The names below come from `common.codecs.registry` on first use: torch is imported then, and not by those who
only want the numpy tables of `common.codecs.quantise`, as `cachectl` does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_distill_cache.common.codecs.registry import (
        CODECS,
        LOGIT_PRESETS,
        AnswersCodec,
        AnyCodec,
        HiddenCodec,
        LogitCodec,
        ProjectorOutputCodec,
        RowAttention,
        RowAttentionCodec,
        SparseLogits,
        TextAttentionCodec,
        VisualColumnsCodec,
        VisualHiddenCodec,
        VisualLogitsCodec,
        VisualMapCodec,
        codec_from_dict,
    )

__all__ = [
    "CODECS",
    "LOGIT_PRESETS",
    "AnswersCodec",
    "AnyCodec",
    "HiddenCodec",
    "LogitCodec",
    "ProjectorOutputCodec",
    "RowAttention",
    "RowAttentionCodec",
    "SparseLogits",
    "TextAttentionCodec",
    "VisualColumnsCodec",
    "VisualHiddenCodec",
    "VisualLogitsCodec",
    "VisualMapCodec",
    "codec_from_dict",
]


def __getattr__(name: str) -> Any:
    """Fetch a codec's name from the registry."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vlm_distill_cache.common.codecs import registry

    return getattr(registry, name)
