"""Yes or no, counted as published: POPE, MME, HallusionBench, NLVR; and questions that others score.

What was said is read as each benchmark's own evaluation reads it. Beside it stand the same scores by P(yes): whether "Yes" is
more likely than "No" as the answer, which needs no words that can be read.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from vlm_distill_cache.data.benchmarks.items import Item, OpenItem, YesNoItem
from vlm_distill_cache.data.benchmarks.yes_no import COGNITION, PERCEPTION
from vlm_distill_cache.stage2_student.suite.measures import Measure, mean_measure
from vlm_distill_cache.stage2_student.suite.requests import Generate, Metric, Request, Result, Weigh, instructed

_TOKENS = 16
_LONG_TOKENS = 1024  # LLaVA's model_vqa.py
_WORDS = {"yes": True, "true": True, "no": False, "false": False}
_LETTERS = re.compile(r"[^\W\d_]+")
_SAYS = re.compile(r"\b(yes|no|true|false)\b")
_SURE = re.compile(r"\b(?:no|without|beyond) (?:an?y? )?doubt\b")
# "yes, and no", "no problem: yes"
_BOTH = re.compile(r"\W*(yes|no|true|false)(?:\W+(?:and|or)| (?!not\b)\w+)?\W+(yes|no|true|false)\b")
_CLAUSE = re.compile(r"[.,;:!?\n]|\b(?:therefore|thus|hence|so (?=it|the|yes|no)|(?<!anything )but)\b")
_NEGATION = re.compile(  # and whatever else leaves open, or takes back, what is said after it in its clause
    r"(?:n't|\b(?:not|cannot|never|nor|neither|none|nothing|nobody|hardly|scarcely|barely|rarely|seldom|far from|doubt\w*|"
    r"unlikely|unsure|unclear|uncertain|whether|if|anything but|almost|nearly|part(?:ial)?ly|(?:wrong|incorrect) (?:to|that)))\b"
)
_DENIED = re.compile(r"(?:\bnot|n't)(?: (?:(?!only)\w+ly|quite|at all|a|the))? $")  # directly before the word
_BY_LIKELIHOOD = "p_yes_"


def parse_yes_no(text: str) -> bool | None:
    """Read yes or no (true or false) out of an answer; None where it says neither, or both.

    The first word decides ("No, it is true that ..."), unless its contrary follows ("yes and no"); else what is said anywhere,
    if it is said alone. A not directly before a word turns it round ("it is not true"); one further off in its clause, or
    a word like hardly, leaves open what is meant ("I do not know whether that is true").
    """
    text = _SURE.sub("", text.lower().replace("\u2019", "'"))
    both, first = _BOTH.match(text), _LETTERS.search(text)
    if both and _WORDS[both[1]] != _WORDS[both[2]]:
        return None
    if first and first[0] in _WORDS:
        return _WORDS[first[0]]
    said: set[bool | None] = set()
    for clause in _CLAUSE.split(text):
        for word in _SAYS.finditer(clause):
            before = clause[: word.start()]
            denied, unclear = _DENIED.search(before) is not None, _NEGATION.search(before) is not None
            said.add(_WORDS[word[0]] != denied if denied or not unclear else None)
    return said.pop() if len(said) == 1 else None


def parse_pope(text: str) -> bool:
    """As POPE's ``evaluate.py``: no where the first sentence has No, no or not as a word, else yes, whatever it says."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def parse_mme(text: str) -> bool | None:
    """As MME's ``calculation.py``: yes or no within the first four characters, in small letters; else neither."""
    begins = text.lower()[:4]
    return True if "yes" in begins else False if "no" in begins else None


@dataclass(frozen=True)
class _Answer:
    """One item as it was answered: ``yes`` is 1 where yes was said, 0 where no was, None where neither was.

    By P(yes) a tie is one half.
    """

    item: YesNoItem
    yes: float | None

    @property
    def right(self) -> float:
        """1 where it is right, 0 where it is wrong or says neither."""
        return 0.0 if self.yes is None else self.yes if self.item.right else 1 - self.yes

    @property
    def unit(self) -> str:
        """What is resampled: questions about one picture together."""
        return self.item.group or str(self.item.extra.get("picture") or self.item.item_id)


Count = Callable[[Sequence[_Answer], str], list[Measure]]


@dataclass(frozen=True)
class YesNoMetric:
    """Asks for an answer and for P(yes).

    Attributes:
        parse: What an answer says.
        count: The measures of answers; its second argument begins their names.
    """

    parse: Callable[[str], bool | None]
    count: Count

    def requests(self, item: Item, instruction: str) -> tuple[Request, ...]:
        """One answer in words, and how likely Yes and No are after the same question."""
        assert isinstance(item, YesNoItem)
        question = instructed(item.question, instruction)
        weigh = Weigh(image=item.image, question=question, answers=("Yes", "No"))
        return Generate(image=item.image, question=question, max_tokens=_TOKENS), weigh

    def measures(self, items: Sequence[Item], results: Sequence[Sequence[Result]]) -> list[Measure]:
        """As published, by what was said; then by P(yes); then the share of answers that say neither."""
        said, likely, unread = [], [], []
        for item, (text, weights) in zip(items, results, strict=True):
            assert isinstance(item, YesNoItem)
            if item.right is None:
                continue
            verdict = self.parse(str(text))
            said.append(_Answer(item, None if verdict is None else float(verdict)))
            (yes, _), (no, _) = cast("list[list[float]]", weights)
            likely.append(_Answer(item, 0.5 if yes == no else float(yes > no)))
            unread.append(float(parse_yes_no(str(text)) is None))
        if not said:
            return []
        neither = mean_measure(
            "unparsed",
            [answer.item.item_id for answer in said],
            unread,
            heading="unparsed: neither yes nor no",
            gains=False,
        )
        return [*self.count(said, ""), *self.count(likely, _BY_LIKELIHOOD), neither]


@dataclass
class _Sums:
    """A ratio of sums, unit by unit."""

    hits: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    of: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, unit: str, hit: float, of: float = 1.0) -> None:
        self.hits[unit] += hit
        self.of[unit] += of

    def measure(self, name: str, heading: str, *, gains: bool | None = True) -> Measure:
        units = list(self.of)
        values = [[column[unit] for unit in units] for column in (self.hits, self.of)]
        return Measure(name=name, units=units, hits=values[0], of=values[1], heading=heading, gains=gains)


def _heading(prefix: str, text: str) -> str:
    return f"{text} by P(yes)" if prefix else text


def _count_pope(answers: Sequence[_Answer], prefix: str) -> list[Measure]:
    """F1, accuracy, precision, recall and share of yes: the mean of the splits, and each split.

    Source:
        Li et al. 2023 (arXiv:2305.10355) and their ``evaluate.py``; yes is the positive answer.
    """
    by_split: dict[str, list[_Answer]] = defaultdict(list)
    for answer in answers:
        for split in answer.item.kind.split(","):  # VLMEvalKit's table has a question of several splits once
            by_split[split].append(answer)
    if set(by_split) == {""}:
        return _binary(answers, prefix, "")
    parts = {split: _binary(by_split[split], prefix, f"/{split}") for split in sorted(by_split)}
    means = [
        Measure(
            name=measure.name.rpartition("/")[0],
            heading=measure.heading.rpartition(",")[0],
            parts=[part[place].name for part in parts.values()],
            gains=measure.gains,
        )
        for place, measure in enumerate(next(iter(parts.values())))
    ]
    return [*means, *(measure for part in parts.values() for measure in part)]


def _binary(answers: Sequence[_Answer], prefix: str, suffix: str) -> list[Measure]:
    f1, accuracy, precision, recall, share = (_Sums() for _ in range(5))
    for answer in answers:
        yes, positive, unit = answer.yes or 0.0, float(bool(answer.item.right)), answer.unit
        hit = yes * positive
        f1.add(unit, 2 * hit, yes + positive)
        accuracy.add(unit, answer.right)
        precision.add(unit, hit, yes)
        recall.add(unit, hit, positive)
        share.add(unit, yes)
    told = (
        (f1, "f1", "F1", True),
        (accuracy, "accuracy", "accuracy", True),
        (precision, "precision", "precision", True),
        (recall, "recall", "recall", True),
        (share, "yes", "share of yes", None),
    )
    of_split = f", {suffix[1:]}" if suffix else ""
    return [
        sums.measure(f"{prefix}{name}{suffix}", _heading(prefix, heading) + of_split, gains=gains)
        for sums, name, heading, gains in told
    ]


def _count_mme(answers: Sequence[_Answer], prefix: str) -> list[Measure]:
    """Sums over tasks of accuracy and acc+ in percent: a picture counts for acc+ where both its questions are right.

    Pictures of which other than two questions were answered count nowhere: alone, a right answer would be a right pair.

    Source:
        Fu et al. 2023 (arXiv:2306.13394) and their ``calculation.py``, which refuses what is no pair.
    """
    pictures: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer in answers:
        pictures[answer.item.kind][answer.unit].append(answer.right)
    accuracy, plus = _Sums(), _Sums()
    scores: dict[str, Measure] = {}
    single: list[Measure] = []
    for task, asked in pictures.items():
        groups = {unit: rights for unit, rights in asked.items() if len(rights) == 2}
        units = list(groups)
        if not units:
            continue
        means = [sum(rights) / len(rights) for rights in groups.values()]
        whole = [float(min(rights) == 1) for rights in groups.values()]
        both = [mean + all_right for mean, all_right in zip(means, whole, strict=True)]
        scores[task] = mean_measure(f"{prefix}score/{task}", units, both, heading=f"{_heading(prefix, task)}, of 200")
        for sums, values in ((accuracy, means), (plus, whole)):
            for unit, value in zip(units, values, strict=True):
                sums.add(unit, value)
        if not prefix:
            single.append(mean_measure(f"acc/{task}", units, means, heading=f"acc, {task}"))
            single.append(mean_measure(f"acc+/{task}", units, whole, heading=f"acc+, {task}"))
    sums_of = [
        _sum_of(prefix, name, tasks, scores) for name, tasks in (("perception", PERCEPTION), ("cognition", COGNITION))
    ]
    total = [
        accuracy.measure(f"{prefix}acc", _heading(prefix, "acc")),
        plus.measure(f"{prefix}acc+", _heading(prefix, "acc+")),
    ]
    return [*(measure for measure in sums_of if measure), *total, *scores.values(), *single] if scores else []


def _sum_of(prefix: str, name: str, tasks: Sequence[str], scores: Mapping[str, Measure]) -> Measure | None:
    there = [task for task in tasks if task in scores]
    if not there:
        return None
    whole = "" if len(there) == len(tasks) else f" ({len(there)} of {len(tasks)} tasks)"
    heading = f"{_heading(prefix, name)}{whole}, of {200 * len(there)}"
    return Measure(name=f"{prefix}{name}", heading=heading, parts=[scores[task].name for task in there], summed=True)


def _count_hallusion(answers: Sequence[_Answer], prefix: str) -> list[Measure]:
    """Accuracy of questions (aAcc), of figures (fAcc) and of pairs (qAcc), of easy and hard pairs; and each of VD and VS.

    A figure or a pair is right where all its questions are. Without their GPT judge, which lets "I do not know" pass where a
    question supplements a missing figure, an answer that is neither yes nor no is wrong.

    Source:
        Guan et al. 2023 (arXiv:2310.14566) and their ``utils.py``: ``get_eval_all``, ``_fig``, ``_pair_all``, ``_pair_easy``,
        ``_pair_hard``.
    """
    measures = _hallusion(answers, prefix, "")
    for category in sorted({answer.item.kind for answer in answers}):
        measures += _hallusion([answer for answer in answers if answer.item.kind == category], prefix, f"/{category}")
    return measures


def _hallusion(answers: Sequence[_Answer], prefix: str, suffix: str) -> list[Measure]:
    single = _Sums()
    figures, pairs, easy, hard = (defaultdict[str, list[float]](list) for _ in range(4))
    for answer in answers:
        told, right = answer.item.extra, answer.right
        single.add(answer.unit, right)
        figure, pair = (
            "_".join(str(told[key]) for key in ("category", "subcategory", "set_id", last))
            for last in ("figure_id", "question_id")
        )
        if answer.item.kind != "VS" or str(told["figure_id"]) != "0":
            figures[figure].append(right)
        pairs[pair].append(right)
        if "visual_input" in told:
            (hard if str(told["visual_input"]) == "2" else easy)[pair].append(right)
    of_kind = f", {suffix[1:]}" if suffix else ""
    found = [single.measure(f"{prefix}aAcc{suffix}", _heading(prefix, "aAcc, questions") + of_kind)]
    for name, heading, groups in (
        ("fAcc", "fAcc, figures", figures),
        ("qAcc", "qAcc, question pairs", pairs),
        ("easy", "easy aAcc", easy),
        ("hard", "hard aAcc", hard),
    ):
        if groups:
            found.append(_all_right(f"{prefix}{name}{suffix}", groups, _heading(prefix, heading) + of_kind))
    return found


def _all_right(name: str, groups: Mapping[str, Iterable[float]], heading: str) -> Measure:
    return mean_measure(name, list(groups), [float(min(rights) == 1) for rights in groups.values()], heading=heading)


def _count_nlvr(answers: Sequence[_Answer], prefix: str) -> list[Measure]:
    """Accuracy, and consistency: sentences with which every picture is answered rightly.

    Source:
        Suhr et al. 2017 (``metrics_images.py``, whose "precision" is the accuracy) and 2019 (arXiv:1811.00491,
        ``metrics.py``).
    """
    single = _Sums()
    sentences: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        single.add(answer.unit, answer.right)
        if answer.item.group:
            sentences[answer.item.group].append(answer.right)
    found = [single.measure(f"{prefix}accuracy", _heading(prefix, "accuracy"))]
    if sentences:
        found.append(_all_right(f"{prefix}consistency", sentences, _heading(prefix, "consistency")))
    return found


@dataclass(frozen=True)
class AnswersOnly:
    """Asks for answers that others score."""

    def requests(self, item: Item, instruction: str) -> tuple[Request, ...]:
        """One answer in words, as long as it becomes."""
        assert isinstance(item, OpenItem)
        question = instructed(item.question, instruction)
        return (Generate(image=item.image, question=question, max_tokens=_LONG_TOKENS),)

    def measures(self, items: Sequence[Item], results: Sequence[Sequence[Result]]) -> list[Measure]:
        """None: what is right is not published with the questions."""
        return []


METRICS: Mapping[str, Metric] = {
    "pope": YesNoMetric(parse_pope, _count_pope),
    "mme": YesNoMetric(parse_mme, _count_mme),
    "hallusionbench": YesNoMetric(parse_yes_no, _count_hallusion),
    "nlvr": YesNoMetric(parse_yes_no, _count_nlvr),
    "answers-only": AnswersOnly(),
}
