"""A cache of format version 1 as version 2 has it: what its one picture has is what the first of several would have.

Nothing is computed anew: arrays that had an entry for each row have one for each row and picture, of which there is one, and
none where there is no picture; those that only samples with several pictures need are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Field, Record
from vlm_distill_cache.common.files.hashing import fingerprint

_SETTINGS = ("several", "frame_grid")  # of a codec, that version 2 adds
_EXTRA = ("frames",)  # of a plan: how frames of videos are chosen


def lift_plan(plan: Plan, like: Plan) -> Plan:
    """A plan in the format version of another one, if that is the newer; else the plan itself.

    Args:
        like: Has the settings that version 1 has not: grids over frames, and which frames are read.
    """
    if plan.format_version != ONE_PICTURE or like.format_version == ONE_PICTURE:
        return plan
    signals = {
        name: settings | {key: like.signals[name][key] for key in _SETTINGS if key in like.signals.get(name, {})}
        for name, settings in plan.signals.items()
    }
    prints = dict(plan.fingerprints)
    if "codec" in prints and signals != plan.signals:
        prints["codec"] = fingerprint(signals)
    return replace(
        plan,
        format_version=like.format_version,
        signals=signals,
        fields={name: like.fields.get(name, group) for name, group in plan.fields.items()},
        fingerprints=prints,
        extra=plan.extra | {key: like.extra[key] for key in _EXTRA if key in like.extra},
    )


def lift_record(record: Record, fields: Sequence[Field]) -> Record:
    """A record as a plan of `lift_plan` describes it; one that is so already stays as it is.

    Args:
        record: Of either version, with its image's arrays.
        fields: Of the plan.
    """
    if all(field.name in record for field in fields):
        return record
    seen = bool(record["image_hash"].any())
    per_picture = {field.name for field in fields if field.axis in ("picture", "look", "text_look")}
    return {
        field.name: field.empty()
        if field.name not in record or (field.name in per_picture and not seen)
        else record[field.name]
        for field in fields
    }
