"""Places: which are addresses and how one may be shown, what a misspelt name means, and whether make has started us."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from vlm_distill_cache.common.printing import hide_secrets, one_line

_SECRETS = "VLM_DISTILL_ADDRESSES"  # of a process that another one of ours started: public addresses to whole ones
_LOOKED_AT = 10_000  # entries of a folder
_DIGITS = re.compile(r"\d")
_SCHEMES = ("s3", "hf", "http", "https")


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean X?)`` of what is spelt nearly like a name; empty if nothing is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.7)
    return f" (did you mean {one_line(near[0])}?)" if near else ""


def slips(name: str, known: Iterable[str]) -> list[str]:
    """The known names that a slip of the finger makes this of: case, lines between words, a letter or two.

    Names that differ in a digit are other names, and of short ones those that differ in more than a letter.
    """
    plain, found = _plain_name(name), dict[str, int]()
    most = 0 if len(plain) < 3 else 1 if len(plain) < 6 else 2
    for one in known:
        other = _plain_name(one)
        if abs(len(other) - len(plain)) <= most and _DIGITS.findall(other) == _DIGITS.findall(plain):
            found[one] = _edits(plain, other)
    least = min(found.values(), default=most + 1)
    return [one for one, count in found.items() if count == least <= most]


def _plain_name(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _edits(one: str, other: str) -> int:
    """Letters to add, leave out, replace or exchange with the next one."""
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, start=1):
        row = [i]
        for j, there in enumerate(other, start=1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != there)))
            if i > 1 and j > 1 and (letter, one[i - 2]) == (other[j - 2], there):
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]


def nearest_path(path: str | Path) -> str:
    """As `nearest`, among what lies beside a path that is not there."""
    place = Path(path)
    try:
        beside = [entry.name for entry, _ in zip(place.parent.iterdir(), range(_LOOKED_AT), strict=False)]
    except OSError:
        return ""
    others = (str(place.with_name(name)) for name in beside if not name.startswith(".") and name != place.name)
    return nearest(str(place), others) if place.name and not place.exists() else ""


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
