"""`distill run`: two students, one table, one page; nothing is done twice and nothing is mixed."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import pytest
from click.testing import CliRunner
from finished_runs import FAST, make_config, whole
from tiny_cache import DATA, build_tiny_cache

from vlm_distill_cache.common.cache.reader import TeacherCache
from vlm_distill_cache.common.errors import CacheMismatchError, ConfigError, ModelError
from vlm_distill_cache.common.files.signed import write_signed
from vlm_distill_cache.data.registry import open_dataset
from vlm_distill_cache.stage2_student import run as run_module
from vlm_distill_cache.stage2_student.cli import main
from vlm_distill_cache.stage2_student.final_folder import read_provenance
from vlm_distill_cache.stage2_student.run import (
    LEFT,
    find_lost,
    load_run_config,
    run,
    set_up_libraries,
    write_report_again,
)
from vlm_distill_cache.stage2_student.scores.metrics import Score
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport, other_items_note
from vlm_distill_cache.stage2_student.training.output_folder import claim_output, refuse_foreign_folder
from vlm_distill_cache.stage2_student.training.preparation import prepare
from vlm_distill_cache.stage2_student.training.resolve import open_caches
from vlm_distill_cache.stage2_student.training.stamp import read_stamp


def test_a_run_leaves_two_students_a_table_and_a_page(finished):
    assert finished.fresh
    for name in ("sft", "distilled"):
        assert (finished.output / name / "final" / "model.safetensors").is_file()
        assert (finished.output / name / "log.jsonl").is_file()
    assert "sft" in finished.table.splitlines()[0]
    assert "distilled" in finished.table.splitlines()[0]
    assert "captions by likelihood" in finished.table
    assert "<svg" in finished.report.read_text()
    assert set(json.loads((finished.output / "evaluation.json").read_text())) == {"sft", "distilled", "checksum"}


@pytest.mark.slow
def test_the_teachers_scores_stand_only_beside_those_on_its_own_test_set(tiny_cache, copied, monkeypatch):
    def told(config):
        caches = open_caches(config)
        for cache in caches.values():
            score = {"value": 0.9, "low": 0.8, "high": 1.0, "items": 10}
            cache.plan.teacher["evaluation"] = {"scores": {"likelihood": score}}
        return caches

    monkeypatch.setattr(run_module, "open_caches", told)
    (copied / "report.html").unlink()
    summary = run(make_config(tiny_cache[0], copied))
    assert "teacher" in summary.table.splitlines()[0]
    here = json.loads((copied / "evaluation.json").read_text())["distilled"]["scores"]["likelihood"]["items"]
    for told in (summary.table, summary.report.read_text(), (copied / "distilled" / "final" / "README.md").read_text()):
        assert f"(captions by likelihood: 10 items, here {here})" in told.replace("&#x27;", "'")
    for other in ("evaluation.split=validation", "evaluation.data='shapes:images=4,seed=3'"):
        assert "teacher" not in run(make_config(tiny_cache[0], copied, other)).table.splitlines()[0]


def test_a_note_tells_that_a_teacher_was_scored_on_more_or_fewer_items():
    def report(**items):
        return EvaluationReport(
            scores={name: Score(value=0.5, low=0, high=1, items=count) for name, count in items.items()}
        )

    teacher = report(likelihood=2100, questions=10, other=3)
    assert other_items_note(teacher, report(likelihood=2100, other=4)) == ""
    told = other_items_note(teacher, report(likelihood=700, questions=11))
    assert "by likelihood: 2,100 items, here 700; questions, exact match: 10 items, here 11)" in told


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "empty": lambda path: path.write_bytes(b""),
    "null": lambda path: path.write_bytes(b"null"),
    "list": lambda path: path.write_bytes(b"[1]"),
    "lost": lambda path: path.unlink(),
}


def test_no_damage_to_what_a_run_left_is_vouched_for_scored_or_exported(tiny_cache, copied, tmp_path):
    final = copied / "distilled" / "final"
    config = make_config(tiny_cache[0], copied)
    stamp = read_stamp(copied)
    of_final = [path for path in final.iterdir() if path.is_file() and path.name not in ("README.md", "scores.json")]
    asked = itertools.cycle(DAMAGES)
    for path in [*(copied / name for name in LEFT), *of_final]:
        sound = path.read_bytes()
        # The commands are asked for one damage of a file, and for another one of the next file.
        now = {next(asked), "lost"} if path.name == "distillation.json" else {next(asked)}
        for name, damage in DAMAGES.items():
            damage(path)
            assert str(path) in find_lost(copied, stamp["left"])[0], (path, name)
            if path in of_final and name in now:
                for command in (["evaluate"], ["export", "--output", str(tmp_path / "x")]):
                    refused = CliRunner().invoke(main, [command[0], str(final), *command[1:]])
                    assert refused.exit_code == 1, (path, name)
                    assert "error: " in refused.output
                    assert path.name == "distillation.json" or "run the command that trained" in refused.output
                if (path.name, name) != ("distillation.json", "lost"):  # then it is anybody's model
                    with pytest.raises(ModelError):
                        prepare(replace(config, student=str(final)))
            if path.name == "evaluation.json" and path.parent == copied:
                with pytest.raises(ConfigError, match=r"evaluation.json.*run the same `distill run` command again"):
                    write_report_again(copied)
            path.write_bytes(sound)
    (final / "README.md").write_text("extra files are fine")
    said = []
    assert not run(replace(config, evaluation=replace(config.evaluation, every=2)), say=said.append).fresh
    assert "this run is finished, so that no step is left to be scored on the way" in "".join(said)


@pytest.mark.slow
def test_what_is_lost_or_damaged_is_made_again_and_is_the_same(tiny_cache, copied, caplog):
    before = whole(copied)
    shutil.rmtree(copied / "distilled" / "final")
    flip(sorted((copied / "distilled" / "checkpoints").iterdir())[-1] / "tensors.pt")
    flip(copied / "sft" / "final" / "model.safetensors")
    (copied / "sft" / "log.jsonl").write_bytes(b"\0" * 4096)
    (copied / "table.txt").unlink()
    (copied / "sft" / "evaluation.json").write_bytes(b"[]")
    said = []
    assert run(make_config(tiny_cache[0], copied), say=said.append).fresh
    assert whole(copied) == before
    for words in ("made again: ", "sft: made again: ", "distilled: training ", ", from its last checkpoint", "scoring"):
        assert any(words in line for line in said), words
    assert "ignoring damaged checkpoint" in caplog.text
    assert "log.jsonl: 0 lines are damaged and left out, and 4 of 4 steps are missing" in caplog.text
    umask = os.umask(0)
    os.umask(umask)
    for path in (copied / "sft" / "final").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path


@pytest.mark.parametrize("damage", ["flipped", "null", "lost"])
@pytest.mark.slow(quick=("flipped",))
def test_a_damaged_stamp_is_written_again_if_the_students_are_this_runs(tiny_cache, copied, damage):
    DAMAGES[damage](copied / "run.json")
    with pytest.raises(ConfigError, match=r"belongs to another run.*another --output"):
        run(make_config(tiny_cache[0], copied, "dft.lr=0.01"))
    DAMAGES[damage](copied / "run.json")
    before = whole(copied)
    assert run(make_config(tiny_cache[0], copied)).fresh
    assert whole(copied) == before
    assert not run(make_config(tiny_cache[0], copied)).fresh


@pytest.fixture
def openings(monkeypatch):
    """What is opened as a cache, and every manifest.json that is read, in this process."""
    opened, read, watching = [], [], [True]
    real = TeacherCache.__init__
    monkeypatch.setattr(TeacherCache, "__init__", lambda self, *a, **k: (opened.append(a), real(self, *a, **k))[1])

    def look(event, arguments):  # a hook stays for good, hence the switch
        if watching and event == "open" and str(arguments[0]).endswith("manifest.json"):
            read.append(arguments[0])

    sys.addaudithook(look)
    yield opened, read
    watching.clear()


@pytest.mark.slow
def test_a_run_opens_its_cache_once_and_hands_it_on(tiny_cache, tmp_path, openings):
    assert run(make_config(tiny_cache[0], tmp_path / "run")).fresh
    assert [len(each) for each in openings] == [1, 1]


def test_a_process_that_trains_one_student_opens_its_cache_once(tiny_cache, tmp_path, openings):
    arguments = ["train", "--student", "mobilevlm", "--data", DATA, "--cache", str(tiny_cache[0]), "--phases", "sft"]
    arguments += ["--output", str(tmp_path), *(part for item in FAST for part in ("--set", item))]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert [len(each) for each in openings] == [1, 1]


def test_the_baseline_reads_nothing_of_the_teacher_and_takes_as_many_steps(finished):
    logs = {}
    for name in ("sft", "distilled"):
        lines = (finished.output / name / "log.jsonl").read_text().splitlines()
        logs[name] = [json.loads(line) for line in lines]
    assert [r["phase"] for r in logs["sft"]] == [r["phase"] for r in logs["distilled"]]
    assert not any({"logits", "answer_attention"} & record.keys() for record in logs["sft"])
    assert {"logits", "answer_attention"} <= logs["distilled"][1].keys()


def test_a_second_call_says_that_all_is_up_to_date_without_training(tiny_cache, finished, monkeypatch):
    monkeypatch.setattr(run_module, "train_arm", None)
    options = (finished.output / "config.yaml").read_bytes()
    (finished.output / "config.yaml").unlink()  # as an older version left it
    again = run(make_config(tiny_cache[0], finished.output))
    assert not again.fresh
    assert (finished.output / "config.yaml").read_bytes() == options
    assert again.table == finished.table


def test_the_second_call_imports_neither_torch_nor_transformers(tiny_cache, finished):
    arguments = ["run", "--student", "mobilevlm", "--data", DATA, "--cache", str(tiny_cache[0])]
    arguments += ["--output", str(finished.output), *(part for item in FAST for part in ("--set", item))]
    code = (
        "import sys\nfrom vlm_distill_cache.stage2_student.cli import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "loaded = {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(f'imported {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout
    assert f"Report: {finished.report}" in done.stdout


def test_what_is_finished_is_kept_when_a_run_was_killed_half_way(tiny_cache, copied, monkeypatch):
    stamp = json.loads((copied / "run.json").read_text())
    (copied / "run.json").write_text(json.dumps({**stamp, "finished": None}))
    shutil.rmtree(copied / "distilled" / "final")
    (copied / "distilled" / "evaluation.json").unlink()
    trained = []
    real = run_module.train_arm
    monkeypatch.setattr(run_module, "train_arm", lambda arm, **k: (trained.append(arm.output), real(arm, **k)))
    said = []
    assert run(make_config(tiny_cache[0], copied), say=said.append).fresh
    assert trained == [str(copied / "distilled")]
    assert said[0] == "sft: trained already"


def test_a_loss_that_the_cache_cannot_serve_is_refused_before_the_baseline_is_trained(tmp_path, monkeypatch):
    build_tiny_cache(tmp_path / "c", data="shapes:images=2,seed=5", signals=("logits",))
    trained = []
    monkeypatch.setattr(run_module, "train_arm", lambda arm, **_: trained.append(arm))
    config = make_config(tmp_path / "c", tmp_path / "run", "data='shapes:images=2,seed=5'")
    with pytest.raises(CacheMismatchError, match=r'SET="dft.losses.answer_attention=0" with make'):
        run(config)
    assert trained == []
    assert not (tmp_path / "run" / "run.json").exists()


def test_samples_that_stage_one_could_not_read_are_mentioned_once(tmp_path, monkeypatch, caplog):
    class TrainedError(Exception):
        pass

    def train_none(*_, **__):
        raise TrainedError

    ids = open_dataset(DATA).sample_ids
    build_tiny_cache(tmp_path / "c", data=DATA, failed=(ids[1], ids[4]))
    monkeypatch.setattr(run_module, "train_arm", train_none)
    said = []
    config = make_config(tmp_path / "c", tmp_path / "run")
    with pytest.raises(TrainedError):
        run(config, say=said.append)
    assert [line for line in said if "left out" in line] == [
        f"2 samples that stage one could not read are left out ({tmp_path / 'c'})"
    ]
    prepare(config)
    assert "left out" not in caplog.text


def test_a_warning_of_each_process_about_speed_is_not_shown(recwarn):
    set_up_libraries()
    warnings.warn("Grad strides do not match bucket view strides. This may impair performance.", stacklevel=1)
    warnings.warn("another", stacklevel=1)
    assert [str(entry.message) for entry in recwarn] == ["another"]


def test_another_configuration_is_refused_naming_both_values(tiny_cache, copied):
    with pytest.raises(
        ConfigError, match=r"dft.lr: the folder has 0.002, this run has 0.01(.|\n)*another --output"
    ) as caught:
        run(make_config(tiny_cache[0], copied, "dft.lr=0.01"))
    assert "seed" not in str(caught.value)


def test_settings_that_do_not_change_the_result_are_no_other_configuration(tiny_cache, copied):
    assert not run(make_config(tiny_cache[0], copied, "num_workers=0", "log_every=1")).fresh


@pytest.mark.slow
def test_another_way_of_scoring_scores_again_and_trains_nothing(tiny_cache, finished, copied, monkeypatch):
    monkeypatch.setattr(run_module, "train_arm", None)
    again = run(make_config(tiny_cache[0], copied, "evaluation.limit=3"))
    assert again.fresh
    assert again.table != finished.table


def test_a_folder_of_something_else_is_refused(tiny_cache, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match=r"not empty and holds no run.json.*another --output"):
        run(make_config(tiny_cache[0], tmp_path))


def test_presets_follow_the_teachers_width_and_users_override_them(tiny_cache, tmp_path):
    tiny = make_config(tiny_cache[0], tmp_path)
    assert tiny.dft.steps == 2
    assert tiny.dtype == "float32"
    published = load_run_config(None, ["student=mobilevlm-1.7b", f"output={tmp_path}"], cache=tiny_cache[0])
    assert (published.dpt.batch_size, published.dft.batch_size, published.sft.batch_size) == (256, 128, 192)
    assert published.dtype == "bfloat16"
    assert published.dft.epochs == 1.0
    by_steps = load_run_config(
        None, ["student=mobilevlm-1.7b", f"output={tmp_path}", "dft.steps=7"], cache=tiny_cache[0]
    )
    assert (by_steps.dft.steps, by_steps.dft.epochs) == (7, None)


def test_a_yaml_file_stands_between_preset_and_command_line(tiny_cache, tmp_path):
    (tmp_path / "mine.yaml").write_text("dft:\n  lr: 0.5\n  losses: {logits: 0.25}\nseed: 3\n")
    config = load_run_config(
        tmp_path / "mine.yaml", ["student=mobilevlm", f"output={tmp_path}", "seed=4"], cache=tiny_cache[0]
    )
    assert (config.dft.lr, config.dft.losses.logits, config.seed) == (0.5, 0.25, 4)
    assert config.dft.losses.answer_attention == 1.0


def test_evaluate_report_and_export_work_from_the_folders_alone(finished, tmp_path):
    runner = CliRunner()
    student = finished.output / "distilled" / "final"
    scored = runner.invoke(main, ["evaluate", str(student), "--limit", "2", "--output", str(tmp_path / "s.json")])
    assert scored.exit_code == 0, scored.output
    assert "captions by likelihood" in scored.output
    assert json.loads((tmp_path / "s.json").read_text())["scores"]
    refused = runner.invoke(main, ["report", str(finished.output / "sft")])
    assert "it is not the folder of a run; give the folder that `distill run` wrote" in refused.output
    told = runner.invoke(main, ["report", str(finished.output)])
    assert told.exit_code == 0, told.output
    assert f"Report: {finished.report}" in told.output
    exported = runner.invoke(main, ["export", str(student), "--output", str(tmp_path / "half")])
    assert exported.exit_code == 0, exported.output
    from vlm_distill_cache.stage2_student.students.build import load_student

    load_student(tmp_path / "half")
    assert (tmp_path / "half" / "tokenizer.json").is_file()
    refused = runner.invoke(main, ["export", str(student), "--output", str(tmp_path / "half")])
    assert refused.exit_code == 1
    assert "error: " in refused.output


def test_a_run_says_where_the_best_students_on_the_way_lie(tiny_cache, copied):
    score = {"value": 0.5, "low": 0.4, "high": 0.6, "items": 9}
    line = {"step": 2, "phase": "dft", "best": True, "split": "test", "limit": 9, "scores": {"likelihood": score}}
    (copied / "distilled" / "evaluation.jsonl").write_text(json.dumps(line) + "\n")
    best = shutil.copytree(copied / "distilled" / "final", copied / "distilled" / "best")
    kept = {"step": 2, "by": "likelihood", "value": 0.5, "of": "x", "run": "y"}
    write_signed(best / "distillation.json", {**read_provenance(best), "best": kept})
    arguments = [
        "run",
        "--student",
        "mobilevlm",
        "--data",
        DATA,
        "--cache",
        str(tiny_cache[0]),
        "--output",
        str(copied),
    ]
    arguments += [part for item in FAST for part in ("--set", item)]
    told = CliRunner().invoke(main, arguments)
    assert f"Best on the way: {best}, after step 2, by likelihood 0.500 (distill evaluate {best} " in told.output
    told = CliRunner().invoke(main, [*arguments, "--json"])
    assert json.loads(told.stdout)["best"] == {"distilled": kept}


def test_train_prints_a_summary_and_the_next_command(tiny_cache, tmp_path):
    arguments = ["train", "--student", "mobilevlm-tiny", "--data", DATA, "--cache", str(tiny_cache[0])]
    arguments += ["--output", str(tmp_path / "run"), "--phases", "dpt,sft", "--seed", "2"]
    result = CliRunner().invoke(main, [*arguments, *(part for item in FAST for part in ("--set", item))])
    assert result.exit_code == 0, result.output
    assert "dpt: 1 steps" in result.output
    assert "data_wait" in result.output
    assert f"Next: distill evaluate {tmp_path / 'run' / 'final'}" in result.output
    result = CliRunner().invoke(
        main, [*arguments, *(part for item in FAST for part in ("--set", item))], env={run_module.ARM: "1"}
    )
    assert result.exit_code == 0, result.output
    assert f"Student: {tmp_path / 'run' / 'final'}" in result.output
    assert "Next:" not in result.output  # one of a run's students: the run says what comes next


def test_errors_are_one_line_without_a_traceback(tiny_cache, tmp_path):
    arguments = [
        "train",
        "--cache",
        str(tiny_cache[0]),
        "--output",
        str(tmp_path / "x"),
        "--phases",
        "dpt rlhf",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "error: phases: 'rlhf' is none of dpt, dft, sft" in result.output
    assert "Traceback" not in result.output


def test_usage_errors_exit_with_two():
    assert CliRunner().invoke(main, ["train", "--nonsense"]).exit_code == 2


def test_a_folder_that_another_process_works_in_is_refused(tmp_path):
    folders = tmp_path / "run", tmp_path / "cache"
    refused = pytest.raises(ConfigError, match="another process works there")
    with claim_output(*folders), refused, claim_output(*folders):
        pass
    with claim_output(*folders):  # free again
        assert folders[0].is_dir()


@pytest.mark.parametrize(("output", "cache"), [("c", "c"), ("c/run", "c"), ("o", "o/cache")])
def test_output_and_cache_do_not_lie_in_each_other(tmp_path, output, cache):
    with (
        pytest.raises(ConfigError, match="lie inside each other"),
        claim_output(tmp_path / output, tmp_path / cache),
    ):
        pass
    assert not (tmp_path / output).exists()


def test_a_file_system_without_locks_is_no_reason_to_refuse(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with claim_output(tmp_path / "run", tmp_path / "cache"):
        assert list((tmp_path / "run").iterdir()) == []


def test_a_training_does_not_spread_into_a_folder_of_other_things(tiny_cache, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "config.yaml").write_text("font: serif\n")
    arguments = ["train", "--cache", str(tiny_cache[0]), "--data", DATA, "--output", str(folder)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "not empty and holds no config.yaml of a training" in result.output
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]
    (folder / "config.yaml").write_text("cache: c\nphases: [sft]\n")
    refuse_foreign_folder(folder)
    refuse_foreign_folder(tmp_path / "new")


def test_a_student_folder_is_trained_by_its_width_not_by_a_dash_in_its_name(tiny_cache, tmp_path):
    for name, width, dtype in (("my-small", 64, "float32"), ("large", 2048, "bfloat16")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"text_config": {"hidden_size": width}}))
        given = [f"student={json.dumps(str(tmp_path / name))}", "output=o"]
        assert load_run_config(None, given, cache=tiny_cache[0]).dtype == dtype


def test_odd_characters_in_the_caches_path_are_kept(tiny_cache, tmp_path):
    for name in ("q'x", 'q"x', "b\\s", "a: b #c"):
        shutil.copytree(tiny_cache[0], tmp_path / name)
        assert make_config(tmp_path / name, tmp_path).cache == str(tmp_path / name)


def test_a_mistyped_option_is_named_not_the_preset(tiny_cache, tmp_path):
    with pytest.raises(ConfigError, match=r"options: unknown option dft.lrr; did you mean dft.lr\?") as caught:
        make_config(tiny_cache[0], tmp_path, "dft.lrr=1")
    assert "phases-" not in str(caught.value)
    (tmp_path / "mine.yaml").write_text("sed: 3\n")
    with pytest.raises(ConfigError, match=r"mine.yaml.*unknown option sed; did you mean seed"):
        load_run_config(tmp_path / "mine.yaml", ["output=o"], cache=tiny_cache[0])


def test_a_runs_own_file_is_all_that_repeats_it(finished, tiny_cache):
    config = load_run_config(finished.output / "config.yaml", [])
    assert (config.cache, config.output) == (str(tiny_cache[0]), str(finished.output))
    assert not run(config).fresh
    for arm in ("sft", "distilled"):
        assert load_run_config(finished.output / arm / "config.yaml", []).output == str(finished.output / arm)
    # A run's folder is not that of one training, though it holds a configuration.
    with pytest.raises(ConfigError, match="folder of a run; go on with it by `distill run`"):
        refuse_foreign_folder(finished.output)
