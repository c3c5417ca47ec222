"""What a configuration says of the visual tokens that a student feeds: the change ``visual_tokens``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.errors import ModelError
from vlm_distill_cache.common.models.tokens.budget import check_budget

WAYS = ("attention", "sinks", "gaze", "grid", "random")
_KEYS = {"keep", "by", "sink_penalty", "sinks", "gaze", "merge_frames", "seed"}
REMEDY = "set token_selection to grid or random, or feed all visual tokens"


@dataclass(frozen=True)
class Settings:
    """What the configuration says.

    Attributes:
        keep: A share of a sample's visual tokens below 1, or their number.
        by: One of `WAYS`.
        sink_penalty: How much a sink score of 1 counts against attention.
        sinks: Score of each visual token of a picture, or of each of its tiles.
        gaze: Weights and bias of the regression that expects the logarithm of the gaze.
        merge_frames: Leave out a place that looks as in the picture before, cosine above this.
    """

    keep: float
    by: str
    sink_penalty: float = 0.03
    sinks: tuple[float, ...] | None = None
    gaze: tuple[tuple[float, ...], float] | None = None
    merge_frames: float | None = None
    seed: int = 0

    @classmethod
    def of(cls, stored: Any) -> "Settings":
        """Check what is stored.

        Raises:
            ModelError: If it says nothing that can be done.
        """
        if not isinstance(stored, Mapping) or not {"keep", "by"} <= stored.keys() <= _KEYS:
            raise refusal(
                f"{str(stored)[:80]!r}", f"an object with keep and by, and perhaps {', '.join(sorted(_KEYS))}"
            )
        given = {name: value for name, value in stored.items() if value is not None}
        if given.get("by") not in WAYS:
            raise refusal(f"by {str(given.get('by'))[:80]!r}", f"one of {', '.join(WAYS)}")
        check_budget("visual_tokens", given.get("keep"))
        for name in ("sink_penalty", "merge_frames"):
            if not _is_number(given.get(name, 0.0)):
                raise refusal(f"{name} {str(given[name])[:80]!r}", "a number")
        seed, sinks, gaze = given.get("seed", 0), given.get("sinks"), given.get("gaze")
        if not isinstance(seed, int) or isinstance(seed, bool) or not -(1 << 63) <= seed < 1 << 63:
            raise refusal(f"seed {str(seed)[:80]!r}", "a whole number of 64 bits")
        if sinks is not None:
            given["sinks"] = _numbers("sinks", sinks)
        elif given["by"] == "sinks":
            raise refusal("by 'sinks' without sinks", "the sink score of each visual token, which a cache knows")
        if gaze is not None:
            if not isinstance(gaze, Mapping) or not _is_number(gaze.get("bias")):
                raise refusal(f"gaze {str(gaze)[:80]!r}", "an object with weights, a list, and bias, a number")
            given["gaze"] = (_numbers("gaze.weights", gaze.get("weights")), float(gaze["bias"]))
        return cls(**given)


def _is_number(value: Any) -> bool:
    """Whether it is one, and no larger than single precision holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e30 <= value <= 1e30


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value or not all(map(_is_number, value)):
        raise refusal(f"{name} {str(value)[:80]!r}", "a list of numbers")
    return tuple(float(one) for one in value)


def refusal(found: str, expected: str) -> ModelError:
    """That a configuration says something which cannot be done."""
    return ModelError(f"config.json: distilled.visual_tokens: {found}; expected {expected}")
