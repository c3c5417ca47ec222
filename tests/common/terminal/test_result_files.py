"""What options name to be written: only over an earlier result of the same command, and never in a cache or a student."""

import json
from pathlib import Path

import click
import pytest
from cache_factory import build_cache, make_plan
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.files.atomic import write_json_atomic
from vlm_distill_cache.common.remotes.pull import pull
from vlm_distill_cache.common.remotes.push import push
from vlm_distill_cache.common.terminal.command_line import NewFolder
from vlm_distill_cache.common.terminal.result_files import ResultFile
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
    for name in ("student/distillation.json", "student/config.json"):
        (tmp_path / name).write_text("{}")
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
