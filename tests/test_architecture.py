"""The import rule, the file-size cap, and what may be imported where."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "data", "stage1_teacher", "stage2_student")
MAY_IMPORT = {
    "common": {"common"},
    "data": {"common", "data"},
    "stage1_teacher": {"common", "data", "stage1_teacher"},
    "stage2_student": {"common", "data", "stage2_student"},
}
MAX_LINES = 400
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imported_packages(path: Path) -> set[str]:
    return imported_packages_of(ast.parse(path.read_text()), path)


def imported_packages_of(tree: ast.AST, path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add((node.module or "").partition(".")[0])
    return names


def test_every_package_has_files_to_check():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == set(PACKAGES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_import_only_what_the_rule_allows(path: Path):
    package = path.relative_to(ROOT).parts[0]
    assert imported_packages(path) & set(PACKAGES) <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_stay_small(path: Path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def test_nothing_of_ours_is_unpickled():
    for path in FILES:
        source = path.read_text()
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                weights_only = [k for k in node.keywords if k.arg == "weights_only"]
                assert weights_only, f"{path}: torch.load without weights_only"
                assert ast.unparse(weights_only[0].value) == "True", f"{path}: torch.load unpickles"
        # The name of the error that torch.load raises is all that may be imported of pickle.
        nodes = [
            n for n in tree.body if ast.unparse(n).partition("\n")[0] != "from pickle import UnpicklingError"
        ]
        imports = imported_packages_of(ast.Module(body=nodes, type_ignores=[]), path)
        assert not imports & {"pickle", "dill", "joblib"}, path


@pytest.mark.parametrize(
    "module",
    [
        "common.cli", "common.tools.verify", "common.tools.convert", "common.remotes.pull", "common.cache.manifest",
        "common.cache.reader", "common.config", "common.codecs.quantise", "common.attention.layers",
        "stage1_teacher.cli", "stage2_student.cli",
    ],
)  # fmt: skip
def test_command_lines_and_cache_tools_start_without_torch(module: str):
    code = f"import vlm_distill_cache.{module}, sys; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
