"""What a run's folder says that it belongs to, ``run.json``, and whether that is another run. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlm_distill_cache.common.cache.documents import describe_differences
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.rules import OBJECT, check, items, maybe, record, text
from vlm_distill_cache.common.files.signed import read_signed
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.stage2_student.final_folder import FINAL
from vlm_distill_cache.stage2_student.pruned_folder import FOLDER
from vlm_distill_cache.stage2_student.training.extension import has_other_length, is_longer, versions_kept
from vlm_distill_cache.stage2_student.training.output_folder import CONFIG, STAMP, holds_anything

BASELINE, DISTILLED = "sft", "distilled"
COMPARED = (BASELINE, DISTILLED)
_UNSIGNED = ("run", "evaluation", "config", "notes", "finished")  # a STAMP of older versions
_RULE = record(
    {
        **dict.fromkeys(("run", "evaluation", "config"), OBJECT),
        "notes": items(text(1 << 20), most=1000),
        "finished": maybe(text(100)),
    },
    {"left": OBJECT},
)
_log = logging.getLogger(__name__)


def read_stamp(output: Path, *, remedy: str = "give another --output") -> dict[str, Any]:
    """What a folder belongs to; empty for a new one, and where that is lost but the students can still say it.

    ``remedy`` is what to do where it is not the folder of a run.

    Raises:
        ConfigError: If it is not the folder of a run, or nothing there can tell.
    """
    path = output / STAMP
    try:
        found = load_stamp(output)
    except FileNotFoundError:
        problem = f"{output} is not empty and holds no {STAMP}: it is not the folder of a run; {remedy}"
        if not holds_anything(output):
            return {}
    except CacheFormatError as error:
        problem = f"{error}; {remedy}, or delete {output} to begin again"
    else:
        return found
    if not any((output / name / CONFIG).is_file() for name in COMPARED):
        raise ConfigError(problem)
    _log.warning("%s is lost or damaged and is written again", path)
    return {}


def load_stamp(output: Path) -> dict[str, Any]:
    """What a folder's stamp says.

    Raises:
        FileNotFoundError: There is none.
        CacheFormatError: It is damaged.
        ConfigError: If the system does not let it be read.
    """
    found = read_signed(output / STAMP, unsigned=_UNSIGNED)
    check(found, _RULE, str(output / STAMP), remedy="it is damaged")
    return found


def refuse_other_run(
    output: Path,
    previous: Mapping[str, Any],
    stamp: Mapping[str, Any],
    *,
    hashes: Mapping[str, str],
    extends: bool = False,
) -> None:
    """Refuse to mix two runs in one folder; another way of scoring is fine, students are scored again then.

    With ``extends`` more steps of the last phase are fine, too. ``hashes`` are those of the caches by path, now.

    Raises:
        ConfigError: Naming each differing option with both values, and the remedy.
    """
    made = [output / name / part for name in COMPARED for part in ("checkpoints", FINAL)]
    if not previous or not any(path.exists() for path in (*made, output / FOLDER)):  # FOLDER: a student cut out
        return
    lines = describe_differences(previous.get("run", {}), stamp["run"], there="the folder", here="this run")
    finished = bool(lines and previous.get("finished"))
    longer = finished and not extends and is_longer(previous["run"], stamp["run"])
    if lines and not (extends and finished and has_other_length(previous["run"], stamp["run"])):
        raise ConfigError(
            f"{output} belongs to a run with other options:\n" + "\n".join(lines) + "\n"
            f"Use the same options, another --output{by_make(' (OUTPUT=...)')}, or delete that folder to begin again"
            + ("; to train its students longer, add --extend, which goes on from their end" if longer else "")
            + versions_kept(previous["run"], hashes)
        )
