"""Whose results a folder holds: those of one model, asked in one way."""

from pathlib import Path
from typing import Any

from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.files.atomic import read_json
from vlm_distill_cache.common.printing import one_line
from vlm_distill_cache.data.benchmarks.documents import OWN_STAMP
from vlm_distill_cache.stage2_student.suite.opened import Model

STAMP = OWN_STAMP
FORMAT = 1


def check_stamp(output: Path, model: Model, *, prompts: str, limit: int | None) -> dict[str, Any] | None:
    """The claim that is to be written into a folder of results; None where it is there.

    Raises:
        ConfigError: The folder is something else's.
    """
    stamp = {"format": FORMAT, "student": model.fingerprint, "prompts": prompts, "limit": limit}
    try:
        stored = read_json(output / STAMP)
    except FileNotFoundError:
        inside = output.iterdir() if output.exists() else ()
        if foreign := sorted(entry.name for entry in inside if entry.name != STAMP):
            raise ConfigError(
                f"{output} holds other things ({foreign[0]}), and no {STAMP}; give a new folder, or that of a suite"
            ) from None
        return {**stamp, "name": model.name}
    except CacheFormatError as error:
        raise ConfigError(f"{error}; give another --output, or delete {output}") from error
    stored = stored if isinstance(stored, dict) else {}
    if differs := [name for name, value in stamp.items() if stored.get(name) != value]:
        told = {**stored, "student": stored.get("name", "another")}
        if told["student"] == model.name:
            told["student"] = f"{model.name} with other weights or settings"
        now = {**stamp, "student": model.name}
        pairs = [
            (name, *("none" if each.get(name) is None else each[name] for each in (told, now))) for name in differs
        ]
        shown = one_line("; ".join(f"{name}: {there} there, {here} now" for name, there, here in pairs))
        raise ConfigError(f"{output} holds results of something else ({shown}); give another --output")
    return None
