"""Codecs: what of a teacher's signal is kept, encode beside decode, described by their own JSON.

`logits` and `answer_attention` are what a supervised row holds by default; all others are optional. A cache's plan
stores each codec's dictionary, and `codec_from_dict` rebuilds it. All of this is numpy; what is decoded becomes tensors
in `common.codecs.live`, which alone imports torch.
"""

from vlm_distill_cache.common.codecs.answers import AnswersCodec
from vlm_distill_cache.common.codecs.description import Codec
from vlm_distill_cache.common.codecs.hidden_states import HiddenCodec, ProjectorOutputCodec, VisualHiddenCodec
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec, VisualLogitsCodec
from vlm_distill_cache.common.codecs.registry import CODECS, codec_from_dict
from vlm_distill_cache.common.codecs.row_attention import RowAttentionCodec, TextAttentionCodec
from vlm_distill_cache.common.codecs.visual_map import VisualColumnsCodec, VisualMapCodec

__all__ = [
    "CODECS",
    "LOGIT_PRESETS",
    "AnswersCodec",
    "Codec",
    "HiddenCodec",
    "LogitCodec",
    "ProjectorOutputCodec",
    "RowAttentionCodec",
    "TextAttentionCodec",
    "VisualColumnsCodec",
    "VisualHiddenCodec",
    "VisualLogitsCodec",
    "VisualMapCodec",
    "codec_from_dict",
]
