"""``--dry-run``: nothing is written, all problems are named at once, and what starts without it would start with it."""

import json
import os
import re
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
from cache_factory import build_cache, make_plan
from click.testing import CliRunner
from finished_runs import FAST, make_config
from hub_server import ModelHub, use_models
from tiny_cache import build_tiny_cache

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.cache.plan import read_plan
from vlm_distill_cache.common.files.disk import refuse_no_disk
from vlm_distill_cache.common.terminal import general
from vlm_distill_cache.common.tools.outlook import looking_only
from vlm_distill_cache.data.sources.kept.store import Kept, kept_path, read_kept, write_kept
from vlm_distill_cache.stage2_student.final_folder import read_provenance
from vlm_distill_cache.stage2_student.run import train_alone

ROOT = Path(__file__).resolve().parent.parent
SHAPES = "shapes:images=20,seed=5"
CUT = ("teacher={llava}", "dft.losses.hidden=0")
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def sketch(tmp_path_factory, tiny_llava):
    """What stage one says of a cache of logits and answer attention that is not built."""
    folder = tmp_path_factory.mktemp("sketch")
    told = invoke("stage1_teacher", "build", *build_options(tiny_llava, folder / "cache"), "--sketch", folder / "of")
    assert told.exit_code == 0, told.output
    assert not (folder / "cache").exists()
    assert f"nothing was written but the sketch {folder / 'of'}" in told.output
    return folder / "of"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained-from") / "tiny"
    build_tiny_cache(folder)
    return folder


def invoke(package, *words):
    return CliRunner().invoke(group_of(package), [str(word) for word in words])


def build_options(teacher, cache):
    return ("--dry-run", "--data", SHAPES, "--teacher", teacher, "--cache", cache, "--set", "device=cpu")


def run_options(cache, output, *settings, student="mobilevlm-tiny"):
    given = [word for setting in (*FAST, *settings) for word in ("--set", setting)]
    data = () if any(setting.startswith("data=") for setting in settings) else ("--data", SHAPES)
    return ("--dry-run", "--cache", cache, "--output", output, *data, "--student", student, *given)


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_nothing_is_written_by_any_command_that_would_start(tiny_llava, cache, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("VLM_DISTILL_VERIFIED_DIR", str(home / "verified"))
    monkeypatch.chdir(tmp_path)
    build_cache(tmp_path / "one", make_plan())
    before = everything(tmp_path) | everything(cache)
    for package, *words in (
        ("stage1_teacher", "build", *build_options(tiny_llava, "new")),
        ("stage2_student", "run", *run_options(cache, "run")),
        ("stage2_student", "train", *run_options(cache, "train")),
        ("common", "push", "one", "pushed", "--dry-run"),
        ("common", "pull", "one", "pulled", "--dry-run"),
        ("common", "pull", "one", "pulled", "--dry-run", "--samples", "3"),
        ("common", "convert", "one", "other", "--store", "webdataset", "--dry-run"),
    ):
        told = invoke(package, *words)
        assert told.exit_code == 0, told.output
        assert "It would start; nothing was written." in told.output
    assert everything(tmp_path) | everything(cache) == before
    told = invoke("common", "merge", "one", "one", "--output", "merged", "--dry-run")
    assert told.exit_code == 1, told.output
    assert "one and one are one folder" in told.output
    assert everything(tmp_path) | everything(cache) == before


def test_a_sketch_is_called_one_and_is_taken_for_no_cache(sketch, tiny_llava, tmp_path):
    before = everything(sketch)
    for package, *words in (
        ("stage1_teacher", "build", *build_options(tiny_llava, sketch)),
        ("stage1_teacher", "build", *build_options(tiny_llava, tmp_path / "c"), "--sketch", tmp_path / "c"),
        ("stage2_student", "run", *run_options(sketch, tmp_path / "run")),
        ("stage2_student", "run", *run_options(sketch, tmp_path / "run")[1:]),
        *(("common", command, sketch) for command in ("verify", "repair", "inspect")),
    ):
        told = invoke(package, *words)
        assert told.exit_code, told.output
        assert "a sketch of a cache" in told.output or "--sketch: " in told.output
    assert everything(sketch) == before


def test_all_that_a_build_lacks_is_named_at_once(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "letter.txt").touch()
    words = ("--data", tmp_path / "none.json", "--teacher", tmp_path / "none", "--cache", tmp_path / "cache")
    told = invoke("stage1_teacher", "build", "--dry-run", *words, "--set", "device=cuda:99")
    assert told.exit_code == 1
    for problem in (
        "is not a teacher cache: it holds letter.txt",
        "CUDA devices are here",
        "none.json' does not exist",
        "none: there is no such folder",
        "4 problems",
    ):
        assert problem in told.output, told.output
    told = invoke(
        "stage2_student", "run", *run_options(tmp_path / "gone", tmp_path / "new", f"data={tmp_path}/no.json")
    )
    for problem in ("gone", "no.json' does not exist", "2 problems"):
        assert problem in told.output, told.output


@pytest.mark.parametrize(
    ("student", "settings", "problem"),
    [
        ("misspelt", (), "'misspelt' is neither a known student"),
        ("no/where/at/all", (), "no/where/at/all' is neither a known student"),
        ("{tmp}", (), "no readable config.json|config.json"),
        ("pruned:2", (), "above 0 and at most 1"),
        ("pruned:depth:0.5", (*CUT, "pruning.spare_last=4"), "keeps . of . layers, fewer than the 1 first and 4 last"),
        ("pruned:0.5", (*CUT, "pruning.ratios=global"), "ratios is 'global'; it must be layer, or global together"),
        ("mobilevlm-tiny", ("dft.lrr=1",), "unknown option dft.lrr"),
        ("mobilevlm-tiny", ("device=cuda:99",), "CUDA devices are here; choose auto"),
        ("mobilevlm-tiny", ("projector=mlp", "max_length=38", "evaluation.data=easy-vqa"), "exceed max_length=38"),
        ("mobilevlm-tiny", ("dft.losses.visual_map=1",), "needs a signal that .* does not hold: visual_map"),
        ("mobilevlm-tiny", ("dft.losses.temperature=7",), "losses.temperature is 7.0"),
        ("mobilevlm-tiny", ("evaluation.data=none.json",), "none.json' does not exist"),
        ("mobilevlm-tiny", ("data=shapes:images=3",), "is not the one that .* is built from"),
        ("compodistill-2b", ("projector=mlp",), "a random one of this size is of no use"),
        ("compodistill-tiny", (), "needs the teacher's own vision tower"),
    ],
)
def test_what_is_wrong_with_a_student_is_known_before_its_cache_is_built(
    sketch, tiny_llava, tmp_path, student, settings, problem
):
    output = tmp_path / "run"
    settings = [setting.format(llava=tiny_llava) for setting in settings]
    words = run_options("the-cache", output, *settings, student=student.format(tmp=tmp_path))
    told = invoke("stage2_student", "run", *words, "--sketch", sketch)
    assert told.exit_code == 1, told.output
    errors = [line for line in told.output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, (told.output, told.exception)
    assert re.search(problem, errors[0]), errors
    assert str(sketch) not in told.output
    assert not output.exists()


def test_more_processes_than_samples_of_a_step_are_refused_before_a_cache_is_built(sketch, tmp_path):
    words = run_options("c", tmp_path / "run", "dft.batch_size=4")
    told = invoke("stage2_student", "run", *words, "--sketch", sketch, "--nproc", "9")
    assert told.exit_code == 1
    assert "phase dft: batch_size is 4 samples for 9 processes" in told.output


@pytest.mark.parametrize("stage", ["teacher_cache", "distill"])
def test_every_option_that_cannot_be_used_is_named_whether_in_a_file_or_beside_it(tiny_llava, cache, tmp_path, stage):
    wrong = {
        "teacher_cache": {"nosuch": 1, "fidelity_samples": -5, "logits": "fixed:9999999", "device_map": "auto2"},
        "distill": {"nosuch": 1, "clip": -1, "dft.lrr": 2, "sft.batch_size": 0, "template": "foo", "device": "cuda:99"},
    }[stage]
    command = {
        "teacher_cache": ("stage1_teacher", "build", *build_options(tiny_llava, tmp_path / "new")[:-2]),
        "distill": ("stage2_student", "train", "--dry-run", "--cache", cache, "--output", tmp_path / "new"),
    }[stage]
    lines = list(wrong.items())
    for in_file in (2, len(lines)):
        nested: dict = {}
        for name, value in lines[:in_file]:
            *above, last = name.split(".")
            (nested.setdefault(above[0], {}) if above else nested)[last] = value
        file = tmp_path / "options.yaml"
        file.write_text(json.dumps({stage: nested}))
        beside = [word for name, value in lines[in_file:] for word in ("--set", f"{name}={json.dumps(value)}")]
        told = invoke(*command, "--config", file, *beside)
        assert f"{len(wrong)} problems above" in told.output, (in_file, told.output)
        assert not (tmp_path / "new").exists()


def test_a_training_that_is_refused_at_once_leaves_no_folder(cache, tmp_path):
    words = [word for word in run_options(cache, tmp_path / "new", "device=cuda:99") if word != "--dry-run"]
    told = invoke("stage2_student", "train", *words)
    assert told.exit_code == 1
    assert "CUDA devices are here" in told.output
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_a_place_for_pixels_that_is_refused_is_so_before_anything_is_written(cache, tmp_path, dry):
    words = run_options(cache, tmp_path / "new", f"pixel_cache={cache}/pixels")
    told = invoke("stage2_student", "train", *(word for word in words if dry or word != "--dry-run"))
    assert told.exit_code == 1
    assert f"{cache}/pixels and {cache} are one folder or lie inside each other" in told.output
    assert not (tmp_path / "new").exists()


def test_a_part_that_cannot_be_pulled_is_refused_before_as_it_is_after(tmp_path):
    build_cache(tmp_path / "one", make_plan())
    ids = tmp_path / "ids.txt"
    ids.write_text("nobody\n")
    parts = {
        ("--shards", "garbage"): 1,
        ("--shards", "99"): 1,
        ("--samples", ids): 1,
        ("--samples", tmp_path / "none"): 1,
        ("--signals", "hidden_states"): 1,
        ("--top-k", "999"): 1,
        ("--shards", "0", "--samples", "2", "--signals", "logits", "--top-k", "4"): 0,
    }
    for number, (part, code) in enumerate(parts.items()):
        target = tmp_path / f"part-{number}"
        words = ("pull", tmp_path / "one", target, *part)
        looked = invoke("common", *words, "--dry-run")
        assert not target.exists()
        done = invoke("common", *words, "--no-verify")
        assert [looked.exit_code, done.exit_code] == [code, code], (looked.output, done.output)
        if not code:
            assert f": {read_plan(target).sample_count} samples, logits" in looked.output


def test_a_file_system_that_keeps_no_files_is_found_out_and_one_that_tells_no_size_is_used(tmp_path, monkeypatch):
    if Path("/proc/self").exists():
        with pytest.raises(OSError, match="nothing can be written there"):
            refuse_no_disk(Path("/proc"))
    monkeypatch.setattr(os, "statvfs", lambda place: SimpleNamespace(f_blocks=0))
    refuse_no_disk(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_students_problems_are_named_together(sketch, tmp_path, monkeypatch):
    output = tmp_path / "run"
    output.mkdir()
    (output / "letter.txt").touch()
    settings = ("dft.lrr=1", "sfd.lr=1", "dft.losses.visual_map=1", "evaluation.data=none.json")
    told = invoke("stage2_student", "run", *run_options("c", output, *settings, student="nobody"), "--sketch", sketch)
    for problem in (
        "dft.lrr",
        "sfd",
        "visual_map",
        "none.json",
        "'nobody'",
        "it is not the folder of a run",
        "6 problems",
    ):
        assert problem in told.output, told.output
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Usage(1 << 40, 1 << 40, 1000))
    told = invoke("stage2_student", "run", *run_options("c", tmp_path / "new"), "--sketch", sketch)
    assert "students and checkpoints takes" in told.output
    assert told.exit_code == 1


def test_a_name_that_is_not_on_the_hub_is_a_problem_and_weights_stay_there(sketch, tiny_llava, tmp_path, monkeypatch):
    with ModelHub(tmp_path) as hub:
        use_models(monkeypatch, hub.url, tmp_path / "home")
        words = run_options("c", tmp_path / "run", student="nobody/nothing")
        told = invoke("stage2_student", "run", *words, "--sketch", sketch)
        assert told.exit_code == 1
        assert "nobody/nothing: there is no such folder, and no such repository" in told.output
        hub.publish("tiny-org/tiny-llava", tiny_llava)
        words = build_options("tiny-org/tiny-llava", tmp_path / "cache")
        told = invoke("stage1_teacher", "build", *words)
        assert told.exit_code == 0, told.output
        assert "to download: tiny-org/tiny-llava" in told.output
        words = run_options("c", tmp_path / "run", student="tiny-org/tiny-llava")
        told = invoke("stage2_student", "run", *words, "--sketch", sketch)
        assert told.exit_code == 0, told.output
        assert "to download: tiny-org/tiny-llava" in told.output
        assert not any("safetensors" in request for request in map(str, hub.requests))
        assert not list((tmp_path / "home").rglob("*.json"))


def test_options_that_differ_from_what_is_there_are_named(cache, tmp_path, tiny_llava):
    output = tmp_path / "run"
    train_alone(make_config(cache, output, "phases=[sft]"))
    trained = read_provenance(output / "final")["fingerprint"]
    told = invoke("stage2_student", "train", *run_options(cache, output, "phases=[sft]", "sft.lr=1"))
    assert told.exit_code == 1
    assert "sft.lr: there has" in told.output
    for unused in ((), ("dpt.steps=77", "dft.lr=0.5", "lora.rank=3")):
        same = run_options(cache, output, "phases=[sft]", *unused, student="mobilevlm")
        told = invoke("stage2_student", "train", *same)
        assert told.exit_code == 0, told.output
        assert "hours: none, all steps are done" in told.output
    told = invoke("stage2_student", "train", *[word for word in same if word != "--dry-run"])
    assert told.exit_code == 0, told.output
    assert read_provenance(output / "final")["fingerprint"] == trained


@pytest.mark.slow
def test_the_example_of_both_stages_runs_and_is_compared_with_what_it_left(tmp_path, monkeypatch):
    """The other stage's process is its command called here."""

    def call(command, environment, *, output=None):
        with monkeypatch.context() as apart:  # as a process of its own has
            apart.setattr(general, "_chosen", general._Chosen())
            for name in environment.keys() - os.environ.keys():
                apart.setenv(name, environment[name])
            done = invoke("stage1_teacher", *command[3:])
        if output not in (None, subprocess.DEVNULL):
            output.write(done.stdout.encode())
        assert "Next: " not in done.output  # what comes next goes on at once
        assert done.exit_code == 0 or "differs" in str(done.output) or "other settings" in done.output, done.output
        return done.exit_code

    monkeypatch.setattr("vlm_distill_cache.common.tools.both_stages.run_command", call)
    monkeypatch.chdir(tmp_path)
    example = ROOT / "docs" / "examples" / "both_stages.yaml"
    told = invoke("stage2_student", "run", "--config", example, "--dry-run")
    assert told.exit_code == 0, told.output
    assert list(tmp_path.iterdir()) == []
    document = json.loads(invoke("stage2_student", "run", "--config", example, "--dry-run", "--json").stdout)
    assert [document["starts"], document["problems"]] == [True, []]
    for of_stage in ("teacher-cache build would write", "distill run would train"):
        assert any(line.startswith(of_stage) for line in document["would"])
    told = invoke("stage2_student", "run", "--config", example)
    assert told.exit_code == 0, told.output
    assert (tmp_path / "build" / "runs" / "both-stages" / "report.html").is_file()
    changed = tmp_path / "changed.yaml"
    changed.write_text(example.read_text().replace("[logits, answer_attention]", "[logits]"))
    assert invoke("stage2_student", "run", "--config", changed).exit_code == 1


def test_sections_and_shared_options_that_there_are_not_are_refused(tmp_path):
    for text, problem in (
        ("teacher_cach: {}\ndistill: {}\n", "unknown section teacher_cach; did you mean teacher_cache"),
        ("distill: {}\nstudent: mobilevlm\n", "unknown section student"),
        ("distill: 3\n", "section distill is 3"),
        ("distill: {nonsense: 1}\ncache: c\n", "unknown option nonsense"),
        ("teacher_cache: {student: x}\ndistill: {}\ncache: c\n", "an option of stage two"),
    ):
        path = tmp_path / "both.yaml"
        path.write_text(text)
        stage = (
            ("stage1_teacher", "build")
            if "student: x" in text
            else ("stage2_student", "train", "--output", tmp_path / "o")
        )
        told = invoke(*stage, "--config", path, "--dry-run")
        assert told.exit_code == 1
        assert problem in told.output, told.output


def test_what_is_found_out_about_large_data_is_kept_by_a_look_too(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "home"))
    of = ["made", "of"]
    with looking_only():
        assert write_kept(kept_path("surveys", of), of, Kept({"found": 1}, {}))
    with looking_only(), looking_only():
        found = read_kept(kept_path("surveys", of), of)
    assert found is not None
    assert found.notes == {"found": 1}
    assert kept_path("surveys", of).is_relative_to(tmp_path / "home")
    assert read_kept(kept_path("surveys", of), of).notes == {"found": 1}
    (tmp_path / "file").touch()
    monkeypatch.setenv("VLM_DISTILL_CACHE_DIR", str(tmp_path / "file"))  # no folder can be made there
    with looking_only():
        assert not write_kept(kept_path("surveys", of), of, Kept({"found": 2}, {}))
