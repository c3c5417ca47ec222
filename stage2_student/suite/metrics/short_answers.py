"""Answers of a few words counted as published: VQA accuracy, ANLS, relaxed accuracy, GQA's accuracy and consistency.

Two normalisations are in use, and papers do not mix them: that of the VQA challenge (VQAv2, OK-VQA, VizWiz) and that of
MMF, from which TextVQA's server comes. Both are quirky; what they do to an answer is part of the score, so it is kept.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

from vlm_distill_cache.data.benchmarks.items import Item, OpenItem
from vlm_distill_cache.stage2_student.suite.measures import Measure, mean_measure
from vlm_distill_cache.stage2_student.suite.requests import Generate, Metric, Request, Result, instructed

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS = 32  # so many are taken out at most
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_WORDS)}
_ARTICLES = frozenset(("a", "an", "the"))
# What an apostrophe is put back into: each with any one of its apostrophes missing.
_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's "
    "how'd how'll how's i'd've isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've "
    "o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's "
    "someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've "
    "when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've"
)
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _APOSTROPHES.split()
    for place, character in enumerate(word)
    if character == "'" and word not in ("i'd've",)
}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the wrong way round, as published

_UNANSWERABLE = "unanswerable"


@lru_cache(maxsize=1 << 16)
def vqa_normal(answer: str) -> str:
    """An answer as the VQA challenge compares it: small letters, digits, no articles, little punctuation.

    Source:
        Antol et al. 2015 (arXiv:1505.00468) and their ``vqaEval.py``, quirks included: a mark that touches a blank anywhere
        is taken out everywhere, else each becomes a blank; a comma within a number takes all marks out.
    """
    text = _one_line(answer)
    whole = text
    joins = _COMMA_IN_NUMBER.search(whole) is not None
    for mark in _MARKS:
        text = text.replace(mark, "" if joins or f"{mark} " in whole or f" {mark}" in whole else " ")
    words = [_NUMBERS.get(word, word) for word in _PERIOD.sub("", text, count=_PERIODS).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


@lru_cache(maxsize=1 << 16)
def textvqa_normal(answer: str) -> str:
    """An answer as TextVQA's server compares it: first without commas and question marks, ``'s`` a word of its own.

    Source:
        MMF's ``EvalAIAnswerProcessor`` (Singh et al. 2019, arXiv:1904.08920), which LLaVA's scripts use, too.
    """
    return vqa_normal(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_accuracy(said: str, answers: Sequence[str], normal: Callable[[str], str] = vqa_normal) -> float:
    """Mean over the annotators of ``min(others who said so / 3, 1)``; 0 to 1.

    Args:
        said: The model's answer.
        answers: Those of the annotators, ten as published.
        normal: How both are written before they are compared.
    """
    meant = normal(said)
    agreeing = sum(normal(answer) == meant for answer in answers)
    others = len(answers) - agreeing
    return (agreeing * min((agreeing - 1) / 3, 1) + others * min(agreeing / 3, 1)) / len(answers)


def vqa_accuracy_as_evaluated(said: str, answers: Sequence[str]) -> float:
    """`vqa_accuracy` as ``vqaEval.py`` has it: where all annotators agree, nothing is normalised, not even capitals.

    What is sent to the challenge was normalised before; what a model says was not.
    """
    unanimous = len(set(map(_one_line, answers))) == 1
    return vqa_accuracy(said, answers, _one_line if unanimous else vqa_normal)


def anls(said: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: that to the closest right one, 0 below one half.

    Source:
        Biten et al. 2019 (arXiv:1907.00490); as in the script of the Robust Reading Competition, the distance is that of
        texts in small letters with single blanks, the length that of the longer text as it stands.
    """
    return max(_similarity(said, answer) for answer in answers)


def _similarity(said: str, answer: str) -> float:
    length = max(len(said.upper()), len(answer.upper()))
    distance = _edits(" ".join(said.lower().split()), " ".join(answer.lower().split()))
    similarity = 1 - (distance / length if length else 0.0)
    return similarity if similarity >= 0.5 else 0.0


def _edits(one: str, other: str) -> int:
    """Levenshtein's distance: insertions, deletions, substitutions."""
    row = list(range(len(other) + 1))
    for count, character in enumerate(one, 1):
        before, row = row, [count]
        for place, found in enumerate(other):
            row.append(min(before[place] + (character != found), before[place + 1] + 1, row[place] + 1))
    return row[-1]


def relaxed_accuracy(said: str, answers: Sequence[str]) -> float:
    """1 where a number is at most 5 % off, or a text is the same but for capitals; else 0.

    A percentage is a hundredth, on both sides. A right answer of 0 is compared as text.

    Source:
        ChartQA (Masry et al. 2022, arXiv:2203.10244), section 5.1; as in Pix2Struct's and lmms-eval's code.
    """
    return float(any(_is_relaxed(said, answer) for answer in answers))


def _is_relaxed(said: str, answer: str) -> bool:
    value, right = _number(said), _number(answer)
    if value is not None and right:
        return abs(value - right) / abs(right) <= 0.05
    return said.lower() == answer.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def gqa_normal(answer: str) -> str:
    """An answer as GQA's is written: small letters, no full stop at its end (LLaVA's ``convert_gqa_for_eval.py``)."""
    return answer.strip().rstrip(".").lower()


def gqa_accuracy(said: str, answers: Sequence[str]) -> float:
    """1 for the right answer, else 0."""
    return float(gqa_normal(said) in map(gqa_normal, answers))


Answered = Sequence[tuple[OpenItem, str]]  # items whose answers are known, with what the model said


@dataclass(frozen=True)
class ShortAnswers:
    """A mean over items of a score of one answer, also told for subsets.

    An item's subsets are its ``kind`` and the texts in ``extra["subsets"]``.

    Attributes:
        score: Of what was said, with the right answers; 0 to 1.
        name: Of the headline.
        heading: What tables call it.
        max_tokens: Longest answer.
        counts: Whether an item counts in the headline and in subsets; all by default.
        further: More measures of the same answers.
    """

    score: Callable[[str, Sequence[str]], float]
    name: str = "accuracy"
    heading: str = "VQA accuracy"
    max_tokens: int = 16
    counts: Callable[[OpenItem], bool] = lambda item: True
    further: Callable[[Answered], Sequence[Measure]] = lambda answered: ()

    def requests(self, item: Item, instruction: str) -> tuple[Request, ...]:
        """The question, and below it the instruction if there is one."""
        asked = cast("OpenItem", item)
        question = instructed(asked.question, instruction)
        return (Generate(image=asked.image, question=question, max_tokens=self.max_tokens),)

    def measures(self, items: Sequence[Item], results: Sequence[Sequence[Result]]) -> list[Measure]:
        """The mean, that of each subset, and what is counted further."""
        pairs = zip(cast("Sequence[OpenItem]", items), results, strict=True)
        answered = [(item, str(result[0])) for item, result in pairs if item.answers]
        counted = [(item, self.score(said, item.answers)) for item, said in answered if self.counts(item)]
        if not counted:
            return []
        subsets: dict[str, list[tuple[str, float]]] = defaultdict(list)
        order: dict[str, int] = {}  # answer types stand before question types
        for item, value in counted:
            for place, subset in enumerate(dict.fromkeys((item.kind, *item.extra.get("subsets", ())))):
                if subset:
                    subsets[subset].append((item.item_id, value))
                    order[subset] = min(place, order.get(subset, place))
        scores = [(item.item_id, value) for item, value in counted]
        return [
            _mean(self.name, scores, self.heading),
            *(
                _mean(f"{self.name}/{_word(subset)}", subsets[subset], subset)
                for subset in sorted(subsets, key=lambda each: (order[each], each))
            ),
            *self.further(answered),
        ]


def _mean(name: str, scores: Sequence[tuple[str, float]], heading: str) -> Measure:
    return mean_measure(name, [unit for unit, _ in scores], [value for _, value in scores], heading=heading)


def _word(subset: str) -> str:
    """A subset as part of a measure's name, in which ``/`` separates."""
    return subset.replace("/", "-")


def _as_evaluated(answered: Answered) -> list[Measure]:
    scores = [(item.item_id, vqa_accuracy_as_evaluated(said, item.answers)) for item, said in answered]
    return [_mean("accuracy_vqaeval", scores, "VQA accuracy, unanimous answers compared as they stand")]


def _unanswerable(answered: Answered) -> list[Measure]:
    """How well a model says that a question cannot be answered: precision, recall and F1 of the answer "unanswerable".

    The challenge's average precision needs a confidence, which no answer has.
    """
    truth = [(item, vqa_normal(said) == _UNANSWERABLE, item.extra.get("answerable")) for item, said in answered]
    known = [
        (item.item_id, float(said), 1.0 - float(answerable))
        for item, said, answerable in truth
        if answerable is not None
    ]
    if not known:
        return []
    units, said, right = zip(*known, strict=True)
    both = [one * other for one, other in zip(said, right, strict=True)]
    either = [one + other for one, other in zip(said, right, strict=True)]
    twice = [2 * value for value in both]
    heading = 'of saying "unanswerable"'
    return [
        Measure(name="unanswerable_f1", units=units, hits=twice, of=either, heading=f"F1 {heading}"),
        Measure(name="unanswerable_precision", units=units, hits=both, of=said, heading=f"precision {heading}"),
        Measure(name="unanswerable_recall", units=units, hits=both, of=right, heading=f"recall {heading}"),
    ]


def _is_balanced(item: OpenItem) -> bool:
    return bool(item.extra.get("balanced", True))


def _gqa_further(answered: Answered) -> list[Measure]:
    """Consistency, and what needs groups and choices, where annotations have them; over balanced questions, as published."""
    balanced = [(item, gqa_normal(said)) for item, said in answered if _is_balanced(item)]
    right = {item.item_id: gqa_accuracy(said, item.answers) for item, said in answered}
    return [*_consistency(balanced, right), *_distribution(balanced), *_belonging(balanced)]


def _consistency(balanced: Answered, right: Mapping[str, float]) -> list[Measure]:
    """Of the questions that were answered rightly: the share of the questions that they entail that were, too."""
    units, hits, of = [], [], []
    for item, _ in balanced:
        entailed = [
            right[other] for other in item.extra.get("entailed", ()) if other != item.item_id and other in right
        ]
        if entailed:
            units.append(item.item_id)
            of.append(right[item.item_id])
            hits.append(right[item.item_id] * sum(entailed) / len(entailed))
    return [Measure(name="consistency", units=units, hits=hits, of=of)] if units else []


def _distribution(balanced: Answered) -> list[Measure]:
    """How far the answers' frequencies are from the right ones in each group of questions: chi square by 100, less is better."""
    said: dict[str, Counter[str]] = defaultdict(Counter)
    right: dict[str, Counter[str]] = defaultdict(Counter)
    for item, answer in balanced:
        if group := item.extra.get("group"):
            said[group][answer] += 1
            right[group][gqa_normal(item.answers[0])] += 1
    if not right:
        return []
    hits, of = [], []
    for group, counts in right.items():
        square = sum((said[group][answer] - count) ** 2 / count for answer, count in counts.items())
        of.append(float(counts.total()))
        hits.append(square * counts.total() / 100)
    return [Measure(name="distribution", units=list(right), hits=hits, of=of, factor=1, gains=False)]


def _belonging(balanced: Answered) -> list[Measure]:
    """Whether an answer is one that can be given (valid), and one that makes sense in the world (plausible)."""
    found = []
    for name, heading in (("valid", "validity"), ("plausible", "plausibility")):
        known = [(item, said) for item, said in balanced if name in item.extra]
        if known:
            scores = [(item.item_id, float(said in item.extra[name])) for item, said in known]
            found.append(_mean(heading, scores, heading))
    return found


METRICS: Mapping[str, Metric] = {
    "vqa_accuracy": ShortAnswers(vqa_accuracy, further=_as_evaluated),
    "vizwiz_accuracy": ShortAnswers(
        vqa_accuracy, further=lambda answered: [*_as_evaluated(answered), *_unanswerable(answered)]
    ),
    "textvqa_accuracy": ShortAnswers(lambda said, answers: vqa_accuracy(said, answers, textvqa_normal)),
    "gqa_accuracy": ShortAnswers(gqa_accuracy, heading="accuracy", counts=_is_balanced, further=_gqa_further),
    "anls": ShortAnswers(anls, name="anls", heading="ANLS", max_tokens=32),
    "relaxed_accuracy": ShortAnswers(relaxed_accuracy, heading="relaxed accuracy"),
}
