"""Whether kept tokens and tail can have been one distribution: by tables of codes as by exponentials entry by entry."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vlm_distill_cache.common.codecs.live import select_entries
from vlm_distill_cache.common.codecs.logits import LogitCodec
from vlm_distill_cache.common.codecs.quantise import GAP_REACH, GAP_TABLE

LARGEST = 254  # the code of all gaps from the largest on
TEMPERATURES = (1.0, 2.0, 0.5)


def reach(code, entry, *, exact):
    """How far the gap of a row's entry may lie above and below that of its code."""
    if exact or entry == 0:
        return 0.0, 0.0
    return math.inf if code == LARGEST else float(GAP_REACH[0, code]), float(GAP_REACH[1, code])


def slow_rows(codec, record):
    """Row by row, whether one fails, and why: the mass at temperature 1, or the tail at another one's column."""
    counts = record["entry_count"].astype(int)
    codes = codec._codes(record, counts)
    one = codec.temperatures.index(1.0)
    begin = 0
    for row, count in enumerate(counts):
        own = codes[begin : begin + count]
        begin += count
        gaps = [float(code) if codec.exact else float(GAP_TABLE[code]) for code in own]
        bounds = [reach(code, entry, exact=codec.exact) for entry, code in enumerate(own)]
        fewest = [-gap - above for gap, (above, _) in zip(gaps, bounds, strict=True)]
        most = [below - gap for gap, (_, below) in zip(gaps, bounds, strict=True)]
        top, tails = float(record["top_logprob"][row]), [float(tail) for tail in record["tail_logmass"][row]]
        tail = min(tails[one], 0.0)
        others = math.exp(tail)
        least, largest = (math.exp(top) * sum(map(math.exp, logs)) for logs in (fewest, most))
        allowed = 1e-3
        if not codec.exact:
            allowed += 2.0**-10 * (largest * abs(top) + (others * abs(tail) if others else 0.0))
        yield row, "mass", max(least + others - 1, 1 - largest - others) > allowed
        if tail == -math.inf:
            continue
        cap = min(top + most[max(count - 2, 0)], tail)
        for column, temperature in enumerate(codec.temperatures):
            power = 1 / temperature
            ends = (1 - power) * math.log(2**32) + power * tail, tail + (power - 1) * cap
            kept = [power * top + math.log(sum(math.exp(power * log) for log in logs)) for logs in (fewest, most)]
            found = min(max(tails[column], -65504.0 if not codec.exact else -3.4e38), -(2.0**-24))
            odds = found - math.log(-math.expm1(found))
            room = 0.02 + 2.0**-10 * (max(power, 1) * (abs(top) + abs(tail) + abs(cap)) + abs(found))
            if temperature != 1.0:
                yield row, temperature, not min(ends) - kept[1] - room <= odds <= max(ends) - kept[0] + room


def expected(codec, record):
    """What is said of a record: the mass alone, or else each temperature of which a row is wrong."""
    found = [(kind, wrong) for _, kind, wrong in slow_rows(codec, record)]
    if any(wrong for kind, wrong in found if kind == "mass"):
        return ["mass"]
    return [temperature for temperature in codec.temperatures if (temperature, True) in found]


@pytest.mark.parametrize("preset", ["default", "lean", "exact"])
def test_tables_of_codes_say_what_exponentials_of_each_entry_say(preset):
    rng = np.random.default_rng(len(preset))
    codec = replace(LogitCodec.from_preset(preset), temperatures=TEMPERATURES)
    said = []
    for trial in range(240):
        rows = int(rng.integers(1, 4))
        logits = torch.from_numpy(rng.normal(size=(rows, 300)).astype(np.float32) * rng.choice([0.5, 2, 6]))
        record = codec.encode(select_entries(codec, logits, torch.from_numpy(rng.integers(0, 300, rows))))
        # To about where it is noticed, and beyond.
        if trial % 4 == 1:
            moved = record["top_logprob"] + rng.normal(size=rows) * rng.choice([0.003, 0.03, 0.3])
            record["top_logprob"] = np.minimum(moved, 0).astype(record["top_logprob"].dtype)
        if trial % 4 > 1:
            moved = record["tail_logmass"][:, 1:] + rng.normal(size=(rows, 2)) * rng.choice([0.1, 0.5, 2, 8])
            record["tail_logmass"][:, 1:] = np.minimum(moved, 0)
        counts = record["entry_count"].astype(np.int64)
        lines = [*codec._mass_damage(codec._codes(record, counts), counts, np.cumsum(counts) - counts, record)]
        kinds = [
            "mass" if " mass of " in line else float(line.split("at temperature ")[1].split(";")[0]) for line in lines
        ]
        assert kinds == expected(codec, record)
        said += kinds
    assert {*said} == {"mass", 2.0, 0.5}


@pytest.mark.parametrize("power", [1.0, 0.5, 3.0])
def test_what_entries_had_together_is_bounded_by_what_their_codes_may_stand_for(power):
    codec = LogitCodec.from_preset("default")
    counts = np.array([1, 5, 2])
    codes = np.array([0, 0, 0, 7, 200, 255, 0, 254])
    sums = codec._masses(codes, np.cumsum(counts) - counts, power)
    for row, own in enumerate(np.split(codes, np.cumsum(counts)[:-1])):
        for bound, sign in ((0, -1.0), (1, 1.0)):
            logs = [
                sign * reach(code, entry, exact=False)[bound] - float(GAP_TABLE[code]) for entry, code in enumerate(own)
            ]
            assert sums[bound][row] == pytest.approx(sum(math.exp(power * log) for log in logs), rel=1e-12)
