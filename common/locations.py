"""Places of caches: which are addresses, and how one may be shown."""

from __future__ import annotations

from pathlib import Path

from vlm_distill_cache.common.printing import hide_secrets

_SCHEMES = ("s3", "hf", "http", "https")


def is_url(location: str | Path) -> bool:
    """Return whether a location is an address of one of the kinds known here, not a path."""
    return isinstance(location, str) and location.partition("://")[0] in _SCHEMES and "://" in location


def public_location(location: str) -> str:
    """Return a location as it may be shown, kept and published: an address without its query, which may be a signature."""
    return hide_secrets(location).partition("?")[0] if is_url(location) else location
