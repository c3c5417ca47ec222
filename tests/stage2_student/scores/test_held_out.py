"""What a student is scored on: known before the first step, never a crash at the end, never unsaid."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import PIL.Image
import pytest
from click.testing import CliRunner
from test_run import FAST
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.common.cache.manifest import read_manifest
from vlm_distill_cache.common.cache.versions import BEFORE, version_folder
from vlm_distill_cache.common.errors import ConfigError, DataError
from vlm_distill_cache.common.opening import open_cache
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student import run as run_module
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.run import load_run_config, run
from vlm_distill_cache.stage2_student.scores import held_out
from vlm_distill_cache.stage2_student.scores.held_out import probe_items, scoring_notes, split_on_the_way
from vlm_distill_cache.stage2_student.trained_student import open_as_trained


def write_data(folder, answers, broken=()):
    """A LLaVA file of one question a picture; those at ``broken`` are no pictures."""
    entries = []
    for number, answer in enumerate(answers):
        name = f"{number}.png"
        PIL.Image.new("RGB", (72, 72), ["red", "blue", "green"][number % 3]).save(folder / name)
        if number in broken:
            (folder / name).write_bytes(b"no picture")
        turns = [{"from": "human", "value": "<image>\nwhat color ?"}, {"from": "gpt", "value": answer}]
        entries.append({"id": f"s{number}", "image": name, "conversations": turns})
    path = folder / "data.json"
    path.write_text(json.dumps(entries))
    return path


def make_config(cache, output, data, *more):
    return load_run_config(
        None,
        ["student=mobilevlm", f"data={json.dumps(str(data))}", f"output={output}", *FAST, *more],
        cache=cache,
    )


def test_a_run_on_a_users_file_ends_with_a_table_that_says_what_was_scored(tmp_path, caplog):
    data = write_data(tmp_path, ["red", "blue", "green", "red"], broken=(1,))
    build_tiny_cache(tmp_path / "c", data=str(data), failed=("s1",))
    config = make_config(tmp_path / "c", tmp_path / "run", data, "evaluation.limit=4")
    said = []
    with caplog.at_level(logging.WARNING):
        summary = run(config, say=said.append)
    assert "1 of 4 questions cannot be read" in caplog.text
    assert "questions, exact match" in summary.table
    assert "1 samples that stage one could not read are left out" in said[0]
    assert sum("training data" in line for line in said) == 1  # before hours of training
    for text in (summary.table, summary.report.read_text()):
        assert "on the training data itself" in text
        assert "--set evaluation.data=FILE" in text
    assert run(config).table == summary.table  # up to date, and still said
    alone = CliRunner().invoke(main, ["evaluate", str(tmp_path / "run" / "sft" / "final")])
    assert "note: Questions are scored on the training data itself" in alone.output
    assert "with --data FILE" in alone.output


def test_long_answers_leave_the_agreement_with_the_teacher(tmp_path):
    data = write_data(tmp_path, ["a red circle left of a blue square"] * 3)
    build_tiny_cache(tmp_path / "c", data=str(data))
    summary = run(make_config(tmp_path / "c", tmp_path / "run", data))
    assert "top-1 agrees with teacher" in summary.table
    assert "only the agreement with the teacher is measured" in summary.table
    assert "only the agreement" in summary.report.read_text()


@pytest.mark.parametrize(
    ("named", "error", "message"),
    [
        ("missing.json", DataError, "does not exist"),
        ("unreadable", ConfigError, r"none of 2 probed questions.*evaluation.images=FOLDER"),
    ],
)
def test_held_out_data_that_cannot_be_used_is_refused_before_training(
    tiny_cache, tmp_path, monkeypatch, named, error, message
):
    monkeypatch.setattr(run_module, "train_arm", None)
    held_out = tmp_path / named
    if named == "unreadable":
        held_out = write_data(tmp_path, ["red", "blue"], broken=(0, 1))
    config = make_config(tiny_cache[0], tmp_path / "run", DATA, f"evaluation.data={held_out}")
    with pytest.raises(error, match=message):
        run(config)


def take_away(data, missing):
    """Remove pictures; entries without an ending are of no known form."""
    for number in missing:
        (data.parent / f"{number}.png").unlink()
    return data


@pytest.fixture(scope="module")
def trained(tiny_cache, tmp_path_factory):
    output = tmp_path_factory.mktemp("trained") / "run"
    config = make_config(tiny_cache[0], output, DATA, "phases=[sft]")
    run_module.train_arm(config, processes=1)
    return output / "final"


@pytest.mark.parametrize(
    ("missing", "scored"), [((), 6), ((1,), 5), ((0, 2, 5), 3), (range(4), None), (range(6), None)]
)
def test_held_out_pictures_that_are_missing_are_counted_said_and_stored_or_refused(trained, tmp_path, missing, scored):
    data = take_away(write_data(tmp_path, ["red", "blue", "green"] * 2), missing)
    stored = tmp_path / "scores.json"
    arguments = ["evaluate", str(trained), "--limit", "9", "--data", str(data), "--output", str(stored)]
    result = CliRunner().invoke(main, arguments)
    if scored is None:
        few = "none" if len(missing) == 6 else f"only {6 - len(missing)}"
        assert result.exit_code == 1
        assert f"{few} of 6 probed questions can be used" in result.output
        assert not stored.exists()
    else:
        assert result.exit_code == 0, result.output
        found = json.loads(stored.read_text())
        assert found["scores"]["questions"]["items"] == scored
        assert found.get("unreadable", {"items": 0})["items"] == len(missing)
        assert (f"note: {len(missing)} of 6 questions cannot be read and are not scored" in result.output) == bool(
            missing
        )
    if missing:
        assert f"the first: s{min(missing)}-0: image {min(missing)}.png cannot be read" in result.output


@pytest.mark.slow
def test_a_run_says_before_and_after_what_of_its_held_out_data_is_missing(tiny_cache, tmp_path):
    held_out = take_away(write_data(tmp_path, ["red", "blue", "green"]), [1])
    config = make_config(
        tiny_cache[0], tmp_path / "run", DATA, "phases=[sft]", f"evaluation.data={held_out}", "evaluation.limit=9"
    )
    said = []
    summary = run(config, say=said.append)
    note = "note: 1 of 3 questions cannot be read and are not scored"
    assert sum(line.startswith(note) for line in said) == 1
    assert sum(line.startswith(note) for line in summary.table.splitlines()) == 1
    assert note.removeprefix("note: ") in summary.report.read_text()
    assert "1.png" in json.loads((tmp_path / "run" / "evaluation.json").read_text())["sft"]["unreadable"]["reasons"][0]
    again = []
    assert run(config, say=again.append).table == summary.table
    assert again == []


def test_reasons_are_shown_short_and_in_characters_that_print(trained, tmp_path):
    data = write_data(tmp_path, ["red", "blue", "green"])
    entries = json.loads(data.read_text())
    entries[0]["image"] = "\x1b[2J" + "x" * 100_000
    data.write_text(json.dumps(entries))
    result = CliRunner().invoke(main, ["evaluate", str(trained), "--limit", "9", "--data", str(data)])
    assert result.exit_code == 0, result.output
    note = next(line for line in result.output.splitlines() if line.startswith("note: 1 of 3"))
    assert len(note) < 500
    assert "\x1b" not in note


def test_other_held_out_data_needs_no_note(tiny_cache, tmp_path):
    held_out = write_data(tmp_path, ["red", "blue"])
    config = make_config(tiny_cache[0], tmp_path / "run", DATA)
    assert probe_items(config, open_cache(tiny_cache[0])) == []
    config = make_config(tiny_cache[0], tmp_path / "run", DATA, f"evaluation.data={held_out}")
    assert probe_items(config, open_cache(tiny_cache[0])) == []


def test_on_the_way_items_are_of_the_validation_split_where_the_data_have_one(tiny_cache, tmp_path):
    cache = open_cache(tiny_cache[0])
    drawn = make_config(tiny_cache[0], tmp_path / "run", DATA)
    assert split_on_the_way(drawn, cache) == "validation"
    own = make_config(tiny_cache[0], tmp_path / "run", DATA, f"evaluation.data={write_data(tmp_path, ['red'])}")
    assert split_on_the_way(own, cache) == "test"  # all of the file, as for the trained student


def test_a_copy_of_the_training_data_is_recognised(tmp_path):
    data = write_data(tmp_path, ["red", "blue"])
    build_tiny_cache(tmp_path / "c", data=str(data), signals=("logits",))
    copy = tmp_path / "copy.json"
    copy.write_bytes(data.read_bytes())
    config = make_config(tmp_path / "c", tmp_path / "run", data, f"evaluation.data={copy}")
    [note] = scoring_notes(config, open_cache(tmp_path / "c"), scorable=True, option="--x")
    assert "training data itself" in note
    [note] = scoring_notes(config, open_cache(tmp_path / "c"), scorable=True, option="--x", known=False)
    assert "the cache's data" in note
    assert "training data" not in note
    # After the cache was extended to more data, what the student was trained on is its training data all the same.
    (tmp_path / "more").mkdir()
    build_tiny_cache(
        tmp_path / "d", data=str(write_data(tmp_path / "more", ["red", "blue", "green"])), signals=("logits",)
    )
    for named in ([f"evaluation.data={copy}"], []):
        config = make_config(tmp_path / "d", tmp_path / "run", data, *named)
        [note] = scoring_notes(config, open_cache(tmp_path / "d"), scorable=True, option="--x")
        assert "training data itself" in note


def test_without_its_cache_a_student_is_scored_without_the_comparison(tiny_cache, tmp_path):
    build_tiny_cache(tmp_path / "c")
    config = make_config(tmp_path / "c", tmp_path / "run", DATA, "phases=[sft]")
    run_module.train_arm(config, processes=1)
    (tmp_path / "c").rename(tmp_path / "gone")
    arguments = ["evaluate", str(tmp_path / "run" / "final"), "--limit", "2"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "note: Not compared with the teacher of its training" in result.output
    assert "captions by likelihood" in result.output
    assert "top-1" not in result.output
    named = CliRunner().invoke(main, [*arguments, "--cache", str(tmp_path / "gone")])
    assert "top-1" in named.output


def test_a_student_is_scored_whatever_became_of_its_cache_and_on_whatever_data(tiny_cache, tmp_path):
    data = write_data(tmp_path, ["red", "blue", "green"])
    (tmp_path / "more").mkdir()
    more = write_data(tmp_path / "more", ["red", "blue", "green", "red"])
    cache = tmp_path / "c"
    build_tiny_cache(cache, data=str(data), signals=("logits",))
    run_module.train_arm(make_config(cache, tmp_path / "run", data, "phases=[sft]"), processes=1)
    student = str(tmp_path / "run" / "final")

    def score(*options):
        return CliRunner().invoke(main, ["evaluate", student, "--limit", "9", *map(str, options)])

    kept = version_folder(cache, BEFORE, read_manifest(cache))
    cache.rename(kept)
    build_tiny_cache(cache, data=str(more), signals=("logits",))  # as `extend` leaves it
    result = score()
    assert result.exit_code == 0, result.output
    assert "top-1" in result.output
    assert f"compared with what it was then, {kept}" in result.output
    trained = open_cache(kept).manifest_hash
    assert open_as_trained(str(cache), trained, verify=True, needed="a report needs").path == kept
    (tmp_path / "link").symlink_to(cache)
    linked = open_as_trained(str(tmp_path / "link"), trained, verify=True, needed="a report needs")
    assert linked.path.resolve() == kept.resolve()
    kept.rename(tmp_path / "moved")  # extended twice, say
    with pytest.raises(ConfigError, match=r"a report needs .* it is another cache now"):
        open_as_trained(str(cache), trained, verify=True, needed="a report needs")
    result = score()  # the fourth sample is in no data at hand
    assert result.exit_code == 0, result.output
    assert "top-1" not in result.output
    assert "is another cache than the one of this training" in result.output
    assert f"1 of the 4 samples in {cache} are not in the data set data.json" in result.output
    for options in (["--data", more], ["--data", more, "--cache", cache]):
        result = score(*options)
        assert result.exit_code == 0, result.output
        assert "top-1" in result.output
        assert f"3 of the 4 questions of {more} are of the training data, too" in result.output
    built_in = score("--data", data, "--cache", tiny_cache[0])  # whose data need no name
    assert "top-1" in built_in.output, built_in.output
    data.unlink()
    result = score("--data", more)  # neither the training's data nor its cache
    assert "top-1" in result.output, result.output


def test_data_of_one_part_of_a_merge_is_training_data(tmp_path):
    data = write_data(tmp_path, ["red", "blue", "green"])
    build_tiny_cache(tmp_path / "c", data=str(data))
    config = replace(make_config(tmp_path / "c", tmp_path / "run", data), data=None)
    parts = [
        {"fingerprint": "another", "limit": 0, "samples": 9},
        {"fingerprint": open_dataset(str(data), limit=2).fingerprint(), "limit": 2, "samples": 2},
    ]
    plan = SimpleNamespace(data={"parts": parts}, fingerprints={"data": "of both"})
    cache = SimpleNamespace(plan=plan)
    assert held_out._is_training_data(config, str(data), cache)
    parts[1]["limit"] = 1
    assert not held_out._is_training_data(config, str(data), cache)


def test_of_a_cache_of_some_of_the_data_the_note_says_how_many(tmp_path):
    data = write_data(tmp_path, ["red", "blue", "green"])
    build_tiny_cache(tmp_path / "c", data=str(data))
    config = make_config(tmp_path / "c", tmp_path / "run", data)
    plan = SimpleNamespace(
        data={"split": "train", "limit": 2}, fingerprints={"data": open_dataset(str(data), limit=2).fingerprint()}
    )
    (note,) = scoring_notes(config, SimpleNamespace(plan=plan), scorable=True, option="X")
    assert note.startswith(
        f"Questions are scored on the training data itself ({data}; the cache holds its first 2 samples)"
    )
