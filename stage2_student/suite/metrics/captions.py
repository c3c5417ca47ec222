"""How caption benchmarks are counted, as published: by likelihood, by the letter of two options, and by P(yes).

A caption's score is its log-probability given the picture, end of caption included: their sum, or (``per_token``) their mean,
which does not favour short captions. P(yes) is that of "Yes" against "No" as the answer to VQAScore's question. Whatever has to
win wins by more than `TIE`: a tie is lost, also one that rounding makes look like none. Dims: P pictures, C captions of an item.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations
from typing import cast

from vlm_distill_cache.data.benchmarks.items import CaptionItem, Item
from vlm_distill_cache.stage2_student.scores.metrics import LETTER_PROMPT, LETTER_TOKENS, Letter, parse_letter
from vlm_distill_cache.stage2_student.suite.measures import Measure, mean_measure
from vlm_distill_cache.stage2_student.suite.metrics.relations_left_out import SYMMETRIC
from vlm_distill_cache.stage2_student.suite.requests import LEAST, Generate, Metric, Request, Result, Weigh

YES_PROMPT = 'Does this figure show "{caption}"? Please answer yes or no.'
SAME_PROMPT = 'Do "{a}" and "{b}" mean the same? Please answer yes or no.'
YES_NO = ("Yes", "No")
_LEAST_OF_ATTRIBUTE = 25  # items of a pair of attributes that ARO counts
_OPPOSITES = (("left", "right"), ("on", "under"), ("front", "behind"))  # What's Up's pairs of pictures
_PER_TOKEN = "_per_token"
TIE = 1e-4  # nats; the same text at two places of a sequence differs by up to 2e-5 in float32


@dataclass(frozen=True)
class Answers:
    """What a model made of one item.

    Attributes:
        sums: Log-probability of each caption given each picture, nats ``[P][C]``.
        means: The same per token.
        yes: Log-odds of "Yes" against "No" for each, ``[P][C]``; empty where it was not asked.
        letters: For each picture and pair of a right and a wrong caption the letter given when the right one was (A), and
            when it was (B).
        same: Log-odds of "Yes" for each two captions in order (0 and 1, 0 and 2, 1 and 2), without the picture; empty
            from a model that answers nothing without one.
    """

    sums: Sequence[Sequence[float]]
    means: Sequence[Sequence[float]]
    yes: Sequence[Sequence[float]] = ()
    letters: Sequence[tuple[Letter | None, Letter | None]] = ()
    same: Sequence[float] = ()

    def by(self, way: str) -> Sequence[Sequence[float]]:
        """The scores of one way of asking: ``""``, ``"_per_token"`` or ``"_yes"``."""
        return {"": self.sums, _PER_TOKEN: self.means, "_yes": self.yes}[way]


Count = Callable[[Sequence[CaptionItem], Sequence[Answers]], list[Measure]]


@dataclass(frozen=True, kw_only=True)
class CaptionMetric:
    """Asks about caption items, and counts.

    Attributes:
        count: From items and what was made of them to measures, the headline first.
        letters: Ask which of a right and a wrong caption fits, in both orders.
        yes: Ask of every picture and caption whether they fit.
        same: Ask of every two captions whether they mean the same, without the picture.
    """

    count: Count
    letters: bool = False
    yes: bool = False
    same: bool = False

    def requests(self, item: Item, instruction: str) -> tuple[Request, ...]:
        """Captions of each picture; then letters, P(yes), and sameness, as far as they are asked."""
        found = cast("CaptionItem", item)
        return (
            *(Weigh(image=image, question="", answers=found.captions) for image in found.images),
            *(self._letters_of(found) if self.letters else ()),
            *(self._yes_of(found) if self.yes else ()),
            *(self._same_of(found) if self.same else ()),
        )

    def measures(self, items: Sequence[Item], results: Sequence[Sequence[Result]]) -> list[Measure]:
        """Count; no items make no measure."""
        found = [cast("CaptionItem", item) for item in items]
        if not found:
            return []
        return self.count(found, [self.answers(item, made) for item, made in zip(found, results, strict=True)])

    def answers(self, item: CaptionItem, results: Sequence[Result]) -> Answers:
        """Take the results of an item's requests apart."""
        left = iter(results)
        pictures, captions = len(item.images), len(item.captions)
        weights = [cast("list[list[float]]", next(left)) for _ in range(pictures)]
        pairs = sum(1 for _ in _right_and_wrong(item)) if self.letters else 0
        letters = [(parse_letter(str(next(left))), parse_letter(str(next(left)))) for _ in range(pairs)]
        yes = [[_odds(next(left)) for _ in range(captions)] for _ in range(pictures)] if self.yes else []
        asked = [next(left) for _ in combinations(range(captions), 2)] if self.same else []
        same = [_odds(result) for result in asked] if all(asked) else []
        return Answers(
            sums=[[nats for nats, _ in row] for row in weights],
            # What cannot be said at all is no likelier for being long.
            means=[[nats / max(tokens, 1) if nats > LEAST else nats for nats, tokens in row] for row in weights],
            yes=yes,
            letters=letters,
            same=same,
        )

    def _letters_of(self, item: CaptionItem) -> Iterator[Request]:
        for picture, right, wrong in _right_and_wrong(item):
            for first, second in ((right, wrong), (wrong, right)):
                text = LETTER_PROMPT.format(a=item.captions[first], b=item.captions[second])
                yield Generate(image=item.images[picture], question=text, max_tokens=LETTER_TOKENS)

    def _yes_of(self, item: CaptionItem) -> Iterator[Request]:
        for image in item.images:
            for caption in item.captions:
                yield Weigh(image=image, question=YES_PROMPT.format(caption=caption), answers=YES_NO)

    def _same_of(self, item: CaptionItem) -> Iterator[Request]:
        for one, other in combinations(item.captions, 2):
            yield Weigh(image=None, question=SAME_PROMPT.format(a=one, b=other), answers=YES_NO, optional=True)


def _right_and_wrong(item: CaptionItem) -> Iterator[tuple[int, int, int]]:
    """Of each picture the places of a right and a wrong caption, each with each."""
    for picture, fits in enumerate(item.fits):
        for right in (place for place, fit in enumerate(fits) if fit):
            for wrong in (place for place, fit in enumerate(fits) if not fit):
                yield picture, right, wrong


def _odds(result: Result) -> float:
    (yes, _), (no, _) = cast("list[list[float]]", result)
    return yes - no


def _above(score: float, other: float) -> bool:
    return score > other + TIE


def _wins(scores: Sequence[float], fits: Sequence[bool]) -> float:
    """Whether all right captions score higher than all wrong ones."""
    right = [score for score, fit in zip(scores, fits, strict=True) if fit]
    wrong = [score for score, fit in zip(scores, fits, strict=True) if not fit]
    return float(_above(min(right), max(wrong)))


@dataclass
class _Table:
    """Measures of one benchmark in the order in which they are told, each with those of its subsets.

    Attributes:
        items: What was asked.
        family: The sign behind which a subset's name goes on (``swap_obj``: ``_``), so that families have a mean, too.
        overall: Whether the whole is the mean over items; else the unweighted mean over subsets.
    """

    items: Sequence[CaptionItem]
    family: str = ""
    overall: bool = False
    measures: list[Measure] = field(default_factory=list)

    def add(self, name: str, values: Sequence[float], heading: str = "", *, gains: bool | None = True) -> None:
        """One value an item."""
        units = [item.item_id for item in self.items]
        self.add_units(name, units, values, [item.kind for item in self.items], heading, gains=gains)

    def add_units(
        self,
        name: str,
        units: Sequence[str],
        values: Sequence[float],
        kinds: Sequence[str],
        heading: str = "",
        *,
        gains: bool | None = True,
    ) -> None:
        """One value a unit."""
        if not units:
            return
        by_kind: dict[str, list[int]] = defaultdict(list)
        for place, kind in enumerate(kinds):
            by_kind[kind or "other"].append(place)
        parts = {
            kind: mean_measure(
                f"{name}/{kind}",
                [units[place] for place in by_kind[kind]],
                [values[place] for place in by_kind[kind]],
                heading=kind,
                gains=gains,
            )
            for kind in sorted(by_kind)
        }
        if not any(kinds) or self.overall:
            self.measures.append(mean_measure(name, units, values, heading=heading, gains=gains))
        else:
            names = [part.name for part in parts.values()]
            self.measures.append(Measure(name=name, parts=names, heading=heading, gains=gains))
        if any(kinds):
            self.measures += [*self._families(name, parts, gains), *parts.values()]

    def _families(self, name: str, parts: Mapping[str, Measure], gains: bool | None) -> Iterator[Measure]:
        if not self.family:
            return
        families: dict[str, list[str]] = defaultdict(list)
        for kind, part in parts.items():
            families[kind.partition(self.family)[0]].append(part.name)
        for family, names in families.items():
            if family not in parts:
                yield Measure(name=f"{name}/{family}", parts=names, heading=family, gains=gains)

    def add_wins(self, name: str, answers: Sequence[Answers], ways: Mapping[str, str]) -> None:
        """Whether all right captions of the (first) picture win, by each way of scoring, with its heading."""
        for way, heading in ways.items():
            values = [_wins(each.by(way)[0], item.fits[0]) for item, each in zip(self.items, answers, strict=True)]
            self.add(f"{name}{way}", values, heading)

    def add_letters(self, answers: Sequence[Answers]) -> None:
        """The letter question in both orders, as `scores.metrics.score_letters` has it; over an item's pairs their mean."""
        first = [[given == "A" for given, _ in each.letters] for each in answers]
        second = [[given == "B" for _, given in each.letters] for each in answers]
        sign = {"A": 1.0, "B": -1.0, None: 0.0}
        both = [float(all(a + b)) for a, b in zip(first, second, strict=True)]
        given = [[letter for pair in each.letters for letter in pair] for each in answers]
        self.add(
            "letters", [_mean([*a, *b]) for a, b in zip(first, second, strict=True)], "letters, mean of both orders"
        )
        self.add("letters_both_right", both, "letters, both orders right")
        self.add("letters_right_first", [_mean(values) for values in first], "letters, right caption first")
        self.add("letters_right_second", [_mean(values) for values in second], "letters, right caption second")
        bias = [_mean([sign[letter] for letter in letters]) for letters in given]
        self.add("letter_bias", bias, "share of A less share of B", gains=None)
        unparsed = [_mean([letter is None for letter in letters]) for letters in given]
        self.add("unparsed", unparsed, "unparsed: no single letter", gains=False)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_WAYS = {"": "likelihood", _PER_TOKEN: "likelihood per token"}


def _count_sugarcrepe(items: Sequence[CaptionItem], answers: Sequence[Answers]) -> list[Measure]:
    table = _Table(items, family="_")
    table.add_wins("likelihood", answers, _WAYS)
    table.add_letters(answers)
    table.add("yes", [_wins(each.yes[0], item.fits[0]) for item, each in zip(items, answers, strict=True)], "P(yes)")
    return table.measures


def _count_sugarcrepe_pp(items: Sequence[CaptionItem], answers: Sequence[Answers]) -> list[Measure]:
    table = _Table(items, family="_")
    ways = {"": "ITT by likelihood", _PER_TOKEN: "ITT by likelihood per token", "_yes": "ITT by P(yes)"}
    table.add_wins("itt", answers, ways)
    for place, name in enumerate(("first", "second")):
        for way, how in {"": "likelihood", "_yes": "P(yes)"}.items():
            values = [float(_above(each.by(way)[0][place], each.by(way)[0][2])) for each in answers]
            table.add(f"{name}_positive{way}", values, f"{name} positive above the negative, by {how}")
    if all(each.same for each in answers):
        told = [float(_above(each.same[0], max(each.same[1:]))) for each in answers]
        table.add("tot_yes", told, "TOT by P(yes) that two captions mean the same")
    table.add_letters(answers)
    return table.measures


def _count_matches(items: Sequence[CaptionItem], answers: Sequence[Answers]) -> list[Measure]:
    """Winoground's text, image and group score; BiVLC calls them I2T, T2I and group score, and tells their halves."""
    table = _Table(items, overall=True)
    headings = {"_yes": "P(yes)", "": "likelihood", _PER_TOKEN: "likelihood per token"}
    for way, heading in headings.items():
        halves = [_halves(each.by(way)) for each in answers]
        for name, places in {"group": (0, 1, 2, 3), "text": (0, 1), "image": (2, 3)}.items():
            values = [float(all(each[place] for place in places)) for each in halves]
            table.add(f"{name}{way}", values, f"{name} score, {heading}")
    for place, name in enumerate(("first_image", "second_image", "first_caption", "second_caption")):
        values = [float(_halves(each.yes)[place]) for each in answers]
        table.add(f"{name}_yes", values, f"{name.replace('_', ' ')} finds its match, P(yes)")
    table.add_letters(answers)
    return table.measures


def _halves(scores: Sequence[Sequence[float]]) -> tuple[bool, bool, bool, bool]:
    """Whether each picture prefers its caption, and each caption its picture; ``scores`` are ``[2][2]``."""
    (same, crossed), (crossed_back, same_back) = scores
    return (
        _above(same, crossed),
        _above(same_back, crossed_back),
        _above(same, crossed_back),
        _above(same_back, crossed),
    )


def _count_valse(items: Sequence[CaptionItem], answers: Sequence[Answers]) -> list[Measure]:
    table = _Table(items)
    table.add_wins("likelihood", answers, {"": "pairwise, likelihood", _PER_TOKEN: "pairwise, likelihood per token"})
    odds = [each.yes[0] for each in answers]
    said = [[_above(each, 0) for each in pair] for pair in odds]  # P(yes) > 1/2
    table.add("yes", [float(_above(right, wrong)) for right, wrong in odds], "pairwise, P(yes)")
    table.add("yes_accuracy", [(right + (not wrong)) / 2 for right, wrong in said], "accuracy of P(yes) > 1/2")
    table.add("yes_caption", [float(right) for right, _ in said], "captions called right")
    table.add("yes_foil", [float(not wrong) for _, wrong in said], "foils called wrong")
    table.add_letters(answers)
    return table.measures


def _count_aro(
    items: Sequence[CaptionItem], answers: Sequence[Answers], *, takes: Callable[[str, int], bool]
) -> list[Measure]:
    """The mean over those relations, or pairs of attributes, that ``takes`` takes by name and number of items; then over items."""
    counts = Counter(item.kind for item in items)
    chosen = [place for place, item in enumerate(items) if item.kind and takes(item.kind, counts[item.kind])]
    macro = _Table([items[place] for place in chosen])
    macro.add_wins("likelihood", [answers[place] for place in chosen], _WAYS)
    table = _Table([replace(item, kind="") for item in items])
    table.add_wins(
        "likelihood_items", answers, {"": "likelihood, all items", _PER_TOKEN: "likelihood per token, all items"}
    )
    table.add_letters(answers)
    table.add("yes", [_wins(each.yes[0], item.fits[0]) for item, each in zip(items, answers, strict=True)], "P(yes)")
    return [*macro.measures, *table.measures]


def _count_order(items: Sequence[CaptionItem], answers: Sequence[Answers]) -> list[Measure]:
    table = _Table(items)
    table.add_wins("likelihood", answers, _WAYS)
    return table.measures


def _count_whats_up(items: Sequence[CaptionItem], answers: Sequence[Answers]) -> list[Measure]:
    """Single pictures, pairs of opposite places and sets of four; a pair or set that is not whole is not counted."""
    table = _Table(items, family="-")
    for way, how in {**_WAYS, "_yes": "P(yes)"}.items():
        right = [_wins(each.by(way)[0], item.fits[0]) for item, each in zip(items, answers, strict=True)]
        table.add(f"accuracy{way}", right, f"single pictures, {how}")
        sets: dict[str, dict[str, float]] = defaultdict(dict)  # by set: of each place whether it was right
        kinds: dict[str, str] = {}
        for item, value in zip(items, right, strict=True):
            if item.group:
                sets[item.group][item.extra["place"]] = value
                kinds[item.group] = item.kind
        pairs = {
            f"{group}/{one}-{other}": (kinds[group], found[one] * found[other])
            for group, found in sets.items()
            for one, other in _OPPOSITES
            if one in found and other in found
        }
        whole = {group: (kinds[group], math.prod(found.values())) for group, found in sets.items() if len(found) == 4}
        for name, units in (("pairs", pairs), ("sets", whole)):
            values, of = [value for _, value in units.values()], [kind for kind, _ in units.values()]
            table.add_units(f"{name}{way}", list(units), values, of, f"{name}, {how}")
    return table.measures


METRICS: Mapping[str, Metric] = {
    "sugarcrepe": CaptionMetric(count=_count_sugarcrepe, letters=True, yes=True),
    "sugarcrepe-pp": CaptionMetric(count=_count_sugarcrepe_pp, letters=True, yes=True, same=True),
    "winoground": CaptionMetric(count=_count_matches, letters=True, yes=True),
    "bivlc": CaptionMetric(count=_count_matches, letters=True, yes=True),
    "valse": CaptionMetric(count=_count_valse, letters=True, yes=True),
    "aro-relation": CaptionMetric(
        count=partial(_count_aro, takes=lambda kind, _: kind not in SYMMETRIC), letters=True, yes=True
    ),
    "aro-attribution": CaptionMetric(
        count=partial(_count_aro, takes=lambda _, count: count >= _LEAST_OF_ATTRIBUTE), letters=True, yes=True
    ),
    "aro-order": CaptionMetric(count=_count_order),
    "whats-up": CaptionMetric(count=_count_whats_up, yes=True),
}
