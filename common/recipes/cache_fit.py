"""Whether a cache is the one that stage one builds by a recipe: what its plan holds, against the recipe's options."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.attention.layers import Groups, holds_every_layer, published_count, teacher_groups
from vlm_distill_cache.common.attention.tiles import FINEST_SIDE, pooled_grid
from vlm_distill_cache.common.cache.plan import LONG_SAMPLES, Plan
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.recipes import Recipe, read_recipe, recipe_names, show_option

COMPARED = (
    "signals", "groups", "layers", "map_preset", "map_grid", "attention_dtype", "temperatures", "max_length", LONG_SAMPLES,
)  # fmt: skip
"""The options of stage one that recipes may have."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """In what a cache is not a recipe's.

    Attributes:
        text: What the cache holds, and what the recipe says.
        signals: Those from which the recipe's losses would be others, or cannot be had; none: they are the recipe's.
    """

    text: str
    signals: tuple[str, ...] = ()


def recipe_of(plan: Plan) -> str:
    """The recipe for any student whose stage one builds just such a cache, with these signals and no others; empty: none."""
    for recipe in map(read_recipe, recipe_names()):
        if recipe.students:
            continue
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError, ConfigError):  # a plan from elsewhere
            if {*recipe.stage_one["signals"]} == {*plan.signals} and not cache_differences(recipe, plan):
                return recipe.name
    return ""


def cache_differences(recipe: Recipe, plan: Plan) -> list[Difference]:
    """Compare a cache's plan with the recipe's options of stage one; signals and temperatures may be more than those."""
    wanted = recipe.stage_one
    held = {signal: plan.signals[signal] for signal in wanted["signals"] if signal in plan.signals}
    found = []
    if missing := tuple(signal for signal in wanted["signals"] if signal not in held):
        found.append(Difference(text=f"no {', '.join(missing)}", signals=missing))
    attention = {signal: settings for signal, settings in held.items() if "groups" in settings and "groups" in wanted}
    if attention:
        found += _other_layers(wanted, plan, tuple(attention))
    for signal, settings in attention.items():
        found += _other_map(wanted, signal, settings) if "preset" in settings else _coarser_rows(plan, signal, settings)
    now: dict[str, Any] = {
        "max_length": plan.extra.get("max_length"),
        LONG_SAMPLES: plan.extra.get(LONG_SAMPLES, "refuse"),
    }
    if attention:
        exact = any(settings.get("exact") or settings.get("preset") == "f4" for settings in attention.values())
        now["attention_dtype"] = "f4" if exact else "u1"
    for settings in held.values():
        if not {*wanted.get("temperatures", ())} <= {*settings.get("temperatures", wanted.get("temperatures", ()))}:
            now["temperatures"] = settings["temperatures"]
    # Codes of 4 bytes lose less than those of 1, and a loss at a temperature that is missing is refused for itself.
    found += [
        Difference(text=_instead(wanted, {name: value}))
        for name, value in now.items()
        if name in wanted and wanted[name] != value
    ]
    return found


def differences_text(differences: Iterable[Difference]) -> str:
    """All of them, in a line."""
    return "; ".join(dict.fromkeys(difference.text for difference in differences))


def _other_layers(wanted: Any, plan: Plan, signals: tuple[str, ...]) -> list[Difference]:
    depth, choice = plan.stated("teacher.layers"), wanted["layers"]
    cached: Groups = tuple(tuple(group) for group in plan.stated("teacher.groups"))
    count = wanted["groups"] or published_count(depth)
    if cached == teacher_groups(depth, count, choice):
        return []
    now = {"groups": len(cached), "layers": plan.teacher.get("layer_choice", "middle")}
    text = _instead({"groups": count, "layers": choice}, now)
    # Of single layers stage two makes the recipe's groups, as many of them as a shallow student has.
    return [Difference(text=text, signals=() if holds_every_layer(cached, depth) else signals)]


def _other_map(wanted: Any, signal: str, settings: Any) -> list[Difference]:
    found = []
    preset, grid = settings["preset"], settings.get("grid", 0)
    if preset not in (wanted["map_preset"], "f4"):
        # Other presets have the exact mask of sinks, and losses that need each pair's own value refuse them.
        text = _instead(wanted, {"map_preset": preset})
        found.append(Difference(text=text, signals=(signal,) if preset == "exact8" else ()))
    if grid != wanted["map_grid"]:
        found.append(Difference(text=_instead(wanted, {"map_grid": grid}), signals=(signal,)))
    return found


def _coarser_rows(plan: Plan, signal: str, settings: Any) -> list[Difference]:
    """Rows of the text on fewer cells than stage one takes unless it is told otherwise; of column means there are none."""
    own = plan.geometry.get("grid") or (FINEST_SIDE, FINEST_SIDE)
    grid, usual = settings.get("grid"), [*pooled_grid(*own)]
    if grid is None or (grid[0] >= usual[0] and grid[1] >= usual[1]):
        return []
    return [Difference(text=_instead({"grid": usual}, {"grid": grid}), signals=(signal,))]


def _instead(wanted: Any, now: dict[str, Any]) -> str:
    held = " ".join(f"{name}={show_option(value)}" for name, value in now.items())
    return f"{held} (the recipe: {' '.join(f'{name}={show_option(wanted[name])}' for name in now)})"
