"""All codecs by the name that a plan stores."""

from collections.abc import Mapping
from typing import Any

from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.logits import LogitCodec, VisualLogitsCodec
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.tower_attention import TowerAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from vlm_distill_cache.common.errors import CacheFormatError

CODECS: dict[str, type[Codec]] = {
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
    "tower_attention": TowerAttentionCodec,
}


def codec_from_dict(stored: Mapping[str, Any]) -> Codec:
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
