"""Rows of the likeliest tokens become what a build makes of the dense logits; and what no distribution is, is refused."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.codecs.live import select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.errors import SampleError
from vlm_distill_cache.stage1_teacher.imports.distributions import sparse_rows

V = 40
ALL = LogitCodec.from_preset("fixed:255", temperatures=(1.0,))


def told(log_probs: np.ndarray, label: int, k: int) -> dict[int, float]:
    """What a server tells of a row: the target, and the K likeliest tokens."""
    order = np.argsort(-log_probs, kind="stable")[:k]
    return {label: float(log_probs[label]), **{int(token): float(log_probs[token]) for token in order}}


@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.floats(0.1, 12),
    k=st.integers(0, V),
    preset=st.sampled_from(["lean", "default", "fixed:6"]),
)
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_dense_logits_as_far_as_the_server_tells_them(
    seed: int, scale: float, k: int, preset: str
):
    codec = LogitCodec.from_preset(preset, temperatures=(1.0,))
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(0, scale, (5, V)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, V, 5))
    dense = logits.double().log_softmax(-1).numpy()
    rows = [told(row, int(label), k) for row, label in zip(dense, labels, strict=True)]
    found = sparse_rows(codec, rows, labels.tolist(), vocabulary=V)
    exact = select_entries(codec, logits, labels)
    for place, row in enumerate(rows):
        ids = found.token_ids[place][found.entry_mask[place]].tolist()
        values = found.log_probs[place][found.entry_mask[place]].double().numpy()
        assert labels[place] in ids
        np.testing.assert_allclose(values, dense[place][ids], atol=1e-5)
        assert (np.diff(values) <= 0).all()
        # The tail is what is left of 1, which the dense row says exactly.
        left = 1 - np.exp(dense[place][ids]).sum()
        assert math.exp(found.tail_log_mass[place, 0]) == pytest.approx(left, abs=1e-6)
        if len(row) >= codec.max_k + 1 or len(row) == V:
            assert ids == exact.token_ids[place][exact.entry_mask[place]].tolist()


def test_rows_keep_their_own_sizes():
    found = sparse_rows(ALL, [{3: -0.1}, {3: -2.0, 4: -1.0, 5: -3.0}], [3, 3], vocabulary=V)
    assert found.entry_mask.sum(1).tolist() == [1, 3]
    assert found.token_ids.tolist() == [[3, 0, 0], [4, 3, 5]]
    assert math.exp(found.tail_log_mass[0, 0]) == pytest.approx(1 - math.exp(-0.1))


def test_a_target_that_the_teacher_rules_out_is_kept_and_nothing_else_of_that_kind():
    found = sparse_rows(ALL, [{3: -9999.0, 4: math.log(0.5), 5: -9999.0, 6: -math.inf}], [3], vocabulary=V)
    assert found.token_ids[0].tolist() == [4, 3]
    assert found.log_probs[0].tolist() == [pytest.approx(math.log(0.5)), -math.inf]
    assert math.exp(found.tail_log_mass[0, 0]) == pytest.approx(0.5)


def test_sums_a_little_above_one_are_scaled():
    found = sparse_rows(ALL, [{3: math.log(0.7), 4: math.log(0.305)}], [3], vocabulary=V)
    assert found.log_probs.exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert found.tail_log_mass[0, 0] == -math.inf


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({3: math.nan, 4: -1.0}, "a log-probability is nan"),
        ({3: math.inf}, "a log-probability is inf"),
        ({3: 12.5, 4: 11.0}, "a log-probability is 12.5; expected a number of at most 0"),
        ({3: -0.5, 4: -0.5}, r"sum to 1.2131, more than 1.*logits, or tokens counted twice"),
        ({4: -1.0}, "its own log-probability is not among the 1 that are given"),
        ({3: -1.0, V: -2.0}, f"token id {V} is not in the teacher's vocabulary of {V} tokens"),
        ({3: -1.0, -1: -2.0}, "token id -1 is not in"),
        ({3: -1.0, 2**80: -2.0}, "is not in the teacher's vocabulary"),
        ({3: -9999.0}, "all log-probabilities are minus infinity"),
        ({}, "no log-probabilities are given"),
    ],
)
def test_what_is_no_distribution_is_refused(row: dict[int, float], said: str):
    with pytest.raises(SampleError, match=r"answer token 2 of 2 \(id 3\): .*" + said):
        sparse_rows(ALL, [{3: -1.0}, row], [3, 3], vocabulary=V)
