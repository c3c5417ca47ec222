"""What is asked of a model, and what comes back: metrics make requests of items and count the answers; no torch.

A metric never sees a model, and a model never sees what is right. What came back is kept as JSON, so that it can be counted
again without a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vlm_distill_cache.data.benchmarks.items import Item
from vlm_distill_cache.data.sample import ImageSource
from vlm_distill_cache.stage2_student.suite.measures import Measure

LEAST = -1e9  # nats, in place of minus infinity, which JSON does not have


@dataclass(frozen=True, kw_only=True)
class Generate:
    """An answer in the model's own words, greedily; the result is a ``str``, stripped."""

    image: ImageSource | None
    question: str
    max_tokens: int = 16


@dataclass(frozen=True, kw_only=True)
class Weigh:
    """How likely given answers to one question are; an empty question makes them captions.

    The result is a list ``[nats, tokens]`` for each answer: the sum of log-probabilities of the answer's tokens, the end of
    the answer included, and their number. An ``optional`` request that cannot be asked (some models take no question
    without a picture) has an empty list as its result, and the item counts without it.
    """

    image: ImageSource | None
    question: str
    answers: tuple[str, ...]
    optional: bool = False


def instructed(question: str, instruction: str) -> str:
    """A question with the instruction on a line of its own, as LLaVA's question files have it; not twice."""
    if not instruction or question.rstrip().endswith(instruction):
        return question
    return f"{question.rstrip()}\n{instruction}"


Request = Generate | Weigh
Result = str | list[list[float]]


def is_result(found: Any, request: Request) -> bool:
    """Whether what was read from a file can be a request's result."""
    if isinstance(request, Generate):
        return isinstance(found, str)
    if not isinstance(found, list) or len(found) not in (
        (0, len(request.answers)) if request.optional else (len(request.answers),)
    ):
        return False
    pairs = [pair for pair in found if isinstance(pair, list) and len(pair) == 2]
    return len(pairs) == len(found) and all(type(number) in (int, float) for pair in pairs for number in pair)


class Metric(Protocol):
    """How a benchmark's items are asked and counted."""

    def requests(self, item: Item, instruction: str) -> tuple[Request, ...]:
        """What is asked about one item; ``instruction`` is the benchmark's, empty where prompts are plain."""
        ...

    def measures(self, items: Sequence[Item], results: Sequence[Sequence[Result]]) -> list[Measure]:
        """Count: the headline first. ``results`` are those of each item's requests, in their order.

        Items whose answer is kept secret count nowhere; no item left makes no measure.
        """
        ...
