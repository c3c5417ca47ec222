"""Scoring functions: intervals that cover, letters read conservatively, what a constant answer scores."""

import string
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.stage2_student.scores.metrics import (
    bootstrap,
    bootstrap_kinds,
    exact_match,
    group_by_kind,
    normalise_answer,
    parse_letter,
    preference,
    score_letters,
)


def test_bootstrap_interval_equals_that_of_explicit_resampling():
    values = np.random.default_rng(1).random(60)
    score = bootstrap(values, seed=0, resamples=20_000)
    generator = np.random.default_rng(2)
    means = [generator.choice(values, size=60).mean() for _ in range(20_000)]
    assert score.value == pytest.approx(values.mean())
    assert score.items == 60
    assert score.low == pytest.approx(np.quantile(means, 0.025), abs=0.004)
    assert score.high == pytest.approx(np.quantile(means, 0.975), abs=0.004)


def test_bootstrap_intervals_cover_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(0)
    scores = [bootstrap(generator.random(100) < 0.7, seed=trial, resamples=400) for trial in range(300)]
    covered = np.mean([score.low <= 0.7 <= score.high for score in scores])
    assert 0.90 <= covered <= 0.99


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(0).random(30)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_kinds_weigh_the_same_whatever_their_size():
    score = bootstrap_kinds({"many": [1.0] * 90, "few": [0.0] * 10})
    assert (score.value, score.low, score.high, score.items) == (0.5, 0.5, 0.5, 100)


def test_items_are_resampled_within_their_kind():
    # Mixed, 20 items of 0 and 1 would give an interval; within their kinds nothing varies.
    assert bootstrap_kinds({"a": [0.0] * 10, "b": [1.0] * 10}).low == 0.5
    assert bootstrap([0.0] * 10 + [1.0] * 10).low < 0.4


@pytest.mark.parametrize("values", [{}, {"a": []}, {"a": [1.0], "b": []}])
def test_intervals_without_items_are_refused(values):
    with pytest.raises(ValueError, match="at least one item of each kind"):
        bootstrap_kinds(values)


def test_group_by_kind_sorts_kinds_and_keeps_the_items_order():
    assert group_by_kind([1, 2, 3], ["b", "a", "b"]) == {"a": [2.0], "b": [1.0, 3.0]}


def test_a_tie_is_half_right():
    assert preference(np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0])).tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        (" b ", "B"),
        ("(A)", "A"),
        ("( B ) .", "B"),
        ("A.", "A"),
        ("A) a red circle", "A"),
        ("B: the circle", "B"),
        ("(B) a red circle left of a square", "B"),
        ("The answer is (B).", "B"),
        ("Answer: A", "A"),
        ("option B", "B"),
        ("A cat on a mat", None),
        ("a red circle", None),
        ("A or B", None),
        ("(A) and (B)", None),
        ("", None),
        ("C", None),
        ("ABBA", None),
    ],
)
def test_letters_are_read_only_where_one_is_clearly_meant(text, letter):
    assert parse_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "plain"),
    [("The red one.", "red one"), ("  Yes,\n", "yes"), ("t-shirt", "t shirt"), ("c2 r4", "c2 r4")],
)
def test_answers_are_normalised(text, plain):
    assert normalise_answer(text) == plain


SAME = (
    {"circle", "A Circle.", "the circle", "(circle)", "**circle**", "“Circle”", "a  circle\n", "CIRCLE!", "`circle`"},
    {"A", "a", "A.", "(A)", "a)", "[A]", "A:", " A ", "the A"},
    {"B", "(b)", "B.", "b)"},
    {"vitamin A", "Vitamin a."},
    {"vitamin", "a vitamin", "the vitamin."},
    {"A. red", "(A) red", "a) Red"},
    {"red", "a red", "the red", "Red."},
    {"the", "The."},
    {"an", "An"},
    {"?"},
    {"!"},
    {"..."},
    {""},
    {"C#", "c#"},
    {"C++", "c++."},
    {"C", "c"},
    {"+", "(+)", "+."},
    {"-"},
    {"="},
    {"!="},
    {"5", "5.", "5!", "the 5"},
    {".5", "(.5)"},
    {"-3", "−3", "–3"},
    {"3"},
    {"0.5"},
    {"1/2"},
    {"1 2", "1, 2", "1,2"},
    {"12:30"},
    {"50%"},
    {"50"},
    {"A+", "a+"},
    {"A-", "a-"},
    {"👍"},
    {"👎"},
    {"❤", "❤\ufe0f"},
    {":-)"},
    {":-("},
    {"कि"},
    {"की"},
    {"é", "e\u0301", "É"},
    {"e"},
    {"一只猫", "一只猫。"},
    {"猫"},
    {"U.S.A.", "u.s.a"},
    {"U.S.", "u. s."},
    {"A, B", "A B"},
    {"don't", "don’t"},
)


def test_answers_match_within_what_means_the_same_and_never_beyond():
    for one, first in enumerate(SAME):
        for two, second in enumerate(SAME):
            for predicted in first:
                for expected in second:
                    assert exact_match(predicted, expected) == (one == two), (predicted, expected)


def letters_and_digits(text: str) -> str:
    """What is left of a text without case, articles and all that is neither letter nor digit."""
    plain = unicodedata.normalize("NFC", unicodedata.normalize("NFD", text).casefold())
    words = ["".join(filter(str.isalnum, word)) for word in plain.split()]
    return "".join(word for word in words if word not in ("a", "an", "the"))


PIECES = "a A an the The red Red. B (B) 5 .5 -3 C# C++ + - ? ! ... 👍 कि é “ ” ( ) . 1/2 *"
TEXTS = st.one_of(
    st.text(max_size=8),
    st.lists(
        st.sampled_from(PIECES.split()),
        max_size=4,
    ).map(" ".join),
)


@given(TEXTS, TEXTS)
def test_exact_match_is_an_equivalence_that_keeps_letters_and_digits_apart(one: str, two: str):
    assert exact_match(one, one)
    assert exact_match(one, two) == exact_match(two, one)
    if exact_match(one, two):
        assert letters_and_digits(one) == letters_and_digits(two)
        assert any(map(str.isalnum, one)) == any(map(str.isalnum, two))


@given(
    st.text(alphabet=string.punctuation + "…。！？“”", min_size=1, max_size=5), st.text(alphabet="aAbthe5 ", max_size=6)
)
def test_punctuation_never_equals_words_or_nothing(marks: str, words: str):
    assert not exact_match(marks, words)


def test_a_constant_letter_scores_half_on_the_mean_and_nothing_on_both_orders():
    scores = score_letters([("A", "A")] * 4)
    assert {name: values.mean() for name, values in scores.items()} == {
        "right_first": 1.0,
        "right_second": 0.0,
        "mean": 0.5,
        "both_right": 0.0,
        "bias": 1.0,
        "unparsed": 0.0,
    }


def test_letters_count_per_order_and_unread_answers_are_wrong():
    scores = score_letters([("A", "B"), ("B", "B"), (None, "B"), (None, None)])
    assert scores["right_first"].tolist() == [1, 0, 0, 0]
    assert scores["right_second"].tolist() == [1, 1, 1, 0]
    assert scores["both_right"].tolist() == [1, 0, 0, 0]
    assert scores["bias"].tolist() == [0, -1, -0.5, 0]
    assert scores["unparsed"].tolist() == [0, 0, 0.5, 1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,000", "1000"), ("$1,000,000", "$1000000"), ("10 %", "10%"), ("$ 5", "$5"), ("U.S.", "us"), ("p.m.", "pm"),
        ("J.P. Morgan", "jp morgan"), ("ice-cream", "ice cream"), ("black-and-white", "black and white"), ("'red'", "red"),
        ("‘red’.", "red"), ("１２", "12"), ("re\u00add", "red"),
    ],
)  # fmt: skip
def test_what_is_written_in_several_ways_is_one_answer(one, other):
    assert exact_match(one, other)
    assert exact_match(other, one)
    assert normalise_answer(normalise_answer(one)) == normalise_answer(one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1,5", "15"),
        ("-3", "3"),
        (".5", "5"),
        ("3.5", "35"),
        ("12,34", "1234"),
        ("C-", "C"),
        ("10-12", "10 12"),
        ("A.", "B."),
    ],
)
def test_what_only_looks_like_a_way_to_write_it_is_another_answer(one, other):
    assert not exact_match(one, other)
