"""The command-line surface is frozen: a new, lost or renamed option is a visible decision."""

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from vlm_distill_cache.commands import group_of
from vlm_distill_cache.common.terminal.command_line import start_logging

ROOT = Path(__file__).resolve().parent.parent
GROUPS = {
    "teacher-cache": "stage1_teacher",
    "distill": "stage2_student",
    "cachectl": "common",
}
SURFACE = {
    "cachectl convert": "--dry-run --json --store SOURCE TARGET",
    "cachectl import-logprobs": "--cache --data --format --images --json --limit "
    "--missing-target --overwrite --set --store --teacher --teacher-name FILES",
    "cachectl inspect": "--data --failed --image --images --json --picture --shift --sinks CACHE SAMPLE_ID",
    "cachectl pull": "--dry-run --jobs --json --no-verify --samples --shards --signals --top-k CACHE SOURCE",
    "cachectl push": "--dry-run --jobs --json --overwrite CACHE DESTINATION",
    "cachectl merge": "--dry-run --json --output --store SOURCES",
    "cachectl repair": "--deep --dry-run --json CACHE",
    "cachectl verify": "--deep --json CACHE",
    "distill compare": "--json --output OUTPUTS",
    "distill estimate": "--cache --config --data --images --json --log-with --memory --output --phases --price --seed --set "
    "--steps --student",
    "distill evaluate": "--cache --card --data --images --json --limit --oracle --output --quantise --split STUDENT",
    "distill export": "--dtype --json --layout --output --quantise STUDENT",
    "distill import": "--json --output --vision-tower CHECKPOINT",
    "distill push": "--dry-run --json --message --overwrite --public --revision --which REPOSITORY STUDENT",
    "distill report": "--json OUTPUT",
    "distill select-tokens": "--cache --data --decoding-selection --decoding-tokens --images --json --merge-frames --output "
    "--seed --shift-threshold --sink-penalty --token-selection --visual-tokens MODEL",
    "distill suite": "--cache --dry-run --images --json --limit --nproc --only --output --prompts BENCHMARKS STUDENT",
    "distill prune": "--data --depth-importance --images --importance --json --keep --output --ratios --samples --spare-first "
    "--spare-last --teacher --template",
    "distill run": "--cache --config --data --dry-run --extend --images --json --log-with --nproc --output --phases --seed "
    "--set --sketch --student --teacher",
    "distill submit": "--address --cache --config --cpus --data --dry-run --engine --engine-set --env --extend --gpus --hours "
    "--images --job --json --log-with --nodes --nproc --output --phases --prefix --restarts --seed "
    "--set --sketch --student --teacher",
    "distill train": "--cache --config --data --dry-run --extend --images --json --log-with --output --phases --seed "
    "--set --sketch --student",
    "teacher-cache advise": "--answers --budget --cache --config --data --eval-data --images --json --limit "
    "--max-gradient-error --output --samples --set --signals --store --student --student-set --student-steps --teacher",
    "teacher-cache build": "--answers --cache --config --data --dry-run --estimate --images --json --limit --nproc --overwrite "
    "--part --set --signals --sketch --store --teacher",
    "teacher-cache demo-teacher": "--data --json --output --seed",
    "teacher-cache estimate": "--answers --cache --config --data --epochs --images --json --limit --price --samples --set "
    "--signals --store --student-parameters --student-step --students --teacher",
    "teacher-cache extend": "--answers --config --data --dry-run --images --json --limit --nproc "
    "--set --signals --store --teacher CACHE",
    "teacher-cache fidelity": "--answers --cache --config --data --images --json --limit --samples "
    "--set --signals --store --teacher",
    "teacher-cache report": "--json CACHE",
    "teacher-cache seal": "--json CACHE",
    "teacher-cache status": "--json CACHE",
    "teacher-cache submit": "--address --answers --cache --config --cpus --data --dry-run --engine --engine-set --env --gpus "
    "--hours --images --json --limit --nproc --prefix --restarts --set --signals --store --teacher --workers",
}
TARGETS = {
    "help", "setup", "teacher-cache", "distill", "evaluate", "report", "suite", "demo", "demo-teacher", "experiment",
    "experiment-seeds", "experiment-several", "experiment-smollm", "experiment-photos",
    "test", "test-all", "checks", "format", "docs", "bench", "bench-compare", "bench-codec", "bench-instructions", "bench-peers",
    "full-size", "gpu-check", "battery", "matrix",
    "bench-scale", "profile", "harness", "lock", "sbom", "audit", "clean",
}  # fmt: skip


def test_the_surface_is_the_frozen_one():
    found = {}
    for program, package in GROUPS.items():
        for name, command in group_of(package).commands.items():
            words = [p.opts[0] if p.param_type_name == "option" else p.name.upper() for p in command.params]
            found[f"{program} {name}"] = " ".join(sorted(words))
    assert found == SURFACE


@pytest.mark.parametrize("command", SURFACE)
def test_every_command_explains_itself(command: str):
    program, name = command.split()
    result = CliRunner().invoke(group_of(GROUPS[program]), [name, "--help"])
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 4


def test_make_targets_are_the_frozen_ones_and_all_explained():
    makefile = (ROOT / "Makefile").read_text()
    explained = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.M))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split())
    assert explained == phony == TARGETS


def test_make_help_lists_the_targets():
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f"make {target}" in shown for target in TARGETS)


def test_a_misspelt_variable_is_refused_and_named():
    run = subprocess.run(["make", "-n", "distill", "STUDNET=x"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "there is no variable STUDNET; those that can be set: PYTHON" in run.stderr


@pytest.mark.slow
def test_any_option_reaches_both_stages_through_make(tmp_path: Path):
    """The recipe's own shell, with a program that prints its arguments, in a folder where a pattern would match."""
    (tmp_path / "phases=d").touch()
    recipes = (ROOT / "Makefile").read_text()
    (tmp_path / "Makefile").write_text(recipes)
    for program in ("teacher-cache", "distill"):
        path = tmp_path / ".venv" / "bin" / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('#!/bin/sh\nprintf "<%s>" "$@"\n')
        path.chmod(0o755)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / ".installed").touch()

    # No make around it, whose exports would be values that somebody gave.
    variables = re.findall(r"^KNOWN +:= (.*)$", recipes, re.MULTILINE)[0].split()
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in variables}

    def arguments(*words: str, environment: dict[str, str] = plain) -> str:
        ran = subprocess.run(
            ["make", *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return ran.stdout

    given = 'SET=phases=[dft] dft.losses.logits=0 dft.data="x"'
    shown = arguments("distill", "CACHE=s3://b/c", given, "CACHE_SET=grid=1")
    assert '<--set><phases=[dft]><--set><dft.losses.logits=0><--set><dft.data="x">' in shown
    assert "grid=1" not in shown
    assert "<--set><grid=1><--set><b=[2]>" in arguments("teacher-cache", "CACHE_SET=grid=1 b=[2]", given)
    assert "--set" not in arguments("distill", "CACHE=s3://b/c", "SET= ")
    # Recipes are not echoed: what is seen is what the programs print.
    assert arguments("report", "OUTPUT=o") == "<report><o>"
    shown = arguments("suite", "OUTPUT=o", "BENCHMARKS=a/b c", "NPROC=2", "SUITE_OPTIONS=--prompts plain")
    assert shown == "<suite><o/distilled/final><a/b c><--output><o/suite-b c><--nproc><2><--prompts><plain>"
    # A finished cache is compared with options of stage one that somebody gave, and taken as it is without any.
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "manifest.json").touch()
    assert "<build>" not in arguments("distill", "CACHE=done", "STUDENT=pruned:0.5")
    assert "<--signals><logits>" in arguments("distill", "CACHE=done", "SIGNALS=logits")
    assert "<--set><grid=1>" in arguments("distill", "CACHE=done", "CACHE_SET=grid=1")
    # A file of both stages takes what somebody gave, and no default of make; options of stage one belong into it.
    for text in (
        "teacher_cache: {}\ndistill: {}\n",
        '  "teacher_cache": {}\n  "distill": {}\n',
        '{"teacher_cache": {}}',
    ):
        (tmp_path / "both.yaml").write_text(text)
        assert arguments("distill", "CONFIG=both.yaml") == "<run><--config><both.yaml>"
    assert arguments("teacher-cache", "CONFIG=both.yaml", "CACHE=c") == "<build><--config><both.yaml><--cache><c>"
    # What a file of one stage names holds for both, as if it were given; what is given stands above it.
    (tmp_path / "two.yaml").write_text("{output_dir: r, cache: 'a b', data: mine.json, student: s}")
    shown = arguments("distill", "CONFIG=two.yaml", "STUDENT=t")
    assert "<build><--data><mine.json><--cache><a b><--store><zarr>" in shown
    assert "<run><--student><t><--data><mine.json><--cache><a b><--output><r><--config><two.yaml>" in shown
    assert arguments("report", "CONFIG=two.yaml") == "<report><r>"
    assert arguments("evaluate", "CONFIG=two.yaml", "OUTPUT=o") == "<evaluate><o/distilled/final>"
    (tmp_path / "one.yaml").write_text("{store: webdataset, data: x/y.json}")
    shown = arguments("teacher-cache", "CACHE_CONFIG=one.yaml")
    assert shown.startswith("<build><--data><x/y.json><--cache><build/cache/y-webdataset><--store><webdataset>")
    shown = arguments("distill", "CONFIG=both.yaml", "STUDENT=s", "OUTPUT=a b", "SET=seed=1")
    assert shown == "<run><--config><both.yaml><--student><s><--output><a b><--set><seed=1>"
    both = ["make", "distill", "CONFIG=both.yaml", "SIGNALS=logits"]
    refused = subprocess.run(both, cwd=tmp_path, env=plain, capture_output=True, text=True, check=False)
    assert "holds stage one, too: write its options there, instead of SIGNALS" in refused.stderr
    # A path is what somebody typed, whatever make, the shell or a make below this one would read in it.
    path = r"""a$b $(c) ${d} $$e 'f' "g" \h #i `j` %k ~l;m&n"""
    for given, environment in (
        ([f"CACHE={path}", f"OUTPUT={path}"], plain),
        ([], plain | {"CACHE": path, "OUTPUT": path}),
    ):
        shown = arguments("distill", *given, environment=environment)
        assert f"<build><--data><shapes><--cache><{path}>" in arguments(
            "teacher-cache", *given, environment=environment
        )
        assert f"<--cache><{path}>" in shown  # by a make of its own, the cache is built first
        assert f"<--output><{path}>" in arguments(
            "distill", "CACHE=s3://b/c", *given[1:], environment=environment | {"CACHE": "x"}
        )
    assert "<--cache><build/cache/a$b-zarr>" in arguments("teacher-cache", "DATA=x/a$b.json")


@pytest.mark.parametrize(
    ("student", "folder"),
    [
        ("mobilevlm", "mobilevlm"), ("pruned:0.5", "pruned-0.5"), ("pruned:width:0.5,depth:0.75", "pruned-width-0.5-depth-0.75"),
        ("/models/mine/", "mine"), ("/of@me/mine", "mine"),
        ("mtgv/MobileVLM_V2-1.7B", "MobileVLM_V2-1.7B"), ("org/name@v1", "org-name@v1"),
        ("org/name@refs/pr/3", "org-name@refs-pr-3"),
    ],
)  # fmt: skip
def test_a_runs_folder_is_named_after_its_student(tmp_path: Path, student: str, folder: str):
    (tmp_path / "print.mk").write_text('shown: ; @echo "$(OUTPUT)"\n')
    # Below `make test` its variables are in the environment.
    makes = ("MAKE", "OUTPUT", "CACHE", "STUDENT", "STORE", "DATA")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(makes)}
    command = [
        "make",
        "-f",
        str(ROOT / "Makefile"),
        "-f",
        str(tmp_path / "print.mk"),
        "shown",
        f"STUDENT={student}",
        "CACHE=c",
    ]
    shown = subprocess.run(command, cwd=tmp_path, env=plain, capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == f"build/runs/{folder}-c"


def test_what_clients_of_the_network_log_is_not_shown():
    start_logging()
    for name in ("botocore.credentials", "httpx", "httpx2", "s3transfer"):
        assert not logging.getLogger(name).isEnabledFor(logging.INFO)
        assert logging.getLogger(name).isEnabledFor(logging.WARNING)


def test_a_librarys_malformed_log_call_does_not_end_the_command():
    code = (
        "import logging\nfrom vlm_distill_cache.common.terminal.command_line import start_logging\nstart_logging()\n"
        "logging.getLogger('lib').warning('text', FutureWarning)\nlogging.getLogger('lib').warning('said')\n"
        "logging.getLogger('lib').warning('said')\nprint('went on')"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "went on\n"
    assert ran.stderr.count("said\n") == 1


@pytest.mark.parametrize("command", ["train", "run", "export"])
def test_an_address_is_no_place_to_write_a_student_to(command):
    arguments = [str(ROOT)] if command == "export" else ["--cache", str(ROOT)]
    main = group_of(GROUPS["distill"])
    result = CliRunner().invoke(main, [command, *arguments, "--output", "s3://bucket/run"])
    assert result.exit_code == 2
    assert "give a folder of this machine" in " ".join(result.output.replace("│", "").split())
