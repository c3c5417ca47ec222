"""Whoever has no Makefile of ours is told of commands alone."""

import ast
import os
import re
from pathlib import Path

import pytest
from cache_factory import make_plan
from test_architecture import FILES, ROOT, parsed

from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.locations import by_make
from vlm_distill_cache.common.terminal.next_step import distill_command, set_words
from vlm_distill_cache.stage2_student.students.presets import student_folder

# Variables of make with a value behind, and its targets; `--set KEY=VALUE` and names inside of f-strings are none.
VARIABLES = re.compile(
    r"\b(?:CACHE|CACHE_SET|OUTPUT|DATA|IMAGES|TEACHER|SET|SIGNALS|STUDENT|EVAL_DATA)=|\bmake (?:distill|teacher-cache|setup)\b"
)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    for name in ("MAKELEVEL", "DATA_NAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


def words_outside(tree: ast.AST):
    """Texts of a module that no call of `by_make` chooses; docstrings are for who reads the code."""
    if isinstance(tree, ast.Call) and getattr(tree.func, "id", "") == "by_make":
        return
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.Constant) and isinstance(child.value, str):
            yield child.lineno, child.value
        yield from words_outside(child)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_speaks_of_make_unless_make_is_run(path: Path):
    found = [(line, text) for line, text in words_outside(parsed(path)) if VARIABLES.search(text)]
    assert not found


def test_next_steps_are_commands_that_are_there(elsewhere):
    command = distill_command(make_plan(), "the cache", data="my data.json", images="pictures")
    data = "--data 'my data.json' --images pictures --cache 'the cache' --output FOLDER"
    assert command.startswith(f"distill run --student mobilevlm {data}")
    assert "--set dpt.losses.answer_attention=0" in command
    assert set_words(["dft.lr=1"]) == "--set dft.lr=1"
    with pytest.raises(ConfigError, match=r"--set student_weights=.*or --student ") as raised:
        student_folder("smolvlm", None)
    assert "STUDENT=" not in str(raised.value)


def test_whoever_runs_our_make_is_told_of_it(elsewhere, monkeypatch):
    Path("Makefile").write_text((ROOT / "Makefile").read_text())  # a clone, whose commands are run by hand
    assert by_make("make", "command") == "command"
    monkeypatch.setitem(os.environ, "MAKELEVEL", "1")
    assert by_make("make", "command") == "command"  # of another project's make
    monkeypatch.setitem(os.environ, "DATA_NAME", "shapes")
    assert by_make("make", "command") == "make"
