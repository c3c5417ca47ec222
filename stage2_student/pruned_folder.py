"""A student cut out of its teacher, by name (``pruned:0.5``) and as the folder that it becomes. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.document_rules import MAX_SETTINGS_BYTES
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, ModelError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.files.signed import CHECKSUM, find_damage, read_signed

PREFIX = "pruned:"
RECORD = "pruning.json"
FOLDER = "student"


def kept_share(student: str) -> float | None:
    """The share of ``pruned:0.5``; None for other students."""
    if not student.startswith(PREFIX):
        return None
    text = student.removeprefix(PREFIX)
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(
            f"student: {student!r}; expected {PREFIX}KEEP, KEEP the share of heads and channels to keep, above 0 "
            "and at most 1, for example pruned:0.5"
        )
    return share


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint directory, where the files may be links; empty if it is not there or unreadable."""
    try:
        found = read_json(Path(os.path.realpath(path)), max_bytes=MAX_SETTINGS_BYTES)
    except (OSError, CacheFormatError):
        return {}
    return found if isinstance(found, dict) else {}


def pruning_record(student: str | Path) -> dict[str, Any]:
    """What a pruned student's folder says of how it was cut; empty for other students."""
    found = read_settings(Path(student) / RECORD)
    return {key: value for key, value in found.items() if key not in (CHECKSUM, "files")}


def pruned_damage(folder: Path) -> list[str]:
    """Say what of a pruned student's files is lost or changed since it was cut, a text each."""
    path = folder / RECORD
    told = read_settings(path)
    if "heads" in told and not told.keys() & {CHECKSUM, "files"}:
        return []  # of an older version, which kept no digests
    try:
        return find_damage(folder, read_signed(path).get("files"))
    except FileNotFoundError:
        return [f"{path}: missing"]
    except CacheFormatError as error:
        return [str(error)]


def refuse_damaged(folder: Path) -> None:
    """Refuse a pruned student that is not as it was cut; other folders pass.

    Raises:
        ModelError: Naming the first file and the remedy.
    """
    if (folder / RECORD).exists() and (damage := pruned_damage(folder)):
        raise ModelError(
            f"{damage[0]}; cut the student again (`distill prune` into another folder; `distill run` does it by itself)"
        )


def refuse_uncut(student: str, teacher: str | None) -> None:
    """Refuse to train ``pruned:KEEP`` before it is cut: several processes would cut it at once.

    Raises:
        ConfigError: Naming the commands that cut it.
    """
    share = kept_share(student)
    if share is not None:
        raise ConfigError(
            f"student {student} is not cut out of its teacher yet: first run `distill prune --teacher {teacher} "
            f"--keep {share:g} --data DATA --output FOLDER`, then train --student FOLDER; or use `distill run`, "
            "which does both"
        )
