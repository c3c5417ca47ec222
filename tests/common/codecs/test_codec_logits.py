"""The logit codec against dense references, on degenerate rows, and at real vocabulary sizes."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_distill_cache.common.cache.schema import check_record
from vlm_distill_cache.common.codecs.live import SparseLogits, as_tensors, select_entries
from vlm_distill_cache.common.codecs.logits import LOGIT_PRESETS, LogitCodec
from vlm_distill_cache.common.codecs.quantise import GAP_TABLE, MAX_GAP, encode_gaps, gap_error
from vlm_distill_cache.common.codecs.registry import codec_from_dict
from vlm_distill_cache.common.errors import CacheFormatError, ConfigError, SampleError, TemperatureNotCachedError

INF = math.inf
PINNED_GAPS = [0.0, 0.0120922, 0.202838, 0.94846, 2.43254, 6.0128, 22.9901, 24.0]


def codec(**changes: object) -> LogitCodec:
    return LogitCodec(**({"floor": 1e-3, "min_k": 2, "max_k": 6} | changes))  # type: ignore[arg-type]


def random_logits(rows: int, vocabulary: int, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def chosen_by_hand(row: list[float], label: int, chosen: LogitCodec) -> list[int]:
    """The kept token ids of one row: sort, cut, append the ground truth. Float64, one row, no torch."""
    log_total = math.log(sum(math.exp(x - max(row)) for x in row)) + max(row)
    order = sorted((i for i in range(len(row)) if row[i] > -INF), key=lambda i: (-row[i], i))
    probability = [math.exp(row[i] - log_total) for i in order]
    count = max(chosen.min_k, sum(p >= chosen.floor for p in probability))
    kept = order[: min(count, chosen.max_k)]
    if label not in kept:
        kept = [*kept[: chosen.max_k - 1], label]
    return kept


def listed(sparse: SparseLogits) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(sparse.token_ids, sparse.entry_mask, strict=True)]


rows_of_logits = st.lists(
    st.one_of(st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, 5.0, -INF])), min_size=2, max_size=12
).filter(lambda row: max(row) > -INF)


@settings(deadline=None, max_examples=150)
@given(row=rows_of_logits, data=st.data(), floor=st.sampled_from([0.0, 1e-3, 0.2]), max_k=st.integers(2, 14))
def test_kept_tokens_equal_a_row_by_row_reference(row: list[float], data: st.DataObject, floor: float, max_k: int):
    chosen = codec(floor=floor, min_k=data.draw(st.integers(1, max_k)), max_k=max_k)
    label = data.draw(st.integers(0, len(row) - 1))
    dense = torch.tensor([row], dtype=torch.float32)
    probability = dense.double().softmax(1)
    if bool(((probability - floor).abs() < 1e-6 * floor).any()):
        return  # on the floor itself, float32 and float64 may differ
    sparse = select_entries(chosen, dense, torch.tensor([label]))
    assert listed(sparse) == [chosen_by_hand(row, label, chosen)]


@pytest.mark.parametrize("vocabulary", [32_000, 49_152, 131_072, 131_073, 151_936, 262_144])
@pytest.mark.parametrize("preset", ["lean", "full", "fixed:32"])
def test_any_vocabulary_round_trips_with_the_last_id_as_ground_truth(vocabulary: int, preset: str):
    dense = random_logits(3, vocabulary, scale=4.0)
    labels = torch.tensor([vocabulary - 1, 0, vocabulary // 2])
    chosen = LogitCodec.from_preset(preset)
    sparse = select_entries(chosen, dense, labels)
    record = chosen.encode(sparse)
    check_record(record, chosen.fields())
    decoded = as_tensors(chosen.decode(record))
    assert record["token_ids"].dtype == np.uint32
    assert torch.equal(decoded.token_ids, sparse.token_ids)
    assert all(int(label) in ids for label, ids in zip(labels, listed(decoded), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_live_entries_and_tail_equal_the_dense_distribution(dtype: torch.dtype, temperature: float):
    dense = random_logits(17, 500).to(dtype)
    labels = torch.randint(0, 500, (17,), generator=torch.Generator().manual_seed(1))
    sparse = select_entries(codec(temperatures=(1.0, 2.0, 4.0)), dense, labels, chunk_rows=5)
    log_probs, tail = sparse.at(temperature)
    reference = (dense.double() / temperature).log_softmax(1)
    rest = torch.ones_like(reference, dtype=torch.bool)
    for row, ids in enumerate(listed(sparse)):
        torch.testing.assert_close(log_probs[row, : len(ids)].double(), reference[row, ids], atol=2e-6, rtol=1e-6)
        rest[row, ids] = False
    expected = reference.masked_fill(~rest, -INF).logsumexp(1)
    torch.testing.assert_close(tail.double(), expected, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(log_probs.exp().sum(1) + tail.exp(), torch.ones(17), atol=1e-6, rtol=0)


def test_selecting_in_chunks_changes_nothing_and_leaves_the_logits_alone():
    dense = random_logits(23, 300)
    before = dense.clone()
    labels = torch.arange(23)
    whole, chunked = select_entries(codec(), dense, labels), select_entries(codec(), dense, labels, chunk_rows=4)
    assert torch.equal(dense, before)
    assert torch.equal(whole.token_ids, chunked.token_ids)
    torch.testing.assert_close(whole.log_probs, chunked.log_probs)
    torch.testing.assert_close(whole.tail_log_mass, chunked.tail_log_mass)


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(0, 9), scale=st.floats(0.0, 60.0),
    preset=st.sampled_from([*LOGIT_PRESETS, "fixed:7", "two"]),
)  # fmt: skip
def test_round_trip_is_within_the_stated_bound(seed: int, rows: int, scale: float, preset: str):
    chosen = codec(min_k=1, max_k=2) if preset == "two" else LogitCodec.from_preset(preset)
    dense = random_logits(rows, 90, seed=seed, scale=scale)
    labels = torch.randint(0, 90, (rows,), generator=torch.Generator().manual_seed(seed))
    live = select_entries(chosen, dense, labels)
    record = chosen.encode(live)
    check_record(record, chosen.fields())
    cached = as_tensors(chosen.decode(record))
    assert torch.equal(cached.token_ids, live.token_ids)
    assert torch.equal(cached.entry_mask, live.entry_mask)
    assert cached.temperatures == live.temperatures
    top, tails = live.log_probs[:, :1], live.tail_log_mass
    if chosen.exact:
        step = torch.from_numpy(np.spacing(live.log_probs.abs().numpy()))
        close = (cached.log_probs - live.log_probs).abs() <= step
        assert bool((close | ~live.entry_mask).all())
        assert torch.equal(cached.tail_log_mass, tails)
        return
    gaps, cached_gaps = top - live.log_probs, cached.log_probs[:, :1] - cached.log_probs
    gaps, cached_gaps = gaps[live.entry_mask].numpy(), cached_gaps[live.entry_mask].numpy()
    bound = gap_error(gaps) * (2.1 if chosen.balanced else 1)
    assert bool((np.abs(cached_gaps - gaps) <= bound + 1e-5).all())
    assert bool(((cached.log_probs[:, :1] - top).abs() <= top.abs() * 2**-11 + 2**-25).all())
    finite = tails > -INF
    assert torch.equal(finite, cached.tail_log_mass > -INF)
    error = (cached.tail_log_mass - tails)[finite].abs()
    assert bool((error <= tails[finite].abs() * 2**-11 + 2**-25).all())


def test_exact_keeps_every_token_of_a_small_vocabulary_and_no_tail():
    dense = random_logits(4, 60)
    sparse = select_entries(LogitCodec.from_preset("exact"), dense, torch.arange(4))
    assert sparse.entry_mask.sum(1).tolist() == [60] * 4
    assert sparse.tail_log_mass.tolist() == [[-INF, -INF]] * 4
    rebuilt = torch.zeros(4, 60).scatter(1, sparse.token_ids, sparse.log_probs)
    torch.testing.assert_close(rebuilt, dense.log_softmax(1))


def test_one_hot_row_lists_the_ground_truth_with_probability_zero():
    dense = torch.full((1, 50), -INF)
    dense[0, 7] = 3.0
    chosen = codec(min_k=4)
    sparse = as_tensors(chosen.decode(chosen.encode(select_entries(chosen, dense, torch.tensor([9])))))
    assert listed(sparse) == [[7, 9]]
    assert sparse.log_probs.tolist() == [[0.0, -INF]]
    assert sparse.tail_log_mass.tolist() == [[-INF, -INF]]
    for temperature in (1.0, 2.0):
        assert sparse.at(temperature)[0].exp().tolist() == [[1.0, 0.0]]


def test_uniform_row_lists_the_lowest_ids_and_keeps_the_mass():
    chosen = codec(max_k=4)
    sparse = as_tensors(chosen.decode(chosen.encode(select_entries(chosen, torch.zeros(1, 4000), torch.tensor([999])))))
    assert listed(sparse) == [[0, 1, 999]]
    torch.testing.assert_close(sparse.tail_log_mass.exp(), torch.full((1, 2), 1 - 3 / 4000), atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse.at(2.0)[0].exp(), torch.full((1, 3), 1 / 4000), atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ties_rank_by_lowest_id_even_across_the_cut(dtype: torch.dtype):
    generator = torch.Generator().manual_seed(3)
    dense = torch.randint(0, 4, (40, 200), generator=generator).to(dtype)
    labels = torch.zeros(40, dtype=torch.int64)
    chosen = codec(floor=0.0, max_k=60)
    expected = [chosen_by_hand(row.tolist(), 0, chosen) for row in dense.float()]
    assert listed(select_entries(chosen, dense, labels)) == expected


def test_ground_truth_takes_the_last_place_of_a_full_row_and_leaves_the_rest_in_the_tail():
    dense = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0]])
    sparse = select_entries(codec(floor=0.0, max_k=3), dense, torch.tensor([4]))
    assert listed(sparse) == [[0, 1, 4]]
    probability = dense.softmax(1)[0]
    torch.testing.assert_close(sparse.tail_log_mass[0, 0].exp(), probability[2] + probability[3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.0, math.nan, 1.0], "row 3: .* got 1 NaN and 0 \\+inf"),
        ([0.0, INF, 1.0], "row 3: .* got 0 NaN and 1 \\+inf"),
        ([-INF, -INF, -INF], "row 3: .* got no finite logit"),
    ],
)
def test_rows_that_are_no_distribution_are_refused_by_row(values: list[float], message: str):
    dense = torch.zeros(5, 3)
    dense[3] = torch.tensor(values)
    with pytest.raises(SampleError, match=message):
        select_entries(codec(), dense, torch.zeros(5, dtype=torch.int64), chunk_rows=2)


def test_a_label_outside_the_vocabulary_is_refused():
    with pytest.raises(SampleError, match="row 1 of 2: label 8 is not in the teacher's vocabulary of 8"):
        select_entries(codec(), torch.zeros(2, 8), torch.tensor([0, 8]))


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"labels \[A\], got \[2, 8\] and \[3\]"):
        select_entries(codec(), torch.zeros(2, 8), torch.zeros(3, dtype=torch.int64))


def test_a_temperature_that_is_not_cached_names_those_that_are():
    sparse = select_entries(codec(), torch.zeros(1, 9), torch.tensor([0]))
    with pytest.raises(TemperatureNotCachedError, match=r"no tail mass at temperature 3.0: .* \[1.0, 2.0\]"):
        sparse.at(3.0)


def test_cat_pads_to_the_widest_part_and_refuses_other_temperatures():
    narrow = select_entries(codec(max_k=2), random_logits(2, 40), torch.tensor([1, 2]))
    wide = select_entries(codec(floor=0.0, max_k=6), random_logits(3, 40, seed=1), torch.tensor([1, 2, 3]))
    joined = SparseLogits.cat([narrow, wide])
    assert len(joined) == 5
    assert listed(joined) == listed(narrow) + listed(wide)
    assert bool((joined.log_probs[~joined.entry_mask] == -INF).all())
    other = select_entries(codec(temperatures=(1.0,)), random_logits(2, 40), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="equal temperatures"):
        SparseLogits.cat([narrow, other])


def test_no_rows_round_trip():
    chosen = LogitCodec.from_preset("default")
    sparse = select_entries(chosen, torch.zeros(0, 100), torch.zeros(0, dtype=torch.int64))
    record = chosen.encode(sparse)
    check_record(record, chosen.fields())
    assert len(as_tensors(chosen.decode(record))) == 0
    assert len(SparseLogits.cat([sparse, as_tensors(chosen.decode(record))])) == 0


def test_a_record_whose_counts_do_not_fit_is_refused():
    chosen = LogitCodec.from_preset("lean")
    record = chosen.encode(select_entries(chosen, random_logits(3, 50), torch.arange(3)))
    with pytest.raises(CacheFormatError, match="cachectl verify"):
        as_tensors(chosen.decode(record | {"log_gap": record["log_gap"][1:]}))
    empty_row = record["entry_count"].copy()
    empty_row[:2] = [0, empty_row[:2].sum()]
    with pytest.raises(CacheFormatError, match="at least one each"):
        as_tensors(chosen.decode(record | {"entry_count": empty_row}))


def test_encoding_rows_of_another_codec_is_refused():
    sparse = select_entries(codec(max_k=6, floor=0.0), random_logits(2, 50), torch.arange(2))
    with pytest.raises(ValueError, match="codec has max_k 2"):
        codec(max_k=2).encode(sparse)


@pytest.mark.parametrize("preset", [*sorted(LOGIT_PRESETS), "fixed:9"])
def test_the_stored_dictionary_is_plain_json_and_rebuilds_the_codec(preset: str):
    chosen = LogitCodec.from_preset(preset, temperatures=(1.0, 4.0))
    stored = json.loads(json.dumps(chosen.to_dict()))
    assert stored["codec"] == "logits"
    assert codec_from_dict(stored) == chosen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec": "blogits"}, "expected one of"),
        ({"extra": 1}, "expected settings"),
        ({"max_k": 300}, "max_k: expected a whole number of at least 2 and at most 255, got 300"),
        ({"floor": "low"}, "floor: expected a probability"),
    ],
)
def test_a_damaged_dictionary_is_refused(changes: dict[str, object], message: str):
    with pytest.raises(CacheFormatError, match=message):
        codec_from_dict(LogitCodec.from_preset("lean").to_dict() | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_k": 7}, "min_k: .* at most 6, got 7"),
        ({"max_k": True}, "max_k: .* got True"),
        ({"floor": 1.0}, "floor"),
        ({"exact": 1}, "exact: expected true or false"),
        ({"temperatures": (2.0,)}, "with 1 among them"),
        ({"temperatures": (1.0, 1.0)}, "distinct"),
        ({"temperatures": (1.0, -2.0)}, "from 0.01 to 1000"),
    ],
)
def test_a_codec_can_only_be_built_valid(changes: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        codec(**changes)


def test_an_unknown_preset_names_those_that_exist():
    with pytest.raises(ConfigError, match=r"'default', 'exact', 'full', 'lean', 'wide'"):
        LogitCodec.from_preset("huge")


def test_every_code_decodes_to_a_gap_that_encodes_to_it():
    assert encode_gaps(GAP_TABLE).tolist() == list(range(256))
    assert bool((np.diff(GAP_TABLE) > 0).all())
    assert encode_gaps(np.float32([-1e-7, MAX_GAP + 9])).tolist() == [0, 254]


def test_the_gap_table_of_format_version_1_does_not_move():
    picked = GAP_TABLE[[0, 1, 16, 64, 128, 200, 253, 254]].tolist()
    assert picked == pytest.approx(PINNED_GAPS, rel=1e-5)
    assert math.isinf(GAP_TABLE[255])
