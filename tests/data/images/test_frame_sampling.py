"""Which frames are read, against going through all marks and all frames."""

import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.data.images.sampling import choose_frames
from vlm_distill_cache.data.sample import FrameSampling


def slow(times, fps, most):
    """The rule, word by word."""
    step = 1 / Fraction(str(fps))
    marks = [number * step for number in range(int(times[-1] / step) + 1)]
    chosen = {next(n for n, time in enumerate(times) if time >= mark) for mark in marks}
    if len(chosen) > most:
        marks = [times[-1] * (2 * number + 1) / (2 * most) for number in range(most)]
        chosen = {next(n for n, time in enumerate(times) if time >= mark) for mark in marks}
    return sorted(chosen)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 500), max_size=8),
    st.sampled_from([0.1, 0.3, 0.5, 1, 2, 3, 10, 29.97]),
    st.integers(1, 12),
)
def test_frames_are_chosen_by_the_rule(gaps, fps, most):
    times = [Fraction(sum(gaps[:number]), 1000) for number in range(len(gaps) + 1)]
    chosen = choose_frames(times, FrameSampling(fps=fps, most=most))
    assert chosen == slow(times, fps, most)
    assert 1 <= len(chosen) <= most


@pytest.mark.parametrize("rate", [0.5, 1, 7.5, 10])
def test_all_frames_of_a_video_that_has_fewer_a_second(rate):
    times = [number / Fraction(str(rate)) for number in range(40)]
    assert choose_frames(times, FrameSampling(fps=10, most=40)) == list(range(40))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fps": 0}, "fps: expected frames a second, a number above 0, got 0"),
        ({"fps": -1.0}, "got -1.0"),
        ({"fps": float("nan")}, "got nan"),
        ({"fps": float("inf")}, "got inf"),
        ({"fps": "2"}, "got '2'"),
        ({"fps": True}, "got True"),
        ({"most": 0}, "most: expected the number of frames of a video, 1 or more, got 0"),
        ({"most": 2.5}, "got 2.5"),
    ],
)
def test_settings_out_of_range_are_refused(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        FrameSampling(**values)
