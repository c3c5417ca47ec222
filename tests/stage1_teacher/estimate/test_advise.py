"""The advice: its figures against a real build's, its choices against plain searches, its command against the parser."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from family_caches import entry
from tiny_families import save_tiny

from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.disk import parse_bytes
from vlm_distill_cache.stage1_teacher.cli import ADVICE, main
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.estimate import advise as advise_module
from vlm_distill_cache.stage1_teacher.estimate import short_students
from vlm_distill_cache.stage1_teacher.estimate.advise import (
    Advice,
    OptionSet,
    advise,
    mark_best,
    measure_options,
    option_sets,
)
from vlm_distill_cache.stage1_teacher.estimate.advise_report import (
    advice_page,
    advice_text,
    build_command,
    cache_for,
    free_place,
    recommendation_text,
)

SIGNALS = ("logits", "answer_attention", "visual_columns", "visual_map", "hidden")


def measured(teacher: Path, scratch: Path, *, samples: int, **options):
    scratch.mkdir()
    return measure_options(BuildConfig(teacher=str(teacher), **options), scratch, samples=samples)


def on_disk(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


@pytest.mark.parametrize("store", ["zarr", "webdataset"])
@pytest.mark.slow
def test_bytes_and_errors_are_those_of_real_builds(
    tmp_path: Path, build_cache, tiny_llava: Path, store: str, monkeypatch
):
    """A probe of all samples has the very bytes; one of a third of them is near; the error is the fidelity card's."""
    options = {"limit": 20, "shard_size": 10, "store": store, "signals": SIGNALS, "batch_size": 3}
    monkeypatch.setattr(advise_module, "LOGITS", ("default", "fixed:4"))
    monkeypatch.setattr(advise_module, "MAPS", ("exact", "blocks"))
    scratch = {"cache": str(tmp_path / "none"), "template": "short"}
    whole = advise(measured(tiny_llava, tmp_path / "all", samples=300, **options, **scratch))
    third = advise(measured(tiny_llava, tmp_path / "some", samples=10, **options, **scratch))
    assert not (tmp_path / "none").exists()
    assert (whole.probe, third.probe) == (whole.samples, 10)
    found = {one.name: one for one in whole.sets}
    kept = {"zarr": "default", "webdataset": "fixed:4"}[store]
    cache, name = tmp_path / "built", f"logits={kept}"
    build_cache(cache, fidelity_samples=20, logits=kept, **options)
    card, actual = read_manifest(cache).fidelity, on_disk(cache)
    assert found[name].cache_bytes == pytest.approx(actual, rel=0.003)
    near = next(one for one in third.sets if one.name == name)
    assert near.cache_bytes == pytest.approx(actual, rel=0.05)
    for figure in ("logits_gradient_error", "kept_mass", "logits_kl", "entries_per_row"):
        assert found[name].figures[figure] == pytest.approx(card[figure], rel=1e-3)
    attention = found["attention_dtype=u1 map_preset=exact"].figures
    for figure in ("answer_attention_gradient_cosine", "visual_map_gradient_cosine"):
        assert attention[figure] == pytest.approx(card[figure], rel=1e-4)
    assert found["hidden_dtype=f2"].error == pytest.approx(card["hidden_error"], rel=1e-3)


def text_only(folder: Path) -> Path:
    folder.mkdir()
    (folder / "text.json").write_text(json.dumps([entry("only", None, "Is water wet?", "Yes, it is.")]))
    return folder / "text.json"


@pytest.mark.parametrize("family", ["gemma3", "qwen2_5_vl", "unlisted"])
@pytest.mark.slow(quick=("unlisted",))
def test_every_family_and_data_of_one_sample_without_a_picture(
    tmp_path: Path, family: str, family_data: Path, unlisted_teacher: Path, monkeypatch
):
    monkeypatch.setattr(advise_module, "LOGITS", ("lean", "default"))
    teacher = unlisted_teacher if family == "unlisted" else save_tiny(family, tmp_path / "teacher")
    signals = ("logits",) if family == "unlisted" else ("logits", "answer_attention", "visual_columns")
    for number, data in enumerate((family_data, text_only(tmp_path / "data"))):
        probe = measured(
            teacher, tmp_path / f"{number}", samples=6, data=str(data), signals=signals, store="webdataset"
        )
        advice = advise(probe)
        assert advice.probe == (6, 1)[number]
        logits = [one for one in advice.sets if one.part == "words"]
        assert [one.given for one in logits] == [True, False]
        assert all(0 <= one.error < 1.5 for one in logits)
        assert {one.error is None for one in advice.sets if one.part == "attention"} <= {bool(number)}
        assert "bytes of the whole cache" in advice_page(advice, advice_text(advice))


def a_set(part: str, options: dict, size: int, error: float | None) -> OptionSet:
    return OptionSet(part=part, options=options, token_bytes=1.0, cache_bytes=size, error=error, figures={})


def made_up() -> Advice:
    sets = [a_set("words", {"logits": name}, 1000 + size, error) for name, size, error in (
        ("default", 0, 0.02), ("lean", -200, 0.06), ("wide", 100, 0.02), ("exact", 3000, 0.0))]  # fmt: skip
    sets += [
        a_set("attention", {"attention_dtype": "u1", "map_preset": preset}, 1000 + size, error)
        for preset, size, error in (("exact", 0, 0.03), ("blocks", -300, 0.04), ("exact8", -500, 0.01))
    ]
    return Advice(
        name="t on d", store="zarr", samples=10, probe=5, failed=0, reason="", tokens=100, left_out={},
        signal_bytes={"logits": 300, "visual_map": 500}, cache_bytes=1000, side_bytes=50, sets=tuple(mark_best(sets)),
    )  # fmt: skip


def test_the_best_are_those_that_nothing_beats():
    best = {one.name for one in made_up().sets if one.best}
    assert best == {
        "logits=default", "logits=lean", "logits=exact", "attention_dtype=u1 map_preset=exact8"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "options", "size", "fits"),
    [
        ({"budget": 1000.0}, ("default", "exact"), 1000, True),
        ({"bound": 0.05}, ("default", "exact"), 1000, True),  # fewer bytes would serve one loss only
        ({"bound": 0.1}, ("lean", "exact"), 800, True),
        ({"budget": 750.0}, ("default", "blocks"), 700, True),
        ({"budget": 5000.0, "bound": 0.01}, ("exact", "exact"), 4000, False),
        ({"budget": 100.0}, ("lean", "blocks"), 500, False),
    ],
)
def test_the_recommendation_is_the_best_that_fits(asked: dict, options: tuple, size: int, fits: bool):
    found = made_up().recommend(**asked)
    if "bound" in asked and not fits:  # the budget is kept, and the error as small as can be
        assert found.cache_bytes <= asked["budget"]
        assert found.error == 0.03
        return
    assert (found.options["logits"], found.options["map_preset"]) == options
    assert (found.cache_bytes, found.fits) == (size, fits)
    assert found.every_loss == (options[1] == "exact")


def test_of_caches_of_about_one_size_the_better_is_recommended():
    alone = [
        a_set("words", {"logits": name}, size, error) for name, size, error in (("a", 1000, 0.04), ("b", 1009, 0.01))
    ]
    for bound, size, name in ((0.05, 1009, "b"), (0.05, 1011, "a")):
        sets = (alone[0], replace(alone[1], cache_bytes=size))
        assert replace(made_up(), sets=sets).recommend(bound=bound).options == {"logits": name}


def test_what_was_not_measured_has_no_error():
    """Alone, and beside what was measured: null in the figures, words in the text, and no bound that it keeps to."""
    f2, f4 = (a_set("states", {"hidden_dtype": kind}, size, None) for kind, size in (("f2", 600), ("f4", 800)))
    states = (replace(f4, given=True), f2)
    both, alone = replace(made_up(), sets=(*made_up().sets, *states)), replace(made_up(), sets=states)
    found = alone.recommend(bound=0.05)
    assert (found.error, found.fits, found.options) == (None, False, {"hidden_dtype": "f4"})
    text = recommendation_text(found, "", budget=None, bound=0.05, advice=alone)
    assert "keeps to a gradient error of 0.05 was not measured" in text
    assert "gradient error not measured" in recommendation_text(
        alone.recommend(budget=900), "", budget=900, bound=None, advice=alone
    )
    assert both.recommend(bound=0.05).error == made_up().recommend(bound=0.05).error
    text = recommendation_text(both.recommend(bound=0.05), "", budget=None, bound=0.05, advice=both)
    assert "nothing to compare" not in text
    assert "no sample of the probe has anything to compare of states: that was not measured, and stays" in text


def test_a_command_that_would_stop_says_so_and_one_that_would_go_on_does_not():
    for failed, tolerated, enough in ((5, 0.01, 0.55), (19, 0.5, 0.85), (95, 0.9, 1.0), (5, 0.5, None), (0, 0.0, None)):
        advice = replace(made_up(), failed=failed)
        text = recommendation_text(
            advice.recommend(bound=0.1), "build", budget=None, bound=0.1, advice=advice, tolerated=tolerated
        )
        assert ("could not be used" in text) == (enough is not None)
        if enough is not None:
            assert f"--set max_failed_share={enough:g}\n" in text
            assert failed / (failed + advice.probe) < enough <= BuildConfig(max_failed_share=enough).max_failed_share


@pytest.mark.parametrize(
    ("data", "name"),
    [("a b/own data.json", "own-data"), ("pics/", "pics"), ("org/name@main:split=x", "name-main-split-x"),
     ("shapes", "shapes"), ("/", "data"), ("../../..", "data"), ("x/{000..099}.tar", "000..099")],
)  # fmt: skip
def test_a_proposed_cache_is_named_after_the_data(data: str, name: str):
    assert cache_for(data, "zarr") == f"build/cache/{name}-zarr"


def test_what_would_stop_a_student_or_the_figures_is_said_before_the_teacher_runs(
    tmp_path: Path, tiny_llava: Path, monkeypatch
):
    def refuse(*words: str) -> None:
        raise ConfigError("no such student")

    monkeypatch.setattr(short_students, "_distill", refuse)
    monkeypatch.setattr(advise_module, "measure_options", None)
    asked = ["advise", "--data", "shapes:images=1", "--teacher", str(tiny_llava), "--set", "template=short"]
    told = {
        "no such student": ["--student", "nobody"],
        "add them to --signals": ["--student", "mobilevlm", "--signals", "hidden"],
        "nowhere.json": ["--student", "mobilevlm", "--eval-data", "nowhere.json"],
        "is a folder; give a file in it": ["--json", str(tmp_path)],
    }
    for message, words in told.items():
        said = CliRunner().invoke(main, [*asked, *words])
        assert said.exit_code in (1, 2)
        assert message in said.output


def test_what_is_too_small_a_budget_is_said_with_what_would_take_less():
    advice = made_up()
    found = advice.recommend(budget=100.0)
    text = recommendation_text(found, "teacher-cache build", budget=100.0, bound=None, advice=advice)
    assert "Nothing measured keeps to 100 B; the nearest is 500 B, gradient error 0.06" in text
    assert "fewer samples (--limit) or --signals without visual_map (500 B) would take less; 50 B lie beside" in text
    assert "map_preset=blocks serves the sink-filtered loss only" in text
    text = recommendation_text(found, "teacher-cache build", budget=10.0, bound=None, advice=advice)
    assert "--limit" not in text  # what lies beside the shards is more than that already


def test_sizes_are_read_with_their_units_and_nothing_else_is():
    assert [parse_bytes(text, "budget") for text in ("20GB", "1.5 TiB", "7", "3kb")] == [20e9, 1.5 * 2**40, 7, 3000]
    for text in ("", "GB", "-1GB", "nan", "inf", "1e400", "20 parsecs"):
        with pytest.raises(ConfigError, match="20GB"):
            parse_bytes(text, "budget")


@pytest.mark.slow
def test_the_command_is_the_build_with_the_options_that_were_chosen(tmp_path: Path, tiny_llava: Path, monkeypatch):
    output = tmp_path / "a folder"
    monkeypatch.setattr(advise_module, "LOGITS", ("default", "fixed:8"))
    monkeypatch.setattr(advise_module, "LONG_S", -1.0)  # any probe is a long one
    ran = CliRunner().invoke(
        main,
        ["advise", "--data", "shapes", "--limit", "9", "--teacher", str(tiny_llava), "--cache", str(tmp_path / "my cache"),
         "--samples", "4", "--output", str(output), "--set", "logits=exact", "--set", "template=short",
         "--max-gradient-error", "10"],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    assert "minutes more" in ran.output
    stored = json.loads((output / "advice.json").read_text())
    assert sorted(path.name for path in output.iterdir()) == ["advice.html", "advice.json"]
    assert all(ADVICE[path.name](path.read_bytes()) for path in output.iterdir())  # later ones may take their places
    command = stored["recommendation"]["command"]
    assert f"Next: {command}" in ran.output
    built = CliRunner().invoke(main, shlex.split(command)[1:])
    assert built.exit_code == 0, built.output
    size = on_disk(tmp_path / "my cache")
    assert stored["recommendation"]["cache_bytes"] == pytest.approx(size, rel=0.05)
    assert "logits=exact" not in command
    assert "--set template=short" in command
    # Its place holds that very cache now: the same advice may be followed there, another one is given another place.
    again = measured(tiny_llava, tmp_path / "again", samples=1, data="shapes", limit=9, template="short")
    assert not again.is_taken(tmp_path / "my cache", stored["recommendation"]["options"])
    assert again.is_taken(tmp_path / "my cache", {"logits": "exact"})
    assert not again.is_taken(tmp_path / "none", {"logits": "exact"})
    assert free_place(str(tmp_path / "my cache")) == str(tmp_path / "my cache-2")
    (tmp_path / "my cache-2").mkdir()
    assert free_place(f"{tmp_path / 'my cache'}/") == str(tmp_path / "my cache-3")


def test_a_command_keeps_names_as_a_shell_reads_them():
    command = build_command({"data": "a b.json", "images": None}, ["logits=lean", "dtype=float32"], {"logits": "wide"})
    assert shlex.split(command) == [
        "teacher-cache", "build", "--data", "a b.json", "--set", "dtype=float32", "--set", "logits=wide"
    ]  # fmt: skip


def test_every_set_is_one_that_a_build_takes_and_the_given_one_is_the_first():
    config = BuildConfig(logits="fixed:20", signals=SIGNALS, map_preset="blocks")
    sets = list(option_sets(config))
    assert sets[0] == ("words", {"logits": "fixed:20"})
    assert ("attention", {"attention_dtype": "u1", "map_preset": "blocks"}) in sets
    assert len({str(one) for one in sets}) == len(sets)
    for _, options in sets:
        BuildConfig(**options)


@pytest.mark.slow
def test_short_students_get_caches_that_stage_two_takes(tmp_path: Path, tiny_llava: Path, monkeypatch):
    """Each preset's cache goes through stage two's own checks; the training itself is stage two's matter."""
    from vlm_distill_cache.common.opening import open_cache
    from vlm_distill_cache.common.tools.verify import verify
    from vlm_distill_cache.data.registry import open_dataset
    from vlm_distill_cache.stage2_student.training.checks import check_data

    probe = measured(tiny_llava, tmp_path / "probe", samples=5, limit=20, batch_size=3, template="short")
    called = []

    def record(*words: str) -> None:
        called.append(words)
        if words[0] == "evaluate":
            score = {"value": 0.5, "low": 0.4, "high": 0.6, "items": 9}
            Path(words[words.index("--output") + 1]).write_text(json.dumps({"scores": {"teacher/top1": score}}))

    monkeypatch.setattr(short_students, "_distill", record)
    (tmp_path / "students").mkdir()
    scores = short_students.score_students(
        probe, tmp_path / "students", student="mobilevlm-tiny", steps=2, eval_data=None, overrides=["seed=7"],
        chosen={"logits": "fixed:4"},
    )  # fmt: skip
    assert list(scores) == [f"logits={name}" for name in ("exact", "lean", "default", "wide", "full", "fixed:4")]
    assert short_students.score_lines(scores)["logits=lean"] == ["teacher/top1 0.5 [0.4, 0.6]"]
    assert {word for words in called for word in words} >= {"seed=7", "dft.steps=2", "mobilevlm-tiny", "data_share=1.0"}
    data = open_dataset("shapes", split="train", images=None, limit=20)
    for number in (1, 5):
        folder = tmp_path / "students" / f"cache-{number}"
        assert verify(folder, deep=True) == []
        cache = open_cache(folder)
        assert len(cache) == 5
        check_data(cache, data)
