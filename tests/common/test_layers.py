"""Layer choice and matching: the published tables, and one rule for every other depth."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from common.layers import (
    PUBLISHED,
    match_layers,
    middle_layers,
    middle_span,
    one_group,
    sliding_windows,
    student_groups,
    teacher_groups,
)


@pytest.mark.parametrize(
    ("depth", "first", "last", "size"), [(24, 8, 14, 2), (28, 9, 15, 3), (32, 11, 17, 3), (40, 13, 19, 5)]
)
def test_published_tables_are_reproduced(depth, first, last, size):
    expected = tuple(range(first, last + 1))
    assert middle_layers(depth) == expected
    assert student_groups(depth, 7) == tuple((layer,) for layer in expected)
    assert teacher_groups(depth, 7) == tuple(tuple(range(s, s + size)) for s in expected)


def test_spans_of_other_depths_are_33_to_60_percent():
    assert middle_span(6) == (2, 3, 4)
    assert middle_span(3) == (1, 2)
    assert middle_span(16) == (5, 6, 7, 8, 9, 10)
    assert middle_span(1) == (0,)
    assert middle_span(36) == tuple(range(12, 23))


@given(depth=st.integers(1, 200), data=st.data())
def test_groups_are_equal_sized_ordered_and_inside_the_model(depth, data):
    groups = data.draw(st.integers(1, depth))
    teacher = teacher_groups(depth, groups)
    student = student_groups(depth, groups)
    for side in (teacher, student):
        assert len(side) == groups
        assert len({len(group) for group in side}) == 1
        assert all(0 <= layer < depth for group in side for layer in group)
        assert all(group == tuple(range(group[0], group[0] + len(group))) for group in side)
        firsts = [group[0] for group in side]
        assert firsts == list(range(firsts[0], firsts[0] + groups))
    if groups > 1:
        assert all(len(group) == 1 for group in student)


@given(depth=st.integers(1, 200))
def test_one_group_is_the_middle_span_on_both_sides(depth):
    assert one_group(depth) == teacher_groups(depth, 1) == student_groups(depth, 1) == (middle_span(depth),)


@given(depth=st.integers(1, 200), data=st.data())
def test_middle_layers_stay_centred_in_the_span(depth, data):
    k = data.draw(st.integers(1, depth))
    layers = middle_layers(depth, k)
    assert len(layers) == k
    if depth in PUBLISHED and k == 7:
        return
    span = middle_span(depth)
    shift = (layers[0] + layers[-1]) - (span[0] + span[-1])
    touches_an_end = layers[0] == 0 or layers[-1] == depth - 1
    assert touches_an_end or -1 <= shift <= 0


def test_all_and_explicit_layers_slide_over_the_choice():
    assert teacher_groups(6, 1, "all") == ((0, 1, 2, 3, 4, 5),)
    assert student_groups(3, 3, "all") == ((0,), (1,), (2,))
    assert teacher_groups(6, 3, "all") == ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5))
    assert teacher_groups(8, 2, (1, 4, 6)) == ((1, 4), (4, 6))


def test_matchings_of_the_published_pair():
    teacher, student = match_layers(teacher_depth=40, student_depth=24)
    assert teacher == teacher_groups(40, 7)
    assert student == student_groups(24, 7)
    simple, _ = match_layers(teacher_depth=40, student_depth=24, matching="simple")
    assert simple == tuple((layer,) for layer in range(13, 20))
    adaptive, same = match_layers(teacher_depth=40, student_depth=24, matching="adaptive")
    assert same == student
    assert adaptive == tuple((round(layer * 39 / 23),) for layer in range(8, 15))


@given(student=st.integers(1, 60), teacher=st.integers(1, 120))
def test_adaptive_matching_of_equal_depths_is_the_identity_and_never_leaves_the_teacher(student, teacher):
    count = min(student, 7)
    same, mine = match_layers(teacher_depth=student, student_depth=student, groups=count, matching="adaptive")
    assert same == mine
    other, _ = match_layers(teacher_depth=teacher, student_depth=student, groups=count, matching="adaptive")
    assert all(0 <= layer < teacher for group in other for layer in group)


def test_impossible_choices_are_refused_with_the_depth():
    with pytest.raises(ConfigError, match="between 1 and 3"):
        student_groups(3, 7)
    with pytest.raises(ConfigError, match="between 1 and 3"):
        teacher_groups(3, 7)
    with pytest.raises(ConfigError, match=r"0 to 5"):
        teacher_groups(6, 1, (4, 6))
    with pytest.raises(ConfigError, match="distinct"):
        teacher_groups(6, 1, (4, 4))
    with pytest.raises(ConfigError, match="number of groups"):
        sliding_windows((1, 2), 0)
    with pytest.raises(ConfigError, match="at least 1 layer"):
        middle_span(0)


def test_layers_needs_no_torch():
    code = "import sys, common.layers; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
