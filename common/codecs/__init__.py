"""Codecs: what of a teacher's signal is kept, encode beside decode, described by their own JSON.

`logits` and `answer_attention` are what a supervised row holds by default; all others are optional. A cache's plan
stores each codec's dictionary, and `codec_from_dict` rebuilds it. All of this is numpy; what is decoded becomes tensors
in `common.codecs.live`, which alone imports torch.
"""
