"""Places: which are addresses and how one may be shown, and whether make has started us."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from vlm_distill_cache.common.printing import hide_secrets, one_line

_SECRETS = "VLM_DISTILL_ADDRESSES"  # of a process that another one of ours started: public addresses to whole ones
_LOOKED_AT = 10_000  # entries of a folder
_SCHEMES = ("s3", "hf", "http", "https")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` of what is spelt nearly like a name; empty if nothing is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {one_line(near[0])}?)" if near else ""


def nearest_path(path: str | Path) -> str:
    """As `nearest`, among what lies beside a path that is not there."""
    place = Path(path)
    try:
        beside = [entry.name for entry, _ in zip(place.parent.iterdir(), range(_LOOKED_AT), strict=False)]
    except OSError:
        return ""
    return (
        nearest(str(place), (str(place.with_name(name)) for name in beside if not name.startswith(".")))
        if place.name
        else ""
    )


def by_make(words: str, otherwise: str = "") -> str:
    """Words for whoever runs our ``make``, which exports its variables; others are given ``otherwise``."""
    return words if os.environ.keys() >= {"MAKELEVEL", "DATA_NAME"} else otherwise


def is_url(location: str | Path) -> bool:
    """Return whether a location is an address of one of the kinds known here, not a path."""
    return isinstance(location, str) and location.partition("://")[0] in _SCHEMES and "://" in location


def public_location(location: str) -> str:
    """Return a location as it may be shown, kept and published: an address without its query, which may be a signature."""
    return hide_secrets(location).partition("?")[0] if "://" in location else location


def secret_locations(locations: Iterable[str]) -> dict[str, str]:
    """An environment variable that tells child processes what addresses have that is neither written nor shown."""
    whole = {public_location(place): place for place in locations}
    return {_SECRETS: json.dumps({public: place for public, place in whole.items() if public != place})}


def whole_location(location: str) -> str:
    """An address with the query that the process which started this one was given; most have none."""
    return str(json.loads(os.environ.get(_SECRETS, "{}")).get(location, location))
