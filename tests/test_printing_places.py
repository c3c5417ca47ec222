"""One place prints: whatever else would write to a terminal is found in the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FILES = [
    path for folder in ("common", "data", "stage1_teacher", "stage2_student") for path in (ROOT / folder).rglob("*.py")
]
FILES += (ROOT / "src" / "vlm_distill_cache").glob("*.py")
COMMAND_LINE = "common/terminal/command_line.py"
# What prints, or makes something that does, and the functions that may.
ALLOWED = {
    "print": (), "pprint": (), "os.write": (), "os.system": (), "warnings.warn": (), "warnings.showwarning": (),
    "traceback.print_exc": (), "traceback.print_exception": (), "threading.__excepthook__": (), "sys.__excepthook__": (),
    "click.echo": ((COMMAND_LINE, "_write"),), "click.secho": (), "click.echo_via_pager": (), "click.confirm": (),
    "click.prompt": (), "click.progressbar": (), "tqdm.write": (),
    # over a pipe, to us or to make
    "sys.stdout.write": (("data/text/tokenizer_program.py", "main"), ("src/vlm_distill_cache/for_make.py", "main")),
    "sys.stdout.buffer.write": (), "sys.stderr.buffer.write": (), "sys.__stderr__.write": (),
    "sys.stderr.write": (("src/vlm_distill_cache/commands.py", "_run"),),  # a text of ours
    "logging.basicConfig": (), "logging.StreamHandler": ((COMMAND_LINE, "start_logging"),), "logging.FileHandler": (),
    "tqdm": (("common/terminal/progress.py", "progress"),),
}  # fmt: skip
WORDS = re.compile("|".join(rf"\b{re.escape(name.rpartition('.')[2])}\(" for name in ALLOWED))


def calls(tree: ast.AST, inside: str = "") -> list[tuple[str, str]]:
    """What is called, and in which function."""
    found = []
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else inside
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), name))
        found += calls(node, name)
    return found


@pytest.mark.parametrize("where", sorted({path.relative_to(ROOT).parts[0] for path in FILES}))
def test_nothing_but_say_prints(where: str):
    others = [
        (str(path.relative_to(ROOT)), called, inside)
        for path in FILES
        if path.relative_to(ROOT).parts[0] == where and WORDS.search(path.read_text())
        for called, inside in calls(ast.parse(path.read_text()))
        if called in ALLOWED and (str(path.relative_to(ROOT)), inside) not in ALLOWED[called]
    ]
    assert others == []


def test_ways_to_print_are_noticed():
    source = "def f():\n    print(1)\n    lambda: sys.stdout.write(2)\nclick.echo(3)"
    assert [call for call in calls(ast.parse(source)) if call[0] in ALLOWED] == [
        ("print", "f"), ("sys.stdout.write", "f"), ("click.echo", ""),
    ]  # fmt: skip
