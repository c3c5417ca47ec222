"""Codecs: what of a teacher's signal is kept, encode beside decode, described by their own JSON.

`logits` and `answer_attention` are what a supervised row holds by default; `visual_columns` and `visual_map`
are optional. A cache's plan stores each codec's dictionary, and `codec_from_dict` rebuilds it.
"""

from collections.abc import Mapping
from typing import Any

from common.codecs.logits import LOGIT_PRESETS, LogitCodec, SparseLogits
from common.codecs.row_attention import RowAttention, RowAttentionCodec
from common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec
from common.errors import CacheFormatError

AnyCodec = LogitCodec | RowAttentionCodec | VisualColumnsCodec | VisualMapCodec

CODECS: dict[str, type[LogitCodec | RowAttentionCodec | VisualColumnsCodec | VisualMapCodec]] = {
    "logits": LogitCodec,
    "answer_attention": RowAttentionCodec,
    "visual_columns": VisualColumnsCodec,
    "visual_map": VisualMapCodec,
}


def codec_from_dict(stored: Mapping[str, Any]) -> AnyCodec:
    """Rebuild the codec that wrote a dictionary.

    Raises:
        CacheFormatError: If there is no such codec, or its settings are not what it writes.
    """
    name = stored.get("codec")
    if name not in CODECS:
        raise CacheFormatError(
            f"codec {name!r}: expected one of {sorted(CODECS)}; the cache may be from a newer version: "
            "update this software"
        )
    return CODECS[name].from_dict(stored)


__all__ = [
    "CODECS",
    "LOGIT_PRESETS",
    "AnyCodec",
    "LogitCodec",
    "RowAttention",
    "RowAttentionCodec",
    "SparseLogits",
    "VisualColumnsCodec",
    "VisualMapCodec",
    "codec_from_dict",
]
