"""Places of caches: which are addresses, and how one may be shown."""

from __future__ import annotations

from pathlib import Path

_SCHEMES = ("s3", "hf", "http", "https")


def is_url(location: str | Path) -> bool:
    """Return whether a location is an address of one of the kinds known here, not a path."""
    return isinstance(location, str) and location.partition("://")[0] in _SCHEMES and "://" in location


def public_location(location: str) -> str:
    """Return a location as it may be shown and published: a web address without its query, which may be a signature."""
    return location.split("?")[0] if location.startswith(("http://", "https://")) else location
