"""What options name to be written: only over an earlier result of the same command, and never in a cache or a student."""

import json
import os
import shutil
from pathlib import Path

import click
import pytest
from cache_factory import build_cache, make_plan
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.cache.other_folders import IS_SKETCH, cache_above, is_sketch, refuse_inside
from vlm_distill_cache.common.config import save_replay
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import write_json_atomic
from vlm_distill_cache.common.files.signed import write_signed
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.terminal.command_line import NewFolder
from vlm_distill_cache.common.terminal.result_files import ResultFile, json_of, refuse_others_file
from vlm_distill_cache.common.tools.convert import convert
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage1_teacher.extract import extract
from vlm_distill_cache.stage2_student.scores.results import EvaluationReport

PACKAGES = ("common", "stage1_teacher", "stage2_student")


def commands():
    for package in PACKAGES:
        group = group_of(package)
        for name in group.list_commands(click.Context(group)):
            yield package, name, group.get_command(click.Context(group), name)


WRITTEN = [
    (package, name, param)
    for package, name, command in commands()
    for param in command.params
    if isinstance(param.type, ResultFile) or (isinstance(param.type, NewFolder) and not param.type.exists)
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Somebody's files, a cache and a student: nothing changes them."""
    tmp_path = tmp_path_factory.mktemp("places")
    build_cache(tmp_path / "cache", make_plan())
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "config.json").write_text("{}")
    write_signed(tmp_path / "student" / "distillation.json", {"fingerprint": "f", "caches": {}, "config": {}})
    (tmp_path / "data.json").write_text(json.dumps([{"id": 1, "image": "a.png"}]))
    (tmp_path / "object.json").write_text(json.dumps({"scores": {}, "items": {}, "of": "a run"}))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG somebody's")
    (tmp_path / "link.json").symlink_to(tmp_path / "data.json")
    return tmp_path


def contents(folder: Path):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_option_that_names_a_file_or_folder_to_write_is_of_these_kinds():
    """A path that need not be there is written; texts are caches, which their writers look at."""
    for package, name, command in commands():
        for param in command.params:
            if isinstance(param.type, click.Path) and not param.type.exists:
                assert isinstance(param.type, ResultFile | NewFolder), (package, name, param.opts)
    assert {f"{name} {param.opts[-1]}" for _, name, param in WRITTEN} >= {
        "inspect --picture", "convert target", "merge --output", "pull cache", "estimate --json", "advise --json",
        "advise --output", "build --sketch", "demo-teacher --output", "train --output", "run --output", "prune --output",
        "evaluate --output", "export --output", "import --output",
    }  # fmt: skip


@pytest.mark.parametrize(("package", "name", "param"), WRITTEN, ids=lambda given: getattr(given, "name", given))
def test_no_command_writes_over_what_it_did_not_write(places, package, name, param):
    before = contents(places)
    taken = ("data.json", "object.json", "picture.png", "link.json", "nowhere/x.json", "cache", ".")
    inside = ("cache/new", "cache/manifest.json", "cache/shards/x", "student/new", "student/config.json", "student/a/b")
    for place in (*(taken if isinstance(param.type, ResultFile) else ()), *inside):
        value = str(places / place)
        words = [param.opts[-1], value] if isinstance(param, click.Option) else [str(places / "cache"), value]
        told = CliRunner().invoke(group_of(package), [name, *words])
        expected = "takes nothing else" if place in inside else "no earlier result|no folder|is a folder"
        assert told.exit_code == 2, (place, told.output)
        assert any(text in told.output for text in expected.split("|")), (place, told.output)
    assert contents(places) == before


def test_what_writes_caches_refuses_places_in_others_without_a_command_line_too(places):
    before = contents(places)
    for inside in (places / "cache" / "x", places / "student" / "x"):
        for write in (
            lambda to: push(places / "cache", str(to)),
            lambda to: push(places / "cache", str(to), overwrite=True),
            lambda to: pull(str(places / "cache"), to),
            lambda to: convert(places / "cache", to, "webdataset"),
            lambda to: extract(BuildConfig(cache=str(to))),
        ):
            with pytest.raises(ConfigError, match=r"takes nothing else|lie inside each other"):
                write(inside)
    assert contents(places) == before


def test_a_command_run_again_with_the_same_file_replaces_its_own_result(places):
    (kind,) = (param.type for _, name, param in WRITTEN if name == "evaluate")
    (places / "empty.json").touch()
    for unreadable in ({}, {"a": "no picture"}):
        write_json_atomic(places / "own.json", EvaluationReport(scores={}, items={}, unreadable=unreadable).to_dict())
        for name in ("own.json", "empty.json", "new.json"):
            assert kind.convert(str(places / name), None, None) == places / name


OTHERS = {
    "sketch.txt": "a sketch of the kitchen\n", "plan.json": '{"holidays": 1}', "manifest.json": '{"files": {}}',
    "index.bin": "x", "distillation.json": '{"a": 1}', "config.json": "{}", "shards/00000.json": "{}", "shards/a/x.json": "[",
}  # fmt: skip


def test_files_of_others_with_our_names_make_no_folder_a_cache_or_a_student(places, tmp_path):
    for name, content in OTHERS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    for place in ("new", "a/b/new", "shards/a-estimate.json", "shards/a/new"):
        refuse_inside(tmp_path / place)
        assert cache_above(tmp_path / place) is None
    for damaged in ("plan.json", "manifest.json"):  # either of a cache's own documents is enough
        (tmp_path / damaged).write_bytes((places / "cache" / damaged).read_bytes() if damaged == "plan.json" else b"{")
        with pytest.raises(ConfigError, match="takes nothing else"):
            refuse_inside(tmp_path / "new")
    for text, sketch in ((IS_SKETCH, True), ("mine", False)):
        (tmp_path / "sketch.txt").write_text(text)
        assert is_sketch(tmp_path) == sketch


def test_a_link_is_followed_and_what_is_no_file_is_refused_in_its_own_words(places, tmp_path, capfd):
    is_ours = json_of("scores", "items")
    own = tmp_path / "own.json"
    write_json_atomic(own, {"scores": {}, "items": {}})
    links = {"link": own, "chain": tmp_path / "link", "dangling": tmp_path / "new.json"}
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    leads = [refuse_others_file(tmp_path / name, is_ours) for name in (*links, "own.json", "plain.json")]
    assert leads == [own, own, tmp_path / "new.json", own, tmp_path / "plain.json"]
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "in").symlink_to(places / "cache" / "new.json")
    for place, words in (
        ("/dev/null", "a device"), (tmp_path / "pipe", "a pipe"), ("/dev/stdout", "own output"), ("/dev/fd/2", "own output"),
        (tmp_path / "circle", "no earlier result"), (tmp_path / "in", "takes nothing else"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            refuse_others_file(Path(place), is_ours)


def test_options_beside_a_folder_are_of_the_cache_in_it_or_gone(tmp_path):
    """Whatever writes another cache there; through a link, they lie beside the folder."""
    source = tmp_path / "source"
    build_cache(source, make_plan())
    writers = {
        "pulled": lambda to: pull(str(source), to),
        "pushed": lambda to: push(source, str(to)),
        "made": lambda to: convert(source, to, "webdataset"),
    }
    for name, write in writers.items():
        options = save_replay(BuildConfig(), tmp_path / name)
        write(tmp_path / name)
        assert not options.exists(), name
    folder, options = tmp_path / "made", tmp_path / "made.build.yaml"
    save_replay(BuildConfig(), folder)
    (tmp_path / "copy").symlink_to(folder)
    shutil.copy(options, tmp_path / "copy.build.yaml")
    assert save_replay(BuildConfig(), tmp_path / "copy") == options
    assert not (tmp_path / "copy.build.yaml").exists()
    push(folder, str(tmp_path / "twin"))
    push(tmp_path / "twin", str(folder), overwrite=True)  # the same cache
    assert options.exists()
    push(source, str(folder), overwrite=True)
    assert not options.exists()
    assert save_replay(BuildConfig(), folder, only_anew=True) is None
    assert not options.exists()
