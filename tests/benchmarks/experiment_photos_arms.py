"""The arms of `make experiment-photos`, all of them written down before the first was run."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SEEDS = (401, 402, 403, 404, 405)  # never used while anything was tuned
FEW = SEEDS[:3]
STEPS = 250
CURVE_STEPS = (60, 125, 500)  # beside `STEPS`
LAYERS, WIDTH = 10, 0.5  # of 30 that a student keeps; the share of heads and channels of the pruned one
DEPTH_STUDENT, WIDTH_STUDENT = "depth", "width"
SFT, LOGITS, ANSWER = "SFT", "+ logit KD", "+ answer_attention"
MAP, ALL_ROWS = "+ visual_map (released code)", "+ all_attention (the paper's rows)"
TAF = "+ the teacher's projector, frozen (TAF at equal widths)"
RELATIVE = "+ answer_attention, relative"
SUPPRESSED = "+ answer_attention, sinks suppressed"
UNFILTERED = "+ visual_map without a sink filter (the paper's cosine)"
CONTROL = "control: answer_attention of another picture"
ONLINE = "online: + answer_attention"
PRESETS = ("lean", "default", "wide", "fixed:32")
GRIDS = (3, 6, 7)  # the teacher looks at 7 x 7 places: a finer grid than 7 holds nothing more
CACHE = "cache"  # of all signals, with the default presets
HELD_OUT = "held-out"  # of the pictures on the page of where models look
SIGNALS = ("logits", "answer_attention", "text_attention", "visual_map")


@dataclass(frozen=True)
class Arm:
    """One row of a table, for each of its seeds.

    Attributes:
        part: What is run together, and the table it stands in.
        losses: Of the phase that is trained.
        phase: Other options of that phase.
        options: Of `TrainConfig`.
        student: `DEPTH_STUDENT`, the teacher's first layers, or `WIDTH_STUDENT`, cut out of it.
        cache: Which one it learns from.
        online: Whether the teacher runs in the loop instead.
    """

    part: str
    losses: dict[str, Any]
    phase: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    student: str = DEPTH_STUDENT
    cache: str = CACHE
    online: bool = False
    steps: int = STEPS
    seeds: tuple[int, ...] = FEW


def budget_arm(preset: str, grid: int) -> str:
    """The name of an arm that learns from a smaller or larger cache."""
    return f"logits {preset}, gaze {grid} x {grid}"


def quarter_arm(arm: str) -> str:
    """The name of an arm that feeds a quarter of the visual tokens."""
    return f"{arm}, a quarter of the visual tokens"


def curve_arm(arm: str, steps: int) -> str:
    """The name of an arm with another number of steps; of `STEPS` the arm itself."""
    return arm if steps == STEPS else f"{arm}, {steps} steps"


def width_arm(arm: str) -> str:
    """The name of an arm of the student that is pruned in width."""
    return f"{arm}, pruned:width:{WIDTH}"


LOSSES: dict[str, dict[str, Any]] = {
    SFT: {"lm": 1.0},
    LOGITS: {"lm": 1.0, "logits": 1.0},
    ANSWER: {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
    MAP: {"lm": 1.0, "logits": 1.0, "visual_map": 1.0, "visual_map_kind": "sink_filtered"},
    CONTROL: {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0},
    ALL_ROWS: {"lm": 1.0, "logits": 1.0, "all_attention": 1.0},
    RELATIVE: {"lm": 1.0, "logits": 1.0, "answer_attention": 1.0, "answer_kind": "relative"},
    TAF: {"lm": 1.0, "logits": 1.0},
}
SINK_LOSSES: dict[str, dict[str, Any]] = {
    SUPPRESSED: LOSSES[ANSWER] | {"answer_kind": "sink_suppressed"},
    UNFILTERED: LOSSES[MAP] | {"visual_map_kind": "cosine"},
}
SINKS = ((RELATIVE, ANSWER), (SUPPRESSED, ANSWER), (MAP, UNFILTERED))  # with something against sinks, and without it
FIVE = (SFT, LOGITS, ANSWER, MAP, CONTROL)  # with all seeds
COMPARED = (SFT, LOGITS, ANSWER)  # over steps, and pruned; and where they look
QUARTERED = (LOGITS, ANSWER)


def _arms() -> Iterator[tuple[str, Arm]]:
    for name, losses in LOSSES.items():
        options = {"shuffle_teacher_images": True} if name == CONTROL else {}
        phase = {"freeze": ["projector"]} if name == TAF else {}
        yield name, Arm("losses", losses, phase, options, seeds=SEEDS if name in FIVE else FEW)
    yield ONLINE, Arm("online", LOSSES[ANSWER], online=True)
    for name in QUARTERED:
        options = {"visual_tokens": 0.25, "token_selection": "grid"}
        yield quarter_arm(name), Arm("quarter", LOSSES[name], options=options)
    for steps in CURVE_STEPS:
        for name in COMPARED:
            yield curve_arm(name, steps), Arm("curve", LOSSES[name], steps=steps)
    for name in COMPARED:
        yield width_arm(name), Arm("width", LOSSES[name], student=WIDTH_STUDENT)
    for preset in PRESETS:
        for grid in GRIDS:
            name = budget_arm(preset, grid)
            yield name, Arm("budget", LOSSES[ANSWER], cache=name)
    for name, losses in SINK_LOSSES.items():
        yield name, Arm("sinks", losses)


ARMS: dict[str, Arm] = dict(_arms())
PARTS = tuple(dict.fromkeys(arm.part for arm in ARMS.values()))


def cache_options(name: str) -> dict[str, Any]:
    """What of `BuildConfig` makes the cache of an arm."""
    if name == CACHE:
        return {"signals": SIGNALS}
    if name == HELD_OUT:
        return {"signals": SIGNALS[:2]}
    preset, grid = next((p, g) for p in PRESETS for g in GRIDS if budget_arm(p, g) == name)
    return {"signals": SIGNALS[:2], "logits": preset, "grid": grid}
