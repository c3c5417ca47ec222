"""Yes or no, counted as published: values by hand, and slow references that count one answer after another."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from vlm_distill_cache.data.benchmarks.items import OpenItem, YesNoItem
from vlm_distill_cache.stage2_student.suite.measures import Measure, gain, score
from vlm_distill_cache.stage2_student.suite.metrics.table import METRICS
from vlm_distill_cache.stage2_student.suite.metrics.yes_no import parse_mme, parse_pope, parse_yes_no
from vlm_distill_cache.stage2_student.suite.requests import Generate, Result, Weigh

YES, NO, TIE = [[-1.0, 2], [-2.0, 2]], [[-3.0, 2], [-2.0, 2]], [[-2.0, 2], [-2.0, 2]]


def item(name: str, right: bool | None, **more: object) -> YesNoItem:
    return YesNoItem(item_id=name, image=None, question=f"{name}?", right=right, **more)  # type: ignore[arg-type]


def measured(metric: str, items: Sequence[YesNoItem], results: Sequence[Sequence[Result]]) -> dict[str, Measure]:
    found = METRICS[metric].measures(items, results)
    assert len({measure.name for measure in found}) == len(found)
    return {measure.name: measure for measure in found}


def values(measures: dict[str, Measure]) -> dict[str, float | None]:
    found = {name: score(measure, measures, resamples=20) for name, measure in measures.items()}
    return {name: entry and entry.value for name, entry in found.items()}


@pytest.mark.parametrize(
    ("text", "strict", "pope", "mme"),
    [
        ("Yes", True, True, True),
        ("no.", False, False, False),
        ("No, it is true that nobody is there", False, False, False),
        ("yes, and there is no dog", True, False, True),
        ("The answer is yes", True, True, None),
        ("There is not a dog. Yes", True, False, None),
        ("I see. No.", False, True, None),
        ("None", None, True, False),
        ("yes or no", None, False, True),
        ("Yes\nNo", None, True, True),
        ("It is not true.", False, False, None),
        ("The statement isn\u2019t quite true", False, True, None),
        ("That's not false.", True, False, None),
        ("I cannot say whether that is true", None, True, None),
        ("I am not sure, but yes.", True, False, None),
        ("It may be yes or no", None, False, None),
        ("It is hardly true", None, True, None),
        ("It is far from true", None, True, None),
        ("It depends on whether that is true", None, True, None),
        ("No doubt: yes", True, False, False),
        ("No problem, yes", None, False, False),
        ("No, not true", False, False, False),
        ("Yes, and no", None, False, True),
        ("I hardly see it so no", False, False, None),
        ("It is wrong to say that is true", None, True, None),
        ("The statement is incorrect and the answer is no", False, False, None),
        ("It is anything but true", None, True, None),
        ("False", False, True, None),
        ("", None, True, None),
    ],
)
def test_answers_are_read_as_each_benchmark_reads_them(text: str, strict: bool | None, pope: bool, mme: bool | None):
    assert (parse_yes_no(text), parse_pope(text), parse_mme(text)) == (strict, pope, mme)


def test_each_item_is_asked_for_words_and_for_the_likelihood_of_yes():
    words, weights = METRICS["pope"].requests(item("a", True), "Say it.")
    assert words == Generate(image=None, question="a?\nSay it.", max_tokens=16)
    assert weights == Weigh(image=None, question="a?\nSay it.", answers=("Yes", "No"))
    (long,) = METRICS["answers-only"].requests(OpenItem(item_id="b", image=None, question="Why?"), "")
    assert isinstance(long, Generate)
    assert long.max_tokens > 500
    assert METRICS["answers-only"].measures([OpenItem(item_id="b", image=None, question="Why?")], [["So."]]) == []


def test_pope_by_hand():
    kinds = ["random", "random", "random", "popular", "popular", "random,popular"]
    rights = [True, True, False, True, False, False]
    items = [item(str(place), right, kind=kind) for place, (kind, right) in enumerate(zip(kinds, rights, strict=True))]
    said = ["Yes", "No", "Yes", "Perhaps", "no", "Yes"]  # what is not no is yes
    likely = [YES, YES, NO, NO, TIE, NO]
    found = measured("pope", items, [[text, weights] for text, weights in zip(said, likely, strict=True)])
    got = values(found)
    # random: TP 1, FN 1, FP 2; popular: TP 1, TN 1, FP 1
    assert got["f1/random"] == pytest.approx(2 / 5)
    assert got["precision/random"] == pytest.approx(1 / 3)
    assert got["recall/random"] == pytest.approx(1 / 2)
    assert got["accuracy/random"] == pytest.approx(1 / 4)
    assert got["yes/random"] == pytest.approx(3 / 4)
    assert got["f1/popular"] == pytest.approx(2 / 3)
    assert got["f1"] == pytest.approx((2 / 5 + 2 / 3) / 2)
    assert got["accuracy"] == pytest.approx((1 / 4 + 2 / 3) / 2)
    assert got["p_yes_accuracy/random"] == 1
    assert got["p_yes_accuracy/popular"] == pytest.approx((0 + 0.5 + 1) / 3)
    assert got["p_yes_precision/popular"] == 0
    assert got["unparsed"] == pytest.approx(1 / 6)
    assert next(iter(found)) == "f1"


def test_pope_against_counting_one_by_one():
    generator = np.random.default_rng(0)
    items = [item(str(place), bool(generator.integers(2)), group=str(place // 6)) for place in range(300)]
    said = [str(generator.choice(["Yes", "No"])) for _ in items]
    got = values(measured("pope", items, [[text, YES] for text in said]))
    counts = dict.fromkeys(itertools.product((True, False), repeat=2), 0)
    for each, text in zip(items, said, strict=True):
        counts[text == "Yes", bool(each.right)] += 1
    hit, false_alarm, miss = counts[True, True], counts[True, False], counts[False, True]
    precision, recall = hit / (hit + false_alarm), hit / (hit + miss)
    assert got["precision"] == pytest.approx(precision)
    assert got["recall"] == pytest.approx(recall)
    assert got["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    assert got["yes"] == pytest.approx((hit + false_alarm) / 300)


def test_without_a_yes_there_is_no_precision_and_the_rest_stands():
    found = measured("pope", [item("a", True), item("b", False)], [["no", NO], ["no", NO]])
    got = values(found)
    assert (got["precision"], got["recall"], got["f1"], got["accuracy"]) == (None, 0, 0, 0.5)


def test_mme_by_hand():
    def pair(task: str, picture: int, *said: str) -> list[tuple[YesNoItem, list[Result]]]:
        rights = (True, False)
        return [
            (item(f"{task}{picture}{right}", right, kind=task, group=f"{task}/{picture}"), [text, YES])
            for right, text in zip(rights, said, strict=True)
        ]

    asked = [
        *pair("count", 1, "Yes", "No"),  # both right
        *pair("count", 2, "Yes", "Yes"),  # one of them
        *pair("OCR", 1, "It", "No"),
        *pair("code_reasoning", 1, "No", "Yes"),
    ]
    found = measured("mme", [each for each, _ in asked], [given for _, given in asked])
    got = values(found)
    assert got["acc/count"] == 0.75
    assert got["acc+/count"] == 0.5
    assert got["score/count"] == 1.25
    assert got["perception"] == pytest.approx(1.25 + 0.5)
    assert (got["cognition"], got["score/code_reasoning"]) == (0, 0)
    assert got["p_yes_perception"] == pytest.approx(0.5 + 0.5)  # yes to all: half of each pair
    assert (got["acc"], got["acc+"]) == (pytest.approx((1 + 0.5 + 0.5 + 0) / 4), 0.25)
    assert next(iter(found)) == "perception"
    assert "2 of 10 tasks" in found["perception"].heading
    lone = [(item("l", True, kind="count", group="count/3"), ["Yes", YES]), *pair("posters", 1, "Yes", "No")[:1]]
    more = values(measured("mme", [each for each, _ in asked + lone], [given for _, given in asked + lone]))
    assert {name: value for name, value in more.items() if name != "unparsed"} == {
        name: value for name, value in got.items() if name != "unparsed"
    }
    assert set(measured("mme", [each for each, _ in lone], [given for _, given in lone])) == {"unparsed"}
    assert found["perception"].factor == 100


def test_hallusionbench_by_hand_and_against_groups_one_by_one():
    generator = np.random.default_rng(1)
    rows = [
        (
            kind,
            sub,
            str(group),
            str(figure),
            str(question),
            "0" if (kind, figure) == ("VS", 0) else str(min(figure + 1, 2)),
        )
        for kind, sub in (("VS", "ocr"), ("VD", "ocr"), ("VD", "math"))
        for group in range(4)
        for figure in range(3)
        for question in range(2)
    ]
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id", "visual_input")
    items = [
        item(
            "_".join(row[:5]),
            bool(generator.integers(2)),
            kind=row[0],
            group="_".join(row[:3]),
            extra=dict(zip(keys, row, strict=True)),
        )
        for row in rows
    ]
    said = [str(generator.choice(["Yes", "No", "Unsure"], p=[0.48, 0.48, 0.04])) for _ in items]
    got = values(measured("hallusionbench", items, [[text, NO] for text in said]))
    right = {row: text == ("Yes" if each.right else "No") for row, each, text in zip(rows, items, said, strict=True)}

    def all_right(key: Sequence[int], chosen: Sequence[tuple[str, ...]]) -> float:
        names = {tuple(row[place] for place in key) for row in chosen}
        whole = [all(right[row] for row in chosen if tuple(row[place] for place in key) == name) for name in names]  # type: ignore[index]
        return sum(whole) / len(whole)

    for kind in ("", "VS", "VD"):
        of = [row for row in rows if kind in ("", row[0])]
        name = f"/{kind}" if kind else ""
        assert got[f"aAcc{name}"] == pytest.approx(sum(right[row] for row in of) / len(of))
        assert got[f"fAcc{name}"] == pytest.approx(
            all_right((0, 1, 2, 3), [row for row in of if row[:1] + row[3:4] != ("VS", "0")])
        )
        assert got[f"qAcc{name}"] == pytest.approx(all_right((0, 1, 2, 4), of))
        assert got[f"easy{name}"] == pytest.approx(all_right((0, 1, 2, 4), [row for row in of if row[5] != "2"]))
        assert got[f"hard{name}"] == pytest.approx(all_right((0, 1, 2, 4), [row for row in of if row[5] == "2"]))


def test_nlvr_is_consistent_where_a_sentence_is_answered_rightly_with_every_picture():
    items = [item(str(place), place % 2 == 0, group="a" if place < 3 else "b") for place in range(5)]
    got = values(measured("nlvr", items, [["Yes", YES], ["false", NO], ["true", TIE], ["no", NO], ["No", YES]]))
    assert got["accuracy"] == pytest.approx(4 / 5)
    assert got["consistency"] == pytest.approx(1 / 2)  # a's three are right, b's are not
    assert got["p_yes_accuracy"] == pytest.approx((1 + 1 + 0.5 + 1 + 1) / 5)
    assert got["p_yes_consistency"] == pytest.approx(1 / 2)
    alone = values(measured("nlvr", [item("x", True)], [["Yes", YES]]))
    assert "consistency" not in alone


@pytest.mark.parametrize("metric", ["pope", "mme", "nlvr"])
def test_two_models_have_the_same_units_and_what_is_kept_secret_counts_nowhere(metric: str):
    items = [item(str(place), bool(place % 2), kind="count", group=str(place // 2)) for place in range(8)]
    secret = item("s", None, kind="count", group="s")
    one = measured(metric, [*items, secret], [["Yes", YES]] * 9)
    other = measured(metric, [*items, secret], [["No" if place < 6 else "Yes", NO] for place in range(9)])
    assert {name: measure.units for name, measure in one.items()} == {
        name: measure.units for name, measure in other.items()
    }
    assert all("s" not in measure.units for measure in one.values())
    headline = next(iter(one))
    assert gain(one[headline], other[headline], (one, other), resamples=20) is not None
    assert METRICS[metric].measures([secret], [["Yes", YES]]) == []
