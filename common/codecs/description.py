"""How a codec describes itself: its dictionary is stored in a cache's plan and rebuilds it exactly.

A codec is a frozen dataclass that can only be built valid, so a reader repeats no settings by hand and a
damaged or newer plan is refused instead of guessed at.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError

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
            the first k entries of each row are the cache of `fixed:k` (`common.tools.select`).

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


T = TypeVar("T")


def codec_to_dict(codec: Any, signal: str) -> dict[str, Any]:
    """Describe a codec: its signal under `codec`, then its settings as JSON values."""
    settings = {field.name: getattr(codec, field.name) for field in dataclasses.fields(codec)}
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"codec": signal, **plain}


def codec_from_settings(cls: type[T], signal: str, stored: Mapping[str, Any]) -> T:
    """Rebuild a codec from its stored dictionary.

    Args:
        cls: The codec's dataclass.
        signal: Name that `stored["codec"]` must carry.
        stored: What `to_dict` wrote.

    Returns:
        A codec equal to the one that wrote the dictionary.

    Raises:
        CacheFormatError: If the name, the set of settings or one of their values is not what `cls` writes.
    """
    if stored.get("codec") != signal:
        raise CacheFormatError(
            f"codec of signal {signal!r}: expected codec {signal!r}, got {stored.get('codec')!r}; "
            "the plan is damaged or from another version: rebuild the cache or update this software"
        )
    expected = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    found = set(stored) - {"codec"}
    if expected != found:
        raise CacheFormatError(
            f"codec {signal!r}: expected settings {sorted(expected)}, got {sorted(found)}; "
            "the cache is from another version: rebuild it or update this software"
        )
    settings = {
        name: tuple(value) if isinstance(value, list) else value for name, value in stored.items() if name != "codec"
    }
    try:
        return cls(**settings)
    except (ConfigError, TypeError, OverflowError) as error:
        raise CacheFormatError(f"codec {signal!r}: stored settings are not valid: {error}") from error


def check_whole_number(name: str, value: object, low: int, high: int | None = None) -> None:
    """Refuse anything but an `int` of at least `low` and at most `high`.

    Raises:
        ConfigError: Naming the setting, the range and what was given.
    """
    at_most = f" and at most {high}" if high is not None else ""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    if not is_whole or value < low or (high is not None and value > high):  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a whole number of at least {low}{at_most}, got {value!r}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but a `bool`.

    Raises:
        ConfigError: Naming the setting and what was given.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name}: expected true or false, got {value!r}")
