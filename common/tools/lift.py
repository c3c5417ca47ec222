"""A cache as one with more kinds of samples has it: format version 1 as version 2, version 2 without videos as with.

What one picture has is what the first of several would have.

Nothing is computed anew: arrays that had an entry for each row have one for each row and picture, of which there is one, and
none where there is no picture; those that only samples with several pictures need are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vlm_distill_cache.common.cache.plan import FRAMES, Plan
from vlm_distill_cache.common.cache.schema import ONE_PICTURE, Field, Record
from vlm_distill_cache.common.files.hashing import fingerprint

_SETTINGS = ("several", "frame_grid")  # of a codec, that version 2 adds
_ADDED = {  # where the data have videos
    "extra": (FRAMES,),
    "geometry": ("video",),
    "teacher": ("video_token_id",),
}


def breadth(plan: Plan) -> tuple[int, bool]:
    """How much a plan provides for: a plan is lifted to those of which this is larger."""
    return plan.format_version, plan.format_version != ONE_PICTURE and FRAMES in plan.extra


def lift_plan(plan: Plan, like: Plan) -> Plan:
    """A plan as another one that provides for more samples is: in its format version, with its videos; else itself.

    Args:
        like: Has the settings that the plan has not: grids over frames, which frames are read, and how.
    """
    if breadth(plan) >= breadth(like):
        return plan
    signals = {
        name: settings | {key: like.signals[name][key] for key in _SETTINGS if key in like.signals.get(name, {})}
        for name, settings in plan.signals.items()
    }
    parts = {
        name: getattr(plan, name) | {key: held[key] for key in keys if key in (held := getattr(like, name))}
        for name, keys in _ADDED.items()
    }
    prints = dict(plan.fingerprints)
    for name, had, has in (("codec", plan.signals, signals), ("geometry", plan.geometry, parts["geometry"])):
        if name in prints and has != had:
            prints[name] = fingerprint(has)
    return replace(
        plan,
        format_version=like.format_version,
        signals=signals,
        fields={name: like.fields.get(name, group) for name, group in plan.fields.items()},
        fingerprints=prints,
        **parts,
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
