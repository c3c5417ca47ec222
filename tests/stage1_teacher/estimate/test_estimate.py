"""The estimate: its arithmetic against a plain sum, its sizes against a real build, its text."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import vlm_distill_cache.stage1_teacher.estimate.probe as probe_module
from vlm_distill_cache.common.errors import DataError
from vlm_distill_cache.stage1_teacher.cli import ESTIMATE, main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.estimate.estimate import Estimate, Scenario, assumptions, estimate, estimate_text
from vlm_distill_cache.stage1_teacher.estimate.probe import Probe, Size, probe_positions, timed

PROBE = Probe(
    samples=32, failed=0, rows=100.0, tokens=700.0, signals={"logits": Size(decoded=4000.0, stored=3000.0)},
    stored=3100.0, shard_bytes=1000, side_bytes=5000, encode=0.01, teacher=0.2, plain=0.18, eager=0.5,
    eager_batch=4, write=0.02, loop=0.21, shard_write=0.5, load=36.0, teacher_parameters=7_000_000_000,
    device="CPU", threads=1, cores=4, host_memory=15_900_000_000, device_memory=None,
)  # fmt: skip


@pytest.fixture
def once(monkeypatch):
    """Measure everything twice at the most: a test's figures may be rough."""
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.estimate.probe.ENOUGH_S", 1e-9)


def of(scenario: Scenario = Scenario(), **changes) -> Estimate:  # noqa: B008 - frozen
    return Estimate(
        name="t on d", store="zarr", sample_count=3600, shard_count=15, fidelity_samples=0, control_copies=4,
        probe=replace(PROBE, **changes), scenario=scenario,
    )  # fmt: skip


def test_hours_are_the_plain_sums():
    figures = of(Scenario(epochs=2.0, student_parameters=1.4e9))
    step = 3 * 0.18 * 1.4e9 / 7e9
    assert figures.student_step == pytest.approx(step)
    assert figures.stage_one_hours == pytest.approx((36 + 3600 * 0.21) / 3600)
    online, offline = figures.hours(3)
    assert online == pytest.approx(3 * 2 * (0.5 + step))
    assert offline == pytest.approx(0.22 - 0.21 + 0.21 + 3 * 2 * step)
    assert figures.cache_bytes == 3100 * 3600 + 15 * 1000 + 5000


def test_the_card_runs_each_of_its_samples_alone_and_once_among_copies():
    figures = replace(of(), fidelity_samples=10)
    assert 3600 * (figures.stage_one_hours - of().stage_one_hours) == pytest.approx(
        10 * ((1 + 4) * PROBE.teacher + PROBE.encode)
    )


def test_the_memory_is_said_and_that_of_a_device_too():
    assert "Memory at its peak: 15.9 GB in the process" in estimate_text(of())
    assert "peak: 14.2 GB on the device, 15.9 GB in" in estimate_text(of(device_memory=14_200_000_000))


def test_a_measured_student_step_and_a_price_are_used():
    stored = of(Scenario(student_step=0.1, price=2.0, students=(1,))).to_dict()
    assert stored["student_step_seconds_per_sample"] == 0.1
    (row,) = stored["comparison"]
    assert row["online_cost"] == pytest.approx(2 * 0.6)
    assert row["offline_cost"] == pytest.approx(2 * (0.22 + 0.1))
    assert json.loads(json.dumps(stored)) == stored
    assert ESTIMATE(json.dumps(stored).encode())  # later figures may take its place


def test_attention_that_does_not_fit_is_said_and_counted_with_the_fast_pass():
    figures = of(eager=None, eager_batch=0)
    assert figures.online_teacher == 0.18
    assert any("does not fit this memory" in line for line in assumptions(figures))
    assert not any("does not fit" in line for line in assumptions(of()))


@pytest.mark.parametrize("epochs", [0.1, 0.33, 1.0, 7.0])
@pytest.mark.parametrize("eager", [0.0013, 0.0571, 0.513])
def test_it_pays_from_the_first_number_of_students_that_takes_less_time(epochs: float, eager: float):
    figures = of(Scenario(epochs=epochs), eager=eager, load=0.0)
    first = next(n for n in range(1, 10_000) if figures.hours(n)[1] < figures.hours(n)[0])
    assert figures.pays_from == figures.to_dict()["pays_from_students"] == first
    assert f"the cache pays from {first} student" in estimate_text(figures)


def test_a_teacher_that_costs_nothing_makes_no_cache_pay():
    figures = of(eager=0.0)
    assert figures.pays_from is None
    assert "the cache never pays" in estimate_text(figures)


def test_the_text_names_sizes_hours_costs_and_assumptions():
    text = estimate_text(of(Scenario(students=(1, 10), price=2.0)))
    assert "3600 samples, from 32 measured ones" in text
    assert "11.2 MB" in text
    assert "13.2 min, cost 0.44" in text
    assert all(f"  - {line}" in text for line in assumptions(of(Scenario(price=2.0))))


@pytest.mark.parametrize(("total", "samples"), [(1, 32), (5, 32), (33, 32), (1000, 32), (1000, 1), (10, 7)])
def test_the_probe_is_a_few_runs_of_neighbours_inside_the_data(total: int, samples: int):
    positions = probe_positions(total, samples)
    assert positions == sorted(set(positions))
    assert 0 < len(positions) <= min(total, samples)
    assert positions[0] >= 0
    assert positions[-1] < total
    if total == 1000 and samples == 32:
        assert positions == [*range(8), *range(250, 258), *range(500, 508), *range(750, 758)]


def test_the_time_is_the_best_of_a_few_short_runs_or_that_of_one_long_one(monkeypatch):
    clock = iter([0.0, 0.4, 1.0, 1.3, 2.0, 2.5, 3.0, 3.4, 4.0, 4.6])
    monkeypatch.setattr("vlm_distill_cache.stage1_teacher.estimate.probe.time.perf_counter", lambda: next(clock))
    assert timed(lambda: "made") == ("made", pytest.approx(0.3))
    clock = iter([0.0, 9.0, 10.0, 11.0])  # the first run also loads libraries
    assert timed(lambda: None) == (None, 1.0)
    clock = iter([0.0, 90.0])
    assert timed(lambda: None) == (None, 90.0)


@pytest.mark.parametrize("store", ["webdataset", "zarr"])
@pytest.mark.slow
def test_predicted_bytes_are_those_of_a_real_build(tmp_path: Path, build_cache, tiny_llava: Path, store: str, once):
    signals = ("logits", "answer_attention", "visual_columns")
    options = {"limit": 40, "shard_size": 20, "store": store, "signals": signals}
    manifest = build_cache(tmp_path / "cache", **options).manifest
    config = BuildConfig(
        cache=str(tmp_path / "none"), teacher=str(tiny_llava), template="short", batch_size=3, **options
    )
    figures = estimate(config, Scenario(), samples=16)
    assert not (tmp_path / "none").exists()
    actual = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert figures.cache_bytes == pytest.approx(actual, rel=0.15)
    for name, fields in {"logits": ("token_ids", "log_gap"), "visual_columns": ("visual_columns",)}.items():
        decoded = sum(manifest.field_bytes[field] for field in fields) / 40
        assert figures.probe.signals[name].decoded >= 0.8 * decoded
        assert 0 < figures.probe.signals[name].stored < 1.2 * figures.probe.signals[name].decoded
    assert figures.probe.eager is not None
    assert figures.probe.eager_batch == 3
    weights = sum(path.stat().st_size for path in tiny_llava.glob("*.safetensors"))
    assert figures.probe.host_memory > weights
    assert figures.probe.device_memory is None


def test_eager_attention_is_left_out_where_it_does_not_fit_and_the_teacher_is_as_before(
    tmp_path: Path, tiny_llava: Path, monkeypatch, once
):
    config = BuildConfig(
        cache=str(tmp_path / "none"), teacher=str(tiny_llava), template="short", limit=4, store="webdataset"
    )
    implementations = []
    run = probe_module._run_eager

    def watched(work, batches):
        language_model = work.teacher.model.model.language_model
        implementations.append((language_model, language_model.config._attn_implementation))
        run(work, batches)

    monkeypatch.setattr(probe_module, "_run_eager", watched)
    assert estimate(config, Scenario(), samples=4).probe.eager is not None
    assert {name for _, name in implementations} == {"eager"}
    assert implementations[0][0].config._attn_implementation == "captured"
    monkeypatch.setattr(probe_module, "free_memory", lambda device: 1000)
    assert estimate(config, Scenario(), samples=4).probe.eager is None


def test_data_that_cannot_be_used_at_all_is_an_error(tmp_path: Path, tiny_llava: Path):
    config = BuildConfig(
        cache=str(tmp_path / "none"), teacher=str(tiny_llava), template="short", limit=2, max_length=40
    )
    with pytest.raises(DataError, match="no sample of the probe can be used"):
        estimate(config, Scenario(), samples=2)


def test_the_command_prints_a_table_and_writes_the_figures(tmp_path: Path, tiny_llava: Path, once):
    result = CliRunner().invoke(
        main,
        ["estimate", "--teacher", str(tiny_llava), "--cache", str(tmp_path / "none"), "--limit", "4",
         "--samples", "4", "--store", "webdataset", "--set", "template=short", "--students", "2,5",
         "--price", "1", "--json", str(tmp_path / "figures.json")],
        catch_exceptions=False,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "teacher beside the student" in result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [row["students"] for row in figures["comparison"]] == [2, 5]
    assert figures["probe"]["samples"] == 4
    assert torch.get_num_threads() >= 1
    assert CliRunner().invoke(main, ["estimate", "--students", "1,x"]).exit_code == 2
    assert CliRunner().invoke(main, ["estimate", "--students", "0"]).exit_code == 2
