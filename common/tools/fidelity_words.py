"""What a cache's fidelity figures mean for a student: which are poor, and the option of stage one that would help."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm_distill_cache.common.cache.plan import Plan
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS

LEAST_KEPT, MOST_ERROR, LEAST_COSINE = 0.9, 0.05, 0.95
_AT_CAP = 0.1  # share of rows: from there on more tokens help, not rarer ones
_CONTROL = "control_"


def poor_fidelity(plan: Plan, fidelity: Mapping[str, Any] | None) -> list[str]:
    """A sentence for each figure that is poor, with what would help; none if all is well, or nothing was measured."""
    found = {name: value for name, value in (fidelity or {}).items() if isinstance(value, int | float)}
    sentences = []
    if (kept := found.get("kept_mass", 1.0)) < LEAST_KEPT:
        sentences.append(
            f"the kept tokens hold {kept:.3f} of the teacher's mass, below {LEAST_KEPT:g}: {_more_tokens(plan, found)}"
        )
    for name, value in sorted(found.items()):
        signal = next((signal for signal in plan.signals if name.startswith(f"{signal}_")), None)
        if signal is None:
            continue
        noise = found.get(f"{_CONTROL}{name}")
        if name.endswith("_error") and value > MOST_ERROR:
            helps = _more_tokens(plan, found) if name.endswith("_gradient_error") else _exact(plan, signal)
            if noise is not None and noise > MOST_ERROR:
                helps = (
                    f"the teacher's own rounding is {noise:.3f} of it, so first try dtype=float32 (--set dtype=float32)"
                )
            what = "gradient of {} misses" if name.endswith("_gradient_error") else "values of {} miss"
            sentences.append(f"the {what.format(signal)} by {value:.3f}, above {MOST_ERROR:g}: {helps}")
        if name.endswith("gradient_cosine") and value < LEAST_COSINE and (noise is None or noise >= LEAST_COSINE):
            sentences.append(f"{name} is {value:.3f}, below {LEAST_COSINE:g}: {_exact(plan, signal)}")
    return [f"poor fidelity: {sentence}" for sentence in sentences]


def _more_tokens(plan: Plan, found: Mapping[str, float]) -> str:
    held = next((settings for settings in plan.signals.values() if "max_k" in settings), {})
    floor, cap = held.get("floor", 0.0), held.get("max_k", 0)
    capped = found.get("rows_at_cap", 0.0) > _AT_CAP
    for name in ("default", "wide", "full"):
        preset = LOGIT_PRESETS[name]
        if preset["max_k"] > cap or (not capped and preset["max_k"] == cap and preset["floor"] < floor):
            return _again(plan, f"logits={name}")
    return (
        "no preset keeps more tokens of this teacher's flat distributions; give its logits less weight (losses.logits)"
    )


def _exact(plan: Plan, signal: str) -> str:
    held = plan.signals[signal]
    if held.get("preset") not in (None, "exact", "f4"):
        option = "map_preset=exact"
    elif "hidden" in signal or signal == "projector_output":
        option = "hidden_dtype=f4"
    elif held.get("exact") or held.get("preset") == "f4":
        return "its codec is exact already, so the teacher itself gives other values each time (dtype, batch)"
    else:
        option = "attention_dtype=f4"
    return _again(plan, option)


def _again(plan: Plan, option: str) -> str:
    """How a cache comes to another option: what it holds beside that stays, where its teacher can be run."""
    if plan.teacher.get("served"):
        return f"build a cache with {option} (--set {option}), in another folder"
    return f"add --set {option} to `teacher-cache extend CACHE`, with the cache's data and teacher, which makes just that anew"
