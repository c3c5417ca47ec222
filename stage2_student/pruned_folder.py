"""A student cut out of its teacher, by name (``pruned:0.5``) and as the folder that it becomes. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import ConfigError

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
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def pruning_record(student: str | Path) -> dict[str, Any]:
    """What a pruned student's folder says of itself; empty for other students."""
    return read_settings(Path(student) / RECORD)


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
