"""Logit codec: gaps stored as steps, `fixed:K`, tails at many temperatures, and rows with hardly a finite logit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.codecs.live import as_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec, preset_settings
from vlm_distill_cache.common.codecs.quantise import GAP_TABLE, balance, gap_codes, gap_error, gap_steps
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError
from vlm_distill_cache.stage1_teacher.config import BuildConfig

INF = math.inf
TEMPERATURES = (1.0, 0.5, 2.0, 4.0, 20.0)
VOCABULARIES = [32_000, 49_152, 131_072, 131_073, 151_936, 262_144]


def random_logits(rows: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def round_trip(codec: LogitCodec, dense: torch.Tensor, labels: list[int]):
    live = select_entries(codec, dense, torch.tensor(labels))
    return live, as_tensors(codec.decode(codec.encode(live)))


rows_of_codes = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9), max_size=6)


@given(rows=rows_of_codes)
def test_steps_give_back_any_codes_and_are_those_of_a_loop(rows: list[list[int]]):
    counts = np.array([len(row) for row in rows], dtype=np.int64)
    codes = np.array([code for row in rows for code in row], dtype=np.uint8)
    steps = gap_steps(codes, counts)
    by_hand = [(row[i] - (row[i - 1] if i else 0)) % 256 for row in rows for i in range(len(row))]
    assert steps.tolist() == by_hand
    assert gap_codes(steps, counts).tolist() == codes.tolist()


def test_steps_change_what_is_stored_and_nothing_that_is_decoded():
    dense, labels = random_logits(40, 3000), torch.randint(0, 3000, (40,))
    stepped = LogitCodec.from_preset("default")
    plain = LogitCodec(**LOGIT_PRESETS["default"] | {"gap_steps": False})
    sparse = select_entries(plain, dense, labels)
    first, second = stepped.encode(sparse), plain.encode(sparse)
    assert {name for name in first if first[name].tobytes() != second[name].tobytes()} == {"log_gap"}
    assert torch.equal(as_tensors(stepped.decode(first)).log_probs, as_tensors(plain.decode(second)).log_probs)
    assert first["log_gap"].mean() < second["log_gap"].mean() / 4  # small numbers are the point


def test_a_dictionary_from_before_steps_means_the_codes_themselves():
    stored = LogitCodec.from_preset("default").to_dict()
    del stored["gap_steps"], stored["balanced"]
    old = codec_from_dict(stored)
    assert old == LogitCodec(floor=3e-4, min_k=8, max_k=64)
    assert not old.gap_steps
    assert not old.balanced
    assert old.fields() == LogitCodec.from_preset("default").fields()
    with pytest.raises(CacheFormatError, match="expected settings"):
        codec_from_dict({name: value for name, value in stored.items() if name != "exact"})


@pytest.mark.parametrize("name", ["gap_steps", "balanced"])
def test_what_works_on_codes_is_refused_where_gaps_are_none(name: str):
    with pytest.raises(ConfigError, match=f"{name}: expected false with exact"):
        LogitCodec(floor=0.0, min_k=1, max_k=9, exact=True, **{name: True})
    with pytest.raises(ConfigError, match=f"{name}: expected true or false"):
        LogitCodec(floor=0.0, min_k=1, max_k=9, **{name: 1})


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 40), preset=st.sampled_from(["lean", "full", "fixed:9"]))
def test_balanced_rows_sum_to_one_stay_in_order_and_within_half_a_step(seed: int, scale: float, preset: str):
    dense = random_logits(6, 300, seed=seed, scale=scale)
    codec = LogitCodec.from_preset(preset)
    plain = LogitCodec(**preset_settings(preset) | {"balanced": False})
    record = codec.encode(select_entries(codec, dense, torch.arange(6)))
    before, after = as_tensors(plain.decode(record)), as_tensors(codec.decode(record))
    mask = after.entry_mask
    top = after.log_probs[:, :1]
    assert torch.equal(before.log_probs[:, :1], top)
    assert bool((after.log_probs[:, 1:] - after.log_probs[:, :-1])[mask[:, 1:]].le(1e-6).all())
    moved = (after.log_probs - before.log_probs)[mask].abs().numpy()
    gaps = (top - before.log_probs)[mask].numpy()
    assert bool((moved <= gap_error(gaps) + 1e-5).all())

    def off(sparse):
        return (sparse.log_probs.exp().sum(1) + sparse.tail_log_mass[:, 0].exp() - 1).abs()

    assert bool((off(after) <= off(before) + 2e-6).all())


def test_balancing_brings_probabilities_nearer_to_the_teachers():
    """Rounding of gaps alone is compared: the same tokens, the same bytes."""
    for scale, gain in ((3.0, 1.05), (5.0, 1.2), (8.0, 1.4)):  # sharper rows have fewer errors to tell apart
        dense = random_logits(400, 2000, scale=scale)
        codec = LogitCodec.from_preset("default")
        plain = LogitCodec(**LOGIT_PRESETS["default"] | {"balanced": False})
        live = select_entries(codec, dense, torch.arange(400))
        record = codec.encode(live)
        errors = [
            float((as_tensors(decoder.decode(record)).log_probs.exp() - live.log_probs.exp()).norm())
            for decoder in (plain, codec)
        ]
        assert errors[0] > gain * errors[1]


def test_a_row_whose_entries_are_all_exact_is_left_alone():
    codes = np.array([0, 255, 0], dtype=np.uint8)
    log_probs = np.array([-0.5, -np.inf, -0.25], dtype=np.float32)
    balanced = balance(log_probs, codes, np.array([2, 1]), np.array([0.9, 0.1], dtype=np.float32))
    assert balanced.tolist() == log_probs.tolist()


@settings(deadline=None, max_examples=40)
@given(k=st.integers(2, 255), seed=st.integers(0, 1000), scale=st.floats(0.1, 30))
def test_fixed_keeps_exactly_the_k_most_likely_tokens_or_k_less_one_and_the_truth(k: int, seed: int, scale: float):
    dense = random_logits(3, 300, seed=seed, scale=scale)
    labels = [seed % 300, 7, 299]
    codec = LogitCodec.from_preset(f"fixed:{k}")
    live, cached = round_trip(codec, dense, labels)
    assert torch.equal(live.token_ids, cached.token_ids)
    assert live.entry_mask.sum(1).tolist() == [k] * 3
    order = dense.argsort(dim=1, descending=True, stable=True)
    for row, label in enumerate(labels):
        top = order[row, :k].tolist()
        assert live.token_ids[row].tolist() == (top if label in top else [*top[:-1], label])


def test_fixed_is_spelled_with_its_k_from_2_to_255():
    assert LogitCodec.from_preset("fixed:2").max_k == 2
    assert LogitCodec.from_preset("fixed:255", temperatures=(1.0, 4.0)).temperatures == (1.0, 4.0)
    for name in (
        "fixed",
        "fixed:",
        "fixed:1",
        "fixed:256",
        "fixed:-3",
        "fixed:3.0",
        "Fixed:3",
        "",
        "fixed:3 ",
    ):
        with pytest.raises(ConfigError, match=r"'fixed:K' with K from 2 to 255 \(such as 'fixed:32'\), got"):
            preset_settings(name)


def test_a_build_refuses_an_unknown_preset_before_it_loads_anything():
    assert BuildConfig(logits="fixed:16").logits == "fixed:16"
    with pytest.raises(ConfigError, match=r"logit preset: .* got 'fixed:999'"):
        BuildConfig(logits="fixed:999")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("preset", ["lean", "fixed:8"])
def test_tails_of_any_vocabulary_are_those_of_the_dense_logits_at_every_temperature(vocabulary: int, preset: str):
    dense = random_logits(2, vocabulary, seed=vocabulary, scale=4.0)
    labels = [vocabulary - 1, vocabulary // 3]
    live, cached = round_trip(LogitCodec.from_preset(preset, temperatures=TEMPERATURES), dense, labels)
    for temperature in TEMPERATURES:
        reference = (dense.double() / temperature).log_softmax(1)
        for row in range(2):
            outside = torch.ones(vocabulary, dtype=torch.bool)
            outside[live.token_ids[row][live.entry_mask[row]]] = False
            assert not outside[labels[row]]
            expected = float(reference[row][outside].logsumexp(0))
            assert float(live.at(temperature)[1][row]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
            bound = abs(expected) * (2**-11 + 1e-4) + 2**-25 + 1e-6
            assert abs(float(cached.at(temperature)[1][row]) - expected) <= bound
        log_probs, tail = cached.at(temperature)
        total = log_probs.exp().sum(1) + tail.exp()
        # At 1 the stored top carries its own rounding; elsewhere the entries share what the tail leaves.
        torch.testing.assert_close(total, torch.ones(2), atol=0.02 if temperature == 1.0 else 1e-5, rtol=0)


@pytest.mark.parametrize("preset", [*sorted(LOGIT_PRESETS), "fixed:32"])
def test_fewer_finite_logits_than_the_preset_keeps_are_all_listed_and_nothing_is_left(preset: str):
    dense = torch.full((2, 400), -INF)
    dense[:, [5, 9, 200]] = torch.tensor([2.0, 4.0, 3.0])
    codec = LogitCodec.from_preset(preset)
    live, cached = round_trip(codec, dense, [200, 399])
    for sparse in (live, cached):
        lists = [ids[mask].tolist() for ids, mask in zip(sparse.token_ids, sparse.entry_mask, strict=True)]
        assert lists == [[9, 200, 5], [9, 200, 5, 399]]
        assert sparse.tail_log_mass.tolist() == [[-INF, -INF]] * 2
        assert float(sparse.log_probs[1, 3]) == -INF
        torch.testing.assert_close(sparse.log_probs.exp().sum(1), torch.ones(2), atol=6e-3, rtol=0)


@pytest.mark.parametrize("preset", [*sorted(LOGIT_PRESETS), "fixed:32"])
def test_a_uniform_row_keeps_the_truth_and_every_bit_of_mass(preset: str):
    vocabulary = 131_073
    live, cached = round_trip(LogitCodec.from_preset(preset), torch.zeros(1, vocabulary), [vocabulary - 1])
    kept = int(live.entry_mask.sum())
    ids = [*range(kept - 1), vocabulary - 1]
    assert live.token_ids[0, :kept].tolist() == cached.token_ids[0, :kept].tolist() == ids
    for temperature in (1.0, 2.0):
        log_probs, tail = cached.at(temperature)
        expected = torch.full((kept,), -math.log(vocabulary))
        # 131,073 equal tokens sit at -11.8 nats, where float16 steps by 2^-7.
        torch.testing.assert_close(log_probs[0, :kept], expected, atol=0.006, rtol=0)
        assert float(tail[0].exp()) == pytest.approx(1 - kept / vocabulary, abs=1e-6)


@pytest.mark.parametrize("preset", ["lean", "fixed:4"])
def test_a_row_of_nan_is_refused_and_one_of_low_precision_is_not(preset: str):
    codec = LogitCodec.from_preset(preset)
    dense = random_logits(3, 131_073, scale=2.0).to(torch.bfloat16)
    live, cached = round_trip(codec, dense, [0, 1, 131_072])
    assert torch.equal(live.token_ids, cached.token_ids)
    dense[1, 131_072] = math.nan
    with pytest.raises(ValueError, match=r"row 1: .* got 1 NaN and 0"):
        select_entries(codec, dense, torch.zeros(3, dtype=torch.int64))


@pytest.mark.parametrize("top", [-40.0, -45.0, -50.0, -90.0, -60000.0])
def test_a_damaged_top_next_to_no_mass_neither_overflows_nor_leaves_its_codes(top: float):
    codes = np.array([0, 100, 254], dtype=np.uint8)
    log_probs = np.float32(top) - GAP_TABLE[codes]
    balanced = balance(log_probs, codes, np.array([3]), np.array([1.0], dtype=np.float32))
    assert bool((np.abs(balanced - log_probs) <= gap_error(GAP_TABLE[codes]) * 1.1 + 1e-2).all())


@pytest.mark.parametrize("offset", [-3e38, -60_000.0, 60_000.0, 3e38])
def test_large_logits_lose_no_digits_to_their_size(offset: float):
    dense = torch.full((1, 500), offset)
    codec = LogitCodec.from_preset("fixed:8", temperatures=(0.5, 1.0, 2.0))
    decoded = as_tensors(codec.decode(codec.encode(select_entries(codec, dense, torch.tensor([3])))))
    for temperature in codec.temperatures:
        log_probs, tail = decoded.at(temperature)
        assert torch.allclose(log_probs.exp(), torch.tensor(1 / 500), rtol=4e-3)
        assert torch.allclose(tail.exp(), torch.tensor(492 / 500), rtol=1e-3)
