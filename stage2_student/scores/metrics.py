"""Pure scoring functions: intervals, letters, exact match. No model, no file.

Dims: I items, S bootstrap resamples.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s'-]")
# "A", "(A)", "A.", "A: a red circle"; a bare "A" followed by a word is an article ("A cat"), not an answer.
_WHOLE = re.compile(r"^\s*\(?\s*([ABab])\s*\)?\s*[.:,]?\s*$")
_LEADING = re.compile(r"^\s*(?:\(\s*([AB])\s*\)|([AB])\s*[).:,])")
_NAMED = re.compile(r"(?:\(\s*([AB])\s*\)|\b(?i:answer|option|choice)\s*(?:is)?\s*:?\s*\(?\s*([AB])\b)")

Letter = Literal["A", "B"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A mean over items with its bootstrap interval."""

    value: float
    low: float
    high: float
    items: int

    def to_dict(self) -> dict[str, Any]:
        """The JSON stored in a report."""
        return asdict(self)


def bootstrap(values: Sequence[float] | np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Score:
    """Mean of independent items, with a percentile interval from resampling items.

    Returns:
        The mean and its interval; a single item has a degenerate one.

    Source:
        Efron 1979; percentile method. Resamples are drawn as multinomial counts, which is the same
        distribution without an index array ``[S, I]``.
    """
    return bootstrap_kinds({"": values}, seed=seed, resamples=resamples)


def bootstrap_kinds(
    values: Mapping[str, Sequence[float] | np.ndarray], *, seed: int = 0, resamples: int = RESAMPLES
) -> Score:
    """Unweighted mean over kinds of the mean over items; items are resampled within their kind.

    ``values`` are float ``[I]`` for each kind, at least one item each; S is ``resamples``.

    Raises:
        ValueError: If there are no kinds, or one has no items.
    """
    if not values or any(len(items) == 0 for items in values.values()):
        raise ValueError(f"an interval needs at least one item of each kind, got {sorted(values)} kinds")
    generator = np.random.default_rng(seed)
    resampled = np.zeros(resamples)
    means = []
    for items in values.values():
        scores = np.asarray(items, dtype=np.float64)  # [I]
        count = len(scores)
        draws = generator.multinomial(count, np.full(count, 1 / count), size=resamples)  # [S, I]
        resampled += draws @ scores / count
        means.append(float(scores.mean()))
    low, high = np.quantile(resampled / len(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(
        value=sum(means) / len(means),
        low=float(low),
        high=float(high),
        items=sum(len(items) for items in values.values()),
    )


def paired_difference(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> Score:
    """What one model scores more than another on the same items, resampled in pairs.

    Both hold each item's score by kind, ``[I]`` each, in the same order.
    """
    return bootstrap_kinds({kind: np.subtract(after[kind], before[kind]) for kind in after})


def difference(after: Score, before: Score) -> Score:
    """What one mean is above another, with an interval as wide as if the two were independent."""
    value = after.value - before.value
    down = math.hypot(after.value - after.low, before.high - before.value)
    up = math.hypot(after.high - after.value, before.value - before.low)
    return Score(value=value, low=value - down, high=value + up, items=min(after.items, before.items))


def group_by_kind(values: Sequence[float] | np.ndarray, kinds: Sequence[str]) -> dict[str, list[float]]:
    """Sort item scores into their kinds, kinds in alphabetical order."""
    grouped: dict[str, list[float]] = {kind: [] for kind in sorted(set(kinds))}
    for value, kind in zip(values, kinds, strict=True):
        grouped[kind].append(float(value))
    return grouped


def preference(right: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """1 where the right caption has the higher score, 1/2 where they tie, else 0; float ``[I]``."""
    return np.where(right == wrong, 0.5, right > wrong).astype(np.float64)


def parse_letter(text: str) -> Letter | None:
    """Read the option letter out of a generated answer, or None if there is not exactly one.

    Accepts ``A``, ``(A)``, ``A.``, ``A) a red circle``, ``The answer is (B).``; refuses ``A cat`` (an
    article) and answers that name both letters.
    """
    whole = _WHOLE.match(text)
    if whole:
        return "A" if whole.group(1).upper() == "A" else "B"
    leading = _LEADING.match(text)
    found = {first or second for first, second in _NAMED.findall(text)}
    if leading:
        found.add(leading.group(1) or leading.group(2))
    if len(found) != 1:
        return None
    return "A" if found == {"A"} else "B"


def normalise_answer(text: str) -> str:
    """Lower case, without punctuation, articles and repeated blanks: ``"The red one."`` -> ``"red one"``."""
    plain = _PUNCTUATION.sub(" ", text.lower())
    return " ".join(_ARTICLES.sub(" ", plain).split())


def exact_match(predicted: str, expected: str) -> bool:
    """Whether two short answers are equal once normalised."""
    return normalise_answer(predicted) == normalise_answer(expected)


def score_letters(answers: Sequence[tuple[Letter | None, Letter | None]]) -> dict[str, np.ndarray]:
    """Item scores of a two-option question asked in both orders.

    Args:
        answers: Per item the letter given when the right caption was (A), and when it was (B).

    Returns:
        Float ``[I]`` each: ``right_first`` and ``right_second`` (accuracy by order), ``mean`` of the two,
        ``both_right`` (0 for a constant answer, whose mean is 1/2), ``bias`` (share of A minus share of B, in
        [-1, 1]; 0 without bias, since the right letter is A once and B once), ``unparsed`` (share).
    """
    first = np.array([given == "A" for given, _ in answers], dtype=np.float64)
    second = np.array([given == "B" for _, given in answers], dtype=np.float64)
    sign = {"A": 1.0, "B": -1.0, None: 0.0}
    return {
        "right_first": first,
        "right_second": second,
        "mean": (first + second) / 2,
        "both_right": first * second,
        "bias": np.array([(sign[one] + sign[two]) / 2 for one, two in answers], dtype=np.float64),
        "unparsed": np.array([((one is None) + (two is None)) / 2 for one, two in answers], dtype=np.float64),
    }
