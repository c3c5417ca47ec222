"""Caption benchmarks are counted as published: against slow counting item by item, and by hand."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from vlm_distill_cache.data.benchmarks.items import CaptionItem
from vlm_distill_cache.data.images.load import ImageBytes
from vlm_distill_cache.stage2_student.scores.metrics import score_letters
from vlm_distill_cache.stage2_student.suite.measures import score
from vlm_distill_cache.stage2_student.suite.metrics.captions import METRICS
from vlm_distill_cache.stage2_student.suite.requests import LEAST, Generate, Request, Result, Weigh

PICTURES = (ImageBytes(b"", "one"), ImageBytes(b"", "other"))
IS_A, IS_B = ("A",), ("(B)", "B.")
CROSS = ((True, False), (False, True))


def item(number: int, kind: str = "", captions: Sequence[str] = ("a", "b"), **more) -> CaptionItem:
    """An item with one picture whose first caption is the right one, or with what is given."""
    fits = tuple(place == 0 for place in range(len(captions)))
    given = {"images": PICTURES[:1], "fits": (fits,), **more}
    return CaptionItem(item_id=str(number), kind=kind, captions=tuple(captions), **given)


def values(metric: str, items: Sequence[CaptionItem], results: Sequence[Sequence[Result]]) -> dict[str, float]:
    measures = METRICS[metric].measures(items, results)
    by_name = {measure.name: measure for measure in measures}
    assert len(by_name) == len(measures)
    scores = {name: score(measure, by_name, resamples=20) for name, measure in by_name.items()}
    assert all(found is not None and found.low <= found.high for found in scores.values())
    return {name: found.value for name, found in scores.items() if found is not None}


def drawn(request: Request, draw: random.Random) -> Result:
    if isinstance(request, Generate):
        return draw.choice(["A", "(B)", "B.", "a cat", ""])
    return [[-9 * draw.random(), draw.randint(1, 6)] for _ in request.answers]


def asked(metric: str, items: Sequence[CaptionItem], seed: int = 0) -> list[list[Result]]:
    draw = random.Random(seed)
    return [[drawn(request, draw) for request in METRICS[metric].requests(each, "")] for each in items]


def weights(*rows: Sequence[tuple[float, int]]) -> list[Result]:
    return [[list(pair) for pair in row] for row in rows]


def answer(odds: float) -> Result:
    return [[odds, 2], [0.0, 2]]


def means(found: Sequence[float], kinds: Sequence[str]) -> dict[str, float]:
    grouped: Mapping[str, list[float]] = defaultdict(list)
    for value, kind in zip(found, kinds, strict=True):
        grouped[kind].append(value)
    return {kind: float(np.mean(held)) for kind, held in grouped.items()}


def test_sugarcrepe_by_hand():
    """Two subsets of other sizes: their unweighted mean is the score; sums and means per token may disagree."""
    items = [item(0, "swap_obj"), item(1, "swap_obj"), item(2, "add_att")]
    results = [
        [
            *weights([(-4.0, 4), (-3.0, 1)]),
            "A",
            "B",
            answer(1.0),
            answer(-1.0),
        ],  # longer, so that only the mean is higher
        [*weights([(-2.0, 2), (-5.0, 2)]), "A", "A", answer(0.0), answer(0.0)],  # a tie is lost
        [*weights([(-1.0, 1), (-2.0, 1)]), "B", "what?", answer(3.0), answer(2.0)],
    ]
    found = values("sugarcrepe", items, results)
    assert next(iter(found)) == "likelihood"
    assert found["likelihood/swap_obj"] == 0.5
    assert found["likelihood/add_att"] == 1.0
    assert found["likelihood"] == pytest.approx(0.75)  # not 2/3
    assert found["likelihood/swap"] == 0.5  # the family of a single subset here
    assert found["likelihood_per_token"] == pytest.approx(1.0)
    assert found["yes"] == pytest.approx(0.75)
    assert found["letters_both_right/swap_obj"] == 0.5
    assert found["letters/swap_obj"] == 0.75
    assert found["letters/add_att"] == 0.0
    assert found["letter_bias/swap_obj"] == 0.5  # A B and A A
    assert found["unparsed/add_att"] == 0.5


def test_sugarcrepe_is_counted_as_slow_counting_does():
    kinds = random.Random(1).choices(["swap_obj", "swap_att", "add_obj"], k=60)
    items = [item(n, kind) for n, kind in enumerate(kinds)]
    results = asked("sugarcrepe", items)
    found = values("sugarcrepe", items, results)
    right = [float(made[0][0][0] > made[0][1][0]) for made in results]
    per_kind = means(right, kinds)
    assert found["likelihood"] == pytest.approx(np.mean(list(per_kind.values())))
    assert found["likelihood/swap"] == pytest.approx((per_kind["swap_obj"] + per_kind["swap_att"]) / 2)
    given = [tuple({"A": "A", "(B)": "B", "B.": "B"}.get(made[place]) for place in (1, 2)) for made in results]
    letters = score_letters(given)
    for name, reference in {"letters": "mean", "letters_both_right": "both_right", "letter_bias": "bias"}.items():
        assert found[name] == pytest.approx(np.mean(list(means(letters[reference], kinds).values())))
    assert found["unparsed"] == pytest.approx(np.mean(list(means(letters["unparsed"], kinds).values())))


def test_both_orders_of_the_letter_question_are_asked():
    requests = METRICS["sugarcrepe"].requests(item(0, captions=["right one", "wrong one"]), "ignored")
    assert requests[0] == Weigh(image=PICTURES[0], question="", answers=("right one", "wrong one"))
    first, second = (request.question for request in requests[1:3])
    assert first.index("right one") < first.index("wrong one")
    assert second.index("right one") > second.index("wrong one")
    assert [request.question for request in requests[3:]] == [
        f'Does this figure show "{text}"? Please answer yes or no.' for text in ("right one", "wrong one")
    ]


def test_sugarcrepe_plus_plus_wants_both_positives_above_the_negative():
    items = [item(n, captions="abc", fits=((True, True, False),)) for n in range(50)]
    results = asked("sugarcrepe-pp", items)
    found = values("sugarcrepe-pp", items, results)
    slow = defaultdict(list)
    for made in results:
        first, second, wrong = (nats for nats, _ in made[0])
        slow["itt"].append(first > wrong and second > wrong)
        slow["first_positive"].append(first > wrong)
        slow["second_positive"].append(second > wrong)
        odds = [yes[0] - no[0] for yes, no in made[5:8]]
        slow["itt_yes"].append(odds[0] > odds[2] and odds[1] > odds[2])
        same = [yes[0] - no[0] for yes, no in made[8:]]
        slow["tot_yes"].append(same[0] > same[1] and same[0] > same[2])
    for name, reference in slow.items():
        assert found[name] == pytest.approx(np.mean(reference)), name
    last = METRICS["sugarcrepe-pp"].requests(items[0], "")[-3:]
    assert all(request.image is None and request.optional for request in last)
    cannot = [[*made[:-3], [], [], []] for made in results]  # a model that answers nothing without a picture
    assert values("sugarcrepe-pp", items, cannot) == {
        name: value for name, value in found.items() if not name.startswith("tot")
    }


@pytest.mark.parametrize("metric", ["winoground", "bivlc"])
def test_group_text_and_image_score(metric: str):
    """As published: a caption per picture, a picture per caption, and all four at once."""
    items = [item(n, ("swap", "add")[n % 2], images=PICTURES, fits=CROSS) for n in range(80)]
    results = asked(metric, items)
    found = values(metric, items, results)
    slow = defaultdict(list)
    for made in results:
        odds = [yes[0] - no[0] for yes, no in made[6:]]
        right = [text in good for text, good in zip(made[2:6], (IS_A, IS_B, IS_A, IS_B), strict=True)]
        slow["letters"].append(np.mean(right))
        slow["letters_both_right"].append(all(right))  # of both pictures
        tables = {
            "": [[nats for nats, _ in row] for row in made[:2]],
            "_per_token": [[nats / tokens for nats, tokens in row] for row in made[:2]],
            "_yes": [odds[:2], odds[2:]],
        }
        for way, s in tables.items():
            text = s[0][0] > s[0][1] and s[1][1] > s[1][0]
            image = s[0][0] > s[1][0] and s[1][1] > s[0][1]
            slow[f"text{way}"].append(text)
            slow[f"image{way}"].append(image)
            slow[f"group{way}"].append(text and image)
    assert next(iter(found)) == "group_yes"
    for name, reference in slow.items():
        assert found[name] == pytest.approx(np.mean(reference)), name
        assert found[f"{name}/swap"] == pytest.approx(np.mean(reference[::2])), name
    assert 0 < found["group"] < found["text"] < 1


@pytest.mark.parametrize("metric", sorted(METRICS))
def test_what_rounding_tells_apart_is_a_tie_and_a_tie_is_lost(metric: str):
    """A model that does not look wins nothing, neither by noise nor by the length of what it cannot say at all."""
    fits = {"winoground": CROSS, "bivlc": CROSS, "sugarcrepe-pp": ((True, True, False),)}.get(metric)
    more = {"fits": fits, "images": PICTURES[: len(fits)]} if fits else {}
    items = [item(n, captions=("a", "b", "c")[: len(fits[0]) if fits else 2], **more) for n in range(9)]
    draw = random.Random(3)
    for score_of in (lambda: -7 + draw.uniform(-2e-5, 2e-5), lambda: LEAST):

        def blind(request: Request, score_of=score_of) -> Result:
            return "" if isinstance(request, Generate) else [[score_of(), draw.randint(3, 4)] for _ in request.answers]

        def even(result: Result) -> Result:  # the same number of tokens, so that means tie where sums do
            return result if isinstance(result, str) else [[nats, 3 if nats > LEAST else n] for nats, n in result]

        results = [[even(blind(request)) for request in METRICS[metric].requests(each, "")] for each in items]
        found = values(metric, items, results)
        lost = {name for name in found if not name.startswith(("yes_accuracy", "yes_foil", "unparsed"))}
        assert {name: found[name] for name in lost} == dict.fromkeys(lost, 0.0)
        assert found.get("yes_foil", 1.0) == 1.0  # "fits" is not said of it


def test_valse_by_hand():
    items = [item(0, "existence"), item(1, "existence"), item(2, "foil-it")]
    equal = weights([(-1.0, 1), (-1.0, 1)])
    results = [
        [*equal, "A", "B", answer(2.0), answer(1.0)],  # both called right: pairwise right all the same
        [*equal, "A", "B", answer(-2.0), answer(-1.0)],
        [*equal, "A", "B", answer(1.0), answer(0.0)],  # one half is not "fits"
    ]
    found = values("valse", items, results)
    assert found["likelihood"] == 0.0
    assert found["yes/existence"] == 0.5
    assert found["yes"] == pytest.approx(0.75)
    assert found["yes_caption"] == pytest.approx((0.5 + 1) / 2)
    assert found["yes_foil"] == pytest.approx((0.5 + 1) / 2)
    assert found["yes_accuracy"] == pytest.approx((0.5 + 1) / 2)
    assert found["letters_both_right"] == 1.0


def test_aro_leaves_out_relations_that_read_the_same_and_rare_attributes():
    kinds = ["holding"] * 3 + ["near"] * 4 + ["on"] * 2
    items = [item(n, kind) for n, kind in enumerate(kinds)]
    wins = [1, 1, 0, 1, 1, 1, 1, 0, 0]
    results = [[*weights([(float(win), 1), (0.5, 1)]), "A", "B", answer(1.0), answer(0.0)] for win in wins]
    found = values("aro-relation", items, results)
    assert found["likelihood"] == pytest.approx((2 / 3 + 0) / 2)
    assert "likelihood/near" not in found
    assert found["likelihood_items"] == pytest.approx(6 / 9)

    kinds = ["red_open"] * 25 + ["old_tall"] * 24
    items = [item(n, kind) for n, kind in enumerate(kinds)]
    results = [[*weights([(float(n % 5), 1), (0.5, 1)]), "A", "B", answer(1.0), answer(0.0)] for n in range(49)]
    found = values("aro-attribution", items, results)
    assert found["likelihood"] == found["likelihood/red_open"] == pytest.approx(0.8)
    assert next(iter(values("aro-attribution", items[:9], results[:9]))) == "likelihood_items"


def test_whats_up_counts_pairs_of_opposites_and_whole_sets():
    texts = ("to the left", "to the right", "on", "under")

    def of_set(group: str, right: Sequence[int], places: Sequence[str], kind: str) -> tuple[list, list]:
        items = [item(f"{group}{place}", kind, texts, group=group, extra={"place": place}) for place in places]
        odds = [answer(0.0) for _ in texts]
        made = [[*weights([(float(win), 1), *[(0.5, 1)] * 3]), *odds] for win in right]
        return items, made

    sets = [
        of_set("one", [1, 1, 1, 1], ["left", "right", "on", "under"], "controlled-a"),
        of_set("two", [1, 0, 1, 1], ["left", "right", "on", "under"], "controlled-a"),
        of_set("three", [1, 1, 0], ["left", "right", "front"], "controlled-b"),  # a picture is missing
        ([item("x", "coco-one")], [[*weights([(1.0, 1), (0.0, 1)]), answer(0.0), answer(0.0)]]),
    ]
    items = [each for part, _ in sets for each in part]
    found = values("whats-up", items, [each for _, part in sets for each in part])
    assert found["accuracy/controlled-a"] == pytest.approx(7 / 8)
    assert found["accuracy/controlled-b"] == pytest.approx(2 / 3)
    assert found["accuracy/controlled"] == pytest.approx((7 / 8 + 2 / 3) / 2)
    assert found["accuracy"] == pytest.approx((7 / 8 + 2 / 3 + 1) / 3)
    assert found["pairs/controlled-a"] == pytest.approx(3 / 4)
    assert found["pairs/controlled-b"] == 1.0
    assert found["sets/controlled-a"] == 0.5
    assert "sets/controlled-b" not in found
    assert found["accuracy_yes"] == found["sets_yes"] == 0.0


def test_no_items_make_no_measure():
    assert [metric.measures([], []) for metric in METRICS.values()] == [[] for _ in METRICS]
