"""Pure scoring functions: intervals, letters, exact match. No model, no file.

Dims: I items, S bootstrap resamples.
"""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
_ROUNDING = 1e-9  # sums of ratios of counts end so near to 0, or at least 1e-7 from it
LETTER_PROMPT = (
    "Which caption best describes the image?\n(A) {a}\n (B) {b}\n"
    "Answer with the option's alphabet from the given choices directly."
)
LETTER_TOKENS = 4  # longest generated letter
_ARTICLES = ("a", "an", "the")
# Punctuation in Unicode's sense that is part of an answer: C#, 50%, R&B, 5′ ...
_TELLING = frozenset("#%&*@'′″‰‱")
_EMPHASIS = re.compile(r"(?<!\w)(\*+)(?=\S)([^*]+)(?<=\S)\1(?!\w)")  # *red*, **red**
# ... and where it stands so: .5 and 3.14, 12:30 and 1/2, !=
_NUMERIC = re.compile(r"(?<![^\W\d])(?<!\.)\.(?=\d)|(?<!\S),(?=\d)|(?<=\d)[:/](?=\d)|!(?==)")
_BRACKETED = re.compile(r"[(\[\"“](.+)[)\]\"”]\.?|(.*[^.])\.", re.DOTALL)
_WIDE = {place: place - 0xFEE0 for place in range(0xFF01, 0xFF5F)}  # letters of a full width, as the others
# What is written in several ways, as VQAv2's scorer has it where that loses nothing: 1,000; 10 %; $ 5; U.S.; 'red'.
_VARIANTS = (
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<=\d)\s+(?=%)|(?<=[$€£¥])\s+(?=\d)|\u00ad"), ""),
    (re.compile(r"\b[^\W\d_]\.(?:\s*[^\W\d_]\.)+"), lambda found: re.sub(r"[.\s]", "", found[0])),
    (re.compile(r"\A\s*['‘]([^'‘’]+)['’]\.?\s*\Z"), r"\1"),
)
_DRAWN = re.compile("[\ufe0e\ufe0f]")  # whether an emoji is drawn in colour
_JOINERS = "\u200c\u200d"  # they tell words apart in some scripts, and join emoji
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
    count = sum(map(len, values.values()))
    return summarise(sum(means) / len(means), resampled / len(values), count)


def summarise(value: float, resampled: np.ndarray, items: int) -> Score:
    """A value with its percentile interval from resamples, float ``[S]``; what rounding alone keeps from 0 is 0."""
    ends = (value, *np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]))
    value, low, high = (0.0 if abs(end) < _ROUNDING else float(end) for end in ends)
    return Score(value=value, low=low, high=high, items=items)


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
    """What two short answers are compared by: ``"The red one."`` -> ``"red one"``.

    Without case, the punctuation of sentences and brackets, articles before a word, and repeated blanks. What says
    something stays: symbols (``C#``, ``+``), signs and points of numbers (``-3``, ``.5``), emoji, the marks of all
    scripts, and an ``a`` that is no article, as an option (``A``, ``(a)``) or in ``vitamin A``. A text without a letter
    or digit stays as it is, so that ``?`` is not nothing.
    """
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFD", _DRAWN.sub("", text)).casefold())
    text = text.translate(_WIDE)
    for pattern, written in _VARIANTS:
        text = pattern.sub(written, text)
    words = _without_articles([(word, _plain(word)) for word in _EMPHASIS.sub(r"\2", text).split()])
    plain = " ".join(" ".join(words).split())
    if any(map(str.isalnum, plain)):
        return plain
    raw = " ".join(text.split())
    if plain and (found := _BRACKETED.fullmatch(raw)):  # (+) and +. are the symbol
        return str(found[1] or found[2]).strip()
    return raw


def _plain(word: str) -> str:
    """One word, lower case, with blanks in place of what says nothing."""
    kept = {found.start() for found in _NUMERIC.finditer(word)}
    shown = []
    for place, letter in enumerate(word):
        kind = unicodedata.category(letter)
        between = word[place - 1 : place].isalpha() and word[place + 1 : place + 2].isalpha()
        if kind == "Pd" or letter == "−":
            shown.append(" " if between else "-")
        elif letter == "’" and between:
            shown.append("'")
        elif place in kept or letter in _TELLING or letter in _JOINERS or kind == "Pc":
            shown.append(letter)
        else:
            shown.append(" " if kind[0] in "PCZ" or letter in "`´" else letter)
    return "".join(shown).strip(_JOINERS + " ")


def _without_articles(words: Sequence[tuple[str, str]]) -> list[str]:
    """The plain words without those that are articles: followed by a blank and a word that is not a single letter."""
    left = []
    for (raw, plain), (_, after) in zip(words, [*words, ("", "")][1:], strict=True):
        followed = any(map(str.isalnum, after)) and not (plain == "a" and len(after) == 1 and after.isalpha())
        if plain in _ARTICLES and raw.endswith(plain) and followed:
            continue
        left.append(plain)
    return left


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
