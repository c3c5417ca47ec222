"""`make experiment-seeds`: one job of each part runs, a killed run goes on, and the tables say what the results are."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from tests.benchmarks import experiment_seeds as experiment
from tests.benchmarks.bench_docs import ROOT, TABLE_PAGE, table_in
from tests.benchmarks.experiment_seeds import STORED, Budget, Job, Place
from tests.benchmarks.experiment_seeds_arms import (
    ARMS,
    BASE,
    CUTS,
    LOGITS,
    ORACLE,
    SEEDS,
    UNPRUNED,
    decoded,
    recovered,
    selected,
)
from tests.benchmarks.experiment_seeds_tables import BEGIN, END, Results, in_order, tables
from vlm_distill_cache.common.config import config_from_dict
from vlm_distill_cache.stage2_student.config import TrainConfig

TINY = Budget(data="shapes:images=20", items=1, steps=2, pruned_steps=2)


def result(arm, seed, likelihood, questions=50.0, **more):
    return {"arm": arm, "seed": seed, "scores": {"likelihood": likelihood, "questions": questions, **more}}


def rows_of(*results, cuts=None):
    """The tables' rows as lists of cells, by their first cells."""
    stored = {"teacher": {"likelihood": 80.0, "questions": 100.0}, "cuts": cuts or {}, "results": list(results)}
    lines = [line.strip("| ").split(" | ") for line in tables(stored).splitlines() if line.startswith("| ")]
    return {(title, *row[:2]): row for row in lines for title in [len(row)]}


def test_differences_are_paired_by_seed_and_half_an_interval_is_that_of_student():
    # Differences 2 and 4: mean 3, deviation sqrt(2), half-width 12.706 * sqrt(2) / sqrt(2).
    found = rows_of(
        result(LOGITS, 101, 60.0), result(LOGITS, 102, 70.0), result(BASE, 101, 62.0), result(BASE, 102, 74.0)
    )
    assert found[5, BASE, "68.0 ± 76.2"] == [BASE, "68.0 ± 76.2", "50.0 ± 0.0", "+3.0 ± 12.7", "-"]
    assert found[5, LOGITS, "65.0 ± 63.5"][3:] == ["-", "-"]


def test_a_pruned_student_keeps_a_share_of_its_teacher_s_scores_and_of_an_unpruned_one_s():
    cut = CUTS[0]
    arms = [recovered(cut, 5, "SFT"), recovered(UNPRUNED, 5, "SFT")]
    results = [result(arm, seed, value) for arm, value in zip(arms, (60.0, 75.0), strict=True) for seed in (101, 102)]
    found = rows_of(*results, cuts={cut: {"likelihood": 40.0, "questions": 10.0}})
    none = "- / -"
    assert found[6, f"`{cut}`", "SFT"][2:] == ["50.0 / 10.0", "75.0 ± 0.0 / 50.0 ± 0.0", none, none]
    assert found[5, f"`{cut}`", "SFT"][2:] == ["80.0 ± 0.0 / 100.0 ± 0.0", none, none]
    assert found[6, f"`{UNPRUNED}`", "SFT"][3] == "93.8 ± 0.0 / 50.0 ± 0.0"


def test_fewer_tokens_stand_beside_all_of_them_trained_and_training_free():
    trained, free = (selected(25, "grid", trained=trained) for trained in (True, False))
    found = rows_of(
        *(result(arm, seed, value) for arm, value in ((BASE, 80.0), (trained, 77.0), (free, 70.5)) for seed in SEEDS)
    )
    assert found[8, "25 %", "grid"][2:] == [
        "77.0 ± 0.0", "50.0 ± 0.0", "-3.0 ± 0.0", "70.5 ± 0.0", "50.0 ± 0.0", "-9.5 ± 0.0"
    ]  # fmt: skip
    assert found[8, "100 %", "-"][2::3] == ["80.0 ± 0.0"] * 2


def test_shift_aware_decoding_is_compared_with_a_fixed_set_of_equal_size():
    results = [
        result(decoded(10, how), seed, 70.0, nats=nats, agreement=agreement, events=events)
        for how, nats, agreement, events in (("fixed", 0.5, 90.0, 0.0), ("shift", 0.4, 92.0, 1.25))
        for seed in SEEDS
    ]
    found = rows_of(*results)[9, "10 %", "shift"]
    assert found[2:4] + found[6:] == [
        "0.4000 ± 0.0000", "92.00 ± 0.00", "1.25 ± 0.00", "+0.1000 ± 0.0000", "+2.00 ± 0.00"
    ]  # fmt: skip


def test_students_that_others_are_made_of_come_first_and_what_is_done_is_not_run_again(tmp_path: Path):
    place = Place(tmp_path, TINY)
    free = selected(25, "grid", trained=False)
    jobs = [Job(name, 101) for name in (free, BASE, LOGITS)]
    assert experiment.missing(place, [], jobs) == [[Job(BASE, 101), Job(LOGITS, 101)], [Job(free, 101)]]
    done = [result(BASE, 101, 1.0), result(LOGITS, 101, 1.0)]
    # Its folder is gone: it is trained again, even if it is not asked for.
    assert experiment.missing(place, done, jobs) == [[Job(BASE, 101)], [Job(free, 101)]]
    assert experiment.missing(place, done, jobs[:1]) == [[Job(BASE, 101)], [Job(free, 101)]]
    place.trained(Job(BASE, 101)).mkdir(parents=True)
    assert experiment.missing(place, done, jobs) == [[], [Job(free, 101)]]
    assert experiment.missing(place, [*done, result(free, 101, 1.0)], jobs) == [[], []]


def test_results_of_another_budget_and_the_half_line_of_a_killed_run_do_not_count(tmp_path: Path):
    place = Place(tmp_path, TINY)
    lines = [result(LOGITS, seed, 1.0) | {"budget": asdict(kept)} for seed, kept in ((101, TINY), (102, Budget()))]
    place.results.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"arm": "lo')
    assert experiment.read_results(place) == [result(LOGITS, 101, 1.0)]
    again = result(LOGITS, 101, 2.0)
    assert in_order([again, *lines, result("no more", 101, 1.0), result(BASE, 101, 3.0), again]) == [
        result(BASE, 101, 3.0), again, lines[1]
    ]  # fmt: skip


def test_readme_quotes_the_stored_results():
    found, readme = Results(json.loads(STORED.read_text())), (ROOT / "README.md").read_text()
    quarter = [selected(25, how, trained=True) for how in ("gaze", "random")]
    shifts = [found.mean(decoded(33, how), "agreement", "{:.1f}") for how in ("fixed", "shift")]
    pruned = found.retained(recovered("pruned:depth:0.75", 5, "logits + answer attention"), None, "likelihood")
    for quoted in (
        f"gains {found.gain('+ answer_attention, sink_suppressed', BASE)} points",
        f"{found.mean(quarter[0], 'likelihood')}; all, {found.mean(BASE, 'likelihood')}; a random quarter, "
        f"{found.mean(quarter[1], 'likelihood', '{:.1f}')};",
        f"agrees with all in {shifts[0]} %; where it follows shifts, in {shifts[1]} %",
        f"`STUDENT=pruned:depth:0.75` keeps {pruned.partition(' ')[0]} % of the teacher's captions",
    ):
        assert quoted in " ".join(readme.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place(tmp_path_factory.mktemp("experiment"), TINY)
    experiment.build_caches(found)
    return found


@pytest.mark.slow
def test_a_job_of_each_part_is_run(place: Place):
    gaze = selected(25, "gaze", trained=True)
    trained = (BASE, gaze, recovered("pruned:depth:0.5", 5, "hidden states"))
    others = (selected(25, ORACLE, trained=True), selected(25, "sinks", trained=False), decoded(10, "shift"))
    for arm in (*trained, *others):
        found = experiment.run_job(place, Job(arm, 101))
        assert set(found["scores"]) >= {"likelihood", "questions"}
        if arm in trained:
            assert found["samples"] == (1 if "5 % of the data" in arm else 20)
    assert found["scores"].keys() == {"likelihood", "questions", "nats", "agreement", "events"}
    found = experiment.run_job(place, Job(f"{BASE}, 8bit", 101))
    assert found["scores"]["megabytes"] < 2
    assert not any((place.root / "runs").iterdir())


def test_no_two_jobs_write_to_one_folder(tmp_path: Path):
    jobs = [Job(arm, seed) for arm in ARMS for seed in SEEDS]
    assert len({Place(tmp_path, TINY).run(job) for job in jobs}) == len(jobs)


def test_the_options_of_all_arms_are_options_of_a_run():
    known = {entry.name for entry in fields(TrainConfig)}
    for name, arm in ARMS.items():
        options = {key: value for key, value in arm.options.items() if key in known}
        assert arm.part in experiment.WAYS or options.keys() == arm.options.keys()
        given = {"cache": "c", "output": "o", "dft": {"losses": arm.losses or {}}, **options}
        config_from_dict(TrainConfig, given | ({"teacher": "t"} if arm.part == "pruning" else {}), where=name)


def test_the_tables_in_the_documentation_are_those_of_the_stored_results():
    stored = json.loads(STORED.read_text())
    assert table_in((ROOT / TABLE_PAGE).read_text(), BEGIN, END) == tables(stored)
    assert stored["budget"] == asdict(Budget())
    assert stored["results"] == in_order(stored["results"])
