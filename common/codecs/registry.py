"""All codecs by the name that a plan stores; importing this imports torch, unlike importing the package."""

from collections.abc import Mapping
from typing import Any

from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec, SparseLogits, VisualLogitsCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttention, RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError

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

AnyCodec = AnswersCodec | HiddenCodec | LogitCodec | RowAttentionCodec | VisualColumnsCodec | VisualMapCodec

CODECS: dict[str, type[AnyCodec]] = {
    "answers": AnswersCodec,
    "logits": LogitCodec,
    "answer_attention": RowAttentionCodec,
    "text_attention": TextAttentionCodec,
    "visual_columns": VisualColumnsCodec,
    "visual_map": VisualMapCodec,
    "hidden": HiddenCodec,
    "visual_hidden": VisualHiddenCodec,
    "projector_output": ProjectorOutputCodec,
    "visual_logits": VisualLogitsCodec,
}


def codec_from_dict(stored: Mapping[str, Any]) -> AnyCodec:
    """Rebuild the codec that wrote a dictionary.

    Raises:
        CacheFormatError: If there is no such codec, or its settings are not what it writes.
    """
    name = stored.get("codec")
    if not isinstance(name, str) or name not in CODECS:
        raise CacheFormatError(
            f"codec {name!r}: expected one of {sorted(CODECS)}; the cache may be from a newer version: "
            "update this software"
        )
    return CODECS[name].from_dict(stored)
