"""Layer choice and matching: the published tables, and one rule for every other depth."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_distill_cache.common.attention.layers import (
    PUBLISHED,
    match_cached_groups,
    match_layers,
    middle_layers,
    middle_span,
    sliding_windows,
    student_groups,
    teacher_groups,
)
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError


@pytest.mark.parametrize(
    ("depth", "first", "last", "size"), [(24, 8, 14, 2), (28, 9, 15, 3), (32, 11, 17, 3), (40, 13, 19, 5)]
)
def test_published_tables_are_reproduced(depth, first, last, size):
    expected = tuple(range(first, last + 1))
    assert middle_layers(depth) == expected
    assert student_groups(depth, 7) == tuple((layer,) for layer in expected)
    assert teacher_groups(depth, 7) == tuple(tuple(range(s, s + size)) for s in expected)


LISTS = {
    24: ([8, 9, 10, 11, 12, 13, 14], ["8 9", "9 10", "10 11", "11 12", "12 13", "13 14", "14 15"]),
    28: (
        [9, 10, 11, 12, 13, 14, 15],
        ["9 10 11", "10 11 12", "11 12 13", "12 13 14", "13 14 15", "14 15 16", "15 16 17"],
    ),
    32: (
        [11, 12, 13, 14, 15, 16, 17],
        ["11 12 13", "12 13 14", "13 14 15", "14 15 16", "15 16 17", "16 17 18", "17 18 19"],
    ),
    40: (
        [13, 14, 15, 16, 17, 18, 19],
        [
            "13 14 15 16 17",
            "14 15 16 17 18",
            "15 16 17 18 19",
            "16 17 18 19 20",
            "17 18 19 20 21",
            "18 19 20 21 22",
            "19 20 21 22 23",
        ],
    ),
}
"""depth -> a student's layers, and the layers of each of a teacher's groups, written out by hand."""


@pytest.mark.parametrize("teacher_depth", LISTS)
@pytest.mark.parametrize("student_depth", LISTS)
def test_matching_by_groups_equals_the_published_lists(teacher_depth, student_depth):
    teacher, student = match_layers(teacher_depth=teacher_depth, student_depth=student_depth)
    assert [" ".join(map(str, group)) for group in teacher] == LISTS[teacher_depth][1]
    assert student == tuple((layer,) for layer in LISTS[student_depth][0])


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
    assert teacher_groups(depth, 1) == student_groups(depth, 1) == (middle_span(depth),)


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


def test_early_and_late_layers_are_as_many_as_the_middle_ones_at_either_end():
    early, student = match_layers(teacher_depth=32, student_depth=24, layers="early")
    assert early == tuple((first, first + 1, first + 2) for first in range(7))
    assert student == tuple((layer,) for layer in range(7))
    late, student = match_layers(teacher_depth=32, student_depth=24, layers="late")
    assert late == tuple((first, first + 1, first + 2) for first in range(23, 30))
    assert student == tuple((layer,) for layer in range(17, 24))
    simple, _ = match_layers(teacher_depth=32, student_depth=24, layers="late", matching="simple")
    assert simple == tuple((layer,) for layer in range(25, 32))


def test_all_layers_are_aligned_with_windows_over_all_of_the_deeper_model():
    teacher, student = match_layers(teacher_depth=6, student_depth=3, layers="all")
    assert teacher == ((0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5))
    assert student == ((0,), (1,), (2,))
    teacher, student = match_layers(teacher_depth=2, student_depth=4, layers="all")
    assert (teacher, student) == (((0,), (1,)), ((0, 1, 2), (1, 2, 3)))


@given(
    teacher=st.integers(1, 90),
    student=st.integers(1, 60),
    matching=st.sampled_from(["group", "simple", "adaptive"]),
    layers=st.sampled_from(["early", "middle", "late", "all"]),
)
def test_any_two_depths_match_pair_by_pair_inside_both_models(teacher, student, matching, layers):
    theirs, mine = match_layers(teacher_depth=teacher, student_depth=student, matching=matching, layers=layers)
    assert len(theirs) == len(mine) >= 1
    assert all(0 <= layer < teacher for group in theirs for layer in group)
    assert all(0 <= layer < student for group in mine for layer in group)
    assert len(set(mine)) == len(mine)


def singles(depth):
    return tuple((layer,) for layer in range(depth))


@pytest.mark.parametrize("matching", ["group", "simple", "adaptive"])
@pytest.mark.parametrize("layers", ["early", "middle", "late", "all"])
def test_a_cache_of_single_layers_serves_every_matching(matching, layers):
    """The weights over cached layers are the means over the wanted groups."""
    match = match_cached_groups(
        teacher_depth=28,
        cached=singles(28),
        layer_choice="all",
        student_depth=24,
        matching=matching,
        layers=layers,
    )
    wanted, student = match_layers(teacher_depth=28, student_depth=24, matching=matching, layers=layers)
    assert match.student == student
    assert match.teacher == wanted
    for weights, group in zip(match.weights, wanted, strict=True):
        assert weights == tuple(1 / len(group) if layer in group else 0.0 for layer in range(28))
    assert match.is_selection == all(len(group) == 1 for group in wanted)


def test_a_cache_of_single_layers_is_aligned_in_the_middle_unless_told_otherwise():
    match = match_cached_groups(teacher_depth=32, cached=singles(32), layer_choice="all", student_depth=24)
    assert (match.teacher, match.student) == match_layers(teacher_depth=32, student_depth=24)


@pytest.mark.parametrize(
    ("cached", "choice", "student"),
    [
        (teacher_groups(32, 7), "middle", student_groups(24, 7)),
        ((middle_span(32),), "middle", (middle_span(24),)),
        (teacher_groups(32, 1, "all"), "all", (tuple(range(24)),)),
        (((1, 2), (2, 3)), (1, 2, 3), ((1, 2), (2, 3))),
    ],
)
def test_cached_groups_are_used_as_they_are(cached, choice, student):
    match = match_cached_groups(teacher_depth=32, cached=cached, layer_choice=choice, student_depth=24)
    assert match.is_identity
    assert match.is_selection
    assert match.teacher == cached
    assert match.student == student


def test_means_of_disjoint_groups_make_a_wider_one():
    match = match_cached_groups(
        teacher_depth=6,
        cached=((0,), (1,), (2, 3), (4, 5)),
        layer_choice=(0, 1, 2, 3, 4, 5),
        student_depth=1,
        layers="all",
    )
    assert match.teacher == ((0, 1, 2, 3, 4, 5),)
    assert match.weights == ((1 / 6, 1 / 6, 2 / 6, 2 / 6),)


@pytest.mark.parametrize(
    ("options", "needed"),
    [
        ({"matching": "simple"}, r"simple matching of the middle layers .* layers \[11\]"),
        ({"matching": "adaptive"}, r"adaptive matching of the middle layers"),
        ({"layers": "late"}, r"group matching of the late layers .* layers \[23, 24, 25\]"),
        ({"layers": "all"}, r"group matching of the all layers"),
    ],
)
def test_a_cache_that_cannot_make_the_wanted_groups_is_refused_with_the_remedy(options, needed):
    with pytest.raises(CacheMismatchError, match=needed) as refused:
        match_cached_groups(
            teacher_depth=32,
            cached=teacher_groups(32, 7),
            layer_choice="middle",
            student_depth=24,
            **options,
        )
    assert "--set groups=32 --set layers=all" in str(refused.value)


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
    code = "import sys, vlm_distill_cache.common.attention.layers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
