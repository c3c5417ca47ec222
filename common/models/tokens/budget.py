"""How many of some tokens a budget keeps: a share of them, or a number."""

from typing import Any

from vlm_distill_cache.common.errors import ModelError


def check_budget(name: str, keep: Any) -> float:
    """A share above 0 and below 1, or a whole number of at least 2, which no share can be mistaken for; else a ModelError."""
    fits = (
        isinstance(keep, int | float)
        and not isinstance(keep, bool)
        and (0 < keep < 1 or (2 <= keep <= 1e30 and keep % 1 == 0))
    )
    if not fits:
        raise ModelError(
            f"{name}: keep is {str(keep)[:80]!r}; expected a share above 0 and below 1, or a whole number of tokens, 2 or more"
        )
    return float(keep)


def kept_count(keep: float, count: int) -> int:
    """How many of ``count`` tokens are kept: of a share the nearest number, at least 1; never more than there are."""
    return min(count, max(1, int(keep * count + 0.5)) if keep < 1 else int(keep))
