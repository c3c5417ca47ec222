"""Whoever misspells a name that is there is told the one that was meant; a remedy that is named exists."""

from pathlib import Path

import pytest
from cache_factory import build_cache, make_plan
from click.testing import CliRunner

import vlm_distill_cache
from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.errors import DataError, ModelError
from vlm_distill_cache.common.hub import model_folder
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport, render_table


def test_a_name_that_is_nearly_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build_cache(Path("caches/mine"), make_plan())
    Path("data.json").touch()
    sample = next(iter(open_cache("caches/mine")))
    for package, words, meant in (
        ("common", ["verify", "caches/mien"], "caches/mine"),
        ("common", ["inspect", "caches/mien"], "caches/mine"),
        ("common", ["inspect", "caches/mine", f"{sample}x"], sample),
        ("stage2_student", ["train", "--cache", "caches/mien", "--output", "o"], "caches/mine"),
        ("stage2_student", ["run", "--config", "date.json"], "data.json"),
        ("stage2_student", ["run", "--dry-run", "--cache", "caches/mine", "--output", "o", "--student", "mobilvlm"], "mobilevlm"),
    ):  # fmt: skip
        told = CliRunner().invoke(group_of(package), words)
        assert told.exit_code, told.output
        assert f"(did you mean {meant}?)" in told.output, told.output
    for typed, meant in (("shaeps", "shapes"), ("date.json", "data.json")):
        with pytest.raises(DataError, match=rf"does not exist \(did you mean {meant}\?\)"):
            open_dataset(typed)


def test_a_run_that_kept_no_file_of_options_is_told_where_they_are(tmp_path):
    (tmp_path / "distilled").mkdir()
    (tmp_path / "distilled" / "config.yaml").touch()
    told = CliRunner().invoke(group_of("stage2_student"), ["run", "--config", str(tmp_path / "config.yaml")])
    assert f"give --config {tmp_path / 'distilled' / 'config.yaml'} --output {tmp_path}" in told.output


def test_a_file_in_the_place_of_a_folder_is_called_one_and_the_folder_is_named(tmp_path):
    build_cache(tmp_path / "cache", make_plan())
    (tmp_path / "afile").touch()
    for words, told in (
        ("common inspect afile", "is a file; give the folder of a cache"), ("common verify afile", "is a file; give the folder"),
        ("common inspect cache/manifest.json", f"is a file; give {tmp_path / 'cache'}"),
        ("common verify cache/shards", f"a part of the cache {tmp_path / 'cache'}: give that"),
        ("stage1_teacher seal .", "not a teacher cache (no plan.json)"),
        ("stage2_student evaluate afile", "is a file; give the `final` folder"),
        ("stage2_student export afile --output x", "is a file; give the `final` folder"),
    ):  # fmt: skip
        package, command, place, *more = words.split()
        shown = CliRunner().invoke(group_of(package), [command, str(tmp_path / place), *more]).output
        assert told in shown, shown
        assert "did you mean" not in shown


@pytest.mark.parametrize("typed", ["stage1_teacher/builtin", "stage1_teacher/builtin/", "./stage1_teacher/builtin"])
def test_the_built_in_teacher_is_found_from_anywhere(tmp_path, monkeypatch, typed):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vlm_distill_cache.common.hub._folder_of_hub", lambda *_: 1 / 0)  # nobody is asked
    with pytest.raises(ModelError, match="the one of this program is ") as error:
        model_folder(typed, what="teacher")
    named = str(error.value).partition("program is ")[2].partition(":")[0]
    assert (Path(named) / "config.json").is_file()
    assert Path(named).is_relative_to(Path(vlm_distill_cache.common.__file__).resolve().parent.parent)


def test_kinds_of_questions_are_rows_even_where_none_was_answered():
    nothing = Score(value=0.0, low=0.0, high=0.0, items=3)
    scores = dict.fromkeys(("questions", "questions/number", "letters/bias"), nothing)
    table = render_table({"sft": EvaluationReport(scores=scores)})
    assert "number" in table
    assert "letter" not in table
