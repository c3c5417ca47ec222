"""A truncated cache equals the one that the teacher's dense logits would have given at the smaller k."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.cache.schema import BASE_FIELDS, check_record
from vlm_distill_cache.common.codecs.live import as_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.quantise import gap_error
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.common.tools.select import truncate_logits, truncated_codec

TEMPERATURES = (1.0, 2.0, 5.0)


def random_logits(rows: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def encoded(codec: LogitCodec, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, np.ndarray]:
    return {
        "image_hash": np.zeros((1, 16), np.uint8),
        "labels": labels.numpy().astype(np.uint32),
        "tiles": np.zeros((0, 6), np.float32),
        **codec.encode(select_entries(codec, dense, labels)),
    }


@settings(deadline=None, max_examples=120)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(0, 6), scale=st.floats(0.05, 25), k=st.integers(2, 40),
    preset=st.sampled_from(["lean", "default", "wide", "full", "exact", "fixed:40", "old"]),
)  # fmt: skip
def test_truncation_equals_selecting_again_from_the_dense_logits(
    seed: int, rows: int, scale: float, k: int, preset: str
):
    codec = LogitCodec.from_preset("default" if preset == "old" else preset, temperatures=TEMPERATURES)
    if preset == "old":
        codec = LogitCodec(floor=3e-4, min_k=8, max_k=64, temperatures=TEMPERATURES)
    generator = torch.Generator().manual_seed(seed)
    dense = random_logits(rows, 120, seed=seed, scale=scale)
    labels = torch.randint(0, 120, (rows,), generator=generator)
    if rows > 1:
        dense[0, torch.randperm(120, generator=generator)[: 120 - k // 2]] = -math.inf  # few finite ones
    record = encoded(codec, dense, labels)
    smaller = truncated_codec(codec.to_dict(), k)
    result = truncate_logits(record, codec.to_dict(), k)

    again = codec_from_dict(smaller)
    assert isinstance(again, LogitCodec)
    assert (again.max_k, again.min_k, again.floor) == (k, min(codec.min_k, k), codec.floor)
    check_record(result, (*BASE_FIELDS, *again.fields()))
    expected = encoded(again, dense, labels)
    for name in ("entry_count", "token_ids", "log_gap", "top_logprob", "labels"):
        assert result[name].dtype == expected[name].dtype
        assert result[name].tolist() == expected[name].tolist(), name
    check_tails(result, expected, codec, dense)


def check_tails(result, expected, codec, dense) -> None:
    """Masses added up from 8-bit gaps are off by at most the worst gap's relative error, at either end."""
    tails, wanted = (r["tail_logmass"].astype(np.float64) for r in (result, expected))
    if not len(tails):
        return
    live = select_entries(codec, dense, torch.from_numpy(expected["labels"].astype(np.int64)))
    gaps = (live.log_probs[:, :1] - live.log_probs).numpy()
    worst = gap_error(np.where(np.isfinite(gaps), gaps, 0.0)).max(axis=1, keepdims=True)  # [A, 1], nats
    if codec.exact:
        worst = np.full_like(worst, 1e-5)
    rounding = 2**-10 * np.abs(np.where(np.isfinite(wanted), wanted, 0.0)) + 2**-20
    # A share's log is off by the error of its numerator and of its denominator: twice the worst.
    both = np.isfinite(wanted)
    assert (np.abs(tails[both] - wanted[both]) <= (2 * worst + rounding + 1e-5)[both]).all()
    assert (tails[~both] < -60).all()  # nothing is left, or less than a float32 can say


def test_what_is_dropped_joins_the_tail_at_every_temperature():
    dense = random_logits(9, 500, seed=3)
    labels = torch.arange(9)
    codec = LogitCodec.from_preset("fixed:64", temperatures=TEMPERATURES)
    record = encoded(codec, dense, labels)
    small = codec_from_dict(truncated_codec(codec.to_dict(), 8))
    assert isinstance(small, LogitCodec)
    truncated = truncate_logits(record, codec.to_dict(), 8)
    large, nested = as_tensors(codec.decode(record)), as_tensors(small.decode(truncated))
    for temperature in TEMPERATURES:
        (before, tail), (after, grown) = large.at(temperature), nested.at(temperature)
        assert bool((grown > tail).all())
        torch.testing.assert_close(after.exp().sum(1) + grown.exp(), torch.ones(9), atol=6e-3, rtol=0)
        for row in range(9):
            ids = nested.token_ids[row].tolist()
            kept = [before[row, large.token_ids[row].tolist().index(token)] for token in ids]
            torch.testing.assert_close(after[row], torch.stack(kept), atol=8e-3, rtol=0)


def test_truncating_in_steps_equals_truncating_at_once_but_for_tails():
    codec = LogitCodec.from_preset("fixed:50").to_dict()
    record = encoded(LogitCodec.from_preset("fixed:50"), random_logits(20, 400), torch.arange(20))
    halfway = truncate_logits(record, codec, 20)
    twice, once = truncate_logits(halfway, truncated_codec(codec, 20), 5), truncate_logits(record, codec, 5)
    for name, array in once.items():
        if name == "tail_logmass":  # each rounds to float16
            np.testing.assert_allclose(twice[name], array, rtol=2e-3)
        else:
            assert twice[name].tolist() == array.tolist()


def test_k_of_the_cache_itself_and_rows_that_are_short_already_change_nothing():
    codec = LogitCodec.from_preset("lean")
    record = encoded(codec, random_logits(12, 300, scale=9.0), torch.arange(12))
    for k in (64, int(record["entry_count"].max())):
        result = truncate_logits(record, codec.to_dict(), k)
        assert all(result[name].tobytes() == array.tobytes() for name, array in record.items())


@pytest.mark.parametrize("k", [0, 1, 65, -2, True, 3.0, None])
def test_an_impossible_k_is_refused_with_the_range(k: object):
    with pytest.raises(ConfigError, match="top-k: expected a whole number from 2 to 64"):
        truncated_codec(LogitCodec.from_preset("lean").to_dict(), k)  # type: ignore[arg-type]


def test_other_codecs_and_damaged_records_are_refused():
    codec = LogitCodec.from_preset("lean")
    with pytest.raises(CacheFormatError, match="expected codec 'logits', got 'answer_attention'"):
        truncated_codec({"codec": "answer_attention"}, 4)
    for change in ({"temperatures": [0.0]}, {"temperatures": 3}, {"exact": 1}, {"max_k": "many"}):
        with pytest.raises(CacheFormatError, match="codec 'logits': stored settings are not valid"):
            truncate_logits({}, codec.to_dict() | change, 4)
    with pytest.raises(CacheFormatError, match="expected codec 'logits', got 'other'"):
        truncated_codec(codec.to_dict() | {"codec": "other"}, 4)
    record = encoded(codec, random_logits(4, 90), torch.arange(4))
    for name in ("log_gap", "token_ids", "labels", "tail_logmass", "entry_count"):
        with pytest.raises(CacheFormatError, match="cachectl verify"):
            truncate_logits(record | {name: record[name][:-1]}, codec.to_dict(), 4)
