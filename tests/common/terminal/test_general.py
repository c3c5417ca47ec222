"""What all commands have in common: one document, how much is said, progress, versions, completion, help."""

import io
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import pytest
from cache_factory import FAILED, build_cache, make_plan, make_record, sample_id
from click.shell_completion import ShellComplete, get_completion_class
from click.testing import CliRunner

from vlm_distill_cache import __version__
from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.cli import main as cachectl
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal import progress
from vlm_distill_cache.common.terminal.command_line import CommandGroup, say, tell
from vlm_distill_cache.common.terminal.general import JSON, answer

PROGRAMS = {"teacher-cache": "stage1_teacher", "distill": "stage2_student", "cachectl": "common"}


@dataclass
class Found:
    place: Path
    share: float


@click.group(cls=CommandGroup)
def toy() -> None:
    """A toy."""


@toy.command()
@click.argument("how")
@JSON
def work(how: str) -> None:
    """Do what is asked for. A second sentence."""
    logging.getLogger("vlm_distill_cache.toy").debug("detail")
    tell("Next: this")
    say("a result")
    answer(
        found=Found(Path("a"), float("nan")),
        numbers=[np.float32(0.5), np.int64(3), True, None, float("-inf")],
        arrays=np.array([[1.0, np.inf]]),
        text="\x1b[31m\x7f\ud800 s3://user:secret@b/c?sig=abc",
    )
    if how == "fail":
        raise ConfigError("it broke; mend it")
    if how == "stop":
        raise KeyboardInterrupt
    if how == "exit":
        raise click.exceptions.Exit(3)
    if how == "crash":
        raise RuntimeError("nobody expected this")
    if how == "disk":
        raise OSError(28, "No space left", "x")


def invoke(group, *arguments, **options):
    return CliRunner().invoke(group, [str(argument) for argument in arguments], **options)


def document(group, *arguments, code=0):
    result = invoke(group, *arguments)
    assert result.exit_code == code, result.output

    def refuse(text):
        raise AssertionError(text)

    assert "\x1b" not in result.stdout
    return json.loads(result.stdout, parse_constant=refuse)


@pytest.mark.parametrize(
    ("how", "code", "error"),
    [
        ("well", 0, None), ("fail", 1, "it broke; mend it"), ("stop", 130, "stopped"), ("exit", 3, None),
        ("crash", 1, "RuntimeError: nobody expected this"), ("disk", 1, "x: No space left"),
    ],
)  # fmt: skip
def test_one_document_is_all_of_standard_output_however_a_command_ends(how, code, error):
    found = document(toy, "work", how, "--json", code=code)
    assert found.get("error", "").startswith(error or "")
    assert (error is None) == ("error" not in found)
    assert found["found"] == {"place": "a", "share": None}
    assert found["numbers"] == [0.5, 3, True, None, None]
    assert found["arrays"] == [[1.0, None]]
    assert "secret" not in found["text"] + found["text"]
    result = invoke(toy, "work", how, "--json")
    assert "a result" in result.stderr
    assert invoke(toy, "work", how).exit_code == code


def test_usage_errors_are_documents_too_and_only_where_one_was_asked_for():
    for arguments in (["work", "--json"], ["work", "well", "--json", "--nothing"], ["work", "well", "x", "--json"]):
        assert document(toy, *arguments, code=2)["error"]
    assert invoke(toy, "work", "--nothing").stdout == ""
    assert invoke(toy, "work", "--", "--json").stdout.startswith("Next: this\na result")


def test_what_libraries_and_children_print_does_not_reach_the_document():
    code = (
        "import os, sys, click\n"
        "from vlm_distill_cache.common.terminal.command_line import CommandGroup\n"
        "from vlm_distill_cache.common.terminal.general import JSON, answer\n"
        "@click.group(cls=CommandGroup)\ndef main(): pass\n"
        "@main.command()\n@JSON\ndef work():\n"
        "    print('python')\n    os.write(1, b'library')\n    os.system('echo child')\n    answer(a=1)\n"
        "    import atexit\n    atexit.register(print, 'farewell')\n"
        "main(['work', '--json'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == {"a": 1}
    assert all(word in ran.stderr for word in ("python", "library", "child", "farewell"))


def test_quiet_says_results_alone_and_verbose_more(caplog):
    assert invoke(toy, "work", "well").stdout == "Next: this\na result\n"
    for arguments in (["-q", "work", "well"], ["work", "well", "--quiet"]):
        assert invoke(toy, *arguments).stdout == "a result\n"
    assert invoke(toy, "work", "well", "-q", "--json").stderr == ""
    for arguments in (["-v", "work", "well"], ["work", "well", "--verbose"]):
        caplog.clear()
        invoke(toy, *arguments)
        assert "detail" in caplog.text
    caplog.clear()
    assert invoke(toy, "work", "well").stdout == "Next: this\na result\n"
    assert "detail" not in caplog.text
    assert invoke(toy, "-q", "work", "well", "-v").exit_code == 2


class Terminal(io.StringIO):
    """Standard error, on a terminal or not."""

    watched = True

    def isatty(self):
        return self.watched


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("how", ["TQDM_DISABLE", "--no-progress", "-q"])
def test_no_progress_is_shown_where_none_is_wanted(monkeypatch, watched, how):
    stderr, now, children = Terminal(), [0.0], list[str | None]()
    stderr.watched = watched
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    @click.group(cls=CommandGroup)
    def main():
        pass

    @main.command()
    def work():
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", stderr)
            with progress.progress("d", total=2, unit="step") as bar:
                for _ in range(2):
                    now[0] += 40
                    bar.update()
        children.append(os.environ.get("TQDM_DISABLE"))

    assert invoke(main, "work").exit_code == 0
    assert ("d: " in stderr.getvalue(), children) == (True, [None])
    before = stderr.getvalue()
    if how == "TQDM_DISABLE":
        monkeypatch.setenv(how, "1")
    assert invoke(main, "work", *([how] if how.startswith("-") else [])).exit_code == 0
    assert (stderr.getvalue(), children) == (before, [None, "1"])  # processes that it starts show none either
    assert ("TQDM_DISABLE" in os.environ) == (how == "TQDM_DISABLE")


@pytest.mark.parametrize("program", PROGRAMS)
def test_version_and_help_of_every_program(monkeypatch, program):
    group = group_of(PROGRAMS[program])
    shown = CliRunner().invoke(group, ["--version"], prog_name=program).output
    assert shown.startswith(f"{program} {__version__} (python {'.'.join(map(str, sys.version_info[:3]))}, torch ")
    assert "transformers " in shown
    for columns in (200, 60):
        monkeypatch.setenv("COLUMNS", str(columns))
        with click.Context(group, info_name=program, **group.context_settings) as ctx:
            listed = group.get_help(ctx)
        assert min(columns, 120) - 20 < max(map(len, listed.splitlines())) <= min(columns, 120)
        for command in group.commands.values():  # nothing is cut off
            assert "".join(command.get_short_help_str().split()) in "".join(listed.split())
    assert invoke(group, "-h").output == invoke(group, "--help").output
    for word, said in (("help", f"Write `{program} --help`"), ("hepl", "No such command")):
        assert said in CliRunner().invoke(group, [word], prog_name=program).output
    for name, command in group.commands.items():
        with command.make_context(
            name, [], parent=click.Context(group, info_name=program), resilient_parsing=True
        ) as ctx:
            own = [param for param in command.get_params(ctx) if isinstance(param, click.Option)]
            assert {"-v", "-q", "--no-progress"} <= {word for param in own for word in param.opts}
            flags = [param.required for param in own if not param.is_eager]
            text = command.get_help(ctx)
        if True in flags and False in flags:
            lines = text[text.index("Options:") :].splitlines()[1:]
            assert "[required]" in " ".join(lines[:4])


def completions(group, arguments, incomplete):
    return [
        (item.value, item.type) for item in ShellComplete(group, {}, "x", "X").get_completions(arguments, incomplete)
    ]


def test_completion_knows_students_signals_options_recipes_and_folders():
    def values(package, arguments, incomplete):
        return [value for value, _ in completions(group_of(package), arguments, incomplete)]

    two, one = "stage2_student", "stage1_teacher"
    assert {"mobilevlm", "mobilevlm-v1-tiny"} <= set(values(two, ["run", "--student"], "mob"))
    assert values(two, ["run", "--set"], "dft.sch") == ["dft.schedule="]
    assert values(two, ["run", "--set"], "dft.schedule=c") == ["dft.schedule=cosine", "dft.schedule=constant"]
    assert "recipe=compodistill-paper" in values(one, ["build", "--set"], "recipe=")
    assert values(one, ["build", "--signals"], "logits,answer_a") == ["logits,answer_attention"]
    for package, arguments in ((two, ["run", "--cache"]), (one, ["build", "--cache"]), ("common", ["verify"])):
        assert [kind for _, kind in completions(group_of(package), arguments, "")] == ["dir"]


@pytest.fixture
def cache(tmp_path):
    build_cache(tmp_path / "cache", make_plan("zarr"), fidelity={"kl": 0.25, "samples": 4})
    return tmp_path / "cache"


@pytest.mark.slow
def test_documents_of_cache_commands_hold_what_the_cache_does(cache, tmp_path, monkeypatch):
    rows = sum(len(make_record(p)["labels"]) for p in range(10) if p != FAILED)
    found = document(cachectl, "inspect", cache, "--json")
    assert (found["samples"], found["rows"], found["failed"], found["sealed"]) == (9, rows, 1, True)
    assert [failure["sample_id"] for failure in found["failures"]] == [sample_id(FAILED)]
    assert found["fidelity"]["kl"] == 0.25
    monkeypatch.setattr("vlm_distill_cache.common.tools.inspect._MAX_FAILURES", 0)
    failures = [document(cachectl, "inspect", cache, *more, "--json")["failures"] for more in ([], ["--failed"])]
    assert [len(listed) for listed in failures] == [0, found["failed"]]
    record = document(cachectl, "inspect", cache, sample_id(0), "--json")
    assert record["labels"] == make_record(0)["labels"].tolist()
    assert [row["target"] for row in record["rows"]] == record["labels"]
    assert document(cachectl, "verify", cache, "--json", "--deep") == {
        "cache": str(cache), "ok": True, "damaged": [], "missing": [],
    }  # fmt: skip
    copied = document(cachectl, "push", cache, tmp_path / "there", "--json")
    assert copied["transferred"]["files"] > 3
    assert document(cachectl, "pull", tmp_path / "there", tmp_path / "back", "--json")["totals"]["samples"] == 9
    assert (
        document(cachectl, "convert", cache, tmp_path / "tars", "--store", "webdataset", "--json")["store"]
        == "webdataset"
    )
    assert document(cachectl, "merge", cache, tmp_path / "back", "--output", tmp_path / "one", "--json")["samples"] == 9
    # One of the three shards is damaged.
    (cache / "shards" / "00001.json").write_text("{}")
    broken = document(cachectl, "verify", cache, "--json", code=1)
    assert not broken["ok"]
    assert "damaged files" in broken["error"]
    assert {"path", "reason", "remedy"} <= broken["damaged"][0].keys()
    steps = document(cachectl, "repair", cache, "--dry-run", "--json", code=0)["steps"]
    assert any(step["path"] == "shards/00001.json" and step["action"] == "remove" for step in steps)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([""], {"train", "run", "evaluate"}),
        (["train", "--set", "dtype=bf"], {"dtype=bfloat16"}),
        (["train", "--set", "dtype", "=", "bf"], {"bfloat16"}),  # as bash divides it
        (["train", "--set", "dtype", "="], {"float32", "bfloat16"}),
        (["train", "--set", "dtype", "=", "float32", "--set", "verify", "=", "t"], {"true"}),
        (["train", "--set", "dtype", "=", "float32", "--phases", "d"], {"dpt", "dft"}),
        (["train", "--set", "gradient_c"], {"gradient_checkpointing="}),
    ],
)
def test_bash_completes_values_behind_keys(monkeypatch, words, expected):
    monkeypatch.setenv("COMP_WORDS", "\n".join(["distill", *words]))
    monkeypatch.setenv("COMP_CWORD", str(len(words)))
    complete = get_completion_class("bash")(group_of("stage2_student"), {}, "distill", "_DISTILL_COMPLETE")
    found = {line.partition(",")[2] for line in complete.complete().splitlines()}
    assert found >= expected
    assert words == [""] or found == expected
