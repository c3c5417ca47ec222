"""What can be changed in a student, by name; apart, so that beside its weights lies the code of its own changes alone."""

from collections.abc import Callable, Mapping
from typing import Any

from vlm_distill_cache.common.models.layer_sizes import apply_layer_sizes
from vlm_distill_cache.common.models.tokens.decoding_tokens import decode_with_fewer
from vlm_distill_cache.common.models.tokens.fewer_tokens import apply_visual_tokens

APPLIED: dict[str, Callable[[Any, Mapping[str, str], Any], None]] = {
    "decoding_tokens": decode_with_fewer,
    "layer_sizes": apply_layer_sizes,
    "visual_tokens": apply_visual_tokens,
}
"""What applies one change to a model without values or with them, given its parts' paths and what is stored."""
