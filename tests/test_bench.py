"""What `make bench` does with its measurements: medians, tables, comparisons; and that the documentation shows the stored ones."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.benchmarks import bench, bench_pixels
from tests.benchmarks.bench_compare import OtherMachineError, change_table, compare, main
from tests.benchmarks.bench_docs import (
    BEGIN,
    END,
    QUOTES,
    ROOT,
    TABLE_PAGE,
    bench_table,
    codec_rows,
    map_table,
    replace_words,
    rewrite,
    short,
    table_in,
)
from tests.benchmarks.bench_measure import Seconds, Spread, Watch, paired_seconds, ratio, scaled
from tests.benchmarks.bench_online import students_ratio
from tests.benchmarks.bench_processes import finishing_rate
from tests.benchmarks.bench_results import STORED, gather, read_parts, read_results, write_parts, write_results
from tests.benchmarks.bench_training import in_turn, step_ratio, waiting_share
from tests.benchmarks.experiment_tables import real_language_model_tables, tables

MACHINE = {"processor": "abacus", "cores": 2, "threads": 1, "torch": "9.0"}


def results(**changes):
    """Two ratios, one figure."""
    made = {
        "machine": MACHINE,
        "ratios": {"step / SFT": 1.02, "tar / zarr": 4.0},
        "figures": {"open, ms": 1657.0},
        "spreads": {"step / SFT": [1.0, 1.05]},
        "groups": {"Stage two": ["step / SFT"], "Cache": ["tar / zarr", "open, ms"]},
    }
    return made | changes


def test_a_ratio_pairs_what_was_measured_in_one_round():
    # The machine was ten times slower in the third round; the medians' own ratio would be 3 / 2.
    assert ratio([3.0, 2.0, 40.0], [1.0, 2.0, 10.0]) == Spread(median=3.0, lowest=1.0, highest=4.0)
    assert Spread.of([5.0, 1.0, 2.0, 4.0]) == Spread(3.0, 1.0, 5.0)
    assert scaled(1e3, Spread(2.0, 1.0, 3.0)) == Spread(2000.0, 1000.0, 3000.0)


def test_a_ratio_is_of_processor_time_too_where_both_sides_have_it():
    # In the second round something else took the processor from the first call for 8 of 10 seconds.
    above, below = [Seconds(3.0, 3.0), Seconds(10.0, 2.0)], [Seconds(1.0, 1.0), Seconds(1.0, 1.0)]
    assert ratio(above, below) == Spread(6.5, 3.0, 10.0, (2.5, 2.0, 3.0))
    assert ratio(above, [1.0, 1.0]) == Spread(6.5, 3.0, 10.0)


def test_a_watch_counts_work_and_not_waiting():
    watch, mine = Watch(), Watch(thread=True)
    time.sleep(0.05)
    waited = watch.seconds()
    assert waited >= 0.05 > 2 * waited.cpu
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sum, range(2_000_000)).result()
    assert watch.seconds().cpu > 2 * mine.seconds().cpu


def test_calls_are_timed_in_turn_after_one_round_that_does_not_count():
    seen = []
    calls = {"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}
    seconds = paired_seconds(calls, rounds=2, before=lambda: seen.append("-"))
    assert "".join(seen) == "-a-b-a-b-a-b"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 2, "b": 2}


def test_one_teacher_pass_is_shared_by_all_cached_students():
    # Per sample: online 8 s, cached 2 s, teacher pass 4 s: 8 / 6, 24 / 10, 80 / 24.
    for students, expected in ((1, 8 / 6), (3, 24 / 10), (10, 80 / 24)):
        assert students_ratio([8.0], [2.0], [4.0], students).median == pytest.approx(expected)


def test_the_rate_of_finished_shards_leaves_out_what_came_before_the_first():
    assert finishing_rate([107.0, 103.0, 105.0], shard_size=16) == 8.0


def test_waiting_is_a_share_of_seconds_not_of_steps_and_warm_up_does_not_count():
    log = [
        {"step_s": 9.0, "data_wait": 1.0},
        {"step_s": 3.0, "data_wait": 0.1},
        {"step_s": 1.0, "data_wait": 0.5},
    ]
    assert waiting_share(log) == pytest.approx(100 * 0.8 / 4)


def test_trainings_take_their_steps_in_turn_and_one_that_fails_holds_up_no_other():
    seen = []

    def train(name, after_step):
        for _ in range(3):
            seen.append(name)
            after_step()
        seen.append(name.upper())

    seconds = in_turn({name: partial(train, name) for name in "abc"})
    assert "".join(seen) == "abcabcabcABC"
    assert [len(times) for times in seconds.values()] == [2, 2, 2]
    seen.clear()
    with pytest.raises(ZeroDivisionError):
        in_turn({"a": partial(train, "a"), "b": lambda _: 1 / 0, "c": partial(train, "c")})
    assert "".join(seen) == "acacacAC"


def test_the_ends_of_a_ratio_of_steps_leave_out_a_tenth_on_either_side():
    steps = [1.0, *[2.0] * 4, *[3.0] * 4, 90.0]
    assert step_ratio(steps, [1.0] * 10) == Spread(2.5, 2.0, 3.0)


def test_parts_are_joined_by_group_with_flat_numbers_and_their_spreads_beside_them():
    first = ({"a / b": Spread(1.23456, 1.0, 2.0, (1.11111, 1.0, 1.5))}, {"ms": 3.0})
    second = ({"c / d": 0.5}, {"bytes": Spread(7.0, 7.0, 8.0)})
    assert gather({"Cache": [first, second], "Loss": [({"e": 1.0}, {})]}, MACHINE) == {
        "machine": MACHINE,
        "ratios": {"a / b": 1.235, "c / d": 0.5, "e": 1.0},
        "figures": {"ms": 3.0, "bytes": 7.0},
        "spreads": {"a / b": [1.0, 2.0], "bytes": [7.0, 8.0]},
        "cpu": {"a / b": [1.111, 1.0, 1.5]},
        "groups": {"Cache": ["a / b", "c / d", "ms", "bytes"], "Loss": ["e"]},
    }
    with pytest.raises(ValueError, match=r"two parts of the bench measure 'a / b'"):
        gather({"Cache": [first, first]}, MACHINE)


def test_parts_that_were_measured_are_kept_and_only_the_others_are_run(tmp_path, monkeypatch):
    kept, ran = (
        {"a": ({"x / y": Spread(2.0, 1.0, 3.0, (2.0, 1.5, 2.5)), "w": Spread(1.0, 1.0, 1.0)}, {"bytes": 7.0})},
        [],
    )
    write_parts(kept, tmp_path / "build" / "bench.json")
    assert read_parts(tmp_path / "build" / "bench.json") == kept
    assert read_parts(tmp_path / "none.json") == {}

    def part(scratch):
        ran.append("b")
        return {"z": 1.0}, {}

    monkeypatch.setattr(bench, "PARTS", {"a": ("First", part), "b": ("Second", part), "c": ("Third", part)})
    results = bench.measure(("a", "b"), kept, lambda: ran.append("kept"))
    assert ran == ["b", "kept"]
    assert results["groups"] == {"First": ["x / y", "w", "bytes"], "Second": ["z"]}


def test_the_table_groups_rows_and_shows_spreads_where_there_are_any():
    assert bench_table(results(cpu={"step / SFT": [1.01, 1.0, 1.02]})).splitlines() == [
        "| abacus, 2 cores, threads: 1; torch 9.0 | median | lowest to highest | of processor time |",
        "|---|---|---|---|",
        "| **Stage two** | | | |",
        "| step / SFT | 1.02 | 1 to 1.05 | 1.01 (1 to 1.02) |",
        "| **Cache** | | | |",
        "| tar / zarr | 4 |  |  |",
        "| open, ms | 1,657 |  |  |",
    ]
    assert [short(value) for value in (0.0123456, 1.005, 999.9, 1234.5)] == ["0.0123", "1", "1,000", "1,234"]


def test_changes_stand_in_order_of_size_and_say_whether_they_are_outside_the_spread():
    new = results(ratios={"step / SFT": 1.04, "tar / zarr": 5.0}, figures={"open, ms": 1657.0}, spreads={}, groups={})
    shown = [(change.name, round(change.percent, 2), change.outside) for change in compare(results(), new)]
    assert shown == [("tar / zarr", 25.0, True), ("step / SFT", 1.96, False), ("open, ms", 0.0, False)]


def test_ratios_are_compared_by_processor_time_where_both_results_have_it():
    old = results(cpu={"step / SFT": [1.0, 0.99, 1.01]})
    new = results(ratios={"step / SFT": 1.5, "tar / zarr": 4.0}, cpu={"step / SFT": [1.005, 1.0, 1.02]})
    first, *_ = compare(old, new)
    assert (first.name, round(first.percent, 2), first.outside) == ("step / SFT, processor time", 0.5, False)
    assert compare(results(), new)[0][:3] == ("step / SFT", 1.02, 1.5)


def test_what_only_one_result_has_and_versions_that_changed_are_told():
    new = results(machine=MACHINE | {"torch": "9.1"}, ratios={"step / SFT": 1.2, "new one": 2.0})
    shown = change_table(results(), new)
    assert "| step / SFT | 1.02 | 1.2 | +17.6 % | yes |" in shown
    assert shown.endswith("gone: tar / zarr\nnew: new one 2\ntorch: 9.0, now 9.1\n")


def test_results_of_another_machine_are_not_compared():
    with pytest.raises(OtherMachineError, match=r"(?s)different machines.*abacus.*'cores': 64.*--output"):
        compare(results(), results(machine=MACHINE | {"cores": 64}))


def test_comparing_says_how_to_get_results_that_are_not_there(tmp_path, capsys):
    write_results(results(), tmp_path / "new.json")
    assert main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 1
    assert "run `make bench`" in capsys.readouterr().err
    assert main([str(tmp_path / "new.json")] * 2) == 0
    assert main(["one.json"]) == 2


def test_new_results_rewrite_the_table_and_the_quotes_and_nothing_else():
    before = read_results(STORED)
    now = before | {"figures": before["figures"] | {"stored bytes / row": 31.4}}
    before = before | {"figures": before["figures"] | {"stored bytes / row": 45.2}}
    readme = "It takes 45 bytes per\nsupervised token with the built-in  teacher.\n45 bytes\n"
    expected = "It takes 31 bytes per\nsupervised token with the built-in  teacher.\n45 bytes\n"
    assert rewrite(readme, "README.md", before, now) == expected
    assert rewrite(readme, "docs/families.md", before, now) == readme
    page = f"above\n{BEGIN}old\n{END}below\n"
    assert rewrite(page, TABLE_PAGE, before, now) == f"above\n{BEGIN}{bench_table(now)}{END}below\n"
    assert replace_words("a b b", "b b", "c d") == "a c d"


def test_a_page_without_its_marks_is_refused():
    with pytest.raises(ValueError, match=r"put both lines back"):
        table_in(f"{END}table\n{BEGIN}")


def test_the_table_in_the_documentation_is_that_of_the_stored_results():
    assert table_in((ROOT / TABLE_PAGE).read_text()) == bench_table(read_results(STORED))


def stored_rows(name: str) -> list[str]:
    """Rows of an experiment's tables, as Markdown."""
    stored = json.loads(STORED.with_name(f"{name}.json").read_text())
    return [line for line in tables(stored["results"], stored["teacher"]).splitlines() if line.startswith("| ")]


@pytest.mark.parametrize("name", ["experiment", "experiment_earlier"])
def test_the_tables_of_the_experiment_in_the_documentation_are_those_of_the_stored_results(name):
    rows = stored_rows(name)
    assert len(rows) > 10
    assert set(rows) <= set((ROOT / TABLE_PAGE).read_text().splitlines())


def test_the_rows_in_the_readme_are_those_of_the_stored_results():
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if " ± " in line and line.startswith("| ")]
    assert len(shown) == 6
    assert set(shown) <= set(stored_rows("experiment"))


def test_the_table_of_the_real_language_model_in_the_documentation_is_that_of_the_stored_results():
    stored = json.loads(STORED.with_name("experiment_smollm.json").read_text())
    table = real_language_model_tables(stored["results"], stored["teacher"])
    assert len(table.splitlines()) == 6
    assert table in (ROOT / TABLE_PAGE).read_text()


def test_the_tables_of_the_codecs_in_the_documentation_are_those_of_the_stored_results():
    figures = json.loads(STORED.with_name("bench_codec.json").read_text())["figures"]
    page = (ROOT / TABLE_PAGE).read_text()
    assert set(codec_rows(figures)) <= set(page.splitlines())
    assert map_table(figures) in page


def test_the_tables_of_pictures_in_the_documentation_are_those_of_the_stored_results():
    stored = json.loads(bench_pixels.STORED.read_text())
    shown = bench_pixels.tables(stored)
    assert table_in((ROOT / TABLE_PAGE).read_text(), bench_pixels.BEGIN, bench_pixels.END) == shown
    peaks = stored["building"]["peak_bytes_by_shard_size"]["now"]
    assert peaks["1024"] <= 1.2 * peaks["64"]  # what docs/scale.md says


@pytest.mark.parametrize("quote", QUOTES, ids=lambda quote: quote.text)
def test_what_the_documentation_quotes_are_the_stored_results(quote):
    words = " ".join((ROOT / quote.page).read_text().split())
    assert quote.fill(read_results(STORED)) in words
