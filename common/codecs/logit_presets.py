"""Named settings of the logit codec; without torch, so that a command line checks a name before it loads it.

`floor` is the probability below which tokens are dropped, `min_k` and `max_k` bound the entries of a row. What each
costs and loses is measured by `make bench-codec`.
"""

import re
from typing import Any

from vlm_distill_cache.common.errors import ConfigError

_COMPACT = {"gap_steps": True, "balanced": True}
LOGIT_PRESETS: dict[str, dict[str, Any]] = {
    "lean": {"floor": 1e-3, "min_k": 4, "max_k": 64, **_COMPACT},
    "default": {"floor": 3e-4, "min_k": 8, "max_k": 64, **_COMPACT},
    "wide": {"floor": 1e-4, "min_k": 8, "max_k": 64, **_COMPACT},
    "full": {"floor": 3e-5, "min_k": 8, "max_k": 255, **_COMPACT},
    "exact": {"floor": 0.0, "min_k": 1, "max_k": 255, "exact": True},
}

MAX_ENTRIES = 255
"""Most entries of a row: `entry_count` is one byte."""

_FIXED = re.compile(r"fixed:([0-9]{1,4})")


def preset_settings(name: str) -> dict[str, Any]:
    """The codec settings of a preset.

    Args:
        name: One of `LOGIT_PRESETS`, or `fixed:K`: the K most likely tokens of every row. Such caches are nested:
            the first k entries of each row are the cache of `fixed:k` (`common.nested`).

    Raises:
        ConfigError: If there is no such preset; the message names those that exist.
    """
    if name in LOGIT_PRESETS:
        return dict(LOGIT_PRESETS[name])
    match = _FIXED.fullmatch(name) if isinstance(name, str) else None
    if match and 2 <= int(match[1]) <= MAX_ENTRIES:
        count = int(match[1])
        return {"floor": 0.0, "min_k": count, "max_k": count, **_COMPACT}
    raise ConfigError(
        f"logit preset: expected one of {sorted(LOGIT_PRESETS)} or 'fixed:K' with K from 2 to {MAX_ENTRIES} "
        f"(such as 'fixed:32'), got {name!r}"
    )
