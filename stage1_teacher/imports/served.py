"""What a response says of one sample: tokens, and for each of them the distribution that it was drawn from.

**Index convention.** Entry i is about token i: its distribution is the one that *produced* token i, given all before it.
Servers write it so (of the first token there is none). In the words of this project entry i is row i - 1.
For the six tokens ``<s> USER: hi ASSISTANT: yes </s>`` the supervised rows are 3 and 4, and their distributions are entries 4
and 5 of what a server writes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.common.printing import one_line

Distribution = Mapping[int, float]
"""Log-probability in nats by token id; the token that stands there is among them where its own is known."""
_NUMBER = re.compile(r"[+-]?(?:\d{1,20}(?:\.\d{0,30})?(?:[eE][+-]?\d{1,4})?|inf|Infinity|nan|NaN)", re.ASCII)
SAME = 1e-3  # nats; how far a token's log-probability may differ between two places that tell it


@dataclass(frozen=True, kw_only=True)
class Served:
    """One sample of a response, its distributions unread.

    Attributes:
        tokens: Ids in order; None where the response does not say which token stands there.
        distribution: From a place in ``tokens`` to its distribution; None where there is none. Raises SampleError.
        whole: The tokens begin with the first one of the prompt; False: they are a generated answer alone.
        stand_ins: Ids that stand for a picture's tokens beside the image token itself.
        more: What the response says of the tokens behind these (those that were generated).
    """

    tokens: Sequence[int | None]
    distribution: Callable[[int], Distribution | None]
    whole: bool = True
    stand_ins: frozenset[int] = frozenset()
    more: "Callable[[], Served] | None" = None

    def joined(self) -> "Served":
        """These tokens and those behind them."""
        if self.more is None:
            return self
        behind, count = self.more(), len(self.tokens)

        def distribution(place: int) -> Distribution | None:
            return self.distribution(place) if place < count else behind.distribution(place - count)

        return Served(
            tokens=[*self.tokens, *behind.tokens],
            distribution=distribution,
            whole=self.whole,
            stand_ins=self.stand_ins,
        )


def as_list(value: Any, what: str) -> list[Any]:
    """A list of a response; `SampleError` if it is none."""
    if not isinstance(value, list | tuple):
        raise SampleError(f"{what} is {shown(value)}, expected a list")
    return list(value)


def as_object(value: Any, what: str) -> dict[str, Any]:
    """An object of a response; `SampleError` if it is none."""
    if not isinstance(value, dict):
        raise SampleError(f"{what} is {shown(value)}, expected an object")
    return value


def as_id(value: Any, what: str) -> int:
    """A token id: a whole number, or one in a text as keys of JSON are; `SampleError` if it is none."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 12:
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise SampleError(f"{what} is {shown(value)}, expected a token id, a whole number of at least 0")
    return value


def as_ids(value: Any, what: str) -> list[int | None]:
    """A list of token ids."""
    return [as_id(item, f"{what}[{place}]") for place, item in enumerate(as_list(value, what))]


def as_number(value: Any, what: str) -> float:
    """A number of a response, or its text; what it may be is the matter of whoever uses it."""
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise SampleError(f"{what} is {shown(value)}, expected a number")
    try:
        return float(value)
    except OverflowError as error:
        raise SampleError(f"{what} is {shown(value)}, expected a log-probability") from error


def add_entry(found: dict[int, float], token: int, log_prob: float, what: str) -> None:
    """Add a token to a distribution; `SampleError` if it is there with another log-probability."""
    if token not in found:
        found[token] = log_prob
        return
    there = found[token]
    if there != log_prob and not abs(there - log_prob) <= SAME:
        raise SampleError(f"{what}: token {token} has two log-probabilities, {there:.6g} and {log_prob:.6g}")


def shown(value: Any) -> str:
    """A value of a response in an error."""
    return one_line(repr(value)[:200], limit=60)
