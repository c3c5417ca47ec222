"""Names that are not UTF-8, or that move a terminal's cursor: used, or refused in one line, by every command."""

import functools
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from vlm_distill_cache.common.config import load_config
from vlm_distill_cache.common.errors import ConfigError
from vlm_distill_cache.common.terminal.command_line import quoted, unusable_name
from vlm_distill_cache.stage1_teacher.config import BuildConfig
from vlm_distill_cache.stage2_student.config import TrainConfig

ROOT = Path(__file__).parents[1]
COMMANDS = {
    "common.cli": ["inspect NAME", "verify NAME", "repair NAME", "convert NAME c --store zarr", "merge NAME --output c",
                   "push NAME c", "pull NAME c", "select c NAME --samples 3", "inspect c --picture NAME"],
    "stage1_teacher.cli": ["build --data NAME --cache c", "build --cache NAME", "build --teacher NAME", "build --config NAME",
                           "build --images NAME", "build --set images=NAME", "fidelity --cache NAME", "seal NAME", "report NAME",
                           "estimate --json NAME", "demo-teacher --output NAME"],
    "stage2_student.cli": ["train --cache NAME --output o", "train --cache . --output NAME", "run --cache . --output NAME",
                           "train --cache . --output o --config NAME", "evaluate NAME", "evaluate . --output NAME",
                           "report NAME", "export . --output NAME", "import NAME --output o", "prune --teacher NAME",
                           "run --cache . --output o --set evaluation.data=NAME"],
}  # fmt: skip
BAD = (b"dat\xe4n", b"line\nfeed", b"\x1b[31mred", b"\xc2\x9b2J", "turned\u202eround".encode())
SCRIPT = """
import importlib, os, sys
from click.testing import CliRunner
for line in sys.stdin.buffer.read().split(b"\\0"):
    module, *arguments = line.split(b"\\t")
    main = importlib.import_module("vlm_distill_cache." + module.decode()).main
    result = CliRunner().invoke(main, [os.fsdecode(argument) for argument in arguments])
    told = result.output.encode(errors="strict")
    fine = result.exit_code == 2 and told.startswith(b"error: ") and told.count(b"\\n") == 1 and b"\\x1b" not in told
    if not fine or isinstance(result.exception, UnicodeError):
        print(line, result.exit_code, told, repr(result.exception))
"""
ONE_AFTER_ANOTHER = """
import contextlib, sys
from vlm_distill_cache.stage2_student.cli import main
for name in sys.argv[2:]:
    with contextlib.suppress(SystemExit):
        main(["evaluate", "--data", name, "--", sys.argv[1]])
    sys.stderr.flush()
    sys.stderr.buffer.write(b"\\0")
sys.stderr.flush()
"""
ENVIRONMENTS = ((), (("LC_ALL", "C"), ("PYTHONUTF8", "0")), (("PYTHONIOENCODING", "ascii"),))
NAMES = ("päth 数据.json", "-x", "x" * 4000, "quo'te \"x", "non\u00a0breaking\u200d")


@functools.cache
def in_one_process(environment) -> tuple[bytes, list[bytes]]:
    """What a process says of names that are usable, each alone, and then of those that are not, by every command."""
    lines = [
        b"\t".join([module.encode(), *(word.encode().replace(b"NAME", bad) for word in command.split())])
        for module, commands in COMMANDS.items()
        for command in commands
        for bad in BAD
        if not (bad.startswith(b"line") and "--set" in command)  # the values of options may stand on several lines
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", ONE_AFTER_ANOTHER + SCRIPT, folder, *NAMES], input=b"\0".join(lines),
            env=os.environ | {"PYTHONPATH": str(ROOT / "src")} | dict(environment), cwd=folder,
            capture_output=True, check=True,
        )  # fmt: skip
        assert list(Path(folder).iterdir()) == []
    return done.stdout, done.stderr.split(b"\0")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.slow
def test_every_command_refuses_a_bad_name_in_one_line(environment):
    unexpected, told = in_one_process(environment)
    assert (unexpected, told[-1]) == (b"", b"")


@pytest.mark.parametrize("environment", ENVIRONMENTS)
@pytest.mark.slow(quick=1)
def test_other_names_reach_the_command_whatever_can_be_printed(environment):
    for name, told in zip(NAMES, in_one_process(environment)[1][:-1], strict=True):
        assert b"Traceback" not in told
        not_told = "PYTHONUTF8" in dict(environment) and not name.isascii()
        assert (b"UTF-8" if not_told else b"no distillation.json") in told, name


def test_a_proposed_command_is_one_line_that_a_shell_reads_back(tmp_path: Path):
    for name in [
        b"plain",
        b"two words",
        b"it's",
        b"new\nline",
        b"\x1b[31m\\'",
        b"dat\xe4n",
        "ä\u00a0ö".encode(),
        b"-o",
    ]:
        words = quoted(os.fsdecode(name))
        assert words.isprintable()
        said = subprocess.run(["bash", "-c", f"printf %s {words}"], capture_output=True, check=True).stdout
        assert said == (b"./-o" if name == b"-o" else name)
    assert quoted("a b") == shlex.quote("a b")


def test_a_name_that_only_the_locale_cannot_read_is_told_apart():
    assert "rename it" in unusable_name("dat\udce4n", printed="")
    assert unusable_name("päth\u00a0数据", printed="päth\u00a0数据") == ""


@pytest.mark.parametrize(
    ("config", "option"), [(BuildConfig, "images"), (TrainConfig, "images"), (TrainConfig, "output")]
)
@pytest.mark.parametrize("written", ['"\\udce4"', '"\\x1b[2J"', '"\\x00"'])
def test_values_in_yaml_are_held_to_the_same(config, option: str, written: str, tmp_path: Path):
    path = tmp_path / "options.yaml"
    path.write_text(f"{option}: {written}\n")
    with pytest.raises(ConfigError, match=rf"{option} is .*not UTF-8 or holds characters that do not print") as caught:
        load_config(config, path)
    assert str(caught.value).isprintable()
