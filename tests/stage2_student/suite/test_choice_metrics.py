"""Questions with options are counted as a slow count by hand does, whatever their number, order and rotations."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from vlm_distill_cache.data.benchmarks.items import ChoiceItem
from vlm_distill_cache.stage2_student.suite.measures import Measure, score
from vlm_distill_cache.stage2_student.suite.metrics.choices import METRICS, parse_option
from vlm_distill_cache.stage2_student.suite.requests import Generate, Result, Weigh

ANIMALS = ("cat", "dog", "red car", "car")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("B", 1),
        (" (b). ", 1),
        ("**C**", 2),
        ("D)", 3),
        ("B. dog", 1),
        ("B: a dog, I think", 1),
        ("The answer is C.", 2),
        ("The correct answer is **B**. Here is why: it barks.", 1),
        ("Option D", 3),
        ("answer: (A)", 0),
        ("I would say it must be A", 0),
        ("I see that B is right here", 1),
        ("It is a dog.", 1),
        ("答案是B。", 1),
        ("选A", 0),
        ("应选C选项，因为它是红色的", 2),
        ("red car", 2),
        ("It is the red car.", 2),  # which holds "car", too
        ("Car", 3),
        ("A dog", 1),  # an article
        ("A bird", None),
        ("E", None),  # beyond the four
        ("The answer is E.", None),
        ("A and B", None),
        ("Option A or (C)", None),
        ("B. dog, or C. red car", None),
        ("A. cat\nB. dog\nC. red car\nD. car", None),  # repeats the options
        ("a cat and a dog", None),
        ("category", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_an_answer_names_one_option_or_none(text: str, place: int | None):
    assert parse_option(text, ANIMALS) == place


NUMBERS = ("1", "2", "3", "4")
CHINESE = ("狗", "猫", "一只鸟", "不知道")


@pytest.mark.parametrize(
    ("texts", "options", "place"),
    [
        # Two letters, and letters that are denied, name none.
        (("A、C", "A，C", "A 和 C", "答案：A、B", "A B", "A. B.", "Answer: A or B", "not A or B"), ANIMALS, None),
        (
            ("neither A nor B", "not B", "不是A", "The answer isn't A.", "B is wrong", "B是错的", "U.S.A."),
            ANIMALS,
            None,
        ),
        (("It is not a dog.", "A dog or a cat", "no dog", "It could be A or maybe D", "all except B"), ANIMALS, None),
        # What is called the answer comes before other letters, in any case and width.
        (("Answer: b", "the answer is b", "option b", "Ｂ", "The answer is (b)", "It is B, not A"), ANIMALS, 1),
        (("A. cat is wrong. The answer is B.", "A. cat\nB. dog\nC. red car\nD. car\nAnswer: B"), ANIMALS, 1),
        (("<think>A? No, C</think> B", "The answer is A dog", "It isn't a cat but a dog"), ANIMALS, 1),
        (("A，因为是猫", "A is the answer", "The answer is A because it is"), ANIMALS, 0),
        # Letters inside an option's text are no letters.
        (("The answer is sample A.", "B. sample A", "sample A", "I see sample A"), ("sample B", "sample A", "none"), 1),
        (("The answer is A and B", "A and B"), ("x", "y", "z", "A and B"), 3),
        (("Yes. The man is B.",), ("Yes", "No"), None),
        # Ranges and what is ruled out are none; what is called the answer comes before options that are spoken of.
        (("A through D", "A to C", "from B to D"), ANIMALS, None),
        (("Answer is B because option A is a cat", "I think it's B, though C is possible", "__B__"), ANIMALS, 1),
        (("A. cat\nB. dog\nC. red car\nD. car\n\nB", "The answer is __B__", "It's B."), ANIMALS, 1),
        (("no idea", "There is no way to tell."), ("Yes", "No"), None),
        (("no", "No, it is not.", "No it does not", "The answer is no.", "No people are there."), ("Yes", "No"), 1),
        (("at least 2", "more than 2", "It has fewer than 2.", "other than 2"), NUMBERS, None),
        (("2.0", "2.", "$2"), NUMBERS, 1),
        (("1,000", "$1000", "1000.0"), ("$10", "$1,000", "10,00"), 1),
        # Numbers are whole ones.
        (("2.5", "-2", "1,200", "10:30", "3/4", "3-4"), NUMBERS, None),
        (("2", "It is 2.", "There are 2 cats", "(2)"), NUMBERS, 1),
        # Chinese has no blanks between words.
        (("答案是狗", "答案是狗。", "狗", "A选项"), CHINESE, 0),
        (("图里是一只鸟。",), CHINESE, 2),
        (("我认为这是猫", "不是"), ("是", "否"), None),
    ],
)
def test_an_answer_is_never_taken_for_another_option(texts: Sequence[str], options: Sequence[str], place: int | None):
    assert {text: parse_option(text, options) for text in texts} == dict.fromkeys(texts, place)


def test_letters_count_up_to_the_number_of_options():
    many = [f"thing {number}" for number in range(26)]
    for place, letter in enumerate("ABCDEFGHIJKLMNOPQRSTUVWXYZ"):
        for text in (letter, f"({letter})", f"{letter}. {many[place]}", f"The answer is {letter}."):
            assert parse_option(text, many) == place, text
        assert parse_option(letter, many[:place]) is None
    assert parse_option("D. both A and B", ["x", "y", "z", "both A and B"]) == 3
    assert parse_option("B", ["B", "A"]) == 1  # a letter, not the option's text


def item(name: str, count: int, right: int | None, **more: Any) -> ChoiceItem:
    options = tuple(f"{name}{number}" for number in range(count))
    return ChoiceItem(item_id=name, image=None, question=f"{name}?", options=options, right=right, **more)


def weighed(best: int, count: int) -> list[list[float]]:
    return [[-1.0 if place == best else -2.0, 1.0] for place in range(count)]


def values(measures: Sequence[Measure]) -> dict[str, float]:
    by_name = {measure.name: measure for measure in measures}
    assert len(by_name) == len(measures)
    found = {name: score(measure, by_name, resamples=2) for name, measure in by_name.items()}
    return {name: round(each.value, 6) for name, each in found.items() if each is not None}


def test_a_subset_of_two_levels_is_two_and_one_that_is_the_same_is_one():
    items = [item(name, 2, 0, kind=kind, extra={"kinds": [wide]}) for name, kind, wide in ("axy", "byx", "czz")]
    said: list[list[Result]] = [[letter, weighed(0, 2), weighed(0, 2)] for letter in "ABA"]
    measures = [each for each in METRICS["choices"].measures(items, said) if each.name.startswith("accuracy/")]
    assert {each.name.partition("/")[2]: list(each.units) for each in measures} == {
        "x": ["a"],
        "y (level 2)": ["a"],
        "y": ["b"],
        "x (level 2)": ["b"],
        "z": ["c"],
    }
    assert [each.heading for each in measures] == [each.name.partition("/")[2] for each in measures]


def test_hand_made_answers_have_the_values_of_a_count_by_hand():
    items = [
        item("p", 2, 0, kind="one", extra={"kinds": ["low"]}),
        item("q", 3, 2, kind="two", extra={"kinds": ["low"]}),
        item("r", 3, 1, kind="two"),
        item("s", 2, None),  # kept secret
    ]
    # said, likeliest letter, options' sums and tokens: the right one's sum is the greatest of p, its mean of q
    results: list[list[Result]] = [
        ["A", weighed(0, 2), [[-4.0, 1.0], [-6.0, 6.0]]],
        ["B", weighed(2, 3), [[-4.0, 2.0], [-5.0, 2.0], [-6.0, 6.0]]],
        ["B. r1", [[-1.0, 1.0], [-1.0, 1.0], [-2.0, 1.0]], [[-9.0, 1.0], [-3.0, 1.0], [-4.0, 1.0]]],
        ["nothing", weighed(0, 2), weighed(0, 2)],
    ]
    measures = METRICS["choices"].measures(items, results)
    assert measures[0].name == "accuracy"
    assert values(measures) == {
        "accuracy": round(2 / 3, 6),
        "accuracy/one": 1.0,
        "accuracy/low": 0.5,
        "accuracy/two": 0.5,
        "likelihood": round(2 / 3, 6),  # a tie is lost
        "likelihood/one": 1.0,
        "likelihood/low": 1.0,
        "likelihood/two": 0.5,
        "option_likelihood": round(2 / 3, 6),
        "option_likelihood_per_token": round(2 / 3, 6),
        "bias": 0.0,
        "bias/B": round(1 / 3, 6),  # said twice, right once
        "bias/C": -0.5,  # of two questions that have it
        "unparsed": 0.0,
    }
    silent: list[list[Result]] = [["nothing", *result[1:]] for result in results]
    more = values(METRICS["choices"].measures([*items, item("t", 3, 0)], [*results, silent[1]]))
    assert more["unparsed"] == 0.25
    # What names no option tells nothing of a bias.
    assert [more[f"bias{letter}"] for letter in ("", "/B", "/C")] == [0.0, round(1 / 3, 6), -0.5]
    assert not any(name.startswith("bias") for name in values(METRICS["choices"].measures(items, silent)))
    assert METRICS["choices"].measures(items[3:], results[3:]) == []
    assert METRICS["circular"].measures([], []) == []


def test_turns_are_asked_with_their_options_rotated_and_as_published():
    one = item("p", 3, 1, hint="Look.", extra={"asked": "p? (A) p0 (B) p1 (C) p2"})
    texts = [
        request.question for request in METRICS["circular"].requests(one, "Say it.") if isinstance(request, Generate)
    ]
    assert texts == [
        "Look.\np? (A) p0 (B) p1 (C) p2\nSay it.",
        "Look.\np?\nA. p1\nB. p2\nC. p0\nSay it.",
        "Look.\np?\nA. p2\nB. p0\nC. p1\nSay it.",
    ]
    assert [type(request).__name__ for request in METRICS["circular"].requests(one, "")] == [
        "Generate",
        "Weigh",
    ] * 3 + ["Weigh"]
    weigh = METRICS["choices"].requests(item("q", 2, 0), "")[1:]
    assert [(each.question, each.answers) for each in weigh if isinstance(each, Weigh)] == [
        ("q?\nA. q0\nB. q1", ("A", "B")),
        ("q?", ("q0", "q1")),
    ]


def published(items: Sequence[ChoiceItem]) -> list[ChoiceItem]:
    """The same questions as a file has them whose rows are rotations."""
    found = []
    for each in items:
        count = len(each.options)
        for turn in range(count):
            turned = (*each.options[turn:], *each.options[:turn])
            right = None if each.right is None else (each.right - turn) % count
            extra = {"turn": turn, "turns": count}
            name = each.item_id + "'" * turn
            found.append(
                ChoiceItem(
                    item_id=name,
                    group=each.item_id,
                    kind=each.kind,
                    image=None,
                    question="?",
                    options=turned,
                    right=right,
                    extra=extra,
                )
            )
    return found


def test_circular_accuracy_is_that_all_turns_are_right_published_or_made():
    generator = random.Random(0)
    items = [item(f"q{number}", generator.randint(2, 5), 0, kind=f"k{number % 3}") for number in range(40)]
    skill = {each.item_id: generator.random() ** 0.3 for each in items}
    said: dict[tuple[str, int], int] = {}  # by question and turn
    for each in items:
        count = len(each.options)
        for turn in range(count):
            right = (0 - turn) % count
            said[each.item_id, turn] = right if generator.random() < skill[each.item_id] else generator.randrange(count)

    def results(of: Sequence[ChoiceItem], circular: bool) -> list[list[Result]]:
        found = []
        for each in of:
            turn = each.extra.get("turn", 0)
            turns = [turn] if each.group else range(len(each.options))
            made: list[Result] = []
            for place in turns:
                chosen = said[each.group or each.item_id, place]
                made += ["ABCDE"[chosen], weighed(chosen, len(each.options))]
            found.append(made + ([weighed(0, len(each.options))] if turn == 0 else []))
        return found

    by_hand: dict[str, list[float]] = {}
    for each in items:
        count = len(each.options)
        hit = float(all(said[each.item_id, turn] == (0 - turn) % count for turn in range(count)))
        for name in ("circular", f"circular/{each.kind}"):
            by_hand.setdefault(name, []).append(hit)
        by_hand.setdefault("accuracy", []).append(float(said[each.item_id, 0] == 0))
    expected: Mapping[str, float] = {name: round(sum(hits) / len(hits), 6) for name, hits in by_hand.items()}
    for of in (items, published(items)):
        measures = METRICS["circular"].measures(of, results(of, circular=True))
        found = values(measures)
        assert measures[0].name == "circular"
        assert {name: found[name] for name in expected} == expected
        assert found["circular_likelihood"] == found["circular"]
        units = {measure.name: measure.units for measure in measures}
        assert list(units["circular"]) == [each.item_id for each in items]
        # Every letter is right as often as any other of a question, so that one that is always given is all bias.
        always = [["A" if isinstance(made, str) else made for made in row] for row in results(of, circular=True)]
        constant = values(METRICS["circular"].measures(of, always))
        assert constant["circular"] == 0
        assert constant["bias"] > 0.5
    cut = published(items)[: len(items[0].options) + 1]  # the second question lacks turns: it counts as asked once
    found = values(METRICS["circular"].measures(cut, results(cut, circular=True)))
    assert found["circular"] == by_hand["circular"][0]
    assert found["accuracy"] == sum(by_hand["accuracy"][:2]) / 2
