"""The folder ``final`` of a finished training: what it says of itself, and whether it is whole. Imports no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ModelError
from vlm_distill_cache.common.files.rules import OBJECT, check, record, text
from vlm_distill_cache.common.files.signed import find_damage, read_signed

FINAL, PROVENANCE = "final", "distillation.json"
_UNSIGNED = {"fingerprint": text(100), **dict.fromkeys(("caches", "config", "encoder", "vocabulary"), OBJECT)}
_RULE = record(_UNSIGNED, {"files": OBJECT})
_log = logging.getLogger(__name__)


def read_final(folder: Path) -> dict[str, Any]:
    """What a trained student says of itself, after a look at every byte of the files that it lists.

    Files that it does not list (a card, say) are not looked at.

    Raises:
        ModelError: If the folder is no trained student of ours, or is damaged.
    """
    try:
        found, damage = look_at_final(folder)
    except FileNotFoundError:
        raise ModelError(
            f"{folder}: no {PROVENANCE}; give the `final` folder of a finished training (distill train, distill run)"
        ) from None
    if damage:
        raise ModelError(
            f"{damage[0]}; run the command that trained this student again: it makes the folder anew from what is left. "
            "Copy a copy again. A student that is to be changed by hand is one that `distill export` has written"
        )
    return found


def look_at_final(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """What a folder says of itself, empty if that cannot be read; and what is damaged, a text each.

    Raises:
        FileNotFoundError: If it does not say what it is.
    """
    try:
        found = read_provenance(folder)
    except CacheFormatError as error:
        return {}, [str(error)]
    if "files" not in found:
        _log.warning(
            "%s: written by an older version, without digests: whether its files are whole is not known", folder
        )
        return found, []
    return found, find_damage(folder, found["files"])


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a trained student says of itself; its files are not looked at.

    Raises:
        FileNotFoundError: If it does not say what it is.
        CacheFormatError: If what it says is damaged.
    """
    path = folder / PROVENANCE
    found = read_signed(path.resolve(), unsigned=_UNSIGNED.keys())  # in the hub's cache it is a link
    check(found, _RULE, str(path), remedy="train again, or copy the folder again")
    return found
